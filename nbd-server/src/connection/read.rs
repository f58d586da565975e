//! READ: at once from memory where it can be, in a task where it cannot.
//!
//! No head of a reply is queued before its data is there: read already, or known to be in memory.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use block::{AlignedBuf, Attempt, BlockDevice, ByteRange, Extent, Loaded};
use proto::server::{Head, ReplyEncoder};
use proto::wire::{ReplyStyle, RequestHeader};

use super::batch::Batch;
use super::perform;
use super::request::{Request, Shared};
use crate::socket::Socket;

/// From this size on, holes are looked for, and cached bytes are sent from the file over a unix socket.
const LARGE_BYTES: u64 = 32 << 10;
/// Up to this size, bytes that are in memory elsewhere are copied into the batch.
const INLINE_BYTES: u64 = 128 << 10;
/// How far beyond a READ it is asked where data is, so that the next one need not ask.
const LOOKAHEAD_BYTES: u64 = 64 << 20;
/// How many extents are asked for at a time; what lies beyond is read as data.
const MAX_EXTENTS: usize = 64;
/// How many runs of data are remembered.
const MAX_RUNS: usize = 64;

const _: () = assert!(INLINE_BYTES as usize + 64 <= Batch::MAX_RUN);

/// What a connection reads from.
pub(super) struct Reads {
    pub(super) device: Rc<dyn BlockDevice>,
    /// The shortest READ whose cached bytes are sent from the file.
    from_file: u64,
    data: RefCell<KnownData>,
    /// Whether a READ waits for the answer to where the device has data.
    is_asking: Cell<bool>,
    /// Whether the device has told of a hole.
    has_holes: Cell<bool>,
}

/// What must be done so that a READ is answered.
pub(super) enum Plan {
    /// Nothing: the reply is queued.
    Answered,
    /// Read its bytes in a task.
    Fetch,
    /// Find out in a task where its holes are, then read the rest.
    FindHoles,
}

impl Reads {
    pub(super) fn new(device: Rc<dyn BlockDevice>, socket: &Socket) -> Self {
        let from_file = match socket {
            Socket::Unix(_) => LARGE_BYTES,
            // They are copied there all the same, and shorter replies go out together.
            Socket::Tcp(_) | Socket::Tls(_) => INLINE_BYTES + 1,
        };
        Self {
            device,
            from_file,
            data: RefCell::default(),
            is_asking: Cell::new(false),
            has_holes: Cell::new(false),
        }
    }

    /// Answers from memory if that takes no waiting.
    pub(super) fn at_once(&self, header: &RequestHeader, whole: bool, shared: &Shared) -> Plan {
        let encoder = shared.encoder;
        if header.len >= LARGE_BYTES {
            let range = perform::range(header);
            let holes_count = !whole && encoder.style().has_chunks();
            if holes_count && self.should_ask(range) {
                return Plan::FindHoles;
            }
            if self.send_resident(header, range, shared, true) {
                return Plan::Answered;
            }
        }
        if header.len > INLINE_BYTES {
            return Plan::Fetch;
        }
        let len = header.len as usize;
        let head_len = encoder.data_head_len();
        let attempt = shared.outbox.borrow_mut().put_in_place(head_len + len, |reply| {
            let (head, data) = reply.split_at_mut(head_len);
            let attempt = self.device.try_read(header.offset, data);
            head.copy_from_slice(&encoder.data(header));
            (matches!(attempt, Ok(Attempt::Done)), attempt)
        });
        match attempt {
            Ok(Attempt::Done) => Plan::Answered,
            Ok(Attempt::WouldWait) => Plan::Fetch,
            Ok(Attempt::Zeroes) => {
                answer_zeroes(header, whole, shared);
                Plan::Answered
            }
            Err(error) => {
                shared.fail(header, &error);
                Plan::Answered
            }
        }
    }

    /// Whether the device is to be asked for holes before this is read. Of one that has told of none so far, only one READ at a time asks:
    /// a client that begins with many would have as many threads started for nothing.
    fn should_ask(&self, range: ByteRange) -> bool {
        if self.data.borrow().covers(range) {
            return false;
        }
        !self.is_asking.replace(true) || self.has_holes.get()
    }

