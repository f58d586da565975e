//! The whole table as a picture: for each way of serving, how our rate and our 99th percentile stand to the best peer's.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use plotters::coord::Shift;
use plotters::drawing::DrawingArea;
use plotters::prelude::{
    Circle, Color, IntoDrawingArea, IntoFont, PathElement, RGBColor, SVGBackend, Text, WHITE,
};

use super::cells::{Cell, Work};
use super::verdict::{Compared, compare};
use crate::report::Report;

const LABEL_WIDTH: i32 = 190;
const PLOT_WIDTH: i32 = 400;
const GAP: i32 = 30;
const WIDTH: i32 = LABEL_WIDTH + 2 * (PLOT_WIDTH + GAP);
const TITLE_HEIGHT: i32 = 64;
const HEAD_HEIGHT: i32 = 44;
const ROW_HEIGHT: i32 = 18;
/// The ratios at the ends of the axis; those beyond stand at its end.
const ENDS: (f64, f64) = (0.25, 4.0);
const TICKS: [f64; 5] = [0.25, 0.5, 1.0, 2.0, 4.0];

const INK: RGBColor = RGBColor(0x22, 0x22, 0x22);
const LINE: RGBColor = RGBColor(0xdd, 0xdd, 0xdd);
const AHEAD: RGBColor = RGBColor(0x1f, 0x77, 0xb4);
const BEHIND: RGBColor = RGBColor(0xd6, 0x27, 0x28);

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Writes the picture to `path`.
pub(crate) fn write(report: &Report, path: &Path) -> Result<()> {
    let svg = draw(report).with_context(|| format!("cannot draw {}", path.display()))?;
    std::fs::write(path, svg).with_context(|| format!("cannot write {}", path.display()))
}

/// Of one way, in the order of the table: the work without depth and connections, and its cells.
type Rows<'a> = Vec<(String, Vec<Compared<'a>>)>;

fn draw(report: &Report) -> Result<String> {
    let cells = super::cells::table();
    let mut ways: BTreeMap<usize, (String, Rows<'_>)> = BTreeMap::new();
    for (place, cell) in cells.iter().enumerate() {
        let Some(compared) = compare(report, cell) else { continue };
        let first = cells.iter().position(|other| other.way() == cell.way()).unwrap_or(place);
        let (_, rows) = ways.entry(first).or_insert_with(|| (cell.way(), Vec::new()));
        let work = work(cell);
        match rows.iter_mut().find(|(other, _)| *other == work) {
            Some((_, row)) => row.push(compared),
            None => rows.push((work, vec![compared])),
        }
    }
    let height = |rows: &Rows<'_>| HEAD_HEIGHT + ROW_HEIGHT * rows.len() as i32;
    let whole = TITLE_HEIGHT + ways.values().map(|(_, rows)| height(rows)).sum::<i32>() + 10;
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (WIDTH as u32, whole as u32)).into_drawing_area();
        root.fill(&WHITE)?;
        let title = format!("lifeboot-nbd / the best peer, median of {} rounds", report.rounds);
        root.draw(&Text::new(title, (12, 12), ("sans-serif", 18).into_font().color(&INK)))?;
        let key =
            "small: depth 1, large: depth 32; full: one connection, hollow: four; red: the peer is ahead";
        root.draw(&Text::new(key, (12, 40), ("sans-serif", 13).into_font().color(&INK)))?;
        let mut top = TITLE_HEIGHT;
        for (way, rows) in ways.values() {
            draw_way(&root, top, way, rows)?;
            top += height(rows);
        }
        root.present()?;
    }
    Ok(svg)
}

