//! A report as an SVG: one panel a metric, a bar a contender, a whisker from the least to the greatest sample.

use std::path::Path;

use anyhow::{Context, Result};
use plotters::prelude::{
    ChartBuilder, Color, IntoDrawingArea, IntoFont, PathElement, RGBColor, Rectangle, SVGBackend, Text, WHITE,
};

use crate::report::{Cell, Report, Side};

const PANEL_WIDTH: u32 = 900;
const TITLE_HEIGHT: u32 = 44;
const HEAD_HEIGHT: u32 = 46;
const BAR_HEIGHT: u32 = 26;
const LABEL_WIDTH: u32 = 250;

const OURS: RGBColor = RGBColor(0x1f, 0x77, 0xb4);
const THEIRS: RGBColor = RGBColor(0xb0, 0xb0, 0xb0);
const MARK: RGBColor = RGBColor(0xe0, 0xe0, 0xe0);
const INK: RGBColor = RGBColor(0x22, 0x22, 0x22);

/// Writes the plot to `path`.
pub(crate) fn write(report: &Report, path: &Path) -> Result<()> {
    let svg = draw(report).with_context(|| format!("cannot draw {}", path.display()))?;
    std::fs::write(path, svg).with_context(|| format!("cannot write {}", path.display()))
}

/// The plot as SVG text.
fn draw(report: &Report) -> Result<String> {
    let heights: Vec<u32> =
        report.cells.iter().map(|cell| HEAD_HEIGHT + BAR_HEIGHT * cell.series.len() as u32).collect();
    let mut svg = String::new();
    {
        let height = TITLE_HEIGHT + heights.iter().sum::<u32>() + 10;
        let root = SVGBackend::with_string(&mut svg, (PANEL_WIDTH, height)).into_drawing_area();
        root.fill(&WHITE)?;
        let title = format!(
            "lifeboot-bench {}: median of {}, whiskers from least to greatest",
            report.workload, report.rounds
        );
        root.draw(&Text::new(title, (12, 14), ("sans-serif", 18).into_font().color(&INK)))?;
        let mut top = TITLE_HEIGHT;
        for (cell, height) in report.cells.iter().zip(&heights) {
            let panel = root.clone().shrink((0, top), (PANEL_WIDTH, *height));
            draw_cell(cell, &panel)?;
            top += height;
        }
        root.present()?;
    }
    Ok(svg)
}

type Area<'a> = plotters::drawing::DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

fn draw_cell(cell: &Cell, panel: &Area<'_>) -> Result<()> {
    let unit = cell.metric.unit;
    let most = cell.series.iter().map(|series| series.summary().max).fold(f64::MIN_POSITIVE, f64::max);
    let caption = format!(
        "{} ({} is better)",
        cell.metric.title,
        match cell.metric.better {
            crate::report::Better::Lower => "less",
            crate::report::Better::Higher => "more",
        }
    );
    panel.draw(&Text::new(caption, (12, 16), ("sans-serif", 15).into_font().color(&INK)))?;
    let rows = cell.series.len() as f64;
    let bars =
        panel.clone().shrink((0, HEAD_HEIGHT - 8), (PANEL_WIDTH, BAR_HEIGHT * cell.series.len() as u32));
    // Room at the right for the value behind the longest bar.
    let mut chart = ChartBuilder::on(&bars)
        .set_label_area_size(plotters::prelude::LabelAreaPosition::Left, LABEL_WIDTH)
        .build_cartesian_2d(0.0..most * 1.25, rows..0.0)?;
    for (row, series) in cell.series.iter().enumerate() {
        let (row, summary) = (row as f64, series.summary());
        let colour = match series.side {
            Side::Ours => OURS,
            Side::Peer => THEIRS,
            Side::Reference => MARK,
        };
        chart.draw_series([Rectangle::new(
            [(0.0, row + 0.15), (summary.median, row + 0.85)],
            colour.filled(),
        )])?;
        let middle = row + 0.5;
        let whisker = vec![(summary.min, middle), (summary.max, middle)];
        chart.draw_series([PathElement::new(whisker, INK.stroke_width(1))])?;
        for end in [summary.min, summary.max] {
            let tick = vec![(end, row + 0.35), (end, row + 0.65)];
            chart.draw_series([PathElement::new(tick, INK.stroke_width(1))])?;
        }
        let value = format!("  {}", unit.show(summary.median));
        let beside = summary.max.max(summary.median);
        chart.draw_series([Text::new(
            value,
            (beside, row + 0.3),
            ("sans-serif", 13).into_font().color(&INK),
        )])?;
        let label_y = (row * f64::from(BAR_HEIGHT)) as i32 + 7;
        bars.draw(&Text::new(
            series.contender.clone(),
            (24, label_y),
            ("sans-serif", 13).into_font().color(&INK),
        ))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Metric, Unit};

    #[test]
    fn plot_shows_every_contender_with_its_median() {
        let mut report = Report::new("capture", 3, true);
        let time = Metric::lower("time of a capture", Unit::Seconds);
        for sample in [1.0, 2.0, 3.0] {
            report.record(&time, "lifeboot", Side::Ours, sample);
            report.record(&time, "qemu-img", Side::Peer, 2.0 * sample);
        }
        let svg = draw(&report).unwrap();
        for text in ["lifeboot", "qemu-img", "2.00 s", "4.00 s", "time of a capture (less is better)"] {
            assert!(svg.contains(text), "{text} is not in the plot");
        }
    }

    #[test]
    fn an_empty_report_is_still_a_plot() {
        assert!(draw(&Report::new("capture", 0, false)).unwrap().starts_with("<svg"));
    }
}
