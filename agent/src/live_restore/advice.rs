//! What to do next: the QEMU arguments for an export; what to look after where something may be lost.

use std::path::Path;

use nbd_server::{Credentials, ListenAddress};

use crate::live::Resumed;

/// How long QEMU waits for an agent that is started again, in seconds.
const RECONNECT_SECONDS: u32 = 300;

/// What QEMU calls its credentials for us.
const TLS_OBJECT: &str = "lifeboot-tls";
/// Whose pre-shared key QEMU has, if not said otherwise.
const QEMU_PSK_NAME: &str = "qemu";

/// The kernel takes no longer paths of sockets.
const LONGEST_SOCKET_BYTES: usize = 107;

/// An address as others may use it, who may be in another directory than we are. One that would be too long stays as it is.
pub(super) fn from_anywhere(address: &ListenAddress) -> ListenAddress {
    let absolute = match address {
        ListenAddress::Unix(path) => std::path::absolute(path).ok(),
        _ => None,
    };
    let absolute = absolute.filter(|path| path.as_os_str().len() <= LONGEST_SOCKET_BYTES);
    absolute.map_or_else(|| address.clone(), ListenAddress::Unix)
}

/// QEMU's arguments for a drive on each of these exports. A raw node stands above each NBD node, so that the
/// drive can be moved onto the target later without the guest's noticing. With TLS QEMU's credentials are taken to lie where the
/// server's do.
pub(super) fn qemu_arguments(
    address: &ListenAddress,
    exports: &[&str],
    tls: Option<&Credentials>,
) -> Vec<String> {
    let server = match address {
        ListenAddress::Unix(path) => {
            format!("server.type=unix,server.path={}", escaped(&path.display().to_string()))
        }
        ListenAddress::Tcp { host, port } => {
            format!("server.type=inet,server.host={},server.port={port}", escaped(host))
        }
        ListenAddress::Vsock { cid, port } => {
            // A guest's number for its host is 2.
            format!("server.type=vsock,server.cid={},server.port={port}", cid.unwrap_or(2))
        }
        // What is bound has other addresses than this.
        ListenAddress::Systemd => return Vec::new(),
    };
    let mut arguments = Vec::new();
    if let Some(credentials) = tls {
        arguments.extend(["-object".to_owned(), tls_object(credentials)]);
    }
    let tls = match (tls, address) {
        (None, _) => String::new(),
        // A socket has no name that could stand in a certificate, and QEMU wants one.
        (Some(Credentials::Certificates { .. }), ListenAddress::Unix(_) | ListenAddress::Vsock { .. }) => {
            format!(",tls-creds={TLS_OBJECT},tls-hostname=localhost")
        }
        (Some(_), _) => format!(",tls-creds={TLS_OBJECT}"),
    };
    for (index, export) in exports.iter().enumerate() {
        let node = node_name(index, exports.len());
        arguments.extend([
            "-blockdev".to_owned(),
            format!(
                "driver=nbd,node-name={node}-nbd,{server}{tls},export={},reconnect-delay={RECONNECT_SECONDS},discard=unmap",
                escaped(export)
            ),
            "-blockdev".to_owned(),
            format!("driver=raw,node-name={node},file={node}-nbd,discard=unmap"),
            "-device".to_owned(),
            format!("virtio-blk-pci,drive={node}"),
        ]);
    }
    arguments
}

fn tls_object(credentials: &Credentials) -> String {
    let absolute = |path: &Path| {
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        escaped(&path.display().to_string())
    };
    match credentials {
        Credentials::Certificates { dir, .. } => {
            format!("tls-creds-x509,id={TLS_OBJECT},endpoint=client,dir={}", absolute(dir))
        }
        // QEMU looks for a file `keys.psk` in a directory.
        Credentials::PreShared { file } => {
            let dir = absolute(file.parent().unwrap_or(Path::new(".")));
            format!("tls-creds-psk,id={TLS_OBJECT},endpoint=client,username={QEMU_PSK_NAME},dir={dir}")
        }
    }
}

/// What the raw node of a drive is called, of so many: a disk's own name may be none that QEMU takes.
pub(crate) fn node_name(index: usize, count: usize) -> String {
    if count == 1 { "lifeboot".to_owned() } else { format!("lifeboot{index}") }
}

