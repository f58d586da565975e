//! What happens while a machine runs: its disks come home and are moved; it, or whoever started it, ends it.

use std::ops::ControlFlow;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::machine::{Machine, QUIT_PATIENCE};
use crate::cli::{Failure, Interrupt, Outcome, told};
use crate::live_restore::{Carrier, Ended, HandedOver, Service, Watcher};
use crate::output::{Output, human_size};
use crate::pivot::{Aio, Drive};
use crate::status::Status;

/// How often QEMU is looked at once nothing is served any more.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);
/// How often progress is told where nobody can be shown a bar: the terminal is QEMU's.
const TELL_INTERVAL: Duration = Duration::from_secs(10);

/// A line of `boot --json`, on stderr: stdout is QEMU's.
#[derive(Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum Event<'a> {
    Started { pid: Option<u32>, disks: &'a [Status] },
    Progress { disks: &'a [Status] },
    DiskComplete(&'a Status),
    HandedOver(&'a HandedOver),
    Ended { code: Option<i32>, disks: &'a [Status] },
}

/// How far the machine's end is.
enum Ending {
    /// Nobody wants it.
    None,
    /// The guest was asked to power down.
    Asked(Instant),
    /// QEMU was told to quit.
    Quit(Instant),
    /// QEMU was killed.
    Killed,
}

pub(super) struct BootWatcher<'a> {
    output: &'a Output,
    machine: Machine,
    interrupt: Interrupt,
    aio: Option<Aio>,
    shutdown_timeout: Duration,
    ending: Ending,
    service: Option<Arc<Service>>,
    carrier: Option<Carrier>,
    /// Disks that are home, while QEMU has not made its monitor.
    home: Vec<usize>,
    /// By disk: it was told that it was moved.
    moved: Vec<bool>,
    told_at: Option<Instant>,
    waiting: Vec<Option<String>>,
}

impl<'a> BootWatcher<'a> {
    pub(super) const fn new(
        output: &'a Output,
        machine: Machine,
        interrupt: Interrupt,
        aio: Option<Aio>,
        shutdown_timeout: Duration,
    ) -> Self {
        Self {
            output,
            machine,
            interrupt,
            aio,
            shutdown_timeout,
            ending: Ending::None,
            service: None,
            carrier: None,
            home: Vec::new(),
            moved: Vec::new(),
            told_at: None,
            waiting: Vec::new(),
        }
    }

    /// Stays until QEMU has ended, and says how it did.
    pub(super) fn outlive(mut self, ended: &Ended) -> anyhow::Result<Outcome> {
        // The machine is its target's only user from now on: what keeps others away goes with these.
        self.carrier = None;
        self.service = None;
        let status = loop {
            if let Some(status) = self.machine.ended() {
                break status;
            }
            if !self.is_home() {
                // The service ended by itself: a sync failed. The machine has no disks any more.
                self.ask_to_end(true);
            }
            self.look_after_end();
            std::thread::sleep(LOOK_INTERVAL);
        };
        self.output.side_event(&Event::Ended { code: status.code(), disks: &ended.statuses });
        self.say_ended(ended);
        let outcomes: Vec<Outcome> =
            ended.statuses.iter().map(|status| status.conclude(self.output)).collect();
        check_end(status, matches!(self.ending, Ending::None))?;
        Ok(if outcomes.contains(&Outcome::Damaged) { Outcome::Damaged } else { Outcome::Done })
    }

    fn is_home(&self) -> bool {
        !self.moved.is_empty() && self.moved.iter().all(|moved| *moved)
    }

    fn say_ended(&self, ended: &Ended) {
        for (status, moved) in ended.statuses.iter().zip(&self.moved) {
            let (disk, target) = (&status.disk, status.target.display());
            if *moved {
                self.output.side_line(format_args!(
                    "{disk}: the machine's own disk is {target}; start it from there"
                ));
            } else if status.home_bytes >= status.size {
                self.output.side_line(format_args!(
                    "{disk}: {target} holds the whole disk; the same command goes on"
                ));
            } else {
                self.output.side_line(format_args!(
                    "{disk}: parked at {:.1} % home; the same command goes on, or live-restore brings home the rest \
                     with the machine off",
                    status.percent()
                ));
            }
        }
    }

    /// Until somebody asks once more.
    fn ask_to_end(&self, at_once: bool) {
        let wishes = self.interrupt.wishes();
        self.machine.ask_to_end(at_once, &|| self.interrupt.wishes() > wishes);
    }

    /// Passes a wish to end on to the guest, then to QEMU, then to the kernel.
    fn look_after_end(&mut self) {
        let now = Instant::now();
        let wishes = self.interrupt.wishes();
        match self.ending {
            Ending::None if self.interrupt.is_raised() => {
                self.output.side_line(format_args!(
                    "asking the guest to power down; QEMU is told to quit in {} s, or when you ask once more, a second from now or later",
                    self.shutdown_timeout.as_secs()
                ));
                self.ask_to_end(false);
                self.ending = Ending::Asked(now);
            }
            Ending::Asked(since) if wishes > 1 || now.duration_since(since) >= self.shutdown_timeout => {
                let why = if wishes > 1 { "asked once more" } else { "the guest does not power down" };
                self.output.warn(format_args!("{why}: QEMU is told to quit"));
                self.ask_to_end(true);
                self.ending = Ending::Quit(now);
            }
            Ending::Quit(since) if wishes > 2 || now.duration_since(since) >= QUIT_PATIENCE => {
                self.output.warn("QEMU does not end: it is killed");
                self.machine.kill();
                self.ending = Ending::Killed;
            }
            _ => {}
        }
    }

    /// Has moved what is home, once QEMU can be asked to.
    fn begin_moves(&mut self) {
        if let Some(carrier) = &self.carrier
            && !self.home.is_empty()
            && self.machine.sockets.has_monitor()
        {
            self.home.drain(..).for_each(|disk| carrier.carry(disk));
        }
    }

    fn look_after_moves(&mut self) {
        let Some(service) = &self.service else { return };
        for (disk, moved) in service.disks().iter().zip(&mut self.moved) {
            if let (false, Some(home)) = (*moved, disk.handed_over()) {
                *moved = true;
                self.output.side_event(&Event::HandedOver(home));
                self.output.side_line(format_args!(
                    "{}: the machine was moved onto {}",
                    home.disk,
                    home.target.display()
                ));
            }
        }
        while let Some((disk, error)) = self.carrier.as_ref().and_then(Carrier::failure) {
            if self.machine.ended().is_some() {
                tracing::debug!(error = format_args!("{error:#}"), "QEMU ended before the machine was moved");
                continue;
            }
            let (message, advice) = told(&error);
            let name = &service.disks()[disk].record.disk;
            let advice = advice.map(|advice| format!(" ({advice})")).unwrap_or_default();
            self.output.warn(format_args!(
                "{name}: the machine was not moved: {message}{advice}; it goes on being served, and this is tried again"
            ));
        }
    }
}

impl Watcher for BootWatcher<'_> {
    fn ready(&mut self, service: &Arc<Service>) -> anyhow::Result<()> {
        let drive = Drive { qmp: self.machine.sockets.mover(), device: None, aio: self.aio };
        self.carrier = Some(Carrier::start(service, drive)?);
        self.moved = vec![false; service.disks().len()];
        self.waiting = vec![None; service.disks().len()];
        // The machine must not outlive us because somebody was impatient: from here on its end is ours to bring about.
        self.interrupt.see_to_all();
        self.machine.start(service)?;
        self.service = Some(Arc::clone(service));
        let statuses = service.statuses();
        self.output.side_event(&Event::Started { pid: self.machine.process(), disks: &statuses });
        for status in &statuses {
            self.output.side_line(format_args!(
                "{}: booting {} ({}, {:.1} % home) on {}",
                status.disk,
                status.snapshot,
                human_size(status.size),
                status.percent(),
                status.target.display()
            ));
        }
        Ok(())
    }

    fn progress(&mut self, statuses: &[Status]) {
        self.output.side_event(&Event::Progress { disks: statuses });
        if self.told_at.is_none_or(|at| at.elapsed() >= TELL_INTERVAL) {
            self.told_at = Some(Instant::now());
            tracing::info!(
                percent = format_args!("{:.1}", statuses.iter().map(Status::percent).fold(100.0, f64::min)),
                "copying home"
            );
        }
        for (told, status) in self.waiting.iter_mut().zip(statuses) {
            if let (None, Some(why)) = (&told, &status.waiting) {
                self.output.warn(format_args!("{}: {why}", status.disk));
            }
            told.clone_from(&status.waiting);
        }
    }

    fn disk_complete(&mut self, disk: usize, statuses: &[Status]) {
        self.output.side_event(&Event::DiskComplete(&statuses[disk]));
        self.output.side_line(format_args!("{}: home", statuses[disk].disk));
        self.home.push(disk);
    }

    fn complete(&mut self, _statuses: &[Status]) {}

    fn poll(&mut self) -> ControlFlow<()> {
        self.begin_moves();
        self.look_after_moves();
        if self.machine.ended().is_some() || self.is_home() {
            return ControlFlow::Break(());
        }
        self.look_after_end();
        ControlFlow::Continue(())
    }
}

/// QEMU's end as ours: a failure of its own is one, an end that somebody asked for is none.
fn check_end(status: ExitStatus, is_own: bool) -> anyhow::Result<()> {
    use std::os::unix::process::ExitStatusExt as _;
    if status.success() || (!is_own && status.signal().is_none()) {
        return Ok(());
    }
    Err(Failure::new(
        format!("QEMU ended badly: {status}"),
        "what it said stands above; the session is kept, and the same command goes on",
    )
    .into())
}
