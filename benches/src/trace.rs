//! Boot traces: what a guest asked of its disk while it booted, one request a line, as JSON. Pure but for reading files.

use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Op {
    /// Read bytes.
    Read,
    /// Write bytes. Which ones is not recorded.
    Write,
    /// Put what was acknowledged on stable storage.
    Flush,
}

/// One request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Request {
    /// What is asked for.
    pub(crate) op: Op,
    /// Where, in bytes; 0 for a flush.
    #[serde(default)]
    pub(crate) offset: u64,
    /// How many bytes; 0 for a flush.
    #[serde(default)]
    pub(crate) len: u32,
}

/// Reads a trace of JSON lines.
pub(crate) fn load(path: &Path) -> Result<Vec<Request>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    parse(&text).with_context(|| format!("{} is no boot trace", path.display()))
}

fn parse(text: &str) -> Result<Vec<Request>> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(number, line)| serde_json::from_str(line).with_context(|| format!("line {}", number + 1)))
        .collect()
}

/// The trace as JSON lines.
pub(crate) fn to_lines(trace: &[Request]) -> String {
    let line = |request| serde_json::to_string(request).expect("a request is always JSON") + "\n";
    trace.iter().map(line).collect()
}

/// How many distinct bytes of the disk the trace reads.
pub(crate) fn distinct_bytes_read(trace: &[Request]) -> u64 {
    let reads = trace.iter().filter(|request| request.op == Op::Read);
    let mut ranges: Vec<(u64, u64)> =
        reads.map(|read| (read.offset, read.offset + u64::from(read.len))).collect();
    ranges.sort_unstable();
    let (mut total, mut reached) = (0, 0);
    for (start, end) in ranges {
        total += end.saturating_sub(start.max(reached));
        reached = reached.max(end);
    }
    total
}

/// How many distinct bytes a reader would fetch that fetches whole aligned chunks.
pub(crate) fn distinct_chunk_bytes(trace: &[Request], chunk_size: u64) -> u64 {
    let widen = |request: &Request| {
        let start = request.offset / chunk_size * chunk_size;
        let end = (request.offset + u64::from(request.len)).next_multiple_of(chunk_size);
        (start / chunk_size..end / chunk_size).collect::<Vec<_>>()
    };
    let reads = trace.iter().filter(|request| request.op == Op::Read);
    let chunks: std::collections::HashSet<u64> = reads.flat_map(widen).collect();
    chunks.len() as u64 * chunk_size
}

/// Reads the log of nbdkit's log filter: the requests in the order in which they came in. Lines of any other kind,
/// and requests that a trace does not have (trims, zeroes, extents), are passed over.
pub(crate) fn from_nbdkit_log(log: &str) -> Vec<Request> {
    log.lines().filter_map(request_of_log_line).collect()
}

fn request_of_log_line(line: &str) -> Option<Request> {
    // 2026-11-21 04:21:20.014097 connection=1 Read id=1 offset=0x2000 count=0x1000 ...
    let mut words = line.split_whitespace().skip_while(|word| !word.starts_with("connection=")).skip(1);
    let op = match words.next()? {
        "Read" => Op::Read,
        "Write" => Op::Write,
        "Flush" => return Some(Request { op: Op::Flush, offset: 0, len: 0 }),
        _ => return None,
    };
    let (mut offset, mut len) = (None, None);
    for word in words {
        let hexadecimal = |text: &str| u64::from_str_radix(text, 16).ok();
        if let Some(text) = word.strip_prefix("offset=0x") {
            offset = hexadecimal(text);
        } else if let Some(text) = word.strip_prefix("count=0x") {
            len = hexadecimal(text);
        }
    }
    Some(Request { op, offset: offset?, len: u32::try_from(len?).ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(offset: u64, len: u32) -> Request {
        Request { op: Op::Read, offset, len }
    }

    #[test]
    fn a_trace_survives_the_way_to_json_and_back() {
        let trace = [
            read(0, 512),
            Request { op: Op::Write, ..read(4096, 8192) },
            Request { op: Op::Flush, ..read(0, 0) },
        ];
        assert_eq!(parse(&to_lines(&trace)).unwrap(), trace);
        assert_eq!(parse("{\"op\": \"flush\"}\n\n").unwrap(), trace[2..]);
    }

    #[test]
    fn a_line_that_is_no_request_is_named() {
        let error = parse("{\"op\": \"flush\"}\n{\"op\": \"erase\"}\n").unwrap_err();
        assert!(format!("{error:#}").starts_with("line 2"), "{error:#}");
    }

    #[test]
    fn overlapping_reads_count_once_and_writes_do_not() {
        let trace =
            [read(0, 4096), read(2048, 4096), read(100, 10), Request { op: Op::Write, ..read(0, 65536) }];
        assert_eq!(distinct_bytes_read(&trace), 6144);
        assert_eq!(distinct_chunk_bytes(&trace, 4096), 8192);
        assert_eq!(distinct_chunk_bytes(&[read(65535, 2)], 65536), 131_072);
    }

    #[test]
    fn nbdkits_log_yields_the_requests_in_order() {
        let log = "\
2026-11-21 04:21:19.705370 Ready thread_model=3
2026-11-21 04:21:20.013724 connection=1 Connect export=\"\" tls=0 size=0x40000000 minsize=0x1
2026-11-21 04:21:20.014097 connection=1 Read id=1 offset=0x2000 count=0x1000 ...
2026-11-21 04:21:20.014633 connection=1 ...Read id=1 return=0
2026-11-21 04:21:20.014766 connection=1 Write id=2 offset=0x400 count=0x200 fua=1 ...
2026-11-21 04:21:20.014922 connection=1 Flush id=3 ...
2026-11-21 04:21:20.015112 connection=1 Trim id=5 offset=0x1000 count=0x1000 fua=0 ...
";
        let flush = Request { op: Op::Flush, offset: 0, len: 0 };
        let write = Request { op: Op::Write, offset: 1024, len: 512 };
        assert_eq!(from_nbdkit_log(log), [read(8192, 4096), write, flush]);
    }
}
