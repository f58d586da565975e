//! Requests that may wait: each a task of its own, run to its end.

use std::rc::Rc;

use block::{AlignedBuf, BlockDevice, BufferPool, ByteRange, Durability, ZeroMode};
use proto::server::Command;
use proto::wire::{RequestHeader, SelectedContext};

use super::request::Request;
use super::status;

/// The bytes that a request is about. It was checked that they lie within the device.
pub(super) const fn range(header: &RequestHeader) -> ByteRange {
    ByteRange::from_bounds(header.offset, header.offset + header.len as u64)
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

/// Writes what was received.
pub(super) async fn write(device: Rc<dyn BlockDevice>, request: Request, buf: AlignedBuf, fua: bool) {
    let (result, buf) = device.write(request.header.offset, buf, durability(fua)).await;
    drop(buf);
    request.finish(result);
}

/// Does what neither sends nor takes data.
pub(super) async fn control(
    device: Rc<dyn BlockDevice>,
    request: Request,
    command: Command,
    contexts: Rc<[SelectedContext]>,
) {
    let range = range(&request.header);
    let result = match command {
        Command::Flush => device.flush().await,
        Command::Trim { fua } => device.trim(range, durability(fua)).await,
        Command::WriteZeroes { fua, no_hole, fast } => {
            let mode = ZeroMode { may_unmap: !no_hole, only_if_fast: fast };
            device.write_zeroes(range, mode, durability(fua)).await
        }
        Command::Cache => device.prefetch(range).await,
        Command::BlockStatus { one } => return status::answer(device, request, one, &contexts).await,
        Command::Read { .. } | Command::Write { .. } => {
            unreachable!("they carry data and are done elsewhere")
        }
    };
    request.finish(result);
}
