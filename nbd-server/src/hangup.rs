//! What a SIGHUP asks for. It has three senders: whoever wants files read anew, the terminal that a program was started on as it
//! goes away, and whoever wants the program to end. `nohup` has it ignored, which a handler must not undo.

/// How the program was started, as far as SIGHUP is concerned.
#[derive(Clone, Copy, Debug)]
pub struct Hangup {
    is_ignored: bool,
    has_terminal: bool,
}

/// What a program does about a SIGHUP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asks {
    /// End.
    End,
    /// Read anew what can be.
    Reload,
    /// Nothing.
    Nothing,
}

impl Hangup {
    /// As it is now: to be asked before a handler for SIGHUP is set.
    #[must_use]
    pub fn at_start() -> Self {
        Self { is_ignored: is_ignored(), has_terminal: has_terminal() }
    }

    /// What a SIGHUP that has just come asks of a program that reads something anew at it, or does not.
    #[must_use]
    pub fn asks(self, reloads: bool) -> Asks {
        self.asks_where(reloads, has_terminal())
    }

    fn asks_where(self, reloads: bool, has_terminal: bool) -> Asks {
        let lost_terminal = self.has_terminal && !has_terminal;
        match (reloads, self.is_ignored) {
            (true, is_ignored) if is_ignored || !lost_terminal => Asks::Reload,
            (_, true) => Asks::Nothing,
            (_, false) => Asks::End,
        }
    }
}

/// Whether SIGHUP is ignored.
fn is_ignored() -> bool {
    // SAFETY: it consists of numbers and of an address that may be null.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: nothing is set, and `action` is written, which is of the type that the call wants.
    let got = unsafe { libc::sigaction(libc::SIGHUP, std::ptr::null(), &raw mut action) };
    got == 0 && action.sa_sigaction == libc::SIG_IGN
}

/// Whether the program has a terminal that it belongs to, and that is still there.
fn has_terminal() -> bool {
    std::fs::File::open("/dev/tty").is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gone_terminal_ends_what_was_not_told_to_outlive_it() {
        let [under_nohup, on_terminal, service] = [(true, true), (false, true), (false, false)]
            .map(|(is_ignored, has_terminal)| Hangup { is_ignored, has_terminal });
        let asks = |hangup: Hangup| {
            let of = |reloads| [hangup.asks_where(reloads, true), hangup.asks_where(reloads, false)];
            [of(true), of(false)].concat()
        };
        use Asks::{End, Nothing, Reload};
        assert_eq!(asks(under_nohup), [Reload, Reload, Nothing, Nothing]);
        assert_eq!(asks(on_terminal), [Reload, End, End, End]);
        assert_eq!(asks(service), [Reload, Reload, End, End]);
    }
}
