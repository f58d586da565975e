//! `chunk-size`: what each chunk size costs: the table of docs/format.md, from which the default was chosen.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Args;

use super::{Common, boot, bytes_under, remove, settle};
use crate::child;
use crate::contest::Contender;
use crate::report::{Metric, Report, Side, Unit};
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

    fn side(&self) -> Side {
        Side::Ours
    }
}

/// Runs the workload.
pub(crate) fn run(common: &Common, options: &Options) -> Result<Report> {
    let mut report = common.report("chunk-size");
    let image = &options.image;
    let trace = boot::trace_of(common, image, options.trace.as_deref())?;
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
            (Metric::lower("map bytes per TB of data", Unit::Bytes), per_terabyte(map_bytes(&repo)?)),
            (
                Metric::lower("index bytes per TB of data", Unit::Bytes),
                per_terabyte(bytes_under(&repo.join("index"))?),
            ),
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

/// The bytes of the disk maps in a repository: the records of kind 1 in its packs (docs/format.md, the record, the pack).
fn map_bytes(repo: &Path) -> Result<u64> {
    let mut total = 0;
    for entry in std::fs::read_dir(repo.join("packs")).context("the repository has no packs")? {
        let path = entry?.path();
        total +=
            map_bytes_of_pack(&path).with_context(|| format!("cannot account for {}", path.display()))?;
    }
    Ok(total)
}

fn map_bytes_of_pack(path: &Path) -> Result<u64> {
    use std::os::unix::fs::FileExt;
    let pack = std::fs::File::open(path)?;
    let trailer_at = pack.metadata()?.len().checked_sub(TRAILER_BYTES as u64).context("it is too short")?;
    let mut trailer = [0; TRAILER_BYTES];
    pack.read_exact_at(&mut trailer, trailer_at)?;
    ensure!(trailer.starts_with(b"LBPKTAIL"), "it has no trailer");
    let count = u32::from_le_bytes([trailer[8], trailer[9], trailer[10], trailer[11]]) as usize;
    let table_at = trailer_at.checked_sub((count * RECORD_BYTES) as u64).context("its table does not fit")?;
    let mut table = vec![0; count * RECORD_BYTES];
    pack.read_exact_at(&mut table, table_at)?;
    Ok(map_bytes_of_table(&table))
}

fn map_bytes_of_table(table: &[u8]) -> u64 {
    let nodes = table.chunks_exact(RECORD_BYTES).filter(|record| record[54] == MAP_NODE);
    nodes.map(|record| u64::from(u32::from_le_bytes([record[40], record[41], record[42], record[43]]))).sum()
}

const TRAILER_BYTES: usize = 64;
const RECORD_BYTES: usize = 56;
const MAP_NODE: u8 = 1;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_map_nodes_are_accounted_as_maps() {
        let mut table = vec![0; 3 * RECORD_BYTES];
        for (record, (kind, stored)) in table.chunks_exact_mut(RECORD_BYTES).zip([(0, 50), (1, 300), (1, 4)])
        {
            record[54] = kind;
            record[40..44].copy_from_slice(&u32::to_le_bytes(stored));
        }
        assert_eq!(map_bytes_of_table(&table), 304);
    }
}
