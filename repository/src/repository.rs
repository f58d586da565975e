//! A repository: making one, opening one, and what can be asked of it.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use quick_cache::sync::Cache;

use crate::capture::{CaptureOptions, CaptureWriter};
use crate::codec::ChunkDecoder;
use crate::config::{self, Config, InitOptions};
use crate::error::{Error, ErrorKind, Result, nearest_names};
use crate::frame;
use crate::id::{ChunkId, PackId};
use crate::index::Index;
use crate::manifest::{Attachment, DiskEntry};
use crate::map::geometry::Geometry;
use crate::map::node::{MAX_NODE_LEN, Node};
use crate::map::{DiskMap, MapEntry};
use crate::name::GroupName;
use crate::pack::open::OpenPacks;
use crate::reader::ChunkReader;
use crate::record::Location;
use crate::snapshots;
use crate::storage::directory::Directory;
use crate::storage::{ReadFile, Storage, WriteHint, read_all};
use crate::{index, pack};

/// The directory of what is being written.
pub(crate) const TEMPORARY: &str = "tmp";
/// How many map nodes stay in memory: 64 MiB of full leaves.
const CACHED_NODES: usize = 2048;

/// An open repository. Cheap to clone; clones share their caches.
#[derive(Clone)]
pub struct Repository(Arc<Shared>);

struct Shared {
    storage: Arc<dyn Storage>,
    config: Config,
    index: Arc<Index>,
    packs: Arc<OpenPacks>,
    nodes: Cache<ChunkId, Arc<Node>>,
}

