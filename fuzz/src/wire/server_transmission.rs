//! A client's bytes to a server in transmission, and the server's replies to a client.
//!
//! | bytes of the input | what |
//! |---|---|
//! | 0 | how the replies are torn |
//! | 1 | bit 0: structured replies; bits 1, 2: how many contexts; bit 3: extended headers; bits 4 to 7: the longest READ or WRITE, 2^(9 + n) bytes |
//! | 2, 3 | what the export can do: the transmission flags |
//! | 4.. | what the client sends |

use bytes::BytesMut;
use proto::client::{Event, Replies};
use proto::server::{Admission, Command, ReplyEncoder, StatusBuilder, Verdict};
use proto::wire::{
    CommandFlags, CommandKind, ContextFilter, ContextId, Descriptor, Errno, MAX_CONTEXTS, MAX_PAYLOAD_BYTES,
    MAX_STATUS_EXTENT_BYTES, ReplyStyle, RequestHeader, SelectedContext, TransmissionFlags,
};

use super::exports::{self, EXPORT_BYTES};
use crate::input::{Input, pieces};

const BLOCK_BYTES: usize = 4096;
/// How many extents one reply tells of.
const MAX_EXTENTS: usize = 64;
/// What is said of every refusal.
const WHY: &str = "so it is";
/// Beyond so many requests nothing new is learnt.
const MAX_REQUESTS: usize = 256;

/// What was agreed on before transmission.
#[derive(Clone, Debug)]
pub(super) struct Agreed {
    pub(super) admission: Admission,
    pub(super) contexts: Vec<SelectedContext>,
}

impl Agreed {
    pub(super) fn take(input: &mut Input<'_>) -> Self {
        let choice = input.u8();
        let count = usize::from(choice >> 1 & 3);
        let contexts = (1..).zip(exports::contexts().into_iter().take(count));
        let contexts: Vec<_> =
            contexts.map(|(id, context)| SelectedContext { id: ContextId(id), context }).collect();
        let replies = exports::style(choice);
        // The handshake has no contexts without replies in chunks.
        let contexts = if replies.has_chunks() { contexts } else { Vec::new() };
        let admission = Admission {
            size: EXPORT_BYTES,
            flags: TransmissionFlags::from_bits(input.u16()),
            replies,
            has_contexts: !contexts.is_empty(),
            max_request: 1 << (9 + (choice >> 4)),
        };
        Self { admission, contexts }
    }
}

