//! The handshake of one connection: the pure states of `proto`, a socket, and nothing else.

use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::rc::Rc;

use block::BlockDevice;
use bytes::{Buf, BytesMut};
use proto::server::{Agreed, Ending, Handshake, Step};

use crate::directory::{ConnectionDirectory, OpenDevices};
use crate::socket::Socket;
use crate::tls::{TlsFailure, TlsMode, TlsServer};

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
    #[error("TLS came to nothing: {0}")]
    Tls(#[from] TlsFailure),
}

/// Shakes hands. May be dropped at any point.
pub(crate) async fn negotiate(
    socket: Socket,
    devices: &Rc<OpenDevices>,
    tls: Option<&TlsServer>,
) -> Result<Negotiated, Failed> {
    let mut handshake = Handshake::with_tls(tls.map_or(TlsMode::Off, TlsServer::mode));
    let result = talk(socket, devices, tls, &mut handshake).await;
    if let Some(tls) = tls.filter(|_| handshake.missed_tls()) {
        tls.say_missed();
    }
    let (agreed, socket, directory) = result?;
    let device = directory.into_device(agreed.export).ok_or(Failed::Gone)?;
    let device = device.for_client().unwrap_or(device);
    Ok(Negotiated { socket, agreed: *agreed, device, rest: handshake.into_rest() })
}

async fn talk(
    mut socket: Socket,
    devices: &Rc<OpenDevices>,
    tls: Option<&TlsServer>,
    handshake: &mut Handshake,
) -> Result<(Box<Agreed>, Socket, ConnectionDirectory), Failed> {
    let mut directory = ConnectionDirectory::new(Rc::clone(devices));
    let mut buf = [0; READ_BYTES];
    loop {
        let step = handshake.step(&directory);
        send(&mut socket, handshake.take_output()).await?;
        match step {
            Step::Answered => {}
            Step::Waiting => match poll_fn(|cx| socket.poll_read(cx, &mut buf)).await? {
                0 => return Err(Failed::Gone),
                len => handshake.receive(&buf[..len]),
            },
            Step::Closed(ending) => return Err(ending.into()),
            Step::StartTls => {
                // What a client saw without TLS is closed again: with TLS it may be another client.
                directory = ConnectionDirectory::new(Rc::clone(devices));
                let tls = tls.expect("STARTTLS is granted where there is TLS");
                socket = tls.accept(socket).await?;
                handshake.secured();
            }
            Step::Transmission(agreed) => return Ok((agreed, socket, directory)),
        }
    }
}

async fn send(socket: &mut Socket, mut bytes: BytesMut) -> io::Result<()> {
    while !bytes.is_empty() || !socket.is_flushed() {
        if bytes.is_empty() {
            poll_fn(|cx| socket.poll_writable(cx)).await?;
            socket.try_flush()?;
            continue;
        }
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
