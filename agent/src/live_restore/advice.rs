//! What to do next: the QEMU arguments for an export; what to look after where something may be lost.

use nbd_server::ListenAddress;

use crate::live::Resumed;

/// How long QEMU waits for an agent that is started again, in seconds.
const RECONNECT_SECONDS: u32 = 300;

/// QEMU's arguments for a drive on each of these exports. A raw node stands above each NBD node, so that the
/// drive can be moved onto the target later without the guest's noticing.
pub(super) fn qemu_arguments(address: &ListenAddress, exports: &[&str]) -> Vec<String> {
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
    for (index, export) in exports.iter().enumerate() {
        let node = node_name(index, exports.len());
        arguments.extend([
            "-blockdev".to_owned(),
            format!(
                "driver=nbd,node-name={node}-nbd,{server},export={},reconnect-delay={RECONNECT_SECONDS},discard=unmap",
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
pub(super) fn shell_line(arguments: &[String]) -> String {
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
        let line = shell_line(&qemu_arguments(&address, &["disk0"]));
        assert!(line.contains("server.path=/run/a,,b c.sock,export=disk0,reconnect-delay="), "{line}");
        assert!(line.starts_with("-blockdev 'driver=nbd,"), "{line}");
        assert!(line.ends_with("-device virtio-blk-pci,drive=lifeboot"), "{line}");
    }

    #[test]
    fn each_of_several_drives_has_nodes_of_its_own() {
        let address = ListenAddress::Unix("/run/a.sock".into());
        let arguments = qemu_arguments(&address, &["root", "data"]);
        assert_eq!(arguments.len(), 12);
        assert!(arguments[1].contains("node-name=lifeboot0-nbd,") && arguments[1].contains("export=root,"));
        assert!(arguments[7].contains("node-name=lifeboot1-nbd,") && arguments[7].contains("export=data,"));
        assert!(arguments[9].contains("node-name=lifeboot1,file=lifeboot1-nbd,"));
        assert_eq!(arguments[11], "virtio-blk-pci,drive=lifeboot1");
    }
}
