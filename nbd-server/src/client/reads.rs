//! Many reads in flight on one connection.

use std::collections::{HashMap, VecDeque};

use proto::client::Event;
use proto::wire::{CommandKind, Cookie};

use super::{Connection, Words, put};
use crate::{Error, Result};

/// The longest request, in bytes: a reply that is still in the processor's cache when it is copied to its place costs half of one that is
/// not, and a server with several threads has something for each.
const REQUEST_BYTES: u32 = 256 << 10;
/// Requests that the server was sent and has not answered. It need not take more of them while it waits for us to take its answers; and
/// a socket has room for a few hundred, however short they are.
const MAX_REQUESTS: usize = 64;

/// Reads that were begun on a connection, each into a buffer of the caller's that comes back with the result. They end in any order.
#[derive(Debug)]
pub struct Reads<B> {
    connection: Connection,
    jobs: HashMap<u64, Job<B>>,
    last_job: u64,
    requests: HashMap<Cookie, Request>,
    /// Requests that are not sent yet.
    waiting: VecDeque<Request>,
}

#[derive(Debug)]
struct Job<B> {
    offset: u64,
    buf: B,
    /// Its requests that were not answered.
    left: usize,
    result: Result<()>,
}

#[derive(Debug)]
struct Request {
    job: u64,
    offset: u64,
    len: u64,
    words: Words,
}

impl<B: AsMut<[u8]>> Reads<B> {
    /// None yet.
    #[must_use]
    pub fn new(connection: Connection) -> Self {
        Self {
            connection,
            jobs: HashMap::new(),
            last_job: 0,
            requests: HashMap::new(),
            waiting: VecDeque::new(),
        }
    }

