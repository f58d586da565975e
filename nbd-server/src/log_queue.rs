//! Lines for stderr, without a wait for whoever reads them.
//!
//! A pipe whose reader does not read blocks whoever writes to it, for ever if need be; and a client decides how much is logged. So
//! nobody writes who has something else to do: [`LogQueue::put`] leaves the line in a queue of [`MAX_BYTES`] at most, and one thread, which
//! does nothing else, writes it. What does not fit is left out and counted, and the log says how many they were once it is read again.
//! Where stderr is gone altogether, lines are thrown away: there is nobody left to tell.
//!
//! The thread begins with the first line, and ends with the last clone of the queue. Whoever ends the program waits for it by
//! [`LogQueue::flush`], which has a bound: a reader who does not read holds up no end either.

use std::collections::VecDeque;
use std::io::{self, IsTerminal, Write};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use tracing_subscriber::fmt::MakeWriter;

/// How many bytes of lines wait at most; a single line may be longer.
pub const MAX_BYTES: usize = 1 << 20;
/// How long the end of a program may be held up for its last lines.
pub const PATIENCE_AT_END: Duration = Duration::from_secs(1);

type WriteLine = Box<dyn FnMut(&[u8]) + Send>;

/// Where threads leave lines that another one writes. Clones are the same queue.
#[derive(Clone, Debug)]
pub struct LogQueue {
    owner: Arc<Owner>,
}

/// Ends the thread with the last of the clones.
#[derive(Debug)]
struct Owner(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    /// There is something to be written, or nobody is left to give more.
    given: Condvar,
    /// Something was written.
    written: Condvar,
}

#[derive(Default)]
struct State {
    /// Until the thread has begun.
    writer: Option<WriteLine>,
    lines: VecDeque<Vec<u8>>,
    /// Of these lines, and of the one that is being written.
    bytes: usize,
    is_writing: bool,
    left_out: u64,
    /// Says how many lines were left out.
    tell: Option<fn(u64)>,
    /// Somebody waited in vain: until something is written, nobody waits again.
    is_stuck: bool,
    is_closed: bool,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State")
            .field("lines", &self.lines.len())
            .field("bytes", &self.bytes)
            .field("left_out", &self.left_out)
            .finish_non_exhaustive()
    }
}

impl State {
    fn is_settled(&self) -> bool {
        self.lines.is_empty() && self.left_out == 0 && !self.is_writing
    }

    /// Nobody writes what is here.
    fn lose(&mut self) {
        self.lines.clear();
        self.bytes = 0;
    }
}

impl LogQueue {
    /// A queue whose lines `write` writes, on a thread of its own. It may block.
    pub fn new(write: impl FnMut(&[u8]) + Send + 'static) -> Self {
        let state = State { writer: Some(Box::new(write)), ..State::default() };
        Self { owner: Arc::new(Owner(Arc::new(Shared { state: Mutex::new(state), ..Shared::default() }))) }
    }

    /// The same of what is no log: `tell` says how many of its lines were left out, once they are read again.
    #[must_use]
    pub fn telling(self, tell: fn(u64)) -> Self {
        self.owner.0.state.lock().tell = Some(tell);
        self
    }

    /// A queue before stderr.
    #[must_use]
    pub fn to_stderr() -> Self {
        Self::new(|line| {
            // Whoever closed it does not want to know.
            let _ = io::stderr().write_all(line);
        })
    }

    /// Leaves a line, with its end, to be written. Never waits for a reader.
    pub fn put(&self, line: &[u8]) {
        let shared = &self.owner.0;
        let mut state = shared.state.lock();
        if !state.lines.is_empty() && state.bytes + line.len() > MAX_BYTES {
            state.left_out += 1;
            return;
        }
        state.bytes += line.len();
        state.lines.push_back(line.to_vec());
        if let Some(writer) = state.writer.take() {
            let queue = Arc::clone(shared);
            let thread = thread::Builder::new().name("log".to_owned());
            if thread.spawn(move || queue.write(writer)).is_err() {
                // Without a thread nothing is written: better that than a server that waits.
                state.lose();
            }
        }
        shared.given.notify_one();
    }

    /// Waits until all of it is written, for so long at most; whether it is. Where somebody waited in vain, the next one does not wait
    /// again before something was written.
    pub fn flush(&self, within: Duration) -> bool {
        let deadline = Instant::now() + within;
        let shared = &self.owner.0;
        let mut state = shared.state.lock();
        while !state.is_settled() {
            if state.is_stuck {
                return false;
            }
            state.is_stuck =
                shared.written.wait_until(&mut state, deadline).timed_out() && !state.is_settled();
        }
        true
    }

