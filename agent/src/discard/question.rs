//! The question whether a session is to be given up.

use std::io::{self, BufRead as _, IsTerminal as _, Write as _};
use std::time::Duration;

use anyhow::Context as _;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;

use crate::cli::{Failure, Interrupt};
use crate::output::Output;

/// How soon a signal is seen while an answer is waited for.
const SIGNAL_INTERVAL: Duration = Duration::from_millis(100);

/// Asks at the terminal; an error is any answer but yes, and that there is no terminal, with this advice.
pub(super) fn ask(output: &Output, interrupt: &Interrupt, without_terminal: &str) -> anyhow::Result<()> {
    if output.is_json() || !io::stdin().is_terminal() || !io::stderr().is_terminal() {
        return Err(Failure::new(
            "nothing was discarded: nobody said yes, and without a terminal nobody can be asked",
            without_terminal,
        )
        .into());
    }
    output.settle_stderr();
    eprint_prompt()?;
    let answer = read_answer(interrupt)?;
    if matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes") {
        return Ok(());
    }
    Err(Failure::new("nothing was discarded", "answer y to discard it").into())
}

fn eprint_prompt() -> anyhow::Result<()> {
    let mut stderr = io::stderr().lock();
    stderr.write_all(b"discard it? [y/N] ").and_then(|()| stderr.flush()).context("cannot ask")
}

/// A line from the terminal, unless a signal comes first.
fn read_answer(interrupt: &Interrupt) -> anyhow::Result<String> {
    let stdin = io::stdin();
    let wait = Timespec::try_from(SIGNAL_INTERVAL).expect("it is short");
    loop {
        interrupt.check().inspect_err(|_| eprintln!())?;
        let mut fds = [PollFd::new(&stdin, PollFlags::IN)];
        match rustix::event::poll(&mut fds, Some(&wait)) {
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) => break,
            Err(errno) => return Err(io::Error::from(errno)).context("cannot wait for the answer"),
        }
    }
    let mut answer = String::new();
    stdin.lock().read_line(&mut answer).context("cannot read the answer")?;
    Ok(answer)
}
