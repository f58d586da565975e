//! What a server says about TLS: whether options may come without it, and when it begins.
//!
//! Nothing here encrypts. [`super::Step::StartTls`] tells the caller to put TLS under what follows.

use crate::wire::OptionKind;

/// Whether a server speaks TLS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum TlsMode {
    /// It does not.
    #[default]
    Off,
    /// Where a client asks for it.
    On,
    /// With everybody: without it no option but STARTTLS and ABORT is answered.
    Required,
}

/// What a client is told that asks for anything before TLS where that is required.
pub(super) const REQUIRED: &str =
    "this server requires TLS: connect with it (an nbds: or nbds+unix: URI, or tls-creds in QEMU)";

/// How far TLS is on one connection.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Tls {
    mode: TlsMode,
    begun: bool,
    /// An option was refused because TLS had not begun.
    missed: bool,
}

/// What becomes of STARTTLS.
pub(super) enum StartTls {
    Begin,
    /// The server does not have it.
    Absent,
    /// The option carried data, or came a second time.
    Invalid(&'static str),
}

impl Tls {
    pub(super) const fn new(mode: TlsMode) -> Self {
        Self { mode, begun: false, missed: false }
    }

    /// Whether this option must wait for TLS; remembers that it had to.
    pub(super) fn must_come_first(&mut self, kind: OptionKind) -> bool {
        let may_be_plain = matches!(kind, OptionKind::StartTls | OptionKind::Abort);
        let refused = self.mode == TlsMode::Required && !self.begun && !may_be_plain;
        self.missed |= refused;
        refused
    }

    /// Whether the client may be told anything of the exports.
    pub(super) fn lets_in(&self) -> bool {
        self.mode != TlsMode::Required || self.begun
    }

    pub(super) const fn start(&self, data: &[u8]) -> StartTls {
        match self.mode {
            TlsMode::Off => StartTls::Absent,
            _ if self.begun => StartTls::Invalid("TLS has begun already"),
            _ if !data.is_empty() => StartTls::Invalid("the option takes no data"),
            _ => StartTls::Begin,
        }
    }

    pub(super) const fn begin(&mut self) {
        self.begun = true;
    }

    pub(super) const fn was_missed(&self) -> bool {
        self.missed && !self.begun
    }
}
