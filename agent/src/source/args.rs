//! The options of every verb that fetches from a repository while somebody waits.

use std::time::Duration;

use nbd_server::args::parse_time;

use super::{PoolOptions, SourcePace};
use crate::cli::{Rate, Size};

/// How the repository is read.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Source options")]
pub struct SourceArgs {
    /// Keep so many bytes of decoded chunks in memory: until they are home, or for further reads
    #[arg(long, value_name = "SIZE", default_value = "64MiB")]
    cache_memory: Size,

    #[command(flatten)]
    pace: PaceArgs,
}

/// How many fetches there are at once, and how slow the source is made.
#[derive(Clone, Debug, clap::Args)]
pub struct PaceArgs {
    /// Make the source no faster than this, for rehearsals and benchmarks; 0 is no limit
    #[arg(long, value_name = "RATE", default_value = "0")]
    source_rate: Rate,

    /// Make each fetch wait so long (others in flight meanwhile), for rehearsals and benchmarks
    #[arg(long, value_name = "TIME", default_value = "0s", value_parser = parse_time)]
    source_delay: Duration,

    /// Fetches in flight at most. While a disk is served that is 64 if not chosen otherwise, a quarter of them kept
    /// for guests; for `restore` one a core, or 16 of a source that was made slow
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u16).range(1..=1024))]
    source_slots: Option<u16>,
}

const SLOTS: u16 = 64;
const SLOTS_OF_A_SLOW_RESTORE: u16 = 16;

impl PaceArgs {
    /// How slow the source is made.
    #[must_use]
    pub fn pace(&self) -> SourcePace {
        SourcePace {
            bytes_per_second: self.source_rate.limit().map_or(0, std::num::NonZeroU64::get),
            delay: self.source_delay,
        }
    }

    /// Fetches in flight of a restore, where there is reason for another number than that of the cores.
    #[must_use]
    pub fn restore_slots(&self) -> Option<usize> {
        let of_slow = (self.pace() != SourcePace::default()).then_some(SLOTS_OF_A_SLOW_RESTORE);
        self.source_slots.or(of_slow).map(usize::from)
    }
}

impl SourceArgs {
    /// Bytes of decoded chunks that are kept.
    #[must_use]
    pub const fn cache_bytes(&self) -> u64 {
        self.cache_memory.0
    }

    /// How a pool works with these options.
    #[must_use]
    pub fn pool_options(&self) -> PoolOptions {
        let slots = usize::from(self.pace.source_slots.unwrap_or(SLOTS));
        PoolOptions {
            slots,
            reserved_for_demand: slots / 4,
            cache_bytes: self.cache_memory.0,
            pace: self.pace.pace(),
            ..PoolOptions::default()
        }
    }
}
