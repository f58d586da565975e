//! How far an export is, asked over NBD alone: `lifeboot status --listen ADDRESS` works wherever the
//! export can be reached. The truth is in `qemu:allocation-depth` (1 home, 2 still in the backup).

use std::time::Duration;

use anyhow::{bail, ensure};
use nbd_server::client::{Connection, NbdUri};
use proto::wire::{ContextId, Descriptor, MetaContext};
use serde::Serialize;

/// What one BLOCK_STATUS asks about at most, where its length has 32 bits. With extended headers it asks about all that is left.
const STEP_BYTES: u64 = 1 << 30;
/// Where the bytes lie that are home, by `qemu:allocation-depth`.
const DEPTH_BACKUP: u64 = 2;

/// What an export tells of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct RemoteStatus {
    /// The export's name.
    pub(super) export: String,
    /// Its size in bytes.
    pub(super) size: u64,
    /// Bytes that are not in the backup alone any more.
    pub(super) home_bytes: u64,
    /// Bytes still to come from the backup.
    pub(super) absent_bytes: u64,
    /// Bytes that the guest has written, if the export keeps a dirty bitmap.
    pub(super) guest_bytes: Option<u64>,
}

/// Asks a server about its export.
///
/// # Errors
/// Where it cannot be reached, does not answer as an NBD server does, or knows nothing of depths.
pub(super) fn ask(uri: &NbdUri, patience: Duration) -> anyhow::Result<RemoteStatus> {
    let bitmap = MetaContext::DirtyBitmap(crate::live_restore::DIRTY_BITMAP.to_owned());
    let mut server = Connection::open(uri, vec![MetaContext::Depth, bitmap.clone()], patience)?;
    let Some(depth) = server.context(&MetaContext::Depth) else {
        bail!("the server does not say what is home: it has no qemu:allocation-depth");
    };
    let dirty = server.context(&bitmap);
    let size = server.info().size;
    let most = if server.replies().is_extended() { u64::MAX } else { STEP_BYTES };
    let mut absent_bytes = 0;
    let mut dirty_bytes = 0;
    let mut at = 0;
    while at < size {
        let len = (size - at).min(most);
        let told = server.block_status(at, len)?;
        let extents = |wanted: ContextId| {
            told.iter().filter(move |(id, _)| *id == wanted).flat_map(|(_, descriptors)| descriptors)
        };
        // Each context may stop short of the request's end, and each elsewhere.
        let reach = |wanted: ContextId| extents(wanted).map(|extent| extent.len).sum::<u64>();
        let step = dirty.map_or(u64::MAX, &reach).min(reach(depth)).min(len);
        ensure!(step > 0, "the server told nothing about byte {at}");
        absent_bytes += covered(extents(depth), step, |flags| flags >= DEPTH_BACKUP);
        if let Some(dirty) = dirty {
            dirty_bytes += covered(extents(dirty), step, |flags| flags & Descriptor::DIRTY != 0);
        }
        at += step;
    }
    Ok(RemoteStatus {
        export: server.info().name.clone(),
        size,
        home_bytes: size - absent_bytes,
        absent_bytes,
        guest_bytes: dirty.map(|_| dirty_bytes),
    })
}

/// How many of the first `reach` bytes lie in extents whose flags `count`.
fn covered<'a>(
    extents: impl Iterator<Item = &'a Descriptor>,
    reach: u64,
    count: impl Fn(u64) -> bool,
) -> u64 {
    let mut left = reach;
    let mut sum = 0;
    for extent in extents {
        let len = extent.len.min(left);
        left -= len;
        if count(extent.flags) {
            sum += len;
        }
    }
    sum
}
