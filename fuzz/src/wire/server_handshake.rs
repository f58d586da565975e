//! A client's bytes to a server's handshake.
//!
//! | bytes of the input | what |
//! |---|---|
//! | 0 | how the rest is torn |
//! | 1.. | what the client sends |

use proto::server::{Agreed, Directory, Ending, Handshake, Step};
use proto::wire::{
    CLIENT_OPTION_MAGIC, ClientFlags, MAX_CONTEXTS, MAX_OPTION_BYTES, OPTION_REPLY_MAGIC, OptionKind,
    OptionReplyKind, Reader, TransmissionFlags, max_options,
};

use super::exports::{EXPORT_BYTES, Exports, flags};
use crate::input::{Input, pieces};
use crate::memory::bounded;

const GREETING_BYTES: usize = 18;
/// More than the longest answer to one option, which is that to a LIST.
const MAX_ANSWER_BYTES: usize = 1024;

#[derive(Debug, PartialEq)]
enum End {
    Waiting,
    Closed(Ending),
    Transmission(Agreed),
}

#[derive(Debug, PartialEq)]
struct Outcome {
    output: Vec<u8>,
    end: End,
    /// What was not taken for the handshake.
    rest: Vec<u8>,
}

fn shake<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> Outcome {
    let mut handshake = Handshake::new();
    let mut output = handshake.take_output().to_vec();
    let mut end = End::Waiting;
    let mut after = Vec::new();
    for piece in pieces {
        if end != End::Waiting {
            after.extend_from_slice(piece);
            continue;
        }
        handshake.receive(piece);
        loop {
            let step = handshake.step(&Exports);
            let answer = handshake.take_output();
            assert!(answer.len() <= MAX_ANSWER_BYTES, "one option was answered with {} bytes", answer.len());
            output.extend_from_slice(&answer);
            match step {
                Step::Answered => continue,
                Step::Waiting => assert!(answer.is_empty(), "something was said while waiting"),
                Step::StartTls => unreachable!("this server has no TLS"),
                Step::Transmission(agreed) => end = End::Transmission(*agreed),
                Step::Closed(ending) => {
                    end = End::Closed(ending);
                    assert_eq!(handshake.step(&Exports), Step::Closed(ending), "closed is for ever");
                }
            }
            break;
        }
    }
    let mut rest = handshake.into_rest().to_vec();
    rest.extend(after);
    Outcome { output, end, rest }
}

/// The options that were taken off the client's bytes, their flags first.
fn options(mut taken: &[u8]) -> Vec<OptionKind> {
    let mut options = Vec::new();
    taken = taken.get(size_of::<u32>()..).unwrap_or_default();
    while !taken.is_empty() {
        let mut reader = Reader::new(taken);
        let read = (reader.u64(), reader.u32(), reader.u32());
        let (Ok(magic), Ok(kind), Ok(len)) = read else { panic!("part of an option's header was taken") };
        assert_eq!(magic, CLIENT_OPTION_MAGIC, "what is no option was taken for one");
        assert!(len as usize <= MAX_OPTION_BYTES, "an option of {len} bytes was taken");
        assert!(reader.bytes(len as usize).is_ok(), "part of an option was taken");
        taken = &taken[taken.len() - reader.remaining()..];
        options.push(OptionKind::from_number(kind));
    }
    options
}

/// Takes the answer to one option off the output: any number of pieces, then an end, which is given back.
fn take_answer(output: &mut &[u8], option: OptionKind) -> OptionReplyKind {
    loop {
        let mut reader = Reader::new(output);
        let read = (reader.u64(), reader.u32(), reader.u32(), reader.u32());
        let (Ok(magic), Ok(kind), Ok(reply), Ok(len)) = read else { panic!("{option:?} was not answered") };
        assert_eq!((magic, kind), (OPTION_REPLY_MAGIC, option.number()), "an answer is not to its option");
        assert!(reader.bytes(len as usize).is_ok(), "an answer is cut short");
        *output = &output[output.len() - reader.remaining()..];
        let reply = OptionReplyKind::from_number(reply);
        match (option, reply) {
            (OptionKind::List, OptionReplyKind::Server)
            | (OptionKind::Info | OptionKind::Go, OptionReplyKind::Info)
            | (OptionKind::ListMetaContext | OptionKind::SetMetaContext, OptionReplyKind::MetaContext) => {}
            _ => {
                assert!(reply == OptionReplyKind::Ack || reply.is_error(), "{option:?} got {reply:?}");
                return reply;
            }
        }
    }
}

