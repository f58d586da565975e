//! The main job as a story: a guest is captured, boots from its backup, loses its agent, and comes home whole.
//!
//! `scripts/demo.sh` builds everything and starts it with two directories: one for its files, one with a short path
//! for its sockets. Whoever starts it removes them; whatever it starts dies with it.

mod story;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::disk::{self, BLOCK_BYTES};
use e2e::guest::{self, GuestImage};
use e2e::lifeboot::{LiveRestore, Repository, status};
use e2e::machine::{Machine, accelerator};
use e2e::process::run;
use story::{Story, mib};

/// What the background may copy a second until the agent is killed: without a limit everything would be home before
/// the guest's kernel has looked at its disk.
const LIMIT: &str = "2MiB";
const LOOK: Duration = Duration::from_millis(250);

/// Four files of 4 MiB, each synced and then said to be there; their sums at the end.
const GUEST_WORK: &str = "for n in 1 2 3 4; do dd if=/dev/urandom of=/root/file.$n bs=64k count=64 conv=fsync \
                          status=none || exit 1; echo wrote $n; done; sha256sum /root/file.*";

fn main() -> ExitCode {
    let mut directories = std::env::args_os().skip(1).map(PathBuf::from);
    let (Some(files), Some(sockets), None) = (directories.next(), directories.next(), directories.next())
    else {
        eprintln!("usage: lifeboot-demo DIRECTORY SOCKET-DIRECTORY (scripts/demo.sh does the rest)");
        return ExitCode::from(2);
    };
    let mut story = Story::new();
    match tell(&mut story, &files, &sockets) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            story.failed(&error);
            ExitCode::FAILURE
        }
    }
}

fn tell(story: &mut Story, files: &Path, sockets: &Path) -> Result<()> {
    let image = GuestImage::prepare()?;
    story.title("Lifeboot: a machine runs from its backup while its disk comes home");

    story.chapter("Capture the disk of a Debian guest");
    let repository = Repository::init(files.join("repository"))?;
    let began = Instant::now();
    repository.capture("guest", &image.disk())?;
    let data = disk::allocated_bytes(&image.disk())?;
    let stored = tree_bytes(repository.path())?;
    story.timed("captured", began.elapsed());
    let size = image.disk().metadata()?.len();
    story.tell(&format!("a disk of {}, {} of it data, stored as {}", mib(size), mib(data), mib(stored)));

    story.chapter("Serve it while it is still in the backup");
    let (target, socket) = (files.join("target.raw"), sockets.join("live.sock"));
    story.command(&format!(
        "lifeboot live-restore -r REPO guest@latest target.raw --listen unix:live.sock --limit {LIMIT}"
    ));
    let mut live = LiveRestore::start(&repository, "guest@latest", &target, &socket, &["--limit", LIMIT])?;
    let home = Home::new(&target)?;
    story.timed("ready to serve", live.start_time());
    story.tell(&format!("{} must come home; zeroes need not", mib(home.absent_at_first)));

    story.chapter("Boot the machine from it");
    let drive = live.qemu_arguments()?;
    story.command(&format!("qemu-system-x86_64 -accel {} ... {}", accelerator(&image), drive.join(" ")));
    let began = Instant::now();
    let mut machine = Machine::start(&image, &drive, files)?;
    while !machine.is_ready_within(LOOK)? {
        story.progress("booting", home.part()?);
    }
    story.timed("guest ready", began.elapsed());
    story.tell(&format!(
        "the guest is up with {} home: {}",
        home.percent()?,
        machine.run("uname -sr")?.trim()
    ));

    story.chapter("Kill the agent while the guest writes");
    let running = machine.begin(GUEST_WORK)?;
    machine.wait_output(&running, "wrote 1")?;
    story.tell(&format!("the guest writes; kill -9 of the agent, with {} home", home.percent()?));
    let stopped = live.kill()?;
    story.tell("the same command again, this time without a limit");
    live = stopped.start_with(&[])?;
    story.timed("started again and ready", live.start_time());
    let restarted = Instant::now();
    while !live.is_complete() {
        story.progress("coming home", home.part()?);
        ensure!(live.process().is_running(), "the agent ended: {:#?}", live.process().lines());
        live.wait_report_within(LOOK)?;
    }
    story.timed("everything home", restarted.elapsed());

    story.chapter("Ask the guest what it has seen of that");
    let sums: Vec<String> =
        machine.finish(running)?.lines().filter(|line| line.contains("/root/")).map(str::to_owned).collect();
    machine.run("sync && echo 3 > /proc/sys/vm/drop_caches")?;
    let again = machine.run("sha256sum /root/file.*")?;
    ensure!(again.lines().eq(sums.iter()), "the guest reads something else than it wrote:\n{again}");
    story.done("it wrote all of its files, and reads them back from the disk");
    let complaints = machine.run("dmesg | grep -ciE 'i/o error|ext4-fs error|corrupt' || true")?;
    ensure!(complaints.trim() == "0", "the guest's kernel complains: {complaints}");
    story.done("its kernel has seen no error");
    machine.power_off()?;
    let (_, parked) = live.park()?;
    ensure!(parked.success(), "the agent ended with {parked}");

    story.chapter("Check the target");
    let began = Instant::now();
    guest::ensure_sound(&target)?;
    story.done("fsck finds nothing");
    for line in &sums {
        let (sum, path) = line.split_once("  ").context("a line of sha256sum")?;
        let copy = files.join("from-target");
        std::fs::write(&copy, guest::read_file(&target, path)?)?;
        let found = run(Command::new("sha256sum").arg(&copy))?;
        ensure!(found.starts_with(sum), "{path} on the target is not what the guest wrote");
    }
    story.done(&format!("the {} files that the guest wrote are there", sums.len()));
    let written: BTreeSet<u64> = machine.written_blocks()?.into_iter().collect();
    let differing = disk::differing_blocks(&image.disk(), &target)?;
    let wrong = differing.iter().find(|block| !written.contains(block));
    ensure!(wrong.is_none(), "block {wrong:?} differs from the source, and the guest never wrote it");
    story.done(&format!(
        "{} of {} blocks differ from the backup, and the guest wrote each of them",
        differing.len(),
        size / BLOCK_BYTES
    ));
    story.timed("checked", began.elapsed());
    story.summary();
    Ok(())
}

/// How much of what was absent at first is home.
struct Home {
    target: PathBuf,
    absent_at_first: u64,
}

impl Home {
    fn new(target: &Path) -> Result<Self> {
        Ok(Self { target: target.to_owned(), absent_at_first: absent(target)?.max(1) })
    }

    /// From 0 to 1.
    fn part(&self) -> Result<f64> {
        Ok(1.0 - absent(&self.target)? as f64 / self.absent_at_first as f64)
    }

    fn percent(&self) -> Result<String> {
        Ok(format!("{:.0} % of the data", self.part()? * 100.0))
    }
}

/// How many bytes are still in the backup alone.
fn absent(target: &Path) -> Result<u64> {
    let status = status(target)?;
    let field =
        |name: &str| status[name].as_u64().with_context(|| format!("status without {name}: {status}"));
    Ok(field("size")?.saturating_sub(field("home_bytes")?))
}

/// What the files of a directory hold together.
fn tree_bytes(directory: &Path) -> Result<u64> {
    let mut total = 0;
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        total += if metadata.is_dir() { tree_bytes(&entry.path())? } else { metadata.len() };
    }
    Ok(total)
}
