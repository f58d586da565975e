//! The data of the options, taken apart. Each must be used up to its last byte.

use crate::wire::{InfoKind, MAX_QUERIES, Malformed, Reader};

/// The data of INFO and GO: length (4) and name, count (2), and a kind (2) each.
pub(super) struct InfoRequest<'a> {
    pub(super) name: &'a str,
    kinds: &'a [u8],
}

impl<'a> InfoRequest<'a> {
    pub(super) fn parse(data: &'a [u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(data);
        let name = reader.text32()?;
        let count = usize::from(reader.u16()?);
        let kinds = reader.bytes(count * 2)?;
        reader.finish()?;
        Ok(Self { name, kinds })
    }

    pub(super) fn wants(&self, kind: InfoKind) -> bool {
        self.kinds.chunks_exact(2).any(|pair| pair == kind.number().to_be_bytes())
    }
}

/// The data of LIST_META_CONTEXT and SET_META_CONTEXT: length (4) and name, count (4), and length (4) and query each.
pub(super) struct ContextRequest<'a> {
    pub(super) name: &'a str,
    pub(super) queries: Vec<&'a str>,
}

/// Why queries were not taken.
pub(super) enum BadQueries {
    Malformed,
    TooMany,
}

impl From<Malformed> for BadQueries {
    fn from(_: Malformed) -> Self {
        Self::Malformed
    }
}

impl<'a> ContextRequest<'a> {
    pub(super) fn parse(data: &'a [u8]) -> Result<Self, BadQueries> {
        let mut reader = Reader::new(data);
        let name = reader.text32()?;
        let count = reader.u32()?;
        if count > MAX_QUERIES {
            return Err(BadQueries::TooMany);
        }
        let mut queries = Vec::new();
        for _ in 0..count {
            queries.push(reader.text32()?);
        }
        reader.finish()?;
        Ok(Self { name, queries })
    }
}
