//! What is known of a range without reading it: so `nbdinfo --map` and `qemu-img map` show how far a restore is.
//!
//! | | depth | hole, zero | dirty |
//! |---|---|---|---|
//! | home | 1 | what the target says | `G` |
//! | absent, a zero chunk | 2 | both | `G` |
//! | absent, data | 2 | neither | `G` |

use std::ops::Range;

use block::{ByteRange, Extent, ExtentState, Result};

use super::device::LiveDevice;

const DEPTH_HOME: u32 = 1;
const DEPTH_BACKUP: u32 = 2;
/// Absent chunks that are looked at for one answer: a shard has others to serve. Whoever wants more asks again.
const MOST_CHUNKS: u64 = 1 << 18;

impl LiveDevice {
    pub(super) async fn extents_of(&self, range: ByteRange, limit: usize) -> Result<Vec<Extent>> {
        let map = &self.session.map;
        let mut extents = Extents { list: Vec::new(), limit: limit.max(1), range, chunks_left: MOST_CHUNKS };
        for (blocks, is_home) in map.v().runs(map.blocks(range)) {
            let went_on = if is_home {
                self.home_extents(blocks, &mut extents).await?
            } else {
                self.absent_extents(blocks, &mut extents)
            };
            if !went_on {
                break;
            }
        }
        Ok(extents.list)
    }

    async fn home_extents(&self, blocks: Range<u64>, extents: &mut Extents) -> Result<bool> {
        let map = &self.session.map;
        for (run, dirty) in map.g().runs(blocks) {
            let bytes = map.bytes(&run).intersection(extents.range);
            let mut at = bytes.start();
            while at < bytes.end() {
                let rest = ByteRange::from_bounds(at, bytes.end());
                let below = self.target.extents(rest, extents.limit).await?;
                if below.is_empty() {
                    return Ok(false);
                }
                for extent in below {
                    let state = ExtentState { depth: DEPTH_HOME, dirty, ..extent.state };
                    at = extent.range.end();
                    if !extents.push(extent.range, state) {
                        return Ok(false);
                    }
                }
            }
        }
        Ok(true)
    }

    fn absent_extents(&self, blocks: Range<u64>, extents: &mut Extents) -> bool {
        let map = &self.session.map;
        let chunk_size = u64::from(map.disk().chunk_size);
        for (run, dirty) in map.g().runs(blocks) {
            let bytes = map.bytes(&run).intersection(extents.range);
            for (chunk, part) in bytes.split(chunk_size) {
                if extents.chunks_left == 0 {
                    return false;
                }
                extents.chunks_left -= 1;
                let zero = self.session.source.is_zero(chunk);
                if !extents.push(part, ExtentState { hole: zero, zero, depth: DEPTH_BACKUP, dirty }) {
                    return false;
                }
            }
        }
        true
    }
}

struct Extents {
    list: Vec<Extent>,
    limit: usize,
    range: ByteRange,
    chunks_left: u64,
}

impl Extents {
    /// Adds what comes next. False where there is no room for it.
    fn push(&mut self, range: ByteRange, state: ExtentState) -> bool {
        let count = self.list.len();
        match self.list.last_mut() {
            Some(last) if last.state == state => {
                last.range = ByteRange::from_bounds(last.range.start(), range.end());
            }
            _ if count == self.limit => return false,
            _ => self.list.push(Extent { range, state }),
        }
        true
    }
}
