//! Listening: on unix sockets, TCP, vsock, and what systemd or a predecessor hands over.

mod activation;
mod unix;

use std::io;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;

use socket2::{Domain, SockAddr, Socket, Type};
use tokio::io::Interest;
use tokio::net::UnixStream;

pub use activation::is_activated;
pub(crate) use activation::take as take_activated;
use unix::SocketFile;

use crate::{Access, Error, ErrorKind, ListenAddress, Result};

/// How many clients may wait to be accepted, as far as the system allows. While one server hands over to another, all wait.
const BACKLOG: i32 = 1024;

/// A socket that listens, and does not block.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    address: ListenAddress,
    file: Option<SocketFile>,
}

/// A listening socket as the standard library has it.
#[derive(Debug)]
pub enum StdListener {
    /// A unix socket.
    Unix(UnixListener),
    /// A TCP socket.
    Tcp(TcpListener),
}

impl Listener {
    /// Listens at `address`: one socket, or as many as systemd gives. Their addresses have the ports that the system chose.
    ///
    /// # Errors
    /// [`ErrorKind::AddressInUse`] where somebody else has it; [`ErrorKind::Insecure`] on TCP beyond this machine without
    /// TLS; what the system says.
    pub fn bind(address: &ListenAddress, access: &Access) -> Result<Vec<Self>> {
        match address {
            ListenAddress::Unix(path) => {
                let (socket, file) = unix::bind(path, access.socket_mode)?;
                Ok(vec![Self { socket, address: address.clone(), file: Some(file) }])
            }
            ListenAddress::Tcp { host, port } => {
                let socket = bind_tcp(address, host, *port, access)?;
                let bound = socket.local_addr().ok().and_then(|bound| bound.as_socket());
                let port = bound.map_or(*port, |bound| bound.port());
                let address = ListenAddress::Tcp { host: host.clone(), port };
                Ok(vec![Self { socket, address, file: None }])
            }
            ListenAddress::Vsock { cid, port } => {
                access.check_vsock(address)?;
                let socket = bind_vsock(address, *cid, *port)?;
                Ok(vec![Self { socket, address: address.clone(), file: None }])
            }
            ListenAddress::Systemd => activation::listeners(access),
        }
    }

