//! `figures`: everything that was promised, measured in order, in one table.

use std::path::PathBuf;

use anyhow::{Context, Result};
use bytesize::ByteSize;
use clap::Args;

use super::boot::players::{FIRST, LIVE, ON_DEMAND, OVERLAY};
use super::{Common, boot, capture, guests, kill, restore, serve, tebibyte};
use crate::contest::Contender;
use crate::report::{Better, Cell, Figure, Report, Series, Unit};
use crate::stats::{self, Summary};
use crate::trace;

/// What `figures` takes.
#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// The raw image of a guest
    #[arg(default_value = "target/guest/disk.raw")]
    image: PathBuf,
    /// Its boot trace; without it, boot-trace.jsonl beside the image
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// How often the agent is killed
    #[arg(long, default_value_t = 50)]
    kills: u32,
    /// Only these workloads
    #[arg(long, value_delimiter = ',', default_values_t = ["capture", "restore", "boot", "guests", "machine", "tebibyte", "kill", "serve"].map(String::from))]
    only: Vec<String>,
}

const MEMORY_LIMIT: f64 = 400e6;
/// Delays of the source in milliseconds, and what the boot trace may take there in seconds: on a first start, with a trace.
const DELAYS: [(u64, f64, f64); 2] = [(5, 1.2, 0.5), (20, 3.0, 0.6)];

/// Runs the workloads and holds them against the goals.
pub(crate) fn run(common: &Common, options: &Options) -> Result<Report> {
    let mut report = common.report("figures");
    let mut figures = Vec::new();
    let wanted = |name: &str| options.only.iter().any(|only| only == name);
    let image = options.image.clone();
    if wanted("capture") {
        let found = capture::run(common, &capture::Options { image: image.clone(), no_backup_tools: true })?;
        figures.extend(of_capture(&found)?);
        report.absorb(found);
    }
    if wanted("restore") {
        let found = restore::run(common, &restore::Options::for_figures(image.clone(), ByteSize::b(0), 0))?;
        figures.extend(of_restore(&found)?);
        report.absorb(found);
    }
    for (delay, limit_first, limit_traced) in if wanted("boot") { DELAYS.to_vec() } else { Vec::new() } {
        let found =
            boot::run(common, &boot::Options::for_starts(image.clone(), options.trace.clone(), delay))?;
        figures.extend(of_starts(&found, delay, limit_first, limit_traced)?);
        report.absorb(found);
        let slow = restore::Options::for_figures(image.clone(), ByteSize::mb(100), delay);
        let found = restore::run(common, &slow)?;
        figures.extend(of_slow_restore(&found, delay)?);
        report.absorb(found);
    }
    if wanted("guests") {
        let found = guests::run(common, &guests::Options::for_figures())?;
        figures.extend(of_guests(&found)?);
        report.absorb(found);
    }
    if wanted("machine") {
        let boot = boot::Options::for_machine(image.clone(), options.trace.clone());
        let found = boot::machine::run(common, &boot::machine::Options { boot })?;
        let ratio = pair(cell(&found, boot::machine::READY_TIME)?, LIVE, boot::machine::LOCAL)?;
        let promise = "a real guest until it is up, trace, 5 ms: time to a local disk's";
        figures.push(at_most(promise, 1.1, ratio, "lifeboot-bench machine"));
        report.absorb(found);
    }
    if wanted("boot") {
        let boot = boot::Options::for_figures(image.clone(), options.trace.clone(), ByteSize::mb(100), 5);
        let distinct = trace::distinct_bytes_read(&boot::trace_of(common, &image, options.trace.as_deref())?);
        let found = boot::run(common, &boot)?;
        figures.extend(of_boot(&found, distinct as f64)?);
        report.absorb(found);
    }
    if wanted("tebibyte") {
        let found = tebibyte::run(common, &tebibyte::Options { seconds: 60, kills: 3 })?;
        let command = "lifeboot-bench tebibyte";
        for (title, goal, unit) in [
            (tebibyte::RESTART, 1.0, Unit::Seconds),
            (tebibyte::MEMORY, MEMORY_LIMIT, Unit::Bytes),
            (tebibyte::JOURNAL, 64e6, Unit::Bytes),
        ] {
            figures.push(in_unit(title, goal, unit, of(cell(&found, title)?, tebibyte::NAME)?, command));
        }
        report.absorb(found);
    }
    if wanted("kill") {
        let found = kill::run(common, &kill::Options::for_figures(image, options.kills))?;
        figures.extend(of_kill(&found)?);
        report.absorb(found);
    }
    if wanted("serve") {
        let found = serve::run(common, &serve::Options::quick())?;
        figures.extend(of_serve(&found)?);
        report.absorb(found);
    }
    report.figures = figures;
    Ok(report)
}

