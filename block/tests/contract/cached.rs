//! What of a disk is in the page cache, and how it gets there.

use std::os::unix::fs::FileExt;

use block::{AlignedBuf, ByteRange, Durability, ErrorKind, Loaded};

use crate::disks;

const SIZE: u64 = 8 << 20;

fn range(start: u64, len: u64) -> ByteRange {
    ByteRange::new(start, len).unwrap()
}

#[test]
fn cached_pages_are_resident_and_direct_disks_have_none() {
    for subject in disks::files(SIZE) {
        let disk = subject.file.as_ref().unwrap();
        subject.engine.run(async {
            let device = subject.device.open().unwrap();
            let data = AlignedBuf::from_slice(&vec![1; 1 << 20]);
            device.write(0, data, Durability::Volatile).await.0.unwrap();
            let resident = device.resident(range(5, 1_000_000));
            assert_eq!(resident.is_some(), !disk.is_direct(), "{}", subject.name);
            if let Some((_, offset)) = resident {
                assert_eq!(offset, 5);
            }
            assert!(device.resident(range(SIZE - 10, 11)).is_none());
        });
    }
}

#[test]
fn what_is_loaded_is_in_the_buffer_or_where_resident_says() {
    let pattern: Vec<u8> = (0..SIZE).map(|at| (at / 64 % 251) as u8).collect();
    for subject in disks::files(SIZE) {
        let (disk, name) = (subject.file.as_ref().unwrap(), &subject.name);
        disk.write_blocking(0, AlignedBuf::from_slice(&pattern), Durability::Stable).0.unwrap();
        subject.engine.run(async {
            let device = subject.device.open().unwrap();
            for (offset, len) in
                [(0, 1 << 20), (5, 65_536), (3 << 20, 3 << 20), (SIZE - 70_001, 70_001), (9, 0)]
            {
                // Once with all of it on the disk alone, once with some of it in memory, once with all.
                for warm in [0, len / 2, len] {
                    disk.forget_clean_pages().unwrap();
                    device.read(offset, AlignedBuf::zeroed(warm)).await.0.unwrap();
                    let (loaded, buf) = device.load(offset, AlignedBuf::zeroed(len)).await;
                    let wanted = &pattern[offset as usize..][..len];
                    match loaded.unwrap() {
                        Loaded::Buffer => assert!(&buf[..] == wanted, "{name}: {offset}"),
                        Loaded::Resident => {
                            assert!(!disk.is_direct(), "{name}");
                            // It may be gone again, where others need the memory.
                            let Some((file, at)) = device.resident(range(offset, len as u64)) else {
                                continue;
                            };
                            let file = std::fs::File::from(file.try_clone_to_owned().unwrap());
                            let mut there = vec![0; len];
                            file.read_exact_at(&mut there, at).unwrap();
                            assert!(there == wanted, "{name}: {offset}");
                        }
                    }
                }
            }
            let (beyond, _) = device.load(SIZE - 1, AlignedBuf::zeroed(2)).await;
            assert_eq!(beyond.unwrap_err().kind(), ErrorKind::InvalidRange, "{name}");
        });
    }
}
