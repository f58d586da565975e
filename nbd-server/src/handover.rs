//! Handing a server over to a new process of the same program, on one machine.
//!
//! The sockets on which clients come never stop to listen: the new process gets them by `SCM_RIGHTS`, and whoever connects in between
//! waits in their queues. docs/nbd.md, "Hand-over", has the conversation and what clients see:
//!
//! 1. the successor has checked all that it can; it says what it is going to serve, and where;
//! 2. the predecessor compares, and sends its sockets, or why not;
//! 3. the successor looks at them, and says `go`. Until then the predecessor serves, whatever becomes of the successor;
//! 4. the predecessor accepts nothing more, finishes what is in flight, and ends;
//! 5. the successor sees that end, as the connection's, and serves.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg, sockopt,
};

use crate::{Access, Error, ErrorKind, ListenAddress, Listener, Result, StdListener};

/// How long the other end may take to say a thing that it knows.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a successor may look at what it was sent.
const PATIENCE_BEFORE_GO: Duration = Duration::from_secs(60);
/// So often a successor says that it still waits.
const REMINDER: Duration = Duration::from_secs(10);
/// A longer line is refused.
const MAX_LINE_BYTES: usize = 64 << 10;
/// So many sockets at most are handed over.
const MAX_SOCKETS: usize = 64;
/// Before what is to be served.
const GREETING: &str = "lifeboot-handover 1 ";
const SOCKETS: &str = "sockets";
const REFUSED: &str = "refused ";
const GO: &str = "go";

/// Sends a line, and sockets with it.
///
/// # Errors
/// What the system says.
pub fn send_line(stream: &UnixStream, line: &str, sockets: &[Arc<Listener>]) -> io::Result<()> {
    let descriptors: Vec<BorrowedFd<'_>> = sockets.iter().map(AsFd::as_fd).collect();
    if descriptors.len() > MAX_SOCKETS {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "there are too many sockets to be handed over",
        ));
    }
    let mut line = line.as_bytes().to_vec();
    line.push(b'\n');
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_SOCKETS))];
    let mut with = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !with.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut rest = &line[..];
    while !rest.is_empty() {
        let sent = sendmsg(stream, &[io::IoSlice::new(rest)], &mut with, SendFlags::NOSIGNAL);
        match sent {
            Ok(sent) => {
                rest = &rest[sent..];
                // They went with the first bytes.
                with.clear();
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// Receives a line, and the sockets that come with it. An empty line is the end.
///
/// # Errors
/// What the system says, and where the line is too long or no text.
pub fn receive_line(stream: &UnixStream) -> io::Result<(String, Vec<OwnedFd>)> {
    let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
    let mut line = Vec::new();
    let mut sockets = Vec::new();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_SOCKETS))];
    let mut part = [0; 4096];
    while line.last() != Some(&b'\n') {
        let mut with = RecvAncillaryBuffer::new(&mut space);
        let received = match recvmsg(
            stream,
            &mut [io::IoSliceMut::new(&mut part)],
            &mut with,
            RecvFlags::CMSG_CLOEXEC,
        ) {
            Ok(received) => received,
            Err(Errno::INTR) => continue,
            Err(errno) => return Err(errno.into()),
        };
        for message in with.drain() {
            if let RecvAncillaryMessage::ScmRights(given) = message {
                sockets.extend(given);
            }
        }
        if received.bytes == 0 {
            break;
        }
        line.extend_from_slice(&part[..received.bytes]);
        if line.len() > MAX_LINE_BYTES || sockets.len() > MAX_SOCKETS {
            return Err(invalid("the other end says too much"));
        }
    }
    let line = String::from_utf8(line).map_err(|_| invalid("the other end says what is no text"))?;
    Ok((line.trim_end_matches('\n').to_owned(), sockets))
}

