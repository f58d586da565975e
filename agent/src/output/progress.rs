//! Progress of long work: a bar on a terminal, JSON lines with `--json`, nothing otherwise.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};
use parking_lot::Mutex;
use serde::Serialize;

use super::{Output, human_duration, human_size, tenths_of_percent};

/// How often a JSON line is written.
const LINE_INTERVAL: Duration = Duration::from_secs(1);
const REDRAWS_PER_SECOND: u8 = 10;

/// How far some work over bytes is. Clones count together, from any thread; the bar goes away with the last.
#[derive(Clone, Debug)]
pub struct Progress {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    output: Output,
    what: String,
    started: Instant,
    done: AtomicU64,
    /// What was done when it began.
    before: AtomicU64,
    total: AtomicU64,
    /// It is expected to be done some time.
    has_end: bool,
    shown_as: ShownAs,
}

#[derive(Debug)]
enum ShownAs {
    Bar(ProgressBar),
    Lines { last: Mutex<Instant> },
    Nothing,
}

#[derive(Serialize)]
struct Line<'a> {
    event: &'static str,
    what: &'a str,
    bytes_done: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes_total: Option<u64>,
    bytes_per_second: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    seconds_left: Option<u64>,
}

impl Progress {
    pub(super) fn start(output: &Output, what: String, total: Option<u64>, has_end: bool) -> Self {
        let started = Instant::now();
        let shown_as = match (output.quiet, output.json, output.stderr_terminal) {
            (true, ..) | (false, false, false) => ShownAs::Nothing,
            (false, true, _) => ShownAs::Lines { last: Mutex::new(started) },
            (false, false, true) => ShownAs::Bar(bar(output, &what, total, has_end)),
        };
        let total = AtomicU64::new(total.unwrap_or(0));
        let (output, done, before) = (output.clone(), AtomicU64::new(0), AtomicU64::new(0));
        let shared = Shared { output, what, started, done, before, total, has_end, shown_as };
        Self { shared: Arc::new(shared) }
    }

    /// Now that it is known: the work is over `total` bytes.
    pub fn set_total(&self, total: u64) {
        if self.shared.total.swap(total, Ordering::Relaxed) == total {
            return;
        }
        if let ShownAs::Bar(bar) = &self.shared.shown_as {
            bar.set_length(total);
            bar.set_style(style(
                Some(total),
                self.shared.has_end,
                self.shared.before.load(Ordering::Relaxed),
            ));
        }
    }

    /// So many bytes were done before it began: they count as done, and not for the rate.
    pub fn begin_at(&self, bytes: u64) {
        self.shared.before.store(bytes, Ordering::Relaxed);
        self.shared.done.store(bytes, Ordering::Relaxed);
        if let ShownAs::Bar(bar) = &self.shared.shown_as {
            let total = self.shared.total.load(Ordering::Relaxed);
            bar.set_style(style((total > 0).then_some(total), self.shared.has_end, bytes));
            bar.set_position(bytes);
        }
    }

    /// `bytes` more are done.
    pub fn advance(&self, bytes: u64) {
        let done = self.shared.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.show(done);
    }

    /// So many bytes are done in all.
    pub fn set(&self, bytes: u64) {
        self.shared.done.store(bytes, Ordering::Relaxed);
        self.show(bytes);
    }

    /// How many bytes are done.
    #[must_use]
    pub fn done(&self) -> u64 {
        self.shared.done.load(Ordering::Relaxed)
    }

    fn show(&self, done: u64) {
        match &self.shared.shown_as {
            ShownAs::Nothing => {}
            ShownAs::Bar(bar) => bar.set_position(done),
            ShownAs::Lines { last } => {
                // Whoever finds it taken leaves the line to the other.
                let Some(mut last) = last.try_lock() else { return };
                let now = Instant::now();
                if now.duration_since(*last) < LINE_INTERVAL {
                    return;
                }
                *last = now;
                self.shared.line(now);
            }
        }
    }
}

impl Shared {
    fn line(&self, now: Instant) {
        let bytes_done = self.done.load(Ordering::Relaxed);
        let total = self.total.load(Ordering::Relaxed);
        let elapsed = now.duration_since(self.started).as_secs_f64();
        let since = bytes_done.saturating_sub(self.before.load(Ordering::Relaxed));
        let rate = if elapsed > 0.0 { since as f64 / elapsed } else { 0.0 };
        let left = total.saturating_sub(bytes_done);
        self.output.stderr_json(&Line {
            event: "progress",
            what: &self.what,
            bytes_done,
            bytes_total: (total > 0).then_some(total),
            bytes_per_second: rate as u64,
            seconds_left: (self.has_end && total > 0 && rate > 0.0)
                .then_some((left as f64 / rate).ceil() as u64),
        });
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        match &self.shown_as {
            ShownAs::Bar(bar) => bar.finish_and_clear(),
            ShownAs::Lines { .. } => self.line(Instant::now()),
            ShownAs::Nothing => {}
        }
    }
}

fn bar(output: &Output, what: &str, total: Option<u64>, has_end: bool) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(total, ProgressDrawTarget::stderr_with_hz(REDRAWS_PER_SECOND));
    bar.set_style(style(total, has_end, 0));
    bar.set_message(what.to_owned());
    let bar = output.bars.add(bar);
    bar.enable_steady_tick(Duration::from_millis(500));
    bar
}