/// What may stand in a request besides its kind's own rules, written down a second time.
fn check_verdict(admission: &Admission, header: &RequestHeader, verdict: Verdict) {
    use TransmissionFlags as Can;
    let can = |flag| admission.flags.contains(flag);
    let fits = u128::from(header.offset) + u128::from(header.len) <= u128::from(admission.size);
    let style = admission.replies;
    let has_payload = header.flags.contains(CommandFlags::PAYLOAD_LEN);
    let changes = matches!(header.kind, CommandKind::Write | CommandKind::Trim | CommandKind::WriteZeroes);
    let fua = header.flags.contains(CommandFlags::FUA);
    match verdict {
        Verdict::Perform(command) => {
            assert!(command == Command::Flush || (fits && header.len > 0), "{command:?} beyond the export");
            assert!(!changes || !can(Can::READ_ONLY), "{command:?} on a read-only export");
            assert!(!fua || can(Can::SEND_FUA), "FUA was not offered");
            let writes = matches!(command, Command::Write { .. });
            assert!(!has_payload || (writes && style.is_extended()), "{command:?} and its payload");
            let (kind, offered) = match command {
                Command::Read { whole } => {
                    assert!(!whole || style.has_chunks());
                    assert!(header.len <= u64::from(admission.max_request));
                    (CommandKind::Read, true)
                }
                Command::Write { fua: wants } => {
                    assert!(wants == fua && header.len <= u64::from(admission.max_request));
                    (CommandKind::Write, true)
                }
                Command::Flush => (CommandKind::Flush, can(Can::SEND_FLUSH)),
                Command::Trim { fua: wants } => {
                    assert_eq!(wants, fua);
                    (CommandKind::Trim, can(Can::SEND_TRIM))
                }
                Command::WriteZeroes { fua: wants, no_hole, fast } => {
                    assert_eq!(wants, fua);
                    assert_eq!(no_hole, header.flags.contains(CommandFlags::NO_HOLE));
                    let offered = can(Can::SEND_WRITE_ZEROES) && (!fast || can(Can::SEND_FAST_ZERO));
                    (CommandKind::WriteZeroes, offered)
                }
                Command::Cache => (CommandKind::Cache, can(Can::SEND_CACHE)),
                Command::BlockStatus { one } => {
                    assert_eq!(one, header.flags.contains(CommandFlags::REQ_ONE));
                    (CommandKind::BlockStatus, admission.has_contexts)
                }
            };
            assert!(kind == header.kind && offered, "{command:?} was not offered");
        }
        Verdict::Filter { one } => {
            assert_eq!(one, header.flags.contains(CommandFlags::REQ_ONE));
            assert!(has_payload && style.is_extended() && can(Can::BLOCK_STATUS_PAYLOAD));
            assert!(header.kind == CommandKind::BlockStatus && admission.has_contexts);
            assert!(header.len <= 8 + 4 * MAX_CONTEXTS as u64);
        }
        Verdict::Nothing => assert_eq!(header.len, 0),
        Verdict::Refuse(errno) => {
            let writes = style.is_extended() && header.kind == CommandKind::Write;
            let allowed = CommandFlags::NONE.with_if(writes, CommandFlags::PAYLOAD_LEN);
            let plain = !header.flags.exceeds(allowed) && fits && header.len > 0;
            let short = header.len <= u64::from(admission.max_request);
            let everything =
                Can::SEND_FLUSH.with(Can::SEND_TRIM).with(Can::SEND_WRITE_ZEROES).with(Can::SEND_CACHE);
            let known = !matches!(header.kind, CommandKind::Unknown(_) | CommandKind::Flush);
            let refused_for_nothing = plain
                && short
                && known
                && can(everything)
                && !can(Can::READ_ONLY)
                && (admission.has_contexts || header.kind != CommandKind::BlockStatus);
            assert!(!refused_for_nothing, "{header:?} was refused: {errno}");
            match errno {
                Errno::NoSpace => {
                    assert!(!fits && matches!(header.kind, CommandKind::Write | CommandKind::WriteZeroes))
                }
                Errno::NotPermitted => assert!(changes && can(Can::READ_ONLY)),
                Errno::Overflow => {
                    assert!(!short && style.has_chunks() && header.kind == CommandKind::Read);
                }
                errno => assert_eq!(errno, Errno::Invalid),
            }
        }
        Verdict::Disconnect => assert_eq!(header.kind, CommandKind::Disconnect),
        Verdict::TooLong => assert!(header.payload_len(style) > u64::from(MAX_PAYLOAD_BYTES)),
    }
    assert!(header.payload_len(style) <= u64::from(MAX_PAYLOAD_BYTES) || verdict == Verdict::TooLong);
}

/// What a BLOCK_STATUS with a payload asks, found out a second time.
fn check_filter(
    agreed: &Agreed,
    header: &RequestHeader,
    payload: &[u8],
    filtered: &Result<(RequestHeader, Vec<SelectedContext>), Errno>,
) {
    let number = |bytes: &[u8]| bytes.iter().fold(0_u64, |sum, byte| sum << 8 | u64::from(*byte));
    let (len, ids) = payload.split_at(payload.len().min(8));
    let len = number(len);
    let mut ids: Vec<u64> = ids.chunks(4).map(number).collect();
    let count = ids.len();
    let known = |id: &u64| agreed.contexts.iter().any(|selected| u64::from(selected.id.0) == *id);
    let all_known = ids.iter().all(known);
    ids.sort_unstable();
    ids.dedup();
    let fits = u128::from(header.offset) + u128::from(len) <= u128::from(EXPORT_BYTES);
    let whole = payload.len() >= 12 && payload.len().is_multiple_of(4);
    let good = whole && all_known && ids.len() == count && fits && len > 0;
    match filtered {
        Ok((request, contexts)) => {
            assert!(good, "a wrong filter was taken");
            assert_eq!((request.offset, request.len, contexts.len()), (header.offset, len, count));
            assert_eq!(request.flags.with(CommandFlags::PAYLOAD_LEN), header.flags);
        }
        Err(errno) => assert_eq!((good, *errno), (false, Errno::Invalid), "a good filter was refused"),
    }
}

