//! Taking chunks out of a view.

use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use block::{AlignedBuf, BlockDevice, ByteRange, Error, ErrorKind, Result};

use super::View;
use super::copies::Copy;
use super::set::BlockState;
use crate::live::clock::Clock;
use crate::live::device::LiveDevice;
use crate::live::mistakes::{Mistake, makes};
use crate::live::source::{ChunkData, ChunkSource, SourceErrorKind, Urgency};

const FIRST_BACKOFF: Duration = Duration::from_millis(50);
const LONGEST_BACKOFF: Duration = Duration::from_secs(5);

/// Reads a view on one thread.
pub struct FrozenReader {
    view: Arc<View>,
    below: Below,
}

/// Where the view's bytes come from.
enum Below {
    Live(LiveDevice),
    /// A session that no agent serves.
    Rest {
        target: Rc<dyn BlockDevice>,
        backup: Arc<Backup>,
    },
}

/// Where what is absent comes from, for a session that no agent serves.
pub(super) struct Backup {
    pub(super) source: Arc<dyn ChunkSource>,
    pub(super) clock: Arc<dyn Clock>,
    /// How long a source that is out of reach is waited for.
    pub(super) timeout: Duration,
}

/// What became of chunks that were taken.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// Chunks that are not whole and whose rest the backup cannot give, with the reason: what the buffer holds for
    /// them means nothing.
    pub damaged: Vec<(u64, String)>,
}

impl FrozenReader {
    pub(super) const fn live(view: Arc<View>, device: LiveDevice) -> Self {
        Self { view, below: Below::Live(device) }
    }

    pub(super) const fn rest(view: Arc<View>, target: Rc<dyn BlockDevice>, backup: Arc<Backup>) -> Self {
        Self { view, below: Below::Rest { target, backup } }
    }

    /// Takes the chunks at `places` of [`super::Frozen::chunks`], which must be neighbours on the disk: their bytes
    /// fill `buf`, which is given their length. Each chunk can be taken once.
    ///
    /// # Errors
    /// Where the target cannot be read, the backup is out of reach for too long, or the view has failed.
    pub async fn take(&self, places: Range<usize>, mut buf: AlignedBuf) -> (Result<Taken>, AlignedBuf) {
        let set = &self.view.set;
        let chunks = &set.chunks()[places.clone()];
        let (Some(first), Some(last)) = (chunks.first(), chunks.last()) else {
            return (Ok(Taken::default()), buf);
        };
        assert_eq!(last - first, chunks.len() as u64 - 1, "neighbours on the disk");
        let whole = set.disk().run_range(&(*first..last + 1));
        buf.set_len(whole.len() as usize);
        let (result, mut buf) = self.take_local(places.clone(), whole, buf).await;
        let copies = match result {
            Ok(copies) => copies,
            Err(error) => return (Err(error), buf),
        };
        let result = self.compose(places, whole, &copies, &mut buf).await;
        (result.and_then(|taken| self.view.check().map(|()| taken)), buf)
    }

    /// Reads what is still on the target; then the chunks are taken, and their copies come out. In that order: whatever
    /// was overwritten while it was read was copied before, and is among them.
    async fn take_local(
        &self,
        places: Range<usize>,
        whole: ByteRange,
        mut buf: AlignedBuf,
    ) -> (Result<Vec<Copy>>, AlignedBuf) {
        let set = &self.view.set;
        assert!(places.clone().all(|place| !set.is_taken(place)), "a chunk is taken once");
        let early = makes(Mistake::CopiesTakenFirst).then(|| self.take_copies(places.clone()));
        if let Err(error) = self.view.check() {
            return (Err(error), buf);
        }
        let mut runs: Vec<Range<u64>> = Vec::new();
        for place in places.clone() {
            for (run, _) in
                set.runs(place, &set.blocks(place)).filter(|(_, state)| *state == BlockState::OnTarget)
            {
                match runs.last_mut() {
                    Some(last) if last.end == run.start => last.end = run.end,
                    _ => runs.push(run),
                }
            }
        }
        for run in runs {
            let bytes = set.bytes(&run);
            if bytes == whole {
                let (result, read) = self.read_target(whole, buf).await;
                buf = read;
                if let Err(error) = result {
                    return (Err(error), buf);
                }
                continue;
            }
            let (result, part) = self.read_target(bytes, AlignedBuf::zeroed(bytes.len() as usize)).await;
            if let Err(error) = result {
                return (Err(error), buf);
            }
            buf[within(whole, bytes)].copy_from_slice(&part);
        }
        let copies = early.unwrap_or_else(|| self.take_copies(places));
        (Ok(copies), buf)
    }

