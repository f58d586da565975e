//! Where a server listens, as people write it, and the URI by which clients find it.

use std::fmt::{self, Write};
use std::path::PathBuf;
use std::str::FromStr;

use crate::{Error, ErrorKind};

/// An address to listen at: `unix:PATH`, `tcp:HOST:PORT` (an IPv6 host in brackets), `vsock:CID:PORT`, or `systemd`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ListenAddress {
    /// A unix socket.
    Unix(PathBuf),
    /// A TCP port on the addresses of a host.
    Tcp {
        /// A name or an address, without brackets.
        host: String,
        /// The port; 0 lets the system choose one.
        port: u16,
    },
    /// A port of the sockets between a host and its virtual machines.
    Vsock {
        /// The context to listen in: our own number, or 1 for clients on this very machine; `None` is any.
        cid: Option<u32>,
        /// The port.
        port: u32,
    },
    /// The sockets that systemd listens at for us. What is bound has the addresses of those instead.
    Systemd,
}

/// The forms of an address, for messages.
const FORMS: &str = "unix:PATH, tcp:HOST:PORT, vsock:CID:PORT or systemd";
/// The number that says "any" where a CID or a port stands.
const VSOCK_ANY: u32 = u32::MAX;
/// The number by which a machine knows its host.
const VSOCK_HOST: u32 = 2;
/// What NBD's URIs take where none is written.
const NBD_PORT: u16 = 10809;
/// The kernel's `sun_path` holds 108 bytes, the last of them zero.
const LONGEST_UNIX_PATH: usize = 107;

impl ListenAddress {
    /// The URI of the export of this name at this address, for nbdinfo, nbdcopy, qemu-img and others.
    #[must_use]
    pub fn uri(&self, export: &str) -> String {
        self.uri_over(export, false)
    }

    /// The same, with TLS or without.
    #[must_use]
    pub fn uri_over(&self, export: &str, tls: bool) -> String {
        let export = Escaped(export.as_bytes());
        let scheme = if tls { "nbds" } else { "nbd" };
        match self {
            Self::Unix(path) => {
                let path = Escaped(path.as_os_str().as_encoded_bytes());
                format!("{scheme}+unix:///{export}?socket={path}")
            }
            Self::Tcp { host, port } if host.contains(':') => format!("{scheme}://[{host}]:{port}/{export}"),
            Self::Tcp { host, port } => format!("{scheme}://{host}:{port}/{export}"),
            Self::Vsock { cid, port } => {
                format!("{scheme}+vsock://{}:{port}/{export}", cid.unwrap_or(VSOCK_HOST))
            }
            Self::Systemd => format!("{scheme}://"),
        }
    }
}

impl FromStr for ListenAddress {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let invalid = |why: &str| {
            Err(Error::new(
                ErrorKind::InvalidAddress,
                format!("\"{text}\" is no address to listen at: {why} ({FORMS})"),
            ))
        };
        match text.split_once(':') {
            None if text == "systemd" => Ok(Self::Systemd),
            Some(("unix", "")) => invalid("the path is missing"),
            Some(("unix", path)) if path.len() > LONGEST_UNIX_PATH => Err(Error::new(
                ErrorKind::InvalidAddress,
                format!(
                    "\"{text}\" is no address to listen at: a unix socket's path has at most {LONGEST_UNIX_PATH} bytes, and \
                     this one has {}; choose a shorter one, such as /run/lifeboot.sock",
                    path.len()
                ),
            )),
            Some(("unix", path)) => Ok(Self::Unix(path.into())),
            Some(("tcp", rest)) => {
                let (host, port) = if let Some(rest) = rest.strip_prefix('[') {
                    let Some((host, after)) = rest.split_once(']') else {
                        return invalid("the bracket is not closed");
                    };
                    match after.strip_prefix(':') {
                        Some(port) => (host, Some(port)),
                        None if after.is_empty() => (host, None),
                        None => return invalid("something follows the bracket"),
                    }
                } else {
                    match rest.split_once(':') {
                        Some((_, port)) if port.contains(':') => {
                            return invalid("an IPv6 address stands in brackets");
                        }
                        Some((host, port)) => (host, Some(port)),
                        None => (rest, None),
                    }
                };
                if host.is_empty() {
                    return invalid("the host is missing");
                }
                match port.map_or(Ok(NBD_PORT), str::parse) {
                    Ok(port) => Ok(Self::Tcp { host: host.to_owned(), port }),
                    Err(_) => invalid("the port is not a number from 0 to 65535"),
                }
            }
            Some(("vsock", rest)) => {
                let Some((cid, port)) = rest.split_once(':') else {
                    return invalid("a CID and a port follow vsock:");
                };
                let cid = match cid {
                    "any" => None,
                    number => match number.parse() {
                        Ok(cid) if cid != VSOCK_ANY => Some(cid),
                        _ => return invalid("the CID is neither `any` nor a number below 4294967295"),
                    },
                };
                match port.parse() {
                    Ok(port) if port != VSOCK_ANY => Ok(Self::Vsock { cid, port }),
                    _ => invalid("the port is not a number below 4294967295"),
                }
            }
            _ => invalid("it begins with none of these"),
        }
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
            Self::Vsock { cid: None, port } => write!(f, "vsock:any:{port}"),
            Self::Vsock { cid: Some(cid), port } => write!(f, "vsock:{cid}:{port}"),
            Self::Systemd => f.write_str("systemd"),
        }
    }
}

