//! The bytes of replies. What a READ sends follows its head; everything else is whole here.

use bytes::{BufMut, BytesMut};

use crate::wire::{
    ChunkKind, ContextId, Descriptor, EXTENDED_REPLY_BYTES, EXTENDED_REPLY_MAGIC, Errno, ReplyFlags,
    ReplyStyle, RequestHeader, SIMPLE_REPLY_BYTES, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_BYTES,
    STRUCTURED_REPLY_MAGIC, message,
};

const HEAD_BYTES: usize = 48;
const OFFSET_BYTES: usize = 8;
/// An error's number and the length of its message.
const ERROR_BYTES: usize = 6;

/// What stands before the bytes of a READ: a short run of bytes, without a heap.
#[derive(Clone, Copy, Debug)]
pub struct Head {
    bytes: [u8; HEAD_BYTES],
    len: u8,
}

impl Head {
    /// No bytes at all.
    #[must_use]
    pub const fn empty() -> Self {
        Self { bytes: [0; HEAD_BYTES], len: 0 }
    }

    fn put(mut self, bytes: &[u8]) -> Self {
        let start = usize::from(self.len);
        self.bytes[start..start + bytes.len()].copy_from_slice(bytes);
        self.len += u8::try_from(bytes.len()).expect("a head has at most 48 bytes");
        self
    }
}

impl std::ops::Deref for Head {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}

/// Makes replies of the kind that was agreed on.
#[derive(Clone, Copy, Debug)]
pub struct ReplyEncoder {
    style: ReplyStyle,
}

impl ReplyEncoder {
    /// An encoder of replies of `style`.
    #[must_use]
    pub const fn new(style: ReplyStyle) -> Self {
        Self { style }
    }

    /// Which kind it makes.
    #[must_use]
    pub const fn style(self) -> ReplyStyle {
        self.style
    }

    /// The head of a READ's reply whose bytes follow, all in one.
    #[must_use]
    pub fn data(self, request: &RequestHeader) -> Head {
        match self.style {
            ReplyStyle::Simple => simple(request, 0),
            _ => self.data_chunk(request, request.offset, request.len, true),
        }
    }

    /// The length of what [`ReplyEncoder::data`] makes.
    #[must_use]
    pub const fn data_head_len(self) -> usize {
        match self.style {
            ReplyStyle::Simple => SIMPLE_REPLY_BYTES,
            ReplyStyle::Structured => STRUCTURED_REPLY_BYTES + OFFSET_BYTES,
            ReplyStyle::Extended => EXTENDED_REPLY_BYTES + OFFSET_BYTES,
        }
    }

    /// The head of a chunk whose `len` bytes of data follow, from `offset` on. Not for simple replies.
    #[must_use]
    pub fn data_chunk(self, request: &RequestHeader, offset: u64, len: u64, last: bool) -> Head {
        let len = OFFSET_BYTES as u64 + len;
        self.chunk(ChunkKind::OffsetData, request, len, last).put(&offset.to_be_bytes())
    }

    /// A chunk that says that `len` bytes from `offset` on are zeroes. Not for simple replies.
    ///
    /// # Panics
    /// Where 32 bits do not hold the length: a READ is bounded long before.
    #[must_use]
    pub fn hole_chunk(self, request: &RequestHeader, offset: u64, len: u64, last: bool) -> Head {
        let len = u32::try_from(len).expect("a READ is bounded");
        self.chunk(ChunkKind::OffsetHole, request, OFFSET_BYTES as u64 + 4, last)
            .put(&offset.to_be_bytes())
            .put(&len.to_be_bytes())
    }

    /// A reply that says that the request was done, and nothing else.
    #[must_use]
    pub fn done(self, request: &RequestHeader) -> Head {
        match self.style {
            ReplyStyle::Simple => simple(request, 0),
            _ => self.chunk(ChunkKind::None, request, 0, true),
        }
    }

    /// A reply that says that the request failed, and nothing else.
    #[must_use]
    pub fn refused(self, request: &RequestHeader, errno: Errno) -> Head {
        match self.style {
            ReplyStyle::Simple => simple(request, errno.code()),
            _ => self.error(ChunkKind::Error, request, errno, 0),
        }
    }

