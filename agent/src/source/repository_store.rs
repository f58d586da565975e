//! The chunks of a repository's snapshots, as a pool fetches them.
//!
//! # What a failure means
//! | what happened | what is said |
//! |---|---|
//! | the way to the bytes failed, or was refused | unavailable: the engine waits, and asks again |
//! | something is not there, and the repository as a whole is not either: no configuration, or `packs` or `index` gone or empty, as on a file system that is not mounted | unavailable |
//! | a pack is gone or cut short, a chunk is in no index, and the rest is there | missing: an error for its range; it may be put back |
//! | the bytes came and are wrong: CRC, decoding, hash | damaged for good |
//! | the snapshot says that what stood there is lost | damaged for good; no copy is asked |
//!
//! Where there are copies of the repository, what it cannot give is had from them first: a chunk that is not where it should
//! be, or whose bytes are wrong, is asked of each by its id, and only what nobody has is one of the above. A repository that was
//! out of reach, and a pack that was not there, are passed over for a while, so that the copies are read as the repository is.
//!
//! Whether the repository is there is looked at after the failure. A file system that returns in between would make what
//! it holds look missing, so what is missing is asked for once more before that is said.

use std::time::Instant;

use parking_lot::{Mutex, RwLock};
use repository::{ChunkId, ChunkReader, DiskMap, ErrorKind, Location, MapEntry, Repository};

use super::fallback::Fallbacks;
use super::fetched::{FetchStats, Fetched};
use super::repository_decoder::RepositoryDecoder;
use super::troubles::{Troubles, kind_of};
use super::{ChunkStore, Key, Placed};
use crate::live::{SourceError, SourceErrorKind};

/// The disks of one repository.
pub struct RepositoryStore {
    repository: Repository,
    reader: ChunkReader,
    fallbacks: Fallbacks,
    disks: RwLock<Vec<DiskMap>>,
    fetched: Fetched,
    troubles: Mutex<Troubles>,
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
        self.fetched.push();
        u32::try_from(disks.len() - 1).expect("disks are far fewer than 2^32")
    }

    /// What was fetched for the disk with this number.
    pub fn fetched(&self, disk: u32) -> FetchStats {
        self.fetched.of(disk)
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

    /// The place of a chunk in the first copy that knows it; `here` says what the repository has to say.
    fn place_in_a_copy(
        &self,
        key: Key,
        here: impl FnOnce() -> Result<ChunkPlace, SourceError>,
    ) -> Result<ChunkPlace, SourceError> {
        let map = self.map(key);
        let mut said = String::new();
        for (copy, of) in self.fallbacks.copies().iter().enumerate() {
            match find(&of.repository, &map.through(&of.repository), key.chunk) {
                Ok(Some((id, location))) => {
                    return Ok(ChunkPlace { disk: key.disk, id, location, copy: Some(copy) });
                }
                Ok(None) => {}
                Err(error) if error.kind() == ErrorKind::Lost => {
                    return Err(SourceError::new(SourceErrorKind::Damaged, error));
                }
                Err(error) => {
                    of.note_error(&error);
                    said.push_str(&format!("; its copy {}: {error}", of.repository.path().display()));
                }
            }
        }
        here().map_err(|error| SourceError::new(error.kind(), format_args!("{error}{said}")))
    }

    fn map(&self, key: Key) -> DiskMap {
        self.disks.read()[key.disk as usize].clone()
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
        MapEntry::Lost => Err(repository::Error::lost()),
        MapEntry::Chunk(id) => Ok(Some((id, repository.locate_needed(&id)?))),
    }
}

