//! `chunk-size`: what each chunk size costs: the table of docs/format.md, from which the default was chosen.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Args;

use super::{Common, boot, bytes_under, remove, settle};
use crate::child;
use crate::contest::Contender;
use crate::report::{Metric, Report, Unit};
use crate::trace;

/// What `chunk-size` takes.
#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// The raw image
    #[arg(default_value = "target/guest/disk.raw")]
    pub(crate) image: PathBuf,
    /// The boot trace; without it, boot-trace.jsonl beside the image
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// The chunk sizes, in KiB
    #[arg(long, value_delimiter = ',', default_values_t = [64, 128, 256, 512, 1024])]
    sizes: Vec<u32>,
}

struct Size {
    bytes: u32,
    name: String,
}

impl Contender for Size {
    fn name(&self) -> &str {
        &self.name
    }

    fn is_ours(&self) -> bool {
        true
    }
}

/// Runs the workload.
pub(crate) fn run(common: &Common, options: &Options) -> Result<Report> {
    let mut report = common.report("chunk-size");
    let image = &options.image;
    let trace_path = options.trace.clone().unwrap_or_else(|| image.with_file_name("boot-trace.jsonl"));
    let trace = trace::load(&trace_path)?;
    let data = {
        use std::os::unix::fs::MetadataExt;
        let metadata = std::fs::metadata(image).with_context(|| format!("no image {}", image.display()))?;
        (metadata.blocks() * 512).min(metadata.len()) as f64
    };
    let sizes: Vec<Size> =
        options.sizes.iter().map(|&kib| Size { bytes: kib << 10, name: format!("{kib} KiB") }).collect();
    let scratch = common.scratch()?;
    report.scratch_is(scratch.path());
    common.contest().run(&mut report, &sizes, |size, _, report| {
        let dir = scratch.path().join("turn");
        remove(&dir)?;
        std::fs::create_dir(&dir)?;
        let (repo, target) = (dir.join("repo"), dir.join("target.raw"));
        child::run(&mut common.programs.init(&repo)?)?;
        settle();
        let mut capture = common.programs.capture(&repo, image, Some(size.bytes))?;
        report.ran(size.name(), child::line(&capture));
        let captured = child::run(&mut capture)?;
        settle();
        let restored = child::run(&mut common.programs.restore(&repo, &target)?)?;
        remove(&target)?;
        settle();
        let begin = Instant::now();
        let boot = boot::on_demand(&common.programs, &repo, &dir, &trace, begin)?;
        let per_terabyte = |bytes: u64| bytes as f64 / data * 1e12;
        let sample = vec![
            (Metric::lower("fetched for the boot trace", Unit::Bytes), boot.fetched_bytes),
            (Metric::lower("the same, decoded", Unit::Bytes), boot.fetched_plain_bytes),
            (
                Metric::higher("capture, of the image's data", Unit::BytesPerSecond),
                data / captured.elapsed.as_secs_f64(),
            ),
            (
                Metric::higher("restore, of the image's data", Unit::BytesPerSecond),
                data / restored.elapsed.as_secs_f64(),
            ),
            (Metric::lower("stored", Unit::Bytes), bytes_under(&repo)? as f64),
            (Metric::lower("map bytes per TB of data", Unit::Bytes), per_terabyte(bytes_in(&repo, MAPS)?)),
            (Metric::lower("index bytes per TB of data", Unit::Bytes), per_terabyte(bytes_in(&repo, INDEX)?)),
        ];
        remove(&dir)?;
        Ok(sample)
    })?;
    report.notes.push(format!(
        "the trace reads {} distinct bytes; the image holds {} of data",
        Unit::Bytes.show(trace::distinct_bytes_read(&trace) as f64),
        Unit::Bytes.show(data)
    ));
    Ok(report)
}

/// Where a repository keeps its disk maps (docs/format.md).
const MAPS: &str = "maps";
/// Where it keeps its index segments.
const INDEX: &str = "index";

fn bytes_in(repo: &Path, part: &str) -> Result<u64> {
    bytes_under(&repo.join(part))
}
