//! Unix sockets: a stale one is taken over, a live one is not, and nothing else at its path is touched.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{Mode, fchmod};
use socket2::{Domain, SockAddr, Socket, Type};

use super::BACKLOG;
use crate::{Error, ErrorKind, Result};

/// The file of a unix socket; removed when this is dropped, unless another took its place or a successor has it.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    identity: Option<(u64, u64)>,
    is_left: AtomicBool,
}

impl SocketFile {
    pub(super) fn of(path: &Path) -> Self {
        Self { path: path.to_owned(), identity: identity(path), is_left: AtomicBool::new(false) }
    }

    pub(super) fn leave(&self) {
        self.is_left.store(true, Ordering::SeqCst);
    }

    /// Takes it from a predecessor, with these permissions. Where another took its place there is nothing to take.
    pub(super) fn own(&self, mode: u32) -> io::Result<()> {
        self.is_left.store(false, Ordering::SeqCst);
        if self.identity.is_some() && identity(&self.path) == self.identity {
            fs::set_permissions(&self.path, Permissions::from_mode(mode))?;
        }
        Ok(())
    }

    fn is_removed(&self) -> bool {
        !self.is_left.load(Ordering::SeqCst)
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.is_removed() && self.identity.is_some() && identity(&self.path) == self.identity {
            // Where it cannot be removed, the next server takes it over.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    let metadata = fs::symlink_metadata(path).ok()?;
    metadata.file_type().is_socket().then(|| (metadata.dev(), metadata.ino()))
}

/// Listens at a path, with these permissions.
pub(super) fn bind(path: &Path, mode: u32) -> Result<(Socket, SocketFile)> {
    let context = || format!("cannot listen at the unix socket {}", path.display());
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => {
            Error::new(ErrorKind::Io, format!("{}: its directory does not exist", context()))
        }
        _ => Error::io(context(), source),
    };
    match bind_new(path, mode) {
        Ok(bound) => return Ok(bound),
        Err(source) if source.kind() == io::ErrorKind::AddrInUse => {}
        Err(source) => return Err(failed(source)),
    }
    let metadata = fs::symlink_metadata(path).map_err(failed)?;
    if !metadata.file_type().is_socket() {
        let context = format!("{}: there is a file that is not a socket", context());
        return Err(Error::new(ErrorKind::AddressInUse, context));
    }
    if is_alive(path).map_err(failed)? {
        let context = format!("{}: a live server listens there; choose another path, or end it", context());
        return Err(Error::new(ErrorKind::AddressInUse, context));
    }
    tracing::info!(path = %path.display(), "taking over the socket of a server that is gone");
    fs::remove_file(path).map_err(failed)?;
    bind_new(path, mode).map_err(failed)
}

fn bind_new(path: &Path, mode: u32) -> io::Result<(Socket, SocketFile)> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None)?;
    // Linux gives the file these permissions less the umask's: it never has more, not for a moment.
    fchmod(&socket, Mode::from_raw_mode(mode))?;
    socket.bind(&SockAddr::unix(path)?)?;
    let file = SocketFile::of(path);
    // The umask may have taken what was asked for. Nobody can connect yet.
    if fs::symlink_metadata(path)?.mode() & 0o777 != mode {
        fs::set_permissions(path, Permissions::from_mode(mode))?;
    }
    socket.listen(BACKLOG)?;
    Ok((socket, file))
}

/// Whether somebody listens at a socket. Only a refusal says that nobody does; a queue that is full says that somebody does.
fn is_alive(path: &Path) -> io::Result<bool> {
    let probe = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None)?;
    match probe.connect(&SockAddr::unix(path)?) {
        Ok(()) => Ok(true),
        Err(error) => match error.kind() {
            io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound => Ok(false),
            io::ErrorKind::WouldBlock => Ok(true),
            _ if error.raw_os_error() == Some(libc::EINPROGRESS) => Ok(true),
            _ => Err(error),
        },
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    fn bind_at(path: &Path) -> Result<(Socket, SocketFile)> {
        bind(path, 0o600)
    }

    #[test]
    fn a_stale_socket_is_taken_over_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "a dead server leaves its socket behind");
        let live = bind_at(&path).unwrap();
        let error = bind_at(&path).unwrap_err();
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
        let error = bind_at(&path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AddressInUse);
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    }

    #[test]
    fn a_socket_that_took_our_place_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let ours = bind_at(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let _theirs = UnixListener::bind(&path).unwrap();
        drop(ours);
        assert!(path.exists());
    }

    #[test]
    fn a_socket_that_was_left_to_a_successor_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let (socket, file) = bind_at(&path).unwrap();
        file.leave();
        drop((socket, file));
        assert!(path.exists());
    }

    #[test]
    fn permissions_are_as_they_were_asked_for_whatever_the_umask_is() {
        let dir = tempfile::tempdir().unwrap();
        for mode in [0o600, 0o660, 0o666, 0o777] {
            let path = dir.path().join(format!("{mode:o}"));
            let _bound = bind(&path, mode).unwrap();
            assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, mode);
        }
    }

    #[test]
    fn a_directory_that_is_not_there_is_said_so() {
        let dir = tempfile::tempdir().unwrap();
        let error = bind_at(&dir.path().join("none/s")).unwrap_err();
        assert!(error.to_string().contains("directory does not exist"), "{error}");
    }
}
