//! Certificates and keys in a directory, in QEMU's layout, and what can be wrong with them.
//!
//! | file | what it holds | who needs it |
//! |---|---|---|
//! | `ca-cert.pem` | the certificate authority that signs the other side's certificate | clients; servers that verify them |
//! | `ca-crl.pem` | what the authority revoked | whoever verifies, if it is there |
//! | `server-cert.pem`, `server-key.pem` | the server's certificate, with those between it and the authority, and its key | servers |
//! | `client-cert.pem`, `client-key.pem` | the same of a client | clients, where the server verifies them |

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use rustls::{CipherSuite, RootCertStore};

use super::der::{Certificate, Moment, next_update};
use crate::{Error, ErrorKind, Result};

/// No file of credentials is longer, not even a system's bundle of authorities.
const MAX_FILE_BYTES: u64 = 4 << 20;

/// A directory of credentials.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CredentialsDir(pub(crate) PathBuf);

/// A certificate with those that follow it on the way to an authority, and its key.
pub(crate) struct Identity {
    pub(crate) chain: Vec<CertificateDer<'static>>,
    pub(crate) key: PrivateKeyDer<'static>,
}

/// Whose certificate it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Server,
    Client,
}

impl Side {
    const fn files(self) -> (&'static str, &'static str) {
        match self {
            Self::Server => ("server-cert.pem", "server-key.pem"),
            Self::Client => ("client-cert.pem", "client-key.pem"),
        }
    }
}

/// The one provider of cryptography: named wherever TLS is set up, because a process may have several. Of its ciphers, all of which
/// are good enough, it prefers the fastest here: disks are read at the pace at which they are encrypted.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    let mut provider = rustls::crypto::aws_lc_rs::default_provider();
    let fastest = if has_aes() { FAST_WITH_AES } else { FAST_WITHOUT_AES };
    // The others keep their order.
    provider.cipher_suites.sort_by_key(|suite| !fastest.contains(&suite.suite()));
    Arc::new(provider)
}

/// AES with a key of 128 bits takes 10 rounds, with one of 256 bits 14.
const FAST_WITH_AES: [CipherSuite; 3] = [
    CipherSuite::TLS13_AES_128_GCM_SHA256,
    CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
    CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
];
const FAST_WITHOUT_AES: [CipherSuite; 3] = [
    CipherSuite::TLS13_CHACHA20_POLY1305_SHA256,
    CipherSuite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
    CipherSuite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
];

/// Whether the processor has instructions for AES.
fn has_aes() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("aes");
    #[cfg(target_arch = "aarch64")]
    return std::arch::is_aarch64_feature_detected!("aes");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    return true;
}

pub(super) fn invalid(context: String) -> Error {
    Error::new(ErrorKind::InvalidCredentials, context)
}

/// The whole of a file of credentials; `what` says what it should hold.
pub(super) fn read(path: &Path, what: &str) -> Result<Vec<u8>> {
    let cannot = |why: &dyn std::fmt::Display, advice: &str| {
        invalid(format!("cannot read {what} in {}: {why}; {advice}", path.display()))
    };
    let advice = |error: &io::Error| match error.kind() {
        io::ErrorKind::NotFound => "make it, or name the directory that has it",
        io::ErrorKind::PermissionDenied => "let this user read it",
        _ => "look at the file",
    };
    let failed = |error: io::Error| cannot(&error, advice(&error));
    // A FIFO must not block us: at a reload connections wait.
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() {
        let kind = if metadata.is_dir() { "it is a directory" } else { "it is no regular file" };
        return Err(cannot(&kind, "put a regular file there, or a link to one"));
    }
    if metadata.len() > MAX_FILE_BYTES {
        return Err(cannot(&format_args!("it has {} bytes", metadata.len()), "it is no such file"));
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES).read_to_end(&mut bytes).map_err(failed)?;
    Ok(bytes)
}

fn certificates(path: &Path, what: &str) -> Result<Vec<CertificateDer<'static>>> {
    let bytes = read(path, what)?;
    let bad = |why: &dyn std::fmt::Display| {
        invalid(format!("{} does not hold {what}: {why}; it must be PEM (BEGIN CERTIFICATE)", path.display()))
    };
    let found = CertificateDer::pem_slice_iter(&bytes).map(|found| found.map_err(|error| bad(&error)));
    let found = found.collect::<Result<Vec<_>>>()?;
    if found.is_empty() {
        return Err(bad(&"there is no certificate in it"));
    }
    Ok(found)
}

