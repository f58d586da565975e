//! What an agent did for a disk, said once at its end.

use std::time::Duration;

use serde::Serialize;

use super::{Misses, Status};
use crate::output::{human_count, human_duration, human_size};
use crate::source::FallbackUse;

/// The member `report` of the last events of `live-restore --json`. Everything but `restarts` is since this agent began.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// How long it served.
    pub seconds: f64,
    /// How often its session was started before.
    pub restarts: u64,
    /// Stored bytes fetched from the repository.
    pub fetched_bytes: u64,
    /// Bytes written home because a guest asked for them or for their neighbours.
    pub demanded_bytes: u64,
    /// Bytes that the background brought home.
    pub background_bytes: u64,
    /// Guests' misses.
    pub misses: Misses,
    /// Decoded bytes fetched for guests, for each byte that they missed.
    pub amplification: Option<f64>,
    /// Bytes that the guest has written since the session began.
    pub guest_bytes: u64,
    /// Bytes that are not home because the repository could not give them.
    pub damaged_bytes: u64,
    /// What copies of the repository gave in its place.
    pub fallbacks: Vec<FallbackUse>,
    /// What to do next.
    pub next: String,
}

impl Report {
    /// Of the disk with this status, served for so long.
    #[must_use]
    pub fn new(status: &Status, served: Duration, restarts: u64) -> Self {
        Self {
            seconds: served.as_secs_f64(),
            restarts,
            fetched_bytes: status.fetched_bytes,
            demanded_bytes: status.demanded_bytes,
            background_bytes: status.background_bytes,
            misses: status.misses,
            amplification: status.amplification,
            guest_bytes: status.guest_bytes,
            damaged_bytes: status.damaged_bytes,
            fallbacks: status.fallbacks.clone(),
            next: next(status),
        }
    }

    /// For people.
    #[must_use]
    pub fn lines(&self, status: &Status) -> Vec<String> {
        let restarts = match self.restarts {
            0 => String::new(),
            more => format!(", after {}", human_count(more, "earlier start", "earlier starts")),
        };
        let mut lines = vec![
            format!(
                "{}/{} was served for {}{restarts}",
                status.snapshot,
                status.disk,
                human_duration(Duration::from_secs_f64(self.seconds))
            ),
            format!(
                "  fetched {}; brought home {} for the guest, {} behind it; the guest wrote {}",
                human_size(self.fetched_bytes),
                human_size(self.demanded_bytes),
                human_size(self.background_bytes),
                human_size(self.guest_bytes)
            ),
        ];
        if self.misses.count > 0 {
            let ms = |us: u64| us as f64 / 1000.0;
            let amplification = self
                .amplification
                // Nothing, where others fetched what it waited for.
                .filter(|amplification| *amplification >= 0.05)
                .map(|amplification| format!("; {amplification:.1} bytes fetched for each that it missed"));
            lines.push(format!(
                "  the guest waited {}: p50 {:.1} ms, p99 {:.1} ms, at most {:.1} ms{}",
                human_count(self.misses.count, "time", "times"),
                ms(self.misses.p50_us),
                ms(self.misses.p99_us),
                ms(self.misses.max_us),
                amplification.unwrap_or_default()
            ));
        }
        if self.damaged_bytes > 0 {
            lines.push(format!("  damaged: {}, named below", human_size(self.damaged_bytes)));
        }
        for used in &self.fallbacks {
            lines.push(format!(
                "  {}, {}, came from the copy {}: `lifeboot verify` tells what the repository lacks",
                human_count(used.chunks, "chunk", "chunks"),
                human_size(used.bytes),
                used.repository.display()
            ));
        }
        lines.push(format!("  next: {}", self.next));
        lines
    }
}

fn next(status: &Status) -> String {
    let target = status.target.display();
    if status.moved {
        format!("the machine runs from {target}: start it from there from now on")
    } else if status.handed_over {
        format!(
            "the machine was moved onto {target}, or was about to be: the same live-restore command with --qmp asks its QEMU, and goes on"
        )
    } else if let Some(loss) = &status.loss {
        loss.clone()
    } else if status.home_bytes >= status.size {
        format!("{target} holds the whole disk: the machine can be started from it, without lifeboot")
    } else if status.is_settled() {
        "the same live-restore command asks for what is damaged again".to_owned()
    } else {
        "the same live-restore command goes on; until then the machine cannot be started from the target"
            .to_owned()
    }
}
