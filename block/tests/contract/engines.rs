//! The choice of engine, and that it really is what does the I/O.

use block::{
    AlignedBuf, BufferPool, ByteRange, DirectIo, Durability, Engine, ErrorKind, FileDisk, FileOptions,
    IoEngine, OpenDevice, PoolOptions, ZeroMode,
};

use crate::disks;

/// The thread's pool, registered where there is a ring.
fn pool_of_thread(engine: Engine) -> BufferPool {
    let pool = BufferPool::of_thread().unwrap();
    assert!(!pool.is_registered(), "that takes another thread first");
    while engine.is_uring() && !pool.is_registered() {
        std::thread::yield_now();
        drop(pool.take(1));
    }
    pool
}

#[test]
fn what_is_written_is_read_back_on_each_engine_direct_and_buffered() {
    let directory = tempfile::tempdir().unwrap();
    for engine in disks::engines() {
        for direct in [DirectIo::On, DirectIo::Off] {
            let path = directory.path().join(format!("{engine}-{direct:?}"));
            let disk = FileDisk::create(&path, 8 << 20, FileOptions::new(engine).direct(direct)).unwrap();
            assert_eq!(disk.is_direct(), direct == DirectIo::On);
            engine.run(async {
                let device = disk.open().unwrap();
                let pool = pool_of_thread(engine);
                for (len, offset) in
                    [(4096, 0), (1 << 20, 1 << 20), (3 << 20, 4 << 20), (100, 4090), (70_000, 99_999)]
                {
                    for durability in [Durability::Volatile, Durability::Stable] {
                        let mut data = pool.take(len);
                        data.fill(len as u8 | 1);
                        let (result, data) = device.write(offset, data, durability).await;
                        result.unwrap();
                        let mut copy = AlignedBuf::from_slice(&vec![0xee; len]);
                        let result;
                        (result, copy) = device.read(offset, copy).await;
                        result.unwrap();
                        assert_eq!(copy[..], data[..]);
                    }
                }
                device.flush().await.unwrap();
                let range = ByteRange::new(100, 1 << 20).unwrap();
                device.write_zeroes(range, ZeroMode::UNMAP, Durability::Stable).await.unwrap();
                let (result, buf) = device.read(100, pool.take(1 << 20)).await;
                result.unwrap();
                assert!(buf.iter().all(|&byte| byte == 0));
                let beyond = device.read(8 << 20, AlignedBuf::zeroed(1)).await.0.unwrap_err();
                assert_eq!(beyond.kind(), ErrorKind::InvalidRange);
            });
        }
    }
}

/// Has the kernel refuse io_uring to the calling thread from now on, as container runtimes do.
fn forbid_io_uring() {
    const SYS_IO_URING_SETUP: u32 = 425;
    const RETURN_EPERM: u32 = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
    let instruction = |code: u32, jump_false: u8, value: u32| libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf: jump_false,
        k: value,
    };
    let program = [
        // The number of the system call is the first word of what a filter sees.
        instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
        instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, SYS_IO_URING_SETUP),
        instruction(libc::BPF_RET | libc::BPF_K, 0, RETURN_EPERM),
        instruction(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() };
    // SAFETY: both calls only read their arguments, which live until they return.
    let refused = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            | libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, std::ptr::from_ref(&filter))
    };
    assert_eq!(refused, 0, "{}", std::io::Error::last_os_error());
}

#[test]
fn where_rings_are_forbidden_auto_takes_threads_and_uring_is_an_error() {
    // A thread of its own, because a filter stays for the rest of a thread's life.
    std::thread::spawn(|| {
        forbid_io_uring();
        let error = Engine::choose(IoEngine::Uring).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains("io_uring"), "{error}");
        let engine = Engine::choose(IoEngine::Auto).unwrap();
        assert_eq!(engine.name(), "threads");
        let directory = tempfile::tempdir().unwrap();
        let disk = FileDisk::create(directory.path().join("disk"), 8192, FileOptions::new(engine)).unwrap();
        engine.run(async {
            let data = AlignedBuf::from_slice(&[1; 8192]);
            disk.open().unwrap().write(0, data, Durability::Stable).await.0.unwrap();
        });
        assert_eq!(std::fs::read(disk.path()).unwrap(), [1; 8192]);
    })
    .join()
    .unwrap();
}

#[test]
fn a_shard_that_cannot_have_a_ring_of_its_own_still_serves() {
    for engine in disks::engines() {
        let directory = tempfile::tempdir().unwrap();
        let disk = FileDisk::create(directory.path().join("disk"), 8192, FileOptions::new(engine)).unwrap();
        std::thread::spawn(move || {
            forbid_io_uring();
            engine.run(async {
                let data = AlignedBuf::from_slice(&[1; 100]);
                disk.open().unwrap().write(10, data, Durability::Stable).await.0.unwrap();
            });
        })
        .join()
        .unwrap();
    }
}