/// The sockets that a predecessor sent are these addresses, each of which was asked for, and no others.
///
/// # Errors
/// Where they are not: both, for people.
pub fn check_addresses(asked: &[ListenAddress], given: &[Listener]) -> std::result::Result<(), String> {
    let is_one = |asked: &ListenAddress, given: &Listener| match (asked, given.address()) {
        (ListenAddress::Systemd, _) => !given.owns_file(),
        (ListenAddress::Tcp { host, port: 0 }, ListenAddress::Tcp { host: theirs, .. }) => host == theirs,
        (asked, given) => asked == given,
    };
    let all_given = asked.iter().all(|asked| given.iter().any(|given| is_one(asked, given)));
    let all_asked = given.iter().all(|given| asked.iter().any(|asked| is_one(asked, given)));
    if all_given && all_asked {
        return Ok(());
    }
    let list = |addresses: Vec<String>| addresses.join(", ");
    Err(format!(
        "the running server listens at {}, and this one is to listen at {}",
        list(given.iter().map(|given| given.address().to_string()).collect()),
        list(asked.iter().map(ToString::to_string).collect())
    ))
}

/// Says of sockets what they themselves do not: the address as it was given, and whether the server removes the file.
#[must_use]
pub fn describe(listeners: &[Arc<Listener>]) -> Vec<(String, bool)> {
    listeners.iter().map(|listener| (listener.address().to_string(), listener.owns_file())).collect()
}

/// Takes sockets over as [`describe`] described them. They and their files are the predecessor's until [`Listener::own`].
///
/// # Errors
/// Where there are more or less, or one cannot be served.
pub fn adopt(sockets: Vec<OwnedFd>, described: &[(String, bool)], access: &Access) -> Result<Vec<Listener>> {
    if sockets.len() != described.len() {
        return Err(Error::new(
            ErrorKind::InvalidAddress,
            format!("the running server spoke of {} sockets, and sent {}", described.len(), sockets.len()),
        ));
    }
    let adopted = sockets.into_iter().zip(described).map(|(socket, (address, owns_file))| {
        let listener = Listener::adopt(socket, access, *owns_file)?;
        listener.leave_file();
        Ok(listener.called(address.parse()?))
    });
    adopted.collect()
}

/// Where a server meets its successor.
#[derive(Debug)]
pub struct MeetingPoint {
    listener: Arc<Listener>,
}

/// Who is at a meeting point.
#[derive(Debug)]
pub enum Arrival {
    /// Nobody: this is the first server.
    First(MeetingPoint),
    /// A server that is ready to be succeeded.
    Successor(Successor),
}

/// A new process, which has what it needs from the old one, that still serves.
#[derive(Debug)]
pub struct Successor {
    stream: UnixStream,
    point: Listener,
    listeners: Vec<Listener>,
    access: Access,
}

/// What a successor serves with, once its predecessor has ended.
#[derive(Debug)]
pub struct Succession {
    /// Where it meets its own successor.
    pub point: MeetingPoint,
    /// Where clients come.
    pub listeners: Vec<Listener>,
}

