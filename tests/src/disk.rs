//! Disks as files: made with a bit of everything, compared byte by byte.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

/// The grain at which a restore knows where a byte lives.
pub const BLOCK_BYTES: u64 = 4096;

const MIB: usize = 1 << 20;

/// Makes a disk of `size_bytes` at `path`: holes, zeroes that are written, noise, text, and repeated content, in
/// zones of uneven length. The same seed gives the same bytes.
///
/// # Errors
/// The file cannot be written.
pub fn make(path: &Path, size_bytes: u64, seed: u64) -> Result<()> {
    let file = File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
    file.set_len(size_bytes)?;
    let mut noise = Noise::new(seed);
    let repeated = noise.bytes(MIB);
    let mut offset = 0;
    while offset < size_bytes {
        let kind = noise.next() % 5;
        let wanted = (noise.next() % 512 + 1) * BLOCK_BYTES;
        let len_bytes = wanted.min(size_bytes - offset);
        let len = usize::try_from(len_bytes)?;
        let bytes = match kind {
            0 => None,
            1 => Some(vec![0; len]),
            2 => Some(noise.bytes(len)),
            3 => Some(text(offset, len)),
            _ => Some(repeated.iter().copied().cycle().take(len).collect()),
        };
        if let Some(bytes) = bytes {
            file.write_all_at(&bytes, offset)?;
        }
        offset += len_bytes;
    }
    Ok(())
}

/// The blocks in which two disks of one size differ, in order, as block numbers.
///
/// # Errors
/// A file cannot be read, or their sizes differ.
pub fn differing_blocks(one: &Path, other: &Path) -> Result<Vec<u64>> {
    let (one, other) = (Disk::open(one)?, Disk::open(other)?);
    ensure!(one.size_bytes == other.size_bytes, "sizes differ: {} and {}", one.size_bytes, other.size_bytes);
    let mut differing = Vec::new();
    let mut offset = 0;
    let (mut left, mut right) = (vec![0; MIB], vec![0; MIB]);
    while let Some(data) = one.next_data(offset)?.into_iter().chain(other.next_data(offset)?).min() {
        // Whole blocks, from the first in which either file has data.
        offset = data - data % BLOCK_BYTES;
        let len = usize::try_from((one.size_bytes - offset).min(MIB as u64))?;
        one.file.read_exact_at(&mut left[..len], offset)?;
        other.file.read_exact_at(&mut right[..len], offset)?;
        if left[..len] != right[..len] {
            let block_len = usize::try_from(BLOCK_BYTES)?;
            let pairs = left[..len].chunks(block_len).zip(right[..len].chunks(block_len));
            let numbered = (offset / BLOCK_BYTES..).zip(pairs);
            differing.extend(numbered.filter(|(_, (left, right))| left != right).map(|(number, _)| number));
        }
        offset += len as u64;
    }
    Ok(differing)
}

/// Demands that two disks hold the same bytes.
///
/// # Errors
/// They do not, or cannot be read.
pub fn ensure_same(one: &Path, other: &Path) -> Result<()> {
    let differing = differing_blocks(one, other)?;
    ensure!(
        differing.is_empty(),
        "{} and {} differ in {} blocks, the first is {}",
        one.display(),
        other.display(),
        differing.len(),
        differing[0]
    );
    Ok(())
}

/// How many bytes of `path` are allocated, whatever its length.
///
/// # Errors
/// There is no such file.
pub fn allocated_bytes(path: &Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;
    Ok(path.metadata().with_context(|| path.display().to_string())?.blocks() * 512)
}

struct Disk {
    file: File,
    size_bytes: u64,
}

impl Disk {
    fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        let size_bytes = seek(&file, SeekFrom::End(0))?;
        Ok(Self { file, size_bytes })
    }

    /// The first byte from `offset` on that is not in a hole.
    fn next_data(&self, offset: u64) -> Result<Option<u64>> {
        if offset >= self.size_bytes {
            return Ok(None);
        }
        match seek(&self.file, SeekFrom::Data(offset)) {
            Ok(found) => Ok(Some(found)),
            Err(Errno::NXIO) => Ok(None),
            // A block device has no holes to ask for.
            Err(Errno::INVAL) => Ok(Some(offset)),
            Err(error) => Err(error.into()),
        }
    }
}

/// SplitMix64: enough noise for a disk that must not compress, and the same one for a seed everywhere.
#[derive(Debug, Clone)]
pub struct Noise(u64);

impl Noise {
    /// Noise that begins at `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    #[expect(clippy::should_implement_trait, reason = "endless, so an iterator's Option would be in the way")]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// `len` bytes of it.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len + 8);
        while bytes.len() < len {
            bytes.extend_from_slice(&self.next().to_le_bytes());
        }
        bytes.truncate(len);
        bytes
    }
}

/// Lines that say where they stand: they compress, and no two are the same.
fn text(offset: u64, len: usize) -> Vec<u8> {
    let mut text = Vec::with_capacity(len + 64);
    let mut number = 0u64;
    while text.len() < len {
        text.extend_from_slice(format!("line {number} of the zone at {offset}: all is well\n").as_bytes());
        number += 1;
    }
    text.truncate(len);
    text
}
