//! fio over its NBD engine, and what it says in JSON.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::child;
use crate::endpoint::Endpoint;

/// One kind of work for fio.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Job {
    /// fio's `rw`: `randread`, `randwrite`, `read`, `write`.
    pub(crate) pattern: &'static str,
    /// Bytes a request.
    pub(crate) block_size: u32,
    /// Requests in flight on each connection.
    pub(crate) depth: u32,
    /// Connections.
    pub(crate) connections: u32,
}

impl Job {
    /// Whether it writes.
    pub(crate) fn writes(&self) -> bool {
        self.pattern.ends_with("write")
    }

    /// Its name in the table and for `--cells`: `randread-4k-d32-c1`.
    pub(crate) fn name(&self) -> String {
        let size = match self.block_size {
            size if size >= 1 << 20 => format!("{}M", size >> 20),
            size => format!("{}k", size >> 10),
        };
        format!("{}-{size}-d{}-c{}", self.pattern, self.depth, self.connections)
    }

    /// The command that runs it for `time` on the export at `uri`.
    pub(crate) fn command(&self, uri: &str, time: Duration) -> Command {
        let mut fio = Command::new("fio");
        fio.args(["--name=j", "--ioengine=nbd", "--group_reporting", "--output-format=json", "--time_based"])
            .arg(format!("--uri={uri}"))
            .arg(format!("--rw={}", self.pattern))
            .arg(format!("--bs={}", self.block_size))
            .arg(format!("--iodepth={}", self.depth))
            .arg(format!("--numjobs={}", self.connections))
            .arg(format!("--runtime={}ms", time.as_millis()));
        fio
    }
}

/// What fio measured in one direction.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Measured {
    /// Operations a second, of all connections together.
    pub(crate) iops: f64,
    /// Bytes a second.
    pub(crate) bytes_per_second: f64,
    /// The latency that half of the requests stayed within, in microseconds.
    pub(crate) p50_micros: f64,
    /// The latency that 99 of 100 requests stayed within, in microseconds.
    pub(crate) p99_micros: f64,
    /// The longest one.
    pub(crate) max_micros: f64,
}

/// Runs the job on an export.
pub(crate) fn run(job: &Job, at: &Endpoint, export: &str, time: Duration) -> Result<Measured> {
    let finished = child::run(&mut at.trusted_by(job.command(&at.uri(export), time)))?;
    parse(&finished.stdout, job.writes())
}

/// Reads fio's JSON: the first job, the direction that was used.
pub(crate) fn parse(output: &str, writes: bool) -> Result<Measured> {
    // fio may print warnings before the document.
    let begin = output.find('{').context("fio printed no JSON")?;
    let output: Output = serde_json::from_str(&output[begin..]).context("fio's JSON is not as expected")?;
    let job = output.jobs.first().context("fio reports no job")?;
    anyhow::ensure!(job.error == 0, "fio met error {}", job.error);
    let side = if writes { &job.write } else { &job.read };
    anyhow::ensure!(side.total_ios > 0, "fio completed no request");
    let micros = |percent: &str| side.clat_ns.percentile.get(percent).copied().unwrap_or_default() / 1e3;
    Ok(Measured {
        iops: side.iops,
        bytes_per_second: side.bw_bytes,
        p50_micros: micros("50.000000"),
        p99_micros: micros("99.000000"),
        max_micros: side.clat_ns.max / 1e3,
    })
}

#[derive(Deserialize)]
struct Output {
    jobs: Vec<JobOutput>,
}

#[derive(Deserialize)]
struct JobOutput {
    error: i64,
    read: Side,
    write: Side,
}

#[derive(Deserialize)]
struct Side {
    iops: f64,
    bw_bytes: f64,
    total_ios: u64,
    clat_ns: Latency,
}

#[derive(Deserialize)]
struct Latency {
    #[serde(default)]
    max: f64,
    #[serde(default)]
    percentile: std::collections::BTreeMap<String, f64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLE: &str = include_str!("../samples/fio-randread.json");
    const SAMPLE_IOPS: f64 = 47812.375;
    const SAMPLE_P99_MICROS: f64 = 2932.736;

    #[test]
    fn rates_and_the_99th_percentile_are_read_from_fios_json() {
        let measured = parse(SAMPLE, false).unwrap();
        assert!((measured.iops - SAMPLE_IOPS).abs() < 1.0, "{measured:?}");
        assert!((measured.bytes_per_second - measured.iops * 4096.0).abs() < 4096.0 * 10.0, "{measured:?}");
        assert_eq!(measured.p99_micros, SAMPLE_P99_MICROS);
    }

    #[test]
    fn warnings_before_the_document_do_no_harm() {
        let measured = parse(&format!("fio: this platform does not …\n{SAMPLE}"), false).unwrap();
        assert_eq!(measured.p99_micros, SAMPLE_P99_MICROS);
    }

    #[test]
    fn a_direction_that_was_not_used_is_an_error_and_not_a_zero() {
        assert!(parse(SAMPLE, true).unwrap_err().to_string().contains("no request"));
        assert!(parse("", false).is_err());
    }

    #[test]
    fn a_job_that_failed_is_an_error() {
        let failed = SAMPLE.replacen("\"error\" : 0", "\"error\" : 5", 1);
        assert!(parse(&failed, false).unwrap_err().to_string().contains("error 5"));
    }

    #[test]
    fn a_job_is_named_by_all_that_it_varies() {
        let job = Job { pattern: "randread", block_size: 4096, depth: 32, connections: 1 };
        assert_eq!(job.name(), "randread-4k-d32-c1");
        assert_eq!(Job { pattern: "write", block_size: 1 << 20, ..job }.name(), "write-1M-d32-c1");
    }
}
