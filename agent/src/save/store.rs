//! From frozen views to a snapshot: only their chunks are read, hashed and stored; all else is the base's.
//!
//! # Order, and why
//! Views are read into packs; then the commit as of any capture: packs, index, manifest. A kill before the manifest leaves
//! garbage and no snapshot. The session is not changed by any of it.
//!
//! # Chunks that cannot be had
//! A chunk is composed of the blocks that are home and, for the rest, the backup's. Where that rest is damaged and the chunk is
//! not whole, its bytes cannot be told: the new snapshot says that it is lost, and a restore says so as well. It is never
//! zeroes, nor the chunk that the base has there: a copy of the repository may have that whole, and it is not what the guest
//! had. What the guest wrote to such a chunk is not in the snapshot: it is named on stderr (exit code 3) and in the snapshot's
//! note, and it stays in the session.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use block::{AlignedBuf, Engine};
use jiff::{Timestamp, ToSpan as _};
use repository::{
    CaptureOptions, Consistency, DiskEntry, DiskName, GroupName, MAX_NOTE_LEN, Repository, Saved, Snapshot,
    SnapshotMeta, SnapshotName,
};
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;

use crate::capture::{Feed, PIECE_LEN, Piece, feed};
use crate::cli::Interrupt;
use crate::live::{DiskLayout, Frozen, FrozenReader, Taken};
use crate::output::Progress;
use crate::status::DamagedRange;

/// Damaged ranges that a note names; the others are counted.
const NOTED_RANGES: usize = 8;
/// How often it looks whether it is still wanted while it waits: the backup may be out of reach.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// A view, wherever it is of.
pub(crate) trait View {
    fn frozen(&self) -> &Frozen;

    /// What reads it on the calling thread.
    fn reader(&self) -> anyhow::Result<FrozenReader>;

    /// What of the disk could not be brought home so far, as the session knows it.
    fn known_damage(&self) -> Vec<DamagedRange>;
}

impl View for crate::live_restore::Rest {
    fn frozen(&self) -> &Frozen {
        self.frozen()
    }

    fn reader(&self) -> anyhow::Result<FrozenReader> {
        self.reader()
    }

    fn known_damage(&self) -> Vec<DamagedRange> {
        self.damaged.clone()
    }
}

/// One disk of the snapshot.
pub(crate) struct Disk<'a> {
    pub(crate) name: DiskName,
    /// What it is but for what the view holds.
    pub(crate) base: DiskEntry,
    pub(crate) view: &'a dyn View,
}

/// What the snapshot is to be.
pub(crate) struct Order {
    pub(crate) group: GroupName,
    pub(crate) time: Timestamp,
    /// The snapshot that the disks are based on, where it is of the same group.
    pub(crate) parent: Option<Timestamp>,
    pub(crate) consistency: Consistency,
    /// Whose live-restore it is saved of.
    pub(crate) saved: Option<Saved>,
    pub(crate) note: Option<String>,
    pub(crate) level: i32,
}

/// What it has become.
pub(crate) struct Stored {
    pub(crate) snapshot: Snapshot,
    /// What could not be had.
    pub(crate) damaged: Vec<LackingRange>,
}

/// A part of a disk that a snapshot does not have.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct LackingRange {
    pub(crate) disk: String,
    #[serde(flatten)]
    pub(crate) range: DamagedRange,
    /// Nothing of it is the guest's: it is damaged in the snapshot that was restored, and so in this one.
    #[serde(default)]
    pub(crate) inherited: bool,
}

impl LackingRange {
    /// What to say of it, in a snapshot of this name.
    pub(crate) fn words(&self, snapshot: &str) -> String {
        let Self { disk, range, inherited } = self;
        let how = if *inherited {
            "as damaged as in the snapshot that was restored"
        } else {
            "what the guest wrote is not saved, a restore tells it as lost"
        };
        let (start, end) = (range.offset, range.offset + range.len);
        format!("bytes {start}..{end} of {snapshot}/{disk}: {how}: {}", range.reason)
    }
}

impl Order {
    /// What the snapshot would be called if it were made now: by its second, or the next one that is not taken.
    pub(crate) fn free_name(&self, repository: &Repository) -> SnapshotName {
        // Of a group that cannot be listed nothing is foretold: making the snapshot says what is wrong.
        let taken = repository.snapshot_names(&self.group).unwrap_or_default();
        let at = |time: Timestamp| SnapshotName::new(self.group.clone(), time);
        let times = std::iter::successors(Some(self.time), |time| time.checked_add(1.second()).ok());
        times.map(at).find(|name| !taken.contains(name)).unwrap_or_else(|| at(self.time))
    }
}

