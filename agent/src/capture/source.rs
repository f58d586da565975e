//! What a capture reads: named sources, checked before anything is read.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use anyhow::Context as _;
use nbd_server::client::NbdUri;
use repository::DiskName;

use super::export::ExportSource;
use super::file::FileSource;
use super::format;
use crate::cli::{Failure, Interrupt};

/// `[NAME=]SOURCE` on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SourceArg {
    name: Option<DiskName>,
    place: Place,
}

/// Where a source is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    File(PathBuf),
    /// An export, with its URI as it was written.
    Export(Box<NbdUri>, String),
}

impl FromStr for SourceArg {
    type Err = String;

    /// What stands before the first `=` is a name, unless it has a slash, as a path or a URI has: `./a=b`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.is_empty() {
            return Err("a source is a file, a block device or an NBD URI".to_owned());
        }
        let (name, place) = match text.split_once('=') {
            Some((name, place)) if !name.contains('/') => {
                let name = name
                    .parse::<DiskName>()
                    .map_err(|error| format!("{error}; to name a file with = in its name, write ./{text}"))?;
                (Some(name), place)
            }
            _ => (None, text),
        };
        if place.is_empty() {
            return Err("there is no source after the =".to_owned());
        }
        let place = match place.split_once("://") {
            Some((scheme, _)) if !scheme.contains('/') => {
                if !scheme.starts_with("nbd") {
                    return Err(format!(
                        "sources of the kind {scheme}:// are not supported: name a file, a block device or an NBD URI"
                    ));
                }
                let uri: NbdUri = place.parse().map_err(|error: nbd_server::Error| error.to_string())?;
                Place::Export(Box::new(uri), place.to_owned())
            }
            // As QEMU's older file names are.
            None if place.starts_with("nbd:") => {
                return Err(format!(
                    "\"{place}\" is no NBD URI: write nbd://HOST:PORT/EXPORT or nbd+unix:///EXPORT?socket=PATH (or ./{place}, if \
                     it is a file)"
                ));
            }
            _ => Place::File(place.into()),
        };
        Ok(Self { name, place })
    }
}

/// Gives each source its name: its own, or disk0, disk1, … by its place.
///
/// # Errors
/// Where two sources have one name.
pub(super) fn name_all(sources: Vec<SourceArg>) -> Result<Vec<(DiskName, Place)>, String> {
    let mut named: Vec<(DiskName, Place)> = Vec::with_capacity(sources.len());
    for (index, source) in sources.into_iter().enumerate() {
        let name = match source.name {
            Some(name) => name,
            None => format!("disk{index}").parse().expect("such a name has letters and digits only"),
        };
        if named.iter().any(|(other, _)| *other == name) {
            return Err(format!("two disks are called {name}: give them names, like root=a.raw data=b.raw"));
        }
        named.push((name, source.place));
    }
    Ok(named)
}

/// A source that can be read.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) name: DiskName,
    pub(super) size: u64,
    pub(super) contents: Contents,
}

/// What a source's bytes come from.
#[derive(Debug)]
pub(super) enum Contents {
    File(FileSource),
    Export(Arc<ExportSource>),
}

impl Source {
    /// Opens a source for reading.
    ///
    /// # Errors
    /// Where it cannot be read, is empty, or is not the bytes of a disk (unless `as_raw`).
    pub(super) fn open(
        name: DiskName,
        place: Place,
        as_raw: bool,
        interrupt: &Interrupt,
    ) -> anyhow::Result<Self> {
        let (contents, size) = match place {
            Place::File(path) => {
                let file = FileSource::open(path)?;
                let size = file.size();
                (Contents::File(file), size)
            }
            Place::Export(uri, text) => {
                let export = ExportSource::open(&uri, text, interrupt)?;
                let size = export.size();
                (Contents::Export(Arc::new(export)), size)
            }
        };
        let source = Self { name, size, contents };
        if size == 0 {
            return Err(Failure::new(
                format_args!("the source {source} is empty: it has 0 bytes"),
                "name the file, device or export that holds the disk",
            )
            .into());
        }
        if let Some(container) = format::container(&source.head()?)
            && !as_raw
        {
            let advice = match &source.contents {
                Contents::File(file) => container.advice(file.path()),
                Contents::Export(_) => container.advice_for_export(),
            };
            return Err(Failure::new(
                format_args!("the source {source} is not a raw disk: it is {} data", container.name),
                advice,
            )
            .into());
        }
        Ok(source)
    }

