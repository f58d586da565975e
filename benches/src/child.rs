//! Programs under measurement: commands that are run to their end and timed, servers that run beside us.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Seek};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::endpoint::Endpoint;

/// How long a server may take until it listens, and how long to end when asked to.
const PATIENCE: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(2);

/// What a command that ended came to.
#[derive(Debug)]
pub(crate) struct Finished {
    /// From just before its start until it was waited for.
    pub(crate) elapsed: Duration,
    /// The most memory that it, or a child that it waited for, had resident at once, in bytes.
    pub(crate) peak_memory: u64,
    /// How it ended.
    pub(crate) status: ExitStatus,
    /// All that it wrote to stdout.
    pub(crate) stdout: String,
    /// All that it wrote to stderr.
    pub(crate) stderr: String,
}

/// Runs a command to its end. Anything but exit code 0 is an error that carries its last words.
pub(crate) fn run(command: &mut Command) -> Result<Finished> {
    let finished = run_to_any_end(command)?;
    ensure!(
        finished.status.success(),
        "{} ended with {}: {}",
        line(command),
        finished.status,
        last_words(&finished.stderr)
    );
    Ok(finished)
}

/// Runs a command to its end, whatever that is.
pub(crate) fn run_to_any_end(command: &mut Command) -> Result<Finished> {
    // Files rather than pipes: nobody has to read them while it runs.
    let (mut stdout, mut stderr) = (tempfile::tempfile()?, tempfile::tempfile()?);
    command.stdin(Stdio::null()).stdout(stdout.try_clone()?).stderr(stderr.try_clone()?);
    let begin = Instant::now();
    let child = command.spawn().with_context(|| format!("cannot run {}", line(command)))?;
    let (status, peak_memory) = wait_with_usage(child)?;
    let elapsed = begin.elapsed();
    Ok(Finished {
        elapsed,
        peak_memory,
        status,
        stdout: text_of(&mut stdout)?,
        stderr: text_of(&mut stderr)?,
    })
}

/// The command as an argument of another one: `strace -c COMMAND`.
pub(crate) fn below(prefix: &[String], command: Command) -> Command {
    let Some((program, arguments)) = prefix.split_first() else { return command };
    let mut whole = Command::new(program);
    whole.args(arguments).arg(command.get_program()).args(command.get_args());
    whole
}

/// The command as one would type it.
pub(crate) fn line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(shell_word).collect::<Vec<_>>().join(" ")
}

