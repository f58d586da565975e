//! The chunks of a repository's snapshots, as a pool fetches them.
//!
//! # What a failure means
//! | what happened | what is said |
//! |---|---|
//! | the way to the bytes failed, or was refused | unavailable: the engine waits, and asks again |
//! | something is not there, and the repository as a whole is not either: no configuration, or `packs` or `index` gone or empty, as on a file system that is not mounted | unavailable |
//! | a pack is gone or cut short, a chunk is in no index, and the rest is there | missing: an error for its range; it may be put back |
//! | the bytes came and are wrong: CRC, decoding, hash | damaged for good |
//!
//! Whether the repository is there is looked at after the failure. A file system that returns in between would make what
//! it holds look missing, so what is missing is asked for once more before that is said.

use std::ops::Range;
use std::sync::Arc;

use parking_lot::RwLock;
use repository::{ChunkDecoder, ChunkId, ChunkReader, DiskMap, Location, MapEntry, Repository};

use super::{ChunkStore, Decode, FetchStats, Key, Placed, Undecoded, ZeroChunks};
use crate::live::{SourceError, SourceErrorKind};

/// How many map entries are looked at together.
const ENTRIES_AT_ONCE: u64 = 4096;

/// The disks of one repository.
pub struct RepositoryStore {
    repository: Repository,
    reader: ChunkReader,
    disks: RwLock<Vec<DiskMap>>,
    fetched: Fetched,
}

/// What was fetched for each disk, by its number.
#[derive(Clone, Debug, Default)]
struct Fetched(Arc<RwLock<Vec<FetchStats>>>);

impl Fetched {
    fn add(&self, disk: u32, add: impl FnOnce(&mut FetchStats)) {
        if let Some(stats) = self.0.write().get_mut(disk as usize) {
            add(stats);
        }
    }
}

impl RepositoryStore {
    /// The chunks of this repository; no disk is known yet.
    #[must_use]
    pub fn new(repository: Repository) -> Self {
        let reader = repository.reader();
        Self { repository, reader, disks: RwLock::new(Vec::new()), fetched: Fetched::default() }
    }

    /// Makes a disk known, and returns its number.
    pub fn add(&self, map: DiskMap) -> u32 {
        let mut disks = self.disks.write();
        disks.push(map);
        self.fetched.0.write().push(FetchStats::default());
        u32::try_from(disks.len() - 1).expect("disks are far fewer than 2^32")
    }

    /// What was fetched for the disk with this number.
    pub fn fetched(&self, disk: u32) -> FetchStats {
        self.fetched.0.read().get(disk as usize).copied().unwrap_or_default()
    }

    fn kind_of(&self, error: &repository::Error) -> SourceErrorKind {
        if error.is_transient() || error.kind() == repository::ErrorKind::NotPermitted {
            SourceErrorKind::Unavailable
        } else if !error.is_missing() {
            SourceErrorKind::Damaged
        } else if self.repository.is_reachable() {
            SourceErrorKind::Missing
        } else {
            SourceErrorKind::Unavailable
        }
    }

    /// Tries once, and once more where something is missing though the repository is there.
    fn reach<T>(&self, mut attempt: impl FnMut() -> repository::Result<T>) -> Result<T, SourceError> {
        let mut result = attempt();
        if let Err(error) = &result
            && self.kind_of(error) == SourceErrorKind::Missing
        {
            result = attempt();
        }
        result.map_err(|error| SourceError::new(self.kind_of(&error), error))
    }
}

/// Where a chunk is, and what it must turn out to be.
#[derive(Clone, Copy, Debug)]
pub struct ChunkPlace {
    disk: u32,
    id: ChunkId,
    location: Location,
}

impl Placed for ChunkPlace {
    fn stored_len(&self) -> u64 {
        self.location.stored_len.into()
    }

    fn follows(&self, previous: &Self) -> bool {
        self.location.pack == previous.location.pack
            && u64::from(self.location.offset) == previous.location.end()
    }
}

impl ChunkStore for RepositoryStore {
    type Place = ChunkPlace;
    type Decoder = RepositoryDecoder;

    fn place(&self, key: Key) -> Result<ChunkPlace, SourceError> {
        let map = self.disks.read()[key.disk as usize].clone();
        let find = || match map.entry(key.chunk)? {
            MapEntry::Zero => Ok(None),
            MapEntry::Chunk(id) => self
                .repository
                .locate_needed(&id)
                .map(|location| Some(ChunkPlace { disk: key.disk, id, location })),
        };
        self.reach(find)?.ok_or_else(|| {
            SourceError::new(
                SourceErrorKind::Damaged,
                format_args!("chunk {} of the disk is zeroes, which are nowhere", key.chunk),
            )
        })
    }

