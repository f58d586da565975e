//! Large writes, written while the rest of them is still sent: what the receiving just brought into the processor's cache is
//! copied from there.
//!
//! A client that dies half-way leaves a part of a write that it was never told is done.

use block::{Attempt, BLOCK_SIZE, BlockDevice};

/// The least that is written of a payload before all of it is there: no more calls than receiving takes.
const WRITTEN_AHEAD_BYTES: usize = 128 << 10;
/// The most that the device is given at a time.
const WRITTEN_AT_ONCE_BYTES: usize = 512 << 10;

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
        let mut written = start;
        for piece in buf[start..end].chunks(WRITTEN_AT_ONCE_BYTES) {
            match device.try_write(offset + written as u64, piece) {
                Ok(Attempt::Done) => written += piece.len(),
                Ok(Attempt::WouldWait | Attempt::Zeroes) | Err(_) => return Self::AsAWhole,
            }
        }
        Self::SoFar(end)
    }

    /// Whether nothing of `buf` is left to write.
    pub(super) const fn is_all_of(self, buf: &[u8]) -> bool {
        matches!(self, Self::SoFar(written) if written == buf.len())
    }
}
