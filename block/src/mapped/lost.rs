//! What is said when a mapped file is lost under the process that uses it.
//!
//! A store to a mapping has no result. Where the file system below cannot provide the page any more (it was shut down after an
//! error, its disk is gone) the kernel sends SIGBUS, which would end the process without a word. So mappings are listed here with
//! their last words, and a handler says those of the one that was touched, leaves the mark that its owner wants, and ends the process with
//! exit code 1. Nothing else can be done: what the mapping held may be gone, and the thread cannot go on without it.

use std::ffi::{CString, c_char, c_int};
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

/// How many mappings can be listed; one that finds no place ends as if there were no list.
const MAX_LISTED: usize = 1024;
/// The exit code of a program that failed.
const EXIT_FAILED: c_int = 1;

static LIST: [Entry; MAX_LISTED] = [const { Entry::free() }; MAX_LISTED];
/// What was done about SIGBUS before.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

struct Entry {
    /// The first byte of the mapping; 0 is no mapping, and `TAKEN` one that is being listed.
    start: AtomicUsize,
    len: AtomicUsize,
    words: AtomicPtr<u8>,
    words_len: AtomicUsize,
    mark: AtomicPtr<c_char>,
}

const TAKEN: usize = 1;

impl Entry {
    const fn free() -> Self {
        Self {
            start: AtomicUsize::new(0),
            len: AtomicUsize::new(0),
            words: AtomicPtr::new(ptr::null_mut()),
            words_len: AtomicUsize::new(0),
            mark: AtomicPtr::new(ptr::null_mut()),
        }
    }
}

/// A mapping that is listed, until this is dropped.
#[derive(Debug)]
pub(super) struct Listed(usize);

impl Listed {
    /// Lists the mapping of `len` bytes from `start` with its last words; `None` where there is no place.
    pub(super) fn new(start: usize, len: usize, words: String, mark: Option<CString>) -> Option<Self> {
        BEFORE.get_or_init(install);
        let is_free = |entry: &Entry| {
            entry.start.compare_exchange(0, TAKEN, Ordering::Acquire, Ordering::Relaxed).is_ok()
        };
        let at = LIST.iter().position(is_free)?;
        let entry = &LIST[at];
        // Kept for ever: a handler on another thread may be reading them when the mapping ends.
        let words = words.leak();
        entry.words_len.store(words.len(), Ordering::Relaxed);
        entry.words.store(words.as_mut_ptr(), Ordering::Relaxed);
        entry.mark.store(mark.map_or(ptr::null_mut(), CString::into_raw), Ordering::Relaxed);
        entry.len.store(len, Ordering::Relaxed);
        entry.start.store(start, Ordering::Release);
        Some(Self(at))
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        LIST[self.0].start.store(0, Ordering::Release);
    }
}

fn install() -> libc::sigaction {
    // SAFETY: all zeroes are a valid `sigaction`: no flags, an empty mask, the default handler.
    let (mut action, mut before): (libc::sigaction, libc::sigaction) = unsafe { std::mem::zeroed() };
    let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_bus_error;
    action.sa_sigaction = handler as libc::sighandler_t;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: both point to whole structures; the handler does only what a handler may.
    if unsafe { libc::sigaction(libc::SIGBUS, &raw const action, &raw mut before) } != 0 {
        tracing::warn!(error = %std::io::Error::last_os_error(), "SIGBUS is not handled");
    }
    before
}

/// Runs in the midst of anything: it allocates nothing, takes no lock, and calls only what is safe in a handler.
extern "C" fn on_bus_error(signal: c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel gives a handler with SA_SIGINFO a whole structure; SIGBUS has an address.
    let address = unsafe { (*info).si_addr() }.addr();
    for entry in &LIST {
        let start = entry.start.load(Ordering::Acquire);
        if start > TAKEN && address.wrapping_sub(start) < entry.len.load(Ordering::Relaxed) {
            let words = entry.words.load(Ordering::Relaxed);
            let len = entry.words_len.load(Ordering::Relaxed);
            let mark = entry.mark.load(Ordering::Relaxed);
            // SAFETY: the words and the path were leaked, so they are there, the path with its zero at the end; `open`, `write`
            // and `_exit` may be called in a handler.
            unsafe {
                if !mark.is_null() {
                    libc::open(mark, libc::O_CREAT | libc::O_WRONLY | libc::O_CLOEXEC, 0o600);
                }
                libc::write(libc::STDERR_FILENO, words.cast(), len);
                libc::_exit(EXIT_FAILED)
            }
        }
    }
    // Somebody else's: whoever handled it before does so when the same instruction is tried again.
    let before = BEFORE.get().map_or(ptr::null(), ptr::from_ref);
    // SAFETY: `before` is what `sigaction` gave us, or null, and then nothing is changed but by `signal`.
    unsafe {
        if before.is_null() {
            libc::signal(signal, libc::SIG_DFL);
        } else {
            libc::sigaction(signal, before, ptr::null_mut());
        }
    }
}
