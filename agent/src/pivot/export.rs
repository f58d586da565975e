//! Whether an NBD node of QEMU's points to our export, by the address that QEMU says it has.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use nbd_server::ListenAddress;
use serde_json::Value;

use super::Home;

/// Where an NBD node points to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pointed {
    pub(super) server: Server,
    pub(super) export: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Server {
    Unix(PathBuf),
    Tcp { host: String, port: String },
}

impl Pointed {
    /// Of a node's file name: `nbd+unix:///EXPORT?socket=PATH`, `nbd://HOST:PORT/EXPORT`, or `json:{…}`. QEMU escapes
    /// nothing in the first two.
    pub(super) fn parse(name: &str) -> Option<Self> {
        if let Some(text) = name.strip_prefix("json:") {
            return Self::of_options(&serde_json::from_str(text).ok()?);
        }
        if let Some(rest) = name.strip_prefix("nbd+unix://") {
            // An export's name may hold a question mark; a socket's path follows the last such mark.
            let (export, path) = rest.rsplit_once("?socket=")?;
            let export = export.strip_prefix('/').unwrap_or(export).to_owned();
            return Some(Self { server: Server::Unix(path.into()), export });
        }
        let rest = name.strip_prefix("nbd://")?;
        let (server, export) = rest.split_once('/').unwrap_or((rest, ""));
        let (host, port) = match server.rsplit_once(':') {
            Some((host, port)) if !port.ends_with(']') => (host, port),
            _ => (server, "10809"),
        };
        let host = host.trim_matches(['[', ']']).to_owned();
        Some(Self { server: Server::Tcp { host, port: port.to_owned() }, export: export.to_owned() })
    }

    /// Of a node's options, nested or flat.
    fn of_options(options: &Value) -> Option<Self> {
        let text = |name: &str| {
            let nested = name.split('.').try_fold(options, |value, part| value.get(part));
            let value = nested.or_else(|| options.get(name))?;
            value.as_str().map(str::to_owned).or_else(|| value.as_u64().map(|number| number.to_string()))
        };
        let export = text("export").unwrap_or_default();
        let server = match text("server.path").or_else(|| text("path")) {
            Some(path) => Server::Unix(path.into()),
            None => Server::Tcp {
                host: text("server.host").or_else(|| text("host"))?,
                port: text("server.port").or_else(|| text("port")).unwrap_or_else(|| "10809".into()),
            },
        };
        Some(Self { server, export })
    }

    /// Whether that is the export of `home`.
    pub(super) fn is_of(&self, home: &Home<'_>) -> bool {
        let has_epoch = || format!("{}@{}", home.export, home.epoch) == self.export;
        let is_name = self.export == home.export || (self.export.is_empty() && home.is_default);
        (is_name || has_epoch()) && home.addresses.iter().any(|address| self.server.is_at(address))
    }
}

impl Server {
    fn is_at(&self, address: &ListenAddress) -> bool {
        match (self, address) {
            (Self::Unix(theirs), ListenAddress::Unix(ours)) => is_same_socket(theirs, ours),
            (Self::Tcp { host, port }, ListenAddress::Tcp { host: ours, port: our_port }) => {
                let is_any = matches!(ours.trim_matches(['[', ']']), "0.0.0.0" | "::" | "");
                port.parse() == Ok(*our_port) && (is_any || is_same_host(host, ours))
            }
            _ => false,
        }
    }
}

/// One file, or one path where there is none (a server that ended takes its socket along).
fn is_same_socket(theirs: &Path, ours: &Path) -> bool {
    let file = |path: &Path| std::fs::metadata(path).map(|metadata| (metadata.dev(), metadata.ino())).ok();
    match (file(theirs), file(ours)) {
        (Some(theirs), Some(ours)) => theirs == ours,
        _ => theirs == ours || std::path::absolute(ours).is_ok_and(|ours| ours == theirs),
    }
}

