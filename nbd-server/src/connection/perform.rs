//! Requests that may wait: each a task of its own, run to its end.

use std::rc::Rc;
use std::time::Instant;

use block::{
    AlignedBuf, BlockDevice, BufferPool, ByteRange, DeviceFuture, Durability, Error, ErrorKind, ZeroMode,
};
use proto::server::Command;
use proto::wire::RequestHeader;

use super::control::Control;
use super::request::Request;
use super::steps::Steps;

/// The bytes that a request is about. It was checked that they lie within the device.
pub(super) const fn range(header: &RequestHeader) -> ByteRange {
    ByteRange::from_bounds(header.offset, header.offset + header.len)
}

pub(super) const fn durability(fua: bool) -> Durability {
    if fua { Durability::Stable } else { Durability::Volatile }
}

/// A buffer of `len` bytes from the thread's pool; what it holds means nothing.
pub(super) fn buffer(len: usize) -> AlignedBuf {
    match BufferPool::of_thread() {
        Ok(pool) => pool.take(len),
        Err(_) => AlignedBuf::zeroed(len),
    }
}

/// Has the thread's pool of buffers made, whose pages take some milliseconds, on another thread.
pub(super) fn make_buffers() {
    // Where it cannot be had, buffers are made one by one.
    let _ = BufferPool::of_thread();
}

/// Writes what was received.
pub(super) async fn write(device: Rc<dyn BlockDevice>, request: Request, buf: AlignedBuf, fua: bool) {
    let (result, buf) = device.write(request.header.offset, buf, durability(fua)).await;
    drop(buf);
    request.finish(result);
}

/// Does what neither sends nor takes data. What is given up in the middle, because the connection is gone or the server is
/// ending, was done in part.
pub(super) async fn control(
    device: Rc<dyn BlockDevice>,
    request: Request,
    command: Command,
    control: Rc<Control>,
) {
    let range = range(&request.header);
    let is_given_up = || control.is_aborting() || request.shared.is_closed();
    let result = match command {
        Command::Flush => device.flush().await,
        Command::Trim { fua } => {
            in_steps(&*device, range, fua, is_given_up, |step, durability| device.trim(step, durability))
                .await
        }
        Command::WriteZeroes { fua, no_hole, fast } => {
            let mode = ZeroMode { may_unmap: !no_hole, only_if_fast: fast };
            let zero = |step, durability| device.write_zeroes(step, mode, durability);
            in_steps(&*device, range, fua, is_given_up, zero).await
        }
        Command::Cache => {
            in_steps(&*device, range, false, is_given_up, |step, _| device.prefetch(step)).await
        }
        Command::Read { .. } | Command::Write { .. } | Command::BlockStatus { .. } => {
            unreachable!("they carry data and are done elsewhere")
        }
    };
    request.finish(result);
}

/// Does `operation` on all of `range`, a long one in steps.
async fn in_steps<'a>(
    device: &'a dyn BlockDevice,
    range: ByteRange,
    fua: bool,
    is_given_up: impl Fn() -> bool,
    operation: impl Fn(ByteRange, Durability) -> DeviceFuture<'a, block::Result<()>>,
) -> block::Result<()> {
    let mut steps = Steps::new(range);
    if steps.is_one() {
        return operation(range, durability(fua)).await;
    }
    while let Some(step) = steps.next() {
        if is_given_up() {
            return Err(Error::new(ErrorKind::Shutdown, "the connection ends").at(step));
        }
        let begun = Instant::now();
        operation(step, Durability::Volatile).await.map_err(|error| error.at(step))?;
        steps.took(begun.elapsed());
        // A device that never waits must not keep the shard from everybody else.
        tokio::task::yield_now().await;
    }
    if fua { device.flush().await } else { Ok(()) }
}