    /// Waits until all of it is written, however long nobody reads.
    pub fn drain(&self) {
        let shared = &self.owner.0;
        let mut state = shared.state.lock();
        while !state.is_settled() {
            shared.written.wait(&mut state);
        }
    }

    /// Has panics said by this queue too, as of the program of this name: the usual way writes to stderr, and may wait.
    pub fn say_panics(&self, program: &'static str) {
        let queue = self.clone();
        std::panic::set_hook(Box::new(move |panic| {
            let thread = thread::current();
            let name = thread.name().unwrap_or("without a name");
            let backtrace = std::backtrace::Backtrace::capture();
            let backtrace = match backtrace.status() {
                std::backtrace::BacktraceStatus::Captured => format!("{backtrace}\n"),
                _ => String::new(),
            };
            queue.put(format!("{program}: the thread {name} {panic}\n{backtrace}").as_bytes());
        }));
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.state.lock().is_closed = true;
        self.0.given.notify_one();
    }
}

impl Shared {
    fn write(&self, mut writer: WriteLine) {
        let mut state = self.state.lock();
        loop {
            if let Some(line) = state.lines.pop_front() {
                state.is_writing = true;
                parking_lot::MutexGuard::unlocked(&mut state, || writer(&line));
                state.bytes -= line.len();
            } else if state.left_out > 0 {
                let left_out = std::mem::take(&mut state.left_out);
                state.is_writing = true;
                let tell = state.tell.unwrap_or(tell_in_log);
                parking_lot::MutexGuard::unlocked(&mut state, || tell(left_out));
            } else if state.is_closed {
                return;
            } else {
                self.given.wait(&mut state);
                continue;
            }
            (state.is_writing, state.is_stuck) = (false, false);
            self.written.notify_all();
        }
    }
}

/// It comes back as a line, in the form that lines have there.
fn tell_in_log(left_out: u64) {
    tracing::warn!(left_out, "lines of the log were left out: nobody read stderr");
}

impl Write for LogQueue {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        self.put(text);
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for LogQueue {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

/// Whether a log on stderr has colours: on a terminal, unless `NO_COLOR` is set to anything.
#[must_use]
pub fn has_colours() -> bool {
    io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    /// A queue whose reader takes a line only when told to.
    fn queue() -> (LogQueue, mpsc::Sender<()>, mpsc::Receiver<String>) {
        let (go, may) = mpsc::channel::<()>();
        let (wrote, lines) = mpsc::channel();
        let queue = LogQueue::new(move |line| {
            let _ = may.recv();
            let _ = wrote.send(String::from_utf8_lossy(line).into_owned());
        });
        (queue, go, lines)
    }

    #[test]
    fn lines_come_in_order_and_a_flush_waits_for_the_last() {
        let written = Arc::new(Mutex::new(Vec::new()));
        let to = Arc::clone(&written);
        let queue = LogQueue::new(move |line| to.lock().extend_from_slice(line));
        for number in 0..1000 {
            queue.put(format!("{number}\n").as_bytes());
        }
        assert!(queue.flush(LONG));
        let wanted: String = (0..1000).map(|number| format!("{number}\n")).collect();
        assert_eq!(String::from_utf8_lossy(&written.lock()), wanted);
    }

    #[test]
    fn a_reader_that_does_not_read_costs_bounded_memory_and_nobodys_time() {
        let (queue, go, lines) = queue();
        let line = [b'x'; 1000];
        let fit = MAX_BYTES / line.len();
        for _ in 0..fit + 17 {
            queue.put(&line);
        }
        {
            let state = queue.owner.0.state.lock();
            assert_eq!((state.left_out, state.bytes), (17, fit * line.len()));
        }
        assert!(!queue.flush(Duration::from_millis(1)));
        // The next one does not wait at all.
        assert!(!queue.flush(LONG));
        let reading = thread::spawn(move || lines.iter().count());
        // What was left out is told as a line of the log; here nobody listens to that.
        drop(go);
        queue.drain();
        assert!(queue.flush(Duration::ZERO), "nothing is left");
        queue.put(b"last");
        assert!(queue.flush(LONG));
        drop(queue);
        assert_eq!(reading.join().unwrap(), fit + 1);
    }
}
