//! `kill`: live-restore is killed with -9 again and again under fio's verified writes, and started again.
//!
//! fio talks to a qemu-nbd, and that to live-restore: QEMU's block layer waits and connects again when the agent is gone
//! (`reconnect-delay`), as under a machine. So every write that fio heard acknowledged was acknowledged by some life of
//! the agent, and fio reads all of them back. Beside it, a stamp is written in each round straight to the agent just
//! before it dies, never flushed; all stamps so far are read back in each round.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;

use super::Common;
use crate::child::{self, Server};
use crate::client::Client;
use crate::report::{Metric, Report, Side, Unit};
use crate::{ours, peers};

/// What `kill` takes.
#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// The raw image that is live-restored
    #[arg(default_value = "target/guest/disk.raw")]
    pub(crate) image: PathBuf,
    /// How often the agent is killed
    #[arg(long, default_value_t = 50)]
    pub(crate) kills: u32,
    /// The limit of the background, so that there is still something absent at the last kill
    #[arg(long, default_value = "2MiB", value_name = "RATE")]
    pub(crate) limit: String,
    /// The seconds that fio writes for in each round
    #[arg(long, default_value_t = 1.0, value_name = "SECONDS")]
    pub(crate) writing: f64,
}

impl Options {
    /// As the command line would have it with that many kills.
    pub(crate) fn for_figures(image: PathBuf, kills: u32) -> Self {
        Self { image, kills, limit: "2MiB".into(), writing: 1.0 }
    }
}

/// The title of the cell of restarts.
pub(crate) const RESTART: &str = "from restart to the first answer";
/// The title of the cell of verified writes.
pub(crate) const VERIFIED: &str = "writes verified in a round";
/// Who is measured.
pub(crate) const NAME: &str = "lifeboot live-restore";

/// How fast fio writes: slowly enough that it is still writing at each kill.
const WRITES_PER_SECOND: u32 = 3000;
const STAMP_BYTES: usize = 4096;
/// A restart that takes longer than this is a failure rather than a figure.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs the workload.
pub(crate) fn run(common: &Common, options: &Options) -> Result<Report> {
    for program in ["fio", "qemu-nbd"] {
        child::require(program)?;
    }
    let mut report = common.report("kill");
    report.rounds = options.kills as usize;
    report.warm_up = false;
    let scratch = common.scratch()?;
    report.scratch_is(scratch.path());
    let dir = scratch.path();
    let (repo, target) = (dir.join("repo"), dir.join("target.raw"));
    let (socket, middle_socket) = (dir.join("live.sock"), dir.join("middle.sock"));
    child::run(&mut common.programs.init(&repo)?)?;
    child::run(&mut common.programs.capture(&repo, &options.image, None)?)?;
    let live_restore = || -> Result<Command> {
        let mut command = common.programs.live_restore(&repo, &target, &socket)?;
        command.arg(format!("--limit={}", options.limit));
        Ok(command)
    };
    report.ran(NAME, child::line(&live_restore()?));
    let mut agent = Server::listening(&mut live_restore()?, &socket)?;
    let size = Client::connect(&socket, ours::EXPORT)?.size();
    let mut middle = reconnecting(&socket, &middle_socket);
    report.ran("qemu-nbd between fio and it", child::line(&middle));
    let _middle = Server::listening(&mut middle, &middle_socket)?;

    // The stamps have the end of the disk, fio the rest.
    let stamps = Stamps { begin: size - u64::from(options.kills) * STAMP_BYTES as u64 };
    for round in 0..options.kills {
        let under_way = dir.join("fio-writes");
        super::remove(&under_way)?;
        let mut fio = fio(&middle_socket, stamps.begin, options.writing, round, &under_way);
        if round == 0 {
            report.ran("fio", child::line(&fio));
        }
        let begin = Instant::now();
        let mut writer = Server::start(&mut fio)?;
        writer.wait_for(|| under_way.exists(), "begin to write")?;
        // A different moment in each round, spread over the first four fifths of fio's writing.
        let moment = options.writing * (0.1 + 0.7 * f64::from(round * 7 % 11) / 10.0);
        std::thread::sleep(Duration::from_secs_f64(moment));
        ensure!(writer.ended()?.is_none(), "fio ended before the kill: {}", writer.stderr()?);
        stamps.write(&mut Client::connect(&socket, ours::EXPORT)?, round)?;
        agent.kill()?;

        let restarted = Instant::now();
        agent = Server::start(&mut live_restore()?)?;
        let mut client = first_answer(&mut agent, &socket, restarted)?;
        let answered = restarted.elapsed();
        for earlier in 0..=round {
            stamps.check(&mut client, earlier).with_context(|| format!("after kill {}", round + 1))?;
        }
        drop(client);

        let finished = writer.finish(begin)?;
        ensure!(
            finished.status.success(),
            "fio lost a write, or met an error, in round {}: {}",
            round + 1,
            finished.stderr.lines().next().unwrap_or("it does not say which")
        );
        let verified = reads_of(&finished.stdout)?;
        report.record(&Metric::lower(RESTART, Unit::Seconds), NAME, Side::Ours, answered.as_secs_f64());
        report.record(&Metric::higher(VERIFIED, Unit::Count), NAME, Side::Ours, verified);
        eprintln!(
            "kill {}/{}: answered after {:.0} ms, {verified:.0} writes verified",
            round + 1,
            options.kills,
            answered.as_secs_f64() * 1e3
        );
    }
    drop(_middle);
    agent.terminate()?;
    report.notes.push(format!(
        "{} kills, no acknowledged write lost: fio verified every write of each round, and the stamps of all rounds stood",
        options.kills
    ));
    Ok(report)
}