    /// Takes a socket that listens already, from systemd or a predecessor, and changes nothing of it: a predecessor that goes on shares
    /// it. The file of a unix socket is removed at the end where `owns_file`. [`Listener::own`] makes it ours.
    ///
    /// # Errors
    /// Where it is not such a socket, or [`Listener::bind`] would refuse its address.
    pub fn adopt(socket: OwnedFd, access: &Access, owns_file: bool) -> Result<Self> {
        let socket = Socket::from(socket);
        let invalid = |why: String| Error::new(ErrorKind::InvalidAddress, why);
        let failed = |source| Error::io("cannot use a socket that was handed over", source);
        if socket.r#type().map_err(failed)? != Type::STREAM {
            return Err(invalid(
                "a socket that was handed over is not a stream socket (ListenStream=)".to_owned(),
            ));
        }
        if !socket.is_listener().map_err(failed)? {
            return Err(invalid(
                "a socket that was handed over does not listen: a connection is served by --stdio, and systemd's \
                 Accept= must be no otherwise"
                    .to_owned(),
            ));
        }
        // That is the descriptor's, and not shared.
        socket.set_cloexec(true).map_err(failed)?;
        let local = socket.local_addr().map_err(failed)?;
        let address = address_of(&local).ok_or_else(|| {
            invalid("a socket that was handed over is of an unknown address family".to_owned())
        })?;
        if let Some(at) = local.as_socket() {
            access.check_tcp(&address, at)?;
        }
        let mut file = None;
        match &address {
            ListenAddress::Vsock { .. } => access.check_vsock(&address)?,
            ListenAddress::Unix(path) if owns_file => file = Some(SocketFile::of(path)),
            _ => {}
        }
        Ok(Self { socket, address, file })
    }

    /// Where it listens on TCP.
    pub(crate) fn tcp_address(&self) -> Option<SocketAddr> {
        self.socket.local_addr().ok()?.as_socket()
    }

    /// The same under the name that it was given when it was made: a host has names.
    pub(crate) fn called(mut self, address: ListenAddress) -> Self {
        self.address = address;
        self
    }

    /// Where it listens.
    #[must_use]
    pub const fn address(&self) -> &ListenAddress {
        &self.address
    }

    /// Whether the socket's file goes with the server that has it.
    #[must_use]
    pub fn owns_file(&self) -> bool {
        self.file.is_some()
    }

    /// Leaves the socket's file to a successor: it is not removed with this one.
    pub fn leave_file(&self) {
        self.file.iter().for_each(SocketFile::leave);
    }

    /// Makes a socket ours that was adopted: it does not block, and its file, which a predecessor left, has our permissions.
    ///
    /// # Errors
    /// What the system says.
    pub fn own(&self, access: &Access) -> Result<()> {
        self.socket.set_nonblocking(true).map_err(|source| {
            Error::io(format!("cannot serve at {}, which was handed over", self.address), source)
        })?;
        if let Some(Err(error)) = self.file.as_ref().map(|file| file.own(access.socket_mode)) {
            // Whoever served before has ended: clients are not to wait for that.
            tracing::warn!(
                %error,
                "the permissions of the socket {} stay as the server before had them, and are not {:o}: chmod it",
                self.address, access.socket_mode
            );
        }
        Ok(())
    }

    /// The same socket once more.
    ///
    /// # Errors
    /// On vsock; what the system says.
    pub fn to_std(&self) -> io::Result<StdListener> {
        let socket = self.socket.try_clone()?;
        match self.address {
            ListenAddress::Unix(_) => Ok(StdListener::Unix(socket.into())),
            ListenAddress::Tcp { .. } => Ok(StdListener::Tcp(socket.into())),
            _ => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// A listener on the calling thread's event loop.
pub(crate) struct Accepting {
    listener: Arc<Listener>,
    /// The same socket, for its readiness alone: that of this type is any socket's, and its listening kin refuse to accept
    /// what is not of their own family.
    readiness: UnixStream,
}

impl Accepting {
    pub(crate) fn new(listener: Arc<Listener>) -> io::Result<Self> {
        let readiness = UnixStream::from_std(listener.socket.try_clone()?.into())?;
        Ok(Self { listener, readiness })
    }

    /// The next connection, and where it comes from. May be dropped at any point.
    pub(crate) async fn accept(&self) -> io::Result<(Socket, SockAddr)> {
        loop {
            self.readiness.readable().await?;
            let accepted = self.readiness.try_io(Interest::READABLE, || self.listener.socket.accept());
            match accepted {
                // Another process that shares the socket may have been faster.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                accepted => return accepted,
            }
        }
    }
}

fn address_of(local: &SockAddr) -> Option<ListenAddress> {
    if let Some(at) = local.as_socket() {
        return Some(ListenAddress::Tcp { host: at.ip().to_string(), port: at.port() });
    }
    if let Some((cid, port)) = local.as_vsock_address() {
        return Some(ListenAddress::Vsock { cid: (cid != u32::MAX).then_some(cid), port });
    }
    // A socket without a path has an abstract name, which no URI can have: it is served all the same.
    (local.domain() == Domain::UNIX)
        .then(|| ListenAddress::Unix(local.as_pathname().unwrap_or(Path::new("")).to_owned()))
}

fn bind_tcp(address: &ListenAddress, host: &str, port: u16, access: &Access) -> Result<Socket> {
    let context = || format!("cannot listen at TCP port {port} of {host}");
    let resolved = (host, port).to_socket_addrs().map_err(|source| Error::io(context(), source))?;
    let resolved: Vec<SocketAddr> = resolved.collect();
    for at in &resolved {
        access.check_tcp(address, *at)?;
    }
    let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for at in resolved {
        match bind_tcp_at(at) {
            Ok(socket) => return Ok(socket),
            Err(error) => last = error,
        }
    }
    Err(match last.kind() {
        io::ErrorKind::AddrInUse => Error::new(
            ErrorKind::AddressInUse,
            format!("{}: another program listens there; choose another port, or end it", context()),
        ),
        io::ErrorKind::AddrNotAvailable => Error::new(
            ErrorKind::Io,
            format!(
                "{}: this machine does not have that address (`ip address` shows which it has)",
                context()
            ),
        ),
        io::ErrorKind::PermissionDenied => Error::new(
            ErrorKind::NotPermitted,
            format!("{}: ports below 1024 are for root (or CAP_NET_BIND_SERVICE)", context()),
        ),
        _ => Error::io(context(), last),
    })
}

fn bind_tcp_at(at: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(at), Type::STREAM.nonblocking(), None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&at.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket)
}

fn bind_vsock(address: &ListenAddress, cid: Option<u32>, port: u32) -> Result<Socket> {
    let bind = || {
        let socket = Socket::new(Domain::VSOCK, Type::STREAM.nonblocking(), None)?;
        socket.bind(&SockAddr::vsock(cid.unwrap_or(u32::MAX), port))?;
        socket.listen(BACKLOG)?;
        Ok(socket)
    };
    bind().map_err(|source: io::Error| {
        let context = format!("cannot listen at {address}");
        match source.raw_os_error() {
            Some(libc::EAFNOSUPPORT) => Error::new(
                ErrorKind::Io,
                format!("{context}: this kernel has no vsock; load vhost_vsock on a host, vsock_loopback for this machine alone"),
            ),
            Some(libc::EADDRNOTAVAIL) => {
                Error::new(ErrorKind::Io, format!("{context}: this machine has another CID; `any` is its own"))
            }
            Some(libc::EADDRINUSE) => Error::new(
                ErrorKind::AddressInUse,
                format!("{context}: another program listens there; choose another port, or end it"),
            ),
            _ => Error::io(context, source),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_that_was_handed_over_is_as_it_was_until_it_is_ours() {
        let blocks = |socket: &dyn AsFd| {
            !rustix::fs::fcntl_getfl(socket.as_fd()).unwrap().contains(rustix::fs::OFlags::NONBLOCK)
        };
        let theirs = TcpListener::bind("127.0.0.1:0").unwrap();
        let access = Access::default();
        let adopted = Listener::adopt(theirs.try_clone().unwrap().into(), &access, true).unwrap();
        assert!(blocks(&theirs), "whoever goes on shares it");
        adopted.own(&access).unwrap();
        assert!(!blocks(&adopted));
    }

    #[test]
    fn a_tcp_port_in_use_is_said_so() {
        let access = Access::default();
        let first = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap(), &access).unwrap();
        let error = Listener::bind(first[0].address(), &access).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AddressInUse);
        assert!(error.to_string().contains("another program listens"), "{error}");
    }

    #[test]
    fn an_address_that_is_not_ours_is_said_so() {
        let access = Access { insecure: true, ..Access::default() };
        let error = Listener::bind(&"tcp:192.0.2.1:0".parse().unwrap(), &access).unwrap_err();
        assert!(error.to_string().contains("does not have that address"), "{error}");
    }

    #[test]
    fn tcp_beyond_this_machine_takes_tls_or_a_word() {
        let anywhere = ["tcp:0.0.0.0:0", "tcp:[::]:0", "tcp:[::ffff:0.0.0.0]:0"];
        for text in anywhere {
            let error = Listener::bind(&text.parse().unwrap(), &Access::default()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Insecure, "{text}");
            assert!(error.to_string().contains("--insecure"), "{error}");
        }
        for access in [
            Access { insecure: true, ..Access::default() },
            Access { tls_is_required: true, ..Access::default() },
        ] {
            Listener::bind(&"tcp:0.0.0.0:0".parse().unwrap(), &access).unwrap();
        }
        Listener::bind(&"tcp:127.0.0.9:0".parse().unwrap(), &Access::default()).unwrap();
    }

    #[test]
    fn what_is_handed_over_is_looked_at() {
        let access = Access::default();
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = tcp.local_addr().unwrap().port();
        let adopted = Listener::adopt(tcp.into(), &access, true).unwrap();
        assert_eq!(adopted.address().to_string(), format!("tcp:127.0.0.1:{port}"));
        let open = TcpListener::bind("0.0.0.0:0").unwrap();
        assert_eq!(Listener::adopt(open.into(), &access, true).unwrap_err().kind(), ErrorKind::Insecure);
        let (connected, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
        let error = Listener::adopt(connected.into(), &access, true).unwrap_err();
        assert!(error.to_string().contains("--stdio"), "{error}");
        let datagrams = std::os::unix::net::UnixDatagram::unbound().unwrap();
        let error = Listener::adopt(datagrams.into(), &access, true).unwrap_err();
        assert!(error.to_string().contains("stream"), "{error}");
    }

    #[test]
    fn vsock_listens_or_says_why_not() {
        let address: ListenAddress = "vsock:any:10809".parse().unwrap();
        let network = "192.0.2.0/24".parse().unwrap();
        let error =
            Listener::bind(&address, &Access { networks: vec![network], ..Access::default() }).unwrap_err();
        assert!(error.to_string().contains("nobody could connect"), "{error}");
        match Listener::bind(&address, &Access::default()) {
            Ok(bound) => assert_eq!(*bound[0].address(), address),
            Err(error) => assert!(error.to_string().contains("this kernel has no vsock"), "{error}"),
        }
    }
}