fn of_capture(report: &Report) -> Result<Vec<Figure>> {
    use capture::Who::{Again, Fresh, QemuImg};
    let cell = |title| cell(report, title);
    let (fresh, again, qemu) = (Fresh.name(), Again.name(), QemuImg.name());
    let command = "lifeboot-bench capture";
    Ok(vec![
        at_most(
            "capture to a fresh repository, time to qemu-img's",
            0.55,
            pair(cell(capture::TIME)?, fresh, qemu)?,
            command,
        ),
        at_most(
            "a second capture with nothing changed, time to the first's",
            0.4,
            pair(cell(capture::TIME)?, again, fresh)?,
            command,
        ),
        at_most("stored, to what qemu-img stored", 1.05, pair(cell(capture::STORED)?, fresh, qemu)?, command),
        in_unit(
            "peak memory of capture",
            MEMORY_LIMIT,
            Unit::Bytes,
            of(cell(capture::MEMORY)?, fresh)?,
            command,
        ),
    ])
}

fn of_restore(report: &Report) -> Result<Vec<Figure>> {
    use restore::Who::{Live, QemuImg, Restore};
    let cell = |title| cell(report, title);
    let command = "lifeboot-bench restore";
    let mut figures = vec![
        at_most(
            "restore, every chunk verified, time to qemu-img's, which verifies nothing",
            1.0,
            pair(cell(restore::TIME)?, Restore.name(), QemuImg.name())?,
            command,
        ),
        at_least(
            "live-restore's background, undisturbed, rate to restore's",
            0.9,
            pair(cell(restore::RATE)?, Live.name(), Restore.name())?,
            command,
        ),
    ];
    figures.push(in_unit(
        "peak memory of live-restore, undisturbed",
        MEMORY_LIMIT,
        Unit::Bytes,
        of(cell(restore::MEMORY)?, Live.name())?,
        command,
    ));
    Ok(figures)
}

fn of_boot(report: &Report, distinct: f64) -> Result<Vec<Figure>> {
    let cell = |title| cell(report, title);
    let command = "lifeboot-bench boot";
    let fetched = of(cell(boot::FETCHED)?, ON_DEMAND)?;
    let ratios: Vec<f64> = fetched.samples.iter().map(|bytes| bytes / distinct).collect();
    let ratios = Summary::of(&ratios).context("boot has no sample")?;
    Ok(vec![
        at_most("boot trace, background off, fetched to distinct bytes asked for", 1.0, ratios, command),
        at_most(
            "boot trace, time to that of overlay, copy-on-read and block-stream",
            1.0,
            pair(cell(boot::TIME)?, LIVE, OVERLAY)?,
            command,
        ),
        in_unit(
            "peak memory of live-restore under the boot trace",
            MEMORY_LIMIT,
            Unit::Bytes,
            of(cell(boot::MEMORY)?, LIVE)?,
            command,
        ),
    ])
}

fn of_starts(report: &Report, delay: u64, first: f64, traced: f64) -> Result<Vec<Figure>> {
    let command = format!("lifeboot-bench boot --source-delay {delay}");
    let time = cell(report, boot::TIME)?;
    let median = |promise: String, goal, who| -> Result<Figure> {
        Ok(figure(&promise, goal, Better::Lower, Some(Unit::Seconds), of(time, who)?.summary(), &command))
    };
    Ok(vec![
        median(format!("boot trace over {delay} ms, first start"), first, FIRST)?,
        median(format!("boot trace over {delay} ms, with an earlier snapshot's trace"), traced, LIVE)?,
        at_most(
            &format!("boot trace over {delay} ms, first start, time to the best peer's"),
            1.0,
            pair(time, FIRST, OVERLAY)?,
            &command,
        ),
    ])
}

fn of_slow_restore(report: &Report, delay: u64) -> Result<Vec<Figure>> {
    use restore::Who::{BlockStream, Live, Restore};
    let command = format!("lifeboot-bench restore --source-rate 100MB --source-delay {delay}");
    let time = cell(report, restore::TIME)?;
    let mut figures = vec![at_most(
        &format!("the whole disk live over {delay} ms, time to restore's"),
        1.05,
        pair(time, Live.name(), Restore.name())?,
        &command,
    )];
    if delay >= 20 {
        figures.push(at_least(
            &format!("the whole disk live over {delay} ms, how many times as fast as block-stream"),
            10.0,
            pair(time, BlockStream.name(), Live.name())?,
            &command,
        ));
    }
    Ok(figures)
}

