//! The move, and how it is undone. See the module above for its order, and why.

use serde_json::{Value, json};

use super::graph::{Graph, NotFound, OnExport, Way};
use super::opened::{check_opened, check_runs_from, check_stands_at_its_path};
use super::qmp::{Monitor, QmpError};
use super::{Drive, Home, Whereabouts};
use crate::cli::Failure;

/// How often a job is looked at before it is taken for stuck; with the pauses in between, half a minute.
const JOB_LOOKS: u32 = 600;

/// A drive that is on its target.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Moved {
    /// What the drive's uppermost node of ours is called now.
    pub node: String,
    /// What QEMU's node on the target is called.
    pub file_node: String,
    /// QEMU's I/O goes around the page cache.
    pub direct: bool,
    /// QEMU was to go around the page cache, and cannot on this target.
    pub direct_refused: bool,
}

/// Why a drive was not moved.
#[derive(Debug)]
pub enum Trouble {
    /// It is on the export, as before.
    OnExport(anyhow::Error),
    /// QEMU does not say where it is.
    Unknown(QmpError),
    /// It is on a node that has the name of ours, and not on the target, or nobody can tell.
    Elsewhere(anyhow::Error),
}

impl From<NotFound> for Failure {
    fn from(error: NotFound) -> Self {
        Self::new(&error, error.advice())
    }
}

impl From<QmpError> for Failure {
    fn from(error: QmpError) -> Self {
        let advice = error.advice();
        match error {
            QmpError::Connect { path, source } => {
                Self::new(format!("cannot connect to QEMU's monitor at {}", path.display()), advice)
                    .because(source)
            }
            error => Self::new(error, advice),
        }
    }
}

/// Keeps on stable storage how far a move is: each returns when it is there.
pub trait Notes {
    /// The machine is about to be moved: QEMU opens the target next.
    ///
    /// # Errors
    /// It cannot be kept.
    fn begin(&mut self) -> anyhow::Result<()>;

    /// From now on QEMU may write to the target past us.
    ///
    /// # Errors
    /// It cannot be kept.
    fn mark(&mut self) -> anyhow::Result<()>;

    /// It came to nothing before the mark, and QEMU does not have the target open.
    fn forget(&mut self);
}

/// Where the drive is, by what QEMU says: the one of this name, or the only one.
///
/// # Errors
/// QEMU does not say.
pub fn whereabouts(
    monitor: &mut dyn Monitor,
    home: &Home<'_>,
    device: Option<&str>,
) -> Result<Whereabouts, QmpError> {
    Ok(Graph::ask(monitor)?.whereabouts(home, device))
}

/// The drive, which is on the target, as its QEMU says; what an attempt that was cut short after its end left on the export is removed.
///
/// # Errors
/// [`Trouble::Elsewhere`], and nothing is changed; [`Trouble::Unknown`].
pub fn at_home(monitor: &mut dyn Monitor, home: &Home<'_>) -> Result<Moved, Trouble> {
    check_runs_from(monitor.process(), home).map_err(Trouble::Elsewhere)?;
    remove_left_behind(monitor, home).map_err(Trouble::Unknown)?;
    let graph = Graph::ask(monitor).map_err(Trouble::Unknown)?;
    Ok(finished(&graph, home))
}

/// Removes the nodes on the export that nothing uses any more. QEMU flushes a node before it goes, and where the export's agent
/// has ended it waits for another one, for as long as `reconnect-delay` says, and answers nobody. So the connection is cut
/// first: what the guest wrote was flushed when its drive was moved off that node.
fn remove_left_behind(monitor: &mut dyn Monitor, home: &Home<'_>) -> Result<(), QmpError> {
    for left in Graph::ask(monitor)?.left_behind(home) {
        let instance = json!({ "type": "block-node", "node-name": left });
        // QEMU before 6.0 has no such command.
        unless_refused(monitor.execute("yank", json!({ "instances": [instance] })))?;
        // A node that QEMU owns goes by itself.
        unless_refused(monitor.execute("blockdev-del", json!({ "node-name": left })))?;
    }
    Ok(())
}

