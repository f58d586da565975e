//! QEMU's monitor: one JSON object a line, on a unix socket. Blocking, with a limit for every answer.
//!
//! Plain values rather than generated types: of a few commands we need a few members each, and a newer QEMU's new members and
//! enum values must not make an answer unreadable.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};
use rustix::process::Pid;
use serde_json::{Value, json};

/// How long the greeting may take: QEMU sends it at once to the one client that it talks to.
const GREETING_PATIENCE: Duration = Duration::from_secs(5);
/// How long an answer may take. A command that waits for the guest's requests may need as long as a slow target.
const ANSWER_PATIENCE: Duration = Duration::from_secs(30);
/// How often whoever waits to be greeted looks whether it still is to wait.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// A longer line is refused. The graph of a machine with hundreds of nodes stays far below.
const MAX_LINE_BYTES: u64 = 16 << 20;

/// Why QEMU did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// There is nobody at the socket.
    #[error("cannot connect to QEMU's monitor at {path}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Somebody is there, and says nothing.
    #[error("QEMU's monitor at {0} does not answer")]
    Silent(PathBuf),
    /// QEMU has ended, or closed the connection.
    #[error("QEMU's monitor at {0} hung up")]
    Gone(PathBuf),
    /// What answers is not QEMU's monitor.
    #[error("what listens at {path} is not QEMU's monitor: {what}")]
    NotQmp {
        /// The socket.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// QEMU refused.
    #[error("QEMU refused {command}: {reason}")]
    Refused {
        /// What it was asked.
        command: String,
        /// Its own words.
        reason: String,
    },
}

impl QmpError {
    /// What to do about it.
    #[must_use]
    pub fn advice(&self) -> &'static str {
        match self {
            Self::Connect { .. } | Self::Gone(_) => {
                "start QEMU with -qmp unix:PATH,server=on,wait=off and name that PATH; it must be the QEMU whose drive is on the export"
            }
            Self::Silent(_) => {
                "a monitor talks to one program at a time: end the other one, or give QEMU another -qmp socket for lifeboot"
            }
            Self::NotQmp { .. } => {
                "name a socket made by QEMU's option -qmp (not -monitor, nor a guest agent's)"
            }
            Self::Refused { .. } => "what QEMU says tells what to change; then run `lifeboot pivot`",
        }
    }

    /// Whether QEMU answered, and so is known to have done nothing.
    #[must_use]
    pub const fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused { .. })
    }
}

/// Something that does what QEMU's monitor does.
pub trait Monitor {
    /// Runs a command and waits for what it returns.
    ///
    /// # Errors
    /// QEMU refuses, says nothing, or is gone. After anything but a refusal nothing more can be asked of this one.
    fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError>;

    /// QEMU's process, where that can be told.
    fn process(&self) -> Option<u32>;

