//! The payload of a BLOCK_STATUS that is about some of the selected contexts only; extended headers have it.
//!
//! | bytes | content |
//! |---|---|
//! | 0..8 | the length in bytes that the request is about |
//! | 8.. | the [`ContextId`]s, 4 bytes each |

use super::{ContextId, MAX_CONTEXTS, Malformed, Reader};

/// What a BLOCK_STATUS with a payload is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContextFilter {
    /// How many bytes of the export.
    pub len: u64,
    /// Which contexts.
    pub contexts: Vec<ContextId>,
}

impl ContextFilter {
    /// The longest payload that names each context of a connection once, in bytes.
    pub const MAX_BYTES: usize = Self::bytes_for(MAX_CONTEXTS);

    /// The length of a payload that names so many contexts, in bytes.
    #[must_use]
    pub const fn bytes_for(contexts: usize) -> usize {
        size_of::<u64>() + contexts * size_of::<u32>()
    }

    /// Takes the payload apart.
    ///
    /// # Errors
    /// Where it is not a length and whole numbers.
    pub fn decode(payload: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(payload);
        let len = reader.u64()?;
        let mut contexts = Vec::with_capacity(reader.remaining() / size_of::<u32>());
        while reader.remaining() > 0 {
            contexts.push(ContextId(reader.u32()?));
        }
        Ok(Self { len, contexts })
    }

    /// The payload for the wire.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut payload = self.len.to_be_bytes().to_vec();
        payload.extend(self.contexts.iter().flat_map(|context| context.0.to_be_bytes()));
        payload
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_survives_the_way_there_and_back() {
        for contexts in [vec![], vec![ContextId(7)], vec![ContextId(1), ContextId(u32::MAX)]] {
            let filter = ContextFilter { len: u64::MAX - 3, contexts };
            let payload = filter.encode();
            assert_eq!(payload.len(), ContextFilter::bytes_for(filter.contexts.len()));
            assert_eq!(ContextFilter::decode(&payload), Ok(filter));
        }
    }

    #[test]
    fn half_a_number_is_malformed() {
        let payload = ContextFilter { len: 1, contexts: vec![ContextId(1)] }.encode();
        for len in [0, 7, 9, 10, 11] {
            assert_eq!(ContextFilter::decode(&payload[..len]), Err(Malformed::TooShort), "{len} bytes");
        }
    }
}