impl Repository {
    /// Makes a repository in a directory that is empty or not there yet, and opens it.
    ///
    /// # Errors
    /// `AlreadyExists` if it is one already or holds something else; `InvalidInput` for a bad chunk size; `NotFound` without its parent directory.
    pub fn init(path: impl AsRef<Path>, options: InitOptions) -> Result<Self> {
        let path = path.as_ref();
        // What cannot be is said before anything is made.
        Config::new(options)?;
        match std::fs::create_dir(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let parent = path.parent().unwrap_or(path).display();
                return Err(Error::io("cannot make the repository's directory", error)
                    .at(path)
                    .hint(format!("the directory {parent} does not exist: make it first")));
            }
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(Error::io("cannot make the repository's directory", error).at(path));
            }
            _ => {}
        }
        let parent = path.canonicalize().ok().and_then(|whole| whole.parent().map(PathBuf::from));
        if let Some(parent) = parent {
            let synced = std::fs::File::open(&parent).and_then(|dir| dir.sync_all());
            synced.map_err(|error| Error::io("cannot sync a directory", error).at(parent))?;
        }
        Self::init_on(Arc::new(Directory::new(path)), options)
    }

    /// Makes a repository on a storage that is empty.
    ///
    /// # Errors
    /// As for [`Repository::init`].
    pub fn init_on(storage: Arc<dyn Storage>, options: InitOptions) -> Result<Self> {
        let failed = |what: &str, path: &str, error| Error::io(what, error).at(storage.describe(path));
        let config = Config::new(options)?;
        let dirs = [TEMPORARY, pack::DIR, index::DIR, snapshots::DIR];
        let present = storage.list("").map_err(|error| failed("cannot list the directory", "", error))?;
        if present.iter().any(|name| name == config::PATH) {
            return Err(Error::new(ErrorKind::AlreadyExists, "there is a repository already")
                .at(storage.describe("")));
        }
        // Directories of ours may be left from an init that was cut short.
        if let Some(other) = present.iter().find(|name| !dirs.contains(&name.as_str())) {
            return Err(Error::new(
                ErrorKind::AlreadyExists,
                format!("the directory is not empty: it has {other:?}"),
            )
            .at(storage.describe(""))
            .hint("make a repository in a directory of its own"));
        }
        for dir in dirs {
            match storage.create_dir(dir) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(failed("cannot make a directory", dir, error));
                }
                _ => {}
            }
        }
        storage.sync_dir("").map_err(|error| failed("cannot sync the directory", "", error))?;
        let mut random = [0; 8];
        crate::id::fill_random(&mut random)?;
        let temporary = format!("{TEMPORARY}/config-{:016x}", u64::from_le_bytes(random));
        let written = (|| {
            let mut file = storage.create(&temporary, WriteHint::Small)?;
            file.append(&config.encode().map_err(io::Error::other)?)?;
            file.sync()?;
            storage.publish(&temporary, config::PATH)?;
            storage.sync_dir("")
        })();
        written.map_err(|error| {
            crate::capture::publish::remove_temporary(&*storage, &temporary);
            failed("cannot write the configuration", config::PATH, error)
        })?;
        Self::open_on(storage)
    }

    /// Opens the repository in a directory.
    ///
    /// # Errors
    /// `NotFound` if there is no such directory; `NotARepository` if it is something else; `NewerFormat`; `Damaged` if its configuration is.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_on(Arc::new(Directory::new(path.as_ref())))
    }

    /// Opens the repository on a storage.
    ///
    /// # Errors
    /// As for [`Repository::open`].
    pub fn open_on(storage: Arc<dyn Storage>) -> Result<Self> {
        let config = read_config(&*storage)?;
        let index = Arc::new(Index::open(storage.clone())?);
        let packs = Arc::new(OpenPacks::new(storage.clone()));
        Ok(Self(Arc::new(Shared { storage, config, index, packs, nodes: Cache::new(CACHED_NODES) })))
    }

    /// What was chosen when it was made.
    pub fn config(&self) -> &Config {
        &self.0.config
    }

    /// Where it is, for messages.
    pub fn path(&self) -> PathBuf {
        self.0.storage.describe("")
    }

    /// Whether its files can be reached: its configuration can be read, and neither its packs nor its index are an
    /// empty directory, as that of a file system is which is not mounted. Only for one that holds a snapshot.
    pub fn is_reachable(&self) -> bool {
        let storage = &*self.0.storage;
        let holds_files = |dir| storage.is_empty(dir).is_ok_and(|is_empty| !is_empty);
        read_config(storage).is_ok() && holds_files(pack::DIR) && holds_files(index::DIR)
    }

    /// The map of a disk.
    ///
    /// # Errors
    /// `InvalidInput` for a size or chunk size that cannot be.
    pub fn disk_map(&self, disk: &DiskEntry) -> Result<DiskMap> {
        Ok(DiskMap::new(self.clone(), Geometry::new(disk.size, disk.chunk_size)?, disk.map))
    }

    /// Bytes of the disk's chunks that are not zeroes, the last one as long as it is. Where the map does not tell
    /// whether that one is zeroes, because it is damaged, it counts as data.
    pub fn data_bytes(&self, disk: &DiskEntry) -> u64 {
        let (chunks, chunk_size) = (disk.stats.data_chunks, u64::from(disk.chunk_size));
        let whole = chunks.saturating_mul(chunk_size).min(disk.size);
        let Ok(map) = self.disk_map(disk) else { return whole };
        let Some(last) = map.chunk_count().checked_sub(1).filter(|_| chunks > 0) else { return 0 };
        let missing = chunk_size - map.chunk_len(last) as u64;
        if missing == 0 || matches!(map.entry(last), Ok(MapEntry::Zero)) {
            return whole;
        }
        chunks.saturating_mul(chunk_size).saturating_sub(missing).min(disk.size)
    }

    /// Where a chunk is; none if it is nowhere. Looks at the directory again before it says so.
    ///
    /// # Errors
    /// When part of the index cannot be read, and the chunk is not in the rest.
    pub fn locate(&self, id: &ChunkId) -> Result<Option<Location>> {
        if let Ok(Some(found)) = self.0.index.locate(id) {
            return Ok(Some(found));
        }
        self.0.index.refresh()?;
        self.0.index.locate(id)
    }

    /// Where a chunk is that must be somewhere, because a snapshot names it.
    ///
    /// # Errors
    /// `Damaged` if it is nowhere.
    pub fn locate_needed(&self, id: &ChunkId) -> Result<Location> {
        self.locate(id)?.ok_or_else(|| {
            Error::missing(format!("chunk {id} is in no index"))
                .at(self.0.storage.describe(index::DIR))
                .hint("verify says what else is missing")
        })
    }

    /// Where these chunks are, in the same order. Asking for many at once goes through the index in its own order.
    ///
    /// # Errors
    /// As for [`Repository::locate_needed`].
    pub fn locate_all(&self, ids: &[ChunkId]) -> Result<Vec<Location>> {
        let mut order: Vec<usize> = (0..ids.len()).collect();
        order.sort_unstable_by_key(|at| ids[*at]);
        let mut found: Vec<Option<Location>> = vec![None; ids.len()];
        for at in order {
            found[at] = Some(self.locate_needed(&ids[at])?);
        }
        Ok(found.into_iter().map(|location| location.expect("each was located")).collect())
    }

    /// A reader of stored bytes.
    pub fn reader(&self) -> ChunkReader {
        ChunkReader::new(self.0.packs.clone())
    }

    /// Reads, decodes and verifies one chunk into all of `out`.
    ///
    /// # Errors
    /// `Damaged` where the chunk is; `Io` where reading failed.
    pub fn read_chunk(&self, id: &ChunkId, decoder: &mut ChunkDecoder, out: &mut [u8]) -> Result<()> {
        let at = self.locate_needed(id)?;
        let mut stored = vec![0; at.stored_len as usize];
        self.0.packs.read(at.pack, at.offset.into(), &mut stored)?;
        decoder.decode(&at, &stored, id, out).map_err(|error| error.at(self.pack_path(&at)))
    }

    fn pack_path(&self, at: &Location) -> PathBuf {
        self.0.storage.describe(&pack::path(at.pack))
    }

    /// The content of an attachment.
    ///
    /// # Errors
    /// As for [`Repository::read_chunk`].
    pub fn read_attachment(&self, attachment: &Attachment) -> Result<Vec<u8>> {
        let mut bytes = vec![0; attachment.size as usize];
        if bytes.is_empty() && attachment.sha256 == ChunkId::of(&[]) {
            return Ok(bytes);
        }
        self.read_chunk(&attachment.sha256, &mut ChunkDecoder::new()?, &mut bytes)
            .map_err(|error| error.within(format!("attachment {}", attachment.name)))?;
        Ok(bytes)
    }

    /// Begins to capture a snapshot of a group.
    ///
    /// # Errors
    /// When the index cannot be listed or threads cannot be started.
    pub fn begin_capture(&self, group: &GroupName, options: CaptureOptions) -> Result<CaptureWriter> {
        self.0.index.refresh()?;
        CaptureWriter::begin(self.clone(), group.clone(), options)
    }

    /// A map node, from the cache or its pack.
    fn node(&self, id: &ChunkId) -> Result<Arc<Node>> {
        if let Some(node) = self.0.nodes.get(id) {
            return Ok(node);
        }
        let node = self.read_node(id).map_err(|error| error.within("cannot read the disk's map"))?;
        self.0.nodes.insert(*id, node.clone());
        Ok(node)
    }

    /// A map node that must have this level.
    pub(crate) fn node_of_level(&self, level: u8, id: &ChunkId) -> Result<Arc<Node>> {
        let node = self.node(id)?;
        if node.level() != level {
            return Err(Error::damaged(format!("map node {id} has level {}, not {level}", node.level())));
        }
        Ok(node)
    }

    /// A pack's file, open, its header checked.
    pub(crate) fn open_pack(&self, id: PackId) -> Result<Arc<dyn ReadFile>> {
        self.0.packs.file(id)
    }

    fn read_node(&self, id: &ChunkId) -> Result<Arc<Node>> {
        let at = self.locate_needed(id)?;
        if at.plain_len as usize > MAX_NODE_LEN {
            return Err(Error::damaged(format!("map node {id} is too long")).at(self.pack_path(&at)));
        }
        let mut bytes = vec![0; at.plain_len as usize];
        self.read_chunk(id, &mut ChunkDecoder::new()?, &mut bytes)?;
        Ok(Arc::new(Node::decode(&bytes)?))
    }

    pub(crate) fn storage(&self) -> &Arc<dyn Storage> {
        &self.0.storage
    }

    pub(crate) fn index(&self) -> &Arc<Index> {
        &self.0.index
    }
}

