//! Room: holes stay holes, trims give it back, zeroes keep it when told to.

use std::os::unix::fs::MetadataExt;

use block::{AlignedBuf, ByteRange, Durability, ErrorKind, FileDisk, ZeroMode};

use crate::disks;

const SIZE: u64 = 8 << 20;

fn range(start: u64, len: u64) -> ByteRange {
    ByteRange::new(start, len).unwrap()
}

fn room(disk: &FileDisk) -> u64 {
    std::fs::metadata(disk.path()).unwrap().blocks() * 512
}

#[test]
fn holes_are_found_without_reading_and_a_device_is_all_data() {
    for subject in disks::files(SIZE) {
        let disk = subject.file.as_ref().unwrap();
        let parts = [range(1 << 20, 65_536), range(3 << 20, 1 << 20)];
        for part in parts {
            let data = AlignedBuf::from_slice(&vec![1; part.len() as usize]);
            disk.write_blocking(part.start(), data, Durability::Stable).0.unwrap();
        }
        let all = range(0, SIZE);
        if disk.is_block_device() {
            assert_eq!(disk.data_ranges(all).unwrap(), [all]);
            continue;
        }
        assert_eq!(disk.data_ranges(all).unwrap(), parts, "{}", subject.name);
        let inside = range((1 << 20) + 4096, 4096);
        assert_eq!(disk.data_ranges(inside).unwrap(), [inside]);
        assert_eq!(disk.data_ranges(range(0, 4096)).unwrap(), []);
        assert_eq!(disk.data_ranges(range(SIZE, 1)).unwrap_err().kind(), ErrorKind::InvalidRange);
        subject.engine.run(async {
            let device = subject.device.open().unwrap();
            let extents = device.extents(all, 100).await.unwrap();
            let holes: Vec<_> = extents.iter().map(|extent| extent.state.hole).collect();
            assert_eq!(holes, [true, false, true, false, true]);
            assert!(extents.iter().all(|extent| extent.state.zero == extent.state.hole));
            for limit in 1..=5 {
                assert_eq!(device.extents(all, limit).await.unwrap(), extents[..limit]);
            }
        });
    }
}

#[test]
fn trims_and_zeroes_give_room_back_and_allocating_zeroes_keep_it() {
    for subject in disks::files(SIZE) {
        let disk = subject.file.as_ref().unwrap();
        if disk.is_block_device() {
            continue; // What a device has allocated is its own affair.
        }
        assert!(disk.geometry().can_trim && disk.geometry().fast_zero, "{}", subject.name);
        let fill = || {
            let data = AlignedBuf::from_slice(&vec![1; SIZE as usize]);
            disk.write_blocking(0, data, Durability::Stable).0.unwrap();
        };
        subject.engine.run(async {
            let device = subject.device.open().unwrap();
            fill();
            assert_eq!(room(disk), SIZE);
            device.trim(range(1, (1 << 20) - 1), Durability::Stable).await.unwrap();
            assert_eq!(room(disk), SIZE - (1 << 20) + 4096, "{}: a trim is rounded inward", subject.name);
            device.write_zeroes(range(1 << 20, 1 << 20), ZeroMode::UNMAP, Durability::Stable).await.unwrap();
            assert_eq!(room(disk), SIZE - (2 << 20) + 4096, "{}", subject.name);
            device.write_zeroes(range(0, 2 << 20), ZeroMode::ALLOCATE, Durability::Stable).await.unwrap();
            assert_eq!(room(disk), SIZE, "{}", subject.name);
            let (result, buf) = device.read(0, AlignedBuf::from_slice(&vec![5; 3 << 20])).await;
            result.unwrap();
            assert!(
                buf[..2 << 20].iter().all(|&byte| byte == 0) && buf[2 << 20..].iter().all(|&byte| byte == 1)
            );
        });
    }
}
