//! Listening: a stale unix socket is taken over, a live one is not, and nothing else at its path is touched.

use std::fs;
use std::io;
use std::net::{TcpListener, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use crate::{Error, ErrorKind, ListenAddress, Result};

/// A socket that listens, and does not block.
#[derive(Debug)]
pub enum Listener {
    /// A unix socket, and its file.
    Unix(UnixListener, SocketFile),
    /// A TCP socket.
    Tcp(TcpListener),
}

/// The file of a unix socket; removed when this is dropped, unless another took its place.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    identity: Option<(u64, u64)>,
}

impl SocketFile {
    fn of(path: &Path) -> Self {
        Self { path: path.to_owned(), identity: identity(path) }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.identity.is_some() && identity(&self.path) == self.identity {
            // Where it cannot be removed, the next server takes it over.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    let metadata = fs::symlink_metadata(path).ok()?;
    metadata.file_type().is_socket().then(|| (metadata.dev(), metadata.ino()))
}

impl Listener {
    /// Listens at `address`. The address that comes back has the port that the system chose.
    ///
    /// # Errors
    /// [`ErrorKind::AddressInUse`] where somebody else has it; what the system says.
    pub fn bind(address: &ListenAddress) -> Result<(Self, ListenAddress)> {
        match address {
            ListenAddress::Unix(path) => {
                let listener = bind_unix(path)?;
                let file = SocketFile::of(path);
                nonblocking(address, listener.set_nonblocking(true))?;
                Ok((Self::Unix(listener, file), address.clone()))
            }
            ListenAddress::Tcp { host, port } => {
                let listener = bind_tcp(host, *port)?;
                nonblocking(address, listener.set_nonblocking(true))?;
                let port = listener.local_addr().map_or(*port, |bound| bound.port());
                Ok((Self::Tcp(listener), ListenAddress::Tcp { host: host.clone(), port }))
            }
        }
    }
}

fn nonblocking(address: &ListenAddress, result: io::Result<()>) -> Result<()> {
    result.map_err(|source| Error::io(format!("cannot listen at {address}"), source))
}

fn bind_tcp(host: &str, port: u16) -> Result<TcpListener> {
    let context = || format!("cannot listen at TCP port {port} of {host}");
    let addresses = (host, port).to_socket_addrs().map_err(|source| Error::io(context(), source))?;
    let addresses: Vec<_> = addresses.collect();
    TcpListener::bind(&addresses[..]).map_err(|source| match source.kind() {
        io::ErrorKind::AddrInUse => Error::new(
            ErrorKind::AddressInUse,
            format!("{}: another program listens there; choose another port, or end it", context()),
        ),
        _ => Error::io(context(), source),
    })
}

fn bind_unix(path: &Path) -> Result<UnixListener> {
    let context = || format!("cannot listen at the unix socket {}", path.display());
    match UnixListener::bind(path) {
        Ok(listener) => return Ok(listener),
        Err(source) if source.kind() == io::ErrorKind::AddrInUse => {}
        Err(source) => return Err(Error::io(context(), source)),
    }
    let metadata = fs::symlink_metadata(path).map_err(|source| Error::io(context(), source))?;
    if !metadata.file_type().is_socket() {
        let context = format!("{}: there is a file that is not a socket", context());
        return Err(Error::new(ErrorKind::AddressInUse, context));
    }
    if is_alive(path).map_err(|source| Error::io(context(), source))? {
        let context = format!("{}: a live server listens there; choose another path, or end it", context());
        return Err(Error::new(ErrorKind::AddressInUse, context));
    }
    tracing::info!(path = %path.display(), "taking over the socket of a server that is gone");
    fs::remove_file(path).map_err(|source| Error::io(context(), source))?;
    UnixListener::bind(path).map_err(|source| Error::io(context(), source))
}

/// Whether somebody listens at a socket. Only a refusal says that nobody does; a queue that is full says that somebody does.
fn is_alive(path: &Path) -> io::Result<bool> {
    let probe: OwnedFd = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
        None,
    )?;
    match connect(&probe, &SocketAddrUnix::new(path)?) {
        Err(rustix::io::Errno::CONNREFUSED | rustix::io::Errno::NOENT) => Ok(false),
        Ok(()) | Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INPROGRESS) => Ok(true),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unix(path: &Path) -> ListenAddress {
        ListenAddress::Unix(path.to_owned())
    }

    #[test]
    fn a_stale_socket_is_taken_over_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "a dead server leaves its socket behind");
        let (live, _) = Listener::bind(&unix(&path)).unwrap();
        let error = Listener::bind(&unix(&path)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AddressInUse);
        assert!(error.to_string().contains("a live server"), "{error}");
        drop(live);
        assert!(!path.exists(), "a server that ends takes its socket away");
    }

    #[test]
    fn a_file_that_is_no_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        fs::write(&path, "precious").unwrap();
        let error = Listener::bind(&unix(&path)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AddressInUse);
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    }

    #[test]
    fn a_socket_that_took_our_place_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let (ours, _) = Listener::bind(&unix(&path)).unwrap();
        fs::remove_file(&path).unwrap();
        let _theirs = UnixListener::bind(&path).unwrap();
        drop(ours);
        assert!(path.exists());
    }

    #[test]
    fn a_tcp_port_in_use_is_said_so() {
        let (_first, address) = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
        let error = Listener::bind(&address).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AddressInUse);
        assert!(error.to_string().contains("another program listens"), "{error}");
    }
}
