//! What `live-restore` says of a service: lines for people, events with `--json`.
//!
//! With one disk an event's members are those of its status. With several each event has `disks`, an array with a
//! status for each in their place; and `disk_complete`, which then comes besides, is one status.

use std::sync::Arc;
use std::time::Instant;

use nbd_server::ListenAddress;
use serde::Serialize;

use super::advice;
use super::serve::{Ended, Watcher};
use super::service::{ServedDisk, Service};
use super::story::End;
use crate::cli::Outcome;
use crate::live::Resumed;
use crate::output::{Output, Progress, human_count, human_size};
use crate::status::{Report, Status};

/// A line of `live-restore --json`. The last line is `complete`, `settled`, `parked` or `taken_over`, unless the command failed.
#[derive(Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum Event<'a> {
    /// Guests may connect.
    Ready {
        /// QEMU's arguments for a drive on each disk, at the first address.
        qemu: &'a [String],
        /// Where its metrics are to be had, if they were asked for.
        #[serde(skip_serializing_if = "Option::is_none")]
        metrics: Option<&'a str>,
        #[serde(flatten)]
        disks: Each<Readied<'a>>,
    },
    /// How far it is.
    Progress(Each<&'a Status>),
    /// With several disks: this one is home, and on stable storage.
    DiskComplete(&'a Status),
    /// All is home, and on stable storage.
    Complete(Each<Reported<'a>>),
    /// It ended because all is home but what is damaged, and it was to exit when done; the same command asks for that
    /// again.
    Settled(Each<Reported<'a>>),
    /// It ended in order; the same command goes on.
    Parked(Each<Reported<'a>>),
    /// It ended in order, and another agent goes on.
    TakenOver(Each<Reported<'a>>),
}

/// One disk's members, or an array with those of each.
#[derive(Serialize)]
#[serde(untagged)]
enum Each<T> {
    One(T),
    Several { disks: Vec<T> },
}

impl<T> Each<T> {
    fn of(disks: impl IntoIterator<Item = T>) -> Self {
        let mut disks: Vec<T> = disks.into_iter().collect();
        match disks.pop() {
            Some(one) if disks.is_empty() => Self::One(one),
            last => {
                disks.extend(last);
                Self::Several { disks }
            }
        }
    }
}

#[derive(Serialize)]
struct Readied<'a> {
    uris: Vec<String>,
    resumed: bool,
    #[serde(flatten)]
    status: &'a Status,
}

#[derive(Serialize)]
struct Reported<'a> {
    #[serde(flatten)]
    status: &'a Status,
    report: Report,
}

/// Tells it all.
pub(super) struct Narrator<'a> {
    output: &'a Output,
    exits_when_done: bool,
    begun: Instant,
    /// By disk: how often its session was started before, as of this start.
    restarts: Vec<u64>,
    bar: Option<Progress>,
    /// By disk: what it waits for, as it was told.
    troubles: Vec<Option<String>>,
}

impl<'a> Narrator<'a> {
    pub(super) fn new(output: &'a Output, exits_when_done: bool) -> Self {
        Self {
            output,
            exits_when_done,
            begun: Instant::now(),
            restarts: Vec::new(),
            bar: None,
            troubles: Vec::new(),
        }
    }

    /// Says how it ended.
    pub(super) fn conclude(&self, ended: &Ended) -> anyhow::Result<Outcome> {
        let told = self.tell_end(ended).and_then(|()| self.output.settle());
        let outcomes: Vec<Outcome> = match ended.end {
            // Its successor says what is to be said of the disks.
            End::TakenOver => Vec::new(),
            _ => ended.statuses.iter().map(|status| status.conclude(self.output)).collect(),
        };
        let outcome = if outcomes.contains(&Outcome::Damaged) { Outcome::Damaged } else { Outcome::Done };
        outcome.once_told(
            told,
            "the service ended in order",
            "`lifeboot status` tells how far it is; the same command goes on",
        )
    }

    fn tell_end(&self, Ended { end, statuses, .. }: &Ended) -> anyhow::Result<()> {
        match end {
            End::Parked => {
                self.output.event(&Event::Parked(self.reported(statuses)))?;
                for status in statuses {
                    let which = which(status, statuses);
                    if status.home_bytes >= status.size {
                        self.output.line(format_args!("{which}ended; all of it is home"))?;
                        continue;
                    }
                    self.output.line(format_args!(
                        "{which}parked at {:.1} % home{}",
                        status.percent(),
                        // Else it is said below what became of the target.
                        if status.loss.is_none() { "; the same command goes on" } else { "" }
                    ))?;
                }
            }
            End::Settled => {
                self.output.event(&Event::Settled(self.reported(statuses)))?;
                for status in statuses.iter().filter(|status| status.is_damaged()) {
                    self.output.line(format_args!(
                        "{}settled: all is home but {} that cannot be had; the same command asks for that again",
                        which(status, statuses),
                        human_size(status.damaged_bytes)
                    ))?;
                }
            }
            End::TakenOver => {
                self.output.event(&Event::TakenOver(self.reported(statuses)))?;
                for status in statuses {
                    let which = which(status, statuses);
                    self.output.line(format_args!(
                        "{which}handed over to a new agent at {:.1} % home",
                        status.percent()
                    ))?;
                }
                return Ok(());
            }
            End::Complete | End::Poisoned => {}
        }
        self.say_report(statuses)
    }

    fn report(&self, disk: usize, status: &Status) -> Report {
        let restarts = self.restarts.get(disk).copied().unwrap_or_default();
        Report::new(status, self.begun.elapsed(), restarts)
    }

    fn reported<'s>(&self, statuses: &'s [Status]) -> Each<Reported<'s>> {
        Each::of(
            statuses
                .iter()
                .enumerate()
                .map(|(disk, status)| Reported { status, report: self.report(disk, status) }),
        )
    }

    /// One block for people, at the end.
    pub(super) fn say_report(&self, statuses: &[Status]) -> anyhow::Result<()> {
        for (disk, status) in statuses.iter().enumerate() {
            for line in self.report(disk, status).lines(status) {
                self.output.line(line)?;
            }
        }
        Ok(())
    }

    /// Whoever read our stdout may go away; guests that use the disks stay.
    pub(super) fn say(result: anyhow::Result<()>) {
        if let Err(error) = result {
            tracing::debug!(%error, "nobody listens");
        }
    }

    fn say_ready(&self, service: &Service) -> anyhow::Result<()> {
        let statuses = service.statuses();
        let qemu = qemu_arguments(service);
        let readied = service.disks().iter().zip(&statuses).map(|(disk, status)| Readied {
            uris: disk.uris(),
            resumed: disk.resumed.is_some(),
            status,
        });
        let metrics = service.metrics_url.as_deref();
        self.output.event(&Event::Ready { qemu: &qemu, metrics, disks: Each::of(readied) })?;
        for (disk, status) in service.disks().iter().zip(&statuses) {
            self.say_found(disk, status)?;
        }
        for uri in service.disks().iter().flat_map(ServedDisk::uris) {
            self.output.line(format_args!("ready: {uri}"))?;
        }
        if let Some(url) = metrics {
            self.output.line(format_args!("metrics: {url}"))?;
        }
        self.output.line(format_args!("QEMU: {}", advice::shell_line(&qemu)))
    }

    fn say_found(&self, disk: &ServedDisk, status: &Status) -> anyhow::Result<()> {
        let how = match disk.resumed {
            None => "restoring",
            Some(Resumed::Parked) => "going on where it was parked:",
            Some(Resumed::AgentDied) => "going on after the agent had died: everything is there:",
            Some(Resumed::HostDied) => "going on after the host had gone down: everything flushed is there:",
            Some(Resumed::SyncFailed) => {
                "going on after a sync had failed: what was flushed before is there:"
            }
            Some(Resumed::LiveFileLost) => {
                "going on after the agent had died and the live file was lost: what was flushed is there:"
            }
        };
        if let Some(loss) = disk.resumed.and_then(advice::loss) {
            self.output.warn(loss);
        }
        self.output.line(format_args!(
            "{how} {}/{} ({}, {:.1} % home) to {}",
            status.snapshot,
            status.disk,
            human_size(status.size),
            status.percent(),
            status.target.display()
        ))
    }

    fn say_disk_complete(&self, status: &Status, is_alone: bool) -> anyhow::Result<()> {
        if !is_alone {
            self.output.event(&Event::DiskComplete(status))?;
        }
        self.output.line(format_args!(
            "complete: {} holds the whole disk; {} fetched, {} written by the guest{}",
            status.target.display(),
            human_size(status.fetched_bytes),
            human_size(status.guest_bytes),
            if is_alone { self.what_now() } else { "" }
        ))
    }

    const fn what_now(&self) -> &'static str {
        if self.exits_when_done { "" } else { "; it goes on being served, Ctrl-C ends that" }
    }
}

