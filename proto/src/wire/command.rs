//! The header of a request.
//!
//! | bytes | content |
//! |---|---|
//! | 0..4 | [`REQUEST_MAGIC`] |
//! | 4..6 | [`CommandFlags`] |
//! | 6..8 | [`CommandKind`] |
//! | 8..16 | [`Cookie`] |
//! | 16..24 | offset in bytes |
//! | 24..28 | length in bytes |
//!
//! The payload of a WRITE follows it.

use super::option::numbers;
use super::{CommandFlags, Malformed, REQUEST_MAGIC, Reader};

numbers! {
    /// What a request asks for.
    CommandKind: u16 {
        /// Send bytes.
        Read = 0,
        /// Take bytes.
        Write = 1,
        /// End the connection.
        Disconnect = 2,
        /// Put what was acknowledged on stable storage.
        Flush = 3,
        /// Forget bytes.
        Trim = 4,
        /// Fetch bytes to where they are fast.
        Cache = 5,
        /// Make bytes read as zeroes.
        WriteZeroes = 6,
        /// Tell what is known of bytes.
        BlockStatus = 7,
    }
}

/// The client's number of a request, which its replies carry. It means nothing to a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Cookie(pub u64);

/// A request's header, as it stands on the wire: nothing in it was checked but the magic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestHeader {
    /// How it is to be done.
    pub flags: CommandFlags,
    /// What is asked for.
    pub kind: CommandKind,
    /// The client's number for it.
    pub cookie: Cookie,
    /// The first byte.
    pub offset: u64,
    /// The number of bytes.
    pub len: u32,
}

impl RequestHeader {
    /// The header's length on the wire, in bytes.
    pub const BYTES: usize = 28;

    /// Takes the header apart; `None` where the magic is not that of a request, after which
    /// nothing that the peer sends can be understood.
    #[must_use]
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Option<Self> {
        Self::read(&mut Reader::new(bytes)).ok().flatten()
    }

    fn read(reader: &mut Reader<'_>) -> Result<Option<Self>, Malformed> {
        if reader.u32()? != REQUEST_MAGIC {
            return Ok(None);
        }
        Ok(Some(Self {
            flags: CommandFlags::from_bits(reader.u16()?),
            kind: CommandKind::from_number(reader.u16()?),
            cookie: Cookie(reader.u64()?),
            offset: reader.u64()?,
            len: reader.u32()?,
        }))
    }

    /// The header for the wire.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[0..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        bytes[4..6].copy_from_slice(&self.flags.bits().to_be_bytes());
        bytes[6..8].copy_from_slice(&self.kind.number().to_be_bytes());
        bytes[8..16].copy_from_slice(&self.cookie.0.to_be_bytes());
        bytes[16..24].copy_from_slice(&self.offset.to_be_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_be_bytes());
        bytes
    }

    /// How many bytes follow the header on the wire, whatever becomes of the request.
    #[must_use]
    pub const fn payload_len(&self) -> u32 {
        match self.kind {
            CommandKind::Write => self.len,
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_survives_the_way_there_and_back() {
        let header = RequestHeader {
            flags: CommandFlags::FUA,
            kind: CommandKind::Write,
            cookie: Cookie(0x0102_0304_0506_0708),
            offset: u64::MAX - 5,
            len: 77,
        };
        let bytes = header.encode();
        assert_eq!(RequestHeader::decode(&bytes), Some(header));
        assert_eq!(header.payload_len(), 77);
        let mut wrong = bytes;
        wrong[0] ^= 1;
        assert_eq!(RequestHeader::decode(&wrong), None);
    }
}