/// What a server makes of a request, on a disk in memory.
struct Server<'a> {
    agreed: &'a Agreed,
    disk: Vec<u8>,
}

impl Server<'_> {
    fn answer(&mut self, header: &RequestHeader, verdict: Verdict, payload: &[u8], out: &mut BytesMut) {
        let encoder = ReplyEncoder::new(self.agreed.admission.replies);
        match verdict {
            Verdict::Perform(command) => self.perform(header, command, payload, encoder, out),
            Verdict::Filter { one } => {
                let filtered = self.agreed.admission.filter(header, payload, &self.agreed.contexts);
                check_filter(self.agreed, header, payload, &filtered);
                match filtered {
                    Ok((header, contexts)) => self.tell(&header, one, &contexts, encoder, out),
                    Err(errno) => out.extend_from_slice(&encoder.refused(header, errno)),
                }
            }
            Verdict::Nothing => out.extend_from_slice(&encoder.done(header)),
            Verdict::Refuse(errno) => {
                let offset = (errno == Errno::NoSpace).then_some(header.offset);
                out.extend_from_slice(&encoder.failed(header, errno, offset, WHY));
            }
            Verdict::Disconnect | Verdict::TooLong => {}
        }
    }

    fn perform(
        &mut self,
        header: &RequestHeader,
        command: Command,
        payload: &[u8],
        encoder: ReplyEncoder,
        out: &mut BytesMut,
    ) {
        let start = header.offset as usize;
        let range = start..start + header.len as usize;
        match command {
            Command::Read { whole } if whole || !encoder.style().has_chunks() => {
                let head = encoder.data(header);
                assert_eq!(head.len(), encoder.data_head_len());
                out.extend_from_slice(&head);
                out.extend_from_slice(&self.disk[range]);
                return;
            }
            Command::Read { .. } => {
                let mut at = range.start;
                while at < range.end {
                    let end = ((at / BLOCK_BYTES + 1) * BLOCK_BYTES).min(range.end);
                    let (len, last) = ((end - at) as u64, end == range.end);
                    if self.disk[at..end].iter().all(|byte| *byte == 0) {
                        out.extend_from_slice(&encoder.hole_chunk(header, at as u64, len, last));
                    } else {
                        out.extend_from_slice(&encoder.data_chunk(header, at as u64, len, last));
                        out.extend_from_slice(&self.disk[at..end]);
                    }
                    at = end;
                }
                return;
            }
            Command::Write { .. } => self.disk[range].copy_from_slice(payload),
            Command::WriteZeroes { .. } | Command::Trim { .. } => self.disk[range].fill(0),
            Command::BlockStatus { one } => {
                return self.tell(header, one, &self.agreed.contexts, encoder, out);
            }
            Command::Flush | Command::Cache => {}
        }
        out.extend_from_slice(&encoder.done(header));
    }

    fn tell(
        &self,
        header: &RequestHeader,
        one: bool,
        contexts: &[SelectedContext],
        encoder: ReplyEncoder,
        out: &mut BytesMut,
    ) {
        for (number, selected) in contexts.iter().enumerate() {
            let descriptors = self.status(header, if one { 1 } else { MAX_EXTENTS }, encoder.style());
            let last = number + 1 == contexts.len();
            encoder.status_chunk(out, header, selected.id, &descriptors, last);
        }
    }

    fn status(&self, header: &RequestHeader, max: usize, style: ReplyStyle) -> Vec<Descriptor> {
        let mut builder = StatusBuilder::new(header.len, max, style);
        let mut at = header.offset as usize;
        while at < self.disk.len() && !builder.is_full() {
            let end = ((at / BLOCK_BYTES + 1) * BLOCK_BYTES).min(self.disk.len());
            let zero = self.disk[at..end].iter().all(|byte| *byte == 0);
            builder.push((end - at) as u64, if zero { Descriptor::ZERO | Descriptor::HOLE } else { 0 });
            at = end;
        }
        let descriptors = builder.finish();
        assert!((1..=max).contains(&descriptors.len()));
        let told: u64 = descriptors.iter().map(|descriptor| descriptor.len).sum();
        assert!(told <= header.len, "more was told than was asked");
        assert!(descriptors.len() == max || told == header.len, "less was told than there was room for");
        for pair in descriptors.windows(2) {
            assert!(pair[0].flags != pair[1].flags || pair[0].len == MAX_STATUS_EXTENT_BYTES);
        }
        descriptors
    }
}

