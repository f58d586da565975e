//! Saving a disk and moving its machine off us exclude each other: once QEMU has the target, what the guest writes is not
//! seen by a view any more, and a snapshot of it would be torn.
//!
//! A move waits for the saves under way: they end by themselves, and the guest is served meanwhile. A save that is asked for
//! during a move is refused: what comes after the move is no session's any more. After it the session's record says so. Nor are
//! there two saves of a disk at once: a session has one view.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

/// How often whoever waits for its turn looks whether it still is to wait.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);

/// Whose turn it is with one disk.
#[derive(Debug, Default)]
pub(super) struct Turns {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    is_saved: bool,
    is_moving: bool,
}

/// Why a disk cannot be saved just now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Busy {
    /// It is being saved already.
    Saving,
    /// The machine is being moved.
    Moving,
}

/// The disk is being saved, until this is dropped.
#[derive(Debug)]
pub(crate) struct Saving(Arc<Turns>);

/// The disk's machine is being moved, until this is dropped. There is one at a time.
#[derive(Debug)]
#[must_use]
pub(super) struct Moving(Arc<Turns>);

impl Turns {
    /// Begins a save.
    ///
    /// # Errors
    /// Where it is somebody else's turn.
    pub(super) fn save(self: &Arc<Self>) -> Result<Saving, Busy> {
        let mut state = self.state.lock();
        match *state {
            State { is_moving: true, .. } => Err(Busy::Moving),
            State { is_saved: true, .. } => Err(Busy::Saving),
            _ => {
                state.is_saved = true;
                Ok(Saving(Arc::clone(self)))
            }
        }
    }

    /// Begins a move, once the save under way has ended. From now on none begins. `waits` is called where it has to wait, and
    /// `check` now and then while it does.
    ///
    /// # Errors
    /// What `check` says: then saves may begin again.
    pub(super) fn begin_move(
        self: &Arc<Self>,
        waits: impl FnOnce(),
        mut check: impl FnMut() -> anyhow::Result<()>,
    ) -> anyhow::Result<Moving> {
        let mut state = self.state.lock();
        assert!(!state.is_moving, "whoever moves the machine holds its turn");
        state.is_moving = true;
        let is_saved = state.is_saved;
        drop(state);
        let moving = Moving(Arc::clone(self));
        if is_saved {
            waits();
        }
        loop {
            check()?;
            let mut state = self.state.lock();
            if !state.is_saved {
                break;
            }
            self.changed.wait_for(&mut state, LOOK_INTERVAL);
        }
        Ok(moving)
    }
}

impl Drop for Saving {
    fn drop(&mut self) {
        self.0.state.lock().is_saved = false;
        self.0.changed.notify_all();
    }
}

impl Drop for Moving {
    fn drop(&mut self) {
        self.0.state.lock().is_moving = false;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn a_move_waits_for_the_save_under_way_and_no_other_begins_until_it_has_ended() {
        let turns = Arc::new(Turns::default());
        let saving = turns.save().unwrap();
        assert_eq!(turns.save().unwrap_err(), Busy::Saving);
        let (waits, waiting) = mpsc::channel();
        let ours = Arc::clone(&turns);
        let mover =
            std::thread::spawn(move || ours.begin_move(|| waits.send(()).unwrap(), || Ok(())).unwrap());
        waiting.recv().unwrap();
        assert_eq!(turns.save().unwrap_err(), Busy::Moving, "the move would wait for ever");
        assert!(turns.state.lock().is_saved, "it has not begun");
        drop(saving);
        let moving = mover.join().unwrap();
        assert_eq!(turns.save().unwrap_err(), Busy::Moving);
        drop(moving);
        drop(turns.save().unwrap());
        drop(turns.begin_move(|| panic!("there is nothing to wait for"), || Ok(())).unwrap());
    }

    #[test]
    fn a_move_that_is_given_up_while_it_waits_lets_saves_begin_again() {
        let turns = Arc::new(Turns::default());
        let _saving = turns.save().unwrap();
        turns.begin_move(|| {}, || anyhow::bail!("the agent is ending")).unwrap_err();
        assert_eq!(turns.save().unwrap_err(), Busy::Saving, "and not that it is being moved");
    }
}
