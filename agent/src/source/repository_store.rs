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
//! Where there are copies of the repository, what it cannot give is had from them first: a chunk that is not where it should
//! be, or whose bytes are wrong, is asked of each by its id, and only what nobody has is one of the above. A repository that was
//! out of reach, and a pack that was not there, are passed over for a while, so that the copies are read as the repository is.
//!
//! Whether the repository is there is looked at after the failure. A file system that returns in between would make what
//! it holds look missing, so what is missing is asked for once more before that is said.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};
use repository::{ChunkDecoder, ChunkId, ChunkReader, DiskMap, Location, MapEntry, PackId, Repository};

use super::fallback::Fallbacks;
use super::{ChunkStore, Decode, FetchStats, Key, Placed, Undecoded, ZeroChunks};
use crate::live::{SourceError, SourceErrorKind};

/// How many map entries are looked at together.
const ENTRIES_AT_ONCE: u64 = 4096;

/// So long the copies are asked first after the repository was out of reach, or a pack was not there.
const PASSED_OVER: Duration = Duration::from_secs(5);
/// Packs that are remembered as not being there; of more, the oldest are asked for again.
const PACKS_REMEMBERED: usize = 4096;

/// The disks of one repository.
pub struct RepositoryStore {
    repository: Repository,
    reader: ChunkReader,
    fallbacks: Fallbacks,
    disks: RwLock<Vec<DiskMap>>,
    fetched: Fetched,
    troubles: Mutex<Troubles>,
}

/// What the repository could not give lately. Kept only where there are copies.
#[derive(Debug, Default)]
struct Troubles {
    away: Option<Instant>,
    packs: HashMap<PackId, Instant>,
}

impl Troubles {
    fn note(&mut self, now: Instant, pack: PackId, kind: SourceErrorKind) {
        if kind == SourceErrorKind::Unavailable {
            self.away = Some(now);
        } else {
            if self.packs.len() >= PACKS_REMEMBERED {
                self.packs.clear();
            }
            self.packs.insert(pack, now);
        }
    }

    fn is_away(&self, now: Instant) -> bool {
        self.away.is_some_and(|since| now.duration_since(since) < PASSED_OVER)
    }

    fn lacks(&self, now: Instant, pack: PackId) -> bool {
        self.packs.get(&pack).is_some_and(|since| now.duration_since(*since) < PASSED_OVER)
    }
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
        Self::with_fallbacks(repository, Fallbacks::default())
    }

    /// The chunks of this repository, and of its copies where it cannot give them.
    #[must_use]
    pub fn with_fallbacks(repository: Repository, fallbacks: Fallbacks) -> Self {
        let reader = repository.reader();
        let (disks, troubles) = (RwLock::default(), Mutex::default());
        Self { repository, reader, fallbacks, disks, fetched: Fetched::default(), troubles }
    }

    /// The copies of the repository.
    #[must_use]
    pub const fn fallbacks(&self) -> &Fallbacks {
        &self.fallbacks
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

    /// Tries once, and once more where something is missing though the repository is there.
    fn reach<T>(&self, mut attempt: impl FnMut() -> repository::Result<T>) -> Result<T, SourceError> {
        let mut result = attempt();
        if let Err(error) = &result
            && kind_of(&self.repository, error) == SourceErrorKind::Missing
        {
            result = attempt();
        }
        result.map_err(|error| SourceError::new(kind_of(&self.repository, &error), error))
    }

    fn place_here(&self, key: Key) -> Result<ChunkPlace, SourceError> {
        let map = self.map(key);
        self.reach(|| find(&self.repository, &map, key.chunk))?
            .map(|(id, location)| ChunkPlace { disk: key.disk, id, location, copy: None })
            .ok_or_else(|| {
                SourceError::new(
                    SourceErrorKind::Damaged,
                    format_args!("chunk {} of the disk is zeroes, which are nowhere", key.chunk),
                )
            })
    }

    fn place_in_a_copy(&self, key: Key) -> Option<ChunkPlace> {
        let map = self.map(key);
        self.fallbacks.copies().iter().enumerate().find_map(|(copy, of)| {
            let (id, location) = find(&of.repository, &map.through(&of.repository), key.chunk).ok()??;
            Some(ChunkPlace { disk: key.disk, id, location, copy: Some(copy) })
        })
    }

    fn map(&self, key: Key) -> DiskMap {
        self.disks.read()[key.disk as usize].clone()
    }
}

/// What a failure of this repository means.
fn kind_of(repository: &Repository, error: &repository::Error) -> SourceErrorKind {
    if error.is_transient() || error.kind() == repository::ErrorKind::NotPermitted {
        SourceErrorKind::Unavailable
    } else if !error.is_missing() {
        SourceErrorKind::Damaged
    } else if repository.is_reachable() {
        SourceErrorKind::Missing
    } else {
        SourceErrorKind::Unavailable
    }
}

