//! A client's TLS: what it trusts, who it says it is, and whom it believes to be talking to.

use std::io::Write as _;
use std::path::Path;
use std::sync::Arc;

use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::pki_types::ServerName;
use rustls::{CertificateError, ClientConfig, ClientConnection, Error as TlsError, StreamOwned};

use super::stream::{Stream, Wire};
use super::uri::{ClientTls, NbdUri};
use crate::tls::files::{self, CredentialsDir, Side};
use crate::{Error, ErrorKind, ListenAddress, Result};

/// Where systems keep the authorities that they trust.
const SYSTEM_AUTHORITIES: &[&str] = &[
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];
/// What a server behind a unix socket is called, as libnbd has it.
const UNIX_HOSTNAME: &str = "localhost";

/// What TLS needs beside a connection: read before one is made.
pub(super) enum Prepared {
    X509(Arc<ClientConfig>, ServerName<'static>),
    #[cfg(feature = "psk")]
    Psk(openssl::ssl::SslContext),
}

/// Reads the files that TLS to this export needs; `None` where it is asked for without TLS.
pub(super) fn prepare(uri: &NbdUri) -> Result<Option<Prepared>> {
    let Some(tls) = &uri.tls else { return Ok(None) };
    match &tls.psk_file {
        Some(file) => psk(file, tls).map(Some),
        None => x509(tls, &uri.address).map(Some),
    }
}

fn x509(tls: &ClientTls, address: &ListenAddress) -> Result<Prepared> {
    let hostname = match (&tls.hostname, address) {
        (Some(name), _) => name,
        (None, ListenAddress::Tcp { host, .. }) => host,
        (None, _) => UNIX_HOSTNAME,
    };
    let name = ServerName::try_from(hostname.to_owned()).map_err(|_| {
        Error::new(
            ErrorKind::InvalidAddress,
            format!("\"{hostname}\" is no name that a certificate can have"),
        )
    })?;
    let dir = tls.certificates.clone().map(CredentialsDir);
    let (authorities, revoked) = match &dir {
        Some(dir) => (dir.authorities()?, dir.revoked()?),
        None => (system_authorities()?, Vec::new()),
    };
    let cannot = |error: &dyn std::fmt::Display| {
        Error::new(ErrorKind::InvalidCredentials, format!("TLS cannot be set up: {error}"))
    };
    let provider = files::provider();
    let verifier = WebPkiServerVerifier::builder_with_provider(authorities, Arc::clone(&provider))
        .with_crls(revoked)
        .build()
        .map_err(|error| cannot(&error))?;
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
        .map_err(|error| cannot(&error))?
        .with_webpki_verifier(verifier);
    let mut config = match &dir {
        Some(dir) if dir.has_identity(Side::Client) => {
            let identity = dir.identity(Side::Client)?;
            builder
                .with_client_auth_cert(identity.chain, identity.key)
                .map_err(|error| dir.mismatch(Side::Client, &error))?
        }
        _ => builder.with_no_client_auth(),
    };
    config.resumption = Resumption::disabled();
    Ok(Prepared::X509(Arc::new(config), name))
}

fn system_authorities() -> Result<Arc<rustls::RootCertStore>> {
    let Some(path) = SYSTEM_AUTHORITIES.iter().map(Path::new).find(|path| path.exists()) else {
        return Err(Error::new(
            ErrorKind::InvalidCredentials,
            "no certificate authorities of the system were found to verify the server by: name those to trust by tls-certificates=DIR",
        ));
    };
    files::authorities(path)
}

#[cfg(not(feature = "psk"))]
fn psk(_: &Path, _: &ClientTls) -> Result<Prepared> {
    Err(crate::tls::without_psk())
}

#[cfg(feature = "psk")]
fn psk(file: &Path, tls: &ClientTls) -> Result<Prepared> {
    use openssl::ssl::{SslContext, SslMethod};

    let keys = crate::tls::keys::PskKeys::load(file)?;
    let own_name = || std::env::var("USER").or_else(|_| std::env::var("LOGNAME")).ok();
    let Some(name) = tls.username.clone().or_else(own_name) else {
        return Err(Error::new(
            ErrorKind::InvalidCredentials,
            "which pre-shared key is meant is not said: add tls-username=NAME",
        ));
    };
    let Some(key) = keys.key(&name).map(<[u8]>::to_vec) else {
        return Err(Error::new(
            ErrorKind::InvalidCredentials,
            format!("\"{name}\" has no key in {}: name another by tls-username=NAME", file.display()),
        ));
    };
    let build = || {
        let mut builder = SslContext::builder(SslMethod::tls_client())?;
        crate::tls::psk::harden(&mut builder)?;
        builder.set_psk_client_callback(move |_, _, name_room, key_room| {
            // The name ends with a zero. Where something does not fit, a length of zero fails the handshake.
            let (Some(name_room), Some(key_room)) =
                (name_room.get_mut(..=name.len()), key_room.get_mut(..key.len()))
            else {
                return Ok(0);
            };
            name_room[..name.len()].copy_from_slice(name.as_bytes());
            name_room[name.len()] = 0;
            key_room.copy_from_slice(&key);
            Ok(key.len())
        });
        Ok(builder.build())
    };
    build().map(Prepared::Psk).map_err(|error: openssl::error::ErrorStack| {
        Error::new(
            ErrorKind::InvalidCredentials,
            format!("TLS with pre-shared keys cannot be set up: {error}"),
        )
    })
}

impl Prepared {
    /// Shakes hands on a connection whose server was told to begin TLS.
    pub(super) fn begin(self, wire: Wire, server: &NbdUri) -> Result<Stream> {
        let failed = |why: String| {
            Error::new(ErrorKind::InvalidCredentials, format!("TLS with {server} came to nothing: {why}"))
        };
        match self {
            Self::X509(config, name) => {
                let shown = name.to_str().into_owned();
                let tls = ClientConnection::new(config, name).map_err(|error| failed(error.to_string()))?;
                let mut stream = Box::new(StreamOwned::new(tls, wire));
                while stream.conn.is_handshaking() {
                    stream.flush().map_err(|error| failed(explain(&error, &shown)))?;
                }
                Ok(Stream::X509(stream))
            }
            #[cfg(feature = "psk")]
            Self::Psk(context) => {
                let connect = || {
                    let ssl = openssl::ssl::Ssl::new(&context).map_err(|error| error.to_string())?;
                    ssl.connect(wire).map_err(|error| {
                        format!("{error}; does the server have this name's key, and the same one?")
                    })
                };
                connect().map(|stream| Stream::Psk(Box::new(stream))).map_err(failed)
            }
        }
    }
}

/// What is wrong, and what to do.
pub(super) fn explain(error: &std::io::Error, name: &str) -> String {
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<TlsError>());
    match tls {
        Some(TlsError::InvalidCertificate(problem)) => match problem {
            CertificateError::UnknownIssuer | CertificateError::BadSignature => "the server's certificate is not trusted: \
                 none of the authorities signed it (tls-certificates=DIR names the directory of its ca-cert.pem)"
                .to_owned(),
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                format!("the server's certificate is not one for \"{name}\" (tls-hostname=NAME names another): {problem}")
            }
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                "the server's certificate has expired".to_owned()
            }
            CertificateError::Revoked => "the server's certificate was revoked (ca-crl.pem)".to_owned(),
            other => format!("the server's certificate is not valid: {other}"),
        },
        Some(TlsError::AlertReceived(alert)) => refused(*alert),
        Some(other) => other.to_string(),
        None => error.to_string(),
    }
}

/// What a server means by an alert. It may come after the handshake: a server of TLS 1.3 looks at the client's certificate later.
pub(super) fn refused(alert: rustls::AlertDescription) -> String {
    use rustls::AlertDescription as Alert;
    let what = match alert {
        Alert::CertificateRequired => {
            "it wants a certificate: put client-cert.pem and client-key.pem into tls-certificates=DIR"
        }
        Alert::AccessDenied => "it knows this client's certificate, and does not let it in",
        Alert::UnknownCA | Alert::BadCertificate | Alert::CertificateUnknown | Alert::DecryptError => {
            "it does not trust this client's certificate"
        }
        Alert::CertificateExpired => "this client's certificate has expired",
        Alert::CertificateRevoked => "this client's certificate was revoked",
        _ => return format!("the server gave up ({alert:?})"),
    };
    format!("the server refused this client ({alert:?}): {what}")
}