/// What QEMU refused is not done, which is as well.
fn unless_refused(answer: Result<Value, QmpError>) -> Result<(), QmpError> {
    match answer {
        Err(error) if !error.is_refusal() => Err(error),
        _ => Ok(()),
    }
}

/// Moves the drive onto the target.
///
/// # Errors
/// As [`Trouble`] tells them apart. What was added to QEMU is gone again, or is used by nobody.
pub fn carry_home(
    monitor: &mut dyn Monitor,
    home: &Home<'_>,
    wanted: &Drive,
    notes: &mut dyn Notes,
) -> Result<Moved, Trouble> {
    let asked = |error: QmpError| Trouble::OnExport(Failure::from(error).into());
    // Nothing was begun yet: whatever goes wrong here, the drive is where it was.
    let mut graph = Graph::ask(monitor).map_err(asked)?;
    if end_old_job(monitor, home).map_err(asked)? {
        graph = Graph::ask(monitor).map_err(asked)?;
    }
    if graph.whereabouts(home, wanted.device.as_deref()) == Whereabouts::Target {
        check_runs_from(monitor.process(), home).map_err(Trouble::Elsewhere)?;
        notes.begin().and_then(|()| notes.mark()).map_err(Trouble::OnExport)?;
        return at_home(monitor, home);
    }
    check_stands_at_its_path(home).map_err(Trouble::OnExport)?;
    let drive = graph
        .drive(home, wanted.device.as_deref())
        .map_err(|error| Trouble::OnExport(Failure::from(error).into()))?;
    let mut moving = Moving { monitor, home, wanted, drive };
    notes.begin().map_err(Trouble::OnExport)?;
    match moving.prepare(&graph).and_then(|prepared| notes.mark().map(|()| prepared)) {
        Ok(direct_refused) => moving.go(direct_refused),
        Err(error) => {
            moving.remove_ours();
            if moving.has_closed_target() {
                notes.forget();
            }
            Err(Trouble::OnExport(error))
        }
    }
}

struct Moving<'a> {
    monitor: &'a mut dyn Monitor,
    home: &'a Home<'a>,
    wanted: &'a Drive,
    drive: OnExport,
}