    /// Waits for a moment between two questions.
    fn pause(&mut self) {
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A connection to a monitor, past its greeting.
#[derive(Debug)]
pub struct Qmp {
    path: PathBuf,
    stream: BufReader<UnixStream>,
    process: Option<u32>,
    next_id: u64,
    /// Once an answer did not come, which may come when it is that of another question: what is said of each further question.
    dead: Option<fn(PathBuf) -> QmpError>,
}

impl Qmp {
    /// Connects, and leaves the greeting behind. It stops waiting for that once `gives_up` says so: then the monitor is silent.
    ///
    /// # Errors
    /// As [`QmpError`] has them.
    pub fn connect(path: &Path, gives_up: &dyn Fn() -> bool) -> Result<Self, QmpError> {
        let deadline = Instant::now() + GREETING_PATIENCE;
        let stream = loop {
            match try_connect(path) {
                Ok(Some(stream)) => break stream,
                Ok(None) if Instant::now() >= deadline || gives_up() => {
                    return Err(QmpError::Silent(path.to_owned()));
                }
                Ok(None) => std::thread::sleep(LOOK_INTERVAL),
                Err(source) => return Err(QmpError::Connect { path: path.to_owned(), source }),
            }
        };
        // Who called `listen`. It cannot be told across some namespaces.
        let process = socket_peercred(&stream).ok().map(|peer| Pid::as_raw(Some(peer.pid)));
        let process = process.and_then(|pid| u32::try_from(pid).ok()).filter(|&pid| pid != 0);
        let mut qmp =
            Self { path: path.to_owned(), stream: BufReader::new(stream), process, next_id: 0, dead: None };
        let greeting = qmp.line(deadline, gives_up)?;
        if greeting.get("QMP").is_none() {
            return Err(qmp.not_qmp(format!("it greets with {}", shortened(&greeting.to_string()))));
        }
        // It waits for nothing, unless QEMU's main loop does.
        qmp.exchange("qmp_capabilities", &json!({}), GREETING_PATIENCE, gives_up)?;
        Ok(qmp)
    }

    fn line(&mut self, deadline: Instant, gives_up: &dyn Fn() -> bool) -> Result<Value, QmpError> {
        let mut line = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now()).min(LOOK_INTERVAL);
            if left.is_zero() && !line.is_empty() {
                // An NBD server greets, and then waits.
                return Err(self.not_qmp(format!("it says {}", shortened(&String::from_utf8_lossy(&line)))));
            }
            if left.is_zero() || gives_up() {
                return Err(QmpError::Silent(self.path.clone()));
            }
            let gone = |_| QmpError::Gone(self.path.clone());
            self.stream.get_ref().set_read_timeout(Some(left)).map_err(gone)?;
            let room = MAX_LINE_BYTES.saturating_sub(line.len() as u64);
            match (&mut self.stream).take(room).read_until(b'\n', &mut line) {
                // What came before a timeout stays in `line`.
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
                    ) => {}
                Err(error) => return Err(gone(error)),
                Ok(0) if room == 0 => return Err(self.not_qmp("its line has no end".to_owned())),
                Ok(0) => return Err(QmpError::Gone(self.path.clone())),
                Ok(_) if line.ends_with(b"\n") => {
                    return serde_json::from_slice(&line).map_err(|_| {
                        self.not_qmp(format!("it says {}", shortened(&String::from_utf8_lossy(&line))))
                    });
                }
                Ok(_) => {}
            }
        }
    }

    fn not_qmp(&self, what: String) -> QmpError {
        QmpError::NotQmp { path: self.path.clone(), what }
    }
}

impl Monitor for Qmp {
    fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        if let Some(dead) = self.dead {
            return Err(dead(self.path.clone()));
        }
        // What QEMU does meanwhile is not undone by not hearing of it.
        let answer = self.exchange(command, &arguments, ANSWER_PATIENCE, &|| false);
        self.dead = match &answer {
            Ok(_) | Err(QmpError::Refused { .. }) => None,
            Err(QmpError::Silent(_)) => Some(QmpError::Silent),
            Err(_) => Some(QmpError::Gone),
        };
        answer
    }

    fn process(&self) -> Option<u32> {
        self.process
    }
}

impl Qmp {
    fn exchange(
        &mut self,
        command: &str,
        arguments: &Value,
        patience: Duration,
        gives_up: &dyn Fn() -> bool,
    ) -> Result<Value, QmpError> {
        self.next_id += 1;
        let id = self.next_id;
        let request = json!({ "execute": command, "arguments": arguments, "id": id });
        tracing::debug!(%request, "to QEMU");
        let text = format!("{request}\n");
        let stream = self.stream.get_mut();
        if stream.set_write_timeout(Some(patience)).and_then(|()| stream.write_all(text.as_bytes())).is_err()
        {
            return Err(QmpError::Gone(self.path.clone()));
        }
        let deadline = Instant::now() + patience;
        loop {
            let mut answer = self.line(deadline, gives_up)?;
            tracing::debug!(%answer, "from QEMU");
            if answer["id"] != id {
                // An event, or the answer to a question of nobody's.
                continue;
            }
            if let Some(error) = answer.get("error") {
                let reason = error["desc"].as_str().map_or_else(|| error.to_string(), str::to_owned);
                return Err(QmpError::Refused { command: command.to_owned(), reason });
            }
            return Ok(answer["return"].take());
        }
    }
}

