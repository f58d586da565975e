//! Sockets that systemd listens at for us: `LISTEN_FDS` and `LISTEN_PID`, see sd_listen_fds(3).

use std::os::fd::OwnedFd;
use std::sync::OnceLock;

use listenfd::ListenFd;
use parking_lot::Mutex;

use super::Listener;
use crate::{Access, Error, ErrorKind, Result};

/// What was given, each until it is taken. The variables are read once, and gone then: no child is to take them for its own.
fn given() -> &'static Mutex<ListenFd> {
    static GIVEN: OnceLock<Mutex<ListenFd>> = OnceLock::new();
    GIVEN.get_or_init(|| Mutex::new(ListenFd::from_env()))
}

/// Whether systemd, or whoever does as it does, has given this process sockets.
#[must_use]
pub fn is_activated() -> bool {
    given().lock().len() > 0
}

/// All of them.
pub(super) fn listeners(access: &Access) -> Result<Vec<Listener>> {
    let sockets = take()?;
    if sockets.is_empty() {
        return Err(Error::new(
            ErrorKind::InvalidAddress,
            "systemd has given no sockets: LISTEN_FDS and LISTEN_PID are not set for this process; start it by a \
             .socket unit, or by systemd-socket-activate",
        ));
    }
    // The files of these sockets are systemd's.
    let adopted = sockets.into_iter().map(|socket| {
        let listener = Listener::adopt(socket, access, false)?;
        listener.own(access)?;
        Ok(listener)
    });
    adopted.collect()
}

/// Takes the sockets. There are none where they were taken before.
pub(crate) fn take() -> Result<Vec<OwnedFd>> {
    let mut given = given().lock();
    let failed = |source| Error::io("cannot use the sockets that systemd gave", source);
    let mut sockets = Vec::new();
    for index in 0..given.len() {
        // AF_INET stands for both. One that is refused can be asked for again.
        let families = [libc::AF_UNIX, libc::AF_INET, libc::AF_VSOCK];
        let mut taken = Ok(None);
        for family in families {
            taken = given.take_custom::<OwnedFd>(index, family, libc::SOCK_STREAM, "stream socket");
            if taken.is_ok() {
                break;
            }
        }
        sockets.extend(taken.map_err(failed)?);
    }
    Ok(sockets)
}
