//! Operations on the ring of the calling thread.
//!
//! All are entries of our own (tokio-uring's file type knows neither RWF_DSYNC nor buffers that
//! travel between threads). They are submitted together when the thread next has nothing to do.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use io_uring::{cqueue, opcode, squeue, types};
use tokio_uring::{OneshotOutputTransform, UnsubmittedOneshot};

use super::{Control, Direction, Queue, Transfer};
use crate::AlignedBuf;
use crate::engine::{self, InFlight};

/// The calling thread's ring.
pub(crate) struct Ring;

impl Queue for Ring {
    async fn transfer(
        &self,
        file: &Arc<OwnedFd>,
        transfer: Transfer,
        mut buf: AlignedBuf,
    ) -> (io::Result<usize>, AlignedBuf) {
        if engine::closing() {
            return (Err(io::Error::from_raw_os_error(libc::ESHUTDOWN)), buf);
        }
        let entry = transfer_entry(file, &transfer, &mut buf);
        // The entry's descriptor and buffer are owned by the `InFlight` from here to the completion.
        let (result, buf) = submit(entry, InFlight::begin(Arc::clone(file), Some(buf))).await;
        (result, buf.expect("a transfer's buffer comes back with its completion"))
    }

    async fn control(&self, file: &Arc<OwnedFd>, control: Control) -> io::Result<()> {
        if engine::closing() {
            return Err(io::Error::from_raw_os_error(libc::ESHUTDOWN));
        }
        let fd = types::Fd(file.as_raw_fd());
        let entry = match control {
            Control::Sync => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
            Control::Allocate { mode, offset, len } => {
                opcode::Fallocate::new(fd, len).offset(offset).mode(mode).build()
            }
        };
        submit(entry, InFlight::begin(Arc::clone(file), None)).await.0.map(drop)
    }
}

fn transfer_entry(file: &OwnedFd, transfer: &Transfer, buf: &mut AlignedBuf) -> squeue::Entry {
    let window = transfer.window(buf);
    let fd = types::Fd(file.as_raw_fd());
    let len = u32::try_from(window.len()).expect("a transfer's window is bounded");
    let registered = buf.slot().filter(|slot| slot.pool_id() == engine::registered_pool());
    let index = registered.map(crate::pool::Slot::index);
    let memory = buf[window].as_mut_ptr();
    let flags = if transfer.direction == Direction::WriteStable { libc::RWF_DSYNC } else { 0 };
    match (transfer.direction.is_write(), index) {
        (false, None) => opcode::Read::new(fd, memory, len).offset(transfer.offset).build(),
        (false, Some(index)) => {
            opcode::ReadFixed::new(fd, memory, len, index).offset(transfer.offset).build()
        }
        (true, None) => opcode::Write::new(fd, memory, len).offset(transfer.offset).rw_flags(flags).build(),
        (true, Some(index)) => {
            opcode::WriteFixed::new(fd, memory, len, index).offset(transfer.offset).rw_flags(flags).build()
        }
    }
}

async fn submit(entry: squeue::Entry, held: InFlight) -> (io::Result<usize>, Option<AlignedBuf>) {
    UnsubmittedOneshot::new(held, Completed, entry).submit().await
}

struct Completed;

impl OneshotOutputTransform for Completed {
    type Output = (io::Result<usize>, Option<AlignedBuf>);
    type StoredData = InFlight;

    fn transform_oneshot_output(self, held: InFlight, entry: cqueue::Entry) -> Self::Output {
        let result = match usize::try_from(entry.result()) {
            Ok(count) => Ok(count),
            Err(_) => Err(io::Error::from_raw_os_error(-entry.result())),
        };
        (result, held.complete())
    }
}
