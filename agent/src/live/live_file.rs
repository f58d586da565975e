//! `V` and `G` in memory that outlives the agent, but not the kernel: the live file.
//!
//! 64-bit words, little-endian, mapped and never synced. A successor believes it only if it carries this
//! kernel's boot id and the session's id, and its state is 1: then every write that was acknowledged is
//! in it, flushed or not. After a host crash its pages are of any age, and its boot id is another.
//!
//! | word | what |
//! |---|---|
//! | 0 | `LBLIVE\x01\n` |
//! | 1, 2 | session id |
//! | 3, 4 | boot id |
//! | 5 | disk size in bytes |
//! | 6 | chunk size in bytes |
//! | 7 | CRC-32 of words 0 to 6 |
//! | 64 | state: 0 being made, 1 in use, 2 poisoned |
//! | 512 | `G`, one bit a block, lowest first, padded to 512 words |
//! | after it | `V`, likewise |
//!
//! Order: state 0; the bits; words 0 to 7; state 1. So what was half made is not believed. A failed
//! sync stores state 2 before anybody hears of the failure. `G` is stored before `V`: a kill between them
//! leaves too much in `G`, which is harmless. The room is allocated before the file is mapped.

use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use block::{BLOCK_SIZE, MappedFile};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::bits::{Bits, words_for};
use super::journal::SessionId;
use super::mistakes::{Mistake, makes};
use super::source::DiskLayout;

const MAGIC: u64 = u64::from_le_bytes(*b"LBLIVE\x01\n");
const CHECKSUM_AT: usize = 7;
const STATE_AT: usize = 64;
const PAGE_WORDS: usize = 512;

const BEING_MADE: u64 = 0;
const IN_USE: u64 = 1;
const POISONED: u64 = 2;

/// What tells one run of the kernel from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootId(pub [u8; 16]);

impl BootId {
    /// The running kernel's.
    pub fn current() -> std::io::Result<Self> {
        let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
        digits.parse().map_err(std::io::Error::other)
    }
}

/// 32 hexadecimal digits.
impl fmt::Display for BootId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

impl FromStr for BootId {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        u128::from_str_radix(text, 16).map(|id| Self(id.to_be_bytes()))
    }
}

/// The words of a live file.
#[derive(Clone, Debug)]
pub enum LiveWords {
    /// A mapped file: what production uses. Where it may come back as it was before it was marked, the mark is set there too.
    Mapped(Arc<MappedFile>, Option<Arc<Path>>),
    /// Plain memory. It survives nothing but the session; tests keep a clone of it.
    Memory(Arc<[AtomicU64]>),
}

impl LiveWords {
    /// How many words the live file of such a disk has.
    #[must_use]
    pub const fn count_for(disk: DiskLayout) -> usize {
        let bitmap = words_for(disk.size.div_ceil(BLOCK_SIZE)).next_multiple_of(PAGE_WORDS);
        PAGE_WORDS + 2 * bitmap
    }

    /// Maps the live file at `path`, which is made where it is not there. Its room is allocated first.
    ///
    /// A file of another size is no live file of this disk: it is emptied.
    pub fn open(path: &Path, disk: DiskLayout) -> block::Result<Self> {
        Self::open_marked(path, disk, None)
    }

    /// As [`LiveWords::open`]; once nobody is to believe it any more, a file is made at `mark`, in a directory that is there, on
    /// storage that does not fail with this one's.
    pub fn open_marked(path: &Path, disk: DiskLayout, mark: Option<Arc<Path>>) -> block::Result<Self> {
        let count = Self::count_for(disk);
        let bytes = count as u64 * 8;
        let open = || -> std::io::Result<File> {
            let file = File::options().read(true).write(true).create(true).truncate(false).open(path)?;
            if file.metadata()?.len() != bytes {
                file.set_len(0)?;
            }
            allocate(&file, bytes)?;
            Ok(file)
        };
        let file = open().map_err(|error| failed(path, error))?;
        Ok(Self::of(path, MappedFile::map(&file, mapped_len(bytes))?, mark))
    }

