//! A frozen view: one point in time of the disk as the guest sees it, while guests go on writing. `save` and the first
//! backup after a restore read it.
//!
//! It holds the chunks that the guest has written to (`G`, by chunk), and of each of their blocks whether it was home
//! when the view began. All other chunks are those of the backup, and cost nothing. So does everything where no view
//! exists: one load of a flag for each write.
//!
//! # What a block of the view is
//! | when the view began | since then | its bytes |
//! |---|---|---|
//! | home | not written | the target's |
//! | home | written, trimmed, zeroed | the copy that was made before |
//! | absent | anything: filled, written | the backup's |
//!
//! So a fill needs no care (it writes only what was absent), nor does a guest's write to what was absent.
//!
//! # States and orders
//! - **Still** ([`Session::hold_still`]): no change of the target is begun; those under way have ended. They never wait for
//!   the source, so neither does this. Several sessions that are held still together are frozen at one point in time.
//! - **Frozen** ([`Still::freeze`]): the set is taken and the view is put where writers look for it, before any change
//!   goes on: so each change is either in the view whole, or sees it.
//! - **Copy before write**: a change holds the chunk's place in the view alone, so that no other change of the same blocks
//!   overtakes its copy; copies those of its blocks that were home and are not copied yet; lets go; only then it changes the
//!   target. The hold spans local reads and writes.
//! - **Taking** a chunk ([`FrozenReader::take`]): reads what is not copied from the target; marks it taken; takes its copies, which
//!   go over what was read: whatever was overwritten meanwhile was copied before; then gets what was absent from the backup.
//!   It holds nothing, so no write waits for it. From *taken* on nobody copies anything of the chunk. A chunk is taken once.
//! - **Failed**: a copy could not be made (the target cannot be read, no room for copies). The guest's write goes on, and
//!   the view is of no use any more: every later taking fails, and says why.
//! - **Over**: the view is dropped; its copies go with it.
//!
//! A write is never refused, and never waits for the source, because of a view.
//!
//! Copies are kept in memory up to [`FrozenOptions::memory_bytes`], then on the spill device, whose size is the cap.

mod copies;
mod reader;
mod rest;
mod set;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use block::{AlignedBuf, BlockDevice, Error, OpenDevice, Result};
use parking_lot::{Mutex, RwLock};
use tokio::sync::Notify;

use super::device::LiveDevice;
use super::holds::Holds;
use super::mistakes::{Mistake, makes};
use super::session::Session;
use copies::Copies;
use set::FrozenSet;

pub use reader::{FrozenReader, Taken};
pub use rest::{AtRest, RestParts};

/// What a view may use.
#[derive(Clone)]
pub struct FrozenOptions {
    /// Bytes of copies that are kept in memory.
    pub memory_bytes: u64,
    /// Where further copies go; its size is how many bytes they may be.
    pub spill: Option<Arc<dyn OpenDevice>>,
}

/// What a session has for views.
#[derive(Debug, Default)]
pub(super) struct Views {
    /// No change of the target may be begun.
    is_still: AtomicBool,
    /// Wakes changes that wait for that to end.
    moving: Notify,
    /// Whether there is a view: looked at by every write.
    exists: AtomicBool,
    view: RwLock<Option<Arc<View>>>,
}

/// What a view's owner, its readers and guests' writes share.
pub(super) struct View {
    set: FrozenSet,
    /// By chunk: who copies it.
    holds: Holds,
    copies: Copies,
    failure: Mutex<Option<Error>>,
}

/// A session in which no change is under way, until this is dropped. Guests' changes wait.
#[derive(Debug)]
pub struct Still {
    session: Arc<Session>,
}

/// A view. It ends when this is dropped.
pub struct Frozen {
    view: Arc<View>,
    /// `None` for one of a session at rest, which nobody writes to.
    session: Option<Arc<Session>>,
}

impl Session {
    /// Waits for the changes under way, and lets no other begin.
    ///
    /// # Errors
    /// Where somebody else holds it still, or it is parked or poisoned.
    pub async fn hold_still(self: &Arc<Self>) -> Result<Still> {
        let views = &self.views;
        if views.is_still.swap(true, Ordering::SeqCst) {
            return Err(Error::new(block::ErrorKind::Unsupported, "the session is being frozen already"));
        }
        let still = Still { session: Arc::clone(self) };
        loop {
            let ended = self.idle.notified();
            self.check_open()?;
            if self.changes.load(Ordering::SeqCst) == 0 || makes(Mistake::FrozenUnderWrites) {
                return Ok(still);
            }
            ended.await;
        }
    }

    /// Whether changes must wait.
    pub(super) fn is_still(&self) -> bool {
        // Sequentially consistent with the count of changes: either whoever holds still sees a change, or it sees this.
        self.views.is_still.load(Ordering::SeqCst)
    }

    /// Ends when changes may go on.
    pub(super) async fn is_moving(&self) {
        let moving = self.views.moving.notified();
        if self.is_still() {
            moving.await;
        }
    }

    /// Whether `blocks` can be changed without a copy being made first. The caller has begun a change.
    pub(super) fn needs_no_copy(&self, blocks: &Range<u64>) -> bool {
        let views = &self.views;
        !views.exists.load(Ordering::SeqCst)
            || makes(Mistake::OverwrittenInView)
            || views.view.read().as_ref().is_none_or(|view| !view.needs_copy(blocks))
    }

    /// The chunks that a view begun now would hold.
    #[must_use]
    pub fn changed(&self) -> Vec<u64> {
        FrozenSet::new(self.map.disk(), &self.map.v(), &self.map.g()).chunks().to_vec()
    }