    fn read(&self, first: &ChunkPlace, stored: &mut [u8]) -> Result<(), SourceError> {
        let at = &first.location;
        self.reach(|| self.reader.read_stored_range(at.pack, at.offset.into(), stored))?;
        self.fetched.add(first.disk, |stats| {
            stats.requests += 1;
            stats.stored_bytes += stored.len() as u64;
        });
        Ok(())
    }

    fn decoder(&self) -> RepositoryDecoder {
        RepositoryDecoder { decoder: ChunkDecoder::new(), fetched: self.fetched.clone() }
    }

    fn plain_len(&self, key: Key) -> usize {
        self.disks.read()[key.disk as usize].chunk_len(key.chunk)
    }
}

/// Decodes and verifies for one thread.
pub struct RepositoryDecoder {
    decoder: repository::Result<ChunkDecoder>,
    fetched: Fetched,
}

impl Decode<ChunkPlace> for RepositoryDecoder {
    fn decode_each(&mut self, chunks: &mut [Undecoded<'_, ChunkPlace>]) -> Vec<Result<(), SourceError>> {
        let decoder = match &mut self.decoder {
            Ok(decoder) => decoder,
            Err(error) => {
                let why = || SourceError::new(SourceErrorKind::Unavailable, error.clone());
                return chunks.iter().map(|_| Err(why())).collect();
            }
        };
        let mut undecoded: Vec<_> = chunks
            .iter_mut()
            .map(|chunk| repository::Undecoded {
                at: &chunk.place.location,
                stored: chunk.stored,
                id: &chunk.place.id,
                out: chunk.out,
            })
            .collect();
        let results = decoder.decode_each(&mut undecoded);
        for (chunk, result) in chunks.iter().zip(&results) {
            if result.is_ok() {
                self.fetched.add(chunk.place.disk, |stats| {
                    stats.chunks += 1;
                    stats.plain_bytes += chunk.out.len() as u64;
                });
            }
        }
        results
            .into_iter()
            .map(|result| result.map_err(|error| SourceError::new(SourceErrorKind::Damaged, error)))
            .collect()
    }
}

/// Which chunks of a disk are zeroes.
///
/// # Errors
/// Where the disk's map cannot be read, or is damaged.
pub fn zero_chunks(map: &DiskMap) -> repository::Result<ZeroChunks> {
    let mut zero = ZeroChunks::all(map.chunk_count());
    for_each_data_chunk(map, |chunk, _| {
        zero.set_data(chunk);
        Ok(())
    })?;
    Ok(zero)
}

/// The runs of neighbouring data chunks in the order in which they lie in packs. A chunk that the
/// index does not find comes last: whoever fetches it learns why.
///
/// # Errors
/// Where the disk's map or the index cannot be read.
pub fn pack_order(repository: &Repository, map: &DiskMap) -> repository::Result<Vec<Range<u64>>> {
    let mut placed: Vec<(Option<(repository::PackId, u32)>, u64)> = Vec::new();
    for_each_data_chunk(map, |chunk, id| {
        let location = repository.locate(&id)?;
        placed.push((location.map(|location| (location.pack, location.offset)), chunk));
        Ok(())
    })?;
    placed.sort_unstable_by_key(|(place, chunk)| (place.is_none(), *place, *chunk));
    let mut runs: Vec<Range<u64>> = Vec::new();
    for (_, chunk) in placed {
        match runs.last_mut() {
            Some(run) if run.end == chunk => run.end += 1,
            _ => runs.push(chunk..chunk + 1),
        }
    }
    Ok(runs)
}

fn for_each_data_chunk(
    map: &DiskMap,
    mut visit: impl FnMut(u64, ChunkId) -> repository::Result<()>,
) -> repository::Result<()> {
    let mut at = 0;
    while at < map.chunk_count() {
        let end = (at + ENTRIES_AT_ONCE).min(map.chunk_count());
        for (chunk, entry) in (at..end).zip(map.entries(at..end)?) {
            if let MapEntry::Chunk(id) = entry {
                visit(chunk, id)?;
            }
        }
        at = end;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use repository::{CaptureOptions, ChunkEncoder, DEFAULT_LEVEL, InitOptions, SnapshotMeta};

    use super::*;

    const CHUNK: u32 = 64 << 10;
    const CHUNKS: u64 = 3;

    /// Noise, which does not shrink.
    fn bytes_of(chunk: u64) -> Vec<u8> {
        let mut block = ChunkId::of(&chunk.to_le_bytes());
        let mut bytes = Vec::new();
        while bytes.len() < CHUNK as usize {
            bytes.extend_from_slice(block.as_bytes());
            block = ChunkId::of(block.as_bytes());
        }
        bytes
    }

    /// A repository with one disk, each of whose chunks has a pack of its own.
    fn store(dir: &Path) -> RepositoryStore {
        let repository = Repository::init(dir.join("repo"), InitOptions::default()).unwrap();
        let options = CaptureOptions { pack_len: 1000, ..CaptureOptions::default() };
        let mut capture = repository.begin_capture(&"vm".parse().unwrap(), options).unwrap();
        let disk =
            capture.begin_disk("disk0".parse().unwrap(), CHUNKS * u64::from(CHUNK), CHUNK, None).unwrap();
        let mut encoder = ChunkEncoder::new(DEFAULT_LEVEL).unwrap();
        for chunk in 0..CHUNKS {
            let plain = bytes_of(chunk);
            let id = encoder.id(&plain);
            disk.put_chunk(chunk, &id, &encoder.encode(&plain).unwrap()).unwrap();
        }
        drop(disk);
        let snapshot = capture.commit(SnapshotMeta::default()).unwrap();
        let repository = Repository::open(dir.join("repo")).unwrap();
        let map = repository.disk_map(&snapshot.manifest().disks[0]).unwrap();
        let store = RepositoryStore::new(repository);
        store.add(map);
        // The map is in memory from now on.
        store.place(Key { disk: 0, chunk: 0 }).unwrap();
        store
    }

    /// What a pool does for one chunk.
    fn read(store: &RepositoryStore, chunk: u64) -> Result<(), SourceErrorKind> {
        let read = || {
            let place = store.place(Key { disk: 0, chunk })?;
            let mut stored = vec![0; place.stored_len() as usize];
            store.read(&place, &mut stored)?;
            let mut out = vec![0; CHUNK as usize];
            let undecoded = Undecoded { place: &place, stored: &stored, out: &mut out };
            store.decoder().decode_each(&mut [undecoded]).remove(0)?;
            assert!(out == bytes_of(chunk));
            Ok(())
        };
        read().map_err(|error: SourceError| error.kind())
    }

    fn pack_of(store: &RepositoryStore, dir: &Path, chunk: u64) -> PathBuf {
        let place = store.place(Key { disk: 0, chunk }).unwrap();
        dir.join(format!("repo/packs/{}.pack", place.location.pack))
    }

    #[test]
    fn a_repository_whose_packs_are_elsewhere_is_away() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path());
        let (packs, elsewhere) = (dir.path().join("repo/packs"), dir.path().join("elsewhere"));
        std::fs::rename(&packs, &elsewhere).unwrap();
        assert_eq!(read(&store, 1), Err(SourceErrorKind::Unavailable));
        // As a mount point is while nothing is mounted.
        std::fs::create_dir(&packs).unwrap();
        assert_eq!(read(&store, 1), Err(SourceErrorKind::Unavailable));
        std::fs::remove_dir(&packs).unwrap();
        std::fs::rename(&elsewhere, &packs).unwrap();
        assert_eq!(read(&store, 1), Ok(()));
    }