    /// Maps the live file at `path` to be read, as is possible on a file system that is read-only by now; `None` where there is no
    /// live file of this disk.
    pub fn existing(path: &Path, disk: DiskLayout) -> block::Result<Option<Self>> {
        let bytes = Self::count_for(disk) as u64 * 8;
        let open = || -> std::io::Result<Option<File>> {
            let file = File::open(path)?;
            Ok((file.metadata()?.len() == bytes).then_some(file))
        };
        match open() {
            Ok(Some(file)) => {
                Ok(Some(Self::of(path, MappedFile::map_read_only(&file, mapped_len(bytes))?, None)))
            }
            Ok(None) => Ok(None),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed(path, error)),
        }
    }

    fn of(path: &Path, mapped: MappedFile, mark: Option<Arc<Path>>) -> Self {
        let last_words = format!(
            "lifeboot: the live file {} can be used no more: the storage below it has failed\n  look after it, then run the same \
             command: it goes on from what is known to be stable\n",
            path.display()
        );
        let mapped = mapped.with_last_words(last_words, mark.as_deref());
        Self::Mapped(Arc::new(mapped), mark)
    }

    /// Words of zeroes in memory.
    #[must_use]
    pub fn in_memory(disk: DiskLayout) -> Self {
        Self::Memory((0..Self::count_for(disk)).map(|_| AtomicU64::new(0)).collect())
    }

    /// What was in use is not to be believed: it was marked, and the mark was lost.
    pub fn distrust(&self) {
        let state = &self.words()[STATE_AT];
        if u64::from_le(state.load(Ordering::Acquire)) == IN_USE {
            state.store(POISONED.to_le(), Ordering::SeqCst);
        }
    }

    pub(super) fn words(&self) -> &[AtomicU64] {
        match self {
            Self::Mapped(mapped, _) => mapped.words(0, mapped.len() / 8),
            Self::Memory(words) => words,
        }
    }
}

fn mapped_len(bytes: u64) -> usize {
    usize::try_from(bytes).expect("the bitmaps of a disk fit in the address space")
}

fn failed(path: &Path, error: std::io::Error) -> block::Error {
    block::Error::io(format_args!("live file {}", path.display()), error)
}

fn allocate(file: &File, bytes: u64) -> std::io::Result<()> {
    match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, bytes) {
        Err(Errno::OPNOTSUPP) => {}
        result => return Ok(result?),
    }
    // Where the file system cannot allocate, zeroes are written where the file ends.
    let mut at = file.metadata()?.len();
    let zeroes = [0; 1 << 16];
    while at < bytes {
        let len = zeroes.len().min((bytes - at) as usize);
        file.write_all_at(&zeroes[..len], at)?;
        at += len as u64;
    }
    Ok(())
}

/// A live file as a session uses it.
#[derive(Debug)]
pub(super) struct LiveFile {
    words: LiveWords,
    block_count: u64,
}

impl LiveFile {
    /// # Panics
    /// Where the words are not as many as the disk needs.
    pub(super) fn new(words: LiveWords, disk: DiskLayout) -> Self {
        assert_eq!(
            words.words().len(),
            LiveWords::count_for(disk),
            "a live file for a disk of {} bytes",
            disk.size
        );
        Self { words, block_count: disk.size.div_ceil(BLOCK_SIZE) }
    }

    pub(super) fn is_believable(&self, session: SessionId, boot: BootId, disk: DiskLayout) -> bool {
        let state = self.word(STATE_AT);
        self.is_of(session, boot, disk, makes(Mistake::LiveFileAfterReboot))
            && (state == IN_USE || (makes(Mistake::LiveFileAfterFailedSync) && state == POISONED))
    }

    /// Whether a sync failed in this boot: the bits are those of the session, but `V` promises too much.
    pub(super) fn is_poisoned(&self, session: SessionId, boot: BootId, disk: DiskLayout) -> bool {
        self.is_of(session, boot, disk, false) && self.word(STATE_AT) == POISONED
    }

    fn is_of(&self, session: SessionId, boot: BootId, disk: DiskLayout, any_boot: bool) -> bool {
        header(session, boot, disk).iter().enumerate().all(|(index, &expected)| {
            let is_of_the_boot = matches!(index, 3 | 4 | CHECKSUM_AT);
            self.word(index) == expected || (any_boot && is_of_the_boot)
        })
    }

    /// Forgets what the file says. Until [`LiveFile::begin`] nobody believes it.
    pub(super) fn reset(&self) {
        self.store(STATE_AT, BEING_MADE);
        self.v().clear_all();
        self.g().clear_all();
    }

    /// From now on a successor may believe it.
    pub(super) fn begin(&self, session: SessionId, boot: BootId, disk: DiskLayout) {
        for (index, word) in header(session, boot, disk).into_iter().enumerate() {
            self.store(index, word);
        }
        self.store(STATE_AT, IN_USE);
    }

    /// From now on nobody believes it.
    pub(super) fn poison(&self) {
        self.store(STATE_AT, POISONED);
        if let LiveWords::Mapped(_, Some(mark)) = &self.words
            && let Err(error) = File::create(mark)
        {
            tracing::warn!(%error, mark = %mark.display(), "it cannot be noted that the live file is not to be believed");
        }
    }

    pub(super) fn g(&self) -> Bits<'_> {
        self.bitmap(PAGE_WORDS)
    }

    pub(super) fn v(&self) -> Bits<'_> {
        self.bitmap(PAGE_WORDS + words_for(self.block_count).next_multiple_of(PAGE_WORDS))
    }

    fn bitmap(&self, start: usize) -> Bits<'_> {
        Bits::new(&self.words.words()[start..start + words_for(self.block_count)], self.block_count)
    }

    fn word(&self, index: usize) -> u64 {
        u64::from_le(self.words.words()[index].load(Ordering::Acquire))
    }

    fn store(&self, index: usize, word: u64) {
        self.words.words()[index].store(word.to_le(), Ordering::SeqCst);
    }
}

