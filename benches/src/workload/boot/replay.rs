//! Replays a trace over NBD, one request after another, and times every one of them.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::client::Client;
use crate::stats::percentile;
use crate::trace::{Op, Request};

/// What a replay took.
#[derive(Debug)]
pub(super) struct Replayed {
    /// From the first request to the last reply.
    pub(super) total: Duration,
    /// From the start of the servers to the first reply.
    pub(super) first: Duration,
    /// The median of all reads, in microseconds.
    pub(super) read_p50_micros: f64,
    /// What 99 of 100 reads stayed within.
    pub(super) read_p99_micros: f64,
    /// The slowest read.
    pub(super) read_max_micros: f64,
}

/// Replays `trace` against this export of the server at `socket`, which was started at `started`. With `check`, every read is compared
/// with that image under the writes of the trace.
pub(super) fn run(
    (socket, export): (&Path, &str),
    trace: &[Request],
    started: Instant,
    check: Option<&Path>,
) -> Result<Replayed> {
    let mut client = Client::connect(socket, export)?;
    let longest = trace.iter().map(|request| request.len as usize).max().unwrap_or(0);
    let mut buffer = vec![0; longest];
    let mut expected = check.map(Expected::new).transpose()?;
    let mut reads_micros = Vec::with_capacity(trace.len());
    let mut first = None;
    let begin = Instant::now();
    for (number, request) in trace.iter().enumerate() {
        let end = request.offset.checked_add(u64::from(request.len));
        ensure!(end.is_some_and(|end| end <= client.size()), "request {number} ends beyond the disk");
        let data = &mut buffer[..request.len as usize];
        let sent = Instant::now();
        match request.op {
            Op::Read => {
                client.read(request.offset, data)?;
                reads_micros.push(sent.elapsed().as_secs_f64() * 1e6);
            }
            Op::Write => {
                data.fill(pattern(number));
                client.write(request.offset, data)?;
            }
            Op::Flush => client.flush()?,
        }
        first.get_or_insert_with(|| started.elapsed());
        if let Some(expected) = &mut expected {
            expected.check(number, request, data)?;
        }
    }
    let total = begin.elapsed();
    let micros = |percent| percentile(&reads_micros, percent).context("the trace has no read");
    Ok(Replayed {
        total,
        first: first.context("the trace is empty")?,
        read_p50_micros: micros(50.0)?,
        read_p99_micros: micros(99.0)?,
        read_max_micros: micros(100.0)?,
    })
}

/// What the write of this number writes: no byte of a boot's data tells it from what was there before, its number does.
fn pattern(number: usize) -> u8 {
    (number % 251) as u8 | 1
}

/// What reads must yield: the image, and over it the writes so far.
struct Expected {
    image: File,
    writes: Vec<(u64, u32, u8)>,
}

impl Expected {
    fn new(image: &Path) -> Result<Self> {
        let image = File::open(image).with_context(|| format!("cannot open {}", image.display()))?;
        Ok(Self { image, writes: Vec::new() })
    }

    fn check(&mut self, number: usize, request: &Request, data: &[u8]) -> Result<()> {
        match request.op {
            Op::Flush => {}
            Op::Write => self.writes.push((request.offset, request.len, pattern(number))),
            Op::Read => {
                let mut right = vec![0; data.len()];
                self.image.read_exact_at(&mut right, request.offset)?;
                let (start, end) = (request.offset, request.offset + u64::from(request.len));
                for &(offset, len, byte) in &self.writes {
                    let from = offset.max(start);
                    let to = (offset + u64::from(len)).min(end);
                    if from < to {
                        right[(from - start) as usize..(to - start) as usize].fill(byte);
                    }
                }
                ensure!(data == right, "request {number} read wrong bytes at {}", request.offset);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_are_expected_to_show_the_image_under_the_writes_so_far() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        std::fs::write(&path, [7; 64]).unwrap();
        let mut expected = Expected::new(&path).unwrap();
        let read = Request { op: Op::Read, offset: 8, len: 16 };
        expected.check(0, &read, &[7; 16]).unwrap();
        expected.check(1, &Request { op: Op::Write, offset: 20, len: 40 }, &[]).unwrap();
        let mut right = [7; 16];
        right[12..].fill(pattern(1));
        expected.check(2, &read, &right).unwrap();
        assert!(expected.check(3, &read, &[7; 16]).is_err());
    }
}
