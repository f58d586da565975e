//! BLOCK_STATUS: what the device knows of a range, as each selected context puts it.

use std::rc::Rc;

use block::{BlockDevice, Extent, ExtentState};
use bytes::BytesMut;
use proto::server::StatusBuilder;
use proto::wire::{Descriptor, MAX_CONTEXTS, MetaContext, STRUCTURED_REPLY_BYTES, SelectedContext};

use super::perform;
use super::request::Request;
use crate::budget::MAX_REPLY_BYTES;

/// How many extents one reply tells of; a client asks again for the rest.
const MAX_EXTENTS: usize = 2048;

const _: () = assert!(MAX_CONTEXTS * (24 + MAX_EXTENTS * Descriptor::BYTES) <= MAX_REPLY_BYTES as usize);

/// The memory that a reply of these many contexts may need, in bytes; none is asked for where it is tiny.
pub(super) fn reply_bytes(contexts: usize, one: bool) -> Option<u32> {
    let bytes = contexts * (STRUCTURED_REPLY_BYTES + size_of::<u32>() + MAX_EXTENTS * Descriptor::BYTES);
    (!one).then(|| u32::try_from(bytes).expect("contexts and extents are bounded"))
}

pub(super) async fn answer(
    device: Rc<dyn BlockDevice>,
    request: Request,
    one: bool,
    contexts: &[SelectedContext],
) {
    let range = perform::range(&request.header);
    let limit = if one { 1 } else { MAX_EXTENTS };
    let extents = match device.extents(range, limit).await {
        Ok(extents) => extents,
        Err(error) => return request.fail(&error, None),
    };
    let mut reply = BytesMut::new();
    for (number, selected) in contexts.iter().enumerate() {
        let mut builder = StatusBuilder::new(request.header.len, limit);
        tell(&mut builder, range.start(), &extents, &selected.context);
        let last = number + 1 == contexts.len();
        let encoder = request.shared.encoder;
        encoder.status_chunk(&mut reply, request.cookie(), selected.id, &builder.finish(), last);
    }
    request.answer(|outbox, request| outbox.put_long(&reply, request.held()));
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

fn flags(state: &ExtentState, context: &MetaContext) -> u32 {
    match context {
        MetaContext::Allocation => {
            let hole = if state.hole { Descriptor::HOLE } else { 0 };
            let zero = if state.zero { Descriptor::ZERO } else { 0 };
            hole | zero
        }
        MetaContext::Depth => state.depth,
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
    use block::ByteRange;

    use super::*;

    fn extent(start: u64, end: u64, zero: bool) -> Extent {
        let state = ExtentState { zero, ..ExtentState::default() };
        Extent { range: ByteRange::from_bounds(start, end), state }
    }

    #[test]
    fn extents_with_a_gap_end_before_it() {
        let mut builder = StatusBuilder::new(1000, 10);
        let extents = [extent(0, 100, true), extent(100, 200, false), extent(300, 400, true)];
        tell(&mut builder, 50, &extents, &MetaContext::Allocation);
        let expected = [Descriptor { len: 50, flags: 2 }, Descriptor { len: 100, flags: 0 }];
        assert_eq!(builder.finish(), expected);
    }

    #[test]
    fn extents_from_elsewhere_tell_nothing() {
        let mut builder = StatusBuilder::new(1000, 10);
        tell(&mut builder, 500, &[extent(0, 100, true)], &MetaContext::Allocation);
        assert_eq!(builder.finish(), [Descriptor { len: 1000, flags: 0 }]);
    }
}
