//! Large writes of a client that has nothing else in flight: written while the rest of them is still sent.
//!
//! A client that dies half-way leaves a part of a write that it was never told is done.

use block::{Attempt, BLOCK_SIZE, BlockDevice};

/// The least that is written of a payload before all of it is there: no more calls than receiving takes.
const WRITTEN_AHEAD_BYTES: usize = 128 << 10;

/// How much of a payload is written before all of it is there.
#[derive(Clone, Copy)]
pub(super) enum Written {
    /// So many bytes, and more as they come.
    SoFar(usize),
    /// It is written as a whole when it is there.
    AsAWhole,
}

impl Written {
    /// Writes what is there of the payload for `offset`, the first `filled` bytes of `buf`, in pieces of whole blocks. Where the
    /// device cannot at once, all of it is written when it is there: whatever is wrong is met again then, and told.
    pub(super) fn go_on(self, device: &dyn BlockDevice, offset: u64, buf: &[u8], filled: usize) -> Self {
        let Self::SoFar(start) = self else { return self };
        let end = if filled == buf.len() {
            filled
        } else {
            filled.saturating_sub(((offset + filled as u64) % BLOCK_SIZE) as usize)
        };
        if end < start + WRITTEN_AHEAD_BYTES && end < buf.len() {
            return self;
        }
        match device.try_write(offset + start as u64, &buf[start..end]) {
            Ok(Attempt::Done) => Self::SoFar(end),
            Ok(Attempt::WouldWait | Attempt::Zeroes) | Err(_) => Self::AsAWhole,
        }
    }

    /// Whether nothing of `buf` is left to write.
    pub(super) const fn is_all_of(self, buf: &[u8]) -> bool {
        matches!(self, Self::SoFar(written) if written == buf.len())
    }
}
