//! The one error of this crate: a kind to match on, what was being done to what, and what to do about it.

use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The result of everything in this crate that can fail.
pub type Result<T> = std::result::Result<T, Error>;

/// What sort of failure it is; callers match on this, people read the message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// There is no such repository, group, snapshot, disk or attachment.
    NotFound,
    /// The directory is there, but it is not a repository.
    NotARepository,
    /// Something of that name is there already.
    AlreadyExists,
    /// A format version, flag or feature that a newer release wrote.
    NewerFormat,
    /// A chunk is stored in a way that this release does not know.
    UnknownCodec,
    /// A chunk is encrypted under a key that is not known here.
    UnknownKey,
    /// Bytes of the repository are not what was once written.
    Damaged,
    /// What stood there could not be captured: no copy of the repository has it either.
    Lost,
    /// The disk or the quota is full.
    NoSpace,
    /// The operating system refused.
    NotPermitted,
    /// The caller asked for something that has no meaning.
    InvalidInput,
    /// Any other failure of input or output.
    Io,
}

/// A failure, with its kind and context. Cheap to clone: workers that stop because of it all report it.
#[derive(Debug, Clone, thiserror::Error)]
pub struct Error(Box<Inner>);

#[derive(Debug, Clone)]
struct Inner {
    kind: ErrorKind,
    what: String,
    path: Option<PathBuf>,
    hint: Option<String>,
    nearest: Vec<String>,
    /// Something is not there, or ends too early; nothing was read that is wrong.
    missing: bool,
    source: Option<Source>,
    /// Who else was asked, and what each said.
    others: Vec<String>,
}

/// Shared, because an error is cloned to everybody whom it stops.
#[derive(Debug, Clone)]
struct Source(Arc<dyn StdError + Send + Sync>);

impl Error {
    pub(crate) fn new(kind: ErrorKind, what: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            kind,
            what: what.into(),
            path: None,
            hint: None,
            nearest: Vec::new(),
            missing: false,
            source: None,
            others: Vec::new(),
        }))
    }

    pub(crate) fn damaged(what: impl Into<String>) -> Self {
        Self::new(ErrorKind::Damaged, what)
    }

    /// Damage that consists in something not being there.
    pub(crate) fn missing(what: impl Into<String>) -> Self {
        let mut error = Self::damaged(what);
        error.0.missing = true;
        error
    }

    /// That a snapshot does not have what stood at a place of a disk: a guest had written to the chunk, and the rest of
    /// it was damaged. An older chunk that stood there is not what the guest had.
    pub fn lost() -> Self {
        Self::new(
            ErrorKind::Lost,
            "it was lost before the snapshot was made: its guest had written to part of it, and the rest was damaged",
        )
    }

    pub(crate) fn invalid(what: impl Into<String>) -> Self {
        Self::new(ErrorKind::InvalidInput, what)
    }

    /// An operating system's error while doing `what`, with the kind that follows from it.
    pub(crate) fn io(what: impl Into<String>, source: io::Error) -> Self {
        let (kind, hint) = match source.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => {
                (ErrorKind::NoSpace, Some("free some space where the repository is, then try again"))
            }
            Some(libc::EACCES | libc::EPERM) => {
                (ErrorKind::NotPermitted, Some("check the owner and the permissions"))
            }
            Some(libc::EROFS) => (ErrorKind::NotPermitted, Some("the file system is mounted read-only")),
            _ if source.kind() == io::ErrorKind::NotFound => (ErrorKind::NotFound, None),
            _ if source.kind() == io::ErrorKind::AlreadyExists => (ErrorKind::AlreadyExists, None),
            _ if source.kind() == io::ErrorKind::UnexpectedEof => (ErrorKind::Damaged, None),
            _ => (ErrorKind::Io, None),
        };
        let missing = matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::UnexpectedEof);
        let mut error = Self::new(kind, what).because(source);
        error.0.missing = missing;
        match hint {
            Some(hint) => error.hint(hint),
            None => error,
        }
    }

    pub(crate) fn at(mut self, path: impl Into<PathBuf>) -> Self {
        if self.0.path.is_none() {
            self.0.path = Some(path.into());
        }
        self
    }

    pub(crate) fn kind_is(mut self, kind: ErrorKind) -> Self {
        self.0.kind = kind;
        self
    }

    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.0.hint = Some(hint.into());
        self
    }

    pub(crate) fn because(mut self, source: impl StdError + Send + Sync + 'static) -> Self {
        self.0.source = Some(Source(Arc::new(source)));
        self
    }

    /// Puts `outer` before the message: what the failed step was part of.
    pub(crate) fn within(mut self, outer: impl fmt::Display) -> Self {
        self.0.what = format!("{outer}: {}", self.0.what);
        self
    }

    /// Puts `more` behind the message: what else is wrong.
    pub(crate) fn and(mut self, more: impl fmt::Display) -> Self {
        self.0.what = format!("{}, and {more}", self.0.what);
        self
    }

    /// Puts behind all of the message what `other` said, who was asked in its place.
    #[must_use]
    pub fn asked_too(mut self, other: impl fmt::Display, said: &Self) -> Self {
        self.0.others.push(format!("{other}: {said}"));
        self
    }

    pub(crate) fn offer(mut self, nearest: Vec<String>) -> Self {
        self.0.nearest = nearest;
        self
    }

    /// The same of a name that nobody typed: none is offered in its place.
    #[must_use]
    pub fn without_nearest(mut self) -> Self {
        self.0.nearest.clear();
        self
    }

    /// The same with other advice, for whoever knows what it was done for.
    #[must_use]
    pub fn advising(self, advice: impl Into<String>) -> Self {
        self.hint(advice)
    }

    /// The sort of failure.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The file it is about, where there is one.
    pub fn path(&self) -> Option<&Path> {
        self.0.path.as_deref()
    }

    /// What somebody could do about it.
    pub fn advice(&self) -> Option<&str> {
        self.0.hint.as_deref()
    }

    /// Names like the one that was not found, best first.
    pub fn nearest(&self) -> &[String] {
        &self.0.nearest
    }

    /// Whether trying again may help: the failure is of the way to the bytes, not of the bytes.
    pub fn is_transient(&self) -> bool {
        self.0.kind == ErrorKind::Io
    }

    /// Whether something is not there, or ends too early: a file that may be put back, on a file system that may not be
    /// mounted. Bytes that were read and are wrong are not missing.
    pub fn is_missing(&self) -> bool {
        self.0.missing
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.what)?;
        if let Some(path) = &self.0.path {
            write!(f, " ({})", path.display())?;
        }
        match self.0.nearest.as_slice() {
            [] => {}
            [one] => write!(f, "; did you mean {one}?")?,
            several => write!(f, "; did you mean one of {}?", several.join(", "))?,
        }
        if let Some(hint) = &self.0.hint {
            write!(f, "; {hint}")?;
        }
        if let Some(source) = &self.0.source {
            write!(f, ": {}", source.0)?;
        }
        self.0.others.iter().try_for_each(|other| write!(f, "; {other}"))
    }
}

