//! What a service tells Prometheus: the text format, version 0.0.4. Pure, but for asking the disks.
//!
//! Each metric stands once, with its HELP and TYPE, followed by a sample for each disk. Names carry base units (seconds, bytes),
//! counters end in `_total` and begin again with each agent.

use std::fmt::{Display, Write as _};
use std::time::Duration;

use super::fetching::Fetching;
use super::service::{ServedDisk, Service};
use crate::source::FallbackUse;
use crate::status::{Phase, Status};

/// The upper bounds of the buckets of misses' times.
const BUCKETS: [(Duration, &str); 14] = [
    (Duration::from_micros(500), "0.0005"),
    (Duration::from_millis(1), "0.001"),
    (Duration::from_micros(2500), "0.0025"),
    (Duration::from_millis(5), "0.005"),
    (Duration::from_millis(10), "0.01"),
    (Duration::from_millis(25), "0.025"),
    (Duration::from_millis(50), "0.05"),
    (Duration::from_millis(100), "0.1"),
    (Duration::from_millis(250), "0.25"),
    (Duration::from_millis(500), "0.5"),
    (Duration::from_secs(1), "1"),
    (Duration::from_millis(2500), "2.5"),
    (Duration::from_secs(10), "10"),
    (Duration::from_secs(60), "60"),
];
/// No miss counts as longer.
const ENDLESS: Duration = Duration::from_secs(100_000);

type Value = fn(&Status) -> Option<f64>;

/// Name, type, help, and the value; where there is none, the disk has no sample.
const METRICS: &[(&str, &str, &str, Value)] = &[
    ("lifeboot_disk_size_bytes", "gauge", "The disk's size.", |s| Some(s.size as f64)),
    ("lifeboot_home_bytes", "gauge", "Bytes whose truth is on the target.", |s| Some(s.home_bytes as f64)),
    ("lifeboot_stable_bytes", "gauge", "Bytes that are home and known to be on stable storage.", |s| {
        Some(s.stable_bytes as f64)
    }),
    ("lifeboot_guest_bytes", "gauge", "Bytes that the guest has written since the session began.", |s| {
        Some(s.guest_bytes as f64)
    }),
    ("lifeboot_damaged_bytes", "gauge", "Bytes that the repository could not give.", |s| {
        Some(s.damaged_bytes as f64)
    }),
    ("lifeboot_complete", "gauge", "1 where every block is home.", |s| {
        Some(f64::from(u8::from(s.phase == Phase::Complete)))
    }),
    ("lifeboot_poisoned", "gauge", "1 where a sync of the target failed.", |s| {
        Some(f64::from(u8::from(s.phase == Phase::Poisoned)))
    }),
    ("lifeboot_waiting", "gauge", "1 where it waits for the repository, or for room on the target.", |s| {
        Some(f64::from(u8::from(s.waiting.is_some())))
    }),
    ("lifeboot_home_bytes_per_second", "gauge", "Bytes brought home a second, lately.", |s| {
        Some(s.bytes_per_second as f64)
    }),
    ("lifeboot_fetched_bytes_per_second", "gauge", "Stored bytes fetched a second, lately.", |s| {
        Some(s.fetched_bytes_per_second as f64)
    }),
    ("lifeboot_left_seconds", "gauge", "When the rest will be home at this rate.", |s| {
        s.seconds_left.map(|seconds| seconds as f64)
    }),
    ("lifeboot_fetched_bytes_total", "counter", "Stored bytes fetched from the repository.", |s| {
        Some(s.fetched_bytes as f64)
    }),
    ("lifeboot_fetched_plain_bytes_total", "counter", "What the fetched bytes decoded to.", |s| {
        Some(s.fetched_plain_bytes as f64)
    }),
    ("lifeboot_demanded_bytes_total", "counter", "Bytes written home because a guest asked for them.", |s| {
        Some(s.demanded_bytes as f64)
    }),
    ("lifeboot_background_bytes_total", "counter", "Bytes that the background brought home.", |s| {
        Some(s.background_bytes as f64)
    }),
    ("lifeboot_missed_bytes_total", "counter", "Bytes of guests' reads that were not home.", |s| {
        Some(s.missed_bytes as f64)
    }),
    (
        "lifeboot_amplification_ratio",
        "gauge",
        "Decoded bytes fetched for guests for each that they missed.",
        |s| s.amplification,
    ),
    ("lifeboot_waiting_guest_requests", "gauge", "Guests' requests that wait for the repository.", |s| {
        Some(s.misses.waiting as f64)
    }),
];

