//! The packs and the index: each pack against its own table, each index entry against its pack's.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use parking_lot::Mutex;

use super::{Run, is_finding};
use crate::codec::{ChunkDecoder, Undecoded, is_zero};
use crate::error::{Error, ErrorKind, Result};
use crate::id::{ChunkId, PackId};
use crate::index::segment::Segment;
use crate::index::{self, View};
use crate::pack::{self, format};
use crate::reader::{Fetch, FetchLimits, plan_fetches};
use crate::record::Location;
use crate::storage::{ReadFile, read_all};

/// A segment, with the number of its entries that were found in their packs.
struct Counted {
    segment: Arc<Segment>,
    matched: AtomicU64,
}

/// What an index says of one pack.
#[derive(Default)]
struct Named {
    /// Which segments name it.
    segments: Vec<usize>,
}

pub(super) fn verify(run: &Run<'_>) -> Result<()> {
    let view = run.repository.index().view();
    report_damaged_segments(run, &view)?;
    let segments: Vec<Counted> = view
        .segments
        .iter()
        .map(|segment| Counted { segment: segment.clone(), matched: AtomicU64::new(0) })
        .collect();
    let mut named: HashMap<PackId, Named> = HashMap::new();
    for (number, counted) in segments.iter().enumerate() {
        match check_segment(&counted.segment) {
            Ok(packs) => {
                packs.into_iter().for_each(|pack| named.entry(pack).or_default().segments.push(number))
            }
            Err(error) if is_finding(&error) => run.file_damage(segment_path(run, &counted.segment), &error),
            Err(error) => return Err(error),
        }
        run.report.lock().index_entries += counted.segment.entries();
    }
    count_packs(run, &named)?;

    let mut order: Vec<(PackId, Named)> = named.into_iter().collect();
    order.sort_unstable_by_key(|(pack, _)| *pack);
    let (next, failure) = (AtomicUsize::new(0), Mutex::new(None));
    std::thread::scope(|scope| {
        for _ in 0..run.options.threads.max(1) {
            scope.spawn(|| {
                while let Some((pack, named)) = order.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(error) = verify_pack(run, *pack, named, &segments) {
                        failure.lock().get_or_insert(error);
                        next.store(order.len(), Ordering::Relaxed);
                    }
                }
            });
        }
    });
    if let Some(error) = failure.into_inner() {
        return Err(error);
    }
    if run.lost.lock().is_empty() {
        for counted in &segments {
            let (matched, entries) = (counted.matched.load(Ordering::Relaxed), counted.segment.entries());
            if matched != entries {
                let what =
                    format!("{} of its {entries} entries are not in their packs", entries.abs_diff(matched));
                run.file_damage(segment_path(run, &counted.segment), &Error::damaged(what));
            }
        }
    }
    Ok(())
}

fn segment_path(run: &Run<'_>, segment: &Segment) -> PathBuf {
    run.repository.storage().describe(&index::path(segment.id()))
}

fn report_damaged_segments(run: &Run<'_>, view: &View) -> Result<()> {
    for (id, error) in &view.damaged {
        if !is_finding(error) {
            return Err(error.clone());
        }
        run.file_damage(run.repository.storage().describe(&index::path(*id)), error);
    }
    Ok(())
}

fn check_segment(segment: &Segment) -> Result<Vec<PackId>> {
    segment.check_all()?;
    segment.packs()
}

/// How much there is to read, and which packs nobody names.
fn count_packs(run: &Run<'_>, named: &HashMap<PackId, Named>) -> Result<()> {
    let storage = run.repository.storage();
    let files = storage
        .list(pack::DIR)
        .map_err(|error| Error::io("cannot list the packs", error).at(storage.describe(pack::DIR)))?;
    let mut total = 0;
    for id in files.iter().filter_map(|file| pack::id_of(file)) {
        if named.contains_key(&id) {
            total += storage.open(&pack::path(id)).and_then(|file| file.len_bytes()).unwrap_or(0);
        } else {
            run.report.lock().unnamed_packs += 1;
        }
    }
    run.total_bytes.store(total, Ordering::Relaxed);
    Ok(())
}