/// Fails where a certificate's time is not now.
fn check_time(certificate: &CertificateDer<'_>, path: &Path, now: &Moment) -> Result<()> {
    let Some(read) = Certificate::parse(certificate) else {
        return Err(invalid(format!("{} holds a certificate that cannot be understood", path.display())));
    };
    let (name, path) = (&read.distinguished_name, path.display());
    if *now > read.not_after {
        let since = &read.not_after.0;
        return Err(invalid(format!(
            "the certificate of \"{name}\" in {path} expired on {since} UTC; renew it"
        )));
    }
    if *now < read.not_before {
        let from = &read.not_before.0;
        return Err(invalid(format!(
            "the certificate of \"{name}\" in {path} is not valid before {from} UTC; look at this host's clock, or wait"
        )));
    }
    Ok(())
}

fn now() -> Moment {
    // A clock before 1970 finds every certificate not yet valid.
    Moment::from_unix(SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()))
}

impl CredentialsDir {
    pub(crate) fn path(&self, file: &str) -> PathBuf {
        self.0.join(file)
    }

    pub(crate) fn has(&self, file: &str) -> bool {
        self.path(file).exists()
    }

    /// Whether there is a certificate for this side.
    pub(crate) fn has_identity(&self, side: Side) -> bool {
        self.has(side.files().0)
    }

    /// The certificate and the key of a side. That they belong together is found when they are used.
    pub(crate) fn identity(&self, side: Side) -> Result<Identity> {
        let (cert, key) = side.files();
        let (cert, key) = (self.path(cert), self.path(key));
        let whose = match side {
            Side::Server => "the server's",
            Side::Client => "the client's",
        };
        let chain = certificates(&cert, &format!("{whose} certificate"))?;
        check_time(&chain[0], &cert, &now())?;
        let bytes = read(&key, &format!("{whose} private key"))?;
        let key_of = |bytes| PrivateKeyDer::from_pem_slice(bytes);
        let found = key_of(&bytes).map_err(|error| {
            invalid(format!(
                "{} does not hold {whose} private key: {error}; it must be PEM and not encrypted (BEGIN PRIVATE KEY)",
                key.display()
            ))
        })?;
        if fs::metadata(&key).is_ok_and(|metadata| metadata.mode() & 0o004 != 0) {
            tracing::warn!(file = %key.display(), "others may read the private key: chmod 600 it");
        }
        Ok(Identity { chain, key: found })
    }

    /// That the key and the certificate of a side do not go together.
    pub(crate) fn mismatch(&self, side: Side, error: &rustls::Error) -> Error {
        let (cert, key) = side.files();
        let (cert, key) = (self.path(cert), self.path(key));
        match error {
            rustls::Error::InconsistentKeys(_) => invalid(format!(
                "the private key {} does not match the certificate {}; give both of one pair",
                key.display(),
                cert.display()
            )),
            error => invalid(format!("{} and {} cannot be used: {error}", cert.display(), key.display())),
        }
    }

    /// The certificate authorities.
    pub(crate) fn authorities(&self) -> Result<Arc<RootCertStore>> {
        authorities(&self.path("ca-cert.pem"))
    }

    /// What was revoked, if that is told.
    pub(crate) fn revoked(&self) -> Result<Vec<CertificateRevocationListDer<'static>>> {
        let path = self.path("ca-crl.pem");
        if !path.exists() {
            return Ok(Vec::new());
        }
        let bytes = read(&path, "the list of revoked certificates")?;
        let bad = |why: &dyn std::fmt::Display| {
            invalid(format!(
                "{} does not hold a list of revoked certificates: {why}; it must be PEM (BEGIN X509 CRL), or be removed",
                path.display()
            ))
        };
        let lists = CertificateRevocationListDer::pem_slice_iter(&bytes);
        let lists = lists.map(|list| list.map_err(|error| bad(&error))).collect::<Result<Vec<_>>>()?;
        if lists.is_empty() {
            // An empty list would let in what somebody believes to be revoked.
            return Err(bad(&"there is none in it"));
        }
        let now = now();
        let overdue = lists.iter().filter_map(|list| next_update(list)).find(|next| *next < now);
        if let Some(next) = overdue {
            return Err(invalid(format!(
                "the list of revoked certificates in {} expired on {} UTC: what was revoked since is not in it; get the \
                 authority's next one",
                path.display(),
                next.0
            )));
        }
        Ok(lists)
    }
}

/// The certificate authorities of a file. One that is valid now is enough: bundles hold old ones.
pub(crate) fn authorities(path: &Path) -> Result<Arc<RootCertStore>> {
    let found = certificates(path, "the certificate of the authority")?;
    let now = now();
    let mut store = RootCertStore::empty();
    let mut first_problem = None;
    for certificate in found {
        if let Err(error) = check_time(&certificate, path, &now) {
            first_problem.get_or_insert(error);
        } else if let Err(error) = store.add(certificate) {
            let bad =
                || invalid(format!("{} holds a certificate that is no authority's: {error}", path.display()));
            first_problem.get_or_insert_with(bad);
        }
    }
    match first_problem {
        Some(error) if store.is_empty() => Err(error),
        _ => Ok(Arc::new(store)),
    }
}