impl fmt::Debug for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Repository").field(&self.path()).finish()
    }
}

/// Most who open a repository want what is in it: a new one would be of no use to them.
const BRING_IT: &str = "look at the path, and whether its file system is mounted";

fn read_config(storage: &dyn Storage) -> Result<Config> {
    let bytes = match read_all(storage, config::PATH, frame::MAX_LEN) {
        Ok(Some(bytes)) => bytes,
        Ok(None) => {
            return Err(Error::damaged("the configuration is too long").at(storage.describe(config::PATH)));
        }
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Err(match storage.list("") {
                Ok(_) => {
                    Error::new(ErrorKind::NotARepository, "this directory is not a repository").hint(BRING_IT)
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    Error::new(ErrorKind::NotFound, "there is no such repository").hint(BRING_IT)
                }
                Err(error) if error.kind() == io::ErrorKind::NotADirectory => {
                    Error::new(ErrorKind::NotARepository, "this is a file, not a repository")
                }
                Err(error) => Error::io("cannot open the repository", error),
            }
            .at(storage.describe("")));
        }
        Err(error) => {
            return Err(Error::io("cannot open the repository", error).at(storage.describe(config::PATH)));
        }
    };
    Config::decode(&bytes).map_err(|error| {
        let error = error.at(storage.describe(config::PATH));
        match error.kind() {
            ErrorKind::Damaged => error.within("the repository's configuration is damaged").hint(
                "put a copy of this file back; without one, that of a repository newly made by init does: \
                 nothing else depends on what it says",
            ),
            _ => error,
        }
    })
}

/// `NotFound`, with the nearest of the names that there are.
pub(crate) fn not_found<'a>(what: String, wanted: &str, known: impl IntoIterator<Item = &'a str>) -> Error {
    Error::new(ErrorKind::NotFound, what).offer(nearest_names(wanted, known))
}
