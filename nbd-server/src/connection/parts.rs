//! Requests in parts: what is longer than its connection's own share of the memory, where nothing of the common half is to be had.
//!
//! Whoever asks for much, takes nothing of it, and comes again when it is cut off, can hold all that is common for ever. Nobody must wait
//! for it: where too little of it comes back for a moment, such a request goes on with the share alone, part after part, and its connection
//! does nothing else meanwhile.
//!
//! - A READ begins once nothing else of the connection is in flight, so that no other reply comes between its parts. In replies
//!   with chunks each part is one. A simple reply, and one that the client wants as one chunk, can tell of no failure once it has begun: all
//!   of it is read once to see that it can be, and then again to be sent. If that fails after all, the connection ends.
//! - A WRITE has each part written before the next is received, as a long write may be anyway ([`super::ahead`]); FUA is a flush at the end.
//!   That it failed is told when the rest of its payload has come.

use std::rc::Rc;

use block::{AlignedBuf, BlockDevice, ByteRange, Durability};
use proto::server::Head;
use tokio::sync::oneshot;

use super::end::End;
use super::perform;
use super::read::{Piece, Reads, head};
use super::request::Request;
use crate::budget::{Allowance, Share};

/// What a request in parts has.
pub(super) struct InParts {
    share: Share,
    /// The length of a part.
    part_bytes: u32,
}

impl InParts {
    pub(super) const fn new(share: Share, part_bytes: u32) -> Self {
        Self { share, part_bytes }
    }

    fn of(&self, range: ByteRange) -> impl Iterator<Item = ByteRange> + use<> {
        range.split(self.part_bytes.into()).map(|(_, part)| part)
    }

    /// Reads one of them, with memory for it.
    async fn read(
        &self,
        device: &dyn BlockDevice,
        part: ByteRange,
    ) -> (block::Result<()>, AlignedBuf, Allowance) {
        // A device that never waits must not keep the shard from everybody else.
        tokio::task::yield_now().await;
        let allowance = self.share.take(part.len() as u32).await;
        let (result, buf) = device.read(part.start(), perform::buffer(part.len() as usize)).await;
        (result.map_err(|error| error.at(part)), buf, allowance)
    }
}

/// Answers a READ. `find_holes` where the device is to be asked for them, `whole` where the client wants one chunk.
pub(super) async fn read(
    reads: Rc<Reads>,
    request: Request,
    in_parts: InParts,
    find_holes: bool,
    whole: bool,
) {
    let range = perform::range(&request.header);
    let has_chunks = !whole && request.shared.encoder.style().has_chunks();
    let pieces = if find_holes { reads.pieces(range).await } else { vec![Piece { range, zero: false }] };
    let device = &*reads.device;
    if has_chunks {
        chunks(device, request, &in_parts, &pieces).await;
    } else {
        one_run(device, request, &in_parts).await;
    }
}

/// Each part in a chunk of its own.
async fn chunks(device: &dyn BlockDevice, request: Request, in_parts: &InParts, pieces: &[Piece]) {
    let (header, encoder) = (request.header, request.shared.encoder);
    let end = header.offset + header.len;
    for piece in pieces {
        if piece.zero {
            let (start, len) = (piece.range.start(), piece.range.len());
            request.shared.reply(&encoder.hole_chunk(&header, start, len, piece.range.end() == end));
            continue;
        }
        for part in in_parts.of(piece.range) {
            let (result, buf, allowance) = in_parts.read(device, part).await;
            if let Err(error) = result {
                return request.fail(&error);
            }
            send(&request, head(encoder, &header, part, part.end() == end), buf, allowance);
            if request.shared.is_closed() {
                return request.abandon();
            }
        }
    }
    request.answer(|_, _| {});
}

/// One head, and all the data behind it.
async fn one_run(device: &dyn BlockDevice, mut request: Request, in_parts: &InParts) {
    let range = perform::range(&request.header);
    for part in in_parts.of(range) {
        let (result, ..) = in_parts.read(device, part).await;
        if let Err(error) = result {
            return request.fail(&error);
        }
        if request.shared.is_closed() {
            return request.abandon();
        }
    }
    request.promise();
    for part in in_parts.of(range) {
        let (result, buf, allowance) = in_parts.read(device, part).await;
        if let Err(error) = result {
            // The head promised these bytes.
            request.shared.give_up(End::File(std::io::Error::other(error)));
            return request.abandon();
        }
        let first = part.start() == range.start();
        let head = if first { request.shared.encoder.data(&request.header) } else { Head::empty() };
        send(&request, head, buf, allowance);
        if request.shared.is_closed() {
            return request.abandon();
        }
    }
    request.answer(|_, _| {});
}

/// Queues a part, whose memory is given back when it is sent.
fn send(request: &Request, head: Head, buf: AlignedBuf, allowance: Allowance) {
    let held = request.hold_part(buf.len() as u32, allowance);
    request.shared.outbox.borrow_mut().put_data(head, buf, held);
    request.shared.wake();
}

/// A WRITE whose payload is taken part by part.
pub(super) struct Write {
    pub(super) request: Request,
    fua: bool,
    in_parts: InParts,
    /// The part that comes.
    part: ByteRange,
    buf: AlignedBuf,
    filled: usize,
}

/// What writing a part came to.
pub(super) type Written = (Write, block::Result<()>);

impl Write {
    /// A request that holds memory for a part.
    pub(super) fn new(request: Request, fua: bool, in_parts: InParts) -> Self {
        let part = in_parts.of(perform::range(&request.header)).next().expect("no payload is empty");
        let buf = perform::buffer(part.len() as usize);
        Self { request, fua, in_parts, part, buf, filled: 0 }
    }

    /// What is missing of the part that comes.
    pub(super) fn room(&mut self) -> &mut [u8] {
        &mut self.buf[self.filled..]
    }

    /// So many bytes came.
    pub(super) const fn received(&mut self, len: usize) {
        self.filled += len;
    }

    /// How many bytes of the payload come after this part.
    pub(super) fn left(&self) -> usize {
        (perform::range(&self.request.header).end() - self.part.end()) as usize
    }

    /// Writes the part in a task of its own, which nothing interrupts.
    pub(super) fn write(self, device: Rc<dyn BlockDevice>) -> oneshot::Receiver<Written> {
        let (sender, receiver) = oneshot::channel();
        tokio::task::spawn_local(async move {
            let Self { request, fua, in_parts, part, buf, filled } = self;
            let (result, buf) = device.write(part.start(), buf, Durability::Volatile).await;
            let mut result = result.map_err(|error| error.at(part));
            let is_last = part.end() == perform::range(&request.header).end();
            if result.is_ok() && is_last && fua {
                result = device.flush().await;
            }
            let write = Self { request, fua, in_parts, part, buf, filled };
            if let Err((write, _)) = sender.send((write, result)) {
                // The connection ends, and has not got all of it.
                write.request.abandon();
            }
        });
        receiver
    }

    /// Goes on with the next part.
    pub(super) fn next(mut self) -> Self {
        let rest = ByteRange::from_bounds(self.part.end(), perform::range(&self.request.header).end());
        self.part = self.in_parts.of(rest).next().expect("something is left");
        self.buf = perform::buffer(self.part.len() as usize);
        self.filled = 0;
        self
    }
}
