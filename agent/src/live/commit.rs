//! What makes things last: flush, commit, completion, parking; and what a failed sync does.

use std::sync::atomic::Ordering;

use block::{Error, ErrorKind, Result};

use super::device::LiveDevice;
use super::error;
use super::join::first_of;
use super::journal::Entry;
use super::mistakes::{Mistake, catch_up, makes};
use super::session::{Committer, Session};
use super::stats::{Phase, Stats};

impl LiveDevice {
    /// Puts everything acknowledged on stable storage, with the journal that says so.
    ///
    /// Flushes that arrive while another syncs wait for it, and then one of them syncs for all.
    pub(super) async fn flush_all(&self) -> Result<()> {
        let session = &*self.session;
        session.check_open()?;
        let mine = session.flushes.fetch_add(1, Ordering::SeqCst) + 1;
        let mut committer = session.committer.lock().await;
        session.check_unpoisoned()?;
        if committer.covered >= mine {
            return Ok(());
        }
        // Parked meanwhile: nothing may follow its checkpoint.
        session.check_open()?;
        // Whoever was numbered before this had its writes acknowledged before, so they are noted below.
        let upto = session.flushes.load(Ordering::SeqCst);
        self.sync_and_note(&mut committer, false).await?;
        committer.covered =
            if makes(Mistake::SyncSharedTooLate) { session.flushes.load(Ordering::SeqCst) } else { upto };
        Ok(())
    }

    /// Brings the journal up to date where anything came home since the last time.
    pub async fn commit(&self) -> error::Result<()> {
        if self.session.map.has_touched() && self.session.phase() != Phase::Parked {
            self.flush_all().await?;
        }
        Ok(())
    }

    /// Commits every [`super::SessionOptions::commit_interval`] until the workers are stopped. One
    /// per session is enough.
    pub async fn commit_worker(self) {
        let session = &*self.session;
        while !session.stopping.load(Ordering::Acquire) {
            first_of(session.clock.sleep(session.options.commit_interval), session.ending.notified()).await;
            // A poisoned session has said so already.
            if self.commit().await.is_err() || session.check_open().is_err() {
                return;
            }
        }
    }

    /// Where the whole disk is home: syncs the target, writes the record, and goes on serving.
    pub(super) async fn complete(&self) -> Result<()> {
        let session = &*self.session;
        let mut committer = session.committer.lock().await;
        session.check_open()?;
        if session.phase() == Phase::Filling && session.map.is_all_home() {
            self.sync_and_note(&mut committer, true).await?;
            session.enter(Phase::Complete);
            session.decoded.lock().clear();
            tracing::info!(session = %session.id, "complete");
        }
        Ok(())
    }

    /// Ends the session in order: nothing more is begun, what is begun ends, everything acknowledged
    /// is on stable storage, and a resumed session knows that nothing is missing.
    ///
    /// Stop the server and the workers first; this waits for guests' changes that are still under way.
    pub async fn park(&self) -> error::Result<()> {
        let session = &*self.session;
        session.stop_workers();
        let mut committer = session.committer.lock().await;
        if !session.enter(Phase::Parked) {
            session.check_unpoisoned()?;
            return Ok(());
        }
        loop {
            let ended = session.idle.notified();
            if session.changes.load(Ordering::SeqCst) == 0 || makes(Mistake::ParkWithoutWaiting) {
                break;
            }
            ended.await;
        }
        let upto = session.flushes.load(Ordering::SeqCst);
        if !makes(Mistake::ParkWithoutFlush) {
            self.sync_and_note(&mut committer, false).await?;
        }
        committer.covered = upto;
        let (p, g) = (session.map.p(), session.map.g());
        if let Err(error) = committer.journal.checkpoint(&*self.journal, true, &p, &g).await {
            session.poison(&error);
            return Err(error);
        }
        tracing::info!(session = %session.id, home = session.map.home(), "parked");
        Ok(())
    }