fn verify_pack(run: &Run<'_>, id: PackId, named: &Named, segments: &[Counted]) -> Result<()> {
    let path = run.repository.storage().describe(&pack::path(id));
    let file = match run.repository.open_pack(id) {
        Ok(file) => file,
        Err(error) if is_finding(&error) => {
            run.lost.lock().insert(id);
            run.file_damage(path, &error);
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    run.report.lock().packs += 1;
    let named_by = || named.segments.iter().map(|number| &segments[*number]);
    let items = match format::read_end(&*file, id) {
        Ok(table) => {
            check_padding(run, &*file, table.data_end..table.table_offset, &path);
            let items: Vec<(ChunkId, Location)> =
                table.records.iter().map(|record| (record.chunk_id(), record.location(id))).collect();
            for counted in named_by() {
                let same = items
                    .iter()
                    .filter(|(chunk, at)| counted.segment.find(chunk).is_ok_and(|found| found == Some(*at)));
                counted.matched.fetch_add(same.count() as u64, Ordering::Relaxed);
            }
            items
        }
        Err(error) if is_finding(&error) => {
            run.file_damage(path.clone(), &error);
            // The index still says what is in it.
            from_index(id, named_by())?
        }
        Err(error) => return Err(error),
    };
    if run.options.read_data {
        verify_chunks(run, id, &*file, &items, &path)?;
    }
    Ok(())
}

fn check_padding(run: &Run<'_>, file: &dyn ReadFile, padding: std::ops::Range<u64>, path: &std::path::Path) {
    let mut bytes = vec![0; (padding.end - padding.start) as usize];
    match file.read_at(&mut bytes, padding.start) {
        Ok(()) if is_zero(&bytes) => {}
        Ok(()) => run.file_damage(
            path.into(),
            &Error::damaged("the padding of the pack is not zeroes; nothing reads it"),
        ),
        Err(error) => run.file_damage(path.into(), &Error::io("cannot read the padding of the pack", error)),
    }
}

/// What the index says is in a pack whose own table cannot be read.
fn from_index<'a>(
    id: PackId,
    segments: impl Iterator<Item = &'a Counted>,
) -> Result<Vec<(ChunkId, Location)>> {
    let mut items = Vec::new();
    for counted in segments {
        let mut found = 0;
        counted.segment.for_each(|record, at| {
            if at.pack == id {
                items.push((record.chunk_id(), *at));
                found += 1;
            }
        })?;
        counted.matched.fetch_add(found, Ordering::Relaxed);
    }
    items.sort_unstable_by_key(|(_, at)| *at);
    items.dedup();
    Ok(items)
}

/// Reads, decodes and hashes what is in a pack.
fn verify_chunks(
    run: &Run<'_>,
    id: PackId,
    file: &dyn ReadFile,
    items: &[(ChunkId, Location)],
    path: &std::path::Path,
) -> Result<()> {
    let mut decoder = ChunkDecoder::new()?;
    let (mut stored, mut plain) = (Vec::new(), Vec::new());
    for fetch in plan_fetches(items, |item| &item.1, FetchLimits::default()) {
        stored.resize(fetch.len, 0);
        let wanted = &items[fetch.items.clone()];
        let results = match file.read_at(&mut stored, fetch.offset) {
            Ok(()) => decode_all(&mut decoder, &fetch, wanted, &stored, &mut plain),
            Err(error) => {
                let failed = |(chunk, at): &(ChunkId, Location)| {
                    let what = format!("cannot read chunk {chunk} at offset {} of pack {id}", at.offset);
                    Err(Error::io(what, std::io::Error::new(error.kind(), error.to_string())))
                };
                wanted.iter().map(failed).collect()
            }
        };
        for ((_, at), result) in wanted.iter().zip(results) {
            if let Err(error) = result {
                run.bad.lock().insert((id, at.offset));
                run.file_damage(path.into(), &error);
            }
        }
        let mut report = run.report.lock();
        report.chunks += fetch.items.len() as u64;
        report.stored_bytes +=
            items[fetch.items.clone()].iter().map(|(_, at)| u64::from(at.stored_len)).sum::<u64>();
        drop(report);
        run.advance(fetch.len as u64);
    }
    Ok(())
}

/// Decodes what one read brought, into one buffer.
fn decode_all(
    decoder: &mut ChunkDecoder,
    fetch: &Fetch,
    wanted: &[(ChunkId, Location)],
    stored: &[u8],
    plain: &mut Vec<u8>,
) -> Vec<Result<()>> {
    plain.resize(wanted.iter().map(|(_, at)| at.plain_len as usize).sum(), 0);
    let mut room = plain.as_mut_slice();
    let mut chunks = Vec::with_capacity(wanted.len());
    for (id, at) in wanted {
        let (out, rest) = room.split_at_mut(at.plain_len as usize);
        room = rest;
        chunks.push(Undecoded { at, stored: &stored[fetch.place(at)], id, out });
    }
    decoder.decode_each(&mut chunks)
}

/// Whether the configuration still reads as it did when the repository was opened.
pub(super) fn config_is_readable(run: &Run<'_>) -> Result<()> {
    let storage = &**run.repository.storage();
    let path = crate::config::PATH;
    let read = read_all(storage, path, crate::frame::MAX_LEN)
        .map_err(|error| Error::io("cannot read the configuration", error));
    let checked = match read {
        Ok(Some(bytes)) => crate::config::Config::decode(&bytes).map(drop),
        Ok(None) => Err(Error::new(ErrorKind::Damaged, "the configuration is too long")),
        Err(error) => Err(error),
    };
    match checked {
        Err(error) if is_finding(&error) => {
            run.file_damage(storage.describe(path), &error);
            Ok(())
        }
        other => other,
    }
}