    #[test]
    fn a_pack_that_is_gone_is_missing_alone_until_it_is_put_back() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path());
        let (pack, elsewhere) = (pack_of(&store, dir.path(), 1), dir.path().join("elsewhere"));
        std::fs::rename(&pack, &elsewhere).unwrap();
        assert_eq!(read(&store, 1), Err(SourceErrorKind::Missing));
        assert_eq!(read(&store, 2), Ok(()));
        std::fs::rename(&elsewhere, &pack).unwrap();
        assert_eq!(read(&store, 1), Ok(()));
    }

    #[test]
    fn a_pack_that_is_cut_short_is_missing_until_a_whole_one_stands_there() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path());
        let (pack, whole) = (pack_of(&store, dir.path(), 1), dir.path().join("whole"));
        std::fs::copy(&pack, &whole).unwrap();
        std::fs::File::options().write(true).open(&pack).unwrap().set_len(1000).unwrap();
        assert_eq!(read(&store, 1), Err(SourceErrorKind::Missing));
        std::fs::rename(&whole, &pack).unwrap();
        assert_eq!(read(&store, 1), Ok(()), "the file that was open is not asked any more");
    }

    #[test]
    fn bytes_that_are_wrong_are_damaged_for_good() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path());
        let pack = pack_of(&store, dir.path(), 1);
        let mut bytes = std::fs::read(&pack).unwrap();
        bytes[20_000] ^= 1;
        std::fs::write(&pack, bytes).unwrap();
        assert_eq!(read(&store, 1), Err(SourceErrorKind::Damaged));
    }

    #[test]
    fn what_returns_between_the_failure_and_the_look_is_had() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path());
        let (packs, elsewhere) = (dir.path().join("repo/packs"), dir.path().join("elsewhere"));
        std::fs::rename(&packs, &elsewhere).unwrap();
        let place = store.place(Key { disk: 0, chunk: 1 }).unwrap();
        let mut stored = vec![0; place.stored_len() as usize];
        let had = store.reach(|| {
            let at = &place.location;
            let result = store.reader.read_stored_range(at.pack, at.offset.into(), &mut stored);
            if result.is_err() {
                std::fs::rename(&elsewhere, &packs).unwrap();
            }
            result
        });
        assert!(had.is_ok(), "{had:?}");
    }
}
