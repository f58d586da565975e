//! Where a disk says no: read-only, locked, full, not a disk at all.

use std::path::Path;
use std::process::Command;

use block::{
    AlignedBuf, ByteRange, DirectIo, Durability, ErrorKind, FileDisk, FileOptions, OpenDevice, ZeroMode,
};

use crate::disks::{self, LoopDevice};

#[test]
fn a_disk_open_for_reading_refuses_every_write() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    std::fs::write(&path, [7; 8192]).unwrap();
    for engine in disks::engines() {
        for direct in [DirectIo::Auto, DirectIo::Off] {
            let disk =
                FileDisk::open(&path, FileOptions::new(engine).read_only(true).direct(direct)).unwrap();
            assert!(disk.geometry().read_only);
            engine.run(async {
                let device = disk.open().unwrap();
                let range = ByteRange::new(0, 4096).unwrap();
                let kinds = [
                    device.try_write(0, &[1]).unwrap_err().kind(),
                    device.write(0, AlignedBuf::zeroed(1), Durability::Volatile).await.0.unwrap_err().kind(),
                    device
                        .write_zeroes(range, ZeroMode::UNMAP, Durability::Volatile)
                        .await
                        .unwrap_err()
                        .kind(),
                    device.trim(range, Durability::Volatile).await.unwrap_err().kind(),
                ];
                assert_eq!(kinds, [ErrorKind::NotPermitted; 4]);
                let (result, buf) = device.read(1, AlignedBuf::zeroed(8191)).await;
                result.unwrap();
                assert_eq!(buf[..], [7; 8191]);
            });
        }
    }
    assert_eq!(std::fs::read(&path).unwrap(), [7; 8192]);
}

#[test]
fn a_second_opener_does_not_get_the_lock_until_the_last_handle_of_the_first_is_gone() {
    for subject in disks::files(1 << 20) {
        let mine = subject.file.as_ref().unwrap();
        let options = FileOptions::new(subject.engine);
        let other = FileDisk::open(mine.path(), options).unwrap();
        assert!(mine.try_lock().unwrap());
        assert!(mine.try_lock().unwrap(), "who has it may ask again");
        assert!(!other.try_lock().unwrap(), "{}", subject.name);
        let mine = FileDisk::open(other.path(), options).unwrap();
        drop(subject.file);
        drop(subject.device);
        assert!(other.try_lock().unwrap(), "{}", subject.name);
        subject.engine.run(async {
            let handle = other.open().unwrap();
            drop(other);
            assert!(!mine.try_lock().unwrap(), "a handle keeps the lock");
            drop(handle);
            assert!(mine.try_lock().unwrap());
        });
    }
}

#[test]
fn what_is_no_disk_is_refused_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let kind = |path: &Path| FileDisk::open(path, FileOptions::default()).unwrap_err().kind();
    let fifo = directory.path().join("fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    assert_eq!(kind(&fifo), ErrorKind::Unsupported);
    assert_eq!(kind("/dev/null".as_ref()), ErrorKind::Unsupported);
    assert_eq!(kind(directory.path()), ErrorKind::Io);
    let missing = FileDisk::open(directory.path().join("none"), FileOptions::default()).unwrap_err();
    assert!(missing.to_string().contains("none"), "{missing}");
}

#[test]
fn a_new_file_replaces_an_old_one_only_when_told() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    std::fs::write(&path, b"precious").unwrap();
    FileDisk::create(&path, 4096, FileOptions::default()).unwrap_err();
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    let disk = FileDisk::create(&path, 4096, FileOptions::default().overwrite(true)).unwrap();
    assert_eq!((disk.size(), disk.is_block_device()), (4096, false));
    assert_eq!(disk.data_ranges(ByteRange::new(0, 4096).unwrap()).unwrap(), []);
}

#[test]
fn a_size_that_direct_io_cannot_reach_the_end_of_is_served_through_the_page_cache() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = directory.path().join("disk");
    for engine in disks::engines() {
        let options = FileOptions::new(engine).overwrite(true);
        let disk = FileDisk::create(&path, 10_001, options).unwrap();
        assert!(!disk.is_direct());
        let demanded = FileDisk::open(&path, options.direct(DirectIo::On)).unwrap_err();
        assert_eq!(demanded.kind(), ErrorKind::Unsupported);
        engine.run(async {
            let device = disk.open().unwrap();
            let data = AlignedBuf::from_slice(&[9; 10_001]);
            device.write(0, data, Durability::Stable).await.0.unwrap();
            let (result, buf) = device.read(9_999, AlignedBuf::zeroed(2)).await;
            result.unwrap();
            assert_eq!(buf[..], [9, 9]);
        });
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 10_001);
    }
}

