//! Certificates for the cells with TLS, in the layout that QEMU and nbdkit read, and where libnbd looks for them.

use std::path::Path;

use anyhow::{Context, Result};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};

use crate::endpoint::LOCALHOST;

/// Where libnbd looks, from the home directory.
const CLIENT: &str = ".pki/libnbd";

/// Writes an authority, a certificate for a server on the loopback interface, and one for its clients to `dir`.
pub(super) fn write(dir: &Path) -> Result<()> {
    let put = |name: &str, text: String| {
        let path = dir.join(name);
        std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
    };
    let mut authority = CertificateParams::new(Vec::new())?;
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate()?)?;
    put("ca-cert.pem", authority.pem())?;
    std::fs::create_dir_all(dir.join(CLIENT))?;
    put(&format!("{CLIENT}/ca-cert.pem"), authority.pem())?;
    let names = vec![LOCALHOST.to_owned(), "127.0.0.1".to_owned()];
    // nbd-server wants one of its clients, too.
    for (prefix, names) in [("server", names), (&format!("{CLIENT}/client"), Vec::new())] {
        let key = KeyPair::generate()?;
        let certificate = CertificateParams::new(names)?.signed_by(&key, &authority)?;
        put(&format!("{prefix}-cert.pem"), certificate.pem())?;
        put(&format!("{prefix}-key.pem"), key.serialize_pem())?;
    }
    Ok(())
}