    /// How many are in flight.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.jobs.len()
    }

    /// Begins to read as much as `buf` holds from `offset` on; see [`Connection::read`] for what these may be. Replies are not waited
    /// for.
    ///
    /// # Errors
    /// Where the connection fails; [`Self::into_bufs`] has the buffers then.
    pub fn begin(&mut self, offset: u64, mut buf: B) -> Result<()> {
        let most = u64::from(self.connection.most_in_request(REQUEST_BYTES));
        let len = buf.as_mut().len() as u64;
        self.last_job += 1;
        let mut done = 0;
        let mut left = 0;
        // A read of nothing is one request too: it ends like all others.
        while left == 0 || done < len {
            let step = (len - done).min(most);
            let request =
                Request { job: self.last_job, offset: offset + done, len: step, words: Words::default() };
            self.waiting.push_back(request);
            left += 1;
            done += step;
        }
        self.jobs.insert(self.last_job, Job { offset, buf, left, result: Ok(()) });
        self.send()
    }

    /// Sends as many requests as may be in flight.
    fn send(&mut self) -> Result<()> {
        let mut out = Vec::new();
        while self.requests.len() < MAX_REQUESTS
            && let Some(request) = self.waiting.pop_front()
        {
            let cookie =
                self.connection.announce(CommandKind::Read, request.offset, request.len, &mut out)?;
            self.requests.insert(cookie, request);
        }
        if out.is_empty() { Ok(()) } else { self.connection.send(&out) }
    }

    /// Waits until one of those in flight has ended: its buffer, and whether it was read. `None` where none is in flight.
    ///
    /// # Errors
    /// Where the connection fails; [`Self::into_bufs`] has the buffers then.
    pub fn wait_one(&mut self) -> Result<Option<(B, Result<()>)>> {
        while !self.jobs.is_empty() {
            let event = self.connection.next_event()?;
            // The protocol's half answers for all of these being requests that were sent.
            match event {
                Event::Data { cookie, .. } | Event::Hole { cookie, .. } => {
                    let request = self.requests.get(&cookie);
                    if let Some(job) = request.and_then(|request| self.jobs.get_mut(&request.job)) {
                        put(job.buf.as_mut(), job.offset, &event);
                    }
                }
                Event::Failure { cookie, offset, message, .. } => {
                    if let Some(request) = self.requests.get_mut(&cookie) {
                        request.words.take(offset, message);
                    }
                }
                Event::Done { cookie, result } => {
                    let Some(request) = self.requests.remove(&cookie) else { continue };
                    self.send()?;
                    let error = result.err().map(|errno| {
                        let Request { offset, len, words, .. } = &request;
                        self.connection.refused(CommandKind::Read, *offset, *len, errno, words)
                    });
                    if let Some(job) = self.ended(request.job, error) {
                        return Ok(Some((job.buf, job.result)));
                    }
                }
                Event::Status { .. } => {}
            }
        }
        Ok(None)
    }

    /// Notes the end of one of a job's requests; the job, if it was the last one.
    fn ended(&mut self, number: u64, error: Option<Error>) -> Option<Job<B>> {
        let job = self.jobs.get_mut(&number)?;
        job.left -= 1;
        if let (Some(error), Ok(())) = (error, &job.result) {
            job.result = Err(error);
        }
        if job.left == 0 { self.jobs.remove(&number) } else { None }
    }

    /// The buffers of those that are in flight, none of which will be read, and the connection, closed by dropping it.
    pub fn into_bufs(self) -> impl Iterator<Item = B> {
        self.jobs.into_values().map(|job| job.buf)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::thread;
    use std::time::Duration;

    use super::*;
    use crate::ErrorKind;

    const PIECE_BYTES: usize = 4 * REQUEST_BYTES as usize;
    const EIO: u32 = 5;

    fn take<const LEN: usize>(socket: &mut UnixStream) -> Option<[u8; LEN]> {
        let mut bytes = [0; LEN];
        socket.read_exact(&mut bytes).ok().map(|()| bytes)
    }

    /// The handshake of a server that has simple replies alone.
    fn greet(socket: &mut UnixStream, size: u64) {
        socket.write_all(b"NBDMAGICIHAVEOPT\0\x03").unwrap();
        take::<4>(socket).unwrap();
        loop {
            let header = take::<16>(socket).unwrap();
            let len = u32::from_be_bytes(header[12..].try_into().unwrap());
            socket.read_exact(&mut vec![0; len as usize]).unwrap();
            let mut reply = |kind: u32, data: &[u8]| {
                let mut bytes = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
                bytes.extend_from_slice(&header[8..12]);
                bytes.extend_from_slice(&kind.to_be_bytes());
                bytes.extend_from_slice(&u32::try_from(data.len()).unwrap().to_be_bytes());
                bytes.extend_from_slice(data);
                socket.write_all(&bytes).unwrap();
            };
            if header[8..12] == 7_u32.to_be_bytes() {
                // GO: the size, and flags without a right to further connections.
                reply(3, &[&[0, 0][..], &size.to_be_bytes(), &[0, 1]].concat());
                return reply(1, &[]);
            }
            reply(0x8000_0001, &[]);
        }
    }

    /// A request to read: its number, its place, its length. `None` where the client says goodbye.
    fn request(socket: &mut UnixStream) -> Option<(u64, u64, usize)> {
        let bytes = take::<28>(socket)?;
        let len = u32::from_be_bytes(bytes[24..].try_into().unwrap()) as usize;
        let number = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
        (bytes[6..8] == [0, 0]).then(|| (number(8), number(16), len))
    }

    fn answer(socket: &mut UnixStream, cookie: u64, error: u32, bytes: &[u8]) {
        let mut reply = 0x6744_6698_u32.to_be_bytes().to_vec();
        reply.extend_from_slice(&error.to_be_bytes());
        reply.extend_from_slice(&cookie.to_be_bytes());
        reply.extend_from_slice(bytes);
        socket.write_all(&reply).unwrap();
    }

    /// A client of a server that does this once hands were shaken; its size is 2^40.
    fn with_server<T>(serve: impl FnOnce(UnixStream) + Send, client: impl FnOnce(Reads<Vec<u8>>) -> T) -> T {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        thread::scope(|scope| {
            scope.spawn(|| {
                let (mut socket, _) = listener.accept().unwrap();
                greet(&mut socket, 1 << 40);
                serve(socket);
            });
            let uri = format!("unix:{}", path.display()).parse().unwrap();
            let connection = Connection::open(&uri, Vec::new(), Duration::from_secs(60)).unwrap();
            assert!(!connection.allows_more());
            client(Reads::new(connection))
        })
    }

    fn content(offset: u64, len: usize) -> Vec<u8> {
        (offset..).take(len).map(|at| (at / 4096 * 31 + at) as u8).collect()
    }

    #[test]
    fn replies_in_any_order_fill_the_right_buffers_and_an_error_is_of_its_own_read() {
        let places = [0, 1 << 32, 5 << 20];
        let serve = |mut socket: UnixStream| {
            let mut asked: Vec<_> = (0..3 * 4).map(|_| request(&mut socket).unwrap()).collect();
            // Backwards, with the middle of one in error.
            asked.reverse();
            for (cookie, offset, len) in asked {
                if offset == (1 << 32) + u64::from(REQUEST_BYTES) {
                    answer(&mut socket, cookie, EIO, &[]);
                } else {
                    answer(&mut socket, cookie, 0, &content(offset, len));
                }
            }
            assert_eq!(request(&mut socket), None);
        };
        with_server(serve, |mut reads| {
            for place in places {
                reads.begin(place, vec![0; PIECE_BYTES]).unwrap();
            }
            assert_eq!(reads.in_flight(), 3);
            for place in places.into_iter().rev() {
                let (buf, result) = reads.wait_one().unwrap().unwrap();
                if place == 1 << 32 {
                    let error = result.unwrap_err();
                    assert_eq!(error.kind(), ErrorKind::Refused);
                    let said = error.to_string();
                    assert!(said.contains("262144 bytes at byte 4295229440: input/output error"), "{said}");
                } else {
                    result.unwrap();
                    assert!(buf == content(place, PIECE_BYTES));
                }
            }
            assert!(reads.wait_one().unwrap().is_none());
        });
    }

    #[test]
    fn a_server_that_takes_nothing_while_it_answers_is_not_flooded() {
        const JOBS: usize = 200;
        let (begun, all_begun) = std::sync::mpsc::channel();
        let serve = move |mut socket: UnixStream| {
            // So many, and not one more before there is an answer.
            let mut asked: VecDeque<_> = (0..MAX_REQUESTS).map(|_| request(&mut socket).unwrap()).collect();
            all_begun.recv().unwrap();
            socket.set_nonblocking(true).unwrap();
            assert!(socket.read(&mut [0]).is_err(), "it asks for more");
            socket.set_nonblocking(false).unwrap();
            for number in 0..JOBS * 4 {
                let (cookie, offset, len) = asked.pop_front().unwrap();
                answer(&mut socket, cookie, 0, &content(offset, len));
                if number + MAX_REQUESTS < JOBS * 4 {
                    asked.push_back(request(&mut socket).unwrap());
                }
            }
        };
        with_server(serve, |mut reads| {
            for number in 0..JOBS as u64 {
                reads.begin(number * PIECE_BYTES as u64, vec![0; PIECE_BYTES]).unwrap();
            }
            begun.send(()).unwrap();
            for number in 0..JOBS as u64 {
                let (buf, result) = reads.wait_one().unwrap().unwrap();
                result.unwrap();
                assert!(buf == content(number * PIECE_BYTES as u64, PIECE_BYTES));
            }
        });
    }

    #[test]
    fn a_connection_that_ends_gives_the_buffers_back() {
        let serve = |mut socket: UnixStream| {
            let (cookie, offset, len) = request(&mut socket).unwrap();
            answer(&mut socket, cookie, 0, &content(offset, len));
        };
        with_server(serve, |mut reads| {
            reads.begin(0, vec![1; PIECE_BYTES]).unwrap();
            reads.begin(1 << 30, vec![2; PIECE_BYTES]).unwrap();
            let error = reads.wait_one().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Peer);
            assert!(reads.begin(0, Vec::new()).is_err(), "it is over");
            assert_eq!(reads.into_bufs().filter(|buf| buf.len() == PIECE_BYTES).count(), 2);
        });
    }

    #[test]
    fn whoever_is_no_longer_waited_for_ends_the_wait() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        // Whoever connects is never greeted.
        let _listener = UnixListener::bind(&path).unwrap();
        let uri = format!("unix:{}", path.display()).parse().unwrap();
        let patience = super::super::Patience::until(Duration::MAX, || true);
        let error = Connection::open(&uri, Vec::new(), patience).unwrap_err();
        assert!(error.to_string().contains("nobody waits"), "{error}");
        let error = Connection::open(&uri, Vec::new(), Duration::from_millis(1)).unwrap_err();
        assert!(error.to_string().contains("does not answer"), "{error}");
    }
}