#[test]
fn a_file_that_became_shorter_is_an_error_and_not_zeroes() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    for engine in disks::engines() {
        for direct in [DirectIo::On, DirectIo::Off] {
            let options = FileOptions::new(engine).overwrite(true).direct(direct);
            let disk = FileDisk::create(directory.path().join("disk"), 64 << 10, options).unwrap();
            std::fs::OpenOptions::new().write(true).open(disk.path()).unwrap().set_len(10_000).unwrap();
            engine.run(async {
                let device = disk.open().unwrap();
                device.read(0, AlignedBuf::zeroed(8192)).await.0.unwrap();
                for at in [8192, 12_288] {
                    let error = device.read(at, AlignedBuf::zeroed(8192)).await.0.unwrap_err();
                    assert_eq!(error.kind(), ErrorKind::Io, "{error}");
                }
            });
        }
    }
}

#[test]
fn what_is_zeroed_beyond_the_end_of_a_file_that_became_shorter_reads_as_zeroes() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    for engine in disks::engines() {
        for mode in [ZeroMode::UNMAP, ZeroMode::ALLOCATE] {
            let options = FileOptions::new(engine).overwrite(true);
            let disk = FileDisk::create(directory.path().join("disk"), 1 << 20, options).unwrap();
            std::fs::OpenOptions::new().write(true).open(disk.path()).unwrap().set_len(10_000).unwrap();
            engine.run(async {
                let device = disk.open().unwrap();
                let range = ByteRange::new(256 << 10, 128 << 10).unwrap();
                device.write_zeroes(range, mode, Durability::Volatile).await.unwrap();
                let (result, buf) = device.read(range.start(), AlignedBuf::from_slice(&[9; 128 << 10])).await;
                result.unwrap();
                assert!(buf.iter().all(|&byte| byte == 0));
            });
            assert_eq!(std::fs::metadata(disk.path()).unwrap().len(), 384 << 10);
        }
    }
}

/// A small file system on a loop device.
struct SmallFileSystem {
    directory: tempfile::TempDir,
    _device: LoopDevice,
}

impl SmallFileSystem {
    fn path(&self) -> &Path {
        self.directory.path()
    }

    fn mount() -> Option<Self> {
        let device = LoopDevice::attach(16 << 20)?;
        let directory = tempfile::tempdir().unwrap();
        let made = Command::new("mkfs.ext4").args(["-q", "-O", "^has_journal"]).arg(device.path()).status();
        assert!(made.unwrap().success());
        let mounted = Command::new("mount").arg(device.path()).arg(directory.path()).status().unwrap();
        if !mounted.success() {
            eprintln!("a full file system is not tested here: it cannot be mounted");
            return None;
        }
        Some(Self { directory, _device: device })
    }
}

impl Drop for SmallFileSystem {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg(self.directory.path()).status();
        assert!(unmounted.is_ok_and(|status| status.success()) || std::thread::panicking());
    }
}

#[test]
fn a_full_file_system_is_no_space_and_serves_on_once_there_is_room() {
    let Some(small) = SmallFileSystem::mount() else { return };
    for engine in disks::engines() {
        for direct in [DirectIo::On, DirectIo::Off] {
            let options = FileOptions::new(engine).direct(direct).overwrite(true);
            let disk = FileDisk::create(small.path().join("disk"), 64 << 20, options).unwrap();
            engine.run(async {
                let device = disk.open().unwrap();
                let mut filled = 0;
                let error = loop {
                    let (result, _) =
                        device.write(filled, AlignedBuf::zeroed(1 << 20), Durability::Stable).await;
                    match result {
                        Ok(()) => filled += 1 << 20,
                        Err(error) => break error,
                    }
                    assert!(filled < 64 << 20, "16 MiB do not hold 64");
                };
                assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
                let error = device.write(40 << 20, AlignedBuf::zeroed(1 << 20), Durability::Volatile).await.0;
                assert_eq!(error.unwrap_err().kind(), ErrorKind::NoSpace);
                let error = device
                    .write_zeroes(
                        ByteRange::new(32 << 20, 8 << 20).unwrap(),
                        ZeroMode::ALLOCATE,
                        Durability::Volatile,
                    )
                    .await;
                assert_eq!(error.unwrap_err().kind(), ErrorKind::NoSpace);
                let everything = ByteRange::new(0, filled).unwrap();
                device.trim(everything, Durability::Volatile).await.unwrap();
                device
                    .write(40 << 20, AlignedBuf::from_slice(&[3; 4096]), Durability::Stable)
                    .await
                    .0
                    .unwrap();
                device.flush().await.unwrap();
                let (result, buf) = device.read(40 << 20, AlignedBuf::zeroed(4096)).await;
                result.unwrap();
                assert_eq!(buf[..], [3; 4096]);
            });
            drop(disk);
        }
    }
}