impl MeetingPoint {
    /// Comes to the meeting point at `path`. `identity` is all of what is served, in one line: a server of anything else is not
    /// succeeded.
    ///
    /// # Errors
    /// Where a server is there and is not to be succeeded: it goes on as it was. Where the path cannot be had.
    pub fn arrive(path: &Path, identity: &str, asked: &[ListenAddress], access: &Access) -> Result<Arrival> {
        let failed =
            |source| Error::io(format!("cannot take over from the server at {}", path.display()), source);
        let stream = match UnixStream::connect(path) {
            Ok(stream) => stream,
            Err(error)
                if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) =>
            {
                let bound = Listener::bind(&ListenAddress::Unix(path.to_owned()), &for_meeting(access))?;
                let listener = bound.into_iter().next().map(Arc::new);
                let listener = listener.ok_or_else(|| failed(io::ErrorKind::AddrNotAvailable.into()))?;
                return Ok(Arrival::First(Self { listener }));
            }
            Err(error) => return Err(failed(error)),
        };
        stream.set_read_timeout(Some(PATIENCE)).map_err(failed)?;
        send_line(&stream, &format!("{GREETING}{identity}"), &[]).map_err(failed)?;
        let refused = |why: &str| {
            Error::new(
                ErrorKind::AddressInUse,
                format!("cannot take over from the server at {}, which goes on: {why}", path.display()),
            )
        };
        let (line, sockets) = receive_line(&stream).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => refused(&format!(
                "{} did not answer in {} s; it is stopped, or another successor is with it: look at it, then try again",
                who_listens(&stream),
                PATIENCE.as_secs()
            )),
            _ => failed(error),
        })?;
        if let Some(why) = line.strip_prefix(REFUSED) {
            return Err(refused(why));
        }
        let mut words = line.split(' ');
        if words.next() != Some(SOCKETS) {
            return Err(refused("it is not understood; is it another version?"));
        }
        let described = words.map(|word| {
            word.split_at_checked(1).and_then(|(sign, word)| Some((unescaped(word)?, sign == "+")))
        });
        let described =
            described.collect::<Option<Vec<_>>>().ok_or_else(|| refused("it is not understood"))?;
        let mut listeners = adopt(sockets, &described, access)?;
        if listeners.is_empty() {
            return Err(refused("it sent no sockets"));
        }
        let point = listeners.remove(0);
        check_addresses(asked, &listeners).map_err(|why| refused(&why))?;
        Ok(Arrival::Successor(Successor { stream, point, listeners, access: access.clone() }))
    }

    /// Waits for a successor on a thread of its own, and answers whoever comes. Once one says `go`, `depart` is called, and the
    /// server that `listeners` are of is to end. The sockets' files stay then.
    ///
    /// # Errors
    /// Where a thread cannot be had.
    pub fn wait(
        &self,
        identity: String,
        listeners: &[Arc<Listener>],
        depart: impl FnOnce(Departure) + Send + 'static,
    ) -> Result<()> {
        let failed = |source| Error::io("cannot wait for a successor", source);
        let Ok(StdListener::Unix(incoming)) = self.listener.to_std() else {
            return Err(failed(io::ErrorKind::Unsupported.into()));
        };
        // Not ours: whoever ends without a successor takes the files away.
        let sockets: Vec<_> = std::iter::once(&self.listener).chain(listeners).map(Arc::downgrade).collect();
        let wait = move || depart(await_successor(&incoming, &identity, &sockets));
        std::thread::Builder::new().name("nbd-handover".to_owned()).spawn(wait).map_err(failed)?;
        Ok(())
    }
}

/// A successor said `go`. It sees the end of this process as that of the connection.
#[derive(Debug)]
pub struct Departure {
    _stream: UnixStream,
    _sockets: Vec<Arc<Listener>>,
}

fn await_successor(incoming: &UnixListener, identity: &str, sockets: &[Weak<Listener>]) -> Departure {
    loop {
        let met = accept(incoming).and_then(|stream| meet(stream, identity, sockets));
        match met {
            Ok(Some(departure)) => return departure,
            Ok(None) => {}
            Err(error) => {
                tracing::warn!(%error, "a successor came, and nothing came of it: this server goes on");
                // Where nobody can be accepted, that fails at once again.
                std::thread::sleep(Duration::from_millis(50));
            }
        }
    }
}

