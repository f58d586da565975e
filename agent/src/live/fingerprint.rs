//! Whether a target is the one that a session's journal speaks of, told by its contents.
//!
//! A chunk whose blocks are all in `P` and none in `G` was filled, synced, and never written by the guest: the
//! target must hold the snapshot's bytes there. A few such chunks, spread over the disk, are read from the target and
//! compared with their ids in the disk map; nothing is fetched.
//!
//! How much a mismatch says depends on how well `G` is known:
//! - After a parking, and where the live file of this boot has `G`, it leaves nothing out: one mismatch is enough.
//! - After the loss of the live file or of the host, the guest may have written to a chunk that was home without a flush,
//!   and no record speaks of it. Then a single match proves the target, and it is refused where none of many matches.
//!
//! Where no chunk qualifies (all that is home was written by the guest, or is zeroes) nothing can be said, and the
//! target passes: whether it is the session's is then told by its name alone, which the session's owner checks.

use block::{AlignedBuf, BlockDevice};

use super::bits::Bits;
use super::error::{Error, ErrorKind, Result};
use super::parts::ChunkCheck;
use super::source::{ChunkSource, DiskLayout};

/// Chunks that are compared where each of them must match.
const SAMPLES: usize = 8;
/// Chunks that are compared, at most, where one match is enough.
const SAMPLES_FOR_A_MATCH: usize = 64;

/// What is known of a target's contents.
pub(super) struct Evidence<'a> {
    /// `P`.
    pub(super) home: Bits<'a>,
    /// `G`: what the journal says, and what the live file does.
    pub(super) guest: Vec<Bits<'a>>,
    /// Whether `guest` leaves nothing out.
    pub(super) is_exact: bool,
}

/// Compares samples of the target with the disk map.
///
/// # Errors
/// `WrongTarget` where they differ. A sample that cannot be read or checked says nothing.
pub(super) async fn check_contents(
    check: &dyn ChunkCheck,
    source: &dyn ChunkSource,
    target: &dyn BlockDevice,
    evidence: &Evidence<'_>,
) -> Result<()> {
    let disk = source.layout();
    let count = if evidence.is_exact { SAMPLES } else { SAMPLES_FOR_A_MATCH };
    let mut differing = None;
    for chunk in samples(disk, evidence, |chunk| source.is_zero(chunk), count) {
        let range = disk.chunk_range(chunk);
        let len = usize::try_from(range.len()).expect("a chunk fits in memory");
        let (result, buf) = target.read(range.start(), AlignedBuf::zeroed(len)).await;
        if let Err(error) = result {
            tracing::warn!(%error, %range, "part of the target cannot be read, and was not checked");
            continue;
        }
        match check.is_chunk(chunk, &buf) {
            None => {}
            Some(true) if evidence.is_exact => {}
            Some(true) => return Ok(()),
            Some(false) => {
                differing = Some(range);
                if evidence.is_exact {
                    break;
                }
            }
        }
    }
    match differing {
        None => Ok(()),
        Some(range) => Err(Error::new(
            ErrorKind::WrongTarget,
            format_args!(
                "the target does not hold what the session says: {range} were copied there, and are others now"
            ),
        )),
    }
}

/// At most `count` chunks that must hold the snapshot's bytes, spread over those that must.
fn samples(
    disk: DiskLayout,
    evidence: &Evidence<'_>,
    is_zero: impl Fn(u64) -> bool,
    count: usize,
) -> Vec<u64> {
    let blocks = |chunk| disk.chunk_range(chunk).units(block::BLOCK_SIZE);
    let qualifies = |chunk: &u64| {
        !is_zero(*chunk)
            && evidence.home.all(blocks(*chunk))
            && !evidence.guest.iter().any(|guest| guest.any(blocks(*chunk)))
    };
    let qualified = || (0..disk.chunk_count()).filter(qualifies);
    let all = qualified().count();
    let step = all.div_ceil(count).max(1);
    // The middle of each stretch: a disk's first chunks are alike more often than others.
    qualified().skip(step / 2).step_by(step).take(count).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::live::bits::{words_for, zeroed_words};

    #[test]
    fn samples_are_chunks_that_were_filled_and_never_written_spread_over_the_disk() {
        let disk = DiskLayout { size: 1000 * 16384 - 512, chunk_size: 16384 };
        let blocks = disk.size.div_ceil(block::BLOCK_SIZE);
        let words = [(); 3].map(|()| zeroed_words(words_for(blocks)));
        let [home, journal, live] = [0, 1, 2].map(|index| Bits::new(&words[index], blocks));
        let evidence = Evidence { home, guest: vec![journal, live], is_exact: true };
        let found = |count| samples(disk, &evidence, |chunk| chunk < 100, count);
        assert!(found(8).is_empty(), "nothing is home");
        home.set(0..blocks);
        let whole = found(8);
        assert_eq!(whole.len(), 8);
        assert!(whole[0] >= 100 && whole[7] > 900 && whole.is_sorted(), "{whole:?}");
        // Written in part, or known to one of the two alone.
        for chunk in 100..998 {
            let guest = if chunk % 2 == 0 { journal } else { live };
            guest.set(chunk * 4 + 1..chunk * 4 + 2);
        }
        assert_eq!(found(8), [998, 999]);
    }
}
