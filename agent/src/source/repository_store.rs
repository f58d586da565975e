//! The chunks of a repository's snapshots, as a pool fetches them.

use std::ops::Range;

use parking_lot::RwLock;
use repository::{ChunkDecoder, ChunkId, ChunkReader, DiskMap, Location, MapEntry, Repository};

use super::{ChunkStore, Decode, Key, Placed, Undecoded, ZeroChunks};
use crate::live::{SourceError, SourceErrorKind};

/// How many map entries are looked at together.
const ENTRIES_AT_ONCE: u64 = 4096;

/// The disks of one repository.
pub struct RepositoryStore {
    repository: Repository,
    reader: ChunkReader,
    disks: RwLock<Vec<DiskMap>>,
}

impl RepositoryStore {
    /// The chunks of this repository; no disk is known yet.
    #[must_use]
    pub fn new(repository: Repository) -> Self {
        let reader = repository.reader();
        Self { repository, reader, disks: RwLock::new(Vec::new()) }
    }

    /// Makes a disk known, and returns its number.
    pub fn add(&self, map: DiskMap) -> u32 {
        let mut disks = self.disks.write();
        disks.push(map);
        u32::try_from(disks.len() - 1).expect("disks are far fewer than 2^32")
    }

    /// Whether asking again may help decides what the engine does: it waits for a source that is away,
    /// and gives up a chunk that is damaged.
    fn failed(&self, error: repository::Error) -> SourceError {
        let away = error.is_transient()
            || error.kind() == repository::ErrorKind::NotPermitted
            // A file that is missing with all the others is on a file system that is not mounted.
            || Repository::open(self.repository.path()).is_err();
        let kind = if away { SourceErrorKind::Unavailable } else { SourceErrorKind::Damaged };
        SourceError::new(kind, error)
    }
}

/// Where a chunk is, and what it must turn out to be.
#[derive(Clone, Copy, Debug)]
pub struct ChunkPlace {
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
            MapEntry::Chunk(id) => {
                self.repository.locate_needed(&id).map(|location| Some(ChunkPlace { id, location }))
            }
        };
        match find() {
            Ok(Some(place)) => Ok(place),
            Ok(None) => Err(SourceError::new(
                SourceErrorKind::Damaged,
                format_args!("chunk {} of the disk is zeroes, which are nowhere", key.chunk),
            )),
            Err(error) => Err(self.failed(error)),
        }
    }

    fn read(&self, first: &ChunkPlace, stored: &mut [u8]) -> Result<(), SourceError> {
        let at = &first.location;
        self.reader.read_stored_range(at.pack, at.offset.into(), stored).map_err(|error| self.failed(error))
    }

    fn decoder(&self) -> RepositoryDecoder {
        RepositoryDecoder { decoder: ChunkDecoder::new() }
    }

    fn plain_len(&self, key: Key) -> usize {
        self.disks.read()[key.disk as usize].chunk_len(key.chunk)
    }
}

/// Decodes and verifies for one thread.
pub struct RepositoryDecoder {
    decoder: repository::Result<ChunkDecoder>,
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
        let results = decoder.decode_each(&mut undecoded).into_iter();
        results
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
