//! The listening end: who may ask, for how long, and what becomes of what they asked for.
//!
//! A peer that is silent, slow, talks too much or talks nonsense costs its own connection and, for a few seconds, one of a
//! bounded number of places.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use serde::Serialize;
use serde_json::Value;
use tokio::io::{AsyncBufRead, AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::unix::OwnedWriteHalf;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};

use super::request::Afterwards;
use super::{Reply, Request, SOCKET, handlers, short_path};
use crate::cli::Failure;
use crate::live_restore::service::{ServedDisk, Service};
use crate::live_restore::take_over;

/// How long a peer may take to send its request, or to take a line of the answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// A longer request is refused.
const MAX_REQUEST_BYTES: u64 = 64 << 10;
/// Who may be connected at once; others wait.
const MAX_CONNECTIONS: usize = 64;
/// How often it is said that a request is being worked on.
const WORKING_INTERVAL: Duration = Duration::from_secs(1);
/// Progress that waits for a peer to read it. More is left out.
const PROGRESS_WAITING: usize = 16;
/// How long, when the agent ends, a peer may take to read the rest of its answer.
const GOODBYE: Duration = Duration::from_secs(2);
/// How long, when the agent ends, work that waits for a repository may take to give up in order.
const REPOSITORY_PATIENCE: Duration = Duration::from_secs(5);
/// How long it waits after it could not accept, and how often it is looked whether the agent ends.
const PAUSE: Duration = Duration::from_millis(50);

/// The listening end. The socket's file goes when it is dropped.
#[derive(Debug)]
pub(in crate::live_restore) struct Control {
    listener: UnixListener,
    path: PathBuf,
}

/// Counts the requests that are being worked on, and the conversations, of all disks of an agent.
#[derive(Clone, Debug)]
pub(in crate::live_restore) struct Tasks {
    requests: watch::Sender<usize>,
    conversations: watch::Sender<usize>,
}

/// A request that is being worked on: what its handler can get at.
pub(crate) struct Asked {
    service: Arc<Service>,
    disk: usize,
    progress: mpsc::Sender<Value>,
    /// Whether the requester has said that it is not wanted any more.
    cancelled: watch::Receiver<bool>,
    _counted: Counted,
}

impl Asked {
    /// The disk whose socket was asked.
    pub(crate) fn disk(&self) -> &ServedDisk {
        &self.service.disks()[self.disk]
    }

    /// Its number among the agent's disks.
    pub(crate) const fn number(&self) -> usize {
        self.disk
    }

    /// The agent, with all its disks.
    pub(crate) const fn service(&self) -> &Arc<Service> {
        &self.service
    }

    /// Tells the requester how far it is. It never waits; what the requester does not read in time is left out.
    pub(crate) fn progress(&self, progress: &impl Serialize) {
        tell(&self.progress, progress);
    }

    /// What does [`Self::progress`] from another thread.
    pub(crate) fn teller<T: Serialize>(&self) -> impl Fn(&T) + Send + 'static {
        let sender = self.progress.clone();
        move |progress| tell(&sender, progress)
    }

    /// Waits until the requester has taken it back, or is known to have gone away.
    pub(crate) async fn abandoned(&self) {
        let mut cancelled = self.cancelled.clone();
        tokio::select! {
            () = self.progress.closed() => {}
            // Its other end is there for as long as the requester.
            Ok(_) = cancelled.wait_for(|is_cancelled| *is_cancelled) => {}
        }
    }

    /// Does work that blocks on a thread of its own.
    ///
    /// # Errors
    /// What `work` says, and where it panicked.
    pub(crate) async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
    ) -> anyhow::Result<T> {
        tokio::task::spawn_blocking(work).await.context("what was asked for panicked")?
    }

    /// The same for work that waits for a repository and may be cut off at any point: where that does not answer, the agent's
    /// end goes on without it.
    ///
    /// # Errors
    /// As [`Self::blocking`]; and where the end did not wait any longer.
    pub(crate) async fn blocking_on_repository<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
    ) -> anyhow::Result<T> {
        let given_up = async {
            while self.service.check_ending().is_ok() {
                tokio::time::sleep(PAUSE).await;
            }
            tokio::time::sleep(REPOSITORY_PATIENCE).await;
        };
        tokio::select! {
            done = self.blocking(work) => done,
            () = given_up => Err(Failure::new(
                "the agent is ending, and the repository does not answer",
                "look after the repository; start the agent again, then ask again",
            )
            .into()),
        }
    }
}

