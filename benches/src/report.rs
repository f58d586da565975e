//! What a run measured, as data: the table, the JSON document and the plot are made from it alone.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::stats::{self, Summary};

/// The unit of a measured quantity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Unit {
    /// Elapsed time in seconds.
    Seconds,
    /// Latency in microseconds.
    Micros,
    /// Operations a second.
    OpsPerSecond,
    /// Bytes a second.
    BytesPerSecond,
    /// Bytes.
    Bytes,
    /// Something counted.
    Count,
    /// Something counted for each operation.
    PerOperation,
}

impl Unit {
    /// The value for a reader: three digits and a unit.
    pub(crate) fn show(self, value: f64) -> String {
        match self {
            Self::Seconds if value < 1.0 => format!("{:.0} ms", value * 1e3),
            Self::Seconds => format!("{value:.2} s"),
            Self::Micros if value >= 10_000.0 => format!("{:.1} ms", value / 1e3),
            Self::Micros => format!("{value:.0} µs"),
            Self::OpsPerSecond if value >= 1000.0 => format!("{:.1}k/s", value / 1e3),
            Self::OpsPerSecond => format!("{value:.0}/s"),
            Self::BytesPerSecond => format!("{:.0} MB/s", value / 1e6),
            Self::Bytes if value >= 1e7 => format!("{:.1} MB", value / 1e6),
            Self::Bytes => format!("{:.1} kB", value / 1e3),
            Self::Count => format!("{value:.0}"),
            Self::PerOperation if value >= 100.0 => format!("{value:.0}"),
            Self::PerOperation => format!("{value:.2}"),
        }
    }
}

/// Which way is ahead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Better {
    /// Less is better: times, bytes.
    Lower,
    /// More is better: rates.
    Higher,
}

/// One quantity that every contender is measured by.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub(crate) struct Metric {
    /// What is measured, of which work: `randread 4k, depth 32`.
    pub(crate) title: String,
    /// Its unit.
    pub(crate) unit: Unit,
    /// Which way is ahead.
    pub(crate) better: Better,
}

impl Metric {
    /// A quantity of which less is better.
    pub(crate) fn lower(title: impl Into<String>, unit: Unit) -> Self {
        Self { title: title.into(), unit, better: Better::Lower }
    }

    /// A quantity of which more is better.
    pub(crate) fn higher(title: impl Into<String>, unit: Unit) -> Self {
        Self { title: title.into(), unit, better: Better::Higher }
    }
}

/// On which side somebody stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Side {
    /// One of our programs.
    Ours,
    /// What people use today.
    Peer,
    /// Nobody's solution, but a mark to see the others by: a floor, a ceiling.
    Reference,
}

/// One contender's samples of one metric, in the order of the rounds.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Series {
    /// Whose they are.
    pub(crate) contender: String,
    /// On which side it stands.
    pub(crate) side: Side,
    /// One value a round.
    pub(crate) samples: Vec<f64>,
}

impl Series {
    /// The samples' summary. A series is made with its first sample, so there is one.
    pub(crate) fn summary(&self) -> Summary {
        Summary::of(&self.samples).expect("a series has at least one sample")
    }
}

/// One metric with everyone's samples.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Cell {
    /// What was measured.
    #[serde(flatten)]
    pub(crate) metric: Metric,
    /// By contender, in the order of the workload's list.
    pub(crate) series: Vec<Series>,
}

impl Cell {
    /// The series that the ratios are of: the first of ours.
    pub(crate) fn subject(&self) -> Option<&Series> {
        self.series.iter().find(|series| series.side == Side::Ours)
    }

    /// The series of that name.
    pub(crate) fn of(&self, contender: &str) -> Option<&Series> {
        self.series.iter().find(|series| series.contender == contender)
    }

    /// The peer with the best median.
    pub(crate) fn best_peer(&self) -> Option<&Series> {
        let peers = self.series.iter().filter(|series| series.side == Side::Peer);
        let by_median = |a: &&Series, b: &&Series| a.summary().median.total_cmp(&b.summary().median);
        match self.metric.better {
            Better::Lower => peers.min_by(by_median),
            Better::Higher => peers.max_by(by_median),
        }
    }

    /// The subject's ratio to `other`, round by round.
    pub(crate) fn ratio_to(&self, other: &Series) -> Option<Summary> {
        stats::ratio(&self.subject()?.samples, &other.samples)
    }

