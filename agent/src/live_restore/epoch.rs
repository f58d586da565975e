//! The name by which a guest asks for the disk as it knows it: `NAME@EPOCH`.
//!
//! A guest on another host lives on when the host of the target goes down, and its client connects again by itself. What
//! it wrote and did not flush may be gone then, under a guest that takes it for written. So the epoch of a session is
//! raised, on stable storage and before anything is served, by each start that may have lost such writes; the arguments
//! and addresses that are printed name the epoch; and who asks for an older one is refused, with the reason. The plain
//! name goes on working, for those who start guests anew by fixed scripts: it protects from nothing.

use std::sync::OnceLock;

use nbd_server::ExportNames;

use super::record::SessionRecord;

impl SessionRecord {
    /// The export's name with the epoch, for clients that connect again by themselves.
    #[must_use]
    pub fn export(&self) -> String {
        with_epoch(&self.disk, self.epoch)
    }
}

fn with_epoch(disk: &str, epoch: u64) -> String {
    format!("{disk}@{epoch}")
}

/// The further name of a disk's export. The epoch is put in before the server runs.
#[derive(Debug)]
pub(super) struct EpochName {
    disk: String,
    epoch: OnceLock<u64>,
}

impl EpochName {
    pub(super) fn of(disk: &str) -> Self {
        Self { disk: disk.to_owned(), epoch: OnceLock::new() }
    }

    /// The session is in this epoch.
    ///
    /// # Panics
    /// Where it was put in before.
    pub(super) fn put(&self, epoch: u64) {
        assert!(self.epoch.set(epoch).is_ok(), "a session is opened once");
    }
}

impl ExportNames for EpochName {
    fn further(&self) -> Vec<String> {
        self.epoch.get().map(|epoch| with_epoch(&self.disk, *epoch)).into_iter().collect()
    }

    fn why_refused(&self, name: &str) -> Option<String> {
        let asked: u64 = name.strip_prefix(&self.disk)?.strip_prefix('@')?.parse().ok()?;
        let (epoch, now) = (*self.epoch.get()?, self.further().pop()?);
        Some(if asked < epoch {
            format!(
                "{name} is no more: the restore went on from what was flushed (the host of its target went down, or its \
                 storage failed), so a guest that ran before may have lost what it wrote since its last flush; stop that \
                 guest, start it anew with the export {now}, and have it check its file systems"
            )
        } else {
            format!("there is no {name}: the disk is served as {now}")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_older_epoch_is_refused_with_what_to_do_and_other_names_are_not_its_business() {
        let names = EpochName::of("disk0");
        assert!(names.further().is_empty() && names.why_refused("disk0@1").is_none(), "it is not open yet");
        names.put(3);
        assert_eq!(names.further(), ["disk0@3"]);
        let older = names.why_refused("disk0@2").unwrap();
        assert!(older.contains("disk0@2 is no more") && older.contains("the export disk0@3"), "{older}");
        let never = names.why_refused("disk0@4").unwrap();
        assert!(never.contains("served as disk0@3"), "{never}");
        for other in ["disk1@1", "disk0", "disk0@", "disk0@x", "disk0@-1", "@1"] {
            assert_eq!(names.why_refused(other), None, "{other}");
        }
    }
}