fn header(session: SessionId, boot: BootId, disk: DiskLayout) -> [u64; 8] {
    let halves = |bytes: [u8; 16]| {
        let (first, second) = bytes.split_at(8);
        [first, second].map(|half| u64::from_le_bytes(half.try_into().expect("eight bytes")))
    };
    let ([session_0, session_1], [boot_0, boot_1]) = (halves(session.0), halves(boot.0));
    let mut words = [MAGIC, session_0, session_1, boot_0, boot_1, disk.size, u64::from(disk.chunk_size), 0];
    let mut hasher = crc32fast::Hasher::new();
    words[..CHECKSUM_AT].iter().for_each(|word| hasher.update(&word.to_le_bytes()));
    words[CHECKSUM_AT] = u64::from(hasher.finalize());
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: DiskLayout = DiskLayout { size: 1 << 20, chunk_size: 65536 };
    const SESSION: SessionId = SessionId([1; 16]);
    const BOOT: BootId = BootId([2; 16]);

    #[test]
    fn a_live_file_is_believed_only_by_its_session_in_its_boot_and_before_poison() {
        let words = LiveWords::in_memory(DISK);
        let live = LiveFile::new(words, DISK);
        let believed = |session, boot, disk| live.is_believable(session, boot, disk);
        assert!(!believed(SESSION, BOOT, DISK), "nothing was begun");
        live.begin(SESSION, BOOT, DISK);
        assert!(believed(SESSION, BOOT, DISK));
        assert!(!believed(SessionId([3; 16]), BOOT, DISK));
        assert!(!believed(SESSION, BootId([3; 16]), DISK));
        assert!(!believed(SESSION, BOOT, DiskLayout { chunk_size: 4096, ..DISK }));
        assert!(!live.is_poisoned(SESSION, BOOT, DISK));
        live.poison();
        assert!(!believed(SESSION, BOOT, DISK));
        assert!(live.is_poisoned(SESSION, BOOT, DISK));
        assert!(!live.is_poisoned(SESSION, BootId([3; 16]), DISK), "the host went down since");
    }

    #[test]
    fn a_mark_that_was_lost_with_the_file_system_is_set_anew_from_the_one_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let (path, mark) = (dir.path().join("live"), dir.path().join("mark"));
        let open = || LiveWords::open_marked(&path, DISK, Some(Arc::from(mark.clone()))).unwrap();
        let live = LiveFile::new(open(), DISK);
        live.begin(SESSION, BOOT, DISK);
        let as_it_was = std::fs::read(&path).unwrap();
        assert!(!mark.exists());
        live.poison();
        assert!(mark.exists());
        drop(live);
        std::fs::write(&path, as_it_was).unwrap();
        let words = open();
        assert!(LiveFile::new(words.clone(), DISK).is_believable(SESSION, BOOT, DISK), "it came back");
        words.distrust();
        assert!(LiveFile::new(words, DISK).is_poisoned(SESSION, BOOT, DISK));
        // What was never in use stays so.
        let words = LiveWords::in_memory(DISK);
        words.distrust();
        assert!(!LiveFile::new(words, DISK).is_poisoned(SESSION, BOOT, DISK));
    }

    #[test]
    fn a_live_file_with_any_byte_of_its_header_changed_is_not_believed() {
        let words = LiveWords::in_memory(DISK);
        let live = LiveFile::new(words.clone(), DISK);
        live.begin(SESSION, BOOT, DISK);
        for index in (0..8).chain([STATE_AT]) {
            for byte in 0..8 {
                words.words()[index].fetch_xor(0x55 << (byte * 8), Ordering::Relaxed);
                assert!(!live.is_believable(SESSION, BOOT, DISK), "word {index} byte {byte}");
                words.words()[index].fetch_xor(0x55 << (byte * 8), Ordering::Relaxed);
            }
        }
    }

    #[test]
    fn a_mapped_live_file_outlives_its_session_and_one_of_another_size_is_emptied() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("live");
        let live = LiveFile::new(LiveWords::open(&path, DISK).unwrap(), DISK);
        live.v().set(3..5);
        live.begin(SESSION, BOOT, DISK);
        drop(live);
        let live = LiveFile::new(LiveWords::open(&path, DISK).unwrap(), DISK);
        assert!(live.is_believable(SESSION, BOOT, DISK));
        assert_eq!(live.v().count(), 2);
        let larger = DiskLayout { size: 1 << 32, ..DISK };
        let live = LiveFile::new(LiveWords::open(&path, larger).unwrap(), larger);
        assert!(!live.is_believable(SESSION, BOOT, larger));
        assert_eq!(live.v().count(), 0);
    }

    #[test]
    fn the_running_kernel_has_a_boot_id() {
        let boot = BootId::current().unwrap();
        assert_eq!(BootId::current().unwrap(), boot);
        assert_eq!(boot.to_string().parse(), Ok(boot));
    }
}
