//! `lifeboot status --watch`: the disks of an agent, shown again each second.
//!
//! On a terminal the view is redrawn in place: it is as many lines as before, each cut to the terminal's width of that
//! moment. Nothing about the terminal is changed (no other screen, no hidden cursor), so nothing must be put back, however it
//! ends. Elsewhere it is a line for each disk, or with `--json` a document on a line.

use std::path::Path;
use std::time::Duration;

use serde::Serialize;

use super::{Status, at_rest, session_of, state_of};
use crate::cli::{Context, Interrupt, Outcome};
use crate::live_restore::{Request, Strip, ask};
use crate::output::{Output, human_count, human_duration, human_size};

/// How often it is shown.
const INTERVAL: Duration = Duration::from_secs(1);
/// How often the interrupt is looked at.
const TICK: Duration = Duration::from_millis(50);
/// Cells of a strip where no terminal says how many fit.
const CELLS: usize = 64;
const LEGEND: &str = "# home  w written by the guest  + in part  > being fetched  . absent  ! damaged";

/// What is known of one disk at a moment.
#[derive(Serialize)]
struct Seen {
    #[serde(flatten)]
    status: Status,
    /// The disk from its start to its end, while an agent runs.
    strip: Option<String>,
}

/// One document a second with `--json`.
#[derive(Serialize)]
struct Document<'a> {
    disks: &'a [Seen],
}

/// Shows it until somebody interrupts, or nobody reads.
pub(super) fn watch(context: &Context, target: &Path, state: Option<&Path>) -> anyhow::Result<Outcome> {
    let interrupt = context.interrupt()?;
    let output = context.output();
    let mut drawn = 0;
    while !interrupt.is_raised() {
        let size = output.terminal_size();
        let cells = size.map_or(CELLS, |(width, _)| width.saturating_sub(2).max(8));
        let seen = look(target, state, cells)?;
        if output.is_json() {
            output.event(&Document { disks: &seen })?;
        } else if let Some(size) = size {
            drawn = draw(output, &seen, size, drawn)?;
        } else {
            for one in &seen {
                output.stdout(format!("{}\n", line(one)).as_bytes())?;
            }
        }
        pause(&interrupt);
    }
    Ok(Outcome::Done)
}

fn pause(interrupt: &Interrupt) {
    let mut left = INTERVAL;
    while !left.is_zero() && !interrupt.is_raised() {
        std::thread::sleep(TICK);
        left = left.saturating_sub(TICK);
    }
}

/// Asks the agent about all its disks; where none runs, says what is known of this one.
fn look(target: &Path, state: Option<&Path>, cells: usize) -> anyhow::Result<Vec<Seen>> {
    let (state, record) = session_of(target, state)?;
    let Some(statuses) = ask::<Vec<Status>>(state.path(), &Request::Disks)? else {
        return Ok(vec![Seen { status: at_rest(&state, &record)?, strip: None }]);
    };
    let strips = ask::<Vec<Strip>>(state.path(), &Request::Map { cells })?.unwrap_or_default();
    let mut strips = strips.into_iter();
    let seen = |status| Seen { status, strip: strips.next().map(|strip| strip.cells) };
    Ok(statuses.into_iter().map(seen).collect())
}

/// Draws over the lines that were drawn before; returns how many there are now.
fn draw(
    output: &Output,
    seen: &[Seen],
    (width, height): (usize, usize),
    drawn: usize,
) -> anyhow::Result<usize> {
    let lines = fitting(seen, height);
    let mut text = String::new();
    if drawn > 0 {
        text.push_str(&format!("\x1b[{drawn}A"));
    }
    text.push('\r');
    for line in &lines {
        // A line that wraps would be two, and the next view would begin in the wrong place.
        text.extend(line.chars().take(width.saturating_sub(1)));
        text.push_str("\x1b[K\n");
    }
    text.push_str("\x1b[J");
    output.stdout(text.as_bytes())?;
    Ok(lines.len())
}

/// The lines that fit, below each other and above the cursor's: what scrolled out could not be drawn over.
fn fitting(seen: &[Seen], height: usize) -> Vec<String> {
    let blocks: Vec<Vec<String>> = seen.iter().map(block).collect();
    let most = height.saturating_sub(1).max(1);
    let mut lines = Vec::new();
    for (disk, block) in blocks.iter().enumerate() {
        let is_last = disk + 1 == blocks.len();
        if lines.len() + block.len() + usize::from(!is_last) > most {
            let left = human_count((blocks.len() - disk) as u64, "disk", "disks");
            lines.extend(block.iter().take(most.saturating_sub(lines.len() + 1)).cloned());
            lines.push(format!("… {left} not shown, or not wholly: the terminal is too low"));
            return lines;
        }
        lines.extend_from_slice(block);
    }
    if lines.len() < most {
        lines.push(LEGEND.to_owned());
    }
    lines
}

