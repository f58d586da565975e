//! The index: which pack holds a chunk. Segments sorted by id, found by a filter and a page or two; nothing of it need fit in memory.

pub(crate) mod build;
pub(crate) mod filter;
pub(crate) mod merge;
pub(crate) mod page;
pub(crate) mod segment;

use std::io;
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};

use crate::error::{Error, ErrorKind, Result};
use crate::id::{ChunkId, SegmentId};
use crate::index::page::PageCache;
use crate::index::segment::Segment;
use crate::record::Location;
use crate::storage::Storage;

/// The directory of segments.
pub(crate) const DIR: &str = "index";
const SUFFIX: &str = ".index";
/// How often a listing is tried again because a segment vanished in a merge before it was open.
const RELISTS: usize = 100;

/// The path of a segment.
pub(crate) fn path(id: SegmentId) -> String {
    format!("{DIR}/{id}{SUFFIX}")
}

/// All segments, as they were when last looked.
pub(crate) struct Index {
    storage: Arc<dyn Storage>,
    cache: Arc<PageCache>,
    view: RwLock<Arc<View>>,
    /// One refresh at a time; lookups go on meanwhile.
    refreshing: Mutex<()>,
}

/// An unchanging set of open segments.
#[derive(Default)]
pub(crate) struct View {
    /// The newest first: that is where what was just captured is.
    pub(crate) segments: Vec<Arc<Segment>>,
    /// Those that cannot be used, with the reason. What they alone name cannot be found.
    pub(crate) damaged: Vec<(SegmentId, Error)>,
}

impl Index {
    pub(crate) fn open(storage: Arc<dyn Storage>) -> Result<Self> {
        let index = Self {
            storage,
            cache: Arc::new(PageCache::new()),
            view: RwLock::default(),
            refreshing: Mutex::new(()),
        };
        index.refresh()?;
        Ok(index)
    }

    pub(crate) fn view(&self) -> Arc<View> {
        self.view.read().clone()
    }

    /// Looks at the directory again: opens what is new, forgets what was merged away.
    pub(crate) fn refresh(&self) -> Result<()> {
        let _alone = self.refreshing.lock();
        let old = self.view();
        for _ in 0..RELISTS {
            if let Some(view) = self.look(&old)? {
                *self.view.write() = Arc::new(view);
                return Ok(());
            }
        }
        Err(Error::new(ErrorKind::Io, "index segments vanish as fast as they are listed")
            .at(self.storage.describe(DIR)))
    }

    /// One look; none if a segment vanished between listing and opening, so that its successor must be looked for.
    fn look(&self, old: &View) -> Result<Option<View>> {
        let mut ids: Vec<SegmentId> = list(&*self.storage)?;
        ids.sort_unstable_by(|a, b| b.cmp(a));
        let mut view = View::default();
        for id in ids {
            if let Some(open) = old.segments.iter().find(|segment| segment.id() == id) {
                view.segments.push(open.clone());
                continue;
            }
            let file = match self.storage.open(&path(id)) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                Err(error) => {
                    let error = Error::io(format!("cannot open index segment {id}"), error);
                    return Err(error.at(self.storage.describe(&path(id))));
                }
            };
            match Segment::open(file, id, self.cache.clone()) {
                Ok(segment) => view.segments.push(Arc::new(segment)),
                Err(error) => view.damaged.push((id, error.at(self.storage.describe(&path(id))))),
            }
        }
        Ok(Some(view))
    }

    /// Takes a segment of our own into the view.
    pub(crate) fn add(&self, id: SegmentId) -> Result<()> {
        let path = path(id);
        let describe = || self.storage.describe(&path);
        let _alone = self.refreshing.lock();
        let file = match self.storage.open(&path) {
            Ok(file) => file,
            // Another capture has merged it already: its successor is in the directory.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                drop(_alone);
                return self.refresh();
            }
            Err(error) => return Err(Error::io("cannot open an index segment", error).at(describe())),
        };
        let segment = Segment::open(file, id, self.cache.clone()).map_err(|error| error.at(describe()))?;
        let mut view = self.view.write();
        let mut segments = vec![Arc::new(segment)];
        segments.extend(view.segments.iter().cloned());
        *view = Arc::new(View { segments, damaged: view.damaged.clone() });
        Ok(())
    }

    /// Where a chunk is.
    ///
    /// # Errors
    /// When it was not found and some of the index could not be read: then nobody knows.
    pub(crate) fn locate(&self, id: &ChunkId) -> Result<Option<Location>> {
        let view = self.view();
        let mut unsure = None;
        for segment in &view.segments {
            match segment.find(id) {
                Ok(Some(location)) => return Ok(Some(location)),
                Ok(None) => {}
                Err(error) => unsure = Some(error.at(self.storage.describe(&path(segment.id())))),
            }
        }
        match unsure.or_else(|| view.damaged.first().map(|(_, error)| error.clone())) {
            Some(error) => Err(error.within(format!("cannot find chunk {id}"))),
            None => Ok(None),
        }
    }

    pub(crate) fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }
}

/// The segments in the directory.
pub(crate) fn list(storage: &dyn Storage) -> Result<Vec<SegmentId>> {
    let names = storage
        .list(DIR)
        .map_err(|error| Error::io("cannot list the index", error).at(storage.describe(DIR)))?;
    Ok(names.iter().filter_map(|name| name.strip_suffix(SUFFIX)?.parse().ok()).collect())
}