/// Makes the snapshot. `check` is asked between steps, until the commit begins.
///
/// # Errors
/// Where a view cannot be read, the repository cannot be written, or `check` says so: there is no snapshot then.
pub(crate) fn store(
    repository: &Repository,
    disks: &[Disk<'_>],
    order: Order,
    engine: Engine,
    progress: &Progress,
    interrupt: &Interrupt,
    check: &dyn Fn() -> anyhow::Result<()>,
) -> anyhow::Result<Stored> {
    let options = CaptureOptions { time: Some(order.time), ..CaptureOptions::default() };
    let mut writer = repository.begin_capture(&order.group, options)?;
    let writers = disks
        .iter()
        .map(|disk| writer.begin_disk_over(disk.name.clone(), &disk.base))
        .collect::<repository::Result<Vec<_>>>()?;
    let damaged = RefCell::new(Vec::new());
    feed(engine, &writers, order.level, progress, interrupt.clone(), async |feed| {
        read_all(disks, feed, &damaged, check).await
    })?;
    drop(writers);
    let damaged = damaged_ranges(disks, damaged.into_inner());
    check()?;
    let meta = SnapshotMeta {
        host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        tool: concat!("lifeboot ", env!("CARGO_PKG_VERSION")).to_owned(),
        consistency: order.consistency,
        parent: order.parent,
        saved: order.saved,
        note: note(order.note, &damaged),
    };
    // From here on it either becomes a snapshot or fails: an interrupt comes too late.
    interrupt.check()?;
    let lacking = |(disk, range): (DiskName, DamagedRange), inherited| LackingRange {
        disk: disk.to_string(),
        range,
        inherited,
    };
    let lost = damaged.into_iter().map(|damaged| lacking(damaged, false));
    let inherited = disks.iter().flat_map(inherited_damage).map(|damaged| lacking(damaged, true));
    let damaged = lost.chain(inherited).collect();
    Ok(Stored { snapshot: writer.commit(meta)?, damaged })
}

/// Chunks that could not be had: of which disk, which one, why.
type LeftOut = RefCell<Vec<(usize, u64, String)>>;

/// Takes all chunks of all views, several runs at once, and sends them as pieces.
async fn read_all(
    disks: &[Disk<'_>],
    feed: Feed<'_>,
    damaged: &LeftOut,
    check: &dyn Fn() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let Feed { buffers, pieces, mut freed, free, stop } = feed;
    let piece_len = disks.iter().map(|disk| disk.base.chunk_size as usize).max().unwrap_or(0).max(PIECE_LEN);
    for _ in 0..buffers {
        // The receiver is here.
        let _ = free.send(Some(AlignedBuf::zeroed(piece_len)));
    }
    drop(free);
    let finished = |taken: Result<anyhow::Result<(Piece, Taken)>, tokio::task::JoinError>| {
        let (mut piece, taken) = taken??;
        for (chunk, why) in taken.damaged {
            piece.left_out.push(chunk);
            damaged.borrow_mut().push((piece.disk, chunk, why));
        }
        // Nobody takes pieces any more only after a failure, which is told elsewhere.
        drop(pieces.send(piece));
        anyhow::Ok(())
    };
    let mut sequence = 0;
    let mut taking = JoinSet::new();
    for (number, disk) in disks.iter().enumerate() {
        let reader = Rc::new(disk.view.reader()?);
        let frozen = disk.view.frozen();
        for places in frozen.runs(piece_len as u64) {
            stop.check()?;
            check()?;
            let free = loop {
                tokio::select! {
                    Some(taken) = taking.join_next() => finished(taken)?,
                    free = freed.recv() => break free,
                    () = tokio::time::sleep(LOOK_INTERVAL) => {}
                }
                stop.check()?;
                check()?;
            };
            let Some(Some(bytes)) = free else { return stop.check() };
            let piece = Piece {
                sequence,
                disk: number,
                first_chunk: frozen.chunks()[places.start],
                bytes: AlignedBuf::zeroed(0),
                left_out: Vec::new(),
            };
            let reader = Rc::clone(&reader);
            taking.spawn_local(async move {
                let (taken, bytes) = reader.take(places, bytes).await;
                anyhow::Ok((Piece { bytes, ..piece }, taken?))
            });
            sequence += 1;
        }
    }
    while !taking.is_empty() {
        tokio::select! {
            Some(taken) = taking.join_next() => finished(taken)?,
            () = tokio::time::sleep(LOOK_INTERVAL) => {}
        }
        stop.check()?;
        check()?;
    }
    Ok(())
}

/// What is known to be damaged of the chunks that are as in the base.
fn inherited_damage(disk: &Disk<'_>) -> Vec<(DiskName, DamagedRange)> {
    let layout = DiskLayout { size: disk.base.size, chunk_size: disk.base.chunk_size };
    let taken = disk.view.frozen().chunks();
    let ranges = in_chunks(&disk.view.known_damage(), layout, |chunk| taken.binary_search(&chunk).is_err());
    ranges.into_iter().map(|range| (disk.name.clone(), range)).collect()
}

/// What a snapshot would lack in which the chunks `changed` are the guest's, as far as that is known without asking the backup: of these, too,
/// what is damaged is not home.
pub(crate) fn foretold_lacks(
    name: &DiskName,
    layout: DiskLayout,
    changed: &[u64],
    known: &[DamagedRange],
) -> Vec<LackingRange> {
    let of = |inherited: bool| {
        let ranges = in_chunks(known, layout, |chunk| changed.binary_search(&chunk).is_err() == inherited);
        ranges.into_iter().map(move |range| LackingRange { disk: name.to_string(), range, inherited })
    };
    of(false).chain(of(true)).collect()
}

/// These ranges, as far as they are in chunks that are `wanted`; neighbours that are damaged for one reason are one.
fn in_chunks(
    damaged: &[DamagedRange],
    layout: DiskLayout,
    wanted: impl Fn(u64) -> bool,
) -> Vec<DamagedRange> {
    let chunk_size = u64::from(layout.chunk_size);
    let mut ranges: Vec<DamagedRange> = Vec::new();
    for DamagedRange { offset, len, reason } in damaged {
        let end = offset.saturating_add(*len).min(layout.size);
        for chunk in offset / chunk_size..end.div_ceil(chunk_size) {
            let (start, end) = ((chunk * chunk_size).max(*offset), ((chunk + 1) * chunk_size).min(end));
            match ranges.last_mut() {
                _ if !wanted(chunk) => {}
                Some(last) if last.offset + last.len == start && last.reason == *reason => {
                    last.len += end - start;
                }
                _ => ranges.push(DamagedRange { offset: start, len: end - start, reason: reason.clone() }),
            }
        }
    }
    ranges
}

/// Joins neighbours that are damaged for one reason.
fn damaged_ranges(
    disks: &[Disk<'_>],
    mut damaged: Vec<(usize, u64, String)>,
) -> Vec<(DiskName, DamagedRange)> {
    damaged.sort_unstable();
    let mut ranges: Vec<(DiskName, DamagedRange)> = Vec::new();
    for (number, chunk, reason) in damaged {
        let Disk { name, base, .. } = &disks[number];
        let offset = chunk * u64::from(base.chunk_size);
        let len = u64::from(base.chunk_size).min(base.size - offset);
        match ranges.last_mut() {
            Some((before, range))
                if before == name && range.offset + range.len == offset && range.reason == reason =>
            {
                range.len += len;
            }
            _ => ranges.push((name.clone(), DamagedRange { offset, len, reason })),
        }
    }
    ranges
}

/// What somebody wants remembered, and what the snapshot lacks.
fn note(note: Option<String>, damaged: &[(DiskName, DamagedRange)]) -> Option<String> {
    if damaged.is_empty() {
        return note;
    }
    let mut lacks = "lacks what the guest wrote to ".to_owned();
    for (index, (name, range)) in damaged.iter().take(NOTED_RANGES).enumerate() {
        let comma = if index > 0 { ", " } else { "" };
        lacks.push_str(&format!("{comma}bytes {}..{} of {name}", range.offset, range.offset + range.len));
    }
    if damaged.len() > NOTED_RANGES {
        lacks.push_str(&format!(" and {} ranges more", damaged.len() - NOTED_RANGES));
    }
    lacks.push_str(": the rest of their chunks is damaged in the backup");
    let mut whole = note.map_or_else(String::new, |note| format!("{note}; "));
    whole.push_str(&lacks);
    let end = (0..=whole.len().min(MAX_NOTE_LEN)).rev().find(|at| whole.is_char_boundary(*at)).unwrap_or(0);
    whole.truncate(end);
    Some(whole)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_what_is_damaged_the_guests_chunks_are_lost_and_the_others_inherited() {
        let layout = DiskLayout { size: 100_000, chunk_size: 16384 };
        let damaged = |offset, len| DamagedRange { offset, len, reason: "wrong".into() };
        let known = [damaged(0, 3 * 16384), damaged(5 * 16384, 32768)];
        let lacks = foretold_lacks(&"disk0".parse().unwrap(), layout, &[1, 6], &known);
        let of = |inherited: bool| {
            let of = lacks.iter().filter(|lack| lack.inherited == inherited);
            of.map(|lack| (lack.range.offset, lack.range.len)).collect::<Vec<_>>()
        };
        assert_eq!(of(false), [(16384, 16384), (6 * 16384, 100_000 - 6 * 16384)]);
        assert_eq!(of(true), [(0, 16384), (2 * 16384, 16384), (5 * 16384, 16384)]);
    }
}
