//! Boot traces: what a machine reads of a disk while it starts, kept with its group, so that the next start has it beforehand.
//!
//! A trace is advice. Nothing hangs on it: where it cannot be read, nobody fails; it survives the snapshot that it was
//! recorded from, and is of use for the next ones as far as they are alike. It names places on the disk, not contents: what a start
//! reads changes with updates, but where a file system keeps it changes little.

use std::io;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::frame::{self, Document};
use crate::id::SegmentId;
use crate::name::{DiskName, GroupName};
use crate::repository::Repository;
use crate::storage::{WriteHint, read_all};

/// The directory of traces: of each group a directory.
pub(crate) const DIR: &str = "traces";
/// A trace has no more runs than this.
pub const MAX_TRACE_RUNS: usize = 65_536;
/// The unit of a trace's places, in bytes: the smallest chunk.
pub const TRACE_GRAIN: u64 = 64 << 10;

/// What a machine reads of one disk while it starts.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trace {
    features: Vec<String>,
    /// The disk's name.
    pub disk: DiskName,
    /// The disk's size in bytes.
    pub size: u64,
    /// The snapshot that it was recorded from.
    pub snapshot: Timestamp,
    /// When it was recorded.
    pub recorded: Timestamp,
    /// From the first read to the last, in milliseconds.
    pub millis: u64,
    /// What was read, in the order in which it first was: the first unit of [`TRACE_GRAIN`] bytes and how many follow each
    /// other from there.
    runs: Vec<(u64, u64)>,
}

impl Trace {
    /// A trace of chunks of `chunk_size` bytes, in the order in which they were first read; of very many the first are kept.
    pub fn new(
        disk: DiskName,
        size: u64,
        snapshot: Timestamp,
        millis: u64,
        chunk_size: u32,
        chunks: impl IntoIterator<Item = u64>,
    ) -> Self {
        let units = (u64::from(chunk_size) / TRACE_GRAIN).max(1);
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for chunk in chunks {
            let start = chunk * u64::from(chunk_size) / TRACE_GRAIN;
            if let Some((first, count)) = runs.last_mut()
                && *first + *count == start
            {
                *count += units;
            } else if runs.len() < MAX_TRACE_RUNS {
                runs.push((start, units));
            } else {
                break;
            }
        }
        Self { features: Vec::new(), disk, size, snapshot, recorded: Timestamp::now(), millis, runs }
    }

    /// Its places as chunks of `chunk_size` bytes of a disk of `size` bytes, in their order, each once.
    pub fn chunks(&self, chunk_size: u32, size: u64) -> Vec<u64> {
        let count = size.div_ceil(u64::from(chunk_size));
        let chunk_of = |unit: u64| unit.saturating_mul(TRACE_GRAIN) / u64::from(chunk_size);
        let mut seen = std::collections::HashSet::new();
        let mut chunks = Vec::new();
        for &(first, units) in &self.runs {
            let end = chunk_of(first.saturating_add(units - 1)).min(count.saturating_sub(1));
            chunks.extend((chunk_of(first)..=end).filter(|chunk| *chunk < count && seen.insert(*chunk)));
        }
        chunks
    }

    /// Its places: offset and length in bytes, in their order.
    pub fn places(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.runs.iter().map(|(first, units)| (first * TRACE_GRAIN, units * TRACE_GRAIN))
    }

    /// Bytes that it covers.
    pub fn covered_bytes(&self) -> u64 {
        self.runs.iter().map(|(_, units)| units * TRACE_GRAIN).sum()
    }

    fn check(&self) -> std::result::Result<(), String> {
        if self.runs.len() > MAX_TRACE_RUNS {
            return Err(format!("it has {} runs", self.runs.len()));
        }
        let units = self.size.div_ceil(TRACE_GRAIN);
        let fits = |(first, count): &(u64, u64)| {
            *count > 0 && first.checked_add(*count).is_some_and(|end| end <= units + 64)
        };
        match self.runs.iter().find(|run| !fits(run)) {
            Some((first, count)) => Err(format!("a run of {count} from {first} of a disk of {units}")),
            None => Ok(()),
        }
    }
}