/// Which chunk it is, and where in this repository; `None` where it is zeroes.
fn find(
    repository: &Repository,
    map: &DiskMap,
    chunk: u64,
) -> repository::Result<Option<(ChunkId, Location)>> {
    match map.entry(chunk)? {
        MapEntry::Zero => Ok(None),
        MapEntry::Chunk(id) => Ok(Some((id, repository.locate_needed(&id)?))),
    }
}

/// Where a chunk is, and what it must turn out to be.
#[derive(Clone, Copy, Debug)]
pub struct ChunkPlace {
    disk: u32,
    id: ChunkId,
    location: Location,
    /// In which of the copies; `None` in the repository itself.
    copy: Option<usize>,
}

impl Placed for ChunkPlace {
    fn stored_len(&self) -> u64 {
        self.location.stored_len.into()
    }

    fn follows(&self, previous: &Self) -> bool {
        self.copy == previous.copy
            && self.location.pack == previous.location.pack
            && u64::from(self.location.offset) == previous.location.end()
    }
}

impl ChunkStore for RepositoryStore {
    type Place = ChunkPlace;
    type Decoder = RepositoryDecoder;

    fn place(&self, key: Key) -> Result<ChunkPlace, SourceError> {
        if self.fallbacks.is_empty() {
            return self.place_here(key);
        }
        let now = Instant::now();
        if self.troubles.lock().is_away(now) {
            return self.place_in_a_copy(key).map_or_else(|| self.place_here(key), Ok);
        }
        match self.place_here(key) {
            Ok(place) if !self.troubles.lock().lacks(now, place.location.pack) => Ok(place),
            elsewhere => self.place_in_a_copy(key).map_or(elsewhere, Ok),
        }
    }

