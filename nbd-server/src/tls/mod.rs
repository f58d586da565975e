//! TLS of the server: what it is made of, how a connection gets it, and how its files are read anew.
//!
//! | module | what lives there |
//! |---|---|
//! | `args` | the options of command lines |
//! | `files`, `keys` | certificates in QEMU's layout, pre-shared keys in GnuTLS's |
//! | `der`, `allow` | the names of certificates, and the list of those that may connect |
//! | `session` | TLS without a socket: `x509` by rustls, `psk` by OpenSSL |
//! | `stream` | a session and a socket: what [`crate::socket::Socket`] is under TLS |
//!
//! The protocol's side of it, STARTTLS, is in `proto`.

mod allow;
mod args;
mod der;
pub(crate) mod files;
#[cfg(feature = "psk")]
pub(crate) mod keys;
#[cfg(feature = "psk")]
pub(crate) mod psk;
mod session;
mod stream;
mod x509;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

pub use args::TlsArgs;
use parking_lot::RwLock;
pub use proto::server::TlsMode;
pub(crate) use session::MAX_UNSENT_BYTES;
pub(crate) use stream::{TlsFailure, TlsSocket};

use crate::Result;
use crate::log_limit::LogLimit;
use crate::socket::Socket;
use allow::AllowList;
use files::CredentialsDir;
use session::Session;
use x509::{X509, X509Session};

/// What a server's TLS rests on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Credentials {
    /// Certificates in a directory, as QEMU lays them out: `server-cert.pem` and `server-key.pem`; for clients that are verified,
    /// `ca-cert.pem` and, if it is there, `ca-crl.pem`.
    Certificates {
        /// The directory.
        dir: PathBuf,
        /// Whether clients must show a certificate of the authority in `ca-cert.pem`.
        verify_peer: bool,
        /// The names of the clients that may connect; where there are none, all that are verified.
        allowed: Vec<String>,
    },
    /// Keys that were given to clients beforehand: a file with a line `NAME:KEY` for each, the key in hex. Needs the feature `psk`.
    PreShared {
        /// The file.
        file: PathBuf,
    },
}

/// A server's TLS: whether clients must use it, and what they are shown. Clones share it, so that one
/// [`TlsServer::reload`] serves all.
#[derive(Clone, Debug)]
pub struct TlsServer {
    shared: Arc<Shared>,
}

/// How many clients that were refused for their TLS have a line in the log within its interval.
const LINES_IN_A_WHILE: u64 = 8;

#[derive(Debug)]
struct Shared {
    required: bool,
    refused: Arc<LogLimit>,
    credentials: Credentials,
    source: Source,
    /// For connections to come. Those that are there keep what they began with.
    current: RwLock<Loaded>,
}

#[derive(Debug)]
enum Source {
    X509(X509),
    #[cfg(feature = "psk")]
    Psk(PathBuf),
}

#[derive(Clone, Debug)]
enum Loaded {
    X509(Arc<rustls::ServerConfig>),
    #[cfg(feature = "psk")]
    Psk(psk::PskConfig),
}

impl Source {
    fn load(&self) -> Result<Loaded> {
        match self {
            Self::X509(x509) => x509.load().map(Loaded::X509),
            #[cfg(feature = "psk")]
            Self::Psk(path) => psk::PskConfig::load(path).map(Loaded::Psk),
        }
    }
}

impl TlsServer {
    /// Reads the files. With `required` clients without TLS are served nothing.
    ///
    /// # Errors
    /// [`crate::ErrorKind::InvalidCredentials`], saying which file and why: it cannot be read, a certificate has expired, a key is
    /// another's, others may read the pre-shared keys.
    pub fn load(credentials: Credentials, required: bool) -> Result<Self> {
        let refused = Arc::new(LogLimit::of_lines(LINES_IN_A_WHILE));
        let source = match credentials.clone() {
            Credentials::Certificates { dir, verify_peer, allowed } => Source::X509(X509 {
                dir: CredentialsDir(dir),
                verify_peer: verify_peer || !allowed.is_empty(),
                allowed: AllowList(allowed),
                refused: Arc::clone(&refused),
            }),
            #[cfg(feature = "psk")]
            Credentials::PreShared { file } => Source::Psk(file),
            #[cfg(not(feature = "psk"))]
            Credentials::PreShared { .. } => return Err(without_psk()),
        };
        let current = RwLock::new(source.load()?);
        Ok(Self { shared: Arc::new(Shared { required, refused, credentials, source, current }) })
    }

    /// Reads the files anew, for the connections to come.
    ///
    /// # Errors
    /// As [`TlsServer::load`]; then what was read before stays.
    pub fn reload(&self) -> Result<()> {
        let loaded = self.shared.source.load()?;
        *self.shared.current.write() = loaded;
        Ok(())
    }

    /// [`TlsServer::reload`], as a signal has it done: what came of it is in the log.
    pub fn reload_and_say(&self) {
        match self.reload() {
            Ok(()) => tracing::info!("the TLS credentials were read anew, for connections to come"),
            Err(error) => tracing::error!(%error, "the TLS credentials stay as they were"),
        }
    }

    /// Whether clients without TLS are served nothing.
    #[must_use]
    pub fn is_required(&self) -> bool {
        self.shared.required
    }

    /// What it rests on.
    #[must_use]
    pub fn credentials(&self) -> &Credentials {
        &self.shared.credentials
    }

    /// What the handshake says of it.
    #[must_use]
    pub fn mode(&self) -> TlsMode {
        if self.is_required() { TlsMode::Required } else { TlsMode::On }
    }

    /// Says that a client without TLS was refused.
    pub(crate) fn say_missed(&self) {
        if let Some(left_out) = self.shared.refused.admit(Instant::now()) {
            tracing::warn!(
                left_out,
                "a client without TLS was refused: this server requires TLS (--tls required)"
            );
        }
    }

    /// Puts TLS on a connection whose client was told to begin it. May be dropped at any point.
    pub(crate) async fn accept(&self, wire: Socket) -> std::result::Result<Socket, TlsFailure> {
        let session = self.session().map_err(session::Problem::from)?;
        let socket = TlsSocket::accept(wire, session, &self.shared.refused).await?;
        Ok(Socket::Tls(Box::new(socket)))
    }

    fn session(&self) -> std::result::Result<Session, String> {
        let loaded = self.shared.current.read().clone();
        match loaded {
            Loaded::X509(config) => X509Session::new(config).map(Session::X509),
            #[cfg(feature = "psk")]
            Loaded::Psk(config) => config.session().map(|session| Session::Psk(Box::new(session))),
        }
    }
}

/// What to say where pre-shared keys are asked of a build without them.
#[cfg(not(feature = "psk"))]
pub(crate) fn without_psk() -> crate::Error {
    files::invalid(
        "this program was built without pre-shared keys (the cargo feature psk): use certificates, or build it with them"
            .to_owned(),
    )
}
