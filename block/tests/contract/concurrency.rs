//! Requests that overlap in time.

use std::rc::Rc;
use std::sync::Barrier;

use block::{AlignedBuf, BlockDevice, ByteRange, Durability, ZeroMode};

use crate::disks;

const SIZE: u64 = 1 << 20;

async fn read(device: &dyn BlockDevice, at: u64, len: usize) -> AlignedBuf {
    let (result, buf) = device.read(at, AlignedBuf::zeroed(len)).await;
    result.unwrap();
    buf
}

async fn write(device: &dyn BlockDevice, at: u64, bytes: &[u8]) {
    device.write(at, AlignedBuf::from_slice(bytes), Durability::Volatile).await.0.unwrap();
}

#[test]
fn writes_of_a_few_bytes_each_into_shared_blocks_all_survive() {
    for subject in disks::subjects(SIZE) {
        subject.engine.run(async {
            let device = subject.device.open().unwrap();
            let writers: Vec<_> = (0..1000u64)
                .map(|number| {
                    let device = Rc::clone(&device);
                    tokio::task::spawn_local(async move {
                        write(&*device, number * 11, &[number as u8; 11]).await
                    })
                })
                .collect();
            for writer in writers {
                writer.await.unwrap();
            }
            let bytes = read(&*device, 0, 11_000).await;
            for (number, piece) in bytes.chunks(11).enumerate() {
                assert_eq!(piece, [number as u8; 11], "{}: write {number}", subject.name);
            }
        });
    }
}

/// One thread writes whole blocks, another a few bytes of each of them, a third zeroes their neighbours: whoever reads
/// and writes back must not undo the others.
#[test]
fn a_write_of_part_of_a_block_does_not_undo_a_write_of_all_of_it() {
    for subject in disks::files(SIZE) {
        let disk = subject.file.as_ref().unwrap();
        let start = Barrier::new(3);
        let rounds = 300u32;
        std::thread::scope(|scope| {
            let thread = |body: fn(Rc<dyn BlockDevice>, u32) -> block::DeviceFuture<'static, ()>| {
                let start = &start;
                scope.spawn(move || {
                    start.wait();
                    subject.engine.run(async {
                        let device = block::OpenDevice::open(disk).unwrap();
                        for round in 1..=rounds {
                            body(Rc::clone(&device), round).await;
                        }
                    });
                })
            };
            thread(|device, round| {
                Box::pin(async move {
                    write(&*device, 4096, &vec![round as u8; 4096]).await;
                    // The other thread writes the first hundred bytes only.
                    let bytes = read(&*device, 4096 + 100, 3996).await;
                    assert!(bytes.iter().all(|&byte| byte == round as u8), "a whole block was undone");
                })
            });
            thread(|device, round| {
                Box::pin(async move {
                    write(&*device, 4096 - 50, &[round as u8; 150]).await;
                    let bytes = read(&*device, 4096 - 50, 50).await;
                    assert!(bytes.iter().all(|&byte| byte == round as u8), "part of a block was undone");
                })
            });
            thread(|device, round| {
                Box::pin(async move {
                    write(&*device, 8192, &vec![round as u8; 4096]).await;
                    if round % 2 == 0 {
                        let zeroes = ByteRange::new(8192, 4096).unwrap();
                        device.write_zeroes(zeroes, ZeroMode::UNMAP, Durability::Volatile).await.unwrap();
                        let bytes = read(&*device, 8192, 4096).await;
                        assert!(bytes.iter().all(|&byte| byte == 0), "zeroes were undone");
                    }
                })
            });
        });
    }
}

#[test]
fn many_large_pieces_in_flight_arrive_whole() {
    let piece = 1 << 20;
    for subject in disks::subjects(16 << 20) {
        subject.engine.run(async {
            let device = subject.device.open().unwrap();
            let pool = block::BufferPool::of_thread().unwrap();
            // More than the pool holds, so that buffers of both kinds are in flight.
            let writers: Vec<_> = (0..16u8)
                .map(|number| {
                    let (device, mut buf) = (Rc::clone(&device), pool.take(piece));
                    buf.fill(number + 1);
                    tokio::task::spawn_local(async move {
                        let at = u64::from(number) * piece as u64;
                        let (result, mut buf) = device.write(at, buf, Durability::Volatile).await;
                        result.unwrap();
                        buf.fill(0);
                        let (result, buf) = device.read(at, buf).await;
                        result.unwrap();
                        assert!(buf.iter().all(|&byte| byte == number + 1));
                    })
                })
                .collect();
            for writer in writers {
                writer.await.unwrap();
            }
        });
    }
}
