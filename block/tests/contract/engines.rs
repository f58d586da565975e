//! The choice of engine, and that it really is what does the I/O.

use block::{
    AlignedBuf, BufferPool, ByteRange, DirectIo, Durability, ErrorKind, FileDisk, FileOptions, OpenDevice,
    ZeroMode,
};

use crate::disks;

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
                let pool = BufferPool::of_thread().unwrap();
                assert_eq!(pool.is_registered(), engine.is_uring());
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
