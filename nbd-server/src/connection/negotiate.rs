//! The handshake of one connection: the pure states of `proto`, a socket, and nothing else.

use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::rc::Rc;

use block::BlockDevice;
use bytes::{Buf, BytesMut};
use proto::server::{Agreed, Ending, Handshake, Step};

use crate::directory::{ConnectionDirectory, OpenDevices};
use crate::socket::Socket;

const READ_BYTES: usize = 4096;

/// A connection that may transmit.
pub(crate) struct Negotiated {
    pub(crate) socket: Socket,
    pub(crate) agreed: Agreed,
    pub(crate) device: Rc<dyn BlockDevice>,
    /// What the client sent after the handshake.
    pub(crate) rest: BytesMut,
}

/// Why a handshake came to nothing.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failed {
    #[error(transparent)]
    Ended(#[from] Ending),
    #[error("the socket failed: {0}")]
    Io(#[from] io::Error),
    #[error("the client went away")]
    Gone,
}

/// Shakes hands. May be dropped at any point.
pub(crate) async fn negotiate(mut socket: Socket, devices: &Rc<OpenDevices>) -> Result<Negotiated, Failed> {
    let directory = ConnectionDirectory::new(Rc::clone(devices));
    let mut handshake = Handshake::new();
    let mut buf = [0; READ_BYTES];
    loop {
        let step = handshake.step(&directory);
        send(&socket, handshake.take_output()).await?;
        match step {
            Step::Answered => {}
            Step::Waiting => match poll_fn(|cx| socket.poll_read(cx, &mut buf)).await? {
                0 => return Err(Failed::Gone),
                len => handshake.receive(&buf[..len]),
            },
            Step::Closed(ending) => return Err(ending.into()),
            Step::Transmission(agreed) => {
                let device = directory.into_device(agreed.export).ok_or(Failed::Gone)?;
                let device = device.for_client().unwrap_or(device);
                return Ok(Negotiated { socket, agreed: *agreed, device, rest: handshake.into_rest() });
            }
        }
    }
}

async fn send(socket: &Socket, mut bytes: BytesMut) -> io::Result<()> {
    while !bytes.is_empty() {
        match socket.try_send(&[IoSlice::new(&bytes)], false) {
            Ok(sent) => bytes.advance(sent),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                poll_fn(|cx| socket.poll_writable(cx)).await?;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