#[test]
fn a_device_that_is_set_read_only_is_opened_for_reading_and_refuses_writes() {
    let Some(device) = LoopDevice::attach(1 << 20) else { return };
    let set = |how| {
        let status = Command::new("blockdev").arg(how).arg(device.path()).status().unwrap();
        assert!(status.success(), "blockdev {how}");
    };
    set("--setro");
    let disk = FileDisk::open(device.path(), FileOptions::default()).unwrap();
    assert!(disk.geometry().read_only);
    let written = disk.write_blocking(0, AlignedBuf::from_slice(&[1; 4096]), Durability::Volatile).0;
    assert_eq!(written.unwrap_err().kind(), ErrorKind::NotPermitted);
    drop(disk);
    set("--setrw");
    assert!(!FileDisk::open(device.path(), FileOptions::default()).unwrap().geometry().read_only);
}

/// Which operation hears of the loss first.
#[derive(Clone, Copy)]
enum Reporter {
    Flush,
    StableWrite,
}

/// A device that loses what is written to it: its file is sparse, on a file system without the room.
#[test]
fn after_a_failed_sync_no_later_one_claims_success() {
    let reporters = [Reporter::Flush, Reporter::StableWrite];
    for (engine, reporter) in
        disks::engines().into_iter().flat_map(|engine| reporters.map(|how| (engine, how)))
    {
        let Some(small) = SmallFileSystem::mount() else { return };
        let Some(device) = LoopDevice::attach_in(small.path(), 64 << 20, 512) else { return };
        let disk = FileDisk::open(device.path(), FileOptions::new(engine).direct(DirectIo::Off)).unwrap();
        engine.run(async {
            let device = disk.open().unwrap();
            for at in 0..32u64 {
                let mut data = AlignedBuf::zeroed(1 << 20);
                data.fill(1);
                device.write(at << 20, data, Durability::Volatile).await.0.unwrap();
            }
            match reporter {
                Reporter::Flush => device.flush().await.unwrap_err(),
                Reporter::StableWrite => {
                    // Everything is written back, and what had no room is lost: this hears of it.
                    let data = AlignedBuf::zeroed(32 << 20);
                    device.write(0, data, Durability::Stable).await.0.unwrap_err()
                }
            };
            // The kernel has told us once, and would not again.
            rustix::fs::fdatasync(&disk).unwrap();
            assert_eq!(device.flush().await.unwrap_err().kind(), ErrorKind::Poisoned);
            let other = disk.open().unwrap();
            let stable = other.write(0, AlignedBuf::zeroed(512), Durability::Stable).await.0;
            assert_eq!(stable.unwrap_err().kind(), ErrorKind::Poisoned);
            let range = ByteRange::new(0, 4096).unwrap();
            let zeroes = other.write_zeroes(range, ZeroMode::UNMAP, Durability::Stable).await;
            assert_eq!(zeroes.unwrap_err().kind(), ErrorKind::Poisoned);
            other.read(0, AlignedBuf::zeroed(4096)).await.0.unwrap();
        });
    }
}

/// The flushes that a loop device was asked for so far.
fn flushes(device: &LoopDevice) -> u64 {
    let name = device.path().file_name().unwrap().to_str().unwrap();
    let stat = std::fs::read_to_string(format!("/sys/block/{name}/stat")).unwrap();
    stat.split_whitespace().nth(15).expect("kernels since 5.5 count flushes").parse().unwrap()
}

#[test]
fn a_flush_and_a_stable_write_reach_the_device() {
    for engine in disks::engines() {
        for direct in [DirectIo::On, DirectIo::Off] {
            let Some(device) = LoopDevice::attach(1 << 20) else { return };
            let disk = FileDisk::open(device.path(), FileOptions::new(engine).direct(direct)).unwrap();
            engine.run(async {
                let handle = disk.open().unwrap();
                let range = ByteRange::new(0, 8192).unwrap();
                // Some writes take more than one flush: what counts is that none takes none.
                let mut before = flushes(&device);
                let mut flushed = || flushes(&device) > std::mem::replace(&mut before, flushes(&device));
                handle.write(0, AlignedBuf::zeroed(4096), Durability::Volatile).await.0.unwrap();
                assert!(!flushed(), "nobody asked for a flush yet");
                handle.flush().await.unwrap();
                assert!(flushed());
                handle.write(0, AlignedBuf::zeroed(4096), Durability::Stable).await.0.unwrap();
                assert!(flushed());
                handle.write(3, AlignedBuf::zeroed(4096), Durability::Stable).await.0.unwrap();
                assert!(flushed());
                handle.write_zeroes(range, ZeroMode::UNMAP, Durability::Stable).await.unwrap();
                assert!(flushed());
                handle.trim(range, Durability::Stable).await.unwrap();
                assert!(flushed());
            });
        }
    }
}
