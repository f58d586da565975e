//! The cells of the table: what is served how, and what clients do.

use anyhow::{Result, ensure};

use crate::fio::Job;

/// How the server reads and writes the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cache {
    /// Through the page cache, and the file is in it.
    Page,
    /// Through the page cache, which has nothing of the file when a turn begins.
    Cold,
    /// Past it, by `O_DIRECT`.
    Direct,
}

/// How clients reach the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Transport {
    Unix,
    /// TCP on the loopback interface.
    Tcp,
    /// TLS with an X.509 certificate, on TCP.
    Tls,
}

/// What clients do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Work {
    /// fio runs a job.
    Fio(Job),
    /// nbdcopy reads the whole disk over four connections and throws it away.
    Copy,
    /// `qemu-img bench`, 4 KiB at depth 32, one request after the other.
    QemuBench { write: bool },
}

/// One cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cell {
    pub(super) cache: Cache,
    pub(super) transport: Transport,
    pub(super) work: Work,
}

const PATTERNS: [&str; 4] = ["randread", "randwrite", "read", "write"];
const BLOCK_SIZES: [u32; 3] = [4 << 10, 64 << 10, 1 << 20];
const DEPTHS: [u32; 2] = [1, 32];
const CONNECTIONS: [u32; 2] = [1, 4];
/// Every way of serving, in order, each with every kind of work that makes sense there.
const WAYS: [(Cache, Transport); 5] = [
    (Cache::Page, Transport::Unix),
    (Cache::Page, Transport::Tcp),
    (Cache::Page, Transport::Tls),
    (Cache::Direct, Transport::Unix),
    (Cache::Cold, Transport::Unix),
];

impl Cell {
    /// What it has in common with the cells that are judged together: `page-unix`.
    pub(super) fn way(&self) -> String {
        let cache = match self.cache {
            Cache::Page => "page",
            Cache::Cold => "cold",
            Cache::Direct => "direct",
        };
        let transport = match self.transport {
            Transport::Unix => "unix",
            Transport::Tcp => "tcp",
            Transport::Tls => "tls",
        };
        format!("{cache}-{transport}")
    }

    /// Its name in the table and for `--cells`.
    pub(super) fn name(&self) -> String {
        let work = match self.work {
            Work::Fio(job) => job.name(),
            Work::Copy => "nbdcopy-to-null".to_owned(),
            Work::QemuBench { write: false } => "qemu-img-bench-read".to_owned(),
            Work::QemuBench { write: true } => "qemu-img-bench-write".to_owned(),
        };
        format!("{}-{work}", self.way())
    }

    /// The title of its 99th percentile.
    pub(super) fn p99_title(&self) -> String {
        format!("{} p99", self.name())
    }

    /// The same over so many connections.
    pub(super) fn over(self, connections: u32) -> Option<Self> {
        let Work::Fio(job) = self.work else { return None };
        Some(Self { work: Work::Fio(Job { connections, ..job }), ..self })
    }

    /// Whether somebody can have it: files are cold for who reads them only.
    fn makes_sense(&self) -> bool {
        match self.work {
            Work::Fio(job) => self.cache != Cache::Cold || !job.writes(),
            Work::Copy => true,
            // Over TCP qemu-nbd makes it wait for delayed acknowledgements; with TLS it would take other credentials.
            Work::QemuBench { .. } => self.cache == Cache::Page && self.transport == Transport::Unix,
        }
    }
}

/// Every cell, in order.
pub(super) fn table() -> Vec<Cell> {
    let mut works = Vec::new();
    for block_size in BLOCK_SIZES {
        for pattern in PATTERNS {
            for depth in DEPTHS {
                for connections in CONNECTIONS {
                    works.push(Work::Fio(Job { pattern, block_size, depth, connections }));
                }
            }
        }
    }
    works.extend([Work::Copy, Work::QemuBench { write: false }, Work::QemuBench { write: true }]);
    let cells = WAYS.into_iter().flat_map(|(cache, transport)| {
        works.clone().into_iter().map(move |work| Cell { cache, transport, work })
    });
    cells.filter(Cell::makes_sense).collect()
}

/// The cells whose name has one of `texts` in it; all where there is none.
pub(super) fn chosen(texts: &[String]) -> Result<Vec<Cell>> {
    let wanted = |cell: &Cell| {
        let name = cell.name();
        texts.is_empty() || texts.iter().any(|text| text.split('+').all(|part| name.contains(part)))
    };
    let cells: Vec<Cell> = table().into_iter().filter(wanted).collect();
    let names: Vec<String> = table().iter().map(Cell::name).collect();
    ensure!(!cells.is_empty(), "no cell is so named; there are: {}", names.join(", "));
    Ok(cells)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(texts: &[&str]) -> Result<Vec<Cell>> {
        chosen(&texts.iter().map(|&text| text.to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn cells_are_chosen_by_parts_of_their_name() {
        assert!(named(&["direct"]).unwrap().iter().all(|cell| cell.cache == Cache::Direct));
        assert_eq!(named(&["page-unix-randread-4k-d32-c1"]).unwrap().len(), 1);
        let both = named(&["tls+d1-+64k"]).unwrap();
        assert_eq!(both.len(), PATTERNS.len() * CONNECTIONS.len());
        assert!(format!("{:#}", named(&["nonsense"]).unwrap_err()).contains("page-tcp-nbdcopy-to-null"));
    }

    #[test]
    fn every_cell_has_a_name_of_its_own() {
        let mut names: Vec<String> = table().iter().map(Cell::name).collect();
        let count = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    #[test]
    fn nobody_writes_to_a_cold_file() {
        assert!(
            named(&["cold"]).unwrap().iter().all(|cell| !matches!(cell.work, Work::Fio(job) if job.writes()))
        );
    }
}
