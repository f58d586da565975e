//! Writable exports whose writes are forgotten: a live-restore into a file without a name, without a background.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;
use block::{DirectIo, Engine, FileDisk, FileOptions, OpenDevice};

use crate::cli::Failure;
use crate::live::{
    BootId, ChunkSource, Identity, LiveDisk, LiveWords, Session, SessionId, SessionOptions, SessionParts,
    TokioClock, WrittenPast,
};

/// Makes a disk that reads as `source` until it is written to. What is written goes to files in `dir`
/// that have no name, so that they are gone when the process ends, however it does.
pub(super) fn open(
    source: Arc<dyn ChunkSource>,
    dir: &Path,
    engine: Engine,
) -> anyhow::Result<Arc<LiveDisk>> {
    let layout = source.layout();
    let target = nameless(dir, layout.size, engine)?;
    let journal = nameless(dir, Session::journal_layout(&*source, true).len_bytes(), engine)?;
    let parts = SessionParts {
        identity: Identity { snapshot: "scratch".to_owned(), target: "scratch".to_owned() },
        source,
        clock: Arc::new(TokioClock::new()),
        live: LiveWords::in_memory(layout),
        boot: BootId::current().context("cannot read the kernel's boot id")?,
        last_boot: None,
        check: None,
        written_past: WrittenPast::No,
        plan: Vec::new(),
        trace: Vec::new(),
        options: SessionOptions { background: false, ..SessionOptions::default() },
    };
    let mut id = [0; 16];
    getrandom::fill(&mut id).expect("the kernel's random numbers do not fail once it has booted");
    let session = engine.run(async {
        let (target, journal) = (target.open()?, journal.open()?);
        anyhow::Ok(Session::create(parts, SessionId(id), true, &*target, &*journal).await?)
    })?;
    Ok(Arc::new(LiveDisk::new(session, Arc::new(target), Arc::new(journal))))
}

/// Checks that files can be made in `dir`, before anything else is done.
///
/// # Errors
/// What is wrong with it, and what to do.
pub(super) fn check(dir: &Path) -> anyhow::Result<()> {
    let shown = dir.display();
    let metadata = match std::fs::metadata(dir) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(Failure::new(
                format_args!("the scratch directory {shown} does not exist"),
                "make it, or name another one; it takes what the clients write",
            )
            .into());
        }
        Err(error) => {
            return Err(error).with_context(|| format!("cannot look at the scratch directory {shown}"));
        }
    };
    if !metadata.is_dir() {
        return Err(Failure::new(
            format_args!("{shown} cannot be the scratch directory: it is not a directory"),
            "name a directory; it takes what the clients write",
        )
        .into());
    }
    Ok(())
}

fn nameless(dir: &Path, size: u64, engine: Engine) -> anyhow::Result<FileDisk> {
    let cannot = || format!("cannot make a file in {}", dir.display());
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .mode(0o600)
        .custom_flags(libc::O_TMPFILE)
        .open(dir)
        .with_context(cannot)?;
    file.set_len(size).with_context(cannot)?;
    // A file without a name is opened once more through its descriptor.
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    let disk = FileDisk::open(path, FileOptions::new(engine).direct(DirectIo::Off));
    Ok(disk?)
}
