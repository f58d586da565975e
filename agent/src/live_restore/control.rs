//! Answers `lifeboot status` from another terminal: a unix socket in the session's directory. Whoever
//! connects is sent the status as one JSON document, and the connection is closed.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::io::AsyncWriteExt as _;
use tokio::net::UnixListener;

use crate::status::Status;

const SOCKET: &str = "status.sock";
/// How long either side waits for the other: a status is a few hundred bytes from memory.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long it waits after it could not accept.
const PAUSE: Duration = Duration::from_millis(50);
/// A status is refused when it is longer than this.
const MAX_STATUS_BYTES: u64 = 4 << 20;

/// The listening end. The socket's file goes when it is dropped.
#[derive(Debug)]
pub(super) struct Control {
    listener: UnixListener,
    path: PathBuf,
}

/// The path of the socket through a descriptor of its directory: a unix socket's address holds 108
/// bytes, and a target's path may be longer.
fn short_path(dir: &Path) -> io::Result<(File, PathBuf)> {
    let dir = File::open(dir)?;
    let path = PathBuf::from(format!("/proc/self/fd/{}/{SOCKET}", dir.as_raw_fd()));
    Ok((dir, path))
}

impl Control {
    /// Listens in `dir`. The caller holds the session's lock, so a socket that is there is a dead agent's.
    ///
    /// # Errors
    /// What the operating system says.
    pub(super) fn listen(dir: &Path) -> io::Result<Self> {
        let (_dir, short) = short_path(dir)?;
        match std::fs::remove_file(&short) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&short)?;
        Ok(Self { listener, path: dir.join(SOCKET) })
    }

    /// Waits for the next who asks.
    pub(super) async fn accept(&self) -> tokio::net::UnixStream {
        patiently(async || self.listener.accept().await.map(|(stream, _)| stream)).await
    }

    /// Answers one who asked; whoever does not read is left alone after a while.
    pub(super) async fn answer(mut stream: tokio::net::UnixStream, status: Status) {
        let Ok(text) = serde_json::to_vec(&status) else { return };
        let _ = tokio::time::timeout(PATIENCE, async {
            stream.write_all(&text).await?;
            stream.shutdown().await
        })
        .await;
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        // A successor removes what is left here.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Tries until it succeeds. What fails now (there are too many open files, say) fails at once again, so this waits a
/// little before it tries again.
async fn patiently<T>(mut attempt: impl AsyncFnMut() -> io::Result<T>) -> T {
    loop {
        match attempt().await {
            Ok(done) => return done,
            Err(error) => tracing::debug!(%error, "nobody who asks can be answered just now"),
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Asks the agent of a session's directory; `None` where no agent runs.
///
/// # Errors
/// Where an agent is there and does not answer.
pub fn ask(dir: &Path) -> io::Result<Option<Status>> {
    let none = |error: &io::Error| {
        matches!(
            error.kind(),
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused | io::ErrorKind::NotADirectory
        )
    };
    let connect = || {
        let (_dir, short) = short_path(dir)?;
        UnixStream::connect(short)
    };
    let mut stream = match connect() {
        Ok(stream) => stream,
        Err(error) if none(&error) => return Ok(None),
        Err(error) => return Err(error),
    };
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut text = Vec::new();
    (&mut stream).take(MAX_STATUS_BYTES).read_to_end(&mut text)?;
    if text.is_empty() {
        // It ended while we asked.
        return Ok(None);
    }
    serde_json::from_slice(&text).map(Some).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::time::Instant;

    use super::*;

    #[test]
    fn what_cannot_be_accepted_is_tried_again_after_a_pause() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let left = Cell::new(3);
        let begun = Instant::now();
        let accepted = runtime.block_on(patiently(async || match left.get() {
            0 => Ok("somebody"),
            more => {
                left.set(more - 1);
                Err(io::Error::other("too many open files"))
            }
        }));
        assert_eq!(accepted, "somebody");
        assert!(begun.elapsed() >= 3 * PAUSE, "it did not wait: {:?}", begun.elapsed());
    }
}