/// What a guest that goes on may have lost without knowing it, and what to do.
pub(super) const fn loss(resumed: Resumed) -> Option<&'static str> {
    match resumed {
        Resumed::Parked | Resumed::AgentDied | Resumed::HostDied => None,
        Resumed::LiveFileLost => Some(
            "the session's live file is missing or damaged although the host stayed up: what the guest wrote \
             since its last flush may be lost, and it does not know; restart the guest, and have it check its file systems",
        ),
        Resumed::SyncFailed => Some(
            "a sync had failed: what the guest wrote since its last flush that succeeded may be lost; \
             look after the target's storage, then restart the guest, and have it check its file systems",
        ),
    }
}

/// In QEMU's option syntax a comma is written twice.
fn escaped(text: &str) -> String {
    text.replace(',', ",,")
}

/// The arguments as a shell takes them.
pub(crate) fn shell_line(arguments: &[String]) -> String {
    let quoted: Vec<String> = arguments
        .iter()
        .map(|argument| {
            let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_=.,/:@%+".contains(c);
            if argument.chars().all(is_plain) {
                argument.clone()
            } else {
                format!("'{}'", argument.replace('\'', r"'\''"))
            }
        })
        .collect();
    quoted.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_with_commas_and_spaces_survive_qemu_and_the_shell() {
        let address = ListenAddress::Unix("/run/a,b c.sock".into());
        let line = shell_line(&qemu_arguments(&address, &["disk0"], None));
        assert!(line.contains("server.path=/run/a,,b c.sock,export=disk0,reconnect-delay="), "{line}");
        assert!(line.starts_with("-blockdev 'driver=nbd,"), "{line}");
        assert!(line.ends_with("-device virtio-blk-pci,drive=lifeboot"), "{line}");
    }

    #[test]
    fn a_socket_is_named_so_that_it_is_found_from_any_directory() {
        let relative = ListenAddress::Unix("run/web01.sock".into());
        let here = std::env::current_dir().unwrap();
        assert_eq!(from_anywhere(&relative), ListenAddress::Unix(here.join("run/web01.sock")));
        let just_short_enough = ListenAddress::Unix("x".repeat(LONGEST_SOCKET_BYTES).into());
        assert_eq!(from_anywhere(&just_short_enough), just_short_enough);
        let tcp: ListenAddress = "tcp:localhost:1".parse().unwrap();
        assert_eq!(from_anywhere(&tcp), tcp);
    }

    #[test]
    fn with_tls_qemu_gets_its_credentials_and_uses_them_for_each_drive() {
        let address = ListenAddress::Unix("/run/a.sock".into());
        let dir = "/etc/pki/a,b".into();
        let certificates = Credentials::Certificates { dir, verify_peer: true, allowed: Vec::new() };
        let arguments = qemu_arguments(&address, &["root", "data"], Some(&certificates));
        assert_eq!(
            arguments[..2],
            ["-object", "tls-creds-x509,id=lifeboot-tls,endpoint=client,dir=/etc/pki/a,,b"]
        );
        let drives = arguments
            .iter()
            .filter(|argument| argument.contains(",tls-creds=lifeboot-tls,tls-hostname=localhost,"));
        assert_eq!(drives.count(), 2);
        let keys = Credentials::PreShared { file: "/etc/nbd/keys.psk".into() };
        let arguments = qemu_arguments(&address, &["root"], Some(&keys));
        assert_eq!(arguments[1], "tls-creds-psk,id=lifeboot-tls,endpoint=client,username=qemu,dir=/etc/nbd");
    }

    #[test]
    fn each_of_several_drives_has_nodes_of_its_own() {
        let address = ListenAddress::Unix("/run/a.sock".into());
        let arguments = qemu_arguments(&address, &["root", "data"], None);
        assert_eq!(arguments.len(), 12);
        assert!(arguments[1].contains("node-name=lifeboot0-nbd,") && arguments[1].contains("export=root,"));
        assert!(arguments[7].contains("node-name=lifeboot1-nbd,") && arguments[7].contains("export=data,"));
        assert!(arguments[9].contains("node-name=lifeboot1,file=lifeboot1-nbd,"));
        assert_eq!(arguments[11], "virtio-blk-pci,drive=lifeboot1");
    }
}