/// Whether somebody listens at this socket. Where it is a monitor that talks to nobody, it takes the next client once this one is
/// gone.
pub fn is_there(path: &Path) -> bool {
    try_connect(path).is_ok()
}

/// A stream to the socket at `path`, `None` while too many wait there: a monitor that talks to one has room for one more, and whoever
/// connected with a stream that blocks would wait for as long as it talks.
fn try_connect(path: &Path) -> io::Result<Option<UnixStream>> {
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    match rustix::net::connect(&socket, &address) {
        Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
        connected => connected?,
    }
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(Some(stream))
}

fn shortened(text: &str) -> String {
    const SHOWN: usize = 80;
    let text = text.trim();
    let mut shown: String = text.chars().take(SHOWN).collect();
    if shown.len() < text.len() {
        shown.push('…');
    }
    format!("{shown:?}")
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    /// Answers one client with these lines, each after a line of the client's but the first.
    fn answering(
        lines: &'static [&'static str],
    ) -> (tempfile::TempDir, PathBuf, std::thread::JoinHandle<()>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        let thread = std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut reader = BufReader::new(stream);
            for (number, line) in lines.iter().enumerate() {
                if number > 0 && reader.read_line(&mut String::new()).unwrap() == 0 {
                    return;
                }
                reader.get_mut().write_all(line.as_bytes()).unwrap();
            }
        });
        (dir, path, thread)
    }

    const GREETING: &str = "{\"QMP\": {\"version\": {}, \"capabilities\": []}}\n";

    #[test]
    fn events_and_old_answers_are_passed_over_and_refusals_keep_qemus_words() {
        let (_dir, path, thread) = answering(&[
            GREETING,
            "{\"return\": {}, \"id\": 1}\n",
            "{\"event\": \"STOP\"}\n{\"return\": 7, \"id\": 1}\n{\"return\": 8, \"id\": 2}\n",
            "{\"error\": {\"class\": \"GenericError\", \"desc\": \"no such node\"}, \"id\": 3}\n",
        ]);
        let mut qmp = Qmp::connect(&path, &|| false).unwrap();
        assert_eq!(qmp.process(), Some(std::process::id()));
        assert_eq!(qmp.execute("a", json!({})).unwrap(), 8);
        let error = qmp.execute("blockdev-del", json!({})).unwrap_err();
        assert!(error.is_refusal());
        assert_eq!(error.to_string(), "QEMU refused blockdev-del: no such node");
        thread.join().unwrap();
        let error = qmp.execute("b", json!({})).unwrap_err();
        assert!(matches!(error, QmpError::Gone(_)), "{error}");
    }

    #[test]
    fn nobody_waits_for_a_monitor_longer_than_is_wanted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        // Connected, and not greeted.
        let error = Qmp::connect(&path, &|| true).unwrap_err();
        assert!(matches!(error, QmpError::Silent(_)), "{error}");
        // There is no room for one more.
        let mut waiting = Vec::new();
        while let Some(stream) = try_connect(&path).unwrap() {
            waiting.push(stream);
        }
        let error = Qmp::connect(&path, &|| true).unwrap_err();
        assert!(matches!(error, QmpError::Silent(_)), "{error}");
        assert!(is_there(&path));
        drop(listener);
        assert!(!is_there(&path));
    }

    #[test]
    fn what_is_not_a_monitor_is_told_from_one_that_is_away() {
        let (_dir, path, thread) = answering(&["{\"hello\": 1}\n"]);
        assert!(matches!(Qmp::connect(&path, &|| false).unwrap_err(), QmpError::NotQmp { .. }));
        thread.join().unwrap();
        let (_dir, path, thread) = answering(&["(qemu) \n"]);
        assert!(matches!(Qmp::connect(&path, &|| false).unwrap_err(), QmpError::NotQmp { .. }));
        thread.join().unwrap();
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(Qmp::connect(&path, &|| false).unwrap_err(), QmpError::Connect { .. }));
    }
}
