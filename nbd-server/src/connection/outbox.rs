//! Replies on their way out: one queue per connection, whoever made the reply, sent in as few calls as it takes.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::rc::Rc;

use block::AlignedBuf;
use proto::server::Head;

use super::batch::Batch;
use super::end::End;
use super::request::Held;
use crate::socket::Socket;

/// How many pieces one call may send.
const MAX_SLICES: usize = 16;
/// No more replies are made while so many bytes wait for the peer: enough that a file is sent without a pause.
const MAX_QUEUED_BYTES: usize = 2 << 20;
/// The same for bytes of batches, sent or not: their memory is held until the last of them is sent.
const MAX_BATCH_BYTES: usize = 512 << 10;
/// Up to this length a reply goes into a batch.
const MAX_SHORT_BYTES: usize = 4 << 10;
/// How many batches are kept for the next replies.
const MAX_SPARE: usize = 2;

enum Segment {
    /// Replies side by side.
    Batch(Batch),
    /// The head of a READ's reply and its data; its memory is given back when it is sent.
    Data { head: Front, buf: AlignedBuf, sent: usize, _held: Rc<Held> },
    /// The head of a READ's reply and its data, taken from the file as it is sent.
    File { head: Front, file: Rc<OwnedFd>, offset: u64, len: usize },
}

/// A head, and how much of it is sent.
struct Front {
    head: Head,
    sent: usize,
}

impl Front {
    const fn new(head: Head) -> Self {
        Self { head, sent: 0 }
    }

    fn bytes(&self) -> &[u8] {
        &self.head[self.sent..]
    }

    /// Counts what was sent of it; what remains of `sent` belongs to what follows.
    fn advance(&mut self, sent: usize) -> usize {
        let taken = sent.min(self.bytes().len());
        self.sent += taken;
        sent - taken
    }
}

/// The replies of one connection that are not sent yet.
#[derive(Default)]
pub(super) struct Outbox {
    segments: VecDeque<Segment>,
    spare: Vec<Batch>,
    files: Vec<(RawFd, Rc<OwnedFd>)>,
    queued_bytes: usize,
    /// What stands in batches, and so in memory that no request was allowed, with what was sent of them already.
    batch_bytes: usize,
    closed: bool,
}

impl Outbox {
    pub(super) fn is_empty(&self) -> bool {
        self.queued_bytes == 0
    }

    /// Whether so much waits for the peer that nothing more should be made for it.
    pub(super) const fn is_full(&self) -> bool {
        self.queued_bytes >= MAX_QUEUED_BYTES || self.batch_bytes >= MAX_BATCH_BYTES
    }

    pub(super) const fn is_closed(&self) -> bool {
        self.closed
    }

    /// Throws away what is queued and whatever comes: the peer is gone.
    pub(super) fn close(&mut self) {
        self.closed = true;
        self.segments.clear();
        self.spare.clear();
        self.files.clear();
        (self.queued_bytes, self.batch_bytes) = (0, 0);
    }

    /// A batch with room for `len` more bytes, at the end of the queue.
    fn batch(&mut self, len: usize) -> &mut Batch {
        assert!(len <= Batch::MAX_RUN, "a run of {len} bytes fits no batch");
        let fits = matches!(self.segments.back(), Some(Segment::Batch(batch)) if batch.has_room(len));
        if !fits {
            self.segments.push_back(Segment::Batch(self.spare.pop().unwrap_or_else(Batch::new)));
        }
        match self.segments.back_mut() {
            Some(Segment::Batch(batch)) => batch,
            _ => unreachable!("a batch was just put there"),
        }
    }

    /// Queues a short reply, or the head of a longer one.
    pub(super) fn put(&mut self, bytes: &[u8]) {
        if self.closed {
            return;
        }
        self.batch(bytes.len()).put(bytes);
        self.queued_bytes += bytes.len();
        self.batch_bytes += bytes.len();
    }

    /// Queues a reply of any length, whose memory `held` accounts for.
    pub(super) fn put_long(&mut self, bytes: &[u8], held: Rc<Held>) {
        if bytes.len() <= MAX_SHORT_BYTES {
            self.put(bytes);
        } else {
            self.put_data(Head::empty(), AlignedBuf::from_slice(bytes), held);
        }
    }

    /// Lets `fill` write a reply of `len` bytes in place; it is queued if `fill` says so.
    pub(super) fn put_in_place<T>(&mut self, len: usize, fill: impl FnOnce(&mut [u8]) -> (bool, T)) -> T {
        let batch = self.batch(len);
        let (keep, value) = fill(batch.reserve(len));
        if keep && !self.closed {
            self.batch(len).commit(len);
            self.queued_bytes += len;
            self.batch_bytes += len;
        }
        value
    }

