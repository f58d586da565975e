//! What was received and not yet understood: one piece of memory, read into at its end and taken from at its front.
//!
//! A message that begins near the end moves to the front before its rest is received. So a receive brings whole messages of the last known
//! length and no more: where all are of one length nothing moves.

use super::pages::Pages;

/// How much one receive may bring, in bytes: many small writes at once.
const CAPACITY: usize = 256 << 10;
/// So little is moved to the front without a thought.
const LITTLE: usize = 4 << 10;

/// The bytes between the socket and the parser.
pub(super) struct Intake {
    memory: Pages,
    start: usize,
    end: usize,
    /// How long the last message was whose length was known before all of it was there.
    message: usize,
}

impl Intake {
    /// A payload of this many bytes fits beside its header.
    pub(super) const INLINE_BYTES: usize = 64 << 10;

    /// Begins with `rest`, which is what the handshake left.
    pub(super) fn new(rest: &[u8]) -> Self {
        let capacity = CAPACITY.max(rest.len());
        let mut memory = Pages::new(capacity);
        memory[..rest.len()].copy_from_slice(rest);
        Self { memory, start: 0, end: rest.len(), message: 1 }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.memory[self.start..self.end]
    }

    /// The message at the front, which is so long, if all of it is there; else there will be room for it.
    pub(super) fn message(&mut self, len: usize) -> Option<&[u8]> {
        if self.end - self.start < len {
            self.expect(len);
            return None;
        }
        Some(&self.memory[self.start..self.start + len])
    }

    /// The message at the front, of which a part is there, is so long in all.
    fn expect(&mut self, message: usize) {
        assert!(
            self.end - self.start < message && message <= self.memory.len(),
            "a message of {message} bytes is not expected"
        );
        self.message = message;
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
        let there = self.end - self.start;
        if there < LITTLE || self.memory.len() - self.start < self.message {
            self.memory.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, there);
        }
        let most = self.memory.len() - self.start;
        let end = self.start + most - most % self.message;
        &mut self.memory[self.end..end.min(self.end.saturating_add(limit))]
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
    fn bytes_come_out_as_they_went_in_and_there_is_room_for_what_is_expected() {
        let mut intake = Intake::new(b"rest");
        let mut sent = b"rest".to_vec();
        let mut taken = Vec::new();
        for round in 0..200_usize {
            let piece = vec![round as u8; 1 + round * 331 % 60_000];
            intake.expect(intake.bytes().len() + Intake::INLINE_BYTES);
            receive(&mut intake, &piece);
            sent.extend_from_slice(&piece);
            let mut out = vec![0; 1 + round * 517 % 70_000];
            let len = intake.move_into(&mut out);
            taken.extend_from_slice(&out[..len]);
            while intake.bytes().len() > Intake::INLINE_BYTES {
                let len = intake.move_into(&mut out);
                taken.extend_from_slice(&out[..len]);
            }
        }
        taken.extend_from_slice(intake.bytes());
        assert!(taken == sent);
    }

    #[test]
    fn messages_of_one_length_are_not_moved_however_they_come() {
        const MESSAGE: usize = 28 + Intake::INLINE_BYTES;
        let mut intake = Intake::new(b"");
        let mut moved = 0;
        for round in 0..2_000_usize {
            let before = (intake.start, intake.bytes().len());
            let room = intake.room(usize::MAX).len();
            if intake.start != before.0 {
                moved += before.1;
            }
            intake.received(room.min(1 + round * 7_919 % 200_000));
            while intake.bytes().len() >= MESSAGE {
                intake.consume(MESSAGE);
            }
            if !intake.bytes().is_empty() {
                intake.expect(MESSAGE);
            }
        }
        assert!(moved < 2_000 * LITTLE, "{moved} bytes were moved");
    }

    #[test]
    fn a_longer_message_than_the_last_has_room_wherever_it_begins() {
        for first in [1, 28, 5_000, 60_000] {
            let mut intake = Intake::new(b"");
            receive(&mut intake, &vec![1; first - first / 2]);
            intake.expect(first + 1);
            let rest = intake.room(usize::MAX).len();
            intake.received(rest);
            // The last of them is not there as a whole.
            intake.consume(intake.bytes().len() / first * first - 1);
            let message = intake.bytes().len().max(28) + Intake::INLINE_BYTES;
            intake.expect(message);
            assert!(intake.bytes().len() + intake.room(usize::MAX).len() >= message);
        }
    }
}
