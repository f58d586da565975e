//! The options of TLS, as every program that listens has them.

use std::path::PathBuf;

use clap::ValueEnum;

use super::{Credentials, TlsServer};
use crate::{Error, ErrorKind, Result};

/// Whether and with what to serve TLS.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "TLS")]
pub struct TlsArgs {
    /// Whether clients use TLS: off; on, where they ask for it; required, or they are served nothing. Required if not given
    /// and there are credentials, else off
    #[arg(long, value_enum, value_name = "MODE")]
    tls: Option<Choice>,

    /// Certificates: a directory with server-cert.pem and server-key.pem, as QEMU has it. They are read anew at SIGHUP, for
    /// the connections to come
    #[arg(long, value_name = "DIR", conflicts_with = "tls_psk")]
    tls_creds: Option<PathBuf>,

    /// Let in only clients with a certificate of the authority in ca-cert.pem, that ca-crl.pem (if it is there) does not revoke
    #[arg(long, requires = "tls_creds")]
    tls_verify_peer: bool,

    /// Let in only clients whose certificate has this name: its common name, one of its alternative names, or the whole
    /// distinguished name. Implies --tls-verify-peer; may be given several times
    #[arg(long, value_name = "NAME", requires = "tls_creds")]
    tls_allow: Vec<String>,

    /// Pre-shared keys in place of certificates: a file with a line NAME:KEY for each client, as psktool makes it, that others
    /// cannot read. Read anew at SIGHUP
    #[arg(long, value_name = "FILE")]
    tls_psk: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Choice {
    /// Nobody
    Off,
    /// Those who ask for it
    On,
    /// Everybody
    Required,
}

impl TlsArgs {
    /// Reads the files that are named; `None` where TLS is off.
    ///
    /// # Errors
    /// As [`TlsServer::load`]; where TLS is asked for and no credentials are named; where clients with keys are to have certificates.
    pub fn load(&self) -> Result<Option<TlsServer>> {
        self.check()?;
        let certificates = self.tls_creds.clone().map(|dir| Credentials::Certificates {
            dir,
            verify_peer: self.tls_verify_peer,
            allowed: self.tls_allow.clone(),
        });
        let credentials =
            certificates.or_else(|| self.tls_psk.clone().map(|file| Credentials::PreShared { file }));
        match (self.tls, credentials) {
            (Some(Choice::Off), _) | (None, None) => Ok(None),
            (Some(_), None) => Err(Error::new(
                ErrorKind::InvalidCredentials,
                "--tls needs credentials: give --tls-creds DIR or --tls-psk FILE",
            )),
            (choice, Some(credentials)) => TlsServer::load(credentials, choice != Some(Choice::On)).map(Some),
        }
    }

    /// Fails where something is asked of clients' certificates that have none: whoever has a key would come in.
    fn check(&self) -> Result<()> {
        let option = match self {
            Self { tls_psk: None, .. } => return Ok(()),
            Self { tls_verify_peer: true, .. } => "--tls-verify-peer",
            Self { tls_allow, .. } if !tls_allow.is_empty() => "--tls-allow",
            _ => return Ok(()),
        };
        Err(Error::new(
            ErrorKind::InvalidCredentials,
            format!(
                "{option} is for certificates, and with --tls-psk clients have none: leave it out, and keep in the file the keys of those \
                 clients alone that may come in"
            ),
        ))
    }
}

#[cfg(test)]
mod tests {
    use clap::{Args as _, FromArgMatches as _};

    use super::*;

    #[test]
    fn what_is_asked_of_certificates_is_refused_beside_keys() {
        for further in [&["--tls-allow", "web01"][..], &["--tls-verify-peer"]] {
            let args = [&["x", "--tls-psk", "keys.psk"], further].concat();
            let matches = TlsArgs::augment_args(clap::Command::new("x")).get_matches_from(args);
            let error = TlsArgs::from_arg_matches(&matches).unwrap().load().unwrap_err().to_string();
            assert!(error.contains(further[0]) && error.contains("leave it out"), "{error}");
        }
    }
}
