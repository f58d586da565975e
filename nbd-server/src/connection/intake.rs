//! What was received and not yet understood: one piece of memory, read into at its end and taken from at its front.

use super::pages::Pages;

/// How much one receive may bring, in bytes: many small writes at once.
const CAPACITY: usize = 256 << 10;

/// The bytes between the socket and the parser.
pub(super) struct Intake {
    memory: Pages,
    start: usize,
    end: usize,
}

impl Intake {
    /// A payload of this many bytes fits beside its header.
    pub(super) const INLINE_BYTES: usize = 64 << 10;

    /// Begins with `rest`, which is what the handshake left.
    pub(super) fn new(rest: &[u8]) -> Self {
        let capacity = CAPACITY.max(rest.len());
        let mut memory = Pages::new(capacity);
        memory[..rest.len()].copy_from_slice(rest);
        Self { memory, start: 0, end: rest.len() }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.memory[self.start..self.end]
    }

    pub(super) fn consume(&mut self, len: usize) {
        assert!(len <= self.end - self.start, "more was consumed than is there");
        self.start += len;
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Moves what is there into `buf`, as much as fits; how much it was.
    pub(super) fn move_into(&mut self, buf: &mut [u8]) -> usize {
        let len = buf.len().min(self.end - self.start);
        buf[..len].copy_from_slice(&self.memory[self.start..self.start + len]);
        self.consume(len);
        len
    }

    /// Where the next receive goes, at most `limit` bytes; [`Intake::received`] says how much came.
    pub(super) fn room(&mut self, limit: usize) -> &mut [u8] {
        let wanted = limit.min(Self::INLINE_BYTES * 2);
        if self.start > 0 && self.memory.len() - self.end < wanted {
            self.memory.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        let end = self.memory.len().min(self.end.saturating_add(limit));
        &mut self.memory[self.end..end]
    }

    pub(super) fn received(&mut self, len: usize) {
        assert!(self.end + len <= self.memory.len(), "more was received than there was room for");
        self.end += len;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn receive(intake: &mut Intake, bytes: &[u8]) {
        intake.room(usize::MAX)[..bytes.len()].copy_from_slice(bytes);
        intake.received(bytes.len());
    }

    #[test]
    fn bytes_come_out_as_they_went_in_and_there_is_always_room() {
        let mut intake = Intake::new(b"rest");
        let mut sent = b"rest".to_vec();
        let mut taken = Vec::new();
        for round in 0..200_usize {
            let piece = vec![round as u8; 1 + round * 331 % 60_000];
            receive(&mut intake, &piece);
            sent.extend_from_slice(&piece);
            let mut out = vec![0; 1 + round * 517 % 70_000];
            let len = intake.move_into(&mut out);
            taken.extend_from_slice(&out[..len]);
            while intake.bytes().len() > Intake::INLINE_BYTES {
                let len = intake.move_into(&mut out);
                taken.extend_from_slice(&out[..len]);
            }
            assert!(intake.room(usize::MAX).len() >= Intake::INLINE_BYTES);
        }
        taken.extend_from_slice(intake.bytes());
        assert!(taken == sent);
    }
}