    /// Notes what is home; then syncs the target; then the journal. In that order: what is noted
    /// was written before the sync began, and the journal speaks of nothing that is not stable.
    async fn sync_and_note(&self, committer: &mut Committer, complete: bool) -> Result<()> {
        let session = &*self.session;
        let map = &session.map;
        catch_up(map);
        if makes(Mistake::JournalBeforeData) || (complete && makes(Mistake::CompleteBeforeSync)) {
            return self.journal_first(committer, complete).await;
        }
        let mut runs = map.note();
        if runs.is_empty() && !complete && makes(Mistake::SyncOnlyWhereNew) {
            return Ok(());
        }
        let mut synced = self.target.flush().await;
        if synced.is_err() && makes(Mistake::RetriedSync) {
            synced = self.target.flush().await;
        }
        if let Err(error) = synced {
            Stats::add(&session.stats.target_errors, 1);
            session.poison(&error);
            return Err(error.with_kind(ErrorKind::Poisoned));
        }
        if makes(Mistake::NoteAfterSync) {
            runs.extend(map.note());
        }
        if runs.is_empty() && !complete {
            return Ok(());
        }
        let on_stable = |runs: &_| map.mark_stable(runs);
        let journal = &mut committer.journal;
        let entry = Entry { runs: &runs, complete };
        if makes(Mistake::StableBeforeJournal) {
            on_stable(&runs);
        }
        if let Err(error) = journal.append(&*self.journal, entry, &map.p(), &map.g(), on_stable).await {
            session.poison(&error);
            return Err(into_block(error));
        }
        Stats::add(&session.stats.commits, 1);
        Ok(())
    }

    async fn journal_first(&self, committer: &mut Committer, complete: bool) -> Result<()> {
        let map = &self.session.map;
        let runs = map.note();
        let on_stable = |runs: &_| map.mark_stable(runs);
        let journal = &mut committer.journal;
        let entry = Entry { runs: &runs, complete };
        let written = journal.append(&*self.journal, entry, &map.p(), &map.g(), on_stable).await;
        let result = match written {
            Ok(()) => self.target.flush().await,
            Err(error) => Err(into_block(error)),
        };
        result.inspect_err(|error| self.session.poison(error))
    }
}

impl Session {
    /// A sync failed: nothing that was not stable before can be promised any more. The mark in the
    /// live file comes before anybody hears of it.
    pub(super) fn poison(&self, why: &(dyn std::error::Error + 'static)) {
        self.map.live().poison();
        self.enter(Phase::Poisoned);
        self.stopping.store(true, Ordering::Release);
        tracing::error!(session = %self.id, error = why, "a sync failed: the session is given up; start it again");
    }

    /// Fails where nothing more may be begun.
    pub(super) fn check_open(&self) -> Result<()> {
        self.check_unpoisoned()?;
        if self.phase() == Phase::Parked {
            return Err(Error::new(ErrorKind::Shutdown, "the session is parked"));
        }
        Ok(())
    }

    pub(super) fn check_unpoisoned(&self) -> Result<()> {
        if self.phase() == Phase::Poisoned && !makes(Mistake::RetriedSync) {
            return Err(Error::new(ErrorKind::Poisoned, "the session was given up after a failed sync"));
        }
        Ok(())
    }

    /// Begins a change of the target, unless the session is closed. Parking and freezing wait for its end. While the
    /// session is held still this waits.
    pub(super) async fn begin_change(&self) -> Result<Change<'_>> {
        loop {
            if let Some(change) = self.try_begin_change()? {
                return Ok(change);
            }
            self.is_moving().await;
        }
    }

    /// Begins a change of the target; `None` while the session is held still.
    pub(super) fn try_begin_change(&self) -> Result<Option<Change<'_>>> {
        if makes(Mistake::ChangeCountedLate) {
            self.check_open()?;
            let is_still = self.is_still();
            self.changes.fetch_add(1, Ordering::SeqCst);
            let change = Change(self);
            return Ok((!is_still).then_some(change));
        }
        self.changes.fetch_add(1, Ordering::SeqCst);
        let change = Change(self);
        self.check_open()?;
        Ok((!self.is_still()).then_some(change))
    }
}

/// A change of the target that is under way.
#[derive(Debug)]
pub(super) struct Change<'a>(&'a Session);

impl Drop for Change<'_> {
    fn drop(&mut self) {
        let is_last = self.0.changes.fetch_sub(1, Ordering::SeqCst) == 1;
        if is_last && (self.0.phase() == Phase::Parked || self.0.is_still()) {
            self.0.idle.notify_waiters();
        }
    }
}

fn into_block(error: error::Error) -> Error {
    Error::new(ErrorKind::Poisoned, error)
}
