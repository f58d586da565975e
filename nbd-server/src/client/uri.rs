//! Where an export is, as an NBD URI says it.
//!
//! `nbd://HOST[:PORT]/EXPORT` and `nbd+unix:///EXPORT?socket=PATH`; with `nbds` TLS is used, or nothing is. Its parameters are libnbd's:
//! `tls-certificates=DIR`, `tls-psk-file=FILE`, `tls-username=NAME` (or `NAME@` before the host), `tls-hostname=HOST`.

use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::{Error, ErrorKind, ListenAddress, Result};

/// An export somewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdUri {
    /// Where the server listens.
    pub address: ListenAddress,
    /// The export's name; empty for the server's only or first one.
    pub export: String,
    /// TLS, if it is asked for.
    pub tls: Option<ClientTls>,
}

/// How a client does TLS.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientTls {
    /// A directory in QEMU's layout: `ca-cert.pem`, by which the server is verified, and, if they are there, `ca-crl.pem`, `client-cert.pem`
    /// and `client-key.pem`. Without it the authorities that the system trusts verify the server.
    pub certificates: Option<PathBuf>,
    /// A file of pre-shared keys, in place of certificates. Needs the feature `psk`.
    pub psk_file: Option<PathBuf>,
    /// Which of these keys; the user's own name if none is given.
    pub username: Option<String>,
    /// The name that must be in the server's certificate, if it is not the one that was connected to. A server behind a unix socket
    /// is `localhost` if not said otherwise.
    pub hostname: Option<String>,
}

impl ClientTls {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl From<ListenAddress> for NbdUri {
    /// The first export there, without TLS.
    fn from(address: ListenAddress) -> Self {
        Self { address, export: String::new(), tls: None }
    }
}

impl FromStr for NbdUri {
    type Err = Error;

    /// An NBD URI; `unix:PATH` and `tcp:HOST:PORT` are taken too.
    fn from_str(text: &str) -> Result<Self> {
        let Some((scheme, rest)) = text.split_once("://") else {
            return text.parse::<ListenAddress>().map(Self::from).map_err(|error| {
                Error::new(
                    ErrorKind::InvalidAddress,
                    format!("{error}; or an NBD URI: nbd://HOST:PORT/EXPORT, nbd+unix:///EXPORT?socket=PATH, with TLS nbds://, nbds+unix://"),
                )
            });
        };
        let invalid =
            |why: &str| Error::new(ErrorKind::InvalidAddress, format!("\"{text}\" is no NBD URI: {why}"));
        let (secure, unix) = match scheme {
            "nbd" => (false, false),
            "nbds" => (true, false),
            "nbd+unix" => (false, true),
            "nbds+unix" => (true, true),
            _ => return Err(invalid("it begins with none of nbd:, nbds:, nbd+unix:, nbds+unix:")),
        };
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, export) = rest.split_once('/').unwrap_or((rest, ""));
        let text_of = |escaped: &str| {
            unescaped(escaped)
                .and_then(|bytes| String::from_utf8(bytes).ok())
                .ok_or_else(|| invalid("it is no text"))
        };
        let path_of = |escaped: &str| match unescaped(escaped) {
            Some(bytes) if !bytes.is_empty() => Ok(PathBuf::from(OsString::from_vec(bytes))),
            _ => Err(invalid("a path in it is none")),
        };
        let (user, host) =
            authority.rsplit_once('@').map_or((None, authority), |(user, host)| (Some(user), host));
        let mut tls = ClientTls { username: user.map(text_of).transpose()?, ..ClientTls::default() };
        let mut socket = None;
        for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
            let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
            match name {
                "socket" => socket = Some(path_of(value)?),
                "tls-certificates" => tls.certificates = Some(path_of(value)?),
                "tls-psk-file" => tls.psk_file = Some(path_of(value)?),
                "tls-username" => tls.username = Some(text_of(value)?),
                "tls-hostname" => tls.hostname = Some(text_of(value)?),
                "tls-verify-peer" if matches!(value, "true" | "1" | "yes" | "on") => {}
                "tls-verify-peer" => {
                    return Err(invalid(
                        "the server is always verified; give tls-certificates=DIR with its ca-cert.pem",
                    ));
                }
                // What is passed over might have been meant to protect something.
                _ => return Err(invalid(&format!("the parameter {name} is not known"))),
            }
        }
        if !secure && !tls.is_default() {
            return Err(invalid("it has parameters of TLS without TLS: begin it with nbds: or nbds+unix:"));
        }
        if tls.certificates.is_some() && tls.psk_file.is_some() {
            return Err(invalid("certificates and pre-shared keys exclude each other"));
        }
        let address = match (unix, socket) {
            (true, Some(path)) if host.is_empty() => ListenAddress::Unix(path),
            (true, Some(_)) => {
                return Err(invalid("a unix socket has no host: nbd+unix:///EXPORT?socket=PATH"));
            }
            (true, None) => return Err(invalid("the socket is missing: nbd+unix:///EXPORT?socket=PATH")),
            (false, Some(_)) => return Err(invalid("a socket goes with nbd+unix: or nbds+unix:")),
            (false, None) => format!("tcp:{}", text_of(host)?)
                .parse()
                .map_err(|error: Error| invalid(&error.to_string()))?,
        };
        Ok(Self { address, export: text_of(export)?, tls: secure.then_some(tls) })
    }
}