    fn read(&self, first: &ChunkPlace, stored: &mut [u8]) -> Result<(), SourceError> {
        let at = &first.location;
        let result = match first.copy {
            None => self.reach(|| self.reader.read_stored_range(at.pack, at.offset.into(), stored)),
            Some(copy) => {
                let copy = &self.fallbacks.copies()[copy];
                let read = copy.reader.read_stored_range(at.pack, at.offset.into(), stored);
                read.map_err(|error| SourceError::new(kind_of(&copy.repository, &error), error))
            }
        };
        match result {
            Ok(()) => {
                self.fetched.add(first.disk, |stats| {
                    stats.requests += 1;
                    stats.stored_bytes += stored.len() as u64;
                });
                Ok(())
            }
            Err(error) if !self.fallbacks.is_empty() => {
                if first.copy.is_none() {
                    self.troubles.lock().note(Instant::now(), at.pack, error.kind());
                }
                // These are no chunks: whoever decodes them finds that out, and asks everybody for each by its id.
                stored.fill(0);
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    fn decoder(&self) -> RepositoryDecoder {
        let (repository, fallbacks) = (self.repository.clone(), self.fallbacks.clone());
        let fetched = self.fetched.clone();
        RepositoryDecoder { decoder: ChunkDecoder::new(), repository, fallbacks, fetched }
    }

    fn plain_len(&self, key: Key) -> usize {
        self.disks.read()[key.disk as usize].chunk_len(key.chunk)
    }
}

/// Decodes and verifies for one thread.
pub struct RepositoryDecoder {
    decoder: repository::Result<ChunkDecoder>,
    repository: Repository,
    fallbacks: Fallbacks,
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
        let (repository, fallbacks) = (&self.repository, &self.fallbacks);
        let ended = chunks.iter_mut().zip(results).map(|(chunk, result)| match (result, chunk.place.copy) {
            (Ok(()), None) => Ok(()),
            (Ok(()), Some(copy)) => {
                let why = "the repository was out of reach, or a pack was not there";
                fallbacks.copies()[copy].note(chunk.out.len(), &why);
                Ok(())
            }
            (Err(error), _) if fallbacks.is_empty() => Err(SourceError::new(SourceErrorKind::Damaged, error)),
            (Err(_), _) => from_anybody(repository, fallbacks, decoder, &chunk.place.id, chunk.out),
        });
        let ended: Vec<_> = ended.collect();
        for (chunk, _) in chunks.iter().zip(&ended).filter(|(_, result)| result.is_ok()) {
            self.fetched.add(chunk.place.disk, |stats| {
                stats.chunks += 1;
                stats.plain_bytes += chunk.out.len() as u64;
            });
        }
        ended
    }
}

/// A chunk by its id, from whoever has it. Where nobody does, what the repository says of it counts; but it is not damaged
/// for good while a copy may still give it.
fn from_anybody(
    repository: &Repository,
    fallbacks: &Fallbacks,
    decoder: &mut ChunkDecoder,
    id: &ChunkId,
    out: &mut [u8],
) -> Result<(), SourceError> {
    let Err(why) = repository.read_chunk(id, decoder, out) else { return Ok(()) };
    let Err(others) = fallbacks.rescue(id, decoder, out, &why) else { return Ok(()) };
    let is_final = |(copy, error)| kind_of(copy, error) == SourceErrorKind::Damaged;
    let copies = fallbacks.copies().iter().map(|copy| &copy.repository);
    let kind = match kind_of(repository, &why) {
        SourceErrorKind::Damaged if !copies.zip(&others).all(is_final) => SourceErrorKind::Missing,
        kind => kind,
    };
    Err(SourceError::new(kind, why))
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
    let mut placed: Vec<(Option<(PackId, u32)>, u64)> = Vec::new();
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

    /// The store of a repository and of a copy of it.
    fn store_with_copy(dir: &Path) -> RepositoryStore {
        let RepositoryStore { repository, disks, .. } = store(dir);
        let copy = |from: &Path, to: &Path| {
            let copied = std::process::Command::new("cp").arg("-a").arg(from).arg(to).status().unwrap();
            assert!(copied.success());
        };
        copy(&dir.join("repo"), &dir.join("copy"));
        let (main, fallbacks) =
            Fallbacks::beside(Repository::open(dir.join("repo")), &[dir.join("copy")], |said| {
                panic!("{said}")
            })
            .unwrap();
        main.unwrap();
        let store = RepositoryStore::with_fallbacks(repository, fallbacks);
        store.add(disks.into_inner().remove(0));
        store
    }

    fn given(store: &RepositoryStore) -> u64 {
        store.fallbacks().used().iter().map(|used| used.chunks).sum()
    }

    fn spoil(pack: &Path) {
        let mut bytes = std::fs::read(pack).unwrap();
        bytes[20_000] ^= 1;
        std::fs::write(pack, bytes).unwrap();
    }

    #[test]
    fn what_is_damaged_or_missing_is_had_from_a_copy_and_counted() {
        let dir = tempfile::tempdir().unwrap();
        let store = store_with_copy(dir.path());
        let packs = [0, 1, 2].map(|chunk| pack_of(&store, dir.path(), chunk));
        spoil(&packs[0]);
        std::fs::remove_file(&packs[1]).unwrap();
        for chunk in 0..CHUNKS {
            assert_eq!(read(&store, chunk), Ok(()), "chunk {chunk}");
        }
        assert_eq!(given(&store), 2);
        // The pack is known not to be there: the copy is read in its place.
        assert_eq!(store.place(Key { disk: 0, chunk: 1 }).unwrap().copy, Some(0));
        assert_eq!(read(&store, 1), Ok(()));
        assert_eq!(given(&store), 3);
    }

    #[test]
    fn a_repository_that_is_away_is_stood_in_for_by_its_copy() {
        let dir = tempfile::tempdir().unwrap();
        let store = store_with_copy(dir.path());
        std::fs::rename(dir.path().join("repo"), dir.path().join("elsewhere")).unwrap();
        for chunk in 0..CHUNKS {
            assert_eq!(read(&store, chunk), Ok(()), "chunk {chunk}");
        }
        assert_eq!(given(&store), CHUNKS);
    }

    #[test]
    fn what_nobody_can_give_is_damaged_for_good_only_where_everybody_has_it_wrong() {
        let dir = tempfile::tempdir().unwrap();
        let store = store_with_copy(dir.path());
        let pack = pack_of(&store, dir.path(), 1);
        let of_copy = dir.path().join("copy/packs").join(pack.file_name().unwrap());
        let whole = dir.path().join("whole");
        std::fs::copy(&pack, &whole).unwrap();
        spoil(&pack);
        std::fs::remove_file(&of_copy).unwrap();
        assert_eq!(read(&store, 1), Err(SourceErrorKind::Missing), "it may be put back");
        std::fs::copy(&whole, &of_copy).unwrap();
        assert_eq!(read(&store, 1), Ok(()));
        spoil(&of_copy);
        assert_eq!(read(&store, 1), Err(SourceErrorKind::Damaged));
    }

    #[test]
    fn a_repository_is_no_copy_of_itself_and_one_that_cannot_be_had_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        drop(store_with_copy(dir.path()));
        let (repo, copy) = (dir.path().join("repo"), dir.path().join("copy"));
        let silent = |_: String| ();
        let beside =
            |repo: &Path, copies: &[PathBuf]| Fallbacks::beside(Repository::open(repo), copies, silent);
        let same = beside(&repo, &[dir.path().join("copy/../repo")]).unwrap_err();
        assert!(same.to_string().contains("the repository itself"), "{same}");
        let (main, fallbacks) = beside(&dir.path().join("gone"), std::slice::from_ref(&copy)).unwrap();
        assert_eq!(main.unwrap().path(), Repository::open(&copy).unwrap().path());
        assert!(fallbacks.is_empty());
        let (main, fallbacks) = beside(&repo, &[dir.path().join("gone"), copy]).unwrap();
        assert!(main.is_ok() && fallbacks.copies().len() == 1);
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
