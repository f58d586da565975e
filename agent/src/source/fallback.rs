//! Copies of a repository: what it cannot give itself is had from them, by the chunk's id and through their own index.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use repository::{ChunkDecoder, ChunkId, ChunkReader, ErrorKind, Repository};
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
    /// The repository, or, where that cannot be had or `lacks` what is wanted, the first of its copies that has it; and all the
    /// others, in their order. A copy that cannot be had is warned of and left out, one that is passed over is warned of.
    ///
    /// # Errors
    /// Where a copy is the repository itself. Why nobody has what is wanted is inside, for those who can do without it; where
    /// the repository is there, it is given all the same, and says so itself.
    pub fn beside(
        main: repository::Result<Repository>,
        copies: &[PathBuf],
        lacks: impl Fn(&Repository) -> repository::Result<()>,
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
        let mut unopened = Vec::new();
        for copy in copies {
            match Repository::open(copy) {
                Ok(repository) => opened.push(repository),
                Err(error) => {
                    warn(format!("the copy {} cannot be had, and is not used: {error}", copy.display()));
                    unopened.push((copy.clone(), error));
                }
            }
        }
        let of = |copies: Vec<Repository>| Self(copies.into_iter().map(CopyOfIt::new).collect());
        let (why, what) = match &main {
            Ok(main) => match lacks(main) {
                Err(error) if error.kind() != ErrorKind::InvalidInput => {
                    (error, "does not have what is wanted")
                }
                there => {
                    // A name that nobody can have says nothing of the copies.
                    let asked = if there.is_ok() { opened.as_slice() } else { &[] };
                    for (copy, error) in asked.iter().filter_map(|copy| Some((copy, lacks(copy).err()?))) {
                        warn(format!(
                            "the copy {} does not have what is wanted, and can give no more of it than what is in its own snapshots \
                             too: {error}",
                            copy.path().display()
                        ));
                    }
                    return Ok((Ok(main.clone()), of(opened)));
                }
            },
            Err(error) => (error.clone(), "cannot be had"),
        };
        let mut passed_over = Vec::new();
        let Some(place) = opened
            .iter()
            .position(|copy| lacks(copy).map_err(|error| passed_over.push((copy.path(), error))).is_ok())
        else {
            let told =
                |error: repository::Error, (copy, said): &(PathBuf, _)| error.asked_too(its_copy(copy), said);
            let main = main.map_err(|error| passed_over.iter().chain(&unopened).fold(error, told));
            return Ok((main, of(opened)));
        };
        let copy = opened.remove(place);
        for (passed, error) in &passed_over {
            warn(format!(
                "the copy {} does not have what is wanted, and is passed over: {error}",
                passed.display()
            ));
        }
        warn(format!("the repository {what} ({why}): its copy {} is used", copy.path().display()));
        // What is there of the repository is asked for chunks first.
        let others = main.ok().into_iter().chain(opened).collect();
        Ok((Ok(copy), of(others)))
    }

    /// The copies' repositories, in their order.
    pub fn repositories(&self) -> impl Iterator<Item = &Repository> {
        self.0.iter().map(|copy| &copy.repository)
    }

    pub(super) fn copies(&self) -> &[CopyOfIt] {
        &self.0
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The first copy's answer that is one; `error`, and what each copy said, where none has any.
    ///
    /// # Errors
    /// `error`.
    pub fn or_else<T>(
        &self,
        error: repository::Error,
        ask: impl Fn(&Repository) -> repository::Result<T>,
    ) -> repository::Result<T> {
        let mut failed = Vec::new();
        for copy in &*self.0 {
            match ask(&copy.repository) {
                Ok(answer) => return Ok(answer),
                Err(error) => failed.push(error),
            }
        }
        Err(self.and_they_said(error, &failed))
    }

    /// `error`, and what each copy said who was asked then.
    #[must_use]
    pub fn and_they_said(&self, error: repository::Error, said: &[repository::Error]) -> repository::Error {
        let copies = self.0.iter().zip(said);
        copies.fold(error, |error, (copy, said)| error.asked_too(its_copy(&copy.repository.path()), said))
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
                    copy.note_error(&error);
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

    /// It was asked for a chunk, and could not give it. Said once: the number says the rest.
    pub(super) fn note_error(&self, why: &repository::Error) {
        if self.errors.fetch_add(1, Ordering::Relaxed) == 0 {
            let copy = self.repository.path();
            tracing::warn!(copy = %copy.display(), %why, "a copy lacks what the repository cannot give, and is passed over for that");
        }
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

/// How a copy is called in what is said.
fn its_copy(copy: &Path) -> String {
    format!("its copy {}", copy.display())
}

impl std::fmt::Debug for Fallbacks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.0.iter().map(|copy| copy.repository.path())).finish()
    }
}

