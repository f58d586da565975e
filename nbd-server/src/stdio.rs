//! One connection on stdin and stdout: a socket that both are, or a pair of pipes.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::thread::{self, JoinHandle};

use socket2::Socket;

use crate::listen::take_activated;
use crate::{Error, ErrorKind, Result};

/// How much is copied at once between a pipe and a socket.
const RELAY_BYTES: usize = 64 << 10;

/// The connection that this process was started for.
#[derive(Debug)]
pub struct Stdio {
    /// A socket, whatever stdin and stdout are.
    connection: OwnedFd,
    /// Brings what is sent to a pipe.
    output: Option<JoinHandle<()>>,
}

impl Stdio {
    /// Takes it. Where the caller has a client connect to a socket that it gave us instead, as systemd does and
    /// `nbdinfo -- [ … ]`, that one client is waited for.
    ///
    /// # Errors
    /// Where stdin and stdout are nothing that a client can be at the other end of.
    pub fn take() -> Result<Self> {
        let failed = |source| Error::io("cannot use stdin and stdout for a connection", source);
        if let [socket, rest @ ..] = &*take_activated()? {
            if !rest.is_empty() {
                return Err(Error::new(
                    ErrorKind::InvalidAddress,
                    "--stdio serves one socket, and there are several",
                ));
            }
            return Self::first_of(socket).map_err(failed);
        }
        let input = io::stdin().as_fd().try_clone_to_owned().map_err(failed)?;
        let output = io::stdout().as_fd().try_clone_to_owned().map_err(failed)?;
        let input = File::from(input);
        let kind = input.metadata().map_err(failed)?.file_type();
        if kind.is_socket() {
            return Ok(Self { connection: input.into(), output: None });
        }
        let output = File::from(output);
        if !kind.is_fifo() || !output.metadata().map_err(failed)?.file_type().is_fifo() {
            return Err(Error::new(
                ErrorKind::InvalidAddress,
                "stdin and stdout are neither a socket nor pipes: --stdio is for a client that starts its server, as \
                 libnbd's nbd_connect_command does",
            ));
        }
        Self::of_pipes(input, output).map_err(failed)
    }

    fn first_of(socket: &OwnedFd) -> io::Result<Self> {
        let listener = Socket::from(socket.try_clone()?);
        if !listener.is_listener()? {
            return Ok(Self { connection: listener.into(), output: None });
        }
        listener.set_nonblocking(false)?;
        Ok(Self { connection: listener.accept()?.0.into(), output: None })
    }

    /// Two threads stand between the pipes and a socket: what serves knows sockets only.
    fn of_pipes(mut input: File, mut output: File) -> io::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        let (mut to, mut from) = (ours.try_clone()?, ours);
        thread::Builder::new().name("nbd-stdin".to_owned()).spawn(move || {
            let ended = relay(&mut input, &mut to);
            tracing::debug!(?ended, "stdin ended");
            // Where this fails, the other end is gone already.
            let _ = to.shutdown(Shutdown::Write);
        })?;
        let output = thread::Builder::new().name("nbd-stdout".to_owned()).spawn(move || {
            if let Err(error) = relay(&mut from, &mut output) {
                tracing::debug!(%error, "stdout is gone");
                let _ = from.shutdown(Shutdown::Both);
            }
        })?;
        Ok(Self { connection: theirs.into(), output: Some(output) })
    }

    /// Splits it into the connection, and what brings its last replies out.
    #[must_use]
    pub fn into_parts(self) -> (OwnedFd, Output) {
        (self.connection, Output(self.output))
    }
}

/// Copies to the end, by reading and writing: `splice`, which the standard library would take, keeps the pipe locked while it
/// waits for the socket, and the client at the pipe's other end would wait for that too.
fn relay(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut buf = vec![0; RELAY_BYTES];
    loop {
        match from.read(&mut buf) {
            Ok(0) => return Ok(()),
            Ok(len) => to.write_all(&buf[..len])?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// What was sent, on its way to a pipe.
#[derive(Debug)]
pub struct Output(Option<JoinHandle<()>>);

impl Output {
    /// Waits until everything is out, once the connection has ended.
    pub fn finish(self) {
        if let Some(Err(_)) = self.0.map(JoinHandle::join) {
            tracing::error!("the thread for stdout panicked");
        }
    }
}