/// What the client must hear of a request: the same that the server did.
fn check_reply(
    server: &Server<'_>,
    replies: &mut Replies,
    header: &RequestHeader,
    payload: &[u8],
    verdict: Verdict,
    reply: &[u8],
    pattern: u8,
) {
    let agreed = server.agreed;
    let mut asked = agreed.contexts.len();
    let mut refused = None;
    if let Verdict::Filter { .. } = verdict {
        refused = agreed.admission.filter(header, payload, &agreed.contexts).err();
    }
    match ContextFilter::decode(payload) {
        Ok(filter) if matches!(verdict, Verdict::Filter { .. }) && refused.is_none() => {
            asked = filter.contexts.len();
            replies.expect_filtered(header, &filter).expect("nothing else is in flight");
        }
        _ => replies.expect(header).expect("nothing else is in flight"),
    }
    let mut input = BytesMut::new();
    let mut events = Vec::new();
    for piece in pieces(reply, pattern) {
        input.extend_from_slice(piece);
        while let Some(event) = replies.next(&mut input).expect("both halves are ours") {
            events.push(event);
        }
    }
    assert!(input.is_empty() && replies.in_flight() == 0, "a reply is whole, and no more");
    let end = events.pop();
    let result = match verdict {
        Verdict::Refuse(errno) => Err(errno),
        _ => refused.map_or(Ok(()), Err),
    };
    assert_eq!(end, Some(Event::Done { cookie: header.cookie, result }));
    let mut contexts = 0;
    let mut heard = 0;
    for event in events {
        let (offset, len, bytes) = match event {
            Event::Data { offset, ref bytes, .. } => (offset as usize, bytes.len(), Some(bytes)),
            Event::Hole { offset, len, .. } => (offset as usize, len as usize, None),
            Event::Status { .. } => {
                contexts += 1;
                continue;
            }
            Event::Failure { errno, ref message, .. } => {
                assert!(result == Err(errno) && (message == WHY || message.is_empty()));
                continue;
            }
            Event::Done { .. } => panic!("a request is done once"),
        };
        let truth = &server.disk[offset..offset + len];
        assert!(bytes.map_or(truth.iter().all(|byte| *byte == 0), |bytes| bytes == truth), "wrong bytes");
        heard += len;
    }
    match verdict {
        Verdict::Perform(Command::Read { .. }) => assert_eq!(heard, header.len as usize),
        Verdict::Perform(Command::BlockStatus { .. }) => assert_eq!(contexts, asked),
        Verdict::Filter { .. } => assert_eq!(contexts, if refused.is_none() { asked } else { 0 }),
        _ => assert_eq!((heard, contexts), (0, 0)),
    }
}

/// A server in transmission, given a client's bytes: a header is what it was encoded from; nothing beyond the export,
/// not offered or not permitted is done, and nothing plain is refused; and what the server answers is what a client hears.
pub fn server_transmission(data: &[u8]) {
    let mut input = Input::new(data);
    let pattern = input.u8();
    let agreed = Agreed::take(&mut input);
    let mut rest = input.rest();
    let mut server = Server { agreed: &agreed, disk: vec![0; EXPORT_BYTES as usize] };
    let mut replies = Replies::new(agreed.admission.replies, agreed.contexts.clone());
    for _ in 0..MAX_REQUESTS {
        let style = agreed.admission.replies;
        let Ok(Some(header)) = RequestHeader::at_front(rest, style) else { return };
        let (bytes, after) = rest.split_at(style.request_bytes());
        assert_eq!(&*header.encode(style), bytes, "a header is what it was encoded from");
        let verdict = agreed.admission.check(&header);
        check_verdict(&agreed.admission, &header, verdict);
        if matches!(verdict, Verdict::Disconnect | Verdict::TooLong) {
            return;
        }
        let Some((payload, after)) = after.split_at_checked(header.payload_len(style) as usize) else {
            return;
        };
        rest = after;
        let mut reply = BytesMut::new();
        server.answer(&header, verdict, payload, &mut reply);
        check_reply(&server, &mut replies, &header, payload, verdict, &reply, pattern.max(64));
    }
}
