//! Streams in what one client reads: sequential ones, and those that step by the same distance. Pure.
//!
//! A client's reads are seen as chunk numbers. A stream is believed once it has taken the same step three times;
//! then what lies ahead of it is asked for, further ahead the longer it lasts.

use std::ops::Range;

/// Streams that are told apart in one client's reads.
const STREAMS: usize = 8;
/// Steps before a stream is believed.
const BELIEVED_AFTER: u32 = 3;
/// Steps ahead of a stream that was just believed, and the most that it ever reaches.
const FIRST_REACH: u64 = 4;
const LONGEST_REACH: u64 = 64;
/// Larger steps are chance.
const LONGEST_STEP: u64 = 256;

#[derive(Clone, Copy, Debug)]
struct Stream {
    last: u64,
    step: i64,
    steps: u32,
    /// Where the steps that were asked for end, in steps from `last`.
    ahead: u64,
    used: u64,
}

/// The streams of one client.
#[derive(Debug, Default)]
pub(super) struct Streams {
    streams: Vec<Stream>,
    clock: u64,
}

impl Streams {
    /// The client reads `chunk`; what of the disk's `chunk_count` chunks is worth asking for now.
    pub(super) fn saw(&mut self, chunk: u64, chunk_count: u64) -> Vec<Range<u64>> {
        self.clock += 1;
        if self.streams.iter().any(|stream| stream.last == chunk) {
            return Vec::new();
        }
        let used = self.clock;
        let next = self.streams.iter_mut().find(|stream| stream.step != 0 && stream.next() == Some(chunk));
        if let Some(stream) = next {
            stream.last = chunk;
            stream.used = used;
            stream.steps = stream.steps.saturating_add(1);
            stream.ahead = stream.ahead.saturating_sub(1);
            return stream.ask(chunk_count);
        }
        let open = self.streams.iter_mut().filter(|stream| stream.steps < BELIEVED_AFTER);
        let nearest = open.min_by_key(|stream| stream.last.abs_diff(chunk));
        if let Some(stream) = nearest.filter(|stream| stream.last.abs_diff(chunk) <= LONGEST_STEP) {
            // The first two reads of a stream, or one that was no stream after all.
            stream.step = chunk as i64 - stream.last as i64;
            (stream.last, stream.steps, stream.ahead, stream.used) = (chunk, 1, 0, used);
            return Vec::new();
        }
        if self.streams.len() == STREAMS {
            let oldest = self.streams.iter().enumerate().min_by_key(|(_, stream)| stream.used);
            let oldest = oldest.expect("there are some").0;
            self.streams.swap_remove(oldest);
        }
        self.streams.push(Stream { last: chunk, step: 0, steps: 0, ahead: 0, used });
        Vec::new()
    }
}

impl Stream {
    fn next(&self) -> Option<u64> {
        self.last.checked_add_signed(self.step)
    }

    /// What lies ahead and was not asked for yet; in pieces of half the reach, so that they are long.
    fn ask(&mut self, chunk_count: u64) -> Vec<Range<u64>> {
        if self.steps < BELIEVED_AFTER {
            return Vec::new();
        }
        let doublings = (self.steps - BELIEVED_AFTER).min(LONGEST_REACH.ilog2());
        let reach = (FIRST_REACH << doublings).min(LONGEST_REACH);
        if self.ahead > reach / 2 {
            return Vec::new();
        }
        let steps = self.ahead + 1..reach + 1;
        self.ahead = reach;
        let at = |step: u64| self.last.checked_add_signed(self.step.saturating_mul(step as i64));
        let chunks = steps.map_while(at).take_while(|chunk| *chunk < chunk_count);
        match self.step {
            1 => {
                chunks.clone().next().map(|first| first..first + chunks.count() as u64).into_iter().collect()
            }
            _ => chunks.map(|chunk| chunk..chunk + 1).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(reads: impl IntoIterator<Item = u64>) -> Vec<u64> {
        let mut streams = Streams::default();
        reads.into_iter().flat_map(|chunk| streams.saw(chunk, 1000)).flatten().collect()
    }

    #[test]
    fn a_sequential_stream_is_asked_for_ahead_each_chunk_once() {
        let ahead = asked(10..60);
        let mut sorted = ahead.clone();
        sorted.sort_unstable();
        sorted.dedup();
        assert_eq!(ahead, sorted, "in order, each once");
        assert_eq!(ahead.first(), Some(&14));
        assert!(*ahead.last().unwrap() >= 59 + LONGEST_REACH / 2);
    }

    #[test]
    fn strides_are_found_forwards_and_backwards() {
        assert_eq!(asked([0, 8, 16, 24])[..4], [32, 40, 48, 56]);
        assert_eq!(asked([500, 490, 480, 470])[..4], [460, 450, 440, 430]);
    }

    #[test]
    fn two_streams_that_take_turns_are_told_apart() {
        let reads = (0..20).flat_map(|step| [step, 700 + 2 * step]);
        let ahead = asked(reads);
        assert!(ahead.contains(&25) && ahead.contains(&750), "{ahead:?}");
        assert!(ahead.iter().all(|chunk| *chunk < 200 || (*chunk >= 700 && chunk % 2 == 0)), "{ahead:?}");
    }

    #[test]
    fn reads_of_the_same_chunk_and_reads_at_random_ask_for_nothing() {
        assert_eq!(asked([5; 50]), [0; 0]);
        let mut random = 1_u64;
        let reads = (0..200).map(|_| {
            random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (random >> 33) % 1_000_000
        });
        let mut streams = Streams::default();
        let ahead = reads.flat_map(|chunk| streams.saw(chunk, 1_000_000)).count();
        assert_eq!(ahead, 0);
    }

    #[test]
    fn nothing_beyond_the_disk_is_asked_for() {
        assert!(asked(980..1000).iter().all(|chunk| *chunk < 1000));
        assert_eq!(asked([30, 20, 10, 0]), [0; 0]);
    }
}
