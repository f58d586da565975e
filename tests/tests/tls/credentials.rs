//! Directories of certificates, as QEMU lays them out.

use std::fs;
use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};

/// A directory with an authority, and a server's and a client's certificate of it.
pub(super) struct Credentials {
    dir: String,
    name: String,
}

impl Credentials {
    /// Makes the directory `dir`, with an authority of this name and a client of this common name. The server is `localhost`.
    pub(super) fn make(dir: &Path, authority: &str, client: &str) -> Self {
        fs::create_dir(dir).unwrap();
        let put = |file: &str, text: String| fs::write(dir.join(file), text).unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, authority);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().unwrap();
        put("ca-cert.pem", params.self_signed(&key).unwrap().pem());
        let issuer = Issuer::new(params, key);
        for (side, name) in [("server", "server"), ("client", client)] {
            let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
            params.distinguished_name = rcgen::DistinguishedName::new();
            params.distinguished_name.push(DnType::CommonName, name);
            params.subject_alt_names.push(SanType::IpAddress("127.0.0.1".parse().unwrap()));
            params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
            params.extended_key_usages = vec![match side {
                "server" => ExtendedKeyUsagePurpose::ServerAuth,
                _ => ExtendedKeyUsagePurpose::ClientAuth,
            }];
            let key = KeyPair::generate().unwrap();
            put(&format!("{side}-cert.pem"), params.signed_by(&key, &issuer).unwrap().pem());
            put(&format!("{side}-key.pem"), key.serialize_pem());
        }
        Self { dir: dir.to_str().unwrap().to_owned(), name: authority.to_owned() }
    }

    pub(super) fn dir(&self) -> &str {
        &self.dir
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    fn take(&self, file: &str, from: &Self) {
        fs::copy(Path::new(&from.dir).join(file), Path::new(&self.dir).join(file)).unwrap();
    }

    /// A directory that trusts the authority, and has no certificate of a client.
    pub(super) fn without_client(&self, dir: &Path) -> String {
        fs::create_dir(dir).unwrap();
        fs::copy(Path::new(&self.dir).join("ca-cert.pem"), dir.join("ca-cert.pem")).unwrap();
        dir.to_str().unwrap().to_owned()
    }

    /// Trusts the authority of another in place of its own.
    pub(super) fn trust(&self, other: &Self) {
        self.take("ca-cert.pem", other);
    }

    /// Takes the server's certificate of another.
    pub(super) fn serve_as(&self, other: &Self) {
        self.take("server-cert.pem", other);
        self.take("server-key.pem", other);
    }
}
