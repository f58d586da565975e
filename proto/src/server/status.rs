//! Extents as BLOCK_STATUS tells of them: within the request, merged where equal, each cut to what
//! its descriptor holds, and not too many.

use crate::wire::{Descriptor, MAX_STATUS_EXTENT_BYTES, ReplyStyle};

/// Collects the descriptors of one context.
#[derive(Clone, Debug)]
pub struct StatusBuilder {
    descriptors: Vec<Descriptor>,
    /// What of the request is not told of yet, in bytes.
    left: u64,
    max: usize,
    longest: u64,
}

impl StatusBuilder {
    /// A builder for a request of `len` bytes that tells of at most `max` extents (at least one), in replies of `style`.
    #[must_use]
    pub fn new(len: u64, max: usize, style: ReplyStyle) -> Self {
        let longest = if style.is_extended() { u64::MAX } else { MAX_STATUS_EXTENT_BYTES };
        Self { descriptors: Vec::new(), left: len, max: max.max(1), longest }
    }

    /// Whether nothing more will be taken.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.left == 0
    }

    /// Tells of the next `len` bytes. What lies beyond the request, or is one extent too many, is left out.
    pub fn push(&mut self, len: u64, flags: u64) {
        let mut len = len.min(self.left);
        self.left -= len;
        while len > 0 {
            let longest = self.longest;
            let last = self.descriptors.last_mut().filter(|last| last.flags == flags && last.len < longest);
            if let Some(last) = last {
                let taken = len.min(longest - last.len);
                last.len += taken;
                len -= taken;
                continue;
            }
            if self.descriptors.len() == self.max {
                // Everything after an extent that was left out must be left out too.
                self.left = 0;
                return;
            }
            let taken = len.min(self.longest);
            self.descriptors.push(Descriptor { len: taken, flags });
            len -= taken;
        }
    }

    /// What was collected. Where nothing was told, one extent of no known state over the whole
    /// request, since a reply must have one and flags of 0 are always true.
    #[must_use]
    pub fn finish(mut self) -> Vec<Descriptor> {
        if self.descriptors.is_empty() {
            self.push(u64::MAX, 0);
        }
        self.descriptors
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_neighbours_are_one_extent() {
        let mut builder = StatusBuilder::new(1000, 10, ReplyStyle::Structured);
        builder.push(300, 1);
        builder.push(300, 1);
        builder.push(4000, 0);
        let expected = [Descriptor { len: 600, flags: 1 }, Descriptor { len: 400, flags: 0 }];
        assert_eq!(builder.finish(), expected);
    }

    #[test]
    fn an_extent_that_32_bits_cannot_hold_is_cut_at_a_multiple_of_large_blocks() {
        let mut builder = StatusBuilder::new(u64::from(u32::MAX), 10, ReplyStyle::Structured);
        builder.push(u64::MAX, 2);
        let descriptors = builder.finish();
        assert_eq!(descriptors[0].len, MAX_STATUS_EXTENT_BYTES);
        assert_eq!(descriptors[0].len % (64 << 20), 0);
        assert_eq!(descriptors.iter().map(|d| d.len).sum::<u64>(), u64::from(u32::MAX));
    }

    #[test]
    fn extended_replies_tell_of_any_length_in_one_extent() {
        let mut builder = StatusBuilder::new(u64::MAX, 10, ReplyStyle::Extended);
        builder.push(1 << 40, 3);
        builder.push(1 << 50, 3);
        builder.push(u64::MAX, 0);
        let hole = (1 << 40) + (1 << 50);
        let expected = [Descriptor { len: hole, flags: 3 }, Descriptor { len: u64::MAX - hole, flags: 0 }];
        assert_eq!(builder.finish(), expected);
    }

    #[test]
    fn nothing_follows_what_was_left_out() {
        let mut builder = StatusBuilder::new(1000, 2, ReplyStyle::Structured);
        builder.push(100, 0);
        builder.push(100, 1);
        builder.push(100, 0);
        builder.push(100, 1);
        assert!(builder.is_full());
        assert_eq!(builder.finish().len(), 2);
    }

    #[test]
    fn silence_of_the_device_is_one_extent_of_no_known_state() {
        assert_eq!(
            StatusBuilder::new(77, 4, ReplyStyle::Structured).finish(),
            [Descriptor { len: 77, flags: 0 }]
        );
    }
}