    /// Queues the head of a READ's reply and its data.
    pub(super) fn put_data(&mut self, head: Head, buf: AlignedBuf, held: Rc<Held>) {
        if self.closed {
            return;
        }
        self.queued_bytes += head.len() + buf.len();
        self.segments.push_back(Segment::Data { head: Front::new(head), buf, sent: 0, _held: held });
    }

    /// A descriptor of our own for the device's `file`, made once: a device's file does not change while
    /// the device is open, so its number names it.
    pub(super) fn own_file(&mut self, file: BorrowedFd<'_>) -> io::Result<Rc<OwnedFd>> {
        let number = file.as_raw_fd();
        if let Some((_, own)) = self.files.iter().find(|(known, _)| *known == number) {
            return Ok(Rc::clone(own));
        }
        let own = Rc::new(file.try_clone_to_owned()?);
        self.files.push((number, Rc::clone(&own)));
        Ok(own)
    }

    /// Queues the head of a READ's reply and its data, which `sendfile` takes from the page cache.
    pub(super) fn put_file(&mut self, head: Head, file: Rc<OwnedFd>, offset: u64, len: usize) {
        if self.closed {
            return;
        }
        self.queued_bytes += head.len() + len;
        self.segments.push_back(Segment::File { head: Front::new(head), file, offset, len });
    }

    /// Sends as much as the socket takes; how much it was. The queue is empty unless it takes no more.
    pub(super) fn send(&mut self, socket: &mut Socket) -> Result<usize, End> {
        let mut total = 0;
        while !self.is_empty() {
            match self.send_some(socket) {
                Ok(sent) => {
                    total += sent;
                    self.advance(sent);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(self.end(error)),
            }
        }
        Ok(total)
    }

    /// What it is that failed: a file that was being sent, or the socket.
    fn end(&self, error: io::Error) -> End {
        let sends_file =
            matches!(self.segments.front(), Some(Segment::File { head, .. }) if head.bytes().is_empty());
        match error.kind() {
            ErrorKind::BrokenPipe
            | ErrorKind::ConnectionAborted
            | ErrorKind::ConnectionReset
            | ErrorKind::HostUnreachable
            | ErrorKind::NetworkDown
            | ErrorKind::NetworkUnreachable
            | ErrorKind::NotConnected
            | ErrorKind::OutOfMemory
            | ErrorKind::TimedOut => End::Socket(error),
            _ if sends_file => End::File(error),
            _ => End::Socket(error),
        }
    }

    fn send_some(&mut self, socket: &mut Socket) -> io::Result<usize> {
        if let Some(Segment::File { head, file, offset, len }) = self.segments.front()
            && head.bytes().is_empty()
        {
            return match socket.try_send_file(file.as_fd(), *offset, *len)? {
                // The head said that the bytes are there; without them nothing that follows can be understood.
                0 => Err(io::Error::new(ErrorKind::UnexpectedEof, "the file ends before the disk does")),
                sent => Ok(sent),
            };
        }
        let mut slices = [IoSlice::new(&[]); MAX_SLICES];
        let mut count = 0;
        let mut put = |bytes| {
            slices[count] = IoSlice::new(bytes);
            count += 1;
            count + 2 <= MAX_SLICES
        };
        let mut file_follows = false;
        for segment in &self.segments {
            let goes_on = match segment {
                Segment::Batch(batch) => put(batch.bytes()),
                Segment::Data { head, buf, sent, .. } => put(head.bytes()) && put(&buf[*sent..]),
                Segment::File { head, .. } => {
                    put(head.bytes());
                    file_follows = true;
                    false
                }
            };
            if !goes_on {
                break;
            }
        }
        socket.try_send(&slices[..count], file_follows)
    }

    fn advance(&mut self, mut sent: usize) {
        self.queued_bytes -= sent;
        while let Some(front) = self.segments.front_mut() {
            let left = match front {
                Segment::Batch(batch) => {
                    let taken = sent.min(batch.bytes().len());
                    batch.advance(taken);
                    sent -= taken;
                    batch.bytes().len()
                }
                Segment::Data { head, buf, sent: gone, .. } => {
                    sent = head.advance(sent);
                    let taken = sent.min(buf.len() - *gone);
                    *gone += taken;
                    sent -= taken;
                    head.bytes().len() + buf.len() - *gone
                }
                Segment::File { head, offset, len, .. } => {
                    sent = head.advance(sent);
                    let taken = sent.min(*len);
                    *offset += taken as u64;
                    *len -= taken;
                    sent -= taken;
                    head.bytes().len() + *len
                }
            };
            if left > 0 {
                return;
            }
            if let Some(Segment::Batch(mut batch)) = self.segments.pop_front() {
                self.batch_bytes -= batch.filled_bytes();
                if self.spare.len() < MAX_SPARE {
                    batch.clear();
                    self.spare.push(batch);
                }
            }
        }
    }
}
