//! Child processes that never outlive the test: started, read line by line, killed by their id.

use std::fmt;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

/// How long anything that a test waits for may take. It orders nothing: who waits so long has failed.
pub const PATIENCE: Duration = Duration::from_secs(600);
/// How long the last words of a child that ended are waited for.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// How many lines of a child's output an error shows.
const LINES_SHOWN: usize = 30;

/// A running child with its output. Dropping it kills it and waits until it is gone.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    stdin: Option<ChildStdin>,
    output: Arc<Lines>,
    /// The first line that [`Process::wait_for`] has not looked at.
    cursor: usize,
}

/// What a child has printed so far, on stdout and stderr together.
#[derive(Debug, Default)]
struct Lines {
    state: Mutex<LinesState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct LinesState {
    lines: Vec<String>,
    open_streams: u32,
}

impl Process {
    /// Starts `command` with its output read by threads of its own. The kernel kills it should this process, or the
    /// thread that calls, end first.
    pub fn spawn(command: &Command) -> Result<Self> {
        let mut wrapped = tied_to_us(command);
        let mut child = wrapped
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", show(command)))?;
        let output = Arc::new(Lines::default());
        output.lock().open_streams = 2;
        follow(child.stdout.take().context("a child without stdout")?, Arc::clone(&output));
        follow(child.stderr.take().context("a child without stderr")?, Arc::clone(&output));
        let stdin = child.stdin.take();
        Ok(Self {
            name: command.get_program().to_string_lossy().into_owned(),
            child,
            stdin,
            output,
            cursor: 0,
        })
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Writes one line to its stdin.
    pub fn write_line(&mut self, line: &str) -> Result<()> {
        let stdin = self.stdin.as_mut().context("its stdin is closed")?;
        stdin
            .write_all(format!("{line}\n").as_bytes())
            .and_then(|()| stdin.flush())
            .with_context(|| format!("cannot write to {self}"))
    }

    /// Has [`Process::wait_for`] look only at what is printed from now on.
    pub fn skip_output(&mut self) {
        self.cursor = self.output.lock().lines.len();
    }

    /// Has [`Process::wait_for`] look at all that was ever printed: for what may come before or after what was waited for.
    pub fn reread_output(&mut self) {
        self.cursor = 0;
    }

    /// Everything that it has printed so far.
    pub fn lines(&self) -> Vec<String> {
        self.output.lock().lines.clone()
    }

    /// Waits for the first line after the last one waited for, for which `pick` returns something.
    ///
    /// # Errors
    /// The child closed its output or [`PATIENCE`] ended before; the error shows its last lines.
    pub fn wait_for<T>(&mut self, what: &str, pick: impl FnMut(&str) -> Option<T>) -> Result<T> {
        let found = self.wait_for_within(PATIENCE, what, pick)?;
        found.with_context(|| format!("{self}: waited too long for {what}\n{}", tail(&self.lines())))
    }

    /// As [`Process::wait_for`], for those who look after something else when `limit` is over.
    ///
    /// # Errors
    /// The child closed its output.
    pub fn wait_for_within<T>(
        &mut self,
        limit: Duration,
        what: &str,
        mut pick: impl FnMut(&str) -> Option<T>,
    ) -> Result<Option<T>> {
        let deadline = Instant::now() + limit;
        let mut state = self.output.lock();
        loop {
            while let Some(line) = state.lines.get(self.cursor) {
                self.cursor += 1;
                if let Some(found) = pick(line) {
                    return Ok(Some(found));
                }
            }
            ensure!(state.open_streams > 0, "{self} ended before {what}\n{}", tail(&state.lines));
            let Some(left) = deadline.checked_duration_since(Instant::now()) else { return Ok(None) };
            state = self.output.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits for a line that contains `text` and returns it.
    ///
    /// # Errors
    /// As for [`Process::wait_for`].
    pub fn wait_for_text(&mut self, text: &str) -> Result<String> {
        self.wait_for(&format!("{text:?}"), |line| line.contains(text).then(|| line.to_owned()))
    }

    /// True while it runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// It still runs after [`PATIENCE`].
    pub fn wait(&mut self) -> Result<ExitStatus> {
        self.stdin = None;
        let status = self.wait_for_end()?;
        // Its last words may still be on their way; a child of its own may hold them open for ever.
        let deadline = Instant::now() + LAST_WORDS;
        let mut state = self.output.lock();
        while state.open_streams > 0
            && let Some(left) = deadline.checked_duration_since(Instant::now())
        {
            state = self.output.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(status)
    }

    fn wait_for_end(&mut self) -> Result<ExitStatus> {
        if let Some(status) = self.child.try_wait()? {
            return Ok(status);
        }
        let pidfd = pidfd_open(self.pid()?, PidfdFlags::empty())?;
        let limit = Timespec { tv_sec: PATIENCE.as_secs().cast_signed(), tv_nsec: 0 };
        let ended = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&limit))?;
        ensure!(ended == 1, "{self} does not end\n{}", tail(&self.lines()));
        Ok(self.child.wait()?)
    }

    /// Waits for its end and demands exit code 0.
    ///
    /// # Errors
    /// As for [`Process::wait`], and any other end; the error shows its last lines.
    pub fn wait_success(&mut self) -> Result<()> {
        let status = self.wait()?;
        ensure!(status.success(), "{self} ended with {status}\n{}", tail(&self.lines()));
        Ok(())
    }

    /// `kill -9`, and waits until it is gone.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill().with_context(|| format!("cannot kill {self}"))?;
        self.wait().map(|_| ())
    }

    /// Sends SIGTERM and waits for the end.
    pub fn terminate(&mut self) -> Result<ExitStatus> {
        self.signal(Signal::TERM)?;
        self.wait()
    }

    /// Sends `signal`.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill_process(self.pid()?, signal).with_context(|| format!("cannot signal {self}"))
    }

