//! The header of a request.
//!
//! | bytes | compact | extended |
//! |---|---|---|
//! | 0..4 | [`REQUEST_MAGIC`] | [`EXTENDED_REQUEST_MAGIC`] |
//! | 4..6 | [`CommandFlags`] | the same |
//! | 6..8 | [`CommandKind`] | the same |
//! | 8..16 | [`Cookie`] | the same |
//! | 16..24 | offset in bytes | the same |
//! | 24..28, 24..32 | length in bytes | length in bytes |
//!
//! The payload of a WRITE follows a compact header. An extended one is followed by as many bytes as its length says where
//! [`CommandFlags::PAYLOAD_LEN`] is set, whatever the kind. It must be set for a WRITE; QEMU's client (seen with 10.0) forgets it and sends
//! the bytes all the same, so a WRITE is taken to be followed by them either way: to take its bytes for requests would be far worse.

use std::ops::Deref;

use super::option::numbers;
use super::{CommandFlags, EXTENDED_REQUEST_MAGIC, Malformed, REQUEST_MAGIC, Reader, ReplyStyle};

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
    /// The number of bytes; with [`CommandFlags::PAYLOAD_LEN`] of the payload, which is the same for a WRITE.
    pub len: u64,
}

/// What should have been a request is none; nothing that the peer sends after it can be understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this is not a request")]
pub struct NotARequest;

/// A header for the wire.
#[derive(Clone, Copy, Debug)]
pub struct RequestBytes {
    bytes: [u8; RequestHeader::EXTENDED_BYTES],
    len: usize,
}

impl Deref for RequestBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl RequestHeader {
    /// A compact header's length on the wire, in bytes.
    pub const BYTES: usize = 28;
    /// An extended header's length on the wire, in bytes.
    pub const EXTENDED_BYTES: usize = 32;

    /// The header at the front of `bytes`; `None` where it is not there whole.
    ///
    /// # Errors
    /// Where something else is there.
    #[inline]
    pub fn at_front(bytes: &[u8], style: ReplyStyle) -> Result<Option<Self>, NotARequest> {
        // Each form by itself, so that the compiler knows the length and checks no bounds.
        let read = match style {
            ReplyStyle::Extended => {
                let bytes = bytes.first_chunk::<{ Self::EXTENDED_BYTES }>();
                bytes.map(|bytes| Self::read(&mut Reader::new(bytes), true))
            }
            ReplyStyle::Simple | ReplyStyle::Structured => {
                let bytes = bytes.first_chunk::<{ Self::BYTES }>();
                bytes.map(|bytes| Self::read(&mut Reader::new(bytes), false))
            }
        };
        match read {
            None => Ok(None),
            Some(Ok(Some(header))) => Ok(Some(header)),
            Some(Ok(None) | Err(_)) => Err(NotARequest),
        }
    }

    #[inline]
    fn read(reader: &mut Reader<'_>, extended: bool) -> Result<Option<Self>, Malformed> {
        let magic = if extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
        if reader.u32()? != magic {
            return Ok(None);
        }
        Ok(Some(Self {
            flags: CommandFlags::from_bits(reader.u16()?),
            kind: CommandKind::from_number(reader.u16()?),
            cookie: Cookie(reader.u64()?),
            offset: reader.u64()?,
            len: if extended { reader.u64()? } else { u64::from(reader.u32()?) },
        }))
    }

    /// The header for the wire.
    ///
    /// # Panics
    /// Where a length beyond 32 bits is to stand in a compact header: a client asks for less at a time.
    #[must_use]
    pub fn encode(&self, style: ReplyStyle) -> RequestBytes {
        let mut bytes = [0; Self::EXTENDED_BYTES];
        let magic = if style.is_extended() { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
        bytes[0..4].copy_from_slice(&magic.to_be_bytes());
        bytes[4..6].copy_from_slice(&self.flags.bits().to_be_bytes());
        bytes[6..8].copy_from_slice(&self.kind.number().to_be_bytes());
        bytes[8..16].copy_from_slice(&self.cookie.0.to_be_bytes());
        bytes[16..24].copy_from_slice(&self.offset.to_be_bytes());
        if style.is_extended() {
            bytes[24..32].copy_from_slice(&self.len.to_be_bytes());
        } else {
            let len = u32::try_from(self.len).expect("a compact header has 32 bits for the length");
            bytes[24..28].copy_from_slice(&len.to_be_bytes());
        }
        RequestBytes { bytes, len: style.request_bytes() }
    }

    /// How many bytes follow the header on the wire, whatever becomes of the request.
    #[must_use]
    pub const fn payload_len(&self, style: ReplyStyle) -> u64 {
        let follows = match style {
            _ if matches!(self.kind, CommandKind::Write) => true,
            ReplyStyle::Extended => self.flags.contains(CommandFlags::PAYLOAD_LEN),
            ReplyStyle::Simple | ReplyStyle::Structured => false,
        };
        if follows { self.len } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STYLES: [ReplyStyle; 3] = [ReplyStyle::Simple, ReplyStyle::Structured, ReplyStyle::Extended];

    fn write(len: u64) -> RequestHeader {
        RequestHeader {
            flags: CommandFlags::FUA,
            kind: CommandKind::Write,
            cookie: Cookie(0x0102_0304_0506_0708),
            offset: u64::MAX - 5,
            len,
        }
    }

    #[test]
    fn a_header_survives_the_way_there_and_back() {
        for style in STYLES {
            let len = if style.is_extended() { u64::MAX - 77 } else { u64::from(u32::MAX) };
            let bytes = write(len).encode(style);
            assert_eq!(bytes.len(), style.request_bytes());
            assert_eq!(RequestHeader::at_front(&bytes, style), Ok(Some(write(len))));
            assert_eq!(RequestHeader::at_front(&[&bytes[..], b"more"].concat(), style), Ok(Some(write(len))));
            assert_eq!(RequestHeader::at_front(&bytes[..bytes.len() - 1], style), Ok(None));
            let mut wrong = bytes.to_vec();
            wrong[0] ^= 1;
            assert_eq!(RequestHeader::at_front(&wrong, style), Err(NotARequest));
        }
    }

    #[test]
    fn a_header_of_the_other_form_is_no_request() {
        let mut compact = write(1).encode(ReplyStyle::Structured).to_vec();
        compact.extend_from_slice(&[0; 4]);
        assert_eq!(RequestHeader::at_front(&compact, ReplyStyle::Extended), Err(NotARequest));
        let extended = write(1).encode(ReplyStyle::Extended);
        assert_eq!(RequestHeader::at_front(&extended, ReplyStyle::Simple), Err(NotARequest));
    }

    #[test]
    fn what_follows_a_header_is_a_writes_bytes_or_what_the_flag_says() {
        let flag = CommandFlags::PAYLOAD_LEN;
        let read = RequestHeader { kind: CommandKind::Read, ..write(9) };
        for style in [ReplyStyle::Simple, ReplyStyle::Structured] {
            assert_eq!(write(9).payload_len(style), 9);
            assert_eq!(RequestHeader { flags: flag, ..read }.payload_len(style), 0);
        }
        assert_eq!(write(9).payload_len(ReplyStyle::Extended), 9, "as QEMU has it");
        assert_eq!(RequestHeader { flags: flag, ..write(9) }.payload_len(ReplyStyle::Extended), 9);
        assert_eq!(RequestHeader { flags: flag, ..read }.payload_len(ReplyStyle::Extended), 9);
    }
}
