//! QEMU's program: whether it is there, which of its arguments we choose, and whether it can use KVM here.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::cannot_start;
use crate::cli::Failure;

/// How long a processor under KVM may take to execute three instructions.
const PROBE_PATIENCE: Duration = Duration::from_secs(10);
/// What the probe's firmware writes to QEMU's exit port; QEMU ends with twice that and one.
const PROBE_VALUE: u8 = 0x10;
const PROBE_CODE: i32 = (PROBE_VALUE as i32) << 1 | 1;

/// QEMU's emulator of this machine's architecture.
pub(super) const fn default_program() -> &'static str {
    if cfg!(target_arch = "aarch64") { "qemu-system-aarch64" } else { "qemu-system-x86_64" }
}

/// The program, once it has said that it is QEMU.
pub(super) fn check(program: &Path) -> anyhow::Result<PathBuf> {
    let output = Command::new(program).arg("--version").stdin(Stdio::null()).output();
    let output = output.map_err(|error| cannot_start(program, error))?;
    let said = String::from_utf8_lossy(&output.stdout);
    if output.status.success() && said.starts_with("QEMU") {
        return Ok(program.to_owned());
    }
    let errors = String::from_utf8_lossy(&output.stderr);
    Err(Failure::new(
        format!(
            "{} is not QEMU: {}",
            program.display(),
            errors.lines().chain(said.lines()).next().unwrap_or("it says nothing")
        ),
        "name QEMU's system emulator with --qemu",
    )
    .into())
}

/// An argument that makes it impossible to stay as QEMU's parent.
pub(super) fn argument_that_cannot_be(arguments: &[OsString]) -> Option<String> {
    let is_one = |argument: &&OsString| matches!(argument.to_str(), Some("-daemonize" | "--daemonize"));
    arguments.iter().find(is_one).map(|argument| argument.to_string_lossy().into_owned())
}

/// The accelerator that we choose; `None` where QEMU's arguments do.
pub(super) fn accelerator(program: &Path, arguments: &[OsString], scratch: &Path) -> Option<&'static str> {
    if chooses_accelerator(arguments) {
        return None;
    }
    let can = Path::new("/dev/kvm").exists() && executes(program, "kvm", scratch);
    Some(if can { "kvm" } else { "tcg" })
}

fn chooses_accelerator(arguments: &[OsString]) -> bool {
    let name = |argument: &OsStr| argument.to_str().map(|text| text.trim_start_matches('-').to_owned());
    let is_option = |argument: &OsStr| argument.as_encoded_bytes().starts_with(b"-");
    arguments.iter().enumerate().any(|(index, argument)| {
        if !is_option(argument) {
            return false;
        }
        match name(argument).as_deref() {
            Some("accel" | "enable-kvm" | "readconfig") => true,
            Some("machine" | "M") => {
                let machine = arguments.get(index + 1).map(|machine| machine.to_string_lossy());
                machine.is_some_and(|machine| machine.split(',').any(|part| part.starts_with("accel=")))
            }
            _ => false,
        }
    })
}

/// Whether a processor under this accelerator executes code: some machines have `/dev/kvm`, let QEMU open it, and then fail.
fn executes(program: &Path, accelerator: &str, scratch: &Path) -> bool {
    if !cfg!(target_arch = "x86_64") {
        return true;
    }
    let firmware = scratch.join("probe.bin");
    if std::fs::write(&firmware, probe()).is_err() {
        return false;
    }
    let child = Command::new(program)
        .args(["-accel", accelerator, "-m", "16", "-nodefaults", "-display", "none", "-no-reboot"])
        .args([
            "-serial",
            "none",
            "-monitor",
            "none",
            "-device",
            "isa-debug-exit,iobase=0xf4,iosize=1",
            "-bios",
        ])
        .arg(&firmware)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let Ok(mut child) = child else { return false };
    let deadline = Instant::now() + PROBE_PATIENCE;
    let code = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status.code(),
            Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
            _ => {
                // It has ended by itself, or does now.
                let _ = child.kill();
                let _ = child.wait();
                break None;
            }
        }
    };
    // What is left in the directory of the sockets does no harm.
    let _ = std::fs::remove_file(&firmware);
    code == Some(PROBE_CODE)
}

/// A firmware that ends QEMU: `mov al, VALUE; out 0xf4, al; hlt`, where an x86 processor begins, 16 bytes before the end.
fn probe() -> Vec<u8> {
    let mut firmware = vec![0xf4; 64 << 10];
    let start = firmware.len() - 16;
    firmware[start..start + 5].copy_from_slice(&[0xb0, PROBE_VALUE, 0xe6, 0xf4, 0xf4]);
    firmware
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<OsString> {
        line.split(' ').map(OsString::from).collect()
    }

    #[test]
    fn an_accelerator_that_the_user_chose_is_left_alone() {
        for line in
            ["-accel tcg", "-m 1G -enable-kvm", "-machine q35,accel=kvm:tcg", "-M accel=tcg", "--accel kvm"]
        {
            assert!(chooses_accelerator(&words(line)), "{line}");
        }
        for line in ["-m 1G", "-machine q35", "-name accel=tcg", "-append accel"] {
            assert!(!chooses_accelerator(&words(line)), "{line}");
        }
        assert!(argument_that_cannot_be(&words("-m 1G -daemonize")).is_some());
    }

    #[test]
    fn a_processor_that_executes_is_told_from_none() {
        let Ok(program) = check(Path::new(default_program())) else { return };
        let dir = tempfile::tempdir().unwrap();
        assert!(executes(&program, "tcg", dir.path()));
        assert!(!executes(&program, "no-such-accelerator", dir.path()));
        assert!(check(Path::new("/bin/false")).is_err());
        assert!(check(Path::new("/no/such/program")).is_err());
    }
}