impl Watcher for Narrator<'_> {
    fn ready(&mut self, service: &Arc<Service>) -> anyhow::Result<()> {
        self.restarts = service.disks().iter().map(|disk| disk.record.starts.saturating_sub(1)).collect();
        self.troubles = vec![None; service.disks().len()];
        Self::say(self.say_ready(service));
        // Without systemd there is nobody to tell.
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
        Ok(())
    }

    fn progress(&mut self, statuses: &[Status]) {
        Self::say(self.output.event(&Event::Progress(Each::of(statuses))));
        if !statuses.iter().any(Status::is_coming_home) {
            self.bar = None;
        } else if !self.output.is_json() {
            let size = statuses.iter().map(|status| status.size).sum();
            let home = statuses.iter().map(|status| status.home_bytes).sum();
            let begin = || {
                let bar = if statuses.iter().all(Status::is_without_background) {
                    self.output.level("home", size)
                } else {
                    self.output.progress("copying home", Some(size))
                };
                bar.begin_at(home);
                bar
            };
            self.bar.get_or_insert_with(begin).set(home);
        }
        for (told, status) in self.troubles.iter_mut().zip(statuses) {
            if let (None, Some(why)) = (&told, &status.waiting) {
                self.output.warn(format_args!("{}{why}", which(status, statuses)));
            }
            told.clone_from(&status.waiting);
        }
    }

    fn disk_complete(&mut self, disk: usize, statuses: &[Status]) {
        Self::say(self.say_disk_complete(&statuses[disk], statuses.len() == 1));
    }

    fn complete(&mut self, statuses: &[Status]) {
        self.bar = None;
        Self::say(self.output.event(&Event::Complete(self.reported(statuses))));
        if statuses.len() > 1 {
            let count = human_count(statuses.len() as u64, "disk", "disks");
            Self::say(self.output.line(format_args!("complete: all {count} are home{}", self.what_now())));
        }
    }
}

/// QEMU's arguments for a drive on each disk of a service.
pub(crate) fn qemu_arguments(service: &Service) -> Vec<String> {
    let names: Vec<String> = service.disks().iter().map(|disk| disk.record.export()).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let first: Option<&ListenAddress> = service.disks().first().and_then(|disk| disk.addresses.first());
    // A server that does not insist on TLS takes QEMU as it takes anybody.
    let tls = service.tls.as_ref().filter(|tls| tls.is_required()).map(nbd_server::TlsServer::credentials);
    first.map(|address| advice::qemu_arguments(address, &names, tls)).unwrap_or_default()
}

/// Before what is said of one disk of several.
fn which(status: &Status, statuses: &[Status]) -> String {
    if statuses.len() == 1 { String::new() } else { format!("{}: ", status.disk) }
}