impl Moving<'_> {
    /// Has QEMU open the target; tells whether it does so through the page cache although it was to go around it.
    fn prepare(&mut self, graph: &Graph) -> anyhow::Result<bool> {
        self.check_drive()?;
        if graph.node(&self.home.file_node()).is_some_and(|file| graph.serves(file)) {
            return Err(Failure::new(
                format!("another drive of this QEMU runs from {} already", self.home.target.display()),
                "a disk has one drive: end what uses the other one, then run `lifeboot pivot`",
            )
            .into());
        }
        for left in [self.home.raw_node(), self.home.file_node()] {
            if graph.node(&left).is_some() {
                // An attempt was cut short.
                self.run("blockdev-del", json!({ "node-name": left }))?;
            }
        }
        let refused = self.open_target()?;
        check_opened(self.monitor.process(), self.home)?;
        let graph = Graph::ask(self.monitor).map_err(Failure::from)?;
        let Some(target) = graph.node(&self.home.file_node()) else {
            anyhow::bail!("QEMU opened {} and does not list it", self.home.target.display());
        };
        if target.size < self.drive.upper.size {
            return Err(self.wrong_size(target.size));
        }
        if target.read_only && !self.drive.upper.read_only {
            return Err(Failure::new(
                format!("to QEMU the target {} is read-only", self.home.target.display()),
                "let QEMU write to it, then run `lifeboot pivot`",
            )
            .into());
        }
        if self.drive.way == Way::Replace {
            let raw = self.raw_options(&self.home.raw_node(), target.size);
            self.run("blockdev-add", raw)?;
        }
        Ok(refused)
    }

    fn check_drive(&self) -> anyhow::Result<()> {
        let size = self.drive.upper.size;
        // A guest sees whole sectors.
        if size != self.home.size.next_multiple_of(512) || self.drive.nbd.size != size {
            return Err(self.wrong_size(self.home.size));
        }
        Ok(())
    }

    fn wrong_size(&self, target: u64) -> anyhow::Error {
        Failure::new(
            format!(
                "QEMU's drive has {} bytes, the disk on {} {target}",
                self.drive.upper.size,
                self.home.target.display()
            ),
            "the drive must be the whole export, and the target at least as large (raw's options offset and size cannot be moved)",
        )
        .into()
    }

    fn open_target(&mut self) -> anyhow::Result<bool> {
        let is_direct = self.drive.nbd.direct;
        let opened = self.try_open(is_direct);
        let refused = match opened {
            Err(QmpError::Refused { .. }) if is_direct && self.wanted.aio.is_none() => {
                // Not every file system can.
                if self.try_open(false).is_ok() { Ok(true) } else { opened.map(|_| true) }
            }
            opened => opened.map(|_| false),
        };
        refused.map_err(|error| {
            let advice = match &error {
                QmpError::Refused { .. } => {
                    "QEMU must be able to open the target for writing under this path: look at its user, its namespaces, and \
                     its confinement (AppArmor, SELinux, -sandbox)"
                }
                error => error.advice(),
            };
            Failure::new(format!("QEMU cannot open the target {}", self.home.target.display()), advice)
                .because(error)
                .into()
        })
    }

    fn try_open(&mut self, direct: bool) -> Result<Value, QmpError> {
        let mut options = json!({
            "driver": if self.home.is_device() { "host_device" } else { "file" },
            "node-name": self.home.file_node(),
            "filename": self.home.target,
            "cache": { "direct": direct, "no-flush": self.drive.nbd.no_flush },
            "discard": "unmap",
            "read-only": self.drive.upper.read_only,
            "auto-read-only": false,
        });
        if let Some(aio) = self.wanted.aio {
            options["aio"] = json!(match aio {
                super::Aio::Threads => "threads",
                super::Aio::Native => "native",
                super::Aio::IoUring => "io_uring",
            });
        }
        self.monitor.execute("blockdev-add", options)
    }

    /// The options of a raw node on the target. A device that is larger than the disk must not make the guest's larger.
    fn raw_options(&self, name: &str, target_size: u64) -> Value {
        let upper = &self.drive.upper;
        let mut options = json!({
            "driver": "raw",
            "node-name": name,
            "file": self.home.file_node(),
            "cache": { "direct": upper.direct, "no-flush": upper.no_flush },
            "discard": "unmap",
            "detect-zeroes": upper.detect_zeroes,
            "read-only": upper.read_only,
        });
        if target_size > upper.size {
            options["size"] = json!(upper.size);
        }
        options
    }

    /// The point of no return, and what is beyond it.
    fn go(mut self, direct_refused: bool) -> Result<Moved, Trouble> {
        let done = match self.drive.way {
            Way::Reopen => self.reopen(),
            Way::Replace => self.replace(),
        };
        // Whatever it answered, where the drive is says the graph.
        let graph = Graph::ask(self.monitor).map_err(Trouble::Unknown)?;
        match (graph.whereabouts(self.home, self.wanted.device.as_deref()), done) {
            (Whereabouts::Target, _) => {}
            (Whereabouts::Export | Whereabouts::Both, Err(error)) => {
                self.remove_ours();
                return Err(Trouble::OnExport(
                    Failure::new(
                        format!(
                            "QEMU did not move the drive onto {}: it is on the export, as before",
                            self.home.target.display()
                        ),
                        "what QEMU says tells what to change; then run `lifeboot pivot`",
                    )
                    .because(error)
                    .into(),
                ));
            }
            (Whereabouts::Export | Whereabouts::Both | Whereabouts::Neither, _) => {
                return Err(Trouble::Unknown(QmpError::Refused {
                    command: "the move".to_owned(),
                    reason: "the drive is neither on the export nor on the target".to_owned(),
                }));
            }
        }
        remove_left_behind(self.monitor, self.home).map_err(Trouble::Unknown)?;
        let graph = Graph::ask(self.monitor).map_err(Trouble::Unknown)?;
        Ok(Moved { direct_refused, ..finished(&graph, self.home) })
    }

    fn reopen(&mut self) -> Result<(), QmpError> {
        let graph = Graph::ask(self.monitor)?;
        let target_size = graph.node(&self.home.file_node()).map_or(0, |node| node.size);
        let raw = self.raw_options(&self.drive.upper.name, target_size);
        self.monitor.execute("blockdev-reopen", json!({ "options": [raw] })).map(|_| ())
    }

    fn replace(&mut self) -> Result<(), QmpError> {
        let job = self.home.job();
        let arguments = json!({
            "job-id": job,
            "device": self.drive.upper.name,
            "target": self.home.raw_node(),
            "sync": "none",
            "copy-mode": "write-blocking",
            "on-source-error": "report",
            "on-target-error": "report",
        });
        self.monitor.execute("blockdev-mirror", arguments)?;
        for _ in 0..JOB_LOOKS {
            match job_state(self.monitor, &job)? {
                Some(job) if job["ready"] == true => {
                    self.monitor.execute("block-job-complete", json!({ "device": self.home.job() }))?;
                    return wait_job_end(self.monitor, &self.home.job());
                }
                Some(_) => self.monitor.pause(),
                None => break,
            }
        }
        end_old_job(self.monitor, self.home)?;
        Err(QmpError::Refused {
            command: "blockdev-mirror".to_owned(),
            reason: "the job failed before it was ready".to_owned(),
        })
    }

    fn run(&mut self, command: &str, arguments: Value) -> anyhow::Result<Value> {
        self.monitor.execute(command, arguments).map_err(|error| Failure::from(error).into())
    }

    /// What was added goes, while nobody uses it. What cannot be removed is by the next attempt.
    fn remove_ours(&mut self) {
        for name in [self.home.raw_node(), self.home.file_node()] {
            let _ = self.monitor.execute("blockdev-del", json!({ "node-name": name }));
        }
    }

    /// Whether QEMU says so.
    fn has_closed_target(&mut self) -> bool {
        Graph::ask(self.monitor).is_ok_and(|graph| graph.node(&self.home.file_node()).is_none())
    }
}