    /// Whether a ratio of ours to theirs means that ours is ahead.
    pub(crate) fn is_ahead(&self, ratio: f64) -> bool {
        match self.metric.better {
            Better::Lower => ratio < 1.0,
            Better::Higher => ratio > 1.0,
        }
    }
}

/// A contender that did not take part, and why.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Absent {
    /// Who.
    pub(crate) contender: String,
    /// Why not.
    pub(crate) reason: String,
}

/// A command that a contender ran, with its scratch paths as they were in the last round.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Command {
    /// Whose.
    pub(crate) contender: String,
    /// As one would type it.
    pub(crate) line: String,
}

/// A promise and what was measured.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Figure {
    /// What was promised.
    pub(crate) promise: String,
    /// The bound, in `unit` or as a ratio.
    pub(crate) goal: f64,
    /// Which side of the bound keeps the promise.
    pub(crate) better: Better,
    /// The unit; `None` for a ratio.
    pub(crate) unit: Option<Unit>,
    /// What was measured.
    pub(crate) measured: Summary,
    /// Whether the worst sample is what counts, and not the median.
    pub(crate) worst_counts: bool,
    /// The command that measures this alone.
    pub(crate) command: String,
}

impl Figure {
    /// The value that is held against the goal.
    pub(crate) fn value(&self) -> f64 {
        match (self.worst_counts, self.better) {
            (false, _) => self.measured.median,
            (true, Better::Lower) => self.measured.max,
            (true, Better::Higher) => self.measured.min,
        }
    }

    /// Whether the promise is kept.
    pub(crate) fn is_met(&self) -> bool {
        match self.better {
            Better::Lower => self.value() <= self.goal,
            Better::Higher => self.value() >= self.goal,
        }
    }

    /// A value of it for a reader.
    pub(crate) fn show(&self, value: f64) -> String {
        self.unit.map_or_else(|| format!("{value:.2}"), |unit| unit.show(value))
    }
}

/// The machine that the figures are from.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Machine {
    /// How many processors the harness may use.
    pub(crate) cpus: usize,
    /// The kernel's release.
    pub(crate) kernel: String,
}

impl Machine {
    /// This one.
    pub(crate) fn here() -> Self {
        Self {
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
        }
    }
}

/// Everything that one workload found.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Report {
    /// The workload's name.
    pub(crate) workload: String,
    /// Rounds that count.
    pub(crate) rounds: usize,
    /// Whether a round before them was run and thrown away.
    pub(crate) warm_up: bool,
    /// Where.
    pub(crate) machine: Machine,
    /// What was measured.
    pub(crate) cells: Vec<Cell>,
    /// Who could not take part.
    pub(crate) absent: Vec<Absent>,
    /// What was run.
    pub(crate) commands: Vec<Command>,
    /// What a reader has to know beside the numbers.
    pub(crate) notes: Vec<String>,
    /// What was promised, and whether it is kept.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) figures: Vec<Figure>,
    #[serde(skip)]
    scratch: String,
}

impl Report {
    /// An empty report of a workload.
    pub(crate) fn new(workload: impl Into<String>, rounds: usize, warm_up: bool) -> Self {
        Self {
            workload: workload.into(),
            rounds,
            warm_up,
            machine: Machine::here(),
            cells: Vec::new(),
            absent: Vec::new(),
            commands: Vec::new(),
            notes: Vec::new(),
            figures: Vec::new(),
            scratch: String::new(),
        }
    }

    /// The cell of that title.
    pub(crate) fn cell(&self, title: &str) -> Option<&Cell> {
        self.cells.iter().find(|cell| cell.metric.title == title)
    }

    /// Adds a sample; samples of one contender come in the order of the rounds.
    pub(crate) fn record(&mut self, metric: &Metric, contender: &str, side: Side, value: f64) {
        let position = self.cells.iter().position(|cell| cell.metric == *metric).unwrap_or_else(|| {
            self.cells.push(Cell { metric: metric.clone(), series: Vec::new() });
            self.cells.len() - 1
        });
        let cell = &mut self.cells[position];
        match cell.series.iter_mut().find(|series| series.contender == contender) {
            Some(series) => series.samples.push(value),
            None => {
                cell.series.push(Series { contender: contender.to_owned(), side, samples: vec![value] });
            }
        }
    }

