//! A server's TLS with certificates, by rustls.

use std::io::{self, IoSlice, Read, Write};
use std::sync::Arc;

use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{AlertDescription, CertificateError, Error as TlsError, ServerConfig, ServerConnection};

use super::allow::{AllowList, ListedClients};
use super::files::{self, CredentialsDir, Side};
use super::session::{MAX_UNSENT_BYTES, Plain, Problem};
use crate::Result;
use crate::log_limit::LogLimit;

/// What a server's certificates are, and whom it lets in.
#[derive(Clone, Debug)]
pub(super) struct X509 {
    pub(super) dir: CredentialsDir,
    pub(super) verify_peer: bool,
    pub(super) allowed: AllowList,
    /// How often it may be said that a client was refused.
    pub(super) refused: Arc<LogLimit>,
}

impl X509 {
    /// Reads the files.
    pub(super) fn load(&self) -> Result<Arc<ServerConfig>> {
        let identity = self.dir.identity(Side::Server)?;
        let provider = files::provider();
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
            .map_err(|error| files::invalid(format!("TLS cannot be set up: {error}")))?;
        let builder = if self.verify_peer {
            let verifier = WebPkiClientVerifier::builder_with_provider(self.dir.authorities()?, provider)
                .with_crls(self.dir.revoked()?)
                .enforce_revocation_expiration()
                .build()
                .map_err(|error| {
                    let (ca, crl) = (self.dir.path("ca-cert.pem"), self.dir.path("ca-crl.pem"));
                    let files = format!("{} or {}", ca.display(), crl.display());
                    files::invalid(format!("clients cannot be verified by {files}: {error}"))
                })?;
            builder.with_client_cert_verifier(Arc::new(ListedClients {
                verifier,
                allowed: self.allowed.clone(),
                refused: Arc::clone(&self.refused),
            }))
        } else {
            builder.with_no_client_auth()
        };
        let mut config = builder
            .with_single_cert(identity.chain, identity.key)
            .map_err(|error| self.dir.mismatch(Side::Server, &error))?;
        // Clients of GnuTLS would have the slowest.
        config.ignore_client_order = true;
        // A session that is taken up again would pass by the list and the certificates of now; disks stay connected for days.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Arc::new(config))
    }
}

/// One connection's TLS.
#[derive(Debug)]
pub(super) struct X509Session {
    tls: Box<ServerConnection>,
}

impl X509Session {
    pub(super) fn new(config: Arc<ServerConfig>) -> std::result::Result<Self, String> {
        let mut tls = ServerConnection::new(config).map_err(|error| error.to_string())?;
        tls.set_buffer_limit(Some(MAX_UNSENT_BYTES));
        Ok(Self { tls: Box::new(tls) })
    }

    pub(super) fn is_handshaking(&self) -> bool {
        self.tls.is_handshaking()
    }

    pub(super) fn take(&mut self, cipher: &[u8]) -> std::result::Result<usize, Problem> {
        let mut rest = cipher;
        while !rest.is_empty() && self.tls.wants_read() {
            match self.tls.read_tls(&mut rest) {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) => return Err(error.to_string().into()),
            }
            self.tls.process_new_packets().map_err(|error| problem(&error))?;
        }
        Ok(cipher.len() - rest.len())
    }

    pub(super) fn read(&mut self, buf: &mut [u8]) -> std::result::Result<Plain, Problem> {
        match self.tls.reader().read(buf) {
            Ok(0) => Ok(Plain::Ended),
            Ok(len) => Ok(Plain::Bytes(len)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Plain::NoneYet),
            Err(error) => Err(error.to_string().into()),
        }
    }

    pub(super) fn write(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.tls.writer().write_vectored(slices)
    }

    pub(super) fn has_unsent(&self) -> bool {
        self.tls.wants_write()
    }

    pub(super) fn send(&mut self, wire: &mut impl Write) -> io::Result<usize> {
        self.tls.write_tls(wire)
    }

    pub(super) fn end(&mut self) {
        self.tls.send_close_notify();
    }

    pub(super) fn describe(&self) -> String {
        let version = self.tls.protocol_version().and_then(|version| version.as_str().map(str::to_owned));
        let suite = self.tls.negotiated_cipher_suite().map(|suite| format!("{:?}", suite.suite()));
        format!("{} {}", version.unwrap_or_default(), suite.unwrap_or_default())
    }
}

fn problem(error: &TlsError) -> Problem {
    let not_listed = TlsError::InvalidCertificate(CertificateError::ApplicationVerificationFailure);
    // The verifier has said whose certificate it was.
    Problem { why: explain(error), is_logged: *error == not_listed }
}

/// Why a client's TLS came to nothing, and what to do.
fn explain(error: &TlsError) -> String {
    let client = |what: &str| format!("the client's certificate {what}");
    match error {
        TlsError::NoCertificatesPresented => "the client showed no certificate, and this server wants one \
             (--tls-verify-peer): give it a client-cert.pem and a client-key.pem that ca-cert.pem signed"
            .to_owned(),
        TlsError::InvalidCertificate(problem) => match problem {
            CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                client("is not trusted: none of the authorities in ca-cert.pem signed it")
            }
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => client("has expired"),
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                client("is not valid yet; look at the clocks of both hosts")
            }
            CertificateError::Revoked => client("was revoked (ca-crl.pem)"),
            CertificateError::UnknownRevocationStatus => {
                client("may have been revoked: ca-crl.pem has no list of the authority that signed it")
            }
            CertificateError::ExpiredRevocationList
            | CertificateError::ExpiredRevocationListContext { .. } => client(
                "may have been revoked: ca-crl.pem has expired; put the authority's next list there, and send SIGHUP",
            ),
            CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
                client("is not one for clients: its extended key usage lacks TLS client authentication")
            }
            CertificateError::ApplicationVerificationFailure => client("is not on the list (--tls-allow)"),
            other => client(&format!("is not valid: {other}")),
        },
        TlsError::AlertReceived(alert) => match alert {
            AlertDescription::UnknownCA
            | AlertDescription::BadCertificate
            | AlertDescription::CertificateUnknown => {
                format!(
                    "the client refused the certificate of this server ({alert:?}): its ca-cert.pem must be the authority's \
                     that signed server-cert.pem, and it must know this host by a name that is in there"
                )
            }
            alert => format!("the client gave up ({alert:?})"),
        },
        TlsError::PeerIncompatible(why) => {
            format!(
                "the client has no version or cipher in common with this server ({why:?}): TLS 1.2 or 1.3 is needed"
            )
        }
        TlsError::InvalidMessage(_) => format!("the client sent something that is not TLS ({error})"),
        error => error.to_string(),
    }
}
