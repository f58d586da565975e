//! Certificate authorities, and directories of credentials as QEMU lays them out.
#![allow(clippy::unwrap_used, reason = "what a test calls may panic as the test may")]

use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SanType, SerialNumber,
    date_time_ymd,
};

/// An authority that signs whatever it is given.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

/// How a certificate is out of the ordinary.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Flaw {
    #[default]
    None,
    Expired,
    NotYetValid,
}

impl Authority {
    pub(crate) fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    fn identity(&self, name: &str, serial: u64, flaw: Flaw) -> (String, String) {
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        params.subject_alt_names.push(SanType::IpAddress("127.0.0.1".parse().unwrap()));
        params.distinguished_name.push(DnType::CommonName, name);
        params.serial_number = Some(SerialNumber::from(serial));
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        match flaw {
            Flaw::None => {}
            Flaw::Expired => params.not_after = date_time_ymd(2001, 2, 3),
            Flaw::NotYetValid => params.not_before = date_time_ymd(4001, 2, 3),
        }
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        (certificate.pem(), key.serialize_pem())
    }

    /// A list that revokes the certificate of this serial number, and is followed by another one in this year.
    fn revocation(&self, serial: u64, next: i32) -> String {
        let params = CertificateRevocationListParams {
            this_update: date_time_ymd(2024, 1, 1),
            next_update: date_time_ymd(next, 1, 1),
            crl_number: SerialNumber::from(1_u64),
            issuing_distribution_point: None,
            revoked_certs: vec![RevokedCertParams {
                serial_number: SerialNumber::from(serial),
                revocation_time: date_time_ymd(2024, 1, 1),
                reason_code: None,
                invalidity_date: None,
            }],
            key_identifier_method: KeyIdMethod::Sha256,
        };
        params.signed_by(&self.issuer).unwrap().pem().unwrap()
    }
}

/// A directory of credentials.
pub(crate) struct Dir(tempfile::TempDir);

impl Dir {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// One with all that a server and a client `client` need.
    pub(crate) fn whole(authority: &Authority) -> Self {
        Self::new().trusting(authority).serving(authority, Flaw::None).client(authority, "client", 7)
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    fn put(self, name: &str, text: &str) -> Self {
        std::fs::write(self.file(name), text).unwrap();
        self
    }

    pub(crate) fn trusting(self, authority: &Authority) -> Self {
        self.put("ca-cert.pem", &authority.pem)
    }

    pub(crate) fn revoking(self, authority: &Authority, serial: u64) -> Self {
        self.revoking_until(authority, serial, 4096)
    }

    pub(crate) fn revoking_until(self, authority: &Authority, serial: u64, next: i32) -> Self {
        self.put("ca-crl.pem", &authority.revocation(serial, next))
    }

    pub(crate) fn serving(self, authority: &Authority, flaw: Flaw) -> Self {
        let (certificate, key) = authority.identity("server", 1, flaw);
        self.put("server-cert.pem", &certificate).put("server-key.pem", &key)
    }

    pub(crate) fn client(self, authority: &Authority, name: &str, serial: u64) -> Self {
        let (certificate, key) = authority.identity(name, serial, Flaw::None);
        self.put("client-cert.pem", &certificate).put("client-key.pem", &key)
    }
}