    fn pid(&self) -> Result<Pid> {
        Pid::from_raw(self.child.id().cast_signed()).context("a child has a process id")
    }
}

impl fmt::Display for Process {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} (pid {})", self.name, self.child.id())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only where it has ended and was waited for already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs `command` to its end and demands exit code 0; returns what it printed on stdout.
///
/// # Errors
/// It cannot be started, or ended otherwise; the error shows the command and its output.
pub fn run(command: &mut Command) -> Result<String> {
    let output = run_any(command)?;
    ensure!(
        output.status.success(),
        "{} ended with {}\n{}{}",
        show(command),
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs `command` to its end, whatever that is.
///
/// # Errors
/// It cannot be started.
pub fn run_any(command: &mut Command) -> Result<Output> {
    let mut wrapped = tied_to_us(command);
    wrapped.stdin(Stdio::null()).output().with_context(|| format!("cannot start {}", show(command)))
}

/// Demands that `command` ends with this code, and says all of `words` on stderr.
///
/// # Panics
/// Where it does not, or cannot be started.
#[track_caller]
pub fn ends(command: &mut Command, code: i32, words: &[&str]) {
    let output = run_any(command).expect("it can be started");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{said}");
    for word in words {
        assert!(said.contains(word), "it lacks {word:?}: {said}");
    }
}

/// Runs `command`, demands success and parses its stdout as one JSON document.
///
/// # Errors
/// As for [`run`], and stdout that is not JSON.
pub fn run_json(command: &mut Command) -> Result<serde_json::Value> {
    let text = run(command)?;
    serde_json::from_str(&text).with_context(|| format!("{} printed no JSON: {text}", show(command)))
}

/// The same command, killed by the kernel when the thread that starts it ends.
fn tied_to_us(command: &Command) -> Command {
    let mut wrapped = Command::new("setpriv");
    wrapped.args(["--pdeathsig", "KILL", "--"]).arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => wrapped.env(name, value),
            None => wrapped.env_remove(name),
        };
    }
    if let Some(directory) = command.get_current_dir() {
        wrapped.current_dir(directory);
    }
    wrapped
}

/// Reads `stream` to its end on a thread of its own.
fn follow(stream: impl Read + Send + 'static, output: Arc<Lines>) {
    thread::spawn(move || {
        let mut reader = BufReader::new(stream);
        let mut line = Vec::new();
        // A read error is the end of the stream as well: the child is gone.
        while reader.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            output.lock().lines.push(text);
            output.changed.notify_all();
            line.clear();
        }
        output.lock().open_streams -= 1;
        output.changed.notify_all();
    });
}

impl Lines {
    fn lock(&self) -> MutexGuard<'_, LinesState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn tail(lines: &[String]) -> String {
    lines[lines.len().saturating_sub(LINES_SHOWN)..].join("\n")
}

fn show(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}