    /// Queues `range` to be sent from the device's file, if it is in memory there. `last` where the reply ends with it.
    fn send_resident(&self, header: &RequestHeader, range: ByteRange, shared: &Shared, last: bool) -> bool {
        if header.len < self.from_file {
            return false;
        }
        let Some((file, offset)) = self.device.resident(range) else { return false };
        let mut outbox = shared.outbox.borrow_mut();
        let Ok(file) = outbox.own_file(file) else { return false };
        outbox.put_file(head(shared.encoder, header, range, last), file, offset, range.len() as usize);
        true
    }

    /// Reads in a task.
    pub(super) async fn fetch(self: Rc<Self>, request: Request) {
        let header = request.header;
        let mut buf = perform::buffer(header.len as usize);
        if header.len >= self.from_file {
            let result;
            (result, buf) = self.device.load(header.offset, buf).await;
            match result {
                Ok(Loaded::Buffer) => return answer_data(request, buf),
                Ok(Loaded::Resident) => {
                    if self.send_resident(&header, perform::range(&header), &request.shared, true) {
                        return request.answer(|_, _| {});
                    }
                }
                Err(error) => return request.fail(&error),
            }
        }
        let (result, buf) = self.device.read(header.offset, buf).await;
        match result {
            Ok(()) => answer_data(request, buf),
            Err(error) => request.fail(&error),
        }
    }

    /// Asks the device where `range` has data.
    pub(super) async fn pieces(&self, range: ByteRange) -> Vec<Piece> {
        let size = self.device.geometry().size;
        let ahead = range.start().saturating_add(LOOKAHEAD_BYTES).max(range.end()).min(size);
        let asked = ByteRange::from_bounds(range.start(), ahead);
        // Not knowing where holes are is no reason to fail a READ.
        let extents = self.device.extents(asked, MAX_EXTENTS).await.unwrap_or_default();
        self.data.borrow_mut().learn(&extents);
        if extents.iter().any(|extent| extent.state.zero) {
            self.has_holes.set(true);
        }
        self.is_asking.set(false);
        pieces(range, &extents)
    }

    /// Asks the device where it has data, then reads that, and tells of holes as holes. Structured replies only.
    pub(super) async fn find_holes(self: Rc<Self>, request: Request) {
        let header = request.header;
        let range = perform::range(&header);
        let pieces = self.pieces(range).await;
        if let [Piece { zero: false, .. }] = pieces[..] {
            if self.send_resident(&header, range, &request.shared, true) {
                return request.answer(|_, _| {});
            }
            return self.fetch(request).await;
        }
        let mut read = Vec::with_capacity(pieces.len());
        for piece in pieces {
            if piece.zero {
                read.push((piece, None));
                continue;
            }
            let buf = perform::buffer(piece.range.len() as usize);
            let (result, buf) = self.device.read(piece.range.start(), buf).await;
            if let Err(error) = result {
                return request.fail(&error.at(piece.range));
            }
            read.push((piece, Some(buf)));
        }
        answer_in_pieces(request, read);
    }
}

/// Answers a READ of at most [`INLINE_BYTES`] zeroes: as a hole, where the replies have one and the client takes it.
#[cold]
fn answer_zeroes(header: &RequestHeader, whole: bool, shared: &Shared) {
    let encoder = shared.encoder;
    if encoder.style().has_chunks() && !whole {
        return shared.reply(&encoder.hole_chunk(header, header.offset, header.len, true));
    }
    let head = encoder.data(header);
    shared.outbox.borrow_mut().put_in_place(head.len() + header.len as usize, |reply| {
        let (before, data) = reply.split_at_mut(head.len());
        before.copy_from_slice(&head);
        data.fill(0);
        (true, ())
    });
}

fn answer_data(request: Request, buf: AlignedBuf) {
    let head = request.shared.encoder.data(&request.header);
    request.answer(|outbox, request| outbox.put_data(head, buf, request.held()));
}

fn answer_in_pieces(request: Request, pieces: Vec<(Piece, Option<AlignedBuf>)>) {
    request.answer(|outbox, request| {
        let encoder = request.shared.encoder;
        let count = pieces.len();
        for (number, (piece, buf)) in pieces.into_iter().enumerate() {
            let last = number + 1 == count;
            match buf {
                Some(buf) => {
                    let head = head(encoder, &request.header, piece.range, last);
                    outbox.put_data(head, buf, request.held());
                }
                None => {
                    let (start, len) = (piece.range.start(), piece.range.len());
                    outbox.put(&encoder.hole_chunk(&request.header, start, len, last));
                }
            }
        }
    });
}

