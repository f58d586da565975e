//! What both halves of the protocol share. Nothing here knows which side it is on.

mod command;
mod context;
mod errno;
mod export;
mod filter;
mod flags;
mod limits;
mod magic;
mod option;
mod reader;
mod reply;
mod text;

pub use command::{CommandKind, Cookie, NotARequest, RequestBytes, RequestHeader};
pub use context::{ContextId, ContextQuery, Descriptor, MetaContext, SelectedContext};
pub use errno::Errno;
pub use export::{BlockSizes, ExportInfo};
pub use filter::ContextFilter;
pub use flags::{ClientFlags, CommandFlags, HandshakeFlags, ReplyFlags, TransmissionFlags};
pub use limits::{
    MAX_CONTEXTS, MAX_MESSAGE_BYTES, MAX_NAME_BYTES, MAX_OPTION_BYTES, MAX_OPTIONS, MAX_PAYLOAD_BYTES,
    MAX_QUERIES, MAX_STATUS_DESCRIPTORS, MAX_STATUS_EXTENT_BYTES, MAX_TEXT_CHARS, MOST_OPTIONS,
    OPTIONS_PER_EXPORT, max_options,
};
pub use magic::{
    CLIENT_OPTION_MAGIC, EXTENDED_REPLY_MAGIC, EXTENDED_REQUEST_MAGIC, NBD_MAGIC, OPTION_REPLY_MAGIC,
    REQUEST_MAGIC, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC,
};
pub use option::{InfoKind, OptionKind, OptionReplyKind};
pub use reader::{Malformed, Reader};
pub use reply::{ChunkKind, EXTENDED_REPLY_BYTES, ReplyStyle, SIMPLE_REPLY_BYTES, STRUCTURED_REPLY_BYTES};
pub use text::{Cut, message};
