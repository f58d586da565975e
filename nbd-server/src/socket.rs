//! A connection's socket, unix or TCP, with TLS on it or without: on the event loop of its shard, read and written without blocking.

use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, sendmsg, sockopt};
use tokio::io::{AsyncRead, Interest, ReadBuf};
use tokio::net::{TcpStream, UnixStream};

use crate::tls::{MAX_UNSENT_BYTES, TlsSocket};

/// How much of a file is copied at a time where it is sent that way: each piece wakes the peer once more.
const PIECE_BYTES: usize = 1 << 20;
/// Room for replies in the kernel: with it `sendfile` need not wait for the peer between its pieces.
const SEND_BUFFER_BYTES: usize = 2 << 20;

/// An accepted socket on its way to a shard.
#[derive(Debug)]
pub(crate) enum Accepted {
    Unix(std::os::unix::net::UnixStream),
    Tcp(std::net::TcpStream),
}

/// A socket on the calling thread's event loop.
#[derive(Debug)]
pub(crate) enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
    Tls(Box<TlsSocket>),
}

thread_local! {
    static PIECE: RefCell<Vec<u8>> = RefCell::new(vec![0; PIECE_BYTES]);
}

/// Has `send` send a piece of a file by way of memory that stays in the processor's cache; 0 where the file ends there.
fn send_copied(
    file: BorrowedFd<'_>,
    offset: u64,
    len: usize,
    send: impl FnOnce(&[u8]) -> io::Result<usize>,
) -> io::Result<usize> {
    PIECE.with_borrow_mut(|piece| {
        match rustix::io::pread(file, &mut piece[..len.min(PIECE_BYTES)], offset)? {
            0 => Ok(0),
            read => send(&piece[..read]),
        }
    })
}

impl Socket {
    /// Takes a nonblocking socket into the calling thread's event loop.
    pub(crate) fn from_accepted(accepted: Accepted) -> io::Result<Self> {
        match accepted {
            Accepted::Unix(stream) => Ok(Self::Unix(UnixStream::from_std(stream)?)),
            Accepted::Tcp(stream) => {
                stream.set_nodelay(true)?;
                sockopt::set_socket_keepalive(&stream, true)?;
                Ok(Self::Tcp(TcpStream::from_std(stream)?))
            }
        }
    }

    /// Gives a unix socket room for large replies, as far as the system allows. TCP finds its own: where it is fixed, a congestion
    /// control that paces (BBR) has the first replies of a connection wait 50 ms.
    pub(crate) fn enlarge_send_buffer(&self) {
        match self {
            Self::Unix(_) => {}
            Self::Tcp(_) => return,
            Self::Tls(socket) => return socket.enlarge_send_buffer(),
        }
        if let Err(error) = sockopt::set_socket_send_buffer_size(self, SEND_BUFFER_BYTES) {
            tracing::debug!(%error, "the socket's send buffer stays as it is");
        }
    }

    /// Reads what is there, at most `buf.len()` bytes; 0 at the peer's end.
    pub(crate) fn poll_read(&mut self, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        let mut buf = ReadBuf::new(buf);
        loop {
            let received = ready!(match self {
                Self::Unix(stream) => Pin::new(stream).poll_read(cx, &mut buf),
                Self::Tcp(stream) => Pin::new(stream).poll_read(cx, &mut buf),
                Self::Tls(socket) => return socket.poll_read(cx, buf.initialize_unfilled()),
            });
            match received {
                Ok(()) => return Poll::Ready(Ok(buf.filled().len())),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    /// Reads what is there, if anything is, without a word to the event loop: that may say later that there is
    /// something, when there is not. The peer's end, and what is wrong with a plain socket, are found by [`Socket::poll_read`].
    pub(crate) fn try_read(&mut self, buf: &mut [u8]) -> Option<io::Result<usize>> {
        match self {
            Self::Tls(socket) => socket.try_read(buf),
            _ => self.try_receive(buf).map(Ok),
        }
    }

    /// Receives what is there, as it is on the wire: under TLS it is encrypted.
    pub(crate) fn try_receive(&self, buf: &mut [u8]) -> Option<usize> {
        rustix::net::recv(self, buf, RecvFlags::DONTWAIT).ok().map(|(len, _)| len).filter(|len| *len > 0)
    }

    /// Waits until something can be written.
    pub(crate) fn poll_writable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Unix(stream) => stream.poll_write_ready(cx),
            Self::Tcp(stream) => stream.poll_write_ready(cx),
            Self::Tls(socket) => socket.poll_writable(cx),
        }
    }

    /// Whether all that was taken by [`Socket::try_send`] is on its way: under TLS some of it may be encrypted and wait.
    pub(crate) fn is_flushed(&self) -> bool {
        match self {
            Self::Unix(_) | Self::Tcp(_) => true,
            Self::Tls(socket) => socket.is_flushed(),
        }
    }

    /// Sends what waits of that; [`Socket::is_flushed`] says whether all of it went.
    pub(crate) fn try_flush(&mut self) -> io::Result<()> {
        match self {
            Self::Unix(_) | Self::Tcp(_) => Ok(()),
            Self::Tls(socket) => socket.try_flush().map(|_| ()),
        }
    }

    /// Sends what fits of `slices`; `more` says that more follows at once. `WouldBlock` where nothing fits.
    pub(crate) fn try_send(&mut self, slices: &[IoSlice<'_>], more: bool) -> io::Result<usize> {
        if let Self::Tls(socket) = self {
            return socket.try_send(slices);
        }
        let flags = if more { SendFlags::NOSIGNAL | SendFlags::MORE } else { SendFlags::NOSIGNAL };
        self.try_write(|fd| {
            // One slice is by far the most common, and the plain call is cheaper.
            let sent = match slices {
                [slice] => rustix::net::send(fd, slice, flags)?,
                _ => sendmsg(fd, slices, &mut SendAncillaryBuffer::default(), flags)?,
            };
            Ok(sent)
        })
    }

    /// Sends what fits of a file's bytes; 0 where the file ends there.
    pub(crate) fn try_send_file(
        &mut self,
        file: BorrowedFd<'_>,
        offset: u64,
        len: usize,
    ) -> io::Result<usize> {
        match self {
            Self::Unix(_) => self.try_write(|fd| {
                let mut offset = offset;
                Ok(rustix::fs::sendfile(fd, file, Some(&mut offset), len)?)
            }),
            // `sendfile` takes longer here: it leaves the reader the page cache's small pieces to copy, which no cache has.
            Self::Tcp(_) => self.try_write(|fd| {
                send_copied(file, offset, len, |piece| {
                    let more = if piece.len() < len { SendFlags::MORE } else { SendFlags::empty() };
                    Ok(rustix::net::send(fd, piece, SendFlags::NOSIGNAL | more)?)
                })
            }),
            Self::Tls(socket) => send_copied(file, offset, len.min(MAX_UNSENT_BYTES), |piece| {
                socket.try_send(&[IoSlice::new(piece)])
            }),
        }
    }

    fn try_write<T>(&self, mut write: impl FnMut(BorrowedFd<'_>) -> io::Result<T>) -> io::Result<T> {
        match self {
            Self::Unix(stream) => stream.try_io(Interest::WRITABLE, || write(stream.as_fd())),
            Self::Tcp(stream) => stream.try_io(Interest::WRITABLE, || write(stream.as_fd())),
            Self::Tls(_) => {
                unreachable!("what goes through TLS is encrypted first: no plain byte is sent beside it")
            }
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(stream) => stream.as_fd(),
            Self::Tcp(stream) => stream.as_fd(),
            Self::Tls(socket) => socket.as_fd(),
        }
    }
}
