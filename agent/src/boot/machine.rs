//! QEMU as our child: its arguments, its start and its end.

use std::ffi::OsString;
use std::io::{self, IsTerminal as _};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use serde_json::json;

use super::cannot_start;
use super::note::Origin;
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
    origin: Origin,
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
        origin: Origin,
    ) -> Self {
        Self { program, accelerator, device_model, arguments, sockets, origin, child: None, ended: None }
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
        qemu.args(console(&self.arguments));
        if !needs_terminal(&self.arguments, io::stdin().is_terminal()) {
            // What the terminal sends to everybody in front of it (Ctrl-C, its hangup) is ours to pass on.
            qemu.process_group(0);
        }
        self.sockets.note(service, &self.origin)?;
        let _inherited = self.sockets.lock()?;
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

    /// Asks the guest to power down, or QEMU to end; tells whether QEMU took it. It waits for its monitor until `gives_up` says so.
    pub(super) fn ask_to_end(&self, at_once: bool, gives_up: &dyn Fn() -> bool) -> bool {
        let command = if at_once { "quit" } else { "system_powerdown" };
        let asked =
            Qmp::connect(&self.sockets.ender(), gives_up).and_then(|mut qmp| qmp.execute(command, json!({})));
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
            self.sockets.remove();
            return;
        }
        // The service could not go on: without it the machine has no disks. QEMU may wait for them for minutes before it ends.
        self.ask_to_end(true, &|| false);
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

/// What `-nographic` means by itself: the guest's console and the monitor on stdio, where Ctrl-C is the guest's. Our monitors
/// make QEMU leave out its own; then it would put the console alone there, and end by a Ctrl-C.
fn console(arguments: &[OsString]) -> &'static [&'static str] {
    let options = || arguments.iter().filter_map(|argument| argument.to_str()?.strip_prefix('-'));
    let options = || options().map(|option| option.trim_start_matches('-'));
    let chooses = ["serial", "monitor", "mon", "qmp", "qmp-pretty", "nodefaults", "readconfig"];
    let has_serial_device = || {
        arguments.iter().filter_map(|argument| argument.to_str()).any(|value| value.starts_with("isa-serial"))
    };
    let is_usual = options().any(|option| option == "nographic")
        && !options().any(|option| chooses.contains(&option))
        && !has_serial_device();
    if is_usual { &["-serial", "mon:stdio"] } else { &[] }
}

/// Whether QEMU reads from the terminal: then it must stay in front of it with us, as whoever reads from behind is stopped. A
/// terminal that QEMU has made raw sends no signals; else they reach QEMU too, and it ends by them as it does without us.
fn needs_terminal(arguments: &[OsString], is_stdin_terminal: bool) -> bool {
    arguments.iter().filter_map(|argument| argument.to_str()).any(|argument| {
        let has = |word: &str| argument.split([':', ',', '=']).any(|part| part == word);
        let option = argument.trim_start_matches('-');
        let is_screen = option == "curses" || has("curses");
        let is_reader = option == "nographic" || option == "readconfig" || has("stdio");
        is_screen || (is_stdin_terminal && is_reader)
    })
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
    fn a_qemu_that_reads_from_the_terminal_stays_in_front_of_it() {
        let needs = |line: &str, is_terminal| {
            let arguments: Vec<OsString> = line.split(' ').map(OsString::from).collect();
            needs_terminal(&arguments, is_terminal)
        };
        for line in [
            "-m 1G -nographic",
            "-serial stdio",
            "-serial mon:stdio",
            "-chardev stdio,id=a",
            "-chardev backend=stdio,id=a",
            "-qmp stdio",
            "-readconfig x",
        ] {
            assert!(needs(line, true), "{line}");
            assert!(!needs(line, false), "nobody is stopped for reading a pipe or a file: {line}");
        }
        for line in ["-display none -serial null", "-m 1G -name stdio-x", "-display gtk", "-vnc :1"] {
            assert!(!needs(line, true), "{line}");
        }
        assert!(needs("-display curses", false) && needs("-curses", true));
    }

    #[test]
    fn nographic_is_what_it_is_without_us_unless_the_console_was_chosen() {
        let console_of = |line: &str| {
            let arguments: Vec<OsString> = line.split(' ').map(OsString::from).collect();
            console(&arguments)
        };
        assert_eq!(console_of("-m 1G -nographic"), ["-serial", "mon:stdio"]);
        for line in [
            "-m 1G",
            "-name nographic",
            "-nographic -serial null",
            "-nographic -monitor none",
            "-nographic -nodefaults",
            "-nographic -chardev stdio,id=a -device isa-serial,chardev=a",
        ] {
            assert!(console_of(line).is_empty(), "{line}");
        }
    }

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