fn finished(graph: &Graph, home: &Home<'_>) -> Moved {
    let file = graph.node(&home.file_node());
    Moved {
        node: graph.user(&home.file_node()).unwrap_or_else(|| home.file_node()),
        file_node: home.file_node(),
        direct: file.is_some_and(|file| file.direct),
        direct_refused: false,
    }
}

fn job_state(monitor: &mut dyn Monitor, job: &str) -> Result<Option<Value>, QmpError> {
    let jobs = monitor.execute("query-block-jobs", json!({}))?;
    Ok(jobs.as_array().into_iter().flatten().find(|state| state["device"] == job).cloned())
}

fn wait_job_end(monitor: &mut dyn Monitor, job: &str) -> Result<(), QmpError> {
    for _ in 0..JOB_LOOKS {
        if job_state(monitor, job)?.is_none() {
            return Ok(());
        }
        monitor.pause();
    }
    Err(QmpError::Refused {
        command: "block-job-complete".to_owned(),
        reason: "the job does not end".to_owned(),
    })
}

/// Ends a job of ours that an attempt before this one left behind; tells whether there was one.
fn end_old_job(monitor: &mut dyn Monitor, home: &Home<'_>) -> Result<bool, QmpError> {
    let job = home.job();
    if job_state(monitor, &job)?.is_none() {
        return Ok(false);
    }
    // Where it is refused it has ended meanwhile.
    unless_refused(monitor.execute("block-job-cancel", json!({ "device": job, "force": true })))?;
    wait_job_end(monitor, &job)?;
    Ok(true)
}