/// Whoever comes, waited for as long as it takes. A successor shares the socket: whether accepting blocks is not ours to say.
fn accept(incoming: &UnixListener) -> io::Result<UnixStream> {
    loop {
        match rustix::event::poll(&mut [PollFd::new(incoming, PollFlags::IN)], None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        match incoming.accept() {
            Ok((stream, _)) => return Ok(stream),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => return Err(error),
        }
    }
}

/// One conversation with whoever came.
fn meet(stream: UnixStream, identity: &str, sockets: &[Weak<Listener>]) -> io::Result<Option<Departure>> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let who = sockopt::socket_peercred(&stream)?.uid;
    if !who.is_root() && who != rustix::process::geteuid() {
        send_line(&stream, &format!("{REFUSED}it is another user's"), &[])?;
        return Ok(None);
    }
    let (line, _) = receive_line(&stream)?;
    let Some(theirs) = line.strip_prefix(GREETING) else {
        send_line(&stream, &format!("{REFUSED}it speaks another version"), &[])?;
        return Ok(None);
    };
    if theirs != identity {
        send_line(
            &stream,
            &format!("{REFUSED}it serves {identity}, and the new one is to serve {theirs}"),
            &[],
        )?;
        return Ok(None);
    }
    let Some(sockets) = sockets.iter().map(Weak::upgrade).collect::<Option<Vec<_>>>() else {
        send_line(&stream, &format!("{REFUSED}it is ending"), &[])?;
        return Ok(None);
    };
    let described = describe(&sockets).into_iter();
    let words =
        described.map(|(address, owns)| format!(" {}{}", if owns { '+' } else { '-' }, escaped(&address)));
    send_line(&stream, &format!("{SOCKETS}{}", words.collect::<String>()), &sockets)?;
    stream.set_read_timeout(Some(PATIENCE_BEFORE_GO))?;
    let (line, _) = receive_line(&stream)?;
    if line == GO {
        sockets.iter().for_each(|socket| socket.leave_file());
        return Ok(Some(Departure { _stream: stream, _sockets: sockets }));
    }
    tracing::warn!("a successor left before it took over: this server goes on");
    Ok(None)
}

impl Successor {
    /// Takes over: the predecessor finishes and ends, which is waited for.
    ///
    /// # Errors
    /// Where the predecessor went away before it heard of it: it may go on, or have died. Where the sockets cannot be made ours.
    pub fn take_over(self) -> Result<Succession> {
        let Self { stream, point, listeners, access } = self;
        send_line(&stream, GO, &[])
            .map_err(|source| Error::io("the server that was to be succeeded is gone", source))?;
        wait_for_end(&stream);
        listeners.iter().try_for_each(|listener| listener.own(&access))?;
        point.own(&for_meeting(&access))?;
        Ok(Succession { point: MeetingPoint { listener: Arc::new(point) }, listeners })
    }
}

/// Whoever meets there may take the disks away: that is for us alone.
fn for_meeting(access: &Access) -> Access {
    Access { socket_mode: 0o600, ..access.clone() }
}

/// The process at the other end, as far as it can be known: a socket that was handed over still has the number of the process that made it.
fn who_listens(stream: &UnixStream) -> String {
    let comm = |pid: &str| std::fs::read_to_string(format!("/proc/{pid}/comm")).ok();
    let pid = sockopt::socket_peercred(stream).map(|who| who.pid.to_string()).ok();
    match pid.filter(|pid| comm(pid).is_some_and(|name| Some(name) == comm("self"))) {
        Some(pid) => format!("it (process {pid})"),
        None => "it".to_owned(),
    }
}

/// Waits for the end of the process at the other end, as long as that takes.
pub fn wait_for_end(stream: &UnixStream) {
    // Where no timeout can be set, it is only not said that it takes long.
    let _ = stream.set_read_timeout(Some(REMINDER));
    loop {
        match receive_line(stream) {
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                tracing::warn!("waiting for the old server to finish what is in flight");
            }
            Ok((line, _)) if !line.is_empty() => {}
            _ => return,
        }
    }
}

/// A word: without spaces, and on one line.
fn escaped(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'%' | 0..=b' ' | 127.. => format!("%{byte:02X}"),
            _ => char::from(byte).to_string(),
        })
        .collect()
}

fn unescaped(word: &str) -> Option<String> {
    let mut bytes = Vec::new();
    let mut rest = word.as_bytes();
    while let [first, tail @ ..] = rest {
        rest = tail;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let digits = std::str::from_utf8(tail.get(..2)?).ok()?;
        bytes.push(u8::from_str_radix(digits, 16).ok()?);
        rest = &tail[2..];
    }
    String::from_utf8(bytes).ok()
}