fn is_same_host(theirs: &str, ours: &str) -> bool {
    let is_local = |host: &str| matches!(host, "localhost" | "127.0.0.1" | "::1");
    let (theirs, ours) = (theirs.trim_matches(['[', ']']), ours.trim_matches(['[', ']']));
    theirs == ours || (is_local(theirs) && is_local(ours))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unix(path: &str, export: &str) -> Option<Pointed> {
        Some(Pointed { server: Server::Unix(path.into()), export: export.into() })
    }

    fn tcp(host: &str, port: &str, export: &str) -> Option<Pointed> {
        Some(Pointed { server: Server::Tcp { host: host.into(), port: port.into() }, export: export.into() })
    }

    #[test]
    fn every_way_in_which_qemu_names_an_export_is_understood() {
        let parse = Pointed::parse;
        assert_eq!(parse("nbd+unix:///disk0?socket=/run/a b.sock"), unix("/run/a b.sock", "disk0"));
        assert_eq!(parse("nbd+unix://?socket=/s"), unix("/s", ""));
        assert_eq!(parse("nbd+unix:///a?socket=b?socket=/s"), unix("/s", "a?socket=b"));
        assert_eq!(parse("nbd://localhost:10809/disk0"), tcp("localhost", "10809", "disk0"));
        assert_eq!(parse("nbd://[::1]:7"), tcp("::1", "7", ""));
        assert_eq!(parse("nbd://h"), tcp("h", "10809", ""));
        let nested = r#"json:{"driver": "nbd", "server": {"type": "unix", "path": "/s"}, "export": "d"}"#;
        assert_eq!(parse(nested), unix("/s", "d"));
        let flat =
            r#"json:{"driver":"nbd","server.type":"inet","server.host":"h","server.port":"9","export":"d"}"#;
        assert_eq!(parse(flat), tcp("h", "9", "d"));
        for other in
            ["/x/t.raw", "json:{", "nbd+unix:///disk0", "json:{\"driver\":\"file\",\"filename\":\"/x\"}"]
        {
            assert_eq!(parse(other), None, "{other}");
        }
    }

    #[test]
    fn an_export_is_ours_by_its_socket_and_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let (socket, link) = (dir.path().join("s"), dir.path().join("link"));
        let addresses =
            [ListenAddress::Unix(socket.clone()), ListenAddress::Tcp { host: "127.0.0.1".into(), port: 7 }];
        let home = |is_default| Home {
            target: Path::new("/t"),
            file: std::fs::metadata("/").unwrap(),
            held: None,
            size: 1,
            addresses: &addresses,
            export: "disk0",
            epoch: 2,
            is_default,
            session: "00",
        };
        let is_ours = |name: &str, is_default| Pointed::parse(name).unwrap().is_of(&home(is_default));
        let at = |export: &str, path: &Path| format!("nbd+unix:///{export}?socket={}", path.display());
        assert!(is_ours(&at("disk0", &socket), false), "the socket is gone, its path is the same");
        std::fs::write(&socket, "").unwrap();
        std::os::unix::fs::symlink(&socket, &link).unwrap();
        assert!(is_ours(&at("disk0", &link), false), "another path to one socket");
        assert!(!is_ours(&at("disk1", &socket), true), "another disk of ours");
        assert!(is_ours(&at("disk0@2", &socket), false));
        assert!(
            !is_ours(&at("disk0@1", &socket), true),
            "it is refused since writes of its guest may be lost"
        );
        assert!(is_ours(&at("", &socket), true));
        assert!(!is_ours(&at("", &socket), false));
        std::fs::write(dir.path().join("other"), "").unwrap();
        assert!(!is_ours(&at("disk0", &dir.path().join("other")), false));
        assert!(is_ours("nbd://localhost:7/disk0", false));
        assert!(!is_ours("nbd://localhost:8/disk0", false));
        assert!(!is_ours("nbd://elsewhere:7/disk0", false));
    }
}
