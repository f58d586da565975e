//! Lifeboot's own programs, by their command line.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::nbd::Export;
use crate::process::{Process, run, run_any};
use crate::programs;

/// `lifeboot` with `arguments`.
///
/// # Errors
/// It is not built.
pub fn lifeboot<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Result<Command> {
    let mut command = programs::ours("lifeboot")?;
    command.args(arguments).env_remove("LIFEBOOT_REPO");
    Ok(command)
}

/// A repository in a directory.
#[derive(Debug, Clone)]
pub struct Repository {
    path: PathBuf,
}

impl Repository {
    /// `lifeboot init`.
    ///
    /// # Errors
    /// Anything that it says.
    pub fn init(path: PathBuf) -> Result<Self> {
        let repository = Self { path };
        run(&mut repository.verb("init", &[])?)?;
        Ok(repository)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `lifeboot VERB -r REPO` and `arguments`.
    ///
    /// # Errors
    /// Lifeboot is not built.
    pub fn verb(&self, verb: &str, arguments: &[&str]) -> Result<Command> {
        let mut command = lifeboot([verb, "-r"])?;
        command.arg(&self.path).args(arguments);
        Ok(command)
    }

    /// `lifeboot capture`: a snapshot of `disk` in `group`.
    ///
    /// # Errors
    /// Anything that it says.
    pub fn capture(&self, group: &str, disk: &Path) -> Result<()> {
        run(self.verb("capture", &["-q", group])?.arg(disk)).map(|_| ())
    }

    /// `lifeboot restore`: the only disk of `snapshot` to `target`.
    ///
    /// # Errors
    /// Anything that it says.
    pub fn restore(&self, snapshot: &str, target: &Path) -> Result<()> {
        run(self.verb("restore", &["-q", snapshot])?.arg(target)).map(|_| ())
    }

    /// `lifeboot verify`: demands that nothing is damaged.
    ///
    /// # Errors
    /// Anything that it says.
    pub fn verify(&self) -> Result<()> {
        run(&mut self.verb("verify", &["-q"])?).map(|_| ())
    }

    /// `lifeboot serve` of `arguments`, when it listens at `socket`.
    ///
    /// # Errors
    /// It ended before.
    pub fn serve(&self, arguments: &[&str], socket: &Path) -> Result<Process> {
        let mut command = self.verb("serve", arguments)?;
        command.arg("--listen").arg(unix(socket));
        let mut process = Process::spawn(&command)?;
        wait_listening(&mut process, socket)?;
        Ok(process)
    }
}

/// A `lifeboot live-restore` that runs, and what is needed to start it again.
#[derive(Debug)]
pub struct LiveRestore {
    arguments: Arguments,
    process: Process,
    ready: Value,
    start_time: Duration,
}

#[derive(Debug, Clone)]
struct Arguments {
    repository: Repository,
    snapshot: String,
    target: PathBuf,
    socket: PathBuf,
    further: Vec<String>,
}

impl Arguments {
    /// The same with `--take-over`.
    fn taking_over(&self) -> Self {
        let mut arguments = self.clone();
        if !arguments.further.iter().any(|argument| argument == "--take-over") {
            arguments.further.push("--take-over".to_owned());
        }
        arguments
    }

    fn command(&self) -> Result<Command> {
        let mut command = self.repository.verb("live-restore", &["--json", &self.snapshot])?;
        command.arg(&self.target).arg("--listen").arg(unix(&self.socket)).args(&self.further);
        Ok(command)
    }
}

impl LiveRestore {
    /// Starts the restore of the only disk of `snapshot` onto `target`, served at `socket`, and waits until it is
    /// ready.
    ///
    /// # Errors
    /// It ended before it was ready.
    pub fn start(
        repository: &Repository,
        snapshot: &str,
        target: &Path,
        socket: &Path,
        further: &[&str],
    ) -> Result<Self> {
        Self::launch(Arguments {
            repository: repository.clone(),
            snapshot: snapshot.to_owned(),
            target: target.to_owned(),
            socket: socket.to_owned(),
            further: further.iter().map(|&argument| argument.to_owned()).collect(),
        })
    }

    fn launch(arguments: Arguments) -> Result<Self> {
        let began = Instant::now();
        let mut process = Process::spawn(&arguments.command()?)?;
        let ready = process.wait_for("its event `ready`", |line| event(line, "ready"))?;
        Ok(Self { arguments, process, ready, start_time: began.elapsed() })
    }

    /// The export.
    pub fn export(&self) -> Export {
        Export::first(&self.arguments.socket)
    }

    /// How long the latest start took until it was ready.
    pub fn start_time(&self) -> Duration {
        self.start_time
    }

    /// The arguments for QEMU that it printed.
    ///
    /// # Errors
    /// It printed none.
    pub fn qemu_arguments(&self) -> Result<Vec<String>> {
        let arguments = self.ready["qemu"].as_array().context("the event `ready` has QEMU's arguments")?;
        arguments.iter().map(|one| one.as_str().map(str::to_owned).context("an argument is text")).collect()
    }

    /// Its event `ready`.
    pub fn ready(&self) -> &Value {
        &self.ready
    }

    /// Waits until every block is home, and returns the event `complete`.
    ///
    /// # Errors
    /// It ended before.
    pub fn wait_complete(&mut self) -> Result<Value> {
        self.process.wait_for("its event `complete`", |line| event(line, "complete"))
    }

    /// Waits for the next event that it prints, or until `limit` is over.
    ///
    /// # Errors
    /// It ended.
    pub fn wait_report_within(&mut self, limit: Duration) -> Result<()> {
        self.process
            .wait_for_within(limit, "an event", |line| line.starts_with('{').then_some(()))
            .map(|_| ())
    }

