//! The name by which a guest asks for the disk as it knows it: `NAME@EPOCH`.
//!
//! A guest on another host lives on when the host of the target goes down, and its client connects again by itself. What
//! it wrote and did not flush may be gone then, under a guest that takes it for written. So the epoch of a session is
//! raised, on stable storage and before anything is served, by each start that may have lost such writes; the arguments
//! and addresses that are printed name the epoch; and who asks for an older one is refused, with the reason. The plain
//! name goes on working, for those who start guests anew by fixed scripts: it protects from nothing.

use super::record::SessionRecord;

impl SessionRecord {
    /// The export's name with the epoch, for clients that connect again by themselves.
    #[must_use]
    pub fn export(&self) -> String {
        with_epoch(&self.disk, self.epoch)
    }
}

pub(super) fn with_epoch(disk: &str, epoch: u64) -> String {
    format!("{disk}@{epoch}")
}

/// Why a client that asks for `name` is refused, where that is a name of `disk` in another epoch than this one.
pub(super) fn why_refused(name: &str, disk: &str, epoch: u64) -> Option<String> {
    let asked: u64 = name.strip_prefix(disk)?.strip_prefix('@')?.parse().ok()?;
    let now = with_epoch(disk, epoch);
    Some(if asked < epoch {
        // Clients show the beginning: what to do stands there.
        format!(
            "{name} is over: start the guest anew on {now} and check its file systems; the restore went on from what was \
             flushed (the host of its target went down, or its storage failed), so a guest that ran before may have lost what it \
             wrote since its last flush"
        )
    } else {
        format!("there is no {name}: the disk is served as {now}")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_older_epoch_is_refused_with_what_to_do_and_other_names_are_not_its_business() {
        assert_eq!(with_epoch("disk0", 3), "disk0@3");
        let older = why_refused("disk0@2", "disk0", 3).unwrap();
        assert!(older.starts_with("disk0@2 is over: start the guest anew on disk0@3 and check"), "{older}");
        let never = why_refused("disk0@4", "disk0", 3).unwrap();
        assert!(never.contains("served as disk0@3"), "{never}");
        let cut: String = older.chars().take(proto::wire::MAX_TEXT_CHARS).collect();
        assert!(cut.contains("check its file systems"), "a client that cuts it says what to do: {cut}");
        for other in ["disk1@1", "disk0", "disk0@", "disk0@x", "disk0@-1", "@1"] {
            assert_eq!(why_refused(other, "disk0", 3), None, "{other}");
        }
    }
}
