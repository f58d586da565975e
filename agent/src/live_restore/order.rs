//! What somebody wants restored, and to where: which target is for which disk.
//!
//! All disks of an order are of one snapshot. Where some of its targets have a session already, that is the snapshot those
//! were begun with: the newest when they began need not be the newest when a start that was cut short is done again.

use std::cell::Cell;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use block::Engine;
use nbd_server::{ListenAddress, ServerOptions};
use repository::{Repository, SnapshotName, SnapshotSpec};

use super::handover::HandedOver;
use super::record::SessionRecord;
use super::settle::{Inquiry, Settled};
use super::state_dir::{StateDir, absolute};
use super::wanted::belongs_elsewhere;
use crate::cli::{Failure, Interrupt, UsageError};
use crate::live::SessionOptions;
use crate::output::human_count;
use crate::pivot::Drive;
use crate::source::PoolOptions;
use crate::target_path::{no_such_disk, refuse_dangling, refuse_unwritable_name, split};

/// What is to be restored, and how.
pub(crate) struct Order {
    /// `GROUP@TIME[/DISK]`; without a disk where there are several targets.
    pub(crate) snapshot: String,
    /// One target, or one for each disk of the snapshot, in its order or as `DISK=PATH`.
    pub(crate) targets: Vec<PathBuf>,
    /// Where the disks are served, each by its name.
    pub(crate) listen: Vec<ListenAddress>,
    /// For whom, and what clients may cost.
    pub(crate) server: ServerOptions,
    /// It takes the place of an agent that serves these disks.
    pub(crate) takes_over: bool,
    /// Another process may take the place of this one.
    pub(crate) may_be_succeeded: bool,
    /// Where metrics are to be had.
    pub(crate) metrics: Option<ListenAddress>,
    /// Overwrite targets that hold data and have no session.
    pub(crate) force: bool,
    /// The targets were copied or moved as a whole, together with their sessions.
    pub(crate) moved: bool,
    /// Where sessions are kept, if not beside file targets.
    pub(crate) state: Option<PathBuf>,
    /// By what disks are read and written.
    pub(crate) engine: Engine,
    /// How the repository is read.
    pub(crate) pool: PoolOptions,
    /// Whether the boot trace of the group is used, and one recorded.
    pub(crate) uses_trace: bool,
    /// Which QEMU's drives are moved onto the targets; it has been asked about sessions that say that they were.
    pub(crate) drive: Option<Drive>,
    /// Targets that their machine runs from already: they are not served.
    pub(crate) handed_over: Vec<PathBuf>,
    /// Copies of the repository.
    pub(crate) fallbacks: Vec<PathBuf>,
    /// What may be chosen for each session; its limit is that of all together.
    pub(crate) options: SessionOptions,
}

/// What [`Order::settle`] found.
#[derive(Debug, Default)]
pub(crate) struct Settlement {
    /// The disks of which QEMU says that the machine runs from them.
    pub(crate) homes: Vec<HandedOver>,
    /// The targets of which that was noted before; QEMU says nothing, and may wait for a disk that is left.
    pub(crate) before: Vec<PathBuf>,
    /// How many disks are left to be served.
    pub(crate) left: usize,
}

/// One disk of an order.
#[derive(Debug)]
pub(super) struct Wanted {
    /// `GROUP@TIME[/DISK]`
    pub(super) spec: String,
    pub(super) target: PathBuf,
    pub(super) state: StateDir,
}

impl Order {
    /// Looks at sessions that were handed over, or were about to be, where there is a QEMU to ask: those whose machine runs from the
    /// target are not served.
    ///
    /// # Errors
    /// As [`Self::assign`]; where QEMU does not say, or is another one.
    pub(crate) fn settle(
        &mut self,
        repository: &repository::Result<Repository>,
        interrupt: &Interrupt,
    ) -> anyhow::Result<Settlement> {
        let mut settlement = Settlement { left: self.targets.len(), ..Settlement::default() };
        let Some(drive) = &self.drive else { return Ok(settlement) };
        let wanted = self.assign(repository)?;
        if !self.takes_over {
            for wanted in &wanted {
                super::target_lock::check_unserved(&absolute(&wanted.target)?, wanted.state.path())?;
            }
        }
        let is_moved = |wanted: &Wanted| {
            anyhow::Ok(wanted.state.record()?.is_some_and(|record| wanted.state.is_moved(&record)))
        };
        let known = wanted.iter().map(is_moved).collect::<anyhow::Result<Vec<_>>>()?;
        let inquiry = Inquiry {
            drive,
            addresses: &self.listen,
            takes_over: self.takes_over,
            moved: self.moved,
            may_be_waited_for: known.contains(&false),
            interrupt,
            is_silent: Cell::new(false),
        };
        let mut handed_over = Vec::new();
        for (place, wanted) in wanted.into_iter().enumerate() {
            // The first disk is what the empty name means.
            match inquiry.settle(&wanted.state, place == 0)? {
                Settled::ToServe => continue,
                Settled::Moved(home) => settlement.homes.push(home),
                Settled::MovedBefore => settlement.before.push(wanted.target.clone()),
            }
            handed_over.push(wanted.target);
        }
        settlement.left -= handed_over.len();
        self.handed_over = handed_over;
        Ok(settlement)
    }

