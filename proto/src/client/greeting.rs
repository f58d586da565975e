//! What a client wants of a handshake, and the options that say so.

use bytes::{BufMut, BytesMut};

use crate::wire::{
    CLIENT_OPTION_MAGIC, ExportInfo, InfoKind, MetaContext, OptionKind, ReplyStyle, SelectedContext,
};

/// What a handshake is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Goal {
    /// Begin transmission with the export of this name.
    Go(String),
    /// Learn of the export of this name.
    Info(String),
    /// Learn the names of all exports.
    List,
}

/// What a client wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wish {
    /// What the handshake is for.
    pub goal: Goal,
    /// The best kind of replies to ask for. A server without it is asked for the next, down to simple ones.
    pub replies: ReplyStyle,
    /// The contexts to select, if the server has replies in chunks.
    pub contexts: Vec<MetaContext>,
}

/// An export that a server listed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Its name.
    pub name: String,
    /// A text for people; may be empty.
    pub description: String,
}

/// What INFO or GO told so far.
#[derive(Clone, Debug, Default)]
pub(super) struct Told {
    pub(super) info: Option<ExportInfo>,
    pub(super) contexts: Vec<SelectedContext>,
    pub(super) name: Option<String>,
    pub(super) description: Option<String>,
    pub(super) block_sizes: Option<crate::wire::BlockSizes>,
    pub(super) pieces: usize,
}

pub(super) fn put_option(out: &mut BytesMut, kind: OptionKind, data: &[u8]) {
    out.put_u64(CLIENT_OPTION_MAGIC);
    out.put_u32(kind.number());
    out.put_u32(length(data.len()));
    out.put_slice(data);
}

pub(super) fn put_info_option(out: &mut BytesMut, kind: OptionKind, name: &str) {
    let kinds = [InfoKind::Name, InfoKind::Description, InfoKind::BlockSize];
    let mut data = BytesMut::new();
    put_text(&mut data, name);
    data.put_u16(u16::try_from(kinds.len()).expect("three"));
    for kind in kinds {
        data.put_u16(kind.number());
    }
    put_option(out, kind, &data);
}

pub(super) fn put_context_option(out: &mut BytesMut, name: &str, contexts: &[MetaContext]) {
    let mut data = BytesMut::new();
    put_text(&mut data, name);
    data.put_u32(length(contexts.len()));
    for context in contexts {
        put_text(&mut data, &context.to_string());
    }
    put_option(out, OptionKind::SetMetaContext, &data);
}

fn put_text(out: &mut BytesMut, text: &str) {
    out.put_u32(length(text.len()));
    out.put_slice(text.as_bytes());
}

fn length(len: usize) -> u32 {
    u32::try_from(len).expect("a client's own names are far below 4 GiB")
}
