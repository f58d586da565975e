//! BLOCK_STATUS: what the device knows of a range, as each selected context puts it.

use std::rc::Rc;

use block::{BlockDevice, ByteRange, Extent, ExtentState};
use bytes::BytesMut;
use proto::server::StatusBuilder;
use proto::wire::{
    Descriptor, EXTENDED_REPLY_BYTES, MAX_CONTEXTS, MetaContext, ReplyStyle, STRUCTURED_REPLY_BYTES,
    SelectedContext,
};

use super::perform;
use super::request::Request;
use crate::budget::MAX_REPLY_BYTES;

/// How many extents one reply tells of; a client asks again for the rest.
const MAX_EXTENTS: usize = 2048;
/// How often a device that stops before the range ends is asked to go on; a client asks again for the rest.
const MAX_ASKS: usize = 64;

const _: () = assert!(MAX_CONTEXTS * chunk_bytes(ReplyStyle::Extended) <= MAX_REPLY_BYTES as usize);

/// The longest chunk about one context, in bytes.
const fn chunk_bytes(style: ReplyStyle) -> usize {
    match style {
        ReplyStyle::Extended => EXTENDED_REPLY_BYTES + 8 + MAX_EXTENTS * Descriptor::EXTENDED_BYTES,
        _ => STRUCTURED_REPLY_BYTES + 4 + MAX_EXTENTS * Descriptor::BYTES,
    }
}

/// The memory that a reply of these many contexts may need, in bytes; none is asked for where it is tiny.
pub(super) fn reply_bytes(contexts: usize, one: bool, style: ReplyStyle) -> Option<u32> {
    (!one).then(|| u32::try_from(contexts * chunk_bytes(style)).expect("contexts and extents are bounded"))
}

pub(super) async fn answer(
    device: Rc<dyn BlockDevice>,
    request: Request,
    one: bool,
    contexts: Rc<[SelectedContext]>,
) {
    let range = perform::range(&request.header);
    let limit = if one { 1 } else { MAX_EXTENTS };
    let extents = match gather(&*device, range, limit).await {
        Ok(extents) => extents,
        Err(error) => return request.fail(&error),
    };
    let mut reply = BytesMut::new();
    for (number, selected) in contexts.iter().enumerate() {
        let encoder = request.shared.encoder;
        let mut builder = StatusBuilder::new(range.len(), limit, encoder.style());
        tell(&mut builder, range.start(), &extents, &selected.context);
        let last = number + 1 == contexts.len();
        encoder.status_chunk(&mut reply, &request.header, selected.id, &builder.finish(), last);
    }
    request.answer(|outbox, request| outbox.put_long(&reply, request.held()));
}

/// At most `limit` extents of `range`, from a device that may need to be asked several times: one that looks at much for an answer stops
/// in between, so that the shard can do something else.
async fn gather(device: &dyn BlockDevice, range: ByteRange, limit: usize) -> block::Result<Vec<Extent>> {
    let mut extents: Vec<Extent> = Vec::new();
    let mut at = range.start();
    for _ in 0..MAX_ASKS {
        let more = match device.extents(ByteRange::from_bounds(at, range.end()), limit).await {
            Ok(more) => more,
            // What was told before is true all the same.
            Err(_) if !extents.is_empty() => break,
            Err(error) => return Err(error),
        };
        let before = at;
        for extent in more {
            let is_full = extents.len() == limit;
            match extents.last_mut() {
                Some(last) if last.state == extent.state && last.range.end() == extent.range.start() => {
                    last.range = ByteRange::from_bounds(last.range.start(), extent.range.end());
                }
                _ if is_full => return Ok(extents),
                _ => extents.push(extent),
            }
            at = extent.range.end();
        }
        if at <= before || at >= range.end() {
            break;
        }
        tokio::task::yield_now().await;
    }
    Ok(extents)
}

/// Tells of extents as far as they follow each other: what a device says is not trusted to.
fn tell(builder: &mut StatusBuilder, start: u64, extents: &[Extent], context: &MetaContext) {
    let mut at = start;
    for extent in extents {
        if extent.range.start() > at || extent.range.end() <= at {
            break;
        }
        builder.push(extent.range.end() - at, flags(&extent.state, context));
        at = extent.range.end();
        if builder.is_full() {
            break;
        }
    }
}

fn flags(state: &ExtentState, context: &MetaContext) -> u64 {
    match context {
        MetaContext::Allocation => {
            let hole = if state.hole { Descriptor::HOLE } else { 0 };
            let zero = if state.zero { Descriptor::ZERO } else { 0 };
            hole | zero
        }
        MetaContext::Depth => u64::from(state.depth),
        MetaContext::DirtyBitmap(_) => {
            if state.dirty {
                Descriptor::DIRTY
            } else {
                0
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(start: u64, end: u64, zero: bool) -> Extent {
        let state = ExtentState { zero, ..ExtentState::default() };
        Extent { range: ByteRange::from_bounds(start, end), state }
    }

    #[test]
    fn extents_with_a_gap_end_before_it() {
        let mut builder = StatusBuilder::new(1000, 10, ReplyStyle::Structured);
        let extents = [extent(0, 100, true), extent(100, 200, false), extent(300, 400, true)];
        tell(&mut builder, 50, &extents, &MetaContext::Allocation);
        let expected = [Descriptor { len: 50, flags: 2 }, Descriptor { len: 100, flags: 0 }];
        assert_eq!(builder.finish(), expected);
    }

    #[test]
    fn extents_from_elsewhere_tell_nothing() {
        let mut builder = StatusBuilder::new(1000, 10, ReplyStyle::Structured);
        tell(&mut builder, 500, &[extent(0, 100, true)], &MetaContext::Allocation);
        assert_eq!(builder.finish(), [Descriptor { len: 1000, flags: 0 }]);
    }
}
