//! QEMU as our child: its arguments, its start and its end.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use serde_json::json;

use super::cannot_start;
use super::sockets::Sockets;
use crate::live_restore::{Service, qemu_arguments};
use crate::pivot::{Monitor as _, Qmp};

/// What the device of a disk is by the arguments that `live-restore` prints.
const USUAL_MODEL: &str = "virtio-blk-pci";
/// Where the devices are left to QEMU's arguments.
const NO_DEVICE: &str = "none";

/// How long QEMU may take to end once it was told to quit.
pub(super) const QUIT_PATIENCE: Duration = Duration::from_secs(10);

/// A QEMU that is to be started, runs, or has ended.
pub(super) struct Machine {
    program: PathBuf,
    accelerator: Option<&'static str>,
    device_model: String,
    arguments: Vec<OsString>,
    pub(super) sockets: Sockets,
    child: Option<Child>,
    ended: Option<ExitStatus>,
}

impl Machine {
    pub(super) const fn new(
        program: PathBuf,
        accelerator: Option<&'static str>,
        device_model: String,
        arguments: Vec<OsString>,
        sockets: Sockets,
    ) -> Self {
        Self { program, accelerator, device_model, arguments, sockets, child: None, ended: None }
    }

    /// Starts it. Its stdin, stdout and stderr are ours.
    pub(super) fn start(&mut self, service: &Service) -> anyhow::Result<()> {
        let mut qemu = Command::new(&self.program);
        if let Some(accelerator) = self.accelerator {
            qemu.args(["-accel", accelerator]);
        }
        // Before the user's own devices: the machine has its disks in this order.
        qemu.args(with_model(qemu_arguments(service), &self.device_model));
        for (name, path) in [("lifeboot-move", self.sockets.mover()), ("lifeboot-end", self.sockets.ender())]
        {
            let path = path.display().to_string().replace(',', ",,");
            qemu.args(["-chardev", &format!("socket,id={name},path={path},server=on,wait=off")]);
            qemu.args(["-mon", &format!("chardev={name},mode=control")]);
        }
        qemu.args(&self.arguments);
        tracing::debug!(?qemu, "starting QEMU");
        self.child = Some(qemu.spawn().map_err(|error| cannot_start(&self.program, error))?);
        Ok(())
    }

    pub(super) fn process(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// How it ended, once it has.
    pub(super) fn ended(&mut self) -> Option<ExitStatus> {
        if let (None, Some(child)) = (self.ended, &mut self.child) {
            // An error means that it is not our child, which it is.
            self.ended = child.try_wait().ok().flatten();
        }
        self.ended
    }

    /// Asks the guest to power down, or QEMU to end; tells whether QEMU took it.
    pub(super) fn ask_to_end(&self, at_once: bool) -> bool {
        let command = if at_once { "quit" } else { "system_powerdown" };
        let asked = Qmp::connect(&self.sockets.ender()).and_then(|mut qmp| qmp.execute(command, json!({})));
        asked.inspect_err(|error| tracing::debug!(%error, command, "QEMU was not asked")).is_ok()
    }

    /// Ends it whatever it does.
    pub(super) fn kill(&mut self) {
        if let Some(child) = &mut self.child {
            // It has ended already where this fails.
            let _ = child.kill();
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if self.ended().is_some() || self.child.is_none() {
            for socket in [self.sockets.mover(), self.sockets.ender()] {
                // QEMU removes them itself, unless it was killed.
                let _ = std::fs::remove_file(socket);
            }
            let _ = std::fs::remove_dir(self.sockets.dir());
            return;
        }
        // The service could not go on: without it the machine has no disks. QEMU may wait for them for minutes before it ends.
        self.ask_to_end(true);
        let deadline = Instant::now() + QUIT_PATIENCE;
        while self.ended().is_none() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
        }
        self.kill();
        if let Some(mut child) = self.child.take() {
            let _ = child.wait();
        }
    }
}

/// These arguments with another device model, or without devices.
fn with_model(arguments: Vec<String>, model: &str) -> Vec<String> {
    let mut changed = Vec::new();
    let mut arguments = arguments.into_iter().peekable();
    while let Some(argument) = arguments.next() {
        let is_device = argument == "-device";
        match arguments.peek().and_then(|value| value.strip_prefix(USUAL_MODEL)).filter(|_| is_device) {
            Some(properties) => {
                if model != NO_DEVICE {
                    changed.extend([argument, format!("{model}{properties}")]);
                }
                arguments.next();
            }
            None => changed.push(argument),
        }
    }
    changed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_model_takes_the_place_of_the_usual_one() {
        let usual = || {
            ["-blockdev", "driver=raw", "-device", "virtio-blk-pci,drive=lifeboot"]
                .map(str::to_owned)
                .to_vec()
        };
        assert_eq!(with_model(usual(), USUAL_MODEL), usual());
        assert_eq!(with_model(usual(), "nvme,serial=1")[3], "nvme,serial=1,drive=lifeboot");
        assert_eq!(with_model(usual(), NO_DEVICE), ["-blockdev", "driver=raw"]);
    }
}