impl fmt::Display for NbdUri {
    /// Without the parameters of TLS, which are this host's matter.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.address.uri_over(&self.export, self.tls.is_some()))
    }
}

/// Takes `%41` for `A`; `None` where an escape is none.
fn unescaped(text: &str) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        if byte != b'%' {
            out.push(byte);
            continue;
        }
        let (digits, after) = rest.split_at_checked(2)?;
        rest = after;
        let digits = std::str::from_utf8(digits)
            .ok()
            .filter(|digits| digits.bytes().all(|d| d.is_ascii_hexdigit()))?;
        out.push(u8::from_str_radix(digits, 16).ok()?);
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_say_where_and_how() {
        let uri: NbdUri =
            "nbds+unix:///disk%200?socket=/run/a%26b&tls-certificates=/etc/pki".parse().unwrap();
        assert_eq!(uri.address, ListenAddress::Unix("/run/a&b".into()));
        assert_eq!(uri.export, "disk 0");
        assert_eq!(uri.tls.as_ref().unwrap().certificates, Some("/etc/pki".into()));
        assert_eq!(uri.to_string(), "nbds+unix:///disk%200?socket=/run/a%26b");

        let uri: NbdUri = "nbds://alice@[::1]:99/x/y?tls-psk-file=/k&tls-hostname=h".parse().unwrap();
        assert_eq!(uri.address, "tcp:[::1]:99".parse().unwrap());
        assert_eq!(uri.export, "x/y");
        let tls = uri.tls.unwrap();
        assert_eq!((tls.username.as_deref(), tls.hostname.as_deref()), (Some("alice"), Some("h")));

        let uri: NbdUri = "nbd://host".parse().unwrap();
        assert_eq!((uri.to_string().as_str(), uri.tls), ("nbd://host:10809/", None));
        assert_eq!("unix:/run/x".parse::<NbdUri>().unwrap().address, "unix:/run/x".parse().unwrap());
    }

    #[test]
    fn what_is_no_uri_says_why() {
        for (text, why) in [
            ("http://host", "begins with none"),
            ("nbd+unix:///x", "socket is missing"),
            ("nbd+unix://host/x?socket=/s", "has no host"),
            ("nbd://host/?socket=/s", "goes with nbd+unix"),
            ("nbd://host/?tls-certificates=/x", "without TLS"),
            ("nbd://alice@host/", "without TLS"),
            ("nbds://host/?tls-verify-peer=false", "always verified"),
            ("nbds://host/?tls-certificates=/x&tls-psk-file=/y", "exclude each other"),
            ("nbds://host/?tls-certificate=/x", "is not known"),
            ("nbds://host/%zz", "no text"),
            ("nbds:///x", "host is missing"),
        ] {
            let error = text.parse::<NbdUri>().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidAddress, "{text}");
            assert!(error.to_string().contains(why), "{text}: {error}");
        }
    }
}
