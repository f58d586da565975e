//! A guest that is up in seconds: the Debian guest's kernel with an initial file system that is all there is. It holds fio
//! and a shell of the host's, and runs commands as the Debian guest does. Its disks are what a test is about.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::guest::{GuestImage, list_directory, read_file};
use crate::process::run;
use crate::programs;

/// What the commands of tests need, of the host's.
const PROGRAMS: &[&str] = &["bash", "fio", "mount", "stty", "sleep", "cat", "sync", "dmesg", "grep"];
/// What makes a virtio disk appear, in the order in which they need each other.
const MODULES: &[&str] = &[
    "virtio/virtio.ko",
    "virtio/virtio_ring.ko",
    "virtio/virtio_pci_modern_dev.ko",
    "virtio/virtio_pci_legacy_dev.ko",
    "virtio/virtio_pci.ko",
    "block/virtio_blk.ko",
];
const INIT: &str = "#!/usr/bin/bash
export PATH=/usr/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in /modules/*.ko; do insmod $module; done
( . /agent )
echo o >/proc/sysrq-trigger
sleep 100
";

/// What makes a network card appear, and the kernel's own NBD client, after [`MODULES`].
const NBD_MODULES: &[&str] =
    &["../net/core/failover.ko", "net/net_failover.ko", "net/virtio_net.ko", "block/nbd.ko"];
/// What NBD disks of the kernel's own client are set up and looked at with.
const NBD_PROGRAMS: &[&str] =
    &["nbd-client", "ip", "mkfs.ext4", "fsck.ext4", "umount", "cmp", "dd", "blockdev", "cp"];

/// What makes sockets of the family vsock, which lead back into the guest, after [`MODULES`].
const VSOCK_MODULES: &[&str] = &[
    "../net/vmw_vsock/vsock.ko",
    "../net/vmw_vsock/vmw_vsock_virtio_transport_common.ko",
    "../net/vmw_vsock/vsock_loopback.ko",
];
/// Clients of a server in there.
const VSOCK_PROGRAMS: &[&str] = &["nbdinfo", "nbdcopy", "cmp", "dd"];

/// Makes the initial file system at `path`.
///
/// # Errors
/// A program of the host's is missing, or the Debian guest is not what it was.
pub fn make_initrd(image: &GuestImage, path: &Path) -> Result<()> {
    make(image, path, PROGRAMS, MODULES)
}

/// The same with a network card and the kernel's NBD client.
///
/// # Errors
/// As for [`make_initrd`].
pub fn make_nbd_initrd(image: &GuestImage, path: &Path) -> Result<()> {
    make(image, path, &[PROGRAMS, NBD_PROGRAMS].concat(), &[MODULES, NBD_MODULES].concat())
}

/// The same with sockets of the family vsock, and with a `server` of ours to run in there.
///
/// # Errors
/// As for [`make_initrd`].
pub fn make_vsock_initrd(image: &GuestImage, path: &Path, server: &Command) -> Result<()> {
    let server = server.get_program().to_str().context("its path is no text")?;
    make(image, path, &[PROGRAMS, VSOCK_PROGRAMS, &[server]].concat(), &[MODULES, VSOCK_MODULES].concat())
}

fn make(image: &GuestImage, path: &Path, programs: &[&str], modules: &[&str]) -> Result<()> {
    let disk = image.disk();
    let versions = list_directory(&disk, "/lib/modules")?;
    let version = versions.first().context("the guest has no kernel modules")?;
    let mut archive = Archive::default();
    for directory in ["dev", "proc", "sys", "tmp", "modules", "usr", "usr/bin"] {
        archive.directory(directory);
    }
    // Under another name it is another program.
    let kmod = path.with_extension("kmod");
    fs::write(&kmod, read_file(&disk, "/usr/bin/kmod")?)?;
    run(Command::new("chmod").arg("755").arg(&kmod))?;
    let mut files = vec![("usr/bin/insmod".to_owned(), kmod)];
    for program in programs {
        // Debian's system directories are not always in the path.
        let find = "PATH=$PATH:/usr/sbin:/sbin; command -v \"$0\"";
        let found = run(Command::new("sh").args(["-c", find, program])).with_context(|| {
            format!("{program} is missing: run scripts/setup.sh as root, which installs it")
        })?;
        let found = PathBuf::from(found.trim());
        let name = found.file_name().with_context(|| format!("{} has no name", found.display()))?;
        files.push((format!("usr/bin/{}", name.display()), found));
    }
    let mut libraries = BTreeSet::new();
    for (_, file) in &files {
        libraries.extend(libraries_of(file)?);
    }
    for (name, file) in files.into_iter().chain(libraries) {
        archive.file(&name, &fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?);
    }
    for (number, module) in modules.iter().enumerate() {
        let content = read_file(&disk, &format!("/lib/modules/{version}/kernel/drivers/{module}"))?;
        ensure!(!content.is_empty(), "the guest's kernel has no module {module}");
        archive.file(&format!("modules/{number:02}.ko"), &content);
    }
    archive.file("agent", &fs::read(programs::project_dir().join("scripts/guest/agent"))?);
    archive.file("init", INIT.as_bytes());
    fs::write(path, archive.finish())?;
    Ok(())
}

/// The shared libraries of a program: where they belong, and where they are.
fn libraries_of(program: &Path) -> Result<Vec<(String, PathBuf)>> {
    let listed = run(Command::new("ldd").arg(program))?;
    let paths = listed.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')));
    Ok(paths.map(|path| (path.trim_start_matches('/').to_owned(), PathBuf::from(path))).collect())
}

/// A cpio archive of the kind that the kernel unpacks (`newc`).
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    directories: BTreeSet<String>,
    entries: u32,
}

impl Archive {
    fn directory(&mut self, name: &str) {
        if self.directories.insert(name.to_owned()) {
            self.entry(name, 0o040_755, &[]);
        }
    }

    /// A file that may be executed, with the directories above it.
    fn file(&mut self, name: &str, content: &[u8]) {
        for (at, _) in name.match_indices('/') {
            self.directory(&name[..at]);
        }
        self.entry(name, 0o100_755, content);
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entries += 1;
        let size = u32::try_from(content.len()).expect("no file here has 4 GiB");
        let name_size = u32::try_from(name.len() + 1).expect("no name here is long");
        // Magic, then inode, mode, owner, group, links, time, size, two device numbers, length of the name, checksum.
        let fields = [self.entries, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        let len = self.bytes.len().next_multiple_of(4);
        self.bytes.resize(len, 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }
}