    fn view(&self) -> Option<Arc<View>> {
        if !self.views.exists.load(Ordering::SeqCst) {
            return None;
        }
        self.views.view.read().clone()
    }
}

impl Still {
    /// Begins a view of the session as it stands.
    ///
    /// # Errors
    /// Where there is one already, or the session is parked or poisoned.
    pub fn freeze(&self, options: FrozenOptions) -> Result<Frozen> {
        let session = &self.session;
        session.check_open()?;
        let mut place = session.views.view.write();
        if place.is_some() {
            return Err(Error::new(block::ErrorKind::Unsupported, "there is a view of the session already"));
        }
        let map = &session.map;
        let set = FrozenSet::new(map.disk(), &map.v(), &map.g());
        let view = Arc::new(View::new(set, options));
        *place = Some(Arc::clone(&view));
        session.views.exists.store(true, Ordering::SeqCst);
        Ok(Frozen { view, session: Some(Arc::clone(session)) })
    }
}

impl Drop for Still {
    fn drop(&mut self) {
        self.session.views.is_still.store(false, Ordering::SeqCst);
        self.session.views.moving.notify_waiters();
    }
}

impl Frozen {
    /// The chunks that the guest has written to, in order: those of the view that may differ from the backup's.
    #[must_use]
    pub fn chunks(&self) -> &[u64] {
        self.view.set.chunks()
    }

    /// How many bytes those chunks have.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let disk = self.view.set.disk();
        self.chunks().iter().map(|&chunk| disk.chunk_range(chunk).len()).sum()
    }

    /// The view's chunks as runs of neighbours on the disk, each of at most `most_bytes` (at least one chunk): what
    /// [`FrozenReader::take`] takes at once.
    pub fn runs(&self, most_bytes: u64) -> impl Iterator<Item = Range<usize>> + '_ {
        let chunks = self.chunks();
        let most =
            usize::try_from(most_bytes / u64::from(self.view.set.disk().chunk_size)).unwrap_or(1).max(1);
        let mut at = 0;
        std::iter::from_fn(move || {
            let start = at;
            let first = *chunks.get(start)?;
            let neighbours = chunks[start..].iter().take(most).zip(first..);
            at += neighbours.take_while(|(chunk, expected)| *chunk == expected).count();
            Some(start..at)
        })
    }

    /// Bytes that were copied because guests wrote to what was not taken yet.
    #[must_use]
    pub fn copied_bytes(&self) -> u64 {
        self.view.copies.bytes()
    }

    /// Why the view is of no use any more.
    #[must_use]
    pub fn failure(&self) -> Option<Error> {
        self.view.failure.lock().clone()
    }

    /// What reads it on the calling thread, over that thread's handle of the session.
    ///
    /// # Panics
    /// Where the view is of another session.
    #[must_use]
    pub fn reader(&self, device: LiveDevice) -> FrozenReader {
        let session = self.session.as_ref().expect("the view is of a session that runs");
        assert!(Arc::ptr_eq(session, device.session()), "the view is of another session");
        FrozenReader::live(Arc::clone(&self.view), device)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        if let Some(session) = &self.session {
            session.views.exists.store(false, Ordering::SeqCst);
            *session.views.view.write() = None;
        }
    }
}

impl View {
    fn new(set: FrozenSet, options: FrozenOptions) -> Self {
        Self { set, holds: Holds::new(), copies: Copies::new(options), failure: Mutex::new(None) }
    }

    fn check(&self) -> Result<()> {
        self.failure.lock().clone().map_or(Ok(()), Err)
    }

    fn has_failed(&self) -> bool {
        self.failure.lock().is_some()
    }

    fn fail(&self, error: Error) {
        let mut failure = self.failure.lock();
        if failure.is_none() {
            tracing::warn!(%error, "a frozen view is given up; guests go on");
            *failure = Some(error);
            self.copies.forget_all();
        }
    }

    fn needs_copy(&self, blocks: &Range<u64>) -> bool {
        self.set.members(blocks).any(|place| self.set.needs_copy(place, blocks)) && !self.has_failed()
    }

    /// Copies what of `blocks` was home and is not copied yet.
    async fn preserve(&self, target: &dyn BlockDevice, blocks: &Range<u64>) {
        for place in self.set.members(blocks) {
            if !self.set.needs_copy(place, blocks) {
                continue;
            }
            let _hold = if makes(Mistake::CopiedWithoutHold) {
                None
            } else {
                Some(self.holds.exclusive(self.set.chunks()[place]).await)
            };
            for run in self.set.uncopied(place, blocks) {
                if self.has_failed() {
                    return;
                }
                let bytes = self.set.bytes(&run);
                let (result, buf) =
                    target.read(bytes.start(), AlignedBuf::zeroed(bytes.len() as usize)).await;
                let kept = match result {
                    Ok(()) => self.copies.keep(place, run.clone(), buf).await,
                    Err(error) => Err(error),
                };
                match kept {
                    Ok(()) => self.set.mark_copied(place, &run),
                    Err(error) => return self.fail(error),
                }
            }
        }
    }
}

impl LiveDevice {
    /// Before `blocks` are changed: has the view, if there is one, keep what it needs of them. The caller has begun a change.
    pub(super) async fn preserve(&self, blocks: &Range<u64>) {
        if let Some(view) = self.session.view()
            && !makes(Mistake::OverwrittenInView)
        {
            view.preserve(&*self.target, blocks).await;
        }
    }
}

impl std::fmt::Debug for View {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("View").field("chunks", &self.set.chunks().len()).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Frozen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Frozen").field("view", &self.view).finish_non_exhaustive()
    }
}
