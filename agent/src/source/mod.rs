//! Where absent chunks come from: fetches them from a repository, in order of urgency, each once.
//!
//! ```text
//!   shards ──join──▶ queue ──▶ fetching threads ──▶ decode pool ──▶ whoever waits
//!                  (pure)      wait for the source   (a thread a core: decode, verify)
//! ```
//! Fetching threads hold a slot each while the source answers; some slots are kept for guests, and
//! the background has no more bytes in flight than its window allows. Decoding is bounded by the
//! cores and takes the urgent first.

mod args;
mod chunk_store;
mod climb;
mod decode;
mod disk;
mod fallback;
mod fetch;
mod fetched;
mod nothing;
mod piece;
mod pool;
mod queue;
mod repository_decoder;
mod repository_store;
mod survey;
#[cfg(test)]
mod tests;
mod throttle;
mod troubles;
mod window;
mod withdraw;

pub use args::{PaceArgs, SourceArgs};
pub use chunk_store::{ChunkStore, Decode, Key, Placed, Undecoded};
pub use disk::{DiskSource, ZeroChunks};
pub use fallback::{FallbackUse, Fallbacks};
pub use fetched::FetchStats;
pub use nothing::NoSource;
pub use pool::{FetchPool, PoolOptions};
pub use repository_store::RepositoryStore;
pub use survey::{pack_order, zero_chunks};
pub use throttle::{SourcePace, Throttle};