    /// The snapshots that are restored: what was asked for, or what the targets' sessions were begun with. What is wrong with
    /// those is told by [`Self::assign`].
    pub(super) fn snapshots_needed(&self) -> Vec<String> {
        let paths = paths(&self.targets).unwrap_or_default();
        let of = |path: &Path| self.state_of(path).ok()?.record().ok()?;
        let begun = paths.into_iter().map(|path| of(path).filter(SessionRecord::was_begun));
        let mut needed: Vec<String> =
            begun.map(|record| record.map_or_else(|| self.snapshot.clone(), |it| it.snapshot)).collect();
        needed.dedup();
        needed
    }

    /// Says which target is for which disk.
    ///
    /// # Errors
    /// Where that cannot be, or the sessions that are there restore something else.
    pub(super) fn assign(&self, repository: &repository::Result<Repository>) -> anyhow::Result<Vec<Wanted>> {
        if let Some(state) = &self.state {
            refuse_unwritable_name("the state directory", state)?;
        }
        for target in paths(&self.targets)? {
            refuse_unwritable_name("the target", target)?;
            refuse_dangling(target)?;
        }
        if let Some(target) = self.only_target()? {
            let state = self.state_of(target)?;
            return Ok(vec![Wanted { spec: self.snapshot.clone(), target: target.to_owned(), state }]);
        }
        let spec: SnapshotSpec = self.snapshot.parse()?;
        if spec.disk.is_some() {
            return Err(UsageError::new(format!(
                "{} is one disk, and {} targets were named",
                self.snapshot,
                self.targets.len()
            ))
            .into());
        }
        let targets = self.targets.iter().map(|target| split(target)).collect::<Result<Vec<_>, _>>()?;
        let named = targets.iter().filter(|(name, _)| name.is_some()).count();
        if named > 0 && named < targets.len() {
            return Err(UsageError::new(
                "some targets are named for a disk (DISK=TARGET) and others are not: name all of them, or none; \
                 write ./NAME for a file with = in its name",
            )
            .into());
        }
        check_different(targets.iter().map(|(_, path)| *path))?;
        let states = targets.iter().map(|(_, path)| self.state_of(path));
        let states = states.collect::<anyhow::Result<Vec<_>>>()?;
        check_own(&states)?;
        let records = states.iter().map(|state| Ok(state.record()?.filter(SessionRecord::was_begun)));
        let records = records.collect::<anyhow::Result<Vec<_>>>()?;
        let snapshot = self.snapshot_of(&spec, repository, &targets, &records)?;
        let disks = disks_of(&snapshot, repository, &records)?;
        if disks.len() != targets.len() {
            return Err(Failure::new(
                format!(
                    "{snapshot} has {}: {}; {} were named",
                    human_count(disks.len() as u64, "disk", "disks"),
                    disks.join(", "),
                    human_count(targets.len() as u64, "target", "targets")
                ),
                "name one TARGET for each disk, in this order or as DISK=TARGET; or one disk, as in SNAPSHOT/DISK",
            )
            .into());
        }
        let mut wanted = Vec::new();
        for (place, ((name, path), state)) in targets.iter().zip(states).enumerate() {
            let disk = name.unwrap_or(&disks[place]);
            if !disks.iter().any(|known| known == disk) {
                return Err(no_such_disk(&snapshot, disk, &disks).into());
            }
            let twice = format!("{snapshot}/{disk}");
            if wanted.iter().any(|wanted: &Wanted| wanted.spec == twice) {
                return Err(UsageError::new(format!("two targets were named for the disk {disk}")).into());
            }
            wanted.push(Wanted { spec: twice, target: path.to_path_buf(), state });
        }
        // The exports stand in the snapshot's order, whatever that of the targets is.
        wanted.sort_by_key(|wanted| disks.iter().position(|disk| wanted.spec.ends_with(&format!("/{disk}"))));
        Ok(wanted)
    }

