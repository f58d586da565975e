//! What the cells say together: how far ahead of the best peer, and where not.

use super::cells::{Cell, Work};
use crate::report::{Cell as Measured, Report, Side};
use crate::stats::{self, Summary};

/// One cell in which both sides took part.
pub(super) struct Compared<'a> {
    pub(super) cell: &'a Cell,
    rate: &'a Measured,
    /// Our rate divided by that of the best peer, the median of the rounds.
    pub(super) ratio: f64,
    /// The same of the 99th percentiles: less is better.
    pub(super) p99: Option<f64>,
    /// The rate without a disk divided by that of the best peer, where it was measured: what is left to be won.
    limit: Option<f64>,
}

/// Sentences about every way of serving, for the report's notes.
pub(super) fn sentences(report: &Report, cells: &[Cell]) -> Vec<String> {
    let mut ways: Vec<String> = cells.iter().map(Cell::way).collect();
    ways.dedup();
    ways.iter().flat_map(|way| of_way(report, cells, way)).collect()
}

fn of_way(report: &Report, cells: &[Cell], way: &str) -> Vec<String> {
    let of_way: Vec<&Cell> = cells.iter().filter(|cell| cell.way() == way).collect();
    let compared: Vec<Compared<'_>> = of_way.iter().filter_map(|cell| compare(report, cell)).collect();
    let ratios: Vec<f64> = compared.iter().map(|compared| compared.ratio).collect();
    let Some(all) = Summary::of(&ratios) else { return Vec::new() };
    let worst = compared.iter().min_by(|a, b| a.ratio.total_cmp(&b.ratio)).expect("there is one");
    let mut said = vec![format!(
        "{way}: our rate / the best peer's over {} cells: median {:.2}, least {:.2} ({})",
        compared.len(),
        all.median,
        all.min,
        worst.cell.name()
    )];
    let limits: Vec<f64> = compared.iter().filter_map(|one| one.limit).collect();
    if let Some(limits) = Summary::of(&limits) {
        said.push(format!(
            "{way}: without a disk at all / the best peer's: median {:.2}, least {:.2}, most {:.2}",
            limits.median, limits.min, limits.max
        ));
    }
    let behind = |is_behind: &dyn Fn(&Compared<'_>) -> Option<f64>| -> String {
        let behind = compared.iter().filter_map(|one| Some((is_behind(one)?, one)));
        let named = behind.map(|(ratio, one)| format!("{} {ratio:.2}", one.cell.name()));
        named.collect::<Vec<_>>().join(", ")
    };
    let slower = behind(&|one| (one.ratio < 1.0).then_some(one.ratio));
    if !slower.is_empty() {
        said.push(format!("{way}: slower than the best peer in {slower}"));
    }
    let later = behind(&|one| one.p99.filter(|p99| *p99 > 1.0));
    if !later.is_empty() {
        said.push(format!("{way}: p99 / the best peer's above 1 in {later}"));
    }
    let fewer = behind(&|one| four_to_one(report, one).filter(|ratio| *ratio < 1.0));
    if !fewer.is_empty() {
        said.push(format!("{way}: four connections are slower than one in {fewer}"));
    }
    said
}

/// How a cell came out; nothing where one side was not measured.
pub(super) fn compare<'a>(report: &'a Report, cell: &'a Cell) -> Option<Compared<'a>> {
    let ratio_of = |title: &str| {
        let measured = report.cell(title)?;
        Some((measured, measured.ratio_to(measured.best_peer()?)?.median))
    };
    let (rate, ratio) = ratio_of(&cell.name())?;
    let reference = rate.series.iter().find(|series| series.side == Side::Reference);
    let limit =
        reference.zip(rate.best_peer()).and_then(|(limit, peer)| stats::ratio(&limit.samples, &peer.samples));
    let p99 = ratio_of(&cell.p99_title()).map(|(_, p99)| p99);
    Some(Compared { cell, rate, ratio, p99, limit: limit.map(|limit| limit.median) })
}

/// Our rate over four connections divided by that over one, at depth 32: at depth 1 more connections are more depth.
fn four_to_one(report: &Report, compared: &Compared<'_>) -> Option<f64> {
    let Work::Fio(job) = compared.cell.work else { return None };
    if job.connections != 4 || job.depth == 1 {
        return None;
    }
    let one = report.cell(&compared.cell.over(1)?.name())?;
    Some(compared.rate.subject()?.summary().median / one.subject()?.summary().median)
}

#[cfg(test)]
mod tests {
    use super::super::cells::table;
    use super::*;
    use crate::report::{Metric, Unit};

    fn report(samples: &[(&str, f64, f64)]) -> (Report, Vec<Cell>) {
        let mut report = Report::new("serve", 1, false);
        let mut cells = Vec::new();
        for (name, ours, theirs) in samples {
            let metric = Metric::higher(*name, Unit::OpsPerSecond);
            report.record(&metric, "ours", Side::Ours, *ours);
            report.record(&metric, "good", Side::Peer, *theirs);
            report.record(&metric, "bad", Side::Peer, theirs / 2.0);
            report.record(&metric, "nobody", Side::Reference, theirs * 4.0);
            cells.extend(table().into_iter().find(|cell| cell.name() == *name));
        }
        (report, cells)
    }

    #[test]
    fn the_best_peer_counts_and_the_worst_cell_is_named() {
        let (report, cells) = report(&[
            ("page-unix-randread-4k-d32-c1", 300.0, 100.0),
            ("page-unix-randread-4k-d32-c4", 150.0, 100.0),
            ("page-unix-read-1M-d1-c1", 90.0, 100.0),
        ]);
        let said = sentences(&report, &cells).join("\n");
        for words in [
            "over 3 cells: median 1.50, least 0.90 (page-unix-read-1M-d1-c1)",
            "without a disk at all / the best peer's: median 4.00, least 4.00",
            "slower than the best peer in page-unix-read-1M-d1-c1 0.90",
            "four connections are slower than one in page-unix-randread-4k-d32-c4 0.50",
        ] {
            assert!(said.contains(words), "{said}");
        }
        assert!(!said.contains("p99"), "{said}");
    }
}
