//! A client's way to its server: a socket that blocks, with TLS on it or without.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustls::{ClientConnection, StreamOwned};

use crate::{Error, ListenAddress, Result};

/// A socket that blocks.
#[derive(Debug)]
pub(super) enum Wire {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Wire {
    /// Connects; whatever is read or written later may take so long.
    pub(super) fn connect(address: &ListenAddress, patience: Duration) -> Result<Self> {
        let connect = || match address {
            ListenAddress::Unix(path) => {
                let stream = UnixStream::connect(path)?;
                stream.set_read_timeout(Some(patience))?;
                stream.set_write_timeout(Some(patience))?;
                Ok(Self::Unix(stream))
            }
            ListenAddress::Tcp { host, port } => {
                let stream = TcpStream::connect((host.as_str(), *port))?;
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(patience))?;
                stream.set_write_timeout(Some(patience))?;
                Ok(Self::Tcp(stream))
            }
            ListenAddress::Vsock { .. } | ListenAddress::Systemd => Err(io::Error::other(
                "it cannot be asked from here: name unix:PATH, tcp:HOST:PORT or an NBD URI",
            )),
        };
        connect().map_err(|source: io::Error| Error::io(format!("cannot connect to {address}"), source))
    }
}

impl Read for Wire {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.read(buf),
            Self::Tcp(stream) => stream.read(buf),
        }
    }
}

impl Write for Wire {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.write(buf),
            Self::Tcp(stream) => stream.write(buf),
        }
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
        loop {
            let read = match self {
                Self::Plain(stream) => stream.read(buf),
                Self::X509(stream) => stream.read(buf),
                #[cfg(feature = "psk")]
                Self::Psk(stream) => stream.read(buf),
            };
            match read {
                // A ring of this process may interrupt any thread of it.
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                read => return read,
            }
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