#[test]
fn engines_are_named_as_on_the_command_line() {
    for engine in [IoEngine::Auto, IoEngine::Uring, IoEngine::Threads] {
        assert_eq!(engine.to_string().parse::<IoEngine>().unwrap(), engine);
    }
    "aio".parse::<IoEngine>().unwrap_err();
}

#[test]
fn what_is_in_flight_when_a_shard_ends_is_finished_first() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    for engine in disks::engines().into_iter().filter(Engine::is_uring) {
        for direct in [DirectIo::On, DirectIo::Off] {
            let options = FileOptions::new(engine).direct(direct).overwrite(true);
            let disk = FileDisk::create(directory.path().join("disk"), 32 << 20, options).unwrap();
            let tasks = engine.run(async {
                let mut tasks = Vec::new();
                for number in 0..32u64 {
                    let device = disk.open().unwrap();
                    tasks.push(tokio::task::spawn_local(async move {
                        let buf = AlignedBuf::from_slice(&vec![7; 1 << 20]);
                        let (first, buf) = device.write(number << 20, buf, Durability::Volatile).await;
                        first.unwrap();
                        let (second, _) = device.write(number << 20, buf, Durability::Volatile).await;
                        second.unwrap_err().kind()
                    }));
                }
                tokio::task::yield_now().await;
                // All are submitted and none is waited for.
                tasks
            });
            for task in tasks {
                // A task either saw the end coming, or was dropped after its write had ended.
                assert!(!task.is_finished() || matches!(kind_of(task), Some(ErrorKind::Shutdown)));
            }
            let (result, buf) = disk.read_blocking(0, AlignedBuf::zeroed(32 << 20));
            result.unwrap();
            assert!(buf.iter().all(|&byte| byte == 7), "{direct:?}: a write was cut off");
        }
    }
}

/// What a task that has ended came to.
fn kind_of(task: tokio::task::JoinHandle<ErrorKind>) -> Option<ErrorKind> {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(task).ok()
}

#[test]
fn a_buffer_whose_operation_was_dropped_is_not_used_again_before_the_kernel_is_done_with_it() {
    use std::task::{Context, Waker};

    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    for engine in disks::engines() {
        let path = directory.path().join(engine.name());
        let disk = FileDisk::create(path, 1 << 20, FileOptions::new(engine)).unwrap();
        engine.run(async {
            let device = disk.open().unwrap();
            let pool = BufferPool::new(PoolOptions { small: 1, large: 0 }).unwrap();
            let mut buf = pool.take(4096);
            let memory = buf.as_mut_ptr();
            let mut read = device.read(0, buf);
            assert!(read.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
            drop(read);
            if engine.is_uring() {
                // The completion is only seen once this thread has waited for something.
                assert_ne!(pool.take(4096).as_mut_ptr(), memory);
            }
            // In the end it comes back.
            while pool.take(4096).as_mut_ptr() != memory {
                device.flush().await.unwrap();
            }
        });
    }
}

#[test]
fn a_second_pool_on_a_ring_is_plain_memory_and_works_the_same() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    for engine in disks::engines() {
        let path = directory.path().join(engine.name());
        let disk = FileDisk::create(path, 1 << 20, FileOptions::new(engine)).unwrap();
        engine.run(async {
            let pools = [1, 2].map(|small| BufferPool::new(PoolOptions { small, large: 0 }).unwrap());
            assert_eq!(pools.each_ref().map(BufferPool::is_registered), [engine.is_uring(), false]);
            let device = disk.open().unwrap();
            for (pool, byte) in pools.iter().zip(1..) {
                let mut buf = pool.take(8192);
                buf.fill(byte);
                let (result, mut buf) = device.write(4096, buf, Durability::Volatile).await;
                result.unwrap();
                buf.fill(0);
                let (result, buf) = device.read(4096, buf).await;
                result.unwrap();
                assert_eq!(buf[..], [byte; 8192]);
            }
        });
        // A ring of the next life on this thread knows none of the buffers of the last.
        engine.run(async {
            let pool = pool_of_thread(engine);
            disk.open().unwrap().read(0, pool.take(4096)).await.0.unwrap();
        });
    }
}

#[test]
fn a_panic_in_a_shard_with_operations_in_flight_harms_nobody_else() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    for engine in disks::engines() {
        let path = directory.path().join(engine.name());
        let disk = FileDisk::create(path, 8 << 20, FileOptions::new(engine)).unwrap();
        let shard = disk.clone();
        std::thread::spawn(move || {
            engine.run(async {
                for number in 0..8u64 {
                    let device = shard.open().unwrap();
                    tokio::task::spawn_local(async move {
                        let buf = BufferPool::of_thread().unwrap().take(1 << 20);
                        device.write(number << 20, buf, Durability::Volatile).await.0.unwrap();
                    });
                }
                tokio::task::yield_now().await;
                panic!("as a bug would");
            })
        })
        .join()
        .unwrap_err();
        let data = AlignedBuf::from_slice(&[1; 4096]);
        disk.write_blocking(0, data, Durability::Stable).0.unwrap();
    }
}
