//! The list of the clients that may connect, and the verifier that asks it.
//!
//! A certificate is first verified against the certificate authority; only then its names mean anything. One of them must
//! equal one of the list, as a whole: there are no patterns. What is compared is said at [`AllowList::allows`].

use std::sync::Arc;
use std::time::Instant;

use proto::wire::Cut;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, Error, SignatureScheme};

use super::der::{AlternativeName, Certificate};
use crate::log_limit::LogLimit;

/// The names that were given; where there are none, every verified client may connect.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct AllowList(pub(super) Vec<String>);

impl AllowList {
    /// Whether one of these is the certificate's distinguished name (`CN=…,O=…`, as RFC 4514 writes it), a common name of its subject,
    /// or one of the subject's alternative names: a DNS name or a mail address in upper or lower case, a URI, an IP address.
    pub(super) fn allows(&self, certificate: &Certificate) -> bool {
        let is_named = |listed: &String| {
            certificate.distinguished_name == *listed
                || certificate.common_names.contains(listed)
                || certificate.alternative_names.iter().any(|name| match name {
                    AlternativeName::AnyCase(name) => name.eq_ignore_ascii_case(listed),
                    AlternativeName::Exact(name) => name == listed,
                })
        };
        self.0.is_empty() || self.0.iter().any(is_named)
    }
}

/// Verifies clients' certificates, and asks the list.
#[derive(Debug)]
pub(super) struct ListedClients {
    pub(super) verifier: Arc<dyn ClientCertVerifier>,
    pub(super) allowed: AllowList,
    pub(super) refused: Arc<LogLimit>,
}

impl ClientCertVerifier for ListedClients {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.verifier.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.verifier.verify_client_cert(end_entity, intermediates, now)?;
        let certificate =
            Certificate::parse(end_entity).ok_or(Error::InvalidCertificate(CertificateError::BadEncoding))?;
        if self.allowed.allows(&certificate) {
            return Ok(verified);
        }
        if let Some(left_out) = self.refused.admit(Instant::now()) {
            tracing::warn!(
                left_out,
                client = %Cut(&certificate.distinguished_name),
                "a client was refused: its certificate is valid, but none of its names is on the list (--tls-allow)"
            );
        }
        // "Access denied" is what the client is told.
        Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verifier.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verifier.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.verifier.supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_is_allowed_by_a_whole_name_and_no_other() {
        let certificate = Certificate {
            distinguished_name: "CN=backup,O=Example".into(),
            common_names: vec!["backup".into()],
            alternative_names: vec![
                AlternativeName::AnyCase("Backup.Example".into()),
                AlternativeName::Exact("spiffe://example/backup".into()),
            ],
            ..Certificate::default()
        };
        let allows = |name: &str| AllowList(vec!["other".into(), name.into()]).allows(&certificate);
        for name in ["backup", "CN=backup,O=Example", "backup.example", "spiffe://example/backup"] {
            assert!(allows(name), "{name}");
        }
        for name in
            ["Backup", "CN=backup", "backup.example.", "*.example", "example", "", "SPIFFE://example/backup"]
        {
            assert!(!allows(name), "{name}");
        }
        assert!(AllowList::default().allows(&certificate));
    }
}