/// What is told just now.
pub(super) fn render(service: &Service) -> String {
    let statuses = service.statuses();
    let mut text = String::with_capacity(16 << 10);
    for (name, kind, help, value) in METRICS {
        head(&mut text, name, kind, help);
        for status in &statuses {
            if let Some(value) = value(status) {
                sample(&mut text, name, &labels(status), value);
            }
        }
    }
    histogram(&mut text, service.disks().iter().zip(&statuses));
    // The disks share what fetches.
    let fetching = service.disks().iter().find_map(|disk| disk.fetching.as_ref());
    let copies: Vec<FallbackUse> = fetching.into_iter().flat_map(Fetching::use_of_each_fallback).collect();
    fallbacks(&mut text, &copies);
    head(&mut text, "lifeboot_agent_connections", "gauge", "Connections to the agent.");
    sample(&mut text, "lifeboot_agent_connections", "", service.monitor.stats().connections);
    let help = "Bytes a second that the background of all disks together may take; 0 is no limit.";
    head(&mut text, "lifeboot_agent_limit_bytes_per_second", "gauge", help);
    sample(&mut text, "lifeboot_agent_limit_bytes_per_second", "", service.limit());
    text
}

type FallbackValue = fn(&FallbackUse) -> u64;

/// Name, help, and the value. All are counters, and those of an agent, not of a disk.
const FALLBACK_METRICS: [(&str, &str, FallbackValue); 3] = [
    ("lifeboot_agent_fallback_chunks_total", "Chunks that came from a copy of the repository.", |copy| {
        copy.chunks
    }),
    (
        "lifeboot_agent_fallback_bytes_total",
        "Decoded bytes that came from a copy of the repository.",
        |copy| copy.bytes,
    ),
    (
        "lifeboot_agent_fallback_errors_total",
        "How often a copy of the repository was asked for a chunk that it could not give.",
        |copy| copy.errors,
    ),
];

/// From zero on for each copy that was named; nothing where none was.
fn fallbacks(text: &mut String, copies: &[FallbackUse]) {
    if copies.is_empty() {
        return;
    }
    for (name, help, value) in FALLBACK_METRICS {
        head(text, name, "counter", help);
        for copy in copies {
            let labels = format!("repository=\"{}\"", escaped(&copy.repository.to_string_lossy()));
            sample(text, name, &labels, value(copy));
        }
    }
}

fn histogram<'a>(text: &mut String, disks: impl Iterator<Item = (&'a ServedDisk, &'a Status)>) {
    const NAME: &str = "lifeboot_miss_duration_seconds";
    head(text, NAME, "histogram", "How long guests' reads and partial writes waited for the repository.");
    let bounds: Vec<Duration> = BUCKETS.iter().map(|(bound, _)| *bound).chain([ENDLESS]).collect();
    for (disk, status) in disks {
        let (within, sum) = disk.session().misses_within(&bounds);
        let labels = labels(status);
        let names = BUCKETS.iter().map(|(_, name)| *name).chain(["+Inf"]);
        for (count, bound) in within.iter().zip(names) {
            sample(text, &format!("{NAME}_bucket"), &format!("{labels},le=\"{bound}\""), count);
        }
        sample(text, &format!("{NAME}_sum"), &labels, sum.as_secs_f64());
        sample(text, &format!("{NAME}_count"), &labels, within.last().copied().unwrap_or_default());
    }
}

fn head(text: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

fn sample(text: &mut String, name: &str, labels: &str, value: impl Display) {
    let _ = if labels.is_empty() {
        writeln!(text, "{name} {value}")
    } else {
        writeln!(text, "{name}{{{labels}}} {value}")
    };
}

fn labels(status: &Status) -> String {
    format!("disk=\"{}\",snapshot=\"{}\"", escaped(&status.disk), escaped(&status.snapshot))
}

fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_survive_whatever_a_disk_is_called() {
        assert_eq!(escaped("a\\b\"c\nd"), "a\\\\b\\\"c\\nd");
    }
}
