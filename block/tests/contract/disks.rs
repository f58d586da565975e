//! The disks under test: each engine on a file (direct and buffered), on tmpfs and on a loop device, and
//! the simulated disk.

use std::path::{Path, PathBuf};
use std::process::Command;

use block::sim::{SimDisk, SimOptions};
use block::{DirectIo, Engine, FileDisk, FileOptions, IoEngine, OpenDevice};

/// A disk under test, and what must outlive it.
pub(crate) struct Subject {
    pub(crate) name: String,
    pub(crate) engine: Engine,
    pub(crate) device: Box<dyn OpenDevice>,
    /// `None` for the simulated disk.
    pub(crate) file: Option<FileDisk>,
    _loop: Option<LoopDevice>,
    _directory: Option<tempfile::TempDir>,
}

/// Both engines. Where the kernel forbids rings, says so and goes on with the other.
pub(crate) fn engines() -> Vec<Engine> {
    let mut engines = vec![Engine::THREADS];
    match Engine::choose(IoEngine::Uring) {
        Ok(engine) => engines.push(engine),
        Err(error) => eprintln!("the ring is not tested here: {error}"),
    }
    engines
}

/// Every kind of disk, of `size` bytes, all zeroes.
pub(crate) fn subjects(size: u64) -> Vec<Subject> {
    let mut subjects = files(size);
    subjects.push(Subject {
        name: "simulated".into(),
        engine: Engine::THREADS,
        device: Box::new(SimDisk::new(SimOptions::new(size, 1))),
        file: None,
        _loop: None,
        _directory: None,
    });
    subjects
}

/// Every kind of real disk.
pub(crate) fn files(size: u64) -> Vec<Subject> {
    let mut subjects = Vec::new();
    for engine in engines() {
        for direct in [DirectIo::On, DirectIo::Off] {
            // Beside the build, which is on a real file system: /tmp may be in memory.
            let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
            subjects.push(file(engine, direct, size, directory));
        }
        for (direct, sector) in [(DirectIo::On, 512), (DirectIo::On, 4096), (DirectIo::Off, 512)] {
            if let Some(looped) = LoopDevice::attach_in(Path::new(env!("CARGO_TARGET_TMPDIR")), size, sector)
            {
                let options = FileOptions::new(engine).direct(direct);
                let disk = FileDisk::open(looped.path(), options).unwrap();
                subjects.push(Subject {
                    name: format!("{engine}, loop device of {sector}-byte sectors, {direct:?}"),
                    engine,
                    device: Box::new(disk.clone()),
                    file: Some(disk),
                    _loop: Some(looped),
                    _directory: None,
                });
            }
        }
        match tempfile::tempdir_in("/dev/shm") {
            Ok(directory) => {
                let subject = file(engine, DirectIo::Auto, size, directory);
                assert!(!subject.file.as_ref().unwrap().is_direct(), "memory has no direct I/O");
                subjects.push(subject);
            }
            Err(error) => eprintln!("files in memory are not tested here: {error}"),
        }
    }
    subjects
}

fn file(engine: Engine, direct: DirectIo, size: u64, directory: tempfile::TempDir) -> Subject {
    let options = FileOptions::new(engine).direct(direct);
    let disk = FileDisk::create(directory.path().join("disk"), size, options).unwrap();
    Subject {
        name: format!("{engine}, file in {}, {direct:?}", directory.path().display()),
        engine,
        device: Box::new(disk.clone()),
        file: Some(disk),
        _loop: None,
        _directory: Some(directory),
    }
}

/// A loop device over a file of its own.
pub(crate) struct LoopDevice {
    path: PathBuf,
    _file: tempfile::NamedTempFile,
}

impl LoopDevice {
    /// `None`, with the reason on standard error, where this user may not make one.
    pub(crate) fn attach(size: u64) -> Option<Self> {
        Self::attach_in(Path::new(env!("CARGO_TARGET_TMPDIR")), size, 512)
    }

    /// The same, with the file in this directory, and sectors of this size.
    pub(crate) fn attach_in(directory: &Path, size: u64, sector: u32) -> Option<Self> {
        let file = tempfile::NamedTempFile::new_in(directory).unwrap();
        file.as_file().set_len(size).unwrap();
        let output = Command::new("losetup")
            .args(["--find", "--show", "--sector-size", &sector.to_string()])
            .arg(file.path())
            .output();
        match output {
            Ok(output) if output.status.success() => {
                let path = String::from_utf8(output.stdout).unwrap().trim().into();
                Some(Self { path, _file: file })
            }
            Ok(output) => {
                eprintln!("loop devices are not tested here: {}", String::from_utf8_lossy(&output.stderr));
                None
            }
            Err(error) => {
                eprintln!("loop devices are not tested here: losetup: {error}");
                None
            }
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // The number would stay read-only, for whatever is attached to it next.
        let _ = Command::new("blockdev").arg("--setrw").arg(&self.path).status();
        let detached = Command::new("losetup").arg("--detach").arg(&self.path).status();
        if !detached.is_ok_and(|status| status.success()) {
            eprintln!("{} is left behind", self.path.display());
        }
    }
}
