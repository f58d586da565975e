//! Writing to the target: many pieces in flight, on the one thread that runs the engine.

use std::rc::Rc;
use std::sync::mpsc;

use block::{AlignedBuf, BlockDevice, BufferPool, ByteRange, Durability, FileDisk, OpenDevice, ZeroMode};
use tokio::sync::mpsc as local;
use tokio::task::JoinSet;

use crate::capture::Stop;

/// Zeroing a device in longer steps would keep an interrupt waiting.
const ZERO_STEP: u64 = 1 << 30;

/// What the decoders ask for.
#[derive(Debug)]
pub(super) enum Write {
    /// These bytes, at this offset; the buffer comes back.
    Bytes(u64, AlignedBuf),
    /// Zeroes, where something else may be.
    Zeroes(ByteRange),
    /// Only the buffer comes back.
    Nothing(AlignedBuf),
}

/// Gives out the buffers, writes whatever is asked for until nobody asks any more, and puts it on stable
/// storage. Runs inside the engine.
pub(super) async fn write_all(
    target: &FileDisk,
    (pieces, piece_len): (usize, usize),
    mut writes: local::UnboundedReceiver<Write>,
    free: mpsc::Sender<AlignedBuf>,
    stop: &Stop,
) -> anyhow::Result<()> {
    let pool = BufferPool::of_thread()?;
    for _ in 0..pieces {
        // The decoders may be gone already, after a failure.
        let _ = free.send(pool.take(piece_len));
    }
    let device = target.open()?;
    let mut running = JoinSet::new();
    while let Some(write) = writes.recv().await {
        stop.check()?;
        match write {
            Write::Bytes(offset, buf) => {
                running.spawn_local(write_one(Rc::clone(&device), offset, buf, free.clone()));
            }
            Write::Zeroes(range) => zero(&device, range, stop).await?,
            Write::Nothing(buf) => drop(free.send(buf)),
        }
        while let Some(written) = running.try_join_next() {
            written??;
        }
    }
    while let Some(written) = running.join_next().await {
        written??;
    }
    stop.check()?;
    device.flush().await?;
    Ok(())
}

async fn write_one(
    device: Rc<dyn BlockDevice>,
    offset: u64,
    buf: AlignedBuf,
    free: mpsc::Sender<AlignedBuf>,
) -> block::Result<()> {
    let (result, buf) = device.write(offset, buf, Durability::Volatile).await;
    // The decoders are gone once everything is decoded.
    let _ = free.send(buf);
    result
}

async fn zero(device: &Rc<dyn BlockDevice>, range: ByteRange, stop: &Stop) -> anyhow::Result<()> {
    for (_, step) in range.split(ZERO_STEP) {
        stop.check()?;
        device.write_zeroes(step, ZeroMode::UNMAP, Durability::Volatile).await?;
    }
    Ok(())
}