/// qemu-nbd as the machine's block layer: it waits for the agent and sends again what was not answered.
fn reconnecting(source: &Path, socket: &Path) -> Command {
    let mut command = Command::new("qemu-nbd");
    command
        .args(["-t", "-e", "0", "-x", peers::EXPORT, "--cache=none", "-k"])
        .arg(socket)
        .arg("--image-opts");
    command.arg(format!(
        "driver=raw,file.driver=nbd,file.server.type=unix,file.server.path={},file.reconnect-delay=60",
        source.display()
    ));
    command
}

fn fio(socket: &Path, size: u64, seconds: f64, round: u32, under_way: &Path) -> Command {
    let mut fio = Command::new("fio");
    fio.args(["--name=j", "--ioengine=nbd", "--rw=randwrite", "--bs=4k", "--iodepth=16", "--fsync=64"]);
    fio.args([
        "--verify=crc32c",
        "--verify_fatal=1",
        "--do_verify=1",
        "--verify_state_save=0",
        "--output-format=json",
    ]);
    fio.arg(format!("--uri=nbd+unix:///{}?socket={}", peers::EXPORT, socket.display()));
    fio.arg(format!("--size={}", size / 4096 * 4096));
    // A bounded number of writes at a bounded rate: a job that ends by the clock skips its verification.
    fio.arg(format!("--rate_iops=,{WRITES_PER_SECOND}"));
    fio.arg(format!("--io_size={:.0}", f64::from(WRITES_PER_SECOND) * seconds * 4096.0));
    fio.arg(format!("--randseed={}", round + 1));
    // fio takes a while to set up its maps; a kill before it writes would show nothing.
    fio.arg(format!("--exec_prerun=touch {}", under_way.display()));
    // It leaves a file of what that command says.
    fio.current_dir(under_way.parent().expect("it is in the scratch directory"));
    fio
}

/// How many requests fio read back.
fn reads_of(output: &str) -> Result<f64> {
    let begin = output.find('{').context("fio printed no JSON")?;
    let output: serde_json::Value = serde_json::from_str(&output[begin..])?;
    let reads = output["jobs"][0]["read"]["total_ios"].as_f64().context("fio tells no reads")?;
    ensure!(reads > 0.0, "fio verified nothing");
    Ok(reads)
}

/// Connects as soon as the agent lets anybody, and reads; returns the connection.
pub(crate) fn first_answer(agent: &mut Server, socket: &Path, since: Instant) -> Result<Client> {
    loop {
        let mut block = [0; STAMP_BYTES];
        let attempt = Client::connect(socket, ours::EXPORT)
            .and_then(|mut client| client.read(0, &mut block).map(|()| client));
        if let Ok(client) = attempt {
            return Ok(client);
        }
        if let Some(status) = agent.ended()? {
            let stderr = agent.stderr()?;
            anyhow::bail!("live-restore did not come back: {status}: {stderr}");
        }
        ensure!(since.elapsed() < PATIENCE, "live-restore does not answer {PATIENCE:?} after its restart");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A block of its own for each round, acknowledged and not flushed when the agent dies.
struct Stamps {
    begin: u64,
}

impl Stamps {
    fn block(round: u32) -> Vec<u8> {
        let words = (0..STAMP_BYTES as u32 / 4).map(|word| word.wrapping_mul(0x9e37_79b9) ^ (round + 1));
        words.flat_map(u32::to_le_bytes).collect()
    }

    fn offset(&self, round: u32) -> u64 {
        self.begin + u64::from(round) * STAMP_BYTES as u64
    }

    fn write(&self, client: &mut Client, round: u32) -> Result<()> {
        client.write(self.offset(round), &Self::block(round))
    }

    fn check(&self, client: &mut Client, round: u32) -> Result<()> {
        let mut block = vec![0; STAMP_BYTES];
        client.read(self.offset(round), &mut block)?;
        ensure!(block == Self::block(round), "the acknowledged write of round {} is lost", round + 1);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamps_of_different_rounds_differ_and_do_not_overlap() {
        let stamps = Stamps { begin: 8192 };
        assert_ne!(Stamps::block(0), Stamps::block(1));
        assert_eq!(Stamps::block(3).len(), STAMP_BYTES);
        assert_eq!(stamps.offset(1) - stamps.offset(0), STAMP_BYTES as u64);
    }

    #[test]
    fn verified_writes_are_fios_reads() {
        assert_eq!(reads_of("note\n{\"jobs\":[{\"read\":{\"total_ios\":12}}]}").unwrap(), 12.0);
        assert!(reads_of("{\"jobs\":[{\"read\":{\"total_ios\":0}}]}").is_err());
    }
}
