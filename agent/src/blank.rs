//! Whether a target that nobody knows holds anything: what `restore` and `live-restore` look at before they write.
//!
//! A file tells by itself where it has data (`SEEK_DATA`). A block device does not: no driver of Linux answers
//! `SEEK_DATA`, so it is read: its first and last MiB, where partition tables and signatures stand, and
//! evenly between them as many samples as a slow disk reads in a few seconds. A small device is read whole. So a file
//! system is found by its tables, which lie all over it; a few bytes alone on a large device may be overlooked.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;

/// Bytes at each end of a device that are looked at.
const EDGE_BYTES: u64 = 1 << 20;
/// Samples between them.
const SAMPLES: u64 = 256;
const SAMPLE_BYTES: u64 = 64 << 10;
/// Samples begin at multiples of this.
const SAMPLE_ALIGNMENT: u64 = 4096;

/// A byte of a device of `size` bytes near which something else than zeroes was seen, if there is one.
///
/// # Errors
/// Where the device cannot be read.
pub(crate) fn first_data(device: &File, size: u64) -> io::Result<Option<u64>> {
    let mut buf = vec![0; SAMPLE_BYTES as usize];
    for range in looked_at(size) {
        let mut at = range.start;
        while at < range.end {
            let piece = &mut buf[..(range.end - at).min(SAMPLE_BYTES) as usize];
            device.read_exact_at(piece, at)?;
            if !repository::is_zero(piece) {
                return Ok(Some(at));
            }
            at += piece.len() as u64;
        }
    }
    Ok(None)
}

/// Whether anything was ever written to a file: one of holes alone counts as empty.
///
/// # Errors
/// What the operating system says.
pub(crate) fn has_data(file: &File) -> io::Result<bool> {
    match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(0)) {
        Ok(_) => Ok(true),
        Err(rustix::io::Errno::NXIO) => Ok(false),
        // A file system that knows no holes: what is long is not empty.
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::OPNOTSUPP) => Ok(file.metadata()?.len() > 0),
        Err(error) => Err(error.into()),
    }
}

/// What is looked at of a device, the ends first.
fn looked_at(size: u64) -> Vec<Range<u64>> {
    if size <= 2 * EDGE_BYTES + SAMPLES * SAMPLE_BYTES {
        return std::iter::once(0..size).collect();
    }
    let last_sample = size - EDGE_BYTES - SAMPLE_BYTES;
    let between = u128::from(last_sample - EDGE_BYTES);
    let samples = (0..SAMPLES).map(|index| {
        let offset = between * u128::from(index) / u128::from(SAMPLES - 1);
        let start = (EDGE_BYTES + offset as u64) / SAMPLE_ALIGNMENT * SAMPLE_ALIGNMENT;
        start..start + SAMPLE_BYTES
    });
    [0..EDGE_BYTES, size - EDGE_BYTES..size].into_iter().chain(samples).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_device_is_looked_at_whole_and_a_large_one_at_its_ends_and_evenly_between() {
        assert_eq!(looked_at(9 << 20), vec![0..9 << 20; 1]);
        let size = (1 << 40) + 512;
        let ranges = looked_at(size);
        assert_eq!(ranges[..2], [0..1 << 20, size - (1 << 20)..size]);
        assert_eq!(ranges.len() as u64, 2 + SAMPLES);
        let step = (1 << 40) / SAMPLES;
        let mut end = EDGE_BYTES;
        for range in &ranges[2..] {
            assert!(range.start < end + 2 * step && range.end <= size, "{range:?} after {end}");
            assert_eq!((range.end - range.start, range.start % SAMPLE_ALIGNMENT), (SAMPLE_BYTES, 0));
            end = range.end;
        }
        assert!(end > size - 2 * EDGE_BYTES);
    }

    #[test]
    fn data_in_the_middle_alone_is_seen() {
        let file = tempfile::tempfile().unwrap();
        let size = 256 << 20;
        file.set_len(size).unwrap();
        assert_eq!(first_data(&file, size).unwrap(), None);
        assert!(!has_data(&file).unwrap());
        file.write_all_at(&vec![1; 2 << 20], 80 << 20).unwrap();
        let seen = first_data(&file, size).unwrap().unwrap();
        assert!((80 << 20..82 << 20).contains(&seen), "{seen}");
        assert!(has_data(&file).unwrap());
    }
}
