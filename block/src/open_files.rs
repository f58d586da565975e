//! How many files this process may have open: asked before something is begun that fails in the middle where there are too few.

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::{Errno, fcntl_dupfd_cloexec};
use rustix::process::{Resource, getrlimit};

use crate::{Error, ErrorKind, Result};

/// Fails where this process may not open `count` files more. Found by trying: nothing else knows how many are open already.
///
/// # Errors
/// One that names the limit.
pub(crate) fn check_open_files(count: usize) -> Result<()> {
    let open_all = || {
        let first = memfd_create("lifeboot-probe", MemfdFlags::CLOEXEC)?;
        (1..count)
            .map(|_| fcntl_dupfd_cloexec(&first, 0))
            .collect::<std::result::Result<Vec<_>, _>>()
            .map(drop)
    };
    match open_all() {
        Err(Errno::MFILE) => Err(too_few(count)),
        // Where no file can be made in memory for another reason, whatever needs files says so.
        Ok(()) | Err(_) => Ok(()),
    }
}

fn too_few(count: usize) -> Error {
    let limit = getrlimit(Resource::Nofile).current;
    let limit = limit.map_or_else(|| "any".to_owned(), |limit| limit.to_string());
    Error::new(
        ErrorKind::Io,
        format_args!(
            "this process may have no more than {limit} files open, and needs {count} beside those that it has: raise its limit \
             (`ulimit -n 1024`, or LimitNOFILE= of its systemd unit)"
        ),
    )
}