#[cfg(test)]
mod tests {
    use repository::{CaptureOptions, InitOptions, SnapshotMeta};

    use super::*;

    #[test]
    fn a_repository_is_no_copy_of_itself_and_one_that_cannot_be_had_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let (repo, copy) = (dir.path().join("repo"), dir.path().join("copy"));
        for path in [&repo, &copy] {
            Repository::init(path, InitOptions::default()).unwrap();
        }
        let silent = |_: String| ();
        let beside = |repo: &Path, copies: &[PathBuf]| {
            Fallbacks::beside(Repository::open(repo), copies, |_| Ok(()), silent)
        };
        let same = beside(&repo, &[dir.path().join("copy/../repo")]).unwrap_err();
        assert!(same.to_string().contains("the repository itself"), "{same}");
        let (main, fallbacks) = beside(&dir.path().join("gone"), std::slice::from_ref(&copy)).unwrap();
        assert_eq!(main.unwrap().path(), Repository::open(&copy).unwrap().path());
        assert!(fallbacks.is_empty());
        let (main, fallbacks) = beside(&repo, &[dir.path().join("gone"), copy]).unwrap();
        assert!(main.is_ok() && fallbacks.copies().len() == 1);
    }

    #[test]
    fn a_copy_that_lacks_what_is_wanted_is_passed_over_for_the_next_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        for name in ["repo", "empty", "whole", "late"] {
            let repository = Repository::init(path(name), InitOptions::default()).unwrap();
            if ["whole", "late"].contains(&name) {
                let group = "vm".parse().unwrap();
                let mut capture = repository.begin_capture(&group, CaptureOptions::default()).unwrap();
                let disk = capture.begin_disk("disk0".parse().unwrap(), 1 << 20, 64 << 10, None).unwrap();
                disk.put_zero(0..16).unwrap();
                drop(disk);
                capture.commit(SnapshotMeta::default()).unwrap();
            }
        }
        let said = std::cell::RefCell::new(Vec::new());
        let beside = |main: &str, copies: &[&str]| {
            let copies: Vec<_> = copies.iter().map(|name| path(name)).collect();
            let lacks = |repository: &Repository| repository.resolve("vm@latest").map(drop);
            let warn = |text| said.borrow_mut().push(text);
            let (main, fallbacks) =
                Fallbacks::beside(Repository::open(path(main)), &copies, lacks, warn).unwrap();
            let others: Vec<_> = fallbacks.copies().iter().map(|copy| copy.repository.path()).collect();
            (main, others, said.take())
        };
        let (main, others, said) = beside("gone", &["empty", "whole", "late"]);
        assert_eq!((main.unwrap().path(), others), (path("whole"), vec![path("empty"), path("late")]));
        let [passed, used] = said.as_slice() else { panic!("{said:?}") };
        assert!(passed.contains("empty") && passed.contains("no group vm"), "{passed}");
        assert!(used.contains("whole") && used.contains("no such repository"), "{used}");
        // Also where it is not needed yet.
        let (main, others, said) = beside("whole", &["empty", "late"]);
        assert_eq!((main.unwrap().path(), others), (path("whole"), vec![path("empty"), path("late")]));
        let [lacking] = said.as_slice() else { panic!("{said:?}") };
        assert!(lacking.contains("empty does not have what is wanted"), "{lacking}");
        // One that is there and does not have it is asked for chunks all the same.
        let (main, others, _) = beside("repo", &["empty", "late"]);
        assert_eq!((main.unwrap().path(), others), (path("late"), vec![path("repo"), path("empty")]));
        let (main, others, said) = beside("gone", &["empty", "nowhere"]);
        let told = main.unwrap_err().to_string();
        let named = [path("gone"), path("empty"), path("nowhere")];
        assert!(named.iter().all(|path| told.contains(&path.display().to_string())), "{told}");
        assert!(
            told.contains("no group vm") && said.len() == 1 && others == [path("empty")],
            "{told} {said:?}"
        );
        let (main, others, _) = beside("whole", &["empty"]);
        assert_eq!((main.unwrap().path(), others), (path("whole"), vec![path("empty")]));
    }
}
