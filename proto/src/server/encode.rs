//! The bytes of replies. What a READ sends follows its head; everything else is whole here.

use bytes::{BufMut, BytesMut};

use crate::wire::{
    ChunkKind, ContextId, Cookie, Descriptor, Errno, ReplyFlags, ReplyStyle, SIMPLE_REPLY_BYTES,
    SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_BYTES, STRUCTURED_REPLY_MAGIC,
};

const HEAD_BYTES: usize = 40;
const OFFSET_BYTES: u32 = 8;

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
        self.len += u8::try_from(bytes.len()).expect("a head has at most 40 bytes");
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

    /// The head of a READ's reply whose `len` bytes follow, all in one.
    #[must_use]
    pub fn data(self, cookie: Cookie, offset: u64, len: u32) -> Head {
        match self.style {
            ReplyStyle::Simple => simple(cookie, 0),
            ReplyStyle::Structured => self.data_chunk(cookie, offset, len, true),
        }
    }

    /// The length of what [`ReplyEncoder::data`] makes.
    #[must_use]
    pub const fn data_head_len(self) -> usize {
        match self.style {
            ReplyStyle::Simple => SIMPLE_REPLY_BYTES,
            ReplyStyle::Structured => STRUCTURED_REPLY_BYTES + OFFSET_BYTES as usize,
        }
    }

    /// The head of a chunk whose `len` bytes of data follow. Structured replies only.
    #[must_use]
    pub fn data_chunk(self, cookie: Cookie, offset: u64, len: u32, last: bool) -> Head {
        chunk(ChunkKind::OffsetData, cookie, OFFSET_BYTES + len, last).put(&offset.to_be_bytes())
    }

    /// A chunk that says that `len` bytes are zeroes. Structured replies only.
    #[must_use]
    pub fn hole_chunk(self, cookie: Cookie, offset: u64, len: u32, last: bool) -> Head {
        chunk(ChunkKind::OffsetHole, cookie, OFFSET_BYTES + 4, last)
            .put(&offset.to_be_bytes())
            .put(&len.to_be_bytes())
    }

    /// A reply that says that the request was done, and nothing else.
    #[must_use]
    pub fn done(self, cookie: Cookie) -> Head {
        match self.style {
            ReplyStyle::Simple => simple(cookie, 0),
            ReplyStyle::Structured => chunk(ChunkKind::None, cookie, 0, true),
        }
    }

    /// A reply that says that the request failed; `offset` where it is known at which byte.
    #[must_use]
    pub fn failed(self, cookie: Cookie, errno: Errno, offset: Option<u64>) -> Head {
        let code = errno.code().to_be_bytes();
        let no_message = 0_u16.to_be_bytes();
        match (self.style, offset) {
            (ReplyStyle::Simple, _) => simple(cookie, errno.code()),
            (ReplyStyle::Structured, None) => {
                chunk(ChunkKind::Error, cookie, 6, true).put(&code).put(&no_message)
            }
            (ReplyStyle::Structured, Some(offset)) => chunk(ChunkKind::ErrorOffset, cookie, 14, true)
                .put(&code)
                .put(&no_message)
                .put(&offset.to_be_bytes()),
        }
    }

    /// A BLOCK_STATUS chunk, appended to `out`. Structured replies only.
    ///
    /// # Panics
    /// Where there are so many descriptors that their length does not fit: a builder bounds them long before.
    pub fn status_chunk(
        self,
        out: &mut BytesMut,
        cookie: Cookie,
        context: ContextId,
        descriptors: &[Descriptor],
        last: bool,
    ) {
        let len = 4 + descriptors.len() * Descriptor::BYTES;
        let len = u32::try_from(len).expect("descriptors are bounded");
        out.put_slice(&chunk(ChunkKind::BlockStatus, cookie, len, last));
        out.put_u32(context.0);
        for descriptor in descriptors {
            out.put_u32(descriptor.len);
            out.put_u32(descriptor.flags);
        }
    }
}

fn simple(cookie: Cookie, error: u32) -> Head {
    Head::empty()
        .put(&SIMPLE_REPLY_MAGIC.to_be_bytes())
        .put(&error.to_be_bytes())
        .put(&cookie.0.to_be_bytes())
}

fn chunk(kind: ChunkKind, cookie: Cookie, len: u32, last: bool) -> Head {
    let flags = ReplyFlags::NONE.with_if(last, ReplyFlags::DONE);
    Head::empty()
        .put(&STRUCTURED_REPLY_MAGIC.to_be_bytes())
        .put(&flags.bits().to_be_bytes())
        .put(&kind.number().to_be_bytes())
        .put(&cookie.0.to_be_bytes())
        .put(&len.to_be_bytes())
}
