//! Turns: every contender once a round, on the same data, the order rotated, one warm-up round thrown away.

use anyhow::{Context, Result};

use crate::report::{Metric, Report, Side};
use crate::stats;

/// Somebody who is measured.
pub(crate) trait Contender {
    /// Its name in the table.
    fn name(&self) -> &str;
    /// On which side it stands. A failure of ours ends the run, another's is noted.
    fn side(&self) -> Side;
}

/// How often everyone has a turn.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Contest {
    /// Rounds that count.
    pub(crate) rounds: usize,
    /// Whether a round before them is run and thrown away.
    pub(crate) warm_up: bool,
}

/// One contender's turn in one round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Turn {
    /// Counted from 0; `None` in the warm-up round.
    pub(crate) round: Option<usize>,
}

/// What one turn measured.
pub(crate) type Sample = Vec<(Metric, f64)>;

impl Contest {
    /// Gives everyone their turns and gathers the samples in `report`.
    pub(crate) fn run<C: Contender>(
        &self,
        report: &mut Report,
        contenders: &[C],
        mut measure: impl FnMut(&C, Turn, &mut Report) -> Result<Sample>,
    ) -> Result<()> {
        let mut out = vec![false; contenders.len()];
        let warm_up = self.warm_up.then_some(None);
        for round in warm_up.into_iter().chain((0..self.rounds).map(Some)) {
            for index in stats::turns(contenders.len(), round.unwrap_or(0)) {
                let contender = &contenders[index];
                if out[index] {
                    continue;
                }
                let sample = match measure(contender, Turn { round }, report) {
                    Ok(sample) => sample,
                    Err(error) if contender.side() == Side::Ours => {
                        return Err(error).with_context(|| format!("{} failed", contender.name()));
                    }
                    Err(error) => {
                        eprintln!("{}: left out: {error:#}", contender.name());
                        report.withdraw(contender.name(), format!("failed: {error:#}"));
                        out[index] = true;
                        continue;
                    }
                };
                announce(round, self.rounds, contender.name(), &sample);
                if round.is_some() {
                    for (metric, value) in &sample {
                        report.record(metric, contender.name(), contender.side(), *value);
                    }
                }
            }
        }
        for cell in &mut report.cells {
            // Whoever began the first counted round stands first in the samples; the list's order reads better.
            let place = |name: &str| contenders.iter().position(|contender| contender.name() == name);
            cell.series.sort_by_key(|series| place(&series.contender));
        }
        Ok(())
    }
}

fn announce(round: Option<usize>, rounds: usize, name: &str, sample: &Sample) {
    let which = round.map_or_else(|| "warm-up".to_owned(), |round| format!("round {}/{rounds}", round + 1));
    let values: Vec<String> = sample
        .iter()
        .map(|(metric, value)| format!("{} {}", metric.title, metric.unit.show(*value)))
        .collect();
    eprintln!("{which}, {name}: {}", values.join("; "));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Unit;

    struct Named(&'static str, Side);

    impl Contender for Named {
        fn name(&self) -> &str {
            self.0
        }
        fn side(&self) -> Side {
            self.1
        }
    }

    fn contenders() -> [Named; 3] {
        [Named("ours", Side::Ours), Named("a", Side::Peer), Named("b", Side::Peer)]
    }

    #[test]
    fn the_warm_up_round_is_run_and_not_counted() {
        let mut report = Report::new("test", 2, true);
        let mut turns = Vec::new();
        Contest { rounds: 2, warm_up: true }
            .run(&mut report, &contenders(), |who, turn, _| {
                turns.push((who.name().to_owned(), turn.round));
                Ok(vec![(Metric::lower("time", Unit::Seconds), turn.round.map_or(100.0, |r| r as f64))])
            })
            .unwrap();
        assert_eq!(turns.len(), 9);
        assert_eq!(turns[0], ("ours".into(), None));
        assert_eq!(turns[6], ("a".into(), Some(1)), "the second round begins with the next contender");
        assert_eq!(report.cells[0].of("b").unwrap().samples, [0.0, 1.0]);
        assert_eq!(report.cells[0].series[0].contender, "ours");
    }

    #[test]
    fn a_failing_peer_is_left_out_and_named() {
        let mut report = Report::new("test", 3, false);
        Contest { rounds: 3, warm_up: false }
            .run(&mut report, &contenders(), |who, turn, _| {
                anyhow::ensure!(who.name() != "a" || turn.round != Some(1), "no more");
                Ok(vec![(Metric::lower("time", Unit::Seconds), 1.0)])
            })
            .unwrap();
        assert!(report.cells[0].of("a").is_none());
        assert_eq!(report.cells[0].of("b").unwrap().samples.len(), 3);
        assert_eq!(report.absent[0].reason, "failed: no more");
    }

    #[test]
    fn our_own_failure_ends_the_run() {
        let mut report = Report::new("test", 1, false);
        let result = Contest { rounds: 1, warm_up: false }.run(&mut report, &contenders(), |who, _, _| {
            anyhow::ensure!(who.side() != Side::Ours, "broken");
            Ok(Vec::new())
        });
        assert!(format!("{:#}", result.unwrap_err()).contains("ours failed: broken"));
    }
}
