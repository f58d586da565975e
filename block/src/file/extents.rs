//! Where a file has data and where it has holes.

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::Inner;
use crate::{ByteRange, Extent, ExtentState, Result};

const DATA: ExtentState = ExtentState { hole: false, zero: false, depth: 1, dirty: false };
const HOLE: ExtentState = ExtentState { hole: true, zero: true, depth: 0, dirty: false };

/// The allocated parts of `range`, at most `limit` of them. What a file that became shorter does not have any more is no hole: whoever
/// reads there meets the error.
pub(super) fn data_ranges(inner: &Inner, range: ByteRange, limit: usize) -> Result<Vec<ByteRange>> {
    if inner.support.block_device {
        return Ok(if range.is_empty() { Vec::new() } else { vec![range] });
    }
    let failed = |errno: Errno| inner.failed(format_args!("find the holes of {range} in"), errno.into());
    let mut found = Vec::new();
    let mut at = range.start();
    while at < range.end() && found.len() < limit {
        // The description's position moves, but no transfer of ours uses it.
        let start = match rustix::fs::seek(&inner.fd, SeekFrom::Data(at)) {
            Ok(start) if start < range.end() => start,
            Ok(_) => break,
            Err(Errno::NXIO) => {
                let size = rustix::fs::fstat(&inner.fd).map_err(failed)?.st_size.cast_unsigned();
                if size < range.end() {
                    found.push(ByteRange::from_bounds(at.max(size), range.end()));
                }
                break;
            }
            // A file system that knows nothing of holes.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => at,
            Err(errno) => return Err(failed(errno)),
        };
        let end = match rustix::fs::seek(&inner.fd, SeekFrom::Hole(start)) {
            Ok(end) => end.min(range.end()),
            Err(Errno::NXIO | Errno::INVAL | Errno::OPNOTSUPP) => range.end(),
            Err(errno) => return Err(failed(errno)),
        };
        found.push(ByteRange::from_bounds(start, end));
        at = end;
    }
    Ok(found)
}

/// Data and holes of `range` in turn, from its start, at most `limit` of them.
pub(super) fn extents(inner: &Inner, range: ByteRange, limit: usize) -> Result<Vec<Extent>> {
    let mut extents = Vec::new();
    let mut at = range.start();
    let data = data_ranges(inner, range, limit)?;
    let cut = data.len() == limit;
    for data in data {
        if at < data.start() {
            extents.push(Extent { range: ByteRange::from_bounds(at, data.start()), state: HOLE });
        }
        extents.push(Extent { range: data, state: DATA });
        at = data.end();
    }
    if at < range.end() && !cut {
        extents.push(Extent { range: ByteRange::from_bounds(at, range.end()), state: HOLE });
    }
    extents.truncate(limit);
    Ok(extents)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Engine, FileDisk, FileOptions};

    #[test]
    fn what_a_file_lost_at_its_end_is_no_hole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d.raw");
        let file = std::fs::File::create(&path).unwrap();
        file.set_len(1 << 20).unwrap();
        let disk = FileDisk::open(&path, FileOptions::new(Engine::THREADS)).unwrap();
        let whole = ByteRange::from_bounds(0, 1 << 20);
        assert_eq!(disk.data_ranges(whole).unwrap(), []);
        file.set_len(300_000).unwrap();
        assert_eq!(disk.data_ranges(whole).unwrap(), [ByteRange::from_bounds(300_000, 1 << 20)]);
        let beyond = ByteRange::from_bounds(500_000, 600_000);
        assert_eq!(disk.data_ranges(beyond).unwrap(), [beyond]);
    }
}
