//! A virtual machine under QEMU, told what to do over its second serial port.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::guest::GuestImage;
use crate::nbd::Export;
use crate::process::{Process, run_any};

/// How long QEMU waits for the server of a drive to come back before it fails the guest's requests, in seconds.
pub const RECONNECT_DELAY_S: u32 = 120;

/// What the guest's agent says when it has come up.
const READY: &str = "guest ready";

/// A running guest.
#[derive(Debug)]
pub struct Machine {
    process: Process,
    next_id: u64,
    trace: PathBuf,
}

/// A command that the guest is busy with.
#[derive(Debug)]
#[must_use = "the guest's answer is read by `Machine::finish`"]
pub struct Running {
    id: u64,
    command: String,
}

impl Machine {
    /// Boots the guest with its disk behind `drive`, arguments for QEMU that define a drive or a device of the name
    /// `vda`, and returns at once. Files of its own go to `directory`.
    ///
    /// # Errors
    /// QEMU cannot be started.
    pub fn start(image: &GuestImage, drive: &[String], directory: &Path) -> Result<Self> {
        let append = "root=/dev/vda ro console=ttyS0 net.ifnames=0 panic=-1";
        let arguments = arguments(image, &image.initrd(), append, drive, directory);
        Self::run_qemu(Command::new("qemu-system-x86_64").args(arguments), directory)
    }

    /// Boots a guest that is up in seconds, with its initial file system alone (see [`crate::small_guest`]), by the QEMU
    /// that `LIFEBOOT_TEST_QEMU` names, if it does. `further` are arguments for QEMU.
    ///
    /// # Errors
    /// QEMU cannot be started.
    pub fn start_small(
        image: &GuestImage,
        initrd: &Path,
        further: &[String],
        directory: &Path,
    ) -> Result<Self> {
        let arguments = arguments(image, initrd, "rdinit=/init console=ttyS0 panic=-1", further, directory);
        let words = std::env::var("LIFEBOOT_TEST_QEMU").unwrap_or_else(|_| "qemu-system-x86_64".to_owned());
        let mut words = words.split_whitespace();
        let mut qemu = Command::new(words.next().context("LIFEBOOT_TEST_QEMU names a program")?);
        Self::run_qemu(qemu.args(words).args(arguments), directory)
    }

    /// Runs `command`, which runs QEMU with [`arguments`] for this directory.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn run_qemu(command: &Command, directory: &Path) -> Result<Self> {
        Ok(Self { process: Process::spawn(command)?, next_id: 0, trace: directory.join("qemu.trace") })
    }

    /// What runs it: QEMU, or whoever started that.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Waits until the guest has come up.
    ///
    /// # Errors
    /// QEMU ended before, or nothing was heard for too long.
    pub fn wait_ready(&mut self) -> Result<()> {
        self.process.wait_for_text(READY).map(|_| ())
    }

    /// As [`Machine::wait_ready`], for those who look after something else when `limit` is over: true when it is up.
    ///
    /// # Errors
    /// QEMU ended before.
    pub fn is_ready_within(&mut self, limit: Duration) -> Result<bool> {
        let ready = |line: &str| line.contains(READY).then_some(());
        Ok(self.process.wait_for_within(limit, "the guest was ready", ready)?.is_some())
    }

    /// Has the guest run `command` in a shell and returns what that printed.
    ///
    /// # Errors
    /// It ended with another code than 0, or the machine ended.
    pub fn run(&mut self, command: &str) -> Result<String> {
        let running = self.begin(command)?;
        self.finish(running)
    }

    /// Has the guest run `command` and does not wait for it.
    ///
    /// # Errors
    /// The machine has ended.
    pub fn begin(&mut self, command: &str) -> Result<Running> {
        self.next_id += 1;
        self.process.write_line(&format!("{} {command}", self.next_id))?;
        Ok(Running { id: self.next_id, command: command.to_owned() })
    }

    /// Waits until a command that runs has printed `line`. [`Machine::finish`] returns what follows it.
    ///
    /// # Errors
    /// The machine ended.
    pub fn wait_output(&mut self, running: &Running, line: &str) -> Result<()> {
        self.process.wait_for_text(&format!("{}| {line}", running.id)).map(|_| ())
    }

    /// Whether a command that was begun has ended.
    pub fn has_ended(&self, running: &Running) -> bool {
        let end_mark = format!("{} exit ", running.id);
        self.process.lines().iter().any(|line| line.starts_with(&end_mark))
    }

    /// How many requests QEMU has sent to the server so far, by its own record.
    ///
    /// # Errors
    /// The record cannot be read.
    pub fn requests(&self) -> Result<usize> {
        let record = fs::read(&self.trace).context("QEMU's trace")?;
        Ok(record.iter().filter(|byte| **byte == b'\n').count())
    }

    /// Waits for the end of a command and returns what it printed.
    ///
    /// # Errors
    /// As for [`Machine::run`].
    pub fn finish(&mut self, running: Running) -> Result<String> {
        let (output_mark, end_mark) = (format!("{}| ", running.id), format!("{} exit ", running.id));
        let mut output = String::new();
        let code = self.process.wait_for(&format!("the end of {:?}", running.command), |line| {
            if let Some(text) = line.strip_prefix(&output_mark) {
                output.push_str(text);
                output.push('\n');
            }
            line.strip_prefix(&end_mark).map(str::to_owned)
        })?;
        ensure!(code == "0", "in the guest, {:?} ended with {code}\n{output}", running.command);
        Ok(output)
    }

    /// Shuts the guest down in good order and waits until QEMU has ended.
    ///
    /// # Errors
    /// It does not, or QEMU ended with an error.
    pub fn power_off(&mut self) -> Result<()> {
        self.process.write_line("0 systemctl poweroff")?;
        self.process.wait_success()
    }

    /// The blocks, as numbers of [`crate::disk::BLOCK_BYTES`], that QEMU asked the server to change so far, by its
    /// own record. Sorted, each once.
    ///
    /// # Errors
    /// The record cannot be read or is not understood.
    pub fn written_blocks(&self) -> Result<Vec<u64>> {
        let text = fs::read_to_string(&self.trace).context("QEMU's trace")?;
        let mut blocks = Vec::new();
        for line in text.lines().filter(|line| line.contains("nbd_send_request")) {
            let request = Request::parse(line).with_context(|| format!("unknown in QEMU's trace: {line}"))?;
            if request.changes_the_disk() && request.len_bytes > 0 {
                let first = request.offset / crate::disk::BLOCK_BYTES;
                blocks.extend(first..(request.offset + request.len_bytes).div_ceil(crate::disk::BLOCK_BYTES));
            }
        }
        blocks.sort_unstable();
        blocks.dedup();
        Ok(blocks)
    }
}

