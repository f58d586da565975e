//! What several tests need: small disks, capturing them whole, and reading them back whole.

#![allow(dead_code, unreachable_pub, reason = "each test uses a part of it")]

pub mod sim;

use repository::{
    CaptureOptions, CaptureWriter, ChunkDecoder, ChunkEncoder, ChunkId, DEFAULT_LEVEL, DiskEntry, GroupName,
    MapEntry, Repository, Result, Snapshot, SnapshotMeta, is_zero,
};

/// The smallest chunk: disks of tests are small.
pub const CHUNK: u32 = 64 << 10;

/// A chunk's worth of bytes that shrink to little, and differ by their number.
pub fn chunk_of(number: u64) -> Vec<u8> {
    let mut bytes = vec![0; CHUNK as usize];
    for (at, part) in bytes.chunks_exact_mut(4096).enumerate() {
        part[..8].copy_from_slice(&(number * 1000 + at as u64 + 1).to_le_bytes());
    }
    bytes
}

/// A chunk's worth of bytes that do not shrink.
pub fn noise_of(number: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(CHUNK as usize);
    let mut block = ChunkId::of(&number.to_le_bytes());
    while bytes.len() < CHUNK as usize {
        bytes.extend_from_slice(block.as_bytes());
        block = ChunkId::of(block.as_bytes());
    }
    bytes
}

/// A disk from a picture: `.` is a chunk of zeroes, a lower-case letter one that shrinks, a capital one that does not.
pub fn disk(picture: &str) -> Vec<u8> {
    let chunk = |letter: u8| match letter {
        b'.' => vec![0; CHUNK as usize],
        b'A'..=b'Z' => noise_of(letter.into()),
        _ => chunk_of(letter.into()),
    };
    picture.bytes().flat_map(chunk).collect()
}

pub fn group(name: &str) -> GroupName {
    name.parse().unwrap()
}

pub fn meta() -> SnapshotMeta {
    SnapshotMeta { host: "host".into(), tool: "test".into(), ..SnapshotMeta::default() }
}

/// Small packs, so that there are several.
pub fn small_packs() -> CaptureOptions {
    CaptureOptions { pack_len: 100_000, ..CaptureOptions::default() }
}

/// Puts a whole disk.
pub fn put_disk(
    repo: &Repository,
    capture: &mut CaptureWriter,
    name: &str,
    bytes: &[u8],
    parent: Option<&Snapshot>,
) -> Result<()> {
    let name: repository::DiskName = name.parse().unwrap();
    let parent = match parent.map(|parent| parent.disk(&name)) {
        Some(Ok(entry)) => Some(repo.disk_map(entry)?),
        _ => None,
    };
    let disk = capture.begin_disk(name, bytes.len() as u64, CHUNK, parent)?;
    let mut encoder = ChunkEncoder::new(DEFAULT_LEVEL)?;
    for (index, chunk) in bytes.chunks(CHUNK as usize).enumerate() {
        let index = index as u64;
        if is_zero(chunk) {
            disk.put_zero(index..index + 1)?;
            continue;
        }
        let id = encoder.id(chunk);
        if !disk.put_known(index, &id)? {
            let stored = encoder.encode(chunk)?;
            disk.put_chunk(index, &id, &stored)?;
        }
    }
    Ok(())
}

/// Captures one disk called `disk0` as a snapshot.
pub fn capture(repo: &Repository, name: &str, bytes: &[u8]) -> Result<Snapshot> {
    capture_with(repo, name, bytes, small_packs())
}

pub fn capture_with(
    repo: &Repository,
    name: &str,
    bytes: &[u8],
    options: CaptureOptions,
) -> Result<Snapshot> {
    let parent = repo.latest(&group(name)).ok().flatten();
    let mut capture = repo.begin_capture(&group(name), options)?;
    put_disk(repo, &mut capture, "disk0", bytes, parent.as_ref())?;
    capture.add_attachment("vm.conf".parse().unwrap(), format!("memory of {name}").as_bytes())?;
    capture.commit(meta())
}

/// Reads a whole disk back, every chunk verified.
pub fn restore(repo: &Repository, disk: &DiskEntry) -> Result<Vec<u8>> {
    let map = repo.disk_map(disk)?;
    let mut decoder = ChunkDecoder::new()?;
    let mut bytes = vec![0; disk.size as usize];
    let entries = map.entries(0..map.chunk_count())?;
    for (entry, out) in entries.iter().zip(bytes.chunks_mut(disk.chunk_size as usize)) {
        if let MapEntry::Chunk(id) = entry {
            repo.read_chunk(id, &mut decoder, out)?;
        }
    }
    Ok(bytes)
}

/// Restores the first disk of a snapshot.
pub fn restore_first(repo: &Repository, snapshot: &Snapshot) -> Result<Vec<u8>> {
    restore(repo, &snapshot.manifest().disks[0])
}
