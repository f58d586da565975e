//! How the demo speaks: with colours and a moving line on a terminal, in plain lines anywhere else.

use std::io::{IsTerminal, Write, stdout};
use std::time::{Duration, Instant};

/// How wide the bar of a moving line is.
const BAR_CELLS: usize = 30;

/// A story in chapters, with the times that its summary lists.
#[derive(Debug)]
pub(crate) struct Story {
    moving: bool,
    colours: bool,
    chapters: u32,
    began: Instant,
    times: Vec<(String, Duration)>,
    /// True while the cursor stands in a moving line.
    in_line: bool,
}

impl Story {
    pub(crate) fn new() -> Self {
        let moving = stdout().is_terminal();
        let colours = moving && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        Self { moving, colours, chapters: 0, began: Instant::now(), times: Vec::new(), in_line: false }
    }

    pub(crate) fn title(&mut self, text: &str) {
        let text = self.paint("1", text);
        self.line(&format!("\n{text}"));
    }

    pub(crate) fn chapter(&mut self, text: &str) {
        self.chapters += 1;
        let text = self.paint("1;36", &format!("{} {text}", self.chapters));
        self.line(&format!("\n{text}"));
    }

    pub(crate) fn command(&mut self, text: &str) {
        let text = self.paint("2", &format!("$ {text}"));
        self.line(&format!("  {text}"));
    }

    pub(crate) fn tell(&mut self, text: &str) {
        self.line(&format!("  {text}"));
    }

    /// Something that was checked, and holds.
    pub(crate) fn done(&mut self, text: &str) {
        let mark = self.paint("32", "ok");
        self.line(&format!("  {mark} {text}"));
    }

    /// Tells how long something took, and keeps it for the summary.
    pub(crate) fn timed(&mut self, what: &str, took: Duration) {
        let time = self.paint("1", &seconds(took));
        self.line(&format!("  {what}: {time}"));
        self.times.push((what.to_owned(), took));
    }

    /// A line that moves while something is waited for; nothing where lines cannot move.
    pub(crate) fn progress(&mut self, what: &str, part: f64) {
        if !self.moving {
            return;
        }
        let filled = (part.clamp(0.0, 1.0) * BAR_CELLS as f64) as usize;
        let bar = format!("{}{}", "█".repeat(filled), "░".repeat(BAR_CELLS - filled));
        print!("\r\x1b[K  {what} {bar} {:3.0} % home", part * 100.0);
        self.in_line = true;
        self.flush();
    }

    pub(crate) fn failed(&mut self, error: &anyhow::Error) {
        self.end_line();
        eprintln!("{} {error:#}", self.paint("31", "error:"));
    }

    pub(crate) fn summary(&mut self) {
        let title = self.paint("1", "Summary");
        self.line(&format!("\n{title}"));
        let all = ("the whole story, building apart".to_owned(), self.began.elapsed());
        let times: Vec<_> = self.times.drain(..).chain([all]).collect();
        let width = times.iter().map(|(what, _)| what.len()).max().unwrap_or(0);
        for (what, took) in times {
            self.line(&format!("  {what:width$}  {:>8}", seconds(took)));
        }
    }

    fn line(&mut self, text: &str) {
        self.end_line();
        println!("{text}");
        self.flush();
    }

    fn end_line(&mut self) {
        if std::mem::take(&mut self.in_line) {
            print!("\r\x1b[K");
        }
    }

    fn flush(&self) {
        // A terminal that went away is noticed by the kernel's signal, not here.
        let _ = stdout().flush();
    }

    fn paint(&self, style: &str, text: &str) -> String {
        if self.colours { format!("\x1b[{style}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// Bytes, for people.
pub(crate) fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes >> 20)
}

fn seconds(took: Duration) -> String {
    format!("{:.2} s", took.as_secs_f64())
}
