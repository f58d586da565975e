//! A server without a disk: it answers every request with zeroes or thanks, as soon as it can.
//!
//! What it yields is what the client, its socket and the kernel leave to any server: nobody can be faster by much.

use std::io::{self, IoSlice, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::{Buf, BytesMut};
use proto::server::{Agreed, Directory, ExportId, Handshake, Head, Listing, Refusal, ReplyEncoder, Step};
use proto::wire::{BlockSizes, CommandKind, ExportInfo, MetaContext, RequestHeader, TransmissionFlags};
use rustix::net::RecvFlags;

use crate::peers::{EXPORT, Serving};

const RECEIVE_BYTES: usize = 256 << 10;
/// What reads are answered with, again and again: it stays in the processor's cache.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];
/// Processors of this machine.
static PROCESSORS: LazyLock<usize> =
    LazyLock::new(|| std::thread::available_parallelism().map_or(1, usize::from));
/// For how long a request of a lone client is looked for without sleeping.
const AWAKE: Duration = Duration::from_micros(100);

/// The server; it ends when it is dropped.
#[derive(Debug)]
pub(crate) struct NoDisk {
    is_over: Arc<AtomicBool>,
    acceptor: Option<JoinHandle<()>>,
    socket: std::path::PathBuf,
}

impl NoDisk {
    /// Listens at `socket`, with an export of so many bytes.
    pub(crate) fn start(socket: &Path, size: u64) -> Result<Self> {
        let listener = UnixListener::bind(socket)
            .with_context(|| format!("cannot listen at the unix socket {}", socket.display()))?;
        let is_over = Arc::new(AtomicBool::new(false));
        let over = Arc::clone(&is_over);
        let acceptor = std::thread::Builder::new().name("no-disk".into()).spawn(move || {
            let present = Arc::new(AtomicUsize::new(0));
            for stream in listener.incoming().map_while(Result::ok) {
                if over.load(Ordering::Relaxed) {
                    return;
                }
                let present = Arc::clone(&present);
                std::thread::spawn(move || {
                    present.fetch_add(1, Ordering::Relaxed);
                    // It ends with its client, in whatever way.
                    let _ = serve(stream, size, &present);
                    present.fetch_sub(1, Ordering::Relaxed);
                });
            }
        })?;
        Ok(Self { is_over, acceptor: Some(acceptor), socket: socket.to_owned() })
    }
}

impl Drop for NoDisk {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        // Who waits for a client looks up.
        drop(UnixStream::connect(&self.socket));
        if let Some(acceptor) = self.acceptor.take() {
            // It has nothing to say.
            let _ = acceptor.join();
        }
    }
}

impl Serving for NoDisk {
    fn pid(&self) -> Option<u32> {
        Some(std::process::id())
    }

    fn end(self: Box<Self>) -> Result<()> {
        Ok(())
    }
}

/// The one export.
struct Only(u64);

impl Directory for Only {
    fn list(&self) -> Vec<Listing> {
        vec![Listing { name: EXPORT.to_owned(), description: String::new() }]
    }

    fn find(&self, name: &str) -> Option<ExportId> {
        (name.is_empty() || name == EXPORT).then_some(ExportId(0))
    }

    fn why_absent(&self, _name: &str) -> Option<String> {
        None
    }

    fn contexts(&self, _export: ExportId) -> Vec<MetaContext> {
        Vec::new()
    }

    fn describe(&self, _export: ExportId) -> Result<ExportInfo, Refusal> {
        Ok(ExportInfo {
            name: EXPORT.to_owned(),
            description: String::new(),
            size: self.0,
            flags: TransmissionFlags::HAS_FLAGS
                .with(TransmissionFlags::SEND_FLUSH)
                .with(TransmissionFlags::CAN_MULTI_CONN),
            block_sizes: BlockSizes::DEFAULT,
        })
    }
}

