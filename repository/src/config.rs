//! The repository's configuration: what was chosen when it was made.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::frame::{self, Document};
use crate::id::fill_random;
use crate::map::geometry::check_chunk_size;

/// The file that makes a directory a repository.
pub(crate) const PATH: &str = "lifeboot.config";
/// Bytes of a chunk where nobody asks for another size; docs/format.md has the measurements behind it.
pub const DEFAULT_CHUNK_SIZE: u32 = 128 << 10;
const REPOSITORY_ID_LEN: usize = 16;

/// How a repository is made.
#[derive(Clone, Copy, Debug)]
pub struct InitOptions {
    /// Bytes of a chunk for disks that do not ask for another size.
    pub chunk_size: u32,
}

impl Default for InitOptions {
    fn default() -> Self {
        Self { chunk_size: DEFAULT_CHUNK_SIZE }
    }
}

/// What was chosen when the repository was made.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    features: Vec<String>,
    /// Which repository this is: 32 random hexadecimal digits.
    pub id: String,
    /// Bytes of a chunk for disks that do not ask for another size.
    pub chunk_size: u32,
    /// When it was made.
    pub created: Timestamp,
}

impl Config {
    pub(crate) fn new(options: InitOptions) -> Result<Self> {
        check_chunk_size(options.chunk_size)?;
        let mut id = [0; REPOSITORY_ID_LEN];
        fill_random(&mut id)?;
        let id = id.iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Self { features: Vec::new(), id, chunk_size: options.chunk_size, created: Timestamp::now() })
    }

    pub(crate) fn encode(&self) -> Result<Vec<u8>> {
        frame::encode(Document::Config, self)
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self> {
        let config: Self = frame::decode(Document::Config, bytes)?;
        let hexadecimal = config.id.bytes().all(|b| b.is_ascii_hexdigit() && !b.is_ascii_uppercase());
        if config.id.len() != 2 * REPOSITORY_ID_LEN || !hexadecimal {
            return Err(Error::damaged("the configuration has an id that cannot be"));
        }
        check_chunk_size(config.chunk_size)
            .map_err(|error| Error::damaged("the configuration cannot be").because(error))?;
        Ok(config)
    }
}
