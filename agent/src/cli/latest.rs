//! Whether a snapshot that was just made is its group's newest: a clock that is behind makes one that `@latest` does not name.

use repository::{Repository, SnapshotName};

/// What to say of a snapshot that was just made and is not its group's newest. Nothing, where that cannot be told: it is made.
pub(crate) fn not_latest(repository: &Repository, made: &SnapshotName) -> Option<String> {
    let newest = repository.snapshot_names(made.group()).ok()?.pop()?;
    (newest.time() > made.time()).then(|| {
        format!(
            "{newest} is dated later than {made}, so that {group}@latest is still that one: this host's clock is behind, or that of the \
             host that made it was ahead; restore this one by its full name",
            group = made.group()
        )
    })
}
