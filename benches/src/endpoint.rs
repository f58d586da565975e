//! Where a server under measurement listens, and how clients are told.

use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

/// A place to listen at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Endpoint {
    /// A unix socket.
    Unix(PathBuf),
    /// A port on the loopback interface; with TLS where there is a directory of certificates.
    Tcp { port: u16, tls: Option<PathBuf> },
}

/// The loopback interface's name: certificates are made out to it.
pub(crate) const LOCALHOST: &str = "localhost";

impl Endpoint {
    /// A port that nobody listens at.
    pub(crate) fn free_port(tls: Option<PathBuf>) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("no TCP port can be had")?;
        Ok(Self::Tcp { port: listener.local_addr()?.port(), tls })
    }

    /// Whether somebody listens.
    pub(crate) fn answers(&self) -> bool {
        match self {
            Self::Unix(path) => UnixStream::connect(path).is_ok(),
            Self::Tcp { port, .. } => TcpStream::connect((Ipv4Addr::LOCALHOST, *port)).is_ok(),
        }
    }

    /// The URI of an export there, as libnbd reads it.
    pub(crate) fn uri(&self, export: &str) -> String {
        match self {
            Self::Unix(path) => format!("nbd+unix:///{export}?socket={}", path.display()),
            Self::Tcp { port, tls: None } => format!("nbd://{LOCALHOST}:{port}/{export}"),
            Self::Tcp { port, tls: Some(_) } => format!("nbds://{LOCALHOST}:{port}/{export}"),
        }
    }

    /// `client`, a program on libnbd, so that it finds the certificates.
    ///
    /// A URI may name them, but fio's engine forbids that. libnbd looks below `$HOME`, though not for root: so root's
    /// clients run in a user namespace of their own, where they are nobody.
    pub(crate) fn trusted_by(&self, client: Command) -> Command {
        let Some(dir) = self.tls() else { return client };
        let mut trusting = if rustix::process::geteuid().is_root() {
            let mut unshare = Command::new("unshare");
            unshare.arg("--user").arg(client.get_program()).args(client.get_args());
            unshare
        } else {
            client
        };
        trusting.env("HOME", dir);
        trusting
    }

    /// The unix socket's path.
    pub(crate) fn socket(&self) -> Option<&Path> {
        match self {
            Self::Unix(path) => Some(path),
            Self::Tcp { .. } => None,
        }
    }

    /// The directory of certificates.
    pub(crate) fn tls(&self) -> Option<&Path> {
        match self {
            Self::Unix(_) => None,
            Self::Tcp { tls, .. } => tls.as_deref(),
        }
    }
}

impl<P: AsRef<Path> + ?Sized> From<&P> for Endpoint {
    fn from(socket: &P) -> Self {
        Self::Unix(socket.as_ref().to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_are_libnbds() {
        assert_eq!(Endpoint::from(Path::new("/s")).uri("vda"), "nbd+unix:///vda?socket=/s");
        let tls = Endpoint::Tcp { port: 7, tls: Some("/pki".into()) };
        assert_eq!(tls.uri("vda"), "nbds://localhost:7/vda");
    }

    #[test]
    fn who_listens_answers() {
        let endpoint = Endpoint::free_port(None).unwrap();
        assert!(!endpoint.answers());
        let Endpoint::Tcp { port, .. } = endpoint else { panic!("it is no port") };
        let _listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap();
        assert!(endpoint.answers());
    }
}