fn of_guests(report: &Report) -> Result<Vec<Figure>> {
    use guests::Who::{Alone, Disturbed, Undisturbed};
    let command = "lifeboot-bench guests";
    let across = |one: &str, one_who: &str, other: &str, other_who: &str| -> Result<Summary> {
        stats::ratio(&of(cell(report, one)?, one_who)?.samples, &of(cell(report, other)?, other_who)?.samples)
            .with_context(|| format!("{one} and {other} cannot be compared"))
    };
    let (alone, beside) = (Alone.name(), Disturbed.name());
    Ok(vec![
        at_least(
            "background beside random reads at depth 4, rate to the undisturbed one",
            0.7,
            across(guests::TIME, Undisturbed.name(), guests::TIME, beside)?,
            command,
        ),
        at_most(
            "reads of what is home, p99, beside the background to without it",
            2.0,
            across(guests::HOME, beside, guests::HOME_IDLE, beside)?,
            command,
        ),
        at_most(
            "slowest read of all to what a fetch costs alone",
            2.0,
            across(guests::SLOWEST, beside, guests::FETCH, alone)?,
            command,
        ),
        at_most(
            "write to what is absent to one to what is home, p50",
            1.0,
            across(guests::WRITE_ABSENT_P50, alone, guests::WRITE_HOME_P50, alone)?,
            command,
        ),
        at_most(
            "the same, p99",
            1.0,
            across(guests::WRITE_ABSENT_P99, alone, guests::WRITE_HOME_P99, alone)?,
            command,
        ),
        at_most(
            "write to what is absent to one to a hole of a plain file, p50",
            1.2,
            across(guests::WRITE_ABSENT_P50, alone, guests::WRITE_ABSENT_P50, guests::Who::Plain.name())?,
            command,
        ),
    ])
}

fn of_kill(report: &Report) -> Result<Vec<Figure>> {
    let restart = of(cell(report, kill::RESTART)?, kill::NAME)?;
    let promise =
        format!("{} rounds of kill -9, no acknowledged write lost: restart to first answer", report.rounds);
    Ok(vec![in_unit(&promise, 2.0, Unit::Seconds, restart, "lifeboot-bench kill")])
}

fn of_serve(report: &Report) -> Result<Vec<Figure>> {
    let rates = cell(report, serve::QUICK)?;
    let ratio = pair(rates, serve::Who::Ours.name(), serve::Who::Nbdkit.name())?;
    let promise = "serving a raw file, 4k random reads, depth 32, one connection: rate to nbdkit's";
    Ok(vec![at_least(promise, 1.0, ratio, "lifeboot-bench serve --quick")])
}

fn cell<'a>(report: &'a Report, title: &str) -> Result<&'a Cell> {
    report.cell(title).with_context(|| format!("`{title}` was not measured"))
}

fn of<'a>(cell: &'a Cell, contender: &str) -> Result<&'a Series> {
    cell.of(contender).with_context(|| format!("{contender} has no {}", cell.metric.title))
}

fn pair(cell: &Cell, one: &str, other: &str) -> Result<Summary> {
    stats::ratio(&of(cell, one)?.samples, &of(cell, other)?.samples)
        .with_context(|| format!("{one} and {other} cannot be compared"))
}

fn at_most(promise: &str, goal: f64, measured: Summary, command: &str) -> Figure {
    figure(promise, goal, Better::Lower, None, measured, command)
}

fn at_least(promise: &str, goal: f64, measured: Summary, command: &str) -> Figure {
    figure(promise, goal, Better::Higher, None, measured, command)
}

/// An upper bound in a unit, which the worst sample has to keep.
fn in_unit(promise: &str, goal: f64, unit: Unit, series: &Series, command: &str) -> Figure {
    let mut figure = figure(promise, goal, Better::Lower, Some(unit), series.summary(), command);
    figure.worst_counts = true;
    figure
}

fn figure(
    promise: &str,
    goal: f64,
    better: Better,
    unit: Option<Unit>,
    measured: Summary,
    command: &str,
) -> Figure {
    let (promise, command) = (promise.to_owned(), command.to_owned());
    Figure { promise, goal, better, unit, measured, worst_counts: false, command }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Metric, Side};

    #[test]
    fn figures_of_a_capture_are_ratios_of_the_same_rounds() {
        let mut report = Report::new("capture", 2, true);
        for (title, unit) in
            [(capture::TIME, Unit::Seconds), (capture::STORED, Unit::Bytes), (capture::MEMORY, Unit::Bytes)]
        {
            for (who, side, value) in [
                (capture::Who::Fresh, Side::Ours, 1.0),
                (capture::Who::Again, Side::Ours, 0.5),
                (capture::Who::QemuImg, Side::Peer, 2.0),
            ] {
                for round in [1.0, 3.0] {
                    report.record(&Metric::lower(title, unit), who.name(), side, value * round);
                }
            }
        }
        let figures = of_capture(&report).unwrap();
        let values: Vec<f64> = figures.iter().map(Figure::value).collect();
        assert_eq!(values, [0.5, 0.5, 0.5, 3.0]);
        let met: Vec<bool> = figures.iter().map(Figure::is_met).collect();
        assert_eq!(met, [true, false, true, true]);
    }

    #[test]
    fn a_peer_that_was_left_out_is_an_error_and_not_a_figure() {
        let mut report = Report::new("serve", 1, false);
        report.record(
            &Metric::higher(serve::QUICK, Unit::OpsPerSecond),
            serve::Who::Ours.name(),
            Side::Ours,
            1.0,
        );
        assert!(of_serve(&report).unwrap_err().to_string().contains("nbdkit"));
    }
}
