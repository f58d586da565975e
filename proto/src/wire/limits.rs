//! How much of anything a peer may make us take in, keep or send. Each exists because its absence
//! was a published bug of another server or client.

/// The longest data of an option, and of a reply to one, in bytes.
pub const MAX_OPTION_BYTES: usize = 64 * 1024;
/// The longest name, description or query, in bytes: the protocol's limit for strings.
pub const MAX_NAME_BYTES: usize = 4096;
/// How many options one handshake may send to a server of few exports; see [`max_options`].
pub const MAX_OPTIONS: u32 = 32;
/// How many more for each export that the server lists: whoever tells of all of them asks about each, and about its contexts.
pub const OPTIONS_PER_EXPORT: u32 = 4;
/// How many at most, however many exports there are.
pub const MOST_OPTIONS: u32 = 16_384;

/// How many options one handshake may send to a server that lists so many exports.
#[must_use]
pub fn max_options(exports: usize) -> u32 {
    let exports = u32::try_from(exports).unwrap_or(u32::MAX);
    MAX_OPTIONS.saturating_add(exports.saturating_mul(OPTIONS_PER_EXPORT)).min(MOST_OPTIONS)
}
/// How many queries one LIST/SET_META_CONTEXT may carry.
pub const MAX_QUERIES: u32 = 256;
/// How many contexts one connection may have selected.
pub const MAX_CONTEXTS: usize = 16;
/// The longest payload of a request or a reply, in bytes: what the protocol calls portable.
pub const MAX_PAYLOAD_BYTES: u32 = 32 << 20;
/// How many descriptors a BLOCK_STATUS chunk may have: the server sends no more, and the client takes no more than 2^20 as the protocol says.
pub const MAX_STATUS_DESCRIPTORS: usize = 1 << 20;
/// The longest extent that one 32-bit status descriptor tells of: below 2^32, and aligned to any sensible block.
pub const MAX_STATUS_EXTENT_BYTES: u64 = (1 << 32) - (64 << 20);
/// The longest message of an error in a reply, in bytes: the protocol's limit for strings.
pub const MAX_MESSAGE_BYTES: usize = MAX_NAME_BYTES;
/// How many characters of a peer's text reach a log or an error.
pub const MAX_TEXT_CHARS: usize = 80;
