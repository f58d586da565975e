//! Image formats that are not the bytes of a disk, told by their first bytes.
//!
//! Captured as they are they would be kept faithfully, but a restore would give back the image file
//! and not the disk in it, and a live-restore would show the guest a container it cannot read.

/// How many bytes of a source [`container`] wants to see.
pub(crate) const PROBE_LEN: usize = 512;

struct Magic {
    offset: usize,
    bytes: &'static [u8],
    format: Container,
}

/// A file format that holds a disk in other bytes than the disk's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Container {
    /// What people call it.
    pub(crate) name: &'static str,
    /// What makes a raw file of it; `None` where that is not one well-known command.
    converts: Option<&'static str>,
}

const fn image(name: &'static str, qemu_name: &'static str) -> Container {
    Container { name, converts: Some(qemu_name) }
}

const fn compressed(name: &'static str) -> Container {
    Container { name, converts: None }
}

const MAGICS: &[Magic] = &[
    Magic { offset: 0, bytes: b"QFI\xfb", format: image("qcow2", "qcow2") },
    Magic { offset: 0, bytes: b"QED\0", format: image("QED", "qed") },
    Magic { offset: 0, bytes: b"KDMV", format: image("VMDK", "vmdk") },
    Magic { offset: 0, bytes: b"COWD", format: image("VMDK", "vmdk") },
    Magic { offset: 0, bytes: b"# Disk DescriptorFile", format: image("VMDK", "vmdk") },
    Magic { offset: 0, bytes: b"vhdxfile", format: image("VHDX", "vhdx") },
    Magic { offset: 0, bytes: b"conectix", format: image("VHD", "vpc") },
    Magic { offset: 0x40, bytes: &[0x7f, 0x10, 0xda, 0xbe], format: image("VDI", "vdi") },
    Magic { offset: 0, bytes: b"WithoutFreeSpace", format: image("Parallels", "parallels") },
    Magic { offset: 0, bytes: b"WithouFreSpacExt", format: image("Parallels", "parallels") },
    Magic { offset: 0, bytes: &[0x1f, 0x8b, 0x08], format: compressed("gzip") },
    Magic { offset: 0, bytes: &[0x28, 0xb5, 0x2f, 0xfd], format: compressed("zstd") },
    Magic { offset: 0, bytes: b"\xfd7zXZ\0", format: compressed("xz") },
];

/// What `head`, the first bytes of a source, shows to be something else than a raw disk.
pub(crate) fn container(head: &[u8]) -> Option<Container> {
    let matches = |magic: &&Magic| head.get(magic.offset..).is_some_and(|rest| rest.starts_with(magic.bytes));
    MAGICS.iter().find(matches).map(|magic| magic.format)
}

impl Container {
    /// What to do with such a source.
    pub(crate) fn advice(self, path: &std::path::Path) -> String {
        let path = path.display();
        match self.converts {
            Some(format) => format!(
                "serve it with `qemu-nbd --read-only --format={format} --socket=/tmp/disk.sock {path}` and capture \
                 'nbd+unix:///?socket=/tmp/disk.sock', or make a raw file of it with `qemu-img convert -f {format} -O raw {path} \
                 disk.raw`; --as-raw captures the image file itself"
            ),
            None => format!("decompress it first; --as-raw captures {path} as it is"),
        }
    }

    /// The same of an export that holds it.
    pub(crate) fn advice_for_export(self) -> String {
        match self.converts {
            Some(format) => format!(
                "have its server open the image as what it is, as `qemu-nbd --read-only --format={format} …` does; --as-raw captures \
                 the image file itself"
            ),
            None => "have its server serve the decompressed disk, as nbdkit's filters gzip and xz do; --as-raw captures it as it is"
                .to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_told_from_raw_disks() {
        let mut head = [0; PROBE_LEN];
        assert_eq!(container(&head), None);
        head[..4].copy_from_slice(b"QFI\xfb");
        assert_eq!(container(&head).map(|found| found.name), Some("qcow2"));
        assert_eq!(container(&head[..3]), None);
        let mut head = [0; PROBE_LEN];
        head[0x40..0x44].copy_from_slice(&[0x7f, 0x10, 0xda, 0xbe]);
        assert_eq!(container(&head).map(|found| found.name), Some("VDI"));
        head[510..].copy_from_slice(&[0x55, 0xaa]);
        head[0x40] = 0;
        assert_eq!(container(&head), None);
    }
}
