//! How far an export is, asked over NBD alone: `lifeboot status --listen ADDRESS` works wherever the
//! export can be reached. The truth is in `qemu:allocation-depth` (1 home, 2 still in the backup).

use std::io::{Read, Write};
use std::ops::ControlFlow;

use anyhow::{Context as _, bail, ensure};
use bytes::BytesMut;
use proto::client::{Connected, Event, Goal, Handshake, Progress, Replies, Wish};
use proto::wire::{
    CommandFlags, CommandKind, ContextId, Cookie, Cut, Descriptor, MetaContext, ReplyStyle, RequestHeader,
};
use serde::Serialize;

/// What one BLOCK_STATUS asks about at most, where its length has 32 bits. With extended headers it asks about all that is left.
const STEP_BYTES: u64 = 1 << 30;
const RECEIVE_BYTES: usize = 64 << 10;
/// Where the bytes lie that are home, by `qemu:allocation-depth`.
const DEPTH_BACKUP: u64 = 2;

/// What an export tells of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct RemoteStatus {
    /// The export's name.
    pub(super) export: String,
    /// Its size in bytes.
    pub(super) size: u64,
    /// Bytes that are not in the backup alone any more.
    pub(super) home_bytes: u64,
    /// Bytes still to come from the backup.
    pub(super) absent_bytes: u64,
    /// Bytes that the guest has written, if the export keeps a dirty bitmap.
    pub(super) guest_bytes: Option<u64>,
}

/// Asks the server at the other end of `stream` about its export of this name (empty: its only one).
///
/// # Errors
/// Where the server does not answer as an NBD server does, or knows nothing of depths.
pub(super) fn ask(stream: &mut (impl Read + Write), export: &str) -> anyhow::Result<RemoteStatus> {
    let bitmap = MetaContext::DirtyBitmap(crate::live_restore::DIRTY_BITMAP.to_owned());
    let wish = Wish {
        goal: Goal::Go(export.to_owned()),
        replies: ReplyStyle::Extended,
        contexts: vec![MetaContext::Depth, bitmap.clone()],
    };
    let (connected, mut input) = shake_hands(stream, wish)?;
    let id_of = |wanted: &MetaContext| {
        connected.contexts.iter().find(|selected| selected.context == *wanted).map(|selected| selected.id)
    };
    let Some(depth) = id_of(&MetaContext::Depth) else {
        bail!("the server does not say what is home: it has no qemu:allocation-depth");
    };
    let dirty = id_of(&bitmap);
    let size = connected.info.size;
    let style = connected.replies;
    let most = if style.is_extended() { u64::MAX } else { STEP_BYTES };
    let mut replies = Replies::new(style, connected.contexts.clone());
    let mut absent_bytes = 0;
    let mut dirty_bytes = 0;
    let mut at = 0;
    let mut cookie = 0;
    while at < size {
        cookie += 1;
        let request = RequestHeader {
            flags: CommandFlags::NONE,
            kind: CommandKind::BlockStatus,
            cookie: Cookie(cookie),
            offset: at,
            len: (size - at).min(most),
        };
        replies.expect(&request)?;
        stream.write_all(&request.encode(style))?;
        let told = status_of(stream, &mut replies, &mut input)?;
        let extents = |wanted: ContextId| {
            told.iter().filter(move |(id, _)| *id == wanted).flat_map(|(_, descriptors)| descriptors)
        };
        // Each context may stop short of the request's end, and each elsewhere.
        let reach = |wanted: ContextId| extents(wanted).map(|extent| extent.len).sum::<u64>();
        let step = dirty.map_or(u64::MAX, &reach).min(reach(depth)).min(request.len);
        ensure!(step > 0, "the server told nothing about byte {at}");
        absent_bytes += covered(extents(depth), step, |flags| flags >= DEPTH_BACKUP);
        if let Some(dirty) = dirty {
            dirty_bytes += covered(extents(dirty), step, |flags| flags & Descriptor::DIRTY != 0);
        }
        at += step;
    }
    let goodbye = RequestHeader {
        flags: CommandFlags::NONE,
        kind: CommandKind::Disconnect,
        cookie: Cookie(0),
        offset: 0,
        len: 0,
    };
    // A server that is gone already needs no goodbye.
    let _ = stream.write_all(&goodbye.encode(style));
    Ok(RemoteStatus {
        export: connected.info.name,
        size,
        home_bytes: size - absent_bytes,
        absent_bytes,
        guest_bytes: dirty.map(|_| dirty_bytes),
    })
}

/// How many of the first `reach` bytes lie in extents whose flags `count`.
fn covered<'a>(
    extents: impl Iterator<Item = &'a Descriptor>,
    reach: u64,
    count: impl Fn(u64) -> bool,
) -> u64 {
    let mut left = reach;
    let mut sum = 0;
    for extent in extents {
        let len = extent.len.min(left);
        left -= len;
        if count(extent.flags) {
            sum += len;
        }
    }
    sum
}

fn shake_hands(stream: &mut (impl Read + Write), wish: Wish) -> anyhow::Result<(Box<Connected>, BytesMut)> {
    let mut handshake = Handshake::new(wish);
    let mut received = [0; RECEIVE_BYTES];
    loop {
        let count = stream.read(&mut received).context("cannot read from the server")?;
        ensure!(count > 0, "the server hung up during the handshake");
        let progress = handshake.receive(&received[..count])?;
        stream.write_all(&handshake.take_output()).context("cannot write to the server")?;
        match progress {
            Progress::Waiting => {}
            Progress::Ready(connected) => return Ok((connected, handshake.into_rest())),
            Progress::Told(_) | Progress::Listed(_) => bail!("the server answered what was not asked"),
        }
    }
}

type Told = Vec<(ContextId, Vec<Descriptor>)>;

fn status_of(stream: &mut impl Read, replies: &mut Replies, input: &mut BytesMut) -> anyhow::Result<Told> {
    let mut told = Vec::new();
    let mut why = String::new();
    let mut take = |event| match event {
        Event::Status { context, descriptors, .. } => {
            told.push((context, descriptors));
            Ok(ControlFlow::Continue(()))
        }
        Event::Failure { message, .. } => {
            why = message;
            Ok(ControlFlow::Continue(()))
        }
        Event::Done { result, .. } => match result {
            Ok(()) => Ok(ControlFlow::Break(())),
            Err(errno) if why.is_empty() => bail!("the server refused BLOCK_STATUS: {errno}"),
            Err(errno) => bail!("the server refused BLOCK_STATUS: {errno} ({})", Cut(&why)),
        },
        Event::Data { .. } | Event::Hole { .. } => Ok(ControlFlow::Continue(())),
    };
    let mut received = [0; RECEIVE_BYTES];
    loop {
        while let Some(event) = replies.next(input)? {
            if take(event)?.is_break() {
                return Ok(told);
            }
        }
        let count = stream.read(&mut received).context("cannot read from the server")?;
        ensure!(count > 0, "the server hung up");
        input.extend_from_slice(&received[..count]);
    }
}