/// Bytes a second. Indicatif's own rate is that of the last seconds, but takes what was done `before` for work.
fn rate(state: &ProgressState, before: u64) -> f64 {
    match before {
        0 => state.per_sec(),
        _ => state.pos().saturating_sub(before) as f64 / state.elapsed().as_secs_f64().max(0.001),
    }
}

/// `before`: how much was done when it began.
fn style(total: Option<u64>, has_end: bool, before: u64) -> ProgressStyle {
    let template = match (total, has_end) {
        (Some(_), true) => "{msg} [{bar:30}] {share:>3}% {size} at {rate}, {left} left",
        (Some(_), false) => "{msg} [{bar:30}] {share:>3}% {size} at {rate}",
        (None, _) => "{msg} {spinner} {size} at {rate}",
    };
    ProgressStyle::with_template(template)
        .expect("the templates are constants, and a test draws them")
        .progress_chars("=> ")
        .with_key("size", |state: &ProgressState, w: &mut dyn fmt::Write| {
            let _ = match state.len() {
                Some(total) => write!(w, "{} of {}", human_size(state.pos()), human_size(total)),
                None => write!(w, "{}", human_size(state.pos())),
            };
        })
        .with_key("share", |state: &ProgressState, w: &mut dyn fmt::Write| {
            // Indicatif rounds to the nearest: what is not done would be 100.
            let _ = write!(w, "{}", tenths_of_percent(state.pos(), state.len().unwrap_or(0)) / 10);
        })
        .with_key("rate", move |state: &ProgressState, w: &mut dyn fmt::Write| {
            let _ = write!(w, "{}/s", human_size(rate(state, before) as u64));
        })
        .with_key("left", move |state: &ProgressState, w: &mut dyn fmt::Write| {
            let left = state.len().unwrap_or(0).saturating_sub(state.pos());
            let _ = match rate(state, before) {
                // Nothing was done lately, so nothing is known.
                rate if rate < 1.0 => write!(w, "unknown"),
                rate => write!(w, "{}", human_duration(Duration::from_secs_f64(left as f64 / rate))),
            };
        })
}

#[cfg(test)]
mod tests {
    use std::io;

    use indicatif::TermLike;

    use super::*;

    /// A terminal that shows one line.
    #[derive(Clone, Debug, Default)]
    struct Screen(Arc<Mutex<String>>);

    impl TermLike for Screen {
        fn width(&self) -> u16 {
            200
        }

        fn move_cursor_up(&self, _: usize) -> io::Result<()> {
            Ok(())
        }

        fn move_cursor_down(&self, _: usize) -> io::Result<()> {
            Ok(())
        }

        fn move_cursor_right(&self, _: usize) -> io::Result<()> {
            Ok(())
        }

        fn move_cursor_left(&self, _: usize) -> io::Result<()> {
            Ok(())
        }

        fn write_line(&self, text: &str) -> io::Result<()> {
            self.write_str(text)
        }

        fn write_str(&self, text: &str) -> io::Result<()> {
            self.0.lock().push_str(text);
            Ok(())
        }

        fn clear_line(&self) -> io::Result<()> {
            self.0.lock().clear();
            Ok(())
        }

        fn flush(&self) -> io::Result<()> {
            Ok(())
        }
    }

    /// What a bar looks like with so much done.
    fn drawn(total: Option<u64>, has_end: bool, done: u64) -> String {
        drawn_after(total, has_end, 0, done)
    }

    fn drawn_after(total: Option<u64>, has_end: bool, before: u64, done: u64) -> String {
        let screen = Screen::default();
        let bar =
            ProgressBar::with_draw_target(total, ProgressDrawTarget::term_like(Box::new(screen.clone())));
        bar.set_style(style(total, has_end, before));
        // As on a terminal: it is drawn now and then, whatever is done.
        bar.enable_steady_tick(Duration::from_millis(500));
        bar.set_position(done);
        bar.force_draw();
        screen.0.lock().clone()
    }

    #[test]
    fn what_was_done_before_counts_as_done_and_not_for_the_rate() {
        let text = drawn_after(Some(4 << 30), true, 3 << 30, 3 << 30);
        assert!(text.contains("75% 3.0 GiB of 4.0 GiB at 0 B/s, unknown left"), "{text}");
        let progress = Output::new(false, true).progress("testing", Some(100));
        progress.begin_at(60);
        progress.advance(10);
        assert_eq!(progress.done(), 70);
    }

    #[test]
    fn what_has_no_end_is_drawn_without_a_time_left() {
        assert!(drawn(Some(400), true, 100).contains("100 B of 400 B at"));
        assert!(drawn(Some(400), true, 100).contains("left"));
        assert!(drawn(Some(400), false, 100).contains("100 B of 400 B at"));
        assert!(!drawn(Some(400), false, 100).contains("left"));
        assert!(!drawn(None, true, 100).contains("left"));
    }

    #[test]
    fn what_is_not_all_done_is_not_drawn_as_that() {
        assert!(drawn(Some(1 << 40), true, (1 << 40) - 1).contains("]  99% "));
        assert!(drawn(Some(1 << 40), true, 1 << 40).contains("] 100% "));
        assert!(drawn(Some(1000), false, 9).contains("]   0% "));
    }

    #[test]
    fn clones_count_together() {
        let progress = Output::new(false, true).progress("testing", Some(100));
        progress.advance(10);
        let clone = progress.clone();
        clone.advance(20);
        assert_eq!(progress.done(), 30);
    }
}
