//! Measures the engines on a file: `rates FILE uring|threads direct|buffered [fill]`. The file is written to!
//!
//! With `fill`, how fast a new sparse file takes 512 MiB in pieces, their sync included. Otherwise:
//!
//! Prints operations and MiB a second for 4 KiB at depth 1 and 32 and for pieces of 1 and 4 MiB, by the queue
//! and, through the page cache, inline; and the processor time of the shard's thread for each operation, which
//! means something on a busy machine too.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use block::{
    Attempt, BlockDevice, BufferPool, DirectIo, Durability, Engine, FileDisk, FileOptions, IoEngine,
    OpenDevice,
};

/// How long each figure is measured.
const LASTS: Duration = Duration::from_millis(700);

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (path, engine, direct, fill) = match &arguments[..] {
        [path, engine, direct] => (path, engine, direct, false),
        [path, engine, direct, fill] if fill == "fill" => (path, engine, direct, true),
        _ => return Err("usage: rates FILE uring|threads direct|buffered [fill]".into()),
    };
    let engine = Engine::choose(engine.parse::<IoEngine>()?)?;
    let direct = if direct == "direct" { DirectIo::On } else { DirectIo::Off };
    if fill {
        for (len, depth) in [(1 << 20, 1), (1 << 20, 4), (1 << 20, 8), (4 << 20, 4)] {
            std::fs::remove_file(path)
                .or_else(|error| if path_is_free(&error) { Ok(()) } else { Err(error) })?;
            let disk = FileDisk::create(path, FILL, FileOptions::new(engine).direct(direct))?;
            let rate = engine.run(fill_all(&disk, len, depth));
            println!("fill {len:>8} depth {depth:>2}: {rate:>7.0} MiB/s");
        }
        return Ok(());
    }
    let disk = FileDisk::open(path, FileOptions::new(engine).direct(direct))?;
    engine.run(async {
        let device = disk.open()?;
        for write in [false, true] {
            for (len, depth) in
                [(4096, 1), (4096, 32), (1 << 20, 1), (1 << 20, 4), (1 << 20, 8), (4 << 20, 4)]
            {
                let work = Work { len, depth, write, fast: false };
                let rate = measure(&device, work).await;
                report("queue", work, rate);
                if direct == DirectIo::Off && len <= 65_536 {
                    let work = Work { fast: true, ..work };
                    report("inline", work, measure(&device, work).await);
                }
            }
        }
        Ok(())
    })
}

/// Bytes that `fill` writes.
const FILL: u64 = 512 << 20;

fn path_is_free(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::NotFound
}

/// MiB a second.
async fn fill_all(disk: &FileDisk, len: usize, depth: u64) -> f64 {
    let begun = Instant::now();
    let next = Rc::new(Cell::new(0u64));
    let device = disk.open().expect("a handle can be opened");
    let tasks: Vec<_> = (0..depth)
        .map(|_| {
            let (device, next) = (Rc::clone(&device), Rc::clone(&next));
            tokio::task::spawn_local(async move {
                let mut buf = BufferPool::of_thread().expect("there is memory for a pool").take(len);
                buf.fill(1);
                while next.get() < FILL {
                    let at = next.replace(next.get() + len as u64);
                    let result;
                    (result, buf) = device.write(at, buf, Durability::Volatile).await;
                    result.expect("the file can be written");
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.expect("the filling task ends");
    }
    device.flush().await.expect("the file can be synced");
    FILL as f64 / 1_048_576.0 / begun.elapsed().as_secs_f64()
}

#[derive(Clone, Copy)]
struct Work {
    len: usize,
    depth: usize,
    write: bool,
    fast: bool,
}

fn report(how: &str, work: Work, (rate, microseconds): (f64, f64)) {
    let verb = if work.write { "write" } else { "read " };
    let mib = rate * work.len as f64 / 1_048_576.0;
    println!(
        "{how:6} {verb} {:>8} depth {:>2}: {rate:>9.0} ops/s {mib:>7.0} MiB/s {microseconds:>7.2} us/op",
        work.len, work.depth
    );
}

/// Nanoseconds for which this thread has run.
fn thread_time() -> f64 {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").expect("the kernel counts run time");
    stat.split_whitespace().next().and_then(|field| field.parse().ok()).expect("the first field is a number")
}

/// Operations a second, and microseconds of this thread for each.
async fn measure(device: &Rc<dyn BlockDevice>, work: Work) -> (f64, f64) {
    let size = device.geometry().size;
    let done = Rc::new(Cell::new(0u64));
    let (begun, ran) = (Instant::now(), thread_time());
    let tasks: Vec<_> = (0..work.depth)
        .map(|number| {
            let (device, done) = (Rc::clone(device), Rc::clone(&done));
            tokio::task::spawn_local(async move {
                let pool = BufferPool::of_thread().expect("there is memory for a pool");
                let mut buf = pool.take(work.len);
                buf.fill(1);
                let mut random = 0x9e37_79b9_u64.wrapping_mul(number as u64 + 1);
                while begun.elapsed() < LASTS {
                    random = random
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1_442_695_040_888_963_407);
                    let at = (random >> 20) % (size / work.len as u64) * work.len as u64;
                    let attempt = match (work.fast, work.write) {
                        (false, _) => Ok(Attempt::WouldWait),
                        (true, false) => device.try_read(at, &mut buf),
                        (true, true) => device.try_write(at, &buf),
                    };
                    if attempt.expect("the range is inside") == Attempt::WouldWait {
                        let result;
                        (result, buf) = if work.write {
                            device.write(at, buf, Durability::Volatile).await
                        } else {
                            device.read(at, buf).await
                        };
                        result.expect("the file can be read and written");
                    }
                    done.set(done.get() + 1);
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.expect("the measuring task ends");
    }
    let rate = done.get() as f64 / begun.elapsed().as_secs_f64();
    let microseconds = (thread_time() - ran) / 1000.0 / done.get() as f64;
    device.flush().await.expect("the file can be synced");
    (rate, microseconds)
}
