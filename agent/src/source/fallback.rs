//! Copies of a repository: what it cannot give itself is had from them, by the chunk's id and through their own index.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use repository::{ChunkDecoder, ChunkId, ChunkReader, Repository};
use serde::{Deserialize, Serialize};

use crate::cli::Failure;

/// What a copy gave.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FallbackUse {
    /// The copy.
    pub repository: PathBuf,
    /// Chunks that came from it.
    pub chunks: u64,
    /// Their plain bytes.
    pub bytes: u64,
    /// How often it was asked for a chunk that it could not give.
    pub errors: u64,
}

/// The copies that were named, in their order. Cheap to clone.
#[derive(Clone, Default)]
pub struct Fallbacks(Arc<[CopyOfIt]>);

/// One copy.
pub(super) struct CopyOfIt {
    pub(super) repository: Repository,
    pub(super) reader: ChunkReader,
    chunks: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
    told: AtomicBool,
}

impl Fallbacks {
    /// The repository, or, where that cannot be had, the first of its copies that can; and the other copies. A copy that
    /// cannot be had is warned of and left out.
    ///
    /// # Errors
    /// Where a copy is the repository itself. Why the repository cannot be had is inside, for those who can do without it.
    pub fn beside(
        mut main: repository::Result<Repository>,
        copies: &[PathBuf],
        warn: impl Fn(String),
    ) -> anyhow::Result<(repository::Result<Repository>, Self)> {
        let is_same =
            |a: &Path, b: &Path| matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b);
        if let Ok(main) = &main
            && let Some(same) = copies.iter().find(|copy| is_same(copy, &main.path()))
        {
            return Err(Failure::new(
                format!("--fallback {} is the repository itself", same.display()),
                "name a copy of it that lies elsewhere",
            )
            .into());
        }
        let mut opened = Vec::new();
        for copy in copies {
            match Repository::open(copy) {
                Ok(repository) => opened.push(repository),
                Err(error) => {
                    warn(format!("the copy {} cannot be had, and is not used: {error}", copy.display()));
                }
            }
        }
        if let Err(error) = &main
            && !opened.is_empty()
        {
            let copy = opened.remove(0);
            let path = copy.path();
            warn(format!("the repository cannot be had ({error}): its copy {} is used", path.display()));
            main = Ok(copy);
        }
        Ok((main, Self(opened.into_iter().map(CopyOfIt::new).collect())))
    }

    pub(super) fn copies(&self) -> &[CopyOfIt] {
        &self.0
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The first copy's answer that is one; `error` where none has any.
    ///
    /// # Errors
    /// `error`.
    pub fn or_else<T, E>(&self, error: E, ask: impl Fn(&Repository) -> Result<T, E>) -> Result<T, E> {
        self.0.iter().find_map(|copy| ask(&copy.repository).ok()).ok_or(error)
    }

    /// Fills `out` with a chunk that the repository could not give because of `why`, verified by its id.
    ///
    /// # Errors
    /// What each copy says.
    pub fn rescue(
        &self,
        id: &ChunkId,
        decoder: &mut ChunkDecoder,
        out: &mut [u8],
        why: &dyn std::fmt::Display,
    ) -> Result<(), Vec<repository::Error>> {
        let mut failed = Vec::new();
        for copy in &*self.0 {
            match copy.repository.read_chunk(id, decoder, out) {
                Ok(()) => {
                    copy.note(out.len(), why);
                    return Ok(());
                }
                Err(error) => {
                    copy.note_error();
                    failed.push(error);
                }
            }
        }
        Err(failed)
    }

    /// What each copy gave until now; those that gave nothing are left out.
    #[must_use]
    pub fn used(&self) -> Vec<FallbackUse> {
        self.use_of_each().filter(|used| used.chunks > 0).collect()
    }

    /// What each copy gave until now, and did not give.
    pub fn use_of_each(&self) -> impl Iterator<Item = FallbackUse> {
        self.0.iter().map(|copy| FallbackUse {
            repository: copy.repository.path(),
            chunks: copy.chunks.load(Ordering::Relaxed),
            bytes: copy.bytes.load(Ordering::Relaxed),
            errors: copy.errors.load(Ordering::Relaxed),
        })
    }
}

impl CopyOfIt {
    pub(super) fn new(repository: Repository) -> Self {
        let reader = repository.reader();
        let (chunks, bytes, errors) = Default::default();
        Self { repository, reader, chunks, bytes, errors, told: AtomicBool::new(false) }
    }

    /// It was asked for a chunk, and could not give it.
    pub(super) fn note_error(&self) {
        self.errors.fetch_add(1, Ordering::Relaxed);
    }

    /// It gave a chunk of so many bytes. Said once: the numbers say the rest.
    pub(super) fn note(&self, bytes: usize, why: &dyn std::fmt::Display) {
        self.chunks.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        if !self.told.swap(true, Ordering::Relaxed) {
            let copy = self.repository.path();
            tracing::warn!(copy = %copy.display(), %why, "what the repository cannot give is had from its copy");
        }
    }
}

impl std::fmt::Debug for Fallbacks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.0.iter().map(|copy| copy.repository.path())).finish()
    }
}

#[cfg(test)]
mod tests {
    use repository::InitOptions;

    use super::*;

    #[test]
    fn a_repository_is_no_copy_of_itself_and_one_that_cannot_be_had_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let (repo, copy) = (dir.path().join("repo"), dir.path().join("copy"));
        for path in [&repo, &copy] {
            Repository::init(path, InitOptions::default()).unwrap();
        }
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
}