impl Control {
    /// Listens in `dir`, from within a runtime. The caller holds the session's lock, so a socket that is there is a
    /// dead agent's.
    ///
    /// # Errors
    /// What the operating system says.
    pub(in crate::live_restore) fn listen(dir: &Path) -> io::Result<Self> {
        let (_dir, short) = short_path(dir)?;
        match std::fs::remove_file(&short) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&short)?;
        Ok(Self { listener, path: dir.join(SOCKET) })
    }

    /// Answers whoever asks about the disk with this number, until it is dropped.
    pub(in crate::live_restore) async fn serve(self, service: Arc<Service>, disk: usize, tasks: Tasks) {
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
            let (stream, _) = patiently(|| self.listener.accept()).await;
            tokio::spawn(converse(stream, Arc::clone(&service), disk, tasks.clone(), place));
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        // A successor removes what is left here.
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Tasks {
    /// Nothing is being worked on.
    pub(in crate::live_restore) fn new() -> Self {
        Self { requests: watch::Sender::new(0), conversations: watch::Sender::new(0) }
    }

    /// Waits until nothing is being worked on, and, for a while, until everybody has read the answer.
    pub(in crate::live_restore) async fn ended(&self) {
        // These fail only where the sender is gone, which is us.
        let _ = self.requests.subscribe().wait_for(|count| *count == 0).await;
        let mut conversations = self.conversations.subscribe();
        let _ = tokio::time::timeout(GOODBYE, conversations.wait_for(|count| *count == 0)).await;
    }
}

fn tell(sender: &mpsc::Sender<Value>, progress: &impl Serialize) {
    if let Ok(progress) = serde_json::to_value(progress) {
        let _ = sender.try_send(progress);
    }
}

struct Counted(watch::Sender<usize>);

impl Counted {
    fn new(counter: &watch::Sender<usize>) -> Self {
        counter.send_modify(|count| *count += 1);
        Self(counter.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

/// One connection, from its request to the last line of its answer.
async fn converse(
    stream: UnixStream,
    service: Arc<Service>,
    disk: usize,
    tasks: Tasks,
    _place: OwnedSemaphorePermit,
) {
    let (input, mut output) = stream.into_split();
    let mut line = Vec::new();
    let mut input = BufReader::new(input.take(MAX_REQUEST_BYTES));
    match tokio::time::timeout(PATIENCE, input.read_until(b'\n', &mut line)).await {
        Ok(Ok(_)) if !line.is_empty() => {}
        // It asks nothing.
        _ => return,
    }
    let request: Request = match serde_json::from_slice(&line) {
        Ok(request) => request,
        Err(error) => {
            // Nobody is left to tell where that fails.
            let _ = send(&mut output, &misunderstood(&error)).await;
            return;
        }
    };
    if let Request::TakeOver { sessions } = request {
        match input.into_inner().into_inner().reunite(output).map(UnixStream::into_std) {
            Ok(Ok(stream)) => take_over::answer(stream, service, sessions),
            Ok(Err(error)) => tracing::warn!(%error, "a successor cannot be answered"),
            Err(error) => tracing::warn!(%error, "a successor cannot be answered"),
        }
        return;
    }
    let _counted = Counted::new(&tasks.conversations);
    let (progress, told) = mpsc::channel(PROGRESS_WAITING);
    let (cancel, cancelled) = watch::channel(false);
    let asked = Asked { service, disk, progress, cancelled, _counted: Counted::new(&tasks.requests) };
    let (answered, answer) = oneshot::channel();
    // A task of its own: whoever goes away does not take it along.
    tokio::spawn(async move {
        let result = handlers::answer(request, &asked).await;
        drop(asked);
        let _ = answered.send(result);
    });
    let listen = async {
        if is_cancelled(&mut input).await {
            let _ = cancel.send(true);
        }
        std::future::pending().await
    };
    tokio::select! {
        () = listen => {}
        _ = pass_on(&mut output, told, answer) => {}
    }
}

/// Whether the next line takes the request back. One who says nothing more, or something else, still wants it.
async fn is_cancelled(input: &mut (impl AsyncBufRead + Unpin)) -> bool {
    let mut line = Vec::new();
    let read = input.read_until(b'\n', &mut line).await;
    read.is_ok() && serde_json::from_slice(&line).is_ok_and(|Afterwards::Cancel| true)
}

/// Passes on what a handler tells, until it has ended or the peer does not take it.
async fn pass_on(
    output: &mut OwnedWriteHalf,
    mut told: mpsc::Receiver<Value>,
    mut answer: oneshot::Receiver<anyhow::Result<Value>>,
) -> io::Result<()> {
    let mut working = tokio::time::interval(WORKING_INTERVAL);
    working.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    working.tick().await;
    let last = loop {
        let line = tokio::select! {
            biased;
            Some(progress) = told.recv() => Reply::Progress { progress },
            answer = &mut answer => break answer,
            _ = working.tick() => Reply::Working,
        };
        send(output, &line).await?;
    };
    while let Ok(progress) = told.try_recv() {
        send(output, &Reply::Progress { progress }).await?;
    }
    let last = last.unwrap_or_else(|_| Err(anyhow::anyhow!("what was asked for panicked")));
    let last = match last {
        Ok(result) => Reply::Done { result },
        Err(error) => {
            let (message, advice) = crate::cli::told(&error);
            Reply::Failed { message, advice }
        }
    };
    send(output, &last).await?;
    output.shutdown().await
}

async fn send(output: &mut OwnedWriteHalf, reply: &Reply) -> io::Result<()> {
    let mut text = serde_json::to_vec(reply)?;
    text.push(b'\n');
    tokio::time::timeout(PATIENCE, output.write_all(&text)).await?
}

fn misunderstood(error: &serde_json::Error) -> Reply {
    let failure = Failure::new(
        format!("the agent does not understand what it was asked: {error}"),
        "ask with the version of lifeboot that the agent runs",
    );
    let (message, advice) = crate::cli::told(&failure.into());
    Reply::Failed { message, advice }
}

/// Tries until it succeeds. What fails now (there are too many open files, say) fails at once again, so this waits a
/// little before it tries again.
pub(in crate::live_restore) async fn patiently<T, F: Future<Output = io::Result<T>>>(
    mut attempt: impl FnMut() -> F,
) -> T {
    loop {
        match attempt().await {
            Ok(done) => return done,
            Err(error) => tracing::debug!(%error, "nobody who asks can be answered just now"),
        }
        tokio::time::sleep(PAUSE).await;
    }
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
        let accepted = runtime.block_on(patiently(|| {
            std::future::ready(match left.get() {
                0 => Ok("somebody"),
                more => {
                    left.set(more - 1);
                    Err(io::Error::other("too many open files"))
                }
            })
        }));
        assert_eq!(accepted, "somebody");
        assert!(begun.elapsed() >= 3 * PAUSE, "it did not wait: {:?}", begun.elapsed());
    }
}
