//! A report as a table on the terminal.

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};

use crate::report::{Better, Cell, Report, Side};

/// The whole report for a reader: the figures, who was absent, the notes.
pub(crate) fn render(report: &Report) -> String {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(["what", "who", "median", "min..max", "ours/this", "min..max", ""]);
    for cell in &report.cells {
        for row in rows(cell) {
            table.add_row(row);
        }
    }
    for column in 2..6 {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let warm_up = if report.warm_up { " after a warm-up round that is not counted" } else { "" };
    let mut text = format!(
        "{}: {} rounds{warm_up}, {} processors, Linux {}\n{table}\n",
        report.workload, report.rounds, report.machine.cpus, report.machine.kernel
    );
    if !report.figures.is_empty() {
        text += &figures(report);
    }
    for absent in &report.absent {
        text += &format!("absent: {} ({})\n", absent.contender, absent.reason);
    }
    for note in &report.notes {
        text += &format!("note: {note}\n");
    }
    for command in &report.commands {
        text += &format!("command, {}: {}\n", command.contender, command.line);
    }
    text
}

fn figures(report: &Report) -> String {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(["figure", "goal", "measured", "min..max", "", "command"]);
    for figure in &report.figures {
        let sign = match figure.better {
            Better::Lower => "≤",
            Better::Higher => "≥",
        };
        let worst = if figure.worst_counts { " (worst)" } else { "" };
        table.add_row([
            figure.promise.clone(),
            format!("{sign} {}", figure.show(figure.goal)),
            format!("{}{worst}", figure.show(figure.value())),
            format!("{}..{}", figure.show(figure.measured.min), figure.show(figure.measured.max)),
            if figure.is_met() { "met" } else { "NOT MET" }.to_owned(),
            figure.command.clone(),
        ]);
    }
    format!("{table}\n")
}

fn rows(cell: &Cell) -> Vec<[String; 7]> {
    let unit = cell.metric.unit;
    let best = cell.best_peer().map(|series| series.contender.as_str());
    let row = |(position, series): (usize, &crate::report::Series)| {
        let what = if position == 0 { cell.metric.title.clone() } else { String::new() };
        let summary = series.summary();
        let (mut ratio, mut spread, mut mark) = (String::new(), String::new(), String::new());
        // Another of ours does other work, or the same in another way: no ratio says who is ahead.
        if series.side != Side::Ours
            && let Some(found) = cell.ratio_to(series)
        {
            ratio = format!("{:.2}", found.median);
            spread = format!("{:.2}..{:.2}", found.min, found.max);
            if Some(series.contender.as_str()) == best {
                mark = format!("best peer, {}", if cell.is_ahead(found.median) { "ahead" } else { "behind" });
            }
        }
        [
            what,
            series.contender.clone(),
            unit.show(summary.median),
            format!("{}..{}", unit.show(summary.min), unit.show(summary.max)),
            ratio,
            spread,
            mark,
        ]
    };
    cell.series.iter().enumerate().map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Metric, Unit};

    #[test]
    fn table_names_the_best_peer_and_our_ratio_to_it() {
        let mut report = Report::new("serve", 1, false);
        let rate = Metric::higher("randread 4k", Unit::OpsPerSecond);
        report.record(&rate, "ours", Side::Ours, 150_000.0);
        report.record(&rate, "nbdkit", Side::Peer, 100_000.0);
        report.record(&rate, "qemu-nbd", Side::Peer, 50_000.0);
        report.absent.push(crate::report::Absent { contender: "borg".into(), reason: "not found".into() });
        let text = render(&report);
        let nbdkit = text.lines().find(|line| line.contains("nbdkit")).unwrap();
        assert!(nbdkit.contains("1.50") && nbdkit.contains("best peer, ahead"), "{text}");
        let qemu = text.lines().find(|line| line.contains("qemu-nbd")).unwrap();
        assert!(qemu.contains("3.00") && !qemu.contains("best peer"), "{text}");
        assert!(text.contains("absent: borg (not found)"));
    }
}