    /// True where some event `complete` was printed.
    pub fn is_complete(&self) -> bool {
        self.process.lines().iter().any(|line| event(line, "complete").is_some())
    }

    /// `kill -9`, then the same command again: returns when it is ready.
    ///
    /// # Errors
    /// It does not become ready.
    pub fn kill_and_restart(self) -> Result<Self> {
        self.kill()?.start_again()
    }

    /// `kill -9`.
    ///
    /// # Errors
    /// It had ended by itself and badly.
    pub fn kill(mut self) -> Result<Stopped> {
        self.process.kill()?;
        Ok(Stopped(self.arguments))
    }

    /// SIGTERM, which parks the session; returns how it ended too.
    ///
    /// # Errors
    /// It does not end.
    pub fn park(mut self) -> Result<(Stopped, ExitStatus)> {
        let status = self.process.terminate()?;
        Ok((Stopped(self.arguments), status))
    }

    /// The same command with `--take-over`, while this one runs: returns when the new one is ready, and this one has ended well.
    ///
    /// # Errors
    /// One of them ended badly, or the new one does not become ready.
    pub fn take_over(mut self) -> Result<Self> {
        let heir = Self::launch(self.arguments.taking_over())?;
        self.process.wait_success()?;
        let said = self.process.lines().iter().any(|line| event(line, "taken_over").is_some());
        anyhow::ensure!(said, "the old agent did not say that it handed over");
        Ok(heir)
    }

    /// The same command with `--take-over`, while this one parks: returns when the new one is ready.
    ///
    /// # Errors
    /// As [`Self::take_over`].
    pub fn take_over_while_it_parks(mut self) -> Result<Self> {
        self.process.signal(rustix::process::Signal::TERM)?;
        let heir = Self::launch(self.arguments.taking_over())?;
        self.process.wait_success()?;
        Ok(heir)
    }

    /// The same command with these arguments in addition, to be run to its end.
    ///
    /// # Errors
    /// Lifeboot is not built.
    pub fn command_with(&self, further: &[&str]) -> Result<Command> {
        let mut command = self.arguments.command()?;
        command.args(further);
        Ok(command)
    }

    /// The process, for its output and its end.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }
}

/// A live-restore that does not run at the moment.
#[derive(Debug)]
pub struct Stopped(Arguments);

impl Stopped {
    /// The same command, to be run to its end.
    ///
    /// # Errors
    /// Lifeboot is not built.
    pub fn command(&self) -> Result<Command> {
        self.0.command()
    }

    /// Leaves the session as it stands when the host has gone down meanwhile: of the live file nothing is believed, and
    /// the kernel that it was served under is not this one.
    ///
    /// # Errors
    /// There is no session.
    pub fn after_power_cut(self) -> Result<Self> {
        let mut state = self.0.target.clone().into_os_string();
        state.push(".lifeboot");
        let state = PathBuf::from(state);
        std::fs::remove_file(state.join("live")).context("the live file")?;
        let record = state.join("session.json");
        let mut value: Value = serde_json::from_slice(&std::fs::read(&record)?)?;
        value["boot"] = "0123456789abcdef0123456789abcdef".into();
        std::fs::write(&record, value.to_string())?;
        Ok(self)
    }

    /// The same command again: returns when it is ready.
    ///
    /// # Errors
    /// It ended before it was ready.
    pub fn start_again(self) -> Result<LiveRestore> {
        LiveRestore::launch(self.0)
    }

    /// The same command with these further arguments instead of those that it had.
    ///
    /// # Errors
    /// It ended before it was ready.
    pub fn start_with(mut self, further: &[&str]) -> Result<LiveRestore> {
        self.0.further = further.iter().map(|&argument| argument.to_owned()).collect();
        LiveRestore::launch(self.0)
    }
}

/// `lifeboot-nbd` on the raw file `disk`, when it listens at `socket`.
///
/// # Errors
/// It ended before.
pub fn serve_raw(disk: &Path, socket: &Path, further: &[&str]) -> Result<Process> {
    let mut command = programs::ours("lifeboot-nbd")?;
    command.arg(disk).arg("--listen").arg(unix(socket)).args(further);
    let mut process = Process::spawn(&command)?;
    wait_listening(&mut process, socket)?;
    Ok(process)
}

/// What `lifeboot status` says of the live-restore onto `target`, damage included.
///
/// # Errors
/// It ended with another code than 0, or 3 for damage, or printed no JSON.
pub fn status(target: &Path) -> Result<Value> {
    status_with(target, &[])
}

/// The same with further arguments.
///
/// # Errors
/// As [`status`].
pub fn status_with(target: &Path, further: &[&str]) -> Result<Value> {
    let output = run_any(lifeboot(["status", "--json"])?.args(further).arg(target))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(matches!(output.status.code(), Some(0 | 3)), "status ended with {}: {said}", output.status);
    serde_json::from_slice(&output.stdout).context("the status is JSON")
}

/// Waits for the line in which a server names the socket that it listens at, which it prints when it does.
fn wait_listening(process: &mut Process, socket: &Path) -> Result<()> {
    process.wait_for_text(&socket.display().to_string()).map(|_| ())
}

/// `line` as JSON, if it is the event `name`.
fn event(line: &str, name: &str) -> Option<Value> {
    let value: Value = serde_json::from_str(line).ok()?;
    (value["event"] == name).then_some(value)
}

fn unix(socket: &Path) -> String {
    format!("unix:{}", socket.display())
}