/// Up to three of `known` that are like `wanted`, best first.
pub(crate) fn nearest_names<'a>(wanted: &str, known: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    const LIKE_ENOUGH: f64 = 0.7;
    const OFFERED: usize = 3;
    let mut scored: Vec<(f64, &str)> = known
        .into_iter()
        .map(|name| {
            let part_of = !wanted.is_empty() && (name.contains(wanted) || wanted.contains(name));
            let score = strsim::jaro_winkler(&wanted.to_lowercase(), &name.to_lowercase());
            (if part_of { score.max(LIKE_ENOUGH) } else { score }, name)
        })
        .filter(|(score, _)| *score >= LIKE_ENOUGH)
        .collect();
    scored.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(b.1)));
    scored.into_iter().take(OFFERED).map(|(_, name)| name.to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_and_a_refusal_have_their_own_kinds() {
        for (errno, kind) in [
            (libc::ENOSPC, ErrorKind::NoSpace),
            (libc::EDQUOT, ErrorKind::NoSpace),
            (libc::EACCES, ErrorKind::NotPermitted),
            (libc::EROFS, ErrorKind::NotPermitted),
            (libc::EIO, ErrorKind::Io),
        ] {
            let error = Error::io("cannot write a pack", io::Error::from_raw_os_error(errno));
            assert_eq!(error.kind(), kind);
        }
    }

    #[test]
    fn what_is_not_there_is_told_from_what_is_wrong() {
        let of = |kind: io::ErrorKind| Error::io("cannot open a pack", kind.into());
        assert!(of(io::ErrorKind::NotFound).kind_is(ErrorKind::Damaged).is_missing());
        assert!(of(io::ErrorKind::UnexpectedEof).is_missing());
        assert!(Error::missing("a chunk is in no index").within("restoring").is_missing());
        assert!(!of(io::ErrorKind::PermissionDenied).is_missing());
        assert!(!Error::damaged("a chunk does not match its CRC").is_missing());
    }

    #[test]
    fn the_message_names_what_where_what_is_near_and_what_to_do() {
        let error = Error::new(ErrorKind::NotFound, "no group web1").at("/r").offer(vec!["web01".into()]);
        assert_eq!(error.hint("look").to_string(), "no group web1 (/r); did you mean web01?; look");
    }

    #[test]
    fn what_others_said_comes_last() {
        let gone = Error::new(ErrorKind::NotFound, "there is no such repository").at("/r").hint("look");
        let lacks = Error::new(ErrorKind::NotFound, "no group web01").at("/a");
        let told = gone.asked_too("its copy /a", &lacks).to_string();
        assert_eq!(told, "there is no such repository (/r); look; its copy /a: no group web01 (/a)");
    }

    #[test]
    fn near_names_come_best_first_and_strangers_do_not_come() {
        assert_eq!(nearest_names("web1", ["db", "web02", "web01", "mail"]), ["web01", "web02"]);
        assert!(nearest_names("web1", ["zzz"]).is_empty());
    }
}