fn draw_way(root: &Area<'_>, top: i32, way: &str, rows: &Rows<'_>) -> Result<()> {
    let small = || ("sans-serif", 12).into_font().color(&INK);
    root.draw(&Text::new(way.to_owned(), (12, top + 6), ("sans-serif", 15).into_font().color(&INK)))?;
    let bottom = top + HEAD_HEIGHT + ROW_HEIGHT * rows.len() as i32;
    for (left, what) in [
        (LABEL_WIDTH, "rate: more is better"),
        (LABEL_WIDTH + PLOT_WIDTH + GAP, "99th percentile: less is better"),
    ] {
        root.draw(&Text::new(what, (left, top + 6), small()))?;
        for tick in TICKS {
            let x = left + place(tick);
            let colour = if tick == 1.0 { INK } else { LINE };
            root.draw(&PathElement::new(
                vec![(x, top + HEAD_HEIGHT - 4), (x, bottom - 4)],
                colour.stroke_width(1),
            ))?;
            root.draw(&Text::new(tick.to_string(), (x - 6, top + HEAD_HEIGHT - 18), small()))?;
        }
    }
    for (number, (work, row)) in rows.iter().enumerate() {
        let y = top + HEAD_HEIGHT + ROW_HEIGHT * number as i32 + ROW_HEIGHT / 2 - 4;
        root.draw(&Text::new(work.clone(), (24, y - 6), small()))?;
        for compared in row {
            let rate = (LABEL_WIDTH, compared.ratio, compared.ratio >= 1.0);
            let p99 = compared.p99.map(|p99| (LABEL_WIDTH + PLOT_WIDTH + GAP, p99, p99 <= 1.0));
            for (left, ratio, is_ahead) in [Some(rate), p99].into_iter().flatten() {
                let colour = if is_ahead { AHEAD } else { BEHIND };
                let (size, is_full) = mark(compared.cell);
                let style = if is_full { colour.filled() } else { colour.stroke_width(2) };
                root.draw(&Circle::new((left + place(ratio), y), size, style))?;
            }
        }
    }
    Ok(())
}

/// How far along the axis a ratio stands.
fn place(ratio: f64) -> i32 {
    let (least, most) = (ENDS.0.ln(), ENDS.1.ln());
    let along = (ratio.clamp(ENDS.0, ENDS.1).ln() - least) / (most - least);
    (along * f64::from(PLOT_WIDTH - 20)) as i32
}

/// What a cell's row is called.
fn work(cell: &Cell) -> String {
    let name = cell.name();
    let name = name.strip_prefix(&format!("{}-", cell.way())).unwrap_or(&name);
    match cell.work {
        Work::Fio(_) => name.rsplitn(3, '-').last().unwrap_or(name).to_owned(),
        Work::Copy | Work::QemuBench { .. } => name.to_owned(),
    }
}

/// The radius of a cell's mark, and whether it is full.
fn mark(cell: &Cell) -> (i32, bool) {
    match cell.work {
        Work::Fio(job) => (if job.depth == 1 { 3 } else { 5 }, job.connections == 1),
        Work::Copy | Work::QemuBench { .. } => (5, true),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Metric, Side, Unit};

    #[test]
    fn every_cell_that_was_measured_has_its_marks_and_no_other() {
        let mut report = Report::new("serve", 1, false);
        for (name, ours) in
            [("page-unix-randread-4k-d32-c1", 150.0), ("tls-nothing", 1.0), ("page-tls-read-1M-d1-c4", 50.0)]
        {
            let metric = Metric::higher(name, Unit::OpsPerSecond);
            report.record(&metric, "ours", Side::Ours, ours);
            report.record(&metric, "peer", Side::Peer, 100.0);
        }
        let p99 = Metric::lower("page-tls-read-1M-d1-c4 p99", Unit::Micros);
        report.record(&p99, "ours", Side::Ours, 100.0);
        report.record(&p99, "peer", Side::Peer, 200.0);
        let svg = draw(&report).unwrap();
        for text in ["randread-4k", "read-1M", "page-unix", "page-tls"] {
            assert!(svg.contains(text), "{text} is not in the picture: {svg}");
        }
        assert_eq!(svg.matches("<circle").count(), 3);
        let red = |svg: &str| svg.matches("<circle").count() - svg.matches("#1F77B4").count();
        assert_eq!(red(&svg), 1, "{svg}");
    }

    #[test]
    fn equal_stands_in_the_middle_and_what_is_beyond_the_axis_at_its_end() {
        assert_eq!(place(1.0) * 2, place(ENDS.1));
        assert_eq!(place(0.01), 0);
        assert_eq!(place(99.0), place(ENDS.1));
    }
}