fn check_output(outcome: &Outcome, taken: &[u8]) {
    let options = options(taken);
    assert!(
        options.len() <= max_options(Exports.list().len()) as usize,
        "{} options were taken",
        options.len()
    );
    let mut output = &outcome.output[GREETING_BYTES..];
    let began = matches!(outcome.end, End::Transmission(_));
    let last = options.len().wrapping_sub(1);
    let mut extended = false;
    for (number, option) in options.iter().enumerate() {
        if *option == OptionKind::ExportName {
            assert_eq!(number, last, "EXPORT_NAME ends the handshake, one way or the other");
            assert!(!extended || !began, "EXPORT_NAME cannot have extended headers");
            break;
        }
        let reply = take_answer(&mut output, *option);
        match *option {
            OptionKind::ExtendedHeaders => extended |= reply == OptionReplyKind::Ack,
            OptionKind::StructuredReply => assert!(!extended || reply.is_error(), "they are not given up"),
            _ => {}
        }
        let begins = *option == OptionKind::Go && reply == OptionReplyKind::Ack;
        assert_eq!(begins, began && number == last, "transmission begins with a GO that was granted");
        if *option == OptionKind::Abort {
            assert_eq!((number, &outcome.end), (last, &End::Closed(Ending::Aborted)));
        }
    }
    match &outcome.end {
        End::Closed(Ending::TooManyOptions | Ending::OptionTooLong) => {
            let header = Reader::new(&outcome.rest[8..]).u32().expect("its header was looked at");
            assert!(take_answer(&mut output, OptionKind::from_number(header)).is_error());
        }
        End::Transmission(agreed) if options.last() == Some(&OptionKind::ExportName) => {
            let client = ClientFlags::from_bits(Reader::new(taken).u32().expect("they were taken"));
            let zeroes = if client.contains(ClientFlags::NO_ZEROES) { 0 } else { 124 };
            let mut reader = Reader::new(output);
            assert_eq!(reader.u64(), Ok(agreed.info.size));
            assert_eq!(reader.u16(), Ok(agreed.info.flags.bits()));
            assert_eq!(reader.bytes(zeroes), Ok(&[0; 124][..zeroes]));
            output = &[];
        }
        _ => {}
    }
    assert_eq!(output, b"", "something was said that nobody asked for");
}

fn check_agreed(agreed: &Agreed) {
    let has_chunks = agreed.replies.has_chunks();
    let filters = agreed.replies.is_extended() && !agreed.contexts.is_empty();
    let expected = flags(agreed.export)
        .with_if(has_chunks, TransmissionFlags::SEND_DF)
        .with_if(filters, TransmissionFlags::BLOCK_STATUS_PAYLOAD);
    assert_eq!((agreed.info.size, agreed.info.flags), (EXPORT_BYTES, expected));
    assert!(agreed.contexts.is_empty() || has_chunks, "contexts without structured replies");
    assert!(agreed.contexts.len() <= MAX_CONTEXTS);
    let has = Exports.contexts(agreed.export);
    for (number, selected) in agreed.contexts.iter().enumerate() {
        assert!(has.contains(&selected.context), "a context of another export");
        let others = &agreed.contexts[..number];
        assert!(others.iter().all(|other| other.id != selected.id && other.context != selected.context));
    }
}

/// A server's handshake, given a client's bytes: how they are torn does not matter; each option that is taken gets
/// exactly one answer, of its own kind and of bounded length; nothing begins without a GO or an EXPORT_NAME that was granted; what was
/// agreed on is what the export has.
pub fn server_handshake(data: &[u8]) {
    let mut input = Input::new(data);
    let pattern = input.u8();
    let bytes = input.rest();
    let outcome = bounded(bytes.len(), 8, 128 << 10, || shake(std::iter::once(bytes)));
    assert_eq!(shake(pieces(bytes, pattern)), outcome, "it matters how the bytes were torn");
    let taken = bytes.strip_suffix(&outcome.rest[..]).expect("what is left is the end of what was sent");
    if outcome.end == End::Waiting {
        assert!(outcome.rest.len() < 16 + MAX_OPTION_BYTES, "more was kept than one option");
    }
    check_output(&outcome, taken);
    if let End::Transmission(agreed) = &outcome.end {
        check_agreed(agreed);
    }
}