fn dir_of(group: &GroupName) -> String {
    format!("{DIR}/{group}")
}

/// The id of the trace of `disk` that a file's name says, newer ones being greater.
fn id_of<'a>(file: &'a str, disk: &DiskName) -> Option<&'a str> {
    let (name, id) = file.strip_suffix(".trace")?.rsplit_once('+')?;
    (name == disk.as_str() && id.len() == 32).then_some(id)
}

impl Repository {
    /// The newest boot trace of a group's disk; none where none was recorded.
    ///
    /// # Errors
    /// When it cannot be read, or is damaged: it is of no use then, and nothing is lost.
    pub fn trace(&self, group: &GroupName, disk: &DiskName) -> Result<Option<Trace>> {
        let dir = dir_of(group);
        let Some(file) = self.trace_files(group, disk)?.pop() else { return Ok(None) };
        let path = format!("{dir}/{file}");
        let describe = || self.storage().describe(&path);
        let bytes = match read_all(&**self.storage(), &path, frame::MAX_LEN) {
            Ok(Some(bytes)) => bytes,
            Ok(None) => return Err(Error::damaged("a boot trace is too long").at(describe())),
            // A newer one took its place just now.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io("cannot read a boot trace", error).at(describe())),
        };
        let trace: Trace = frame::decode(Document::Trace, &bytes).map_err(|error| error.at(describe()))?;
        if trace.disk != *disk {
            return Err(Error::damaged(format!("the trace of {} stands in the place of {disk}", trace.disk))
                .at(describe()));
        }
        trace.check().map_err(|how| Error::damaged(format!("the trace cannot be: {how}")).at(describe()))?;
        Ok(Some(trace))
    }