/// Bytes as they may stand in a URI: whatever has a meaning there is escaped, but for the slash.
struct Escaped<'a>(&'a [u8]);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for &byte in self.0 {
            if byte.is_ascii_alphanumeric() || b"-._~/:@".contains(&byte) {
                f.write_char(char::from(byte))?;
            } else {
                write!(f, "%{byte:02X}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_survive_the_way_there_and_back() {
        for text in [
            "unix:/run/x y.sock",
            "unix:a:b",
            "tcp:localhost:10809",
            "tcp:[::1]:0",
            "tcp:10.0.0.1:65535",
            "vsock:any:10809",
            "vsock:3:1",
            "systemd",
        ] {
            assert_eq!(text.parse::<ListenAddress>().unwrap().to_string(), text);
        }
        assert_eq!("tcp:host".parse::<ListenAddress>().unwrap().to_string(), "tcp:host:10809");
        assert_eq!("tcp:[::1]".parse::<ListenAddress>().unwrap().to_string(), "tcp:[::1]:10809");
    }

    #[test]
    fn what_is_no_address_says_why() {
        for (text, why) in [
            ("unix:", "path is missing"),
            ("tcp:", "host is missing"),
            ("tcp::10", "host is missing"),
            ("tcp:h:70000", "the port"),
            ("tcp:::1:10", "in brackets"),
            ("tcp:[::1", "not closed"),
            ("tcp:[::1]x", "follows the bracket"),
            ("vsock:1", "a CID and a port"),
            ("vsock:x:1", "the CID"),
            ("vsock:4294967295:1", "the CID"),
            ("vsock:any:-1", "the port"),
            ("systemd:3", "none of these"),
            ("/run/socket", "none of these"),
        ] {
            let error = text.parse::<ListenAddress>().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidAddress);
            assert!(error.to_string().contains(why), "{error}");
        }
    }

    #[test]
    fn a_unix_path_that_the_kernel_cannot_hold_is_refused_with_the_numbers() {
        let path = |len: usize| format!("unix:/{}", "x".repeat(len - 1));
        assert!(path(107).parse::<ListenAddress>().is_ok());
        let error = path(108).parse::<ListenAddress>().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidAddress);
        for word in ["at most 107 bytes", "has 108", "shorter"] {
            assert!(error.to_string().contains(word), "{error}");
        }
    }

    #[test]
    fn uris_escape_what_has_a_meaning_in_them() {
        let unix: ListenAddress = "unix:/tmp/a b?c".parse().unwrap();
        assert_eq!(unix.uri("disk 0"), "nbd+unix:///disk%200?socket=/tmp/a%20b%3Fc");
        let tcp: ListenAddress = "tcp:[::1]:99".parse().unwrap();
        assert_eq!(tcp.uri(""), "nbd://[::1]:99/");
        let vsock: ListenAddress = "vsock:any:7".parse().unwrap();
        assert_eq!(vsock.uri("a"), "nbd+vsock://2:7/a");
        assert_eq!(tcp.uri_over("", true), "nbds://[::1]:99/");
        assert!(unix.uri_over("x", true).starts_with("nbds+unix:///x?"));
    }
}