fn home(status: &Status) -> String {
    let mut text = format!(
        "{:.1} % home, {} of {}",
        status.percent(),
        human_size(status.home_bytes),
        human_size(status.size)
    );
    if status.is_coming_home() && status.waiting.is_none() {
        text.push_str(&format!(" at {}/s", human_size(status.bytes_per_second)));
        if let Some(seconds) = status.seconds_left {
            text.push_str(&format!(", {} left", human_duration(Duration::from_secs(seconds))));
        }
    }
    text
}

fn fetched(status: &Status) -> String {
    let ms = |us: u64| us as f64 / 1000.0;
    let amplification = status.amplification.map(|times| format!(", amplification {times:.1}"));
    format!(
        "fetched {} at {}/s; {}, p50 {:.1} ms, p99 {:.1} ms, {} waiting{}",
        human_size(status.fetched_bytes),
        human_size(status.fetched_bytes_per_second),
        human_count(status.misses.count, "miss", "misses"),
        ms(status.misses.p50_us),
        ms(status.misses.p99_us),
        status.misses.waiting,
        amplification.unwrap_or_default()
    )
}

/// One disk on a terminal.
fn block(seen: &Seen) -> Vec<String> {
    let Seen { status, strip } = seen;
    let mut lines = vec![format!(
        "{}/{} to {}: {}",
        status.snapshot,
        status.disk,
        status.target.display(),
        state_of(status)
    )];
    lines.extend(strip.clone());
    lines.push(format!("  {}", home(status)));
    lines.push(format!("  written by the guest: {}", human_size(status.guest_bytes)));
    if status.pid.is_some() {
        let limit = status.limit.filter(|limit| *limit > 0);
        let limit = limit.map(|limit| format!("; limit {}/s", human_size(limit))).unwrap_or_default();
        let clients = human_count(status.connections.unwrap_or(0), "client", "clients");
        lines.push(format!("  {}", fetched(status)));
        lines.push(format!("  {clients} connected{limit}"));
    }
    if let Some(why) = &status.waiting {
        lines.push(format!("  waiting: {why}"));
    }
    if let Some(loss) = &status.loss {
        lines.push(format!("  may be lost: {loss}"));
    }
    if status.is_damaged() {
        lines.push(format!("  damaged: {}", human_size(status.damaged_bytes)));
    }
    lines
}

/// One disk on a line.
fn line(seen: &Seen) -> String {
    let Seen { status, strip } = seen;
    let mut line = format!("{}/{}: {}; {}", status.snapshot, status.disk, state_of(status), home(status));
    if status.pid.is_some() {
        line.push_str(&format!("; {}", fetched(status)));
    }
    if status.is_damaged() {
        line.push_str(&format!("; damaged: {}", human_size(status.damaged_bytes)));
    }
    if let Some(why) = &status.waiting {
        line.push_str(&format!("; waiting: {why}"));
    }
    if let Some(loss) = &status.loss {
        line.push_str(&format!("; may be lost: {loss}"));
    }
    if let Some(strip) = strip {
        line.push_str(&format!(" [{strip}]"));
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::live_restore::a_record;
    use crate::status::Phase;

    fn disks(count: usize) -> Vec<Seen> {
        let one = || Seen { status: Status::at_rest(&a_record(), Phase::Stopped), strip: Some("#".into()) };
        std::iter::repeat_with(one).take(count).collect()
    }

    #[test]
    fn a_rate_is_shown_while_something_is_coming_home() {
        let running = |damaged_bytes| {
            let status = Status::at_rest(&a_record(), Phase::Running);
            let home_bytes = status.size - 1000;
            Seen { status: Status { home_bytes, damaged_bytes, bytes_per_second: 7, ..status }, strip: None }
        };
        assert!(
            line(&running(999)).contains("running: copying home; 99.9 % home, 1.0 GiB of 1.0 GiB at 7 B/s")
        );
        let settled = line(&running(1000));
        assert!(
            settled.contains("all is home but what is damaged; 99.9 % home, 1.0 GiB of 1.0 GiB; damaged")
        );
    }

    #[test]
    fn the_view_is_never_higher_than_the_terminal_and_says_what_it_leaves_out() {
        let whole = fitting(&disks(3), 100);
        assert_eq!(whole.last().map(String::as_str), Some(LEGEND));
        let needed = whole.len();
        for height in 1..needed + 3 {
            let lines = fitting(&disks(3), height);
            assert!(lines.len() <= (height - 1).max(1), "{height}: {lines:?}");
            let is_cut = lines.last().unwrap().starts_with('\u{2026}');
            assert_eq!(is_cut, height < needed, "{height}: {lines:?}");
        }
        assert!(fitting(&disks(3), 6).last().unwrap().contains("2 disks not shown"));
        assert!(fitting(&disks(1), 1)[0].contains("1 disk not shown"));
    }
}
