//! Remembers that a session's live file is not to be believed, where the storage that it is on cannot.
//!
//! After a sync that failed the live file is marked, but in the kernel's memory: when its file system was shut down by the same error,
//! it comes back, once mounted again, as it last was on the disk: in use, of this boot, and older than what was acknowledged. So the same
//! is noted beside, as an empty file `SESSION.lost` in the runtime directory, which is in memory and is as old as this boot. A start that
//! finds it takes the live file for one that was marked, and goes on from the journal.
//!
//! It is made before anybody hears of the failure, also by the handler of SIGBUS (`block::MappedFile`), and goes when a start has put
//! another live file in use. Where there is no runtime directory there is no such note.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::record::SessionRecord;
use super::state_dir::{LIVE_FILE, StateDir};
use crate::live::{DiskLayout, LiveWords};
use crate::private_dir;

/// Opens the live file of a session that is to be served; one that was lost is marked.
pub(super) fn open_live(
    state: &StateDir,
    record: &SessionRecord,
    layout: DiskLayout,
) -> anyhow::Result<LiveWords> {
    let mark = places()
        .into_iter()
        .find(|dir| private_dir::make(dir).unwrap_or(false))
        .map(|dir| note(&dir, record));
    let words = LiveWords::open_marked(&state.file(LIVE_FILE), layout, mark.map(Arc::from))?;
    if is_lost(record) {
        words.distrust();
    }
    Ok(words)
}

/// Opens the live file of a session that is only looked at, if it is one of this disk that may be believed.
pub(super) fn look_at_live(state: &StateDir, record: &SessionRecord) -> anyhow::Result<Option<LiveWords>> {
    if is_lost(record) {
        return Ok(None);
    }
    Ok(LiveWords::existing(&state.file(LIVE_FILE), record.layout())?)
}

/// The live file in use is another one now, or there is no session any more.
pub(super) fn forget(record: &SessionRecord) {
    places().iter().for_each(|dir| forget_in(dir, record));
}

fn forget_in(dir: &Path, record: &SessionRecord) {
    let note = note(dir, record);
    // Of one in a directory that we may not look into nothing is known, neither here nor when the session is opened.
    if !note.exists() {
        return;
    }
    match std::fs::remove_file(&note) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(
                %error, note = %note.display(),
                "the note of a lost live file cannot be removed, and if the agent is killed what was not flushed is not believed: \
                 remove it as root"
            );
        }
        _ => {}
    }
}

/// Whether a sync of it failed in this boot, and no other live file is in use since.
pub(super) fn is_lost(record: &SessionRecord) -> bool {
    places().iter().any(|dir| note(dir, record).exists())
}

fn note(dir: &Path, record: &SessionRecord) -> PathBuf {
    dir.join(format!("{}.lost", record.session))
}

/// Where the note may be: in memory, and never below the target's file system.
fn places() -> Vec<PathBuf> {
    let own = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|dir| dir.is_absolute());
    let own = own.map(|dir| dir.join("lifeboot"));
    // The one that depends on nobody's environment first.
    std::iter::once(PathBuf::from("/run/lifeboot")).chain(own).collect()
}