/// A line such as `nbd_send_request Sending request to server: { .from = 0, .len = 512, .handle = 1, .flags = 0x0,
/// .type = 1 (write) }`; newer versions have further fields.
struct Request {
    offset: u64,
    len_bytes: u64,
    kind: String,
}

impl Request {
    fn parse(line: &str) -> Option<Self> {
        let field = |name: &str| {
            let rest = &line[line.find(&format!(".{name} = "))? + name.len() + 4..];
            Some(rest[..rest.find([',', ' '])?].to_owned())
        };
        let kind = line[line.rfind('(')? + 1..line.rfind(')')?].to_owned();
        Some(Self { offset: field("from")?.parse().ok()?, len_bytes: field("len")?.parse().ok()?, kind })
    }

    fn changes_the_disk(&self) -> bool {
        matches!(self.kind.as_str(), "write" | "discard" | "trim" | "write zeroes")
    }
}

/// Arguments for QEMU: a guest that is told what to do over stdin and stdout, and these further ones. Files go to `directory`.
pub fn arguments(
    image: &GuestImage,
    initrd: &Path,
    append: &str,
    further: &[String],
    directory: &Path,
) -> Vec<OsString> {
    let mut all: Vec<OsString> =
        ["-accel", accelerator(image), "-cpu", "max", "-smp", "2", "-m", "1024", "-nodefaults"]
            .into_iter()
            .chain(["-display", "none", "-no-reboot", "-nic", "none", "-append", append])
            .map(OsString::from)
            .collect();
    all.extend(["-kernel".into(), image.kernel().into(), "-initrd".into(), initrd.into()]);
    all.extend(["-serial".into(), format!("file:{}", directory.join("console.log").display()).into()]);
    all.extend(["-chardev", "stdio,id=agent,signal=off", "-serial", "chardev:agent"].map(OsString::from));
    // QEMU's own record of what it asked of the server, to hold against what the server says.
    all.extend([
        "-trace".into(),
        "nbd_send_request".into(),
        "-D".into(),
        directory.join("qemu.trace").into(),
    ]);
    all.extend(further.iter().map(OsString::from));
    all
}

/// Arguments for QEMU: a drive `vda` on an NBD export, which waits for a server that went away.
pub fn nbd_drive(export: &Export) -> Vec<String> {
    let blockdev = format!(
        "driver=nbd,node-name=vda,server.type=unix,server.path={},export={},reconnect-delay={RECONNECT_DELAY_S}",
        export.socket.display(),
        export.name
    );
    ["-blockdev", &blockdev, "-device", "virtio-blk-pci,drive=vda"].map(str::to_owned).to_vec()
}

/// KVM where it works, found by booting a kernel that has no root and so gives up; else QEMU's own emulation.
pub fn accelerator(image: &GuestImage) -> &'static str {
    static FOUND: OnceLock<&'static str> = OnceLock::new();
    FOUND.get_or_init(|| {
        let mut probe = Command::new("timeout");
        probe
            .args(["--kill-after=1", "20", "qemu-system-x86_64", "-accel", "kvm", "-cpu", "max", "-m", "256"])
            .args(["-nodefaults", "-display", "none", "-no-reboot", "-append", "panic=-1", "-kernel"])
            .arg(image.kernel());
        match run_any(&mut probe) {
            Ok(output) if output.status.success() => "kvm",
            _ => "tcg",
        }
    })
}
