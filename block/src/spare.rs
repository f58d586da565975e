//! Large buffers beyond those of the pools, used again and again.
//!
//! Memory of this size is mapped by the allocator for each buffer, faulted in page by page and unmapped again: for a
//! write into the page cache that costs as much as the copying. So a buffer that comes back waits here for
//! the next one who needs it. When the last in use is back, the kernel is told that it may have the memory of all
//! that wait (`MADV_FREE`): it takes it when it needs some, and who comes before it did pays nothing.
//!
//! One set for all threads, because what bounds it is the memory of the process.

use parking_lot::Mutex;

use crate::{AlignedBuf, BufferPool};

/// How many buffers wait at most: 64 MiB.
const IDLE_MAX: usize = 64;

static SPARES: Mutex<Spares> = Mutex::new(Spares { lent: 0, idle: Vec::new(), offered: Vec::new() });

struct Spares {
    /// How many are in use.
    lent: usize,
    idle: Vec<AlignedBuf>,
    /// Those whose memory the kernel may have taken: what they hold may be zeroes by now.
    offered: Vec<AlignedBuf>,
}

/// A buffer of `len` bytes that [`give_back`] takes, of the size of a pool's large ones; `None` where that would
/// be less than `len`, or twice as much.
pub(crate) fn take(len: usize) -> Option<AlignedBuf> {
    if !(BufferPool::LARGE / 2 + 1..=BufferPool::LARGE).contains(&len) {
        return None;
    }
    let idle = {
        let mut spares = SPARES.lock();
        spares.lent += 1;
        spares.idle.pop().or_else(|| spares.offered.pop())
    };
    let buf = idle.unwrap_or_else(|| AlignedBuf::zeroed(BufferPool::LARGE));
    Some(buf.into_spare(len))
}

/// Takes back what [`take`] gave, as a buffer of its own.
pub(crate) fn give_back(buf: AlignedBuf) {
    let mut spares = SPARES.lock();
    spares.lent -= 1;
    let too_many = if spares.idle.len() + spares.offered.len() < IDLE_MAX {
        spares.idle.push(buf);
        None
    } else {
        Some(buf)
    };
    let mut unused = if spares.lent == 0 { std::mem::take(&mut spares.idle) } else { Vec::new() };
    drop(spares);
    // Nobody waits for what takes its time.
    drop(too_many);
    if !unused.is_empty() {
        unused.iter_mut().for_each(AlignedBuf::offer_to_kernel);
        SPARES.lock().offered.append(&mut unused);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One test, because the set is the process's.
    #[test]
    fn buffers_wait_to_be_used_again_and_are_offered_when_none_is_in_use() {
        assert!(take(BufferPool::LARGE / 2).is_none() && take(BufferPool::LARGE + 1).is_none());
        let waiting = || {
            let spares = SPARES.lock();
            (spares.lent, spares.idle.len(), spares.offered.len())
        };
        let mut held = take(BufferPool::LARGE).unwrap();
        held.fill(1);
        let mut other = take(BufferPool::LARGE - 1).unwrap();
        assert_eq!(other.len(), BufferPool::LARGE - 1);
        other.fill(2);
        let memory = other.as_mut_ptr() as usize;
        std::thread::spawn(move || drop(other)).join().unwrap();
        assert_eq!(waiting(), (1, 1, 0));
        let mut again = take(BufferPool::LARGE / 2 + 1).unwrap();
        assert_eq!(again.as_mut_ptr() as usize, memory, "the one that came back");
        assert!(held.iter().all(|&byte| byte == 1));

        let many: Vec<_> = (0..IDLE_MAX + 3).map(|_| take(BufferPool::LARGE).unwrap()).collect();
        drop((many, again));
        assert_eq!(waiting(), (1, IDLE_MAX, 0), "and no more");
        drop(held);
        assert_eq!(waiting(), (0, 0, IDLE_MAX), "all but the last, which was one too many");
        let mut again: Vec<_> = (0..=IDLE_MAX).map(|_| take(BufferPool::LARGE).unwrap()).collect();
        assert_eq!(waiting(), (IDLE_MAX + 1, 0, 0));
        for buf in &mut again {
            assert!(buf.iter().all(|&byte| byte <= 2));
            buf.fill(3);
        }
    }
}