/// Where a chunk is, and what it must turn out to be.
#[derive(Clone, Copy, Debug)]
pub struct ChunkPlace {
    pub(super) disk: u32,
    pub(super) id: ChunkId,
    pub(super) location: Location,
    /// In which of the copies; `None` in the repository itself.
    pub(super) copy: Option<usize>,
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
            return self.place_in_a_copy(key, || self.place_here(key));
        }
        match self.place_here(key) {
            Ok(place) if !self.troubles.lock().lacks(now, place.location.pack) => Ok(place),
            // What is lost is lost in every copy.
            lost if matches!(self.map(key).entry(key.chunk), Ok(MapEntry::Lost)) => lost,
            elsewhere => self.place_in_a_copy(key, || elsewhere),
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
                self.fetched.add_stored(first.disk, stored.len());
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

    fn decoder(&self, pause: impl FnMut() + Send + 'static) -> RepositoryDecoder {
        RepositoryDecoder::new(pause, self.repository.clone(), self.fallbacks.clone(), self.fetched.clone())
    }

    fn plain_len(&self, key: Key) -> usize {
        self.disks.read()[key.disk as usize].chunk_len(key.chunk)
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use repository::{CaptureOptions, ChunkEncoder, DEFAULT_LEVEL, InitOptions, SnapshotMeta};

    use super::*;
    use crate::source::{Decode, Undecoded};

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
            store.decoder(|| ()).decode_each(&mut [undecoded]).remove(0)?;
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
    fn what_the_snapshot_says_is_lost_is_damaged_for_good_whatever_copies_have() {
        let dir = tempfile::tempdir().unwrap();
        let store = store_with_copy(dir.path());
        let (group, repository) = ("vm".parse().unwrap(), &store.repository);
        let base = repository.latest(&group).unwrap().unwrap().manifest().disks[0].clone();
        let mut capture = repository.begin_capture(&group, CaptureOptions::default()).unwrap();
        let disk = capture.begin_disk_over("disk0".parse().unwrap(), &base).unwrap();
        disk.put_lost(1).unwrap();
        drop(disk);
        let saved = capture.commit(SnapshotMeta::default()).unwrap();
        let number = store.add(store.repository.disk_map(&saved.manifest().disks[0]).unwrap());
        let lost = store.place(Key { disk: number, chunk: 1 }).unwrap_err();
        assert_eq!(lost.kind(), SourceErrorKind::Damaged);
        assert!(store.place(Key { disk: number, chunk: 2 }).is_ok() && read(&store, 1) == Ok(()));
        assert_eq!(store.fallbacks().use_of_each().next().unwrap().errors, 0, "it was not asked");
    }

    /// The store of a repository and of a copy of it.
    fn store_with_copy(dir: &Path) -> RepositoryStore {
        store_with_copies(dir, &[dir.join("copy")])
    }

    /// The same with these copies, of which `copy` is one.
    fn store_with_copies(dir: &Path, copies: &[PathBuf]) -> RepositoryStore {
        let RepositoryStore { repository, disks, .. } = store(dir);
        let copy = |from: &Path, to: &Path| {
            let copied = std::process::Command::new("cp").arg("-a").arg(from).arg(to).status().unwrap();
            assert!(copied.success());
        };
        copy(&dir.join("repo"), &dir.join("copy"));
        let (main, fallbacks) = Fallbacks::beside(
            Repository::open(dir.join("repo")),
            copies,
            |_| Ok(()),
            |said| panic!("{said}"),
        )
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
    fn a_copy_that_lacks_a_chunk_is_passed_over_and_what_nobody_has_names_each() {
        let dir = tempfile::tempdir().unwrap();
        let [empty, copy] = ["empty", "copy"].map(|name| dir.path().join(name));
        Repository::init(&empty, InitOptions::default()).unwrap();
        let store = store_with_copies(dir.path(), &[empty.clone(), copy.clone()]);
        let packs = [0, 1, 2].map(|chunk| pack_of(&store, dir.path(), chunk));
        spoil(&packs[0]);
        assert_eq!(read(&store, 0), Ok(()));
        std::fs::remove_file(&packs[1]).unwrap();
        assert_eq!(read(&store, 1), Ok(()));
        // Nobody has opened it before.
        for dir in [dir.path().join("repo"), copy.clone()] {
            std::fs::remove_file(dir.join("packs").join(packs[2].file_name().unwrap())).unwrap();
        }
        let place = store.place(Key { disk: 0, chunk: 2 }).unwrap();
        let mut stored = vec![0; place.stored_len() as usize];
        store.read(&place, &mut stored).unwrap();
        let mut out = vec![0; CHUNK as usize];
        let undecoded = Undecoded { place: &place, stored: &stored, out: &mut out };
        let error = store.decoder(|| ()).decode_each(&mut [undecoded]).remove(0).unwrap_err().to_string();
        for path in [empty, copy, dir.path().join("repo")] {
            assert!(error.contains(&path.display().to_string()), "{error}");
        }
        let errors: Vec<bool> = store.fallbacks().use_of_each().map(|used| used.errors > 0).collect();
        assert_eq!(errors, [true, true]);
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
        let used = store.fallbacks().use_of_each().next().unwrap();
        assert_eq!((used.chunks, used.errors > 0), (0, true), "{used:?}");
        std::fs::copy(&whole, &of_copy).unwrap();
        assert_eq!(read(&store, 1), Ok(()));
        spoil(&of_copy);
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