fn shell_word(word: &OsStr) -> String {
    let word = word.to_string_lossy();
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,@%+".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        word.into_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

fn last_words(stderr: &str) -> String {
    let lines: Vec<&str> = stderr.lines().filter(|line| !line.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(4)..].join(" / ")
}

fn text_of(file: &mut File) -> Result<String> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Waits for a child and takes its resource usage, which the standard library does not offer.
fn wait_with_usage(child: Child) -> Result<(ExitStatus, u64)> {
    use std::os::unix::process::ExitStatusExt;
    let pid = libc::pid_t::try_from(child.id()).context("a process id is a pid_t")?;
    let (mut status, mut usage) = (0, std::mem::MaybeUninit::<libc::rusage>::zeroed());
    loop {
        // SAFETY: both pointers are to locals that outlive the call; `child` is owned here and has not been waited
        // for, so the pid is still its own.
        let waited = unsafe { libc::wait4(pid, &raw mut status, 0, usage.as_mut_ptr()) };
        if waited == pid {
            break;
        }
        let error = std::io::Error::last_os_error();
        if error.kind() != std::io::ErrorKind::Interrupted {
            return Err(error).context("cannot wait for a child");
        }
    }
    // SAFETY: zeroes are a valid rusage, and wait4 filled it in.
    let usage = unsafe { usage.assume_init() };
    let kibibytes = u64::try_from(usage.ru_maxrss).unwrap_or(0);
    Ok((ExitStatus::from_raw(status), kibibytes * 1024))
}

/// A program that runs beside us, and is ended when this is dropped.
#[derive(Debug)]
pub(crate) struct Server {
    child: Option<Child>,
    stdout: File,
    stderr: File,
    line: String,
}

impl Server {
    /// Starts it. Its output goes to files that [`Server::stdout`] and [`Server::stderr`] read.
    pub(crate) fn start(command: &mut Command) -> Result<Self> {
        let (stdout, stderr) = (tempfile::tempfile()?, tempfile::tempfile()?);
        command.stdin(Stdio::null()).stdout(stdout.try_clone()?).stderr(stderr.try_clone()?);
        let line = line(command);
        let child = command.spawn().with_context(|| format!("cannot run {line}"))?;
        Ok(Self { child: Some(child), stdout, stderr, line })
    }

    /// Starts it and waits until somebody answers there.
    pub(crate) fn listening(command: &mut Command, at: impl Into<Endpoint>) -> Result<Self> {
        let at = at.into();
        let mut server = Self::start(command)?;
        server.wait_for(|| at.answers(), "listen")?;
        Ok(server)
    }

    /// Waits until `is_so`, as long as the server lives and not for ever.
    pub(crate) fn wait_for(&mut self, mut is_so: impl FnMut() -> bool, what: &str) -> Result<()> {
        let begin = Instant::now();
        while !is_so() {
            if let Some(status) = self.ended()? {
                let stderr = self.stderr()?;
                bail!("{} did not {what} but ended with {status}: {}", self.line, last_words(&stderr));
            }
            ensure!(begin.elapsed() < PATIENCE, "{} did not {what} within {PATIENCE:?}", self.line);
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// Waits until it has written `text` to stderr.
    pub(crate) fn wait_for_text(&mut self, text: &str, what: &str) -> Result<()> {
        let stderr = self.stderr.try_clone()?;
        self.wait_for(|| read_so_far(&stderr).is_ok_and(|said| said.contains(text)), what)
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.as_ref().expect("the child is taken by those who take the server").id()
    }

    /// How it ended, if it did.
    pub(crate) fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.as_mut().expect("the child is taken by those who take the server").try_wait()?)
    }

    /// What it has written to stdout so far.
    pub(crate) fn stdout(&mut self) -> Result<String> {
        read_so_far(&self.stdout)
    }

    /// What it has written to stderr so far.
    pub(crate) fn stderr(&mut self) -> Result<String> {
        read_so_far(&self.stderr)
    }

    /// Waits for its end and hands back all about it; `elapsed` counts from `begin`.
    pub(crate) fn finish(mut self, begin: Instant) -> Result<Finished> {
        let child = self.child.take().expect("the child is taken by those who take the server");
        let (status, peak_memory) = wait_with_usage(child)?;
        let elapsed = begin.elapsed();
        Ok(Finished { elapsed, peak_memory, status, stdout: self.stdout()?, stderr: self.stderr()? })
    }

    /// Asks it to end (SIGTERM) and waits until it has.
    pub(crate) fn terminate(self) -> Result<Finished> {
        self.signal(rustix::process::Signal::TERM)?;
        self.finish(Instant::now())
    }

    /// Ends it at once (SIGKILL) and waits until it has.
    pub(crate) fn kill(self) -> Result<Finished> {
        self.signal(rustix::process::Signal::KILL)?;
        self.finish(Instant::now())
    }

    /// Interrupts it (SIGINT) and waits until it has ended.
    pub(crate) fn interrupt(self) -> Result<Finished> {
        self.signal(rustix::process::Signal::INT)?;
        self.finish(Instant::now())
    }

    fn signal(&self, signal: rustix::process::Signal) -> Result<()> {
        let pid = i32::try_from(self.pid()).ok().and_then(rustix::process::Pid::from_raw);
        let pid = pid.context("a process id is positive")?;
        rustix::process::kill_process(pid, signal).with_context(|| format!("cannot signal {}", self.line))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // Nobody is left to hear of an error here; a child that is gone already is what we want.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn read_so_far(file: &File) -> Result<String> {
    use std::os::unix::fs::FileExt;
    // The child shares our file offset, so read by position.
    let mut bytes = vec![0; usize::try_from(file.metadata()?.len())?];
    let mut filled = 0;
    while filled < bytes.len() {
        match file.read_at(&mut bytes[filled..], filled as u64)? {
            0 => break,
            count => filled += count,
        }
    }
    bytes.truncate(filled);
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// A program of that name on the `PATH`, or at that path.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    if program.contains('/') {
        return Path::new(program).is_file().then(|| program.into());
    }
    std::env::split_paths(&std::env::var_os("PATH")?).map(|dir| dir.join(program)).find(|path| path.is_file())
}

/// The program, or an error that says that it is missing.
pub(crate) fn require(program: &str) -> Result<PathBuf> {
    find(program).with_context(|| format!("{program} is not installed"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_yields_its_output_and_memory() {
        let finished = run(Command::new("sh").args(["-c", "echo out; echo err >&2"])).unwrap();
        assert_eq!((finished.stdout.as_str(), finished.stderr.as_str()), ("out\n", "err\n"));
        assert!(finished.peak_memory > 0);
    }

    #[test]
    fn a_failing_command_is_an_error_with_its_last_words() {
        let error = run(Command::new("sh").args(["-c", "echo no such disk >&2; exit 7"])).unwrap_err();
        let text = format!("{error:#}");
        assert!(text.contains("exit status: 7") && text.contains("no such disk"), "{text}");
    }

    #[test]
    fn a_server_that_ends_instead_of_listening_is_an_error() {
        let nowhere = Path::new("/nonexistent/socket");
        let error = Server::listening(Command::new("sh").args(["-c", "echo taken >&2; exit 1"]), nowhere);
        assert!(format!("{:#}", error.unwrap_err()).contains("taken"));
    }

    #[test]
    fn a_dropped_server_is_gone() {
        let server = Server::start(Command::new("sleep").arg("600")).unwrap();
        let proc = format!("/proc/{}", server.pid());
        assert!(Path::new(&proc).exists());
        drop(server);
        assert!(!Path::new(&proc).exists());
    }

    #[test]
    fn a_command_is_shown_as_one_would_type_it() {
        assert_eq!(line(Command::new("echo").args(["a=b", "it's", ""])), r"echo a=b 'it'\''s' ''");
    }
}
