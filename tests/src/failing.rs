//! Storage that fails on command: a block device whose writes or syncs give EIO, and a file system that gives EIO for everything.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::process::{Process, run, run_any};
use crate::work_dir::LoopDevice;

/// What of a [`FailingDevice`] fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failing {
    /// Nothing.
    Nothing,
    /// Every write.
    Writes,
    /// The next sync, and nothing else: one that is tried again succeeds, as Linux has it.
    Sync,
}

impl Failing {
    /// The node of the storage daemon that does it.
    fn node(self) -> &'static str {
        match self {
            Self::Nothing => "whole",
            Self::Writes => "writes-fail",
            Self::Sync => "sync-fails",
        }
    }
}

/// A loop device on a file on FUSE (nbdfuse), and behind that the fault injection of QEMU's storage daemon. What was written before is
/// there afterwards. Gone when dropped.
///
/// The storage daemon could provide the file itself, but version 7.2 confuses writes that are in flight together.
#[derive(Debug)]
pub struct FailingDevice {
    /// `None` while it goes.
    device: Option<LoopDevice>,
    /// Where the file is mounted.
    file: PathBuf,
    daemon: Process,
    fuse: Process,
}

impl FailingDevice {
    /// A device of `size_bytes` zeroes, for which files are made at `path`, where nothing must be; `socket` is for itself.
    ///
    /// # Errors
    /// There is no FUSE, or this is not root.
    pub fn new(path: PathBuf, size_bytes: u64, socket: &Path) -> Result<Self> {
        let below = path.with_extension("below");
        std::fs::File::create(&below)?.set_len(size_bytes)?;
        // What it is mounted on.
        std::fs::File::create(&path)?;
        let mut daemon = Command::new("qemu-storage-daemon");
        daemon
            .arg("--blockdev")
            .arg(format!("driver=file,node-name=whole,filename={},aio=threads", below.display()));
        for (failing, kind) in [(Failing::Writes, "write"), (Failing::Sync, "flush")] {
            let once = if failing == Failing::Sync { "on" } else { "off" };
            daemon.arg("--blockdev").arg(format!(
                "driver=blkdebug,node-name={},image=whole,inject-error.0.event=none,inject-error.0.iotype={kind},\
                 inject-error.0.errno=5,inject-error.0.once={once}",
                failing.node()
            ));
        }
        daemon
            .args(["--blockdev", &exported(Failing::Nothing)])
            .arg("--nbd-server")
            .arg(format!("addr.type=unix,addr.path={}", socket.display()))
            .args(["--export", "type=nbd,id=file,node-name=file,name=,writable=on"])
            .args(["--chardev", "stdio,id=monitor", "--monitor", "chardev=monitor"]);
        let mut daemon = Process::spawn(&daemon)?;
        // The monitor comes last: its greeting says that the rest is there.
        daemon.wait_for_text("QMP").context("a file that fails on command")?;
        let mut fuse = Command::new("nbdfuse");
        let ready = path.with_extension("ready");
        fuse.arg("--pidfile").arg(&ready).arg(&path).arg("--unix").arg(socket);
        let mut fuse = Process::spawn(&fuse)?;
        while !ready.exists() {
            anyhow::ensure!(fuse.is_running(), "nbdfuse has ended: {:?}", fuse.lines());
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        let mut made = Self { device: None, file: path, daemon, fuse };
        made.command("{\"execute\": \"qmp_capabilities\"}")?;
        made.device = Some(LoopDevice::attach(&made.file)?);
        Ok(made)
    }

    /// The device.
    pub fn path(&self) -> &Path {
        self.device.as_ref().expect("it has one until it is dropped").path()
    }

    /// From now on this fails.
    ///
    /// # Errors
    /// The storage daemon refuses.
    pub fn fail(&mut self, failing: Failing) -> Result<()> {
        let node = failing.node();
        self.command(&format!(
            "{{\"execute\": \"blockdev-reopen\", \"arguments\": {{\"options\": [{{\"driver\": \"raw\", \"node-name\": \"file\", \
             \"file\": \"{node}\"}}]}}}}"
        ))
    }

    fn command(&mut self, command: &str) -> Result<()> {
        self.daemon.write_line(command)?;
        let answer = self.daemon.wait_for("an answer", |line| {
            (line.contains("\"return\"") || line.contains("\"error\"")).then(|| line.to_owned())
        })?;
        anyhow::ensure!(answer.contains("\"return\""), "{command}: {answer}");
        Ok(())
    }
}

impl Drop for FailingDevice {
    fn drop(&mut self) {
        // What is dirty is written now, or lost.
        self.device = None;
        let _ = run_any(Command::new("umount").arg("-l").arg(&self.file));
        let _ = self.fuse.terminate();
    }
}

fn exported(failing: Failing) -> String {
    format!("driver=raw,node-name=file,file={}", failing.node())
}

/// A file system of its own on a loop device, which can be shut down as one shuts down by itself after an error: everything gives
/// EIO until it was unmounted. Gone when dropped.
#[derive(Debug)]
pub struct FileSystem {
    path: PathBuf,
    device: LoopDevice,
}

impl FileSystem {
    /// Makes one of `kind` (`xfs`, `ext4`) in the sparse file `image`, and mounts it at `path`, which is made.
    ///
    /// # Errors
    /// Its tools are missing, or this is not root.
    pub fn make(kind: &str, image: &Path, path: PathBuf) -> Result<Self> {
        // The least that mkfs.xfs makes is 300 MB.
        std::fs::File::create(image)?.set_len(512 << 20)?;
        run(Command::new(format!("mkfs.{kind}")).arg("-q").arg(image))?;
        std::fs::create_dir_all(&path)?;
        let device = LoopDevice::attach(image)?;
        let made = Self { path, device };
        made.mount()?;
        Ok(made)
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Everything fails from now on; what was not written by now is lost.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn shut_down(&self) -> Result<()> {
        // Without `-f`, which would first bring its log onto the disk.
        run(Command::new("xfs_io").args(["-x", "-c", "shutdown"]).arg(&self.path)).map(|_| ())
    }

    /// Nothing changes on it until this is dropped: whoever would write waits, and whoever reads goes on.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn freeze(&self) -> Result<Frozen> {
        run(Command::new("fsfreeze").arg("--freeze").arg(&self.path))?;
        Ok(Frozen(self.path.clone()))
    }

    /// Writes back all that is dirty.
    ///
    /// # Errors
    /// A file system says so.
    pub fn write_back(&self) -> Result<()> {
        run(Command::new("sync").arg("-f").arg(&self.path)).map(|_| ())
    }

    /// Unmounts and mounts it, which brings it back.
    ///
    /// # Errors
    /// Somebody still uses it.
    pub fn remount(&self) -> Result<()> {
        run(Command::new("umount").arg(&self.path))?;
        self.mount()
    }

    fn mount(&self) -> Result<()> {
        run(Command::new("mount").arg(self.device.path()).arg(&self.path)).map(|_| ())
    }
}

/// A file system that is frozen.
#[derive(Debug)]
pub struct Frozen(PathBuf);

impl Drop for Frozen {
    fn drop(&mut self) {
        let _ = run_any(Command::new("fsfreeze").arg("--unfreeze").arg(&self.0));
    }
}

impl Drop for FileSystem {
    fn drop(&mut self) {
        // Lazily: whoever still has a file open there is killed by its own guard. The device is detached when that is over.
        let _ = run_any(Command::new("umount").arg("-l").arg(&self.path));
    }
}