    /// Takes back what a contender contributed, because it failed, and says so.
    pub(crate) fn withdraw(&mut self, contender: &str, reason: impl Into<String>) {
        for cell in &mut self.cells {
            cell.series.retain(|series| series.contender != contender);
        }
        self.absent.push(Absent { contender: contender.to_owned(), reason: reason.into() });
    }

    /// Names the directory that commands are shown without: it is another one in each run.
    pub(crate) fn scratch_is(&mut self, dir: &Path) {
        self.scratch = format!("{}/", dir.display());
    }

    /// Notes what a contender runs; the last line of each kind of run stands.
    pub(crate) fn ran(&mut self, contender: &str, mut line: String) {
        if !self.scratch.is_empty() {
            line = line.replace(&self.scratch, "");
        }
        match self.commands.iter_mut().find(|command| command.contender == contender) {
            Some(command) => command.line = line,
            None => self.commands.push(Command { contender: contender.to_owned(), line }),
        }
    }

    /// Adds what another part of the same workload found.
    pub(crate) fn absorb(&mut self, other: Self) {
        self.cells.extend(other.cells);
        self.notes.extend(other.notes);
        for absent in other.absent {
            if !self.absent.iter().any(|known| known.contender == absent.contender) {
                self.absent.push(absent);
            }
        }
        for command in other.commands {
            self.ran(&command.contender, command.line);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let mut report = Report::new("test", 2, true);
        let time = Metric::lower("time", Unit::Seconds);
        for (contender, side, samples) in [
            ("a", Side::Ours, [1.0, 3.0]),
            ("b", Side::Peer, [2.0, 4.0]),
            ("c", Side::Peer, [4.0, 8.0]),
            ("floor", Side::Reference, [0.1, 0.1]),
        ] {
            for sample in samples {
                report.record(&time, contender, side, sample);
            }
        }
        report
    }

    #[test]
    fn best_peer_is_the_least_where_less_is_better() {
        let mut report = report();
        assert_eq!(report.cells[0].best_peer().unwrap().contender, "b");
        report.cells[0].metric.better = Better::Higher;
        assert_eq!(report.cells[0].best_peer().unwrap().contender, "c");
    }

    #[test]
    fn ratio_is_ours_to_theirs() {
        let report = report();
        let cell = report.cell("time").unwrap();
        assert_eq!(cell.ratio_to(cell.of("b").unwrap()).unwrap().median, 0.625);
        assert!(cell.is_ahead(0.625));
    }

    #[test]
    fn a_contender_that_failed_leaves_no_samples() {
        let mut report = report();
        report.withdraw("b", "crashed");
        let cell = report.cell("time").unwrap();
        assert!(cell.of("b").is_none());
        assert_eq!(cell.best_peer().unwrap().contender, "c");
        assert_eq!(report.absent[0].reason, "crashed");
    }

    #[test]
    fn a_figure_is_met_on_the_right_side_of_its_goal() {
        let measured = Summary { count: 3, median: 0.5, min: 0.4, max: 0.7 };
        let figure = |better, goal, worst_counts| Figure {
            promise: "a promise".into(),
            goal,
            better,
            unit: None,
            measured,
            worst_counts,
            command: String::new(),
        };
        assert!(figure(Better::Lower, 0.5, false).is_met());
        assert!(!figure(Better::Lower, 0.5, true).is_met());
        assert!(figure(Better::Higher, 0.5, false).is_met());
        assert!(!figure(Better::Higher, 0.5, true).is_met());
    }

    #[test]
    fn commands_are_shown_without_the_scratch_directory() {
        let mut report = report();
        report.scratch_is(Path::new("/tmp/lifeboot-bench-x"));
        report.ran("a", "lifeboot restore /tmp/lifeboot-bench-x/target.raw".into());
        assert_eq!(report.commands[0].line, "lifeboot restore target.raw");
    }

    #[test]
    fn values_are_shown_with_a_fitting_unit() {
        assert_eq!(Unit::Seconds.show(0.0123), "12 ms");
        assert_eq!(Unit::Seconds.show(2.5), "2.50 s");
        assert_eq!(Unit::OpsPerSecond.show(127_345.0), "127.3k/s");
        assert_eq!(Unit::Micros.show(73_000.0), "73.0 ms");
        assert_eq!(Unit::Bytes.show(202_000_000.0), "202.0 MB");
    }
}
