//! A server's bytes to a client's handshake.
//!
//! | bytes of the input | what |
//! |---|---|
//! | 0 | how the rest is torn |
//! | 1 | what the client wants: bits 0, 1 its goal, bit 2 structured replies, bit 4 extended headers, bit 3 contexts |
//! | 2.. | what the server sends |

use proto::client::{Connected, Goal, Handshake, HandshakeError, Progress, Wish};
use proto::wire::{MAX_NAME_BYTES, MAX_OPTION_BYTES, MAX_TEXT_CHARS, MetaContext, ReplyStyle};

use super::exports;
use crate::input::{Input, pieces};
use crate::memory::bounded;

/// A client sends its flags, at most five options, and the names that it was told to ask for.
const MAX_OUTPUT_BYTES: usize = 512;
/// What one escaped character of a peer takes at most.
const ESCAPED_BYTES: usize = 10;

/// What the client wants.
pub(super) fn wish(choice: u8) -> Wish {
    let name = "disk0".to_owned();
    let goal = match choice & 3 {
        0 => Goal::Info(name),
        1 => Goal::List,
        _ => Goal::Go(name),
    };
    let contexts = if choice & 8 == 0 { Vec::new() } else { exports::contexts() };
    let replies = match choice & 0x14 {
        0 => ReplyStyle::Simple,
        4 => ReplyStyle::Structured,
        _ => ReplyStyle::Extended,
    };
    Wish { goal, replies, contexts }
}

#[derive(Debug, PartialEq)]
struct Outcome {
    output: Vec<u8>,
    end: Result<Progress, HandshakeError>,
    rest: Vec<u8>,
}

fn shake<'a>(wish: Wish, pieces: impl Iterator<Item = &'a [u8]>) -> Outcome {
    let mut handshake = Handshake::new(wish);
    let mut end = Ok(Progress::Waiting);
    let mut after = Vec::new();
    for piece in pieces {
        if end == Ok(Progress::Waiting) {
            end = handshake.receive(piece);
        } else {
            after.extend_from_slice(piece);
        }
    }
    let output = handshake.take_output().to_vec();
    let mut rest = handshake.into_rest().to_vec();
    rest.extend(after);
    Outcome { output, end, rest }
}

fn check_connected(connected: &Connected, wish: &Wish) {
    let info = &connected.info;
    assert!(i64::try_from(info.size).is_ok(), "a size of {}", info.size);
    assert!(info.name.len() <= MAX_NAME_BYTES && info.description.len() <= MAX_NAME_BYTES);
    let sizes = info.block_sizes;
    assert!(sizes.minimum.is_power_of_two() && sizes.preferred.is_power_of_two());
    assert!(sizes.minimum <= sizes.preferred && sizes.preferred <= sizes.maximum);
    assert!(connected.replies <= wish.replies, "nobody asked for {:?} replies", connected.replies);
    let has_chunks = connected.replies.has_chunks();
    assert!(has_chunks || connected.contexts.is_empty(), "contexts without structured replies");
    for (number, selected) in connected.contexts.iter().enumerate() {
        assert!(wish.contexts.contains(&selected.context), "nobody asked for {:?}", selected.context);
        let others = &connected.contexts[..number];
        assert!(others.iter().all(|other| other.id != selected.id && other.context != selected.context));
        assert_eq!(MetaContext::from_name(&selected.context.to_string()).as_ref(), Some(&selected.context));
    }
}

/// A client's handshake, given a server's bytes: how they are torn does not matter; the client says no more than it
/// must; what it believes of an export can be; it believes nothing that it did not ask for.
pub fn client_handshake(data: &[u8]) {
    let mut input = Input::new(data);
    let pattern = input.u8();
    let wish = wish(input.u8());
    let bytes = input.rest();
    let outcome = bounded(bytes.len(), 16, 64 << 10, || shake(wish.clone(), std::iter::once(bytes)));
    let torn = shake(wish.clone(), pieces(bytes, pattern));
    assert!(outcome.output.len() <= MAX_OUTPUT_BYTES, "the client sent {} bytes", outcome.output.len());
    assert_eq!((&torn.end, &torn.output), (&outcome.end, &outcome.output), "it matters how bytes were torn");
    match &outcome.end {
        Ok(progress) => {
            assert_eq!(torn.rest, outcome.rest, "it matters how the bytes were torn");
            assert!(bytes.ends_with(&outcome.rest), "what is left is the end of what was sent");
            match progress {
                Progress::Waiting => assert!(outcome.rest.len() < 20 + MAX_OPTION_BYTES),
                Progress::StartTls => unreachable!("this client asks for no TLS"),
                Progress::Ready(connected) => {
                    assert!(matches!(wish.goal, Goal::Go(_)));
                    check_connected(connected, &wish);
                }
                Progress::Told(connected) => {
                    assert!(matches!(wish.goal, Goal::Info(_)));
                    check_connected(connected, &wish);
                }
                Progress::Listed(exports) => {
                    assert_eq!(wish.goal, Goal::List);
                    let bounded = |text: &str| text.len() <= MAX_NAME_BYTES && !text.contains('\0');
                    assert!(exports.iter().all(|each| bounded(&each.name) && bounded(&each.description)));
                }
            }
        }
        Err(HandshakeError::Refused { text, .. }) => {
            assert!(text.len() <= MAX_TEXT_CHARS * ESCAPED_BYTES && !text.contains(char::is_control));
        }
        Err(_) => {}
    }
}