    /// Keeps a trace with a group; older ones of the same disk go.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn keep_trace(&self, group: &GroupName, trace: &Trace) -> Result<()> {
        trace.check().map_err(|how| Error::invalid(format!("this cannot be a trace: {how}")))?;
        let bytes = frame::encode(Document::Trace, trace)?;
        let storage = &**self.storage();
        let dir = dir_of(group);
        for (dir, parent) in [(DIR, ""), (dir.as_str(), DIR)] {
            match storage.create_dir(dir) {
                Ok(()) => storage.sync_dir(parent),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
                Err(error) => Err(error),
            }
            .map_err(|error| {
                Error::io("cannot make the directory of traces", error).at(storage.describe(dir))
            })?;
        }
        let older = self.trace_files(group, &trace.disk)?;
        let id = SegmentId::after(None)?;
        let (from, to) = (format!("tmp/{id}.trace"), format!("{dir}/{}+{id}.trace", trace.disk));
        let write = || {
            let mut file = storage.create(&from, WriteHint::Small)?;
            file.append(&bytes)?;
            file.sync()?;
            storage.publish(&from, &to)?;
            storage.sync_dir(&dir)
        };
        if let Err(error) = write() {
            let _ = storage.remove(&from);
            return Err(Error::io("cannot write a boot trace", error).at(storage.describe(&to)));
        }
        for file in older {
            // One that stays behind is older than this one, and never looked at.
            let _ = storage.remove(&format!("{dir}/{file}"));
        }
        Ok(())
    }

    /// The disks of a group that have a trace.
    ///
    /// # Errors
    /// When the directory cannot be listed.
    pub fn traced_disks(&self, group: &GroupName) -> Result<Vec<DiskName>> {
        let mut disks: Vec<DiskName> = self
            .list_traces(group)?
            .iter()
            .filter_map(|file| file.rsplit_once('+').and_then(|(disk, _)| disk.parse().ok()))
            .collect();
        disks.sort_unstable();
        disks.dedup();
        Ok(disks)
    }

    /// Removes the traces of a group's disk; how many there were.
    ///
    /// # Errors
    /// When one cannot be removed.
    pub fn remove_trace(&self, group: &GroupName, disk: &DiskName) -> Result<usize> {
        let files = self.trace_files(group, disk)?;
        for file in &files {
            let path = format!("{}/{file}", dir_of(group));
            self.storage().remove(&path).map_err(|error| {
                Error::io("cannot remove a boot trace", error).at(self.storage().describe(&path))
            })?;
        }
        Ok(files.len())
    }

    fn list_traces(&self, group: &GroupName) -> Result<Vec<String>> {
        let dir = dir_of(group);
        match self.storage().list(&dir) {
            Ok(files) => Ok(files),
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                Ok(Vec::new())
            }
            Err(error) => Err(Error::io("cannot list boot traces", error).at(self.storage().describe(&dir))),
        }
    }

    /// The files of the traces of a disk, the newest last.
    fn trace_files(&self, group: &GroupName, disk: &DiskName) -> Result<Vec<String>> {
        let mut files = self.list_traces(group)?;
        files.retain(|file| id_of(file, disk).is_some());
        files.sort_unstable_by(|a, b| id_of(a, disk).cmp(&id_of(b, disk)));
        Ok(files)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::InitOptions;

    fn trace(chunks: &[u64]) -> Trace {
        let now = Timestamp::from_second(1_700_000_000).unwrap();
        Trace::new("disk0".parse().unwrap(), 1 << 30, now, 1500, 128 << 10, chunks.iter().copied())
    }

    #[test]
    fn a_trace_is_read_in_chunks_of_any_size() {
        let trace = trace(&[5, 6, 2, 8191]);
        assert_eq!(trace.chunks(128 << 10, 1 << 30), [5, 6, 2, 8191]);
        assert_eq!(trace.chunks(64 << 10, 1 << 30), [10, 11, 12, 13, 4, 5, 16382, 16383]);
        assert_eq!(trace.chunks(1 << 20, 1 << 30), [0, 1023]);
        assert_eq!(trace.chunks(128 << 10, 1 << 20), [5, 6, 2], "a disk that became smaller");
        assert_eq!(trace.covered_bytes(), 4 * (128 << 10));
    }

    #[test]
    fn the_newest_trace_of_a_disk_is_the_one_that_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let repository = Repository::init(dir.path().join("r"), InitOptions::default()).unwrap();
        let (group, disk): (GroupName, DiskName) = ("vm".parse().unwrap(), "disk0".parse().unwrap());
        assert_eq!(repository.trace(&group, &disk).unwrap(), None);
        for chunks in [vec![1, 2], vec![3]] {
            repository.keep_trace(&group, &trace(&chunks)).unwrap();
        }
        let other =
            Trace { disk: "disk0+x".parse().unwrap_or_else(|_| "disk1".parse().unwrap()), ..trace(&[9]) };
        repository.keep_trace(&group, &other).unwrap();
        let kept = repository.trace(&group, &disk).unwrap().unwrap();
        assert_eq!(kept.chunks(128 << 10, 1 << 30), [3]);
        assert_eq!(std::fs::read_dir(dir.path().join("r/traces/vm")).unwrap().count(), 2);
        assert!(std::fs::read_dir(dir.path().join("r/tmp")).unwrap().next().is_none());
        assert_eq!(repository.remove_trace(&group, &disk).unwrap(), 1);
        assert_eq!(repository.trace(&group, &disk).unwrap(), None);
    }

    #[test]
    fn a_damaged_trace_is_an_error_and_the_next_one_takes_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let repository = Repository::init(dir.path().join("r"), InitOptions::default()).unwrap();
        let (group, disk): (GroupName, DiskName) = ("vm".parse().unwrap(), "disk0".parse().unwrap());
        repository.keep_trace(&group, &trace(&[1])).unwrap();
        let file = std::fs::read_dir(dir.path().join("r/traces/vm")).unwrap().next().unwrap().unwrap().path();
        let mut bytes = std::fs::read(&file).unwrap();
        let at = bytes.len() / 2;
        bytes[at] ^= 1;
        std::fs::write(&file, bytes).unwrap();
        assert_eq!(repository.trace(&group, &disk).unwrap_err().kind(), crate::error::ErrorKind::Damaged);
        repository.keep_trace(&group, &trace(&[2])).unwrap();
        assert!(repository.trace(&group, &disk).unwrap().is_some());
    }
}