    fn take_copies(&self, places: Range<usize>) -> Vec<Copy> {
        let take = |place| {
            self.view.set.mark_taken(place);
            self.view.copies.take(place)
        };
        places.flat_map(take).collect()
    }

    /// Puts in what is not on the target any more, or was not yet.
    async fn compose(
        &self,
        places: Range<usize>,
        whole: ByteRange,
        copies: &[Copy],
        buf: &mut AlignedBuf,
    ) -> Result<Taken> {
        let set = &self.view.set;
        for copy in copies {
            let bytes = self.view.copies.read(copy).await?;
            buf[within(whole, set.bytes(&copy.blocks))].copy_from_slice(&bytes);
        }
        let mut taken = Taken::default();
        for place in places {
            let chunk = set.chunks()[place];
            let absent: Vec<Range<u64>> = set
                .runs(place, &set.blocks(place))
                .filter(|(_, state)| *state == BlockState::Absent)
                .map(|(run, _)| run)
                .collect();
            if absent.is_empty() {
                continue;
            }
            let data = match self.backup_of(chunk).await {
                Ok(data) => data,
                Err(error) if error.kind() == ErrorKind::Damaged => {
                    taken.damaged.push((chunk, error.to_string()));
                    continue;
                }
                Err(error) => return Err(error),
            };
            let range = set.disk().chunk_range(chunk);
            for run in absent {
                let bytes = set.bytes(&run);
                let into = &mut buf[within(whole, bytes)];
                match &data {
                    Some(data) => into.copy_from_slice(&data[within(range, bytes)]),
                    None => into.fill(0),
                }
            }
        }
        Ok(taken)
    }

    async fn read_target(&self, range: ByteRange, mut buf: AlignedBuf) -> (Result<()>, AlignedBuf) {
        let target = match &self.below {
            Below::Live(device) => &device.target,
            Below::Rest { target, .. } => target,
        };
        // What the guest trimmed is a hole: there is no need to read it.
        if let Ok(extents) = target.extents(range, 1).await
            && let Some(first) = extents.first()
            && first.state.zero
            && first.range.intersection(range) == range
        {
            buf.fill(0);
            return (Ok(()), buf);
        }
        match &self.below {
            Below::Live(device) => device.read_target(range.start(), buf).await,
            Below::Rest { target, .. } => target.read(range.start(), buf).await,
        }
    }

    /// What the backup has for a chunk; `None` for zeroes.
    async fn backup_of(&self, chunk: u64) -> Result<Option<ChunkData>> {
        match &self.below {
            Below::Live(device) => {
                let session = device.session();
                if session.source.is_zero(chunk) {
                    return Ok(None);
                }
                match session.decoded(chunk) {
                    Some(data) => Ok(Some(data)),
                    None => session.fetch(chunk, Urgency::Background).await.map(Some),
                }
            }
            Below::Rest { backup, .. } if backup.source.is_zero(chunk) => Ok(None),
            Below::Rest { backup, .. } => backup.fetch(chunk).await.map(Some),
        }
    }
}

impl Backup {
    /// Waits for a source that is out of reach.
    async fn fetch(&self, chunk: u64) -> Result<ChunkData> {
        let since = self.clock.now();
        let mut backoff = FIRST_BACKOFF;
        loop {
            let error = match self.source.fetch(chunk, Urgency::Background).await {
                Ok(data) => return Ok(data),
                Err(error) => error,
            };
            let kind = match error.kind() {
                SourceErrorKind::Damaged | SourceErrorKind::Missing => ErrorKind::Damaged,
                SourceErrorKind::Closed => ErrorKind::Shutdown,
                SourceErrorKind::Unavailable => {
                    let left = (since + self.timeout).saturating_sub(self.clock.now());
                    if !left.is_zero() {
                        self.clock.sleep(backoff.min(left)).await;
                        backoff = (backoff * 2).min(LONGEST_BACKOFF);
                        continue;
                    }
                    ErrorKind::Io
                }
            };
            return Err(Error::new(kind, error));
        }
    }
}

/// Where `part` is in the bytes of `whole`.
fn within(whole: ByteRange, part: ByteRange) -> Range<usize> {
    (part.start() - whole.start()) as usize..(part.end() - whole.start()) as usize
}

impl std::fmt::Debug for FrozenReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FrozenReader").field("view", &self.view).finish_non_exhaustive()
    }
}