    /// A reply that says that the request failed: `offset` where it is known at which byte, and `why` in words for people, cut to
    /// what a message holds. A simple reply has room for neither.
    #[must_use]
    pub fn failed(self, request: &RequestHeader, errno: Errno, offset: Option<u64>, why: &str) -> Vec<u8> {
        if self.style == ReplyStyle::Simple {
            return simple(request, errno.code()).to_vec();
        }
        let message = message(why);
        let kind = if offset.is_some() { ChunkKind::ErrorOffset } else { ChunkKind::Error };
        let after = offset.map_or(0, |_| OFFSET_BYTES);
        let mut reply = self.error(kind, request, errno, message.len() + after).to_vec();
        let message_len = u16::try_from(message.len()).expect("a message is bounded");
        let at = reply.len() - size_of::<u16>();
        reply[at..].copy_from_slice(&message_len.to_be_bytes());
        reply.extend_from_slice(message.as_bytes());
        reply.extend(offset.into_iter().flat_map(u64::to_be_bytes));
        reply
    }

    /// A BLOCK_STATUS chunk, appended to `out`. Not for simple replies.
    ///
    /// # Panics
    /// Where there are more descriptors than 32 bits count, or, without extended headers, one that 32 bits do not hold: a builder
    /// bounds them long before, and no context of ours has longer flags.
    pub fn status_chunk(
        self,
        out: &mut BytesMut,
        request: &RequestHeader,
        context: ContextId,
        descriptors: &[Descriptor],
        last: bool,
    ) {
        if self.style.is_extended() {
            let len = 8 + descriptors.len() * Descriptor::EXTENDED_BYTES;
            out.put_slice(&self.chunk(ChunkKind::BlockStatusExt, request, len as u64, last));
            out.put_u32(context.0);
            out.put_u32(u32::try_from(descriptors.len()).expect("descriptors are bounded"));
            for descriptor in descriptors {
                out.put_u64(descriptor.len);
                out.put_u64(descriptor.flags);
            }
            return;
        }
        let len = 4 + descriptors.len() * Descriptor::BYTES;
        out.put_slice(&self.chunk(ChunkKind::BlockStatus, request, len as u64, last));
        out.put_u32(context.0);
        for descriptor in descriptors {
            out.put_u32(u32::try_from(descriptor.len).expect("a builder cuts extents"));
            out.put_u32(u32::try_from(descriptor.flags).expect("our contexts have 32 bits"));
        }
    }

    /// An error's chunk up to its message, whose length is left to be zero.
    fn error(self, kind: ChunkKind, request: &RequestHeader, errno: Errno, rest: usize) -> Head {
        self.chunk(kind, request, (ERROR_BYTES + rest) as u64, true)
            .put(&errno.code().to_be_bytes())
            .put(&0_u16.to_be_bytes())
    }

    fn chunk(self, kind: ChunkKind, request: &RequestHeader, len: u64, last: bool) -> Head {
        let flags = ReplyFlags::NONE.with_if(last, ReplyFlags::DONE);
        let magic = if self.style.is_extended() { EXTENDED_REPLY_MAGIC } else { STRUCTURED_REPLY_MAGIC };
        let head = Head::empty()
            .put(&magic.to_be_bytes())
            .put(&flags.bits().to_be_bytes())
            .put(&kind.number().to_be_bytes())
            .put(&request.cookie.0.to_be_bytes());
        if self.style.is_extended() {
            return head.put(&request.offset.to_be_bytes()).put(&len.to_be_bytes());
        }
        head.put(&u32::try_from(len).expect("what a chunk carries is bounded").to_be_bytes())
    }
}

fn simple(request: &RequestHeader, error: u32) -> Head {
    Head::empty()
        .put(&SIMPLE_REPLY_MAGIC.to_be_bytes())
        .put(&error.to_be_bytes())
        .put(&request.cookie.0.to_be_bytes())
}