fn shake_hands(stream: &mut UnixStream, size: u64) -> Result<(Box<Agreed>, BytesMut)> {
    let mut handshake = Handshake::new();
    let mut received = [0; 4096];
    loop {
        let step = handshake.step(&Only(size));
        stream.write_all(&handshake.take_output())?;
        match step {
            Step::Answered => {}
            Step::Transmission(agreed) => return Ok((agreed, handshake.into_rest())),
            Step::Waiting => {
                let len = stream.read(&mut received)?;
                ensure!(len > 0, "the client left");
                handshake.receive(&received[..len]);
            }
            Step::StartTls | Step::Closed(_) => anyhow::bail!("the handshake ended"),
        }
    }
}

/// A reply: its head, and how many bytes of zeroes follow.
type Reply = (Head, usize);

fn serve(mut stream: UnixStream, size: u64, present: &AtomicUsize) -> Result<()> {
    // As our server has it.
    rustix::net::sockopt::set_socket_send_buffer_size(&stream, 2 << 20)?;
    let (agreed, mut input) = shake_hands(&mut stream, size)?;
    let encoder = ReplyEncoder::new(agreed.replies);
    let mut received = vec![0; RECEIVE_BYTES].into_boxed_slice();
    let mut replies: Vec<Reply> = Vec::new();
    let mut payload: Option<(RequestHeader, usize)> = None;
    loop {
        loop {
            if let Some((header, left)) = payload.take() {
                let skipped = left.min(input.len());
                input.advance(skipped);
                if skipped < left {
                    payload = Some((header, left - skipped));
                    break;
                }
                replies.push((encoder.done(&header), 0));
            }
            let Some(header) = RequestHeader::at_front(&input, agreed.replies).ok().context("no request")?
            else {
                break;
            };
            input.advance(agreed.replies.request_bytes());
            match header.kind {
                CommandKind::Read => replies.push((encoder.data(&header), header.len as usize)),
                CommandKind::Write => payload = Some((header, header.payload_len(agreed.replies) as usize)),
                CommandKind::Disconnect => return Ok(()),
                _ => replies.push((encoder.done(&header), 0)),
            }
        }
        send(&mut stream, &replies)?;
        replies.clear();
        let len = receive(&mut stream, &mut received, 2 * present.load(Ordering::Relaxed) <= *PROCESSORS)?;
        ensure!(len > 0, "the client left");
        input.extend_from_slice(&received[..len]);
    }
}

fn receive(stream: &mut UnixStream, buf: &mut [u8], is_alone: bool) -> io::Result<usize> {
    let begun = Instant::now();
    while is_alone && begun.elapsed() < AWAKE {
        match rustix::net::recv(&mut *stream, &mut *buf, RecvFlags::DONTWAIT) {
            Ok((len, _)) => return Ok(len),
            Err(rustix::io::Errno::AGAIN) => std::hint::spin_loop(),
            Err(errno) => return Err(errno.into()),
        }
    }
    stream.read(buf)
}

/// Sends replies, as many in a call as the system takes.
fn send(stream: &mut UnixStream, replies: &[Reply]) -> io::Result<()> {
    let mut slices = Vec::new();
    for (head, len) in replies {
        slices.push(IoSlice::new(head));
        let mut left = *len;
        while left > 0 {
            let piece = left.min(ZEROES.len());
            slices.push(IoSlice::new(&ZEROES[..piece]));
            left -= piece;
        }
    }
    let mut slices = &mut slices[..];
    while !slices.is_empty() {
        let sent = stream.write_vectored(slices)?;
        IoSlice::advance_slices(&mut slices, sent);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::Client;

    #[test]
    fn reads_are_zeroes_and_writes_are_thanked_for() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let server = NoDisk::start(&socket, 4 << 20).unwrap();
        let mut client = Client::connect(&socket, EXPORT).unwrap();
        assert_eq!(client.size(), 4 << 20);
        let mut bytes = vec![1; 200_000];
        client.read(4096, &mut bytes).unwrap();
        assert!(bytes.iter().all(|byte| *byte == 0));
        client.write(0, &vec![7; 1 << 20]).unwrap();
        client.flush().unwrap();
        drop(client);
        drop(server);
        assert!(UnixStream::connect(&socket).is_err(), "nobody listens any more");
    }
}
