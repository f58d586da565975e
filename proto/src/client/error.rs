//! What can be wrong with a server's bytes. After any of these the connection is of no use.

use crate::wire::{Cookie, Malformed, OptionKind, OptionReplyKind};

/// Why a handshake failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    /// What answered is no NBD server.
    #[error("the peer is not an NBD server")]
    NotNbd,
    /// It speaks a handshake from before the fixed newstyle.
    #[error("the server does not speak the fixed newstyle handshake")]
    TooOld,
    /// What should be a reply to an option is none, or is one to another.
    #[error("the server's reply does not belong to the option {0:?}")]
    WrongReply(OptionKind),
    /// A reply is longer, or replies are more, than any need be.
    #[error("the server's replies to {0:?} are too many or too long")]
    TooMuch(OptionKind),
    /// A reply does not hold what it must.
    #[error("the server's reply to {kind:?} is malformed")]
    Malformed {
        /// Which option it answers.
        kind: OptionKind,
        /// What is wrong with it.
        #[source]
        source: Malformed,
    },
    /// The server said no.
    #[error("{}", refusal(*kind, *reply, text))]
    Refused {
        /// Which option.
        kind: OptionKind,
        /// How.
        reply: OptionReplyKind,
        /// What it said about it, cut short.
        text: String,
    },
    /// More bytes came with the reply to STARTTLS: whoever sent them, TLS does not vouch for them.
    #[error(
        "plain bytes followed the server's reply to STARTTLS: somebody may sit between us and the server"
    )]
    PlainAfterStartTls,
    /// GO or INFO succeeded and told no size.
    #[error("the server told no size of the export")]
    NoSize,
    /// The size is more than any file can have.
    #[error("the server told a size of {0} bytes, which cannot be")]
    BadSize(u64),
    /// The block sizes contradict themselves.
    #[error("the server told block sizes that cannot be")]
    BadBlockSizes,
}

/// What is wrong with a reply in transmission.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReplyError {
    /// It does not begin as a reply.
    #[error("the server sent something that is not a reply")]
    BadMagic,
    /// Nobody asked.
    #[error("the server answered a request that was not sent ({0:?})")]
    Unsolicited(Cookie),
    /// Two requests in flight have one number.
    #[error("a request in flight has the number {0:?} already")]
    DuplicateCookie(Cookie),
    /// The kind of reply was not agreed on, or does not fit the request.
    #[error("the reply to {0:?} is of a kind that the request cannot have")]
    WrongKind(Cookie),
    /// A chunk's length is not one that its kind can have.
    #[error("the reply to {0:?} has a wrong length")]
    WrongLength(Cookie),
    /// With extended headers: its header repeats an offset that is not the request's.
    #[error("the reply to {0:?} repeats an offset that is not the request's")]
    WrongOffset(Cookie),
    /// It tells of bytes that were not asked for, or twice of the same.
    #[error("the reply to {0:?} tells of bytes outside the request, or twice of the same")]
    WrongRange(Cookie),
    /// It ended without telling everything that was asked for.
    #[error("the reply to {0:?} is incomplete")]
    Incomplete(Cookie),
}

/// A refusal in a sentence, with what the server said of it. Of TLS it says nothing that we do not: what to do about it is ours to say.
fn refusal(kind: OptionKind, reply: OptionReplyKind, text: &str) -> String {
    let what = match reply {
        OptionReplyKind::ErrTlsRequired => {
            return "the server requires TLS: name it by an nbds: or nbds+unix: URI, with the credentials that it wants".to_owned();
        }
        _ if kind == OptionKind::StartTls => "the server does not begin TLS",
        OptionReplyKind::ErrUnknown => "the server does not have this export",
        OptionReplyKind::ErrPolicy => "the server's policy forbids it",
        OptionReplyKind::ErrShutdown => "the server is ending",
        OptionReplyKind::ErrUnsupported => "the server cannot do what was asked",
        _ => "the server refused what was asked",
    };
    if text.is_empty() { what.to_owned() } else { format!("{what}: {text}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_a_sentence_with_its_advice_whole() {
        let said = |reply, text: &str| {
            HandshakeError::Refused { kind: OptionKind::Go, reply, text: text.to_owned() }.to_string()
        };
        let tls = said(OptionReplyKind::ErrTlsRequired, "cut sh…");
        assert!(tls.contains("nbds:") && !tls.contains("Err") && !tls.contains('…'), "{tls}");
        assert_eq!(
            said(OptionReplyKind::ErrUnknown, "no such export"),
            "the server does not have this export: no such export"
        );
        assert_eq!(said(OptionReplyKind::ErrPolicy, ""), "the server's policy forbids it");
    }
}