    /// Its first bytes, as many as tell image formats.
    fn head(&self) -> anyhow::Result<Vec<u8>> {
        match &self.contents {
            Contents::File(file) => {
                let mut head = vec![0; format::PROBE_LEN];
                let len = file.read_up_to(&mut head, 0)?;
                head.truncate(len);
                Ok(head)
            }
            Contents::Export(export) => {
                export.head(format::PROBE_LEN).with_context(|| format!("cannot read the source {self}"))
            }
        }
    }

    /// The path it was named by, if it is a file or a device of this host.
    pub(super) fn path(&self) -> Option<&Path> {
        match &self.contents {
            Contents::File(file) => Some(file.path()),
            Contents::Export(_) => None,
        }
    }

    /// How the source changed since it was opened, in words; `None` where it did not, or that cannot be known.
    pub(super) fn change(&self) -> anyhow::Result<Option<String>> {
        match &self.contents {
            Contents::File(file) => file.change(),
            // An export does not tell of writes; what it is at is its server's affair.
            Contents::Export(_) => Ok(None),
        }
    }
}

impl fmt::Display for Source {
    /// As it was named.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.contents {
            Contents::File(file) => write!(f, "{}", file.path().display()),
            Contents::Export(export) => f.write_str(export.text()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arg(text: &str) -> SourceArg {
        text.parse().unwrap()
    }

    #[test]
    fn a_name_stands_before_the_first_equals_sign() {
        assert_eq!(arg("root=/a=b").place, Place::File("/a=b".into()));
        assert_eq!(arg("root=/a=b").name.unwrap().as_str(), "root");
        assert_eq!(arg("./a=b"), SourceArg { name: None, place: Place::File("./a=b".into()) });
        for bad in ["", "=x", "root=", "a b=x", "s3://bucket/x", "root=nbd+unix:///x", "nbd:unix:/s"] {
            assert!(bad.parse::<SourceArg>().is_err(), "{bad}");
        }
    }

    #[test]
    fn uris_may_have_equals_signs() {
        for (text, name) in [
            ("nbd+unix:///x?socket=/a=b", None),
            ("root=nbd+unix:///x?socket=/a=b", Some("root")),
            ("nbds://host/x?tls-certificates=/c&tls-hostname=h", None),
            ("root=nbds://host", Some("root")),
        ] {
            let arg = arg(text);
            assert_eq!(arg.name.as_ref().map(DiskName::as_str), name, "{text}");
            let uri = text.strip_prefix("root=").unwrap_or(text);
            assert_eq!(arg.place, Place::Export(Box::new(uri.parse().unwrap()), uri.to_owned()));
        }
        assert_eq!(arg("./nbd://x").place, Place::File("./nbd://x".into()));
        assert!("http://host/x".parse::<SourceArg>().unwrap_err().contains("http://"));
        assert!("nbd+unix:///x".parse::<SourceArg>().unwrap_err().contains("socket is missing"));
    }

    #[test]
    fn disks_without_a_name_are_numbered_by_their_place() {
        let named = name_all(vec![arg("a"), arg("data=b"), arg("c")]).unwrap();
        let names = named.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>();
        assert_eq!(names, ["disk0", "data", "disk2"]);
        assert!(name_all(vec![arg("disk1=a"), arg("b")]).unwrap_err().contains("disk1"));
    }
}