    /// The only target, unless which disk it is for is told by a name that only the snapshot's disks have.
    fn only_target(&self) -> anyhow::Result<Option<&Path>> {
        let [target] = self.targets.as_slice() else { return Ok(None) };
        let (name, path) = split(target)?;
        let Some(name) = name else { return Ok(Some(path)) };
        let spec: SnapshotSpec = self.snapshot.parse()?;
        let Some(disk) = &spec.disk else { return Ok(None) };
        if disk.as_str() != name {
            return Err(no_such_disk(&self.snapshot, name, &[disk]).into());
        }
        Ok(Some(path))
    }

    fn state_of(&self, target: &Path) -> anyhow::Result<StateDir> {
        StateDir::of_moved(target, self.state.as_deref(), self.moved)
    }

    /// The snapshot that all disks are of.
    fn snapshot_of(
        &self,
        spec: &SnapshotSpec,
        repository: &repository::Result<Repository>,
        targets: &[(Option<&str>, &Path)],
        records: &[Option<SessionRecord>],
    ) -> anyhow::Result<SnapshotName> {
        let mut begun: Option<(&SessionRecord, &Path)> = None;
        for (record, (_, path)) in records.iter().zip(targets) {
            let Some(record) = record else { continue };
            let name: SnapshotName = record.snapshot.parse()?;
            if !spec.may_mean(&name) {
                return Err(belongs_elsewhere(path, record, &self.snapshot));
            }
            match begun {
                Some((first, other)) if first.snapshot != record.snapshot => {
                    return Err(Failure::new(
                        format!(
                            "the target {} belongs to a session that restores {}, and {} to one that restores {}",
                            path.display(),
                            record.snapshot,
                            other.display(),
                            first.snapshot
                        ),
                        "go on with each by a command of its own, or name targets of one snapshot",
                    )
                    .into());
                }
                Some(_) => {}
                None => begun = Some((record, *path)),
            }
        }
        if let Some((record, _)) = begun {
            return Ok(record.snapshot.parse()?);
        }
        let repository = repository.as_ref().map_err(Clone::clone)?;
        let (snapshot, _) = repository.resolve(&self.snapshot)?;
        #[expect(clippy::redundant_clone, reason = "the snapshot lends its name, it does not give it")]
        Ok(snapshot.name().clone())
    }
}

/// The names of a snapshot's disks, in its order. Where the repository cannot be had, those of the sessions.
fn disks_of(
    name: &SnapshotName,
    repository: &repository::Result<Repository>,
    records: &[Option<SessionRecord>],
) -> anyhow::Result<Vec<String>> {
    let had = repository.as_ref().map_err(Clone::clone).and_then(|repository| repository.snapshot(name));
    match had {
        Ok(snapshot) => Ok(snapshot.manifest().disks.iter().map(|disk| disk.name.to_string()).collect()),
        Err(error) => {
            // Whether they need it is found out for each.
            let known: Option<Vec<String>> =
                records.iter().map(|record| record.as_ref().map(|record| record.disk.clone())).collect();
            known.ok_or_else(|| error.into())
        }
    }
}

/// The paths of these targets, of which there is one at least.
///
/// # Errors
/// As [`Order::assign`], of the targets alone.
pub(crate) fn paths(targets: &[PathBuf]) -> anyhow::Result<Vec<&Path>> {
    if targets.is_empty() {
        return Err(UsageError::new("no target was named").into());
    }
    targets.iter().map(|target| Ok(split(target)?.1)).collect()
}

fn check_different<'a>(targets: impl Iterator<Item = &'a Path>) -> anyhow::Result<()> {
    let mut seen: Vec<PathBuf> = Vec::new();
    for target in targets {
        let path = absolute(target).with_context(|| format!("cannot use the target {}", target.display()))?;
        if seen.contains(&path) {
            return Err(UsageError::new(format!("the target {} is named twice", target.display())).into());
        }
        seen.push(path);
    }
    Ok(())
}

/// Fails where two targets have found one session.
fn check_own(states: &[StateDir]) -> anyhow::Result<()> {
    let is_twice =
        |(at, state): &(usize, &StateDir)| states[..*at].iter().any(|it| it.path() == state.path());
    let Some((_, state)) = states.iter().enumerate().find(is_twice) else { return Ok(()) };
    Err(Failure::new(
        format!("two of the targets can go on with the session in {}", state.path().display()),
        "go on with each by a command of its own that names its session's directory with --state; after that they can be named together",
    )
    .into())
}
