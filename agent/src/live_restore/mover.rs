//! What `live-restore` does beside telling how it goes: has the machine moved home where it was told how, and ends once it
//! was moved, by itself or by `lifeboot pivot`.

use std::ops::ControlFlow;
use std::sync::Arc;

use serde::Serialize;

use super::carrier::Carrier;
use super::handover::HandedOver;
use super::narrate::Narrator;
use super::serve::{Ended, Watcher};
use super::service::Service;
use crate::cli::{Outcome, told};
use crate::output::Output;
use crate::pivot::Drive;
use crate::status::Status;

/// A line of `live-restore --json`, besides those of the narrator.
#[derive(Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum Event<'a> {
    /// The machine runs from the target itself. With one disk this is the last line.
    HandedOver(&'a HandedOver),
}

/// Tells how it goes, and moves.
pub(super) struct Mover<'a> {
    output: &'a Output,
    narrator: Narrator<'a>,
    drive: Option<Drive>,
    carrier: Option<Carrier>,
    service: Option<Arc<Service>>,
    /// By disk: it was told that it was moved.
    told: Vec<bool>,
}

impl<'a> Mover<'a> {
    pub(super) const fn new(output: &'a Output, narrator: Narrator<'a>, drive: Option<Drive>) -> Self {
        Self { output, narrator, drive, carrier: None, service: None, told: Vec::new() }
    }

    /// Says how it ended.
    pub(super) fn conclude(mut self, ended: &Ended) -> anyhow::Result<Outcome> {
        self.carrier = None;
        self.say_moves();
        let is_moved = self.service.as_ref().is_some_and(|service| service.is_handed_over());
        if !is_moved {
            return self.narrator.conclude(ended);
        }
        Outcome::Done.once_told(
            self.narrator.say_report(&ended.statuses).and_then(|()| self.output.settle()),
            "the machine was moved onto its own disks",
            "start it from there from now on",
        )
    }

    fn say_moves(&mut self) {
        let Some(service) = &self.service else { return };
        for (disk, told) in service.disks().iter().zip(&mut self.told) {
            if let (false, Some(home)) = (*told, disk.handed_over()) {
                *told = true;
                Narrator::say(say_home(self.output, home));
            }
        }
        while let Some((disk, error)) = self.carrier.as_ref().and_then(Carrier::failure) {
            let (message, advice) = told(&error);
            let advice = advice.map(|advice| format!(" ({advice})")).unwrap_or_default();
            self.output.warn(format_args!(
                "{}: the machine was not moved: {message}{advice}; it goes on being served, and this is tried again",
                service.disks()[disk].record.disk
            ));
        }
    }
}

/// Says that a machine runs from its target.
pub(super) fn say_home(output: &Output, home: &HandedOver) -> anyhow::Result<()> {
    output.event(&Event::HandedOver(home))?;
    output.line(home)
}

impl Watcher for Mover<'_> {
    fn ready(&mut self, service: &Arc<Service>) -> anyhow::Result<()> {
        self.narrator.ready(service)?;
        self.told = vec![false; service.disks().len()];
        self.carrier = self.drive.take().map(|drive| Carrier::start(service, drive)).transpose()?;
        self.service = Some(Arc::clone(service));
        Ok(())
    }

    fn progress(&mut self, statuses: &[Status]) {
        self.narrator.progress(statuses);
    }

    fn disk_complete(&mut self, disk: usize, statuses: &[Status]) {
        self.narrator.disk_complete(disk, statuses);
        if let Some(carrier) = &self.carrier {
            carrier.carry(disk);
        }
    }

    fn complete(&mut self, statuses: &[Status]) {
        self.narrator.complete(statuses);
    }

    fn poll(&mut self) -> ControlFlow<()> {
        self.say_moves();
        let is_over = self.service.as_ref().is_some_and(|service| service.is_handed_over());
        if is_over { ControlFlow::Break(()) } else { self.narrator.poll() }
    }
}
