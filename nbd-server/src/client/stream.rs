//! A client's way to its server: a socket that blocks, with TLS on it or without.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::ToSocketAddrs as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::{ClientConnection, StreamOwned};
use socket2::{Domain, SockAddr, Socket, TcpKeepalive, Type};

use crate::{Error, ListenAddress, Result};

/// How often whoever waits for a server is asked whether that still makes sense.
const STEP: Duration = Duration::from_millis(200);
/// When a silent peer is asked whether its host is still there: a connection may wait for hours before anything is asked on it.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);

/// How long a server may take to say or take anything at all, and who may end the wait sooner.
#[derive(Clone)]
pub struct Patience {
    limit: Duration,
    is_over: Option<Arc<dyn Fn() -> bool + Send + Sync>>,
}

impl Patience {
    /// Waits for so long each time, and no longer once `is_over`, which is asked several times a second.
    pub fn until(limit: Duration, is_over: impl Fn() -> bool + Send + Sync + 'static) -> Self {
        Self { limit, is_over: Some(Arc::new(is_over)) }
    }

    /// Does `act` again and again while it would wait, until the patience ends.
    fn wait<T>(&self, mut act: impl FnMut() -> io::Result<T>) -> io::Result<T> {
        let began = Instant::now();
        loop {
            match act() {
                Err(error) if is_wait(&error) => {}
                done => return done,
            }
            if self.is_over.as_ref().is_some_and(|is_over| is_over()) {
                return Err(io::Error::other("nobody waits for it any more"));
            }
            if began.elapsed() >= self.limit {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
    }
}

impl From<Duration> for Patience {
    /// Waits for so long each time.
    fn from(limit: Duration) -> Self {
        Self { limit, is_over: None }
    }
}

impl fmt::Debug for Patience {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Patience").field("limit", &self.limit).finish_non_exhaustive()
    }
}

/// Whether a step's time is over, which a socket with a timeout says in three ways; or a signal ended it sooner: a ring of this
/// process may interrupt any thread of it.
fn is_wait(error: &io::Error) -> bool {
    let waits = [libc::EAGAIN, libc::EINPROGRESS, libc::EALREADY, libc::EINTR];
    error.raw_os_error().is_some_and(|number| waits.contains(&number))
}

/// A socket that blocks, for as long as its patience lasts.
#[derive(Debug)]
pub(super) struct Wire {
    socket: Socket,
    patience: Patience,
}

impl Wire {
    /// Connects; whatever is read or written later is waited for with the same patience.
    pub(super) fn connect(address: &ListenAddress, patience: Patience) -> Result<Self> {
        let connect = || match address {
            ListenAddress::Unix(path) => Self::reach(&SockAddr::unix(path)?, Domain::UNIX, &patience),
            ListenAddress::Tcp { host, port } => {
                let mut last = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
                for address in (host.as_str(), *port).to_socket_addrs()? {
                    match Self::reach(&address.into(), Domain::for_address(address), &patience) {
                        Ok(socket) => {
                            socket.set_tcp_nodelay(true)?;
                            socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(KEEPALIVE_IDLE))?;
                            return Ok(socket);
                        }
                        Err(error) => last = error,
                    }
                }
                Err(last)
            }
            ListenAddress::Vsock { .. } | ListenAddress::Systemd => Err(io::Error::other(
                "it cannot be asked from here: name unix:PATH, tcp:HOST:PORT or an NBD URI",
            )),
        };
        let socket = connect()
            .map_err(|source: io::Error| Error::io(format!("cannot connect to {address}"), source))?;
        Ok(Self { socket, patience })
    }

    fn reach(address: &SockAddr, domain: Domain, patience: &Patience) -> io::Result<Socket> {
        let socket = Socket::new(domain, Type::STREAM, None)?;
        let step = Some(patience.limit.clamp(Duration::from_millis(1), STEP));
        socket.set_read_timeout(step)?;
        // It bounds each wait for the connection, too.
        socket.set_write_timeout(step)?;
        let connect = || match socket.connect(address) {
            // The attempt succeeded between two looks at it.
            Err(error) if error.raw_os_error() == Some(libc::EISCONN) => Ok(()),
            done => done,
        };
        patience.wait(connect)?;
        Ok(socket)
    }
}

impl Read for Wire {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.patience.wait(|| (&self.socket).read(buf))
    }
}

impl Write for Wire {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.patience.wait(|| (&self.socket).write(buf))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What a connection's bytes go through.
#[derive(Debug)]
pub(super) enum Stream {
    Plain(Wire),
    X509(Box<StreamOwned<ClientConnection, Wire>>),
    #[cfg(feature = "psk")]
    Psk(Box<openssl::ssl::SslStream<Wire>>),
}

impl Stream {
    /// Says that nothing more comes. The server may be gone, and needs no goodbye then.
    pub(super) fn end(&mut self) {
        match self {
            Self::Plain(_) => {}
            Self::X509(stream) => {
                stream.conn.send_close_notify();
                let _ = stream.conn.complete_io(&mut stream.sock);
            }
            #[cfg(feature = "psk")]
            Self::Psk(stream) => {
                let _ = stream.shutdown();
            }
        }
    }
}

impl Read for Stream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.read(buf),
            Self::X509(stream) => stream.read(buf),
            #[cfg(feature = "psk")]
            Self::Psk(stream) => stream.read(buf),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.write(buf),
            Self::X509(stream) => stream.write(buf),
            #[cfg(feature = "psk")]
            Self::Psk(stream) => stream.write(buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(stream) => stream.flush(),
            Self::X509(stream) => stream.flush(),
            #[cfg(feature = "psk")]
            Self::Psk(stream) => stream.flush(),
        }
    }
}