/// The head before the data of `range`, which is the request's or a part of it.
pub(super) fn head(encoder: ReplyEncoder, header: &RequestHeader, range: ByteRange, last: bool) -> Head {
    match encoder.style() {
        ReplyStyle::Simple => encoder.data(header),
        _ => encoder.data_chunk(header, range.start(), range.len(), last),
    }
}

/// A part of what is read: data, or zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) range: ByteRange,
    pub(super) zero: bool,
}

/// The whole of `range` in order, zeroes and data in turn. What the extents do not tell of is data.
fn pieces(range: ByteRange, extents: &[Extent]) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = Vec::new();
    let mut at = range.start();
    let mut put = |range: ByteRange, zero: bool| {
        match pieces.last_mut() {
            Some(last) if last.zero == zero => {
                last.range = ByteRange::from_bounds(last.range.start(), range.end());
            }
            _ => pieces.push(Piece { range, zero }),
        };
    };
    for extent in extents {
        let end = extent.range.end().min(range.end());
        if extent.range.start() > at || end <= at {
            break;
        }
        put(ByteRange::from_bounds(at, end), extent.state.zero);
        at = end;
    }
    if at < range.end() {
        put(ByteRange::from_bounds(at, range.end()), false);
    }
    pieces
}

/// Runs that held data when the device was asked. Zeroes may have come since: to send them as data is right all the same.
#[derive(Debug, Default)]
struct KnownData {
    runs: Vec<ByteRange>,
}

impl KnownData {
    fn covers(&self, range: ByteRange) -> bool {
        self.runs.iter().any(|run| run.start() <= range.start() && range.end() <= run.end())
    }

    fn learn(&mut self, extents: &[Extent]) {
        for extent in extents.iter().filter(|extent| !extent.state.zero) {
            let mut run = extent.range;
            self.runs.retain(|other| {
                let touches = other.start() <= run.end() && run.start() <= other.end();
                if touches {
                    let end = run.end().max(other.end());
                    run = ByteRange::from_bounds(run.start().min(other.start()), end);
                }
                !touches
            });
            if self.runs.len() == MAX_RUNS {
                self.runs.remove(0);
            }
            self.runs.push(run);
        }
    }
}

#[cfg(test)]
mod tests {
    use block::ExtentState;

    use super::*;

    fn extent(start: u64, end: u64, zero: bool) -> Extent {
        let state = ExtentState { zero, ..ExtentState::default() };
        Extent { range: ByteRange::from_bounds(start, end), state }
    }

    #[test]
    fn pieces_cover_the_range_whatever_the_extents_say() {
        let range = ByteRange::from_bounds(100, 1000);
        for extents in [
            vec![],
            vec![extent(100, 300, true), extent(300, 5000, false)],
            vec![extent(0, 200, true), extent(200, 400, true), extent(600, 700, true)],
            vec![extent(500, 600, true)],
            vec![extent(100, 100, true)],
        ] {
            let pieces = pieces(range, &extents);
            let mut at = range.start();
            for piece in &pieces {
                assert_eq!(piece.range.start(), at);
                at = piece.range.end();
            }
            assert_eq!(at, range.end(), "{extents:?}");
            assert!(pieces.windows(2).all(|pair| pair[0].zero != pair[1].zero));
        }
    }

    #[test]
    fn runs_of_data_that_touch_are_one() {
        let mut known = KnownData::default();
        known.learn(&[extent(0, 100, false), extent(100, 150, true), extent(150, 300, false)]);
        assert!(!known.covers(ByteRange::from_bounds(50, 200)));
        known.learn(&[extent(90, 160, false)]);
        assert!(known.covers(ByteRange::from_bounds(50, 200)));
        assert_eq!(known.runs.len(), 1);
        for number in 1..200 {
            known.learn(&[extent(number * 1000, number * 1000 + 1, false)]);
        }
        assert!(known.runs.len() <= MAX_RUNS);
    }
}
