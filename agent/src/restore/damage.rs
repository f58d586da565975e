//! What could not be brought back, and what a restore does about it.

use block::ByteRange;
use parking_lot::Mutex;
use serde::Serialize;

/// A stretch of the disk that could not be brought back.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(super) struct Damage {
    pub(super) offset: u64,
    pub(super) len: u64,
    /// The chunk, unless even that is not known because the disk's map is damaged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) chunk: Option<String>,
    pub(super) reason: String,
}

/// More would say nothing more, and could fill the memory.
const MAX_LISTED: usize = 100_000;

/// What to do with damage: stop at the first, or note all of it and go on.
#[derive(Debug)]
pub(super) struct DamageLog {
    keep_going: bool,
    found: Mutex<Found>,
}

#[derive(Debug, Default)]
struct Found {
    listed: Vec<Damage>,
    bytes: u64,
}

impl DamageLog {
    pub(super) fn new(keep_going: bool) -> Self {
        Self { keep_going, found: Mutex::default() }
    }

    /// Notes damage if the restore is to go on, and fails if it is not.
    ///
    /// # Errors
    /// `error`, with where on the disk it is, unless it is to be passed over.
    pub(super) fn note(
        &self,
        range: ByteRange,
        chunk: Option<String>,
        error: repository::Error,
    ) -> anyhow::Result<()> {
        use repository::ErrorKind;
        // A full memory or a refusal is no damage, and would be the same for all that follows.
        let damage = matches!(
            error.kind(),
            ErrorKind::Damaged
                | ErrorKind::NotFound
                | ErrorKind::UnknownCodec
                | ErrorKind::UnknownKey
                | ErrorKind::Io
        );
        if !self.keep_going || !damage {
            return Err(anyhow::Error::from(error).context(format!("{range} of the disk cannot be restored")));
        }
        let mut found = self.found.lock();
        found.bytes += range.len();
        if found.listed.len() < MAX_LISTED {
            found.listed.push(Damage {
                offset: range.start(),
                len: range.len(),
                chunk,
                reason: error.to_string(),
            });
        }
        Ok(())
    }

    /// All that was noted, in the order of the disk, and how many bytes it is.
    pub(super) fn conclude(self) -> (Vec<Damage>, u64) {
        let Found { mut listed, bytes } = self.found.into_inner();
        listed.sort_unstable();
        (listed, bytes)
    }
}
