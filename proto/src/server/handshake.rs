//! The handshake as a server sees it: greeting, the client's flags, then options until one begins
//! transmission or ends the connection.
//!
//! An option is magic (8), kind (4), length (4), data. A reply to one is magic (8), the option's kind (4),
//! the reply's kind (4), length (4), data.

use bytes::{Buf, BufMut, BytesMut};

use super::options::{BadQueries, ContextRequest, InfoRequest};
use super::tls::{self, StartTls, Tls};
use super::{Directory, ExportId, Refusal, TlsMode};
use crate::wire::{
    CLIENT_OPTION_MAGIC, ClientFlags, ContextId, ContextQuery, ExportInfo, HandshakeFlags, InfoKind,
    MAX_CONTEXTS, MAX_OPTION_BYTES, MAX_OPTIONS, MetaContext, NBD_MAGIC, OPTION_REPLY_MAGIC, OptionKind,
    OptionReplyKind, Reader, ReplyStyle, SelectedContext, TransmissionFlags, max_options,
};

const OPTION_HEADER_BYTES: usize = 16;
const ZEROES_AFTER_EXPORT_NAME: usize = 124;

/// What the two ends agreed on when transmission begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agreed {
    /// Which export.
    pub export: ExportId,
    /// What the client was told of it, `SEND_DF` and `BLOCK_STATUS_PAYLOAD` included where they apply.
    pub info: ExportInfo,
    /// Which kind of replies.
    pub replies: ReplyStyle,
    /// The contexts that BLOCK_STATUS tells of; empty where it may not be asked.
    pub contexts: Vec<SelectedContext>,
}

/// Why a handshake ended without transmission.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Ending {
    /// The client asked for it.
    #[error("the client ended the handshake")]
    Aborted,
    /// The client sent flags that nobody offered.
    #[error("the client sent unknown flags")]
    UnknownFlags,
    /// What should have been an option is none.
    #[error("the client sent something that is not an option")]
    NotAnOption,
    /// An option was longer than any may be.
    #[error("the client sent an option that is too long")]
    OptionTooLong,
    /// There were more options than any client needs.
    #[error("the client sent too many options")]
    TooManyOptions,
    /// EXPORT_NAME could not be granted, and has no reply that could say so.
    #[error("the client asked by EXPORT_NAME for an export that it cannot have")]
    ExportRefused,
    /// EXPORT_NAME after extended headers were agreed on.
    #[error("the client agreed on extended headers and then asked by EXPORT_NAME, which cannot have them")]
    ExtendedNeedsGo,
    /// A client that does not speak the fixed newstyle sent an option other than EXPORT_NAME.
    #[error("the client sent an option that its flags rule out")]
    NotFixedNewstyle,
    /// EXPORT_NAME came without TLS, and has no reply that could ask for it.
    #[error("the client asked for an export without TLS, which is required")]
    TlsRequired,
    /// More bytes came with STARTTLS: whoever sent them, TLS does not vouch for them.
    #[error("plain bytes followed STARTTLS")]
    PlainAfterStartTls,
}

/// What came of a step.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing can be done before more bytes are there.
    Waiting,
    /// An option was answered; there may be another in what was received.
    Answered,
    /// TLS begins once the output is sent. What comes of it goes on with [`Handshake::secured`].
    StartTls,
    /// Transmission begins once the output is sent. What was received beyond is [`Handshake::into_rest`].
    Transmission(Box<Agreed>),
    /// The connection ends once the output is sent.
    Closed(Ending),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    AwaitingFlags,
    AwaitingOption,
    AwaitingTls,
    Over(Option<Ending>),
}

/// All that options can agree on: what STARTTLS forgets.
#[derive(Debug, Default)]
struct Negotiated {
    replies: ReplyStyle,
    contexts: Option<(ExportId, Vec<SelectedContext>)>,
}

/// A handshake in progress.
///
/// It holds at most one option beyond what a single [`Handshake::receive`] brings, and answers at most one per
/// [`Handshake::step`], so that a caller who sends the output between steps bounds both.
#[derive(Debug)]
pub struct Handshake {
    state: State,
    client: ClientFlags,
    options_seen: u32,
    /// Once it was asked.
    most_options: Option<u32>,
    negotiated: Negotiated,
    tls: Tls,
    input: BytesMut,
    output: BytesMut,
}

impl Default for Handshake {
    fn default() -> Self {
        Self::new()
    }
}

impl Handshake {
    /// A handshake without TLS whose greeting is waiting to be sent.
    #[must_use]
    pub fn new() -> Self {
        Self::with_tls(TlsMode::Off)
    }

    /// A handshake of a server with TLS or without.
    #[must_use]
    pub fn with_tls(mode: TlsMode) -> Self {
        let mut output = BytesMut::with_capacity(256);
        output.put_u64(NBD_MAGIC);
        output.put_u64(CLIENT_OPTION_MAGIC);
        output.put_u16(HandshakeFlags::FIXED_NEWSTYLE.with(HandshakeFlags::NO_ZEROES).bits());
        Self {
            state: State::AwaitingFlags,
            client: ClientFlags::NONE,
            options_seen: 0,
            most_options: None,
            negotiated: Negotiated::default(),
            tls: Tls::new(mode),
            input: BytesMut::new(),
            output,
        }
    }

    /// TLS has begun: what is received from now on came through it.
    pub fn secured(&mut self) {
        assert_eq!(self.state, State::AwaitingTls, "TLS begins after Step::StartTls alone");
        // What came before it was not vouched for.
        self.state = match self.input.is_empty() {
            true => State::AwaitingOption,
            false => State::Over(Some(Ending::PlainAfterStartTls)),
        };
        self.tls.begin();
    }

    /// Whether the client was refused something for want of TLS, and has not begun it since.
    #[must_use]
    pub const fn missed_tls(&self) -> bool {
        self.tls.was_missed()
    }

    /// Takes what the client sent.
    pub fn receive(&mut self, bytes: &[u8]) {
        self.input.extend_from_slice(bytes);
    }

    /// What is to be sent; the caller sends it before the next step.
    pub fn take_output(&mut self) -> BytesMut {
        self.output.split()
    }

    /// What the client sent after the option that began transmission.
    #[must_use]
    pub fn into_rest(self) -> BytesMut {
        self.input
    }

    /// Answers the next option, if it is there whole.
    pub fn step(&mut self, directory: &dyn Directory) -> Step {
        match self.state {
            State::AwaitingFlags => self.take_flags(),
            State::AwaitingOption => self.take_option(directory),
            State::AwaitingTls => Step::StartTls,
            State::Over(ending) => Step::Closed(ending.unwrap_or(Ending::Aborted)),
        }
    }

    fn close(&mut self, ending: Ending) -> Step {
        self.state = State::Over(Some(ending));
        Step::Closed(ending)
    }

    fn take_flags(&mut self) -> Step {
        if self.input.len() < size_of::<u32>() {
            return Step::Waiting;
        }
        self.client = ClientFlags::from_bits(self.input.get_u32());
        if self.client.exceeds(ClientFlags::FIXED_NEWSTYLE.with(ClientFlags::NO_ZEROES)) {
            return self.close(Ending::UnknownFlags);
        }
        self.state = State::AwaitingOption;
        Step::Answered
    }

    fn take_option(&mut self, directory: &dyn Directory) -> Step {
        let mut header = Reader::new(&self.input);
        let (Ok(magic), Ok(kind), Ok(len)) = (header.u64(), header.u32(), header.u32()) else {
            return Step::Waiting;
        };
        if magic != CLIENT_OPTION_MAGIC {
            return self.close(Ending::NotAnOption);
        }
        let kind = OptionKind::from_number(kind);
        if !self.client.contains(ClientFlags::FIXED_NEWSTYLE) && kind != OptionKind::ExportName {
            return self.close(Ending::NotFixedNewstyle);
        }
        if self.options_seen >= MAX_OPTIONS && self.options_seen >= self.most_options(directory) {
            self.refuse(kind, OptionReplyKind::ErrPolicy, "too many options");
            return self.close(Ending::TooManyOptions);
        }
        let Some(len) = usize::try_from(len).ok().filter(|len| *len <= MAX_OPTION_BYTES) else {
            self.refuse(kind, OptionReplyKind::ErrTooBig, "the option is too long");
            return self.close(Ending::OptionTooLong);
        };
        if self.input.len() < OPTION_HEADER_BYTES + len {
            return Step::Waiting;
        }
        self.options_seen += 1;
        self.input.advance(OPTION_HEADER_BYTES);
        let data = self.input.split_to(len);
        self.answer(kind, &data, directory)
    }

    /// How many options are taken: more where there are many exports to ask about, and the client may know of them.
    fn most_options(&mut self, directory: &dyn Directory) -> u32 {
        if !self.tls.lets_in() {
            return MAX_OPTIONS;
        }
        *self.most_options.get_or_insert_with(|| max_options(directory.list().len()))
    }

    fn answer(&mut self, kind: OptionKind, data: &[u8], directory: &dyn Directory) -> Step {
        if self.tls.must_come_first(kind) {
            if kind == OptionKind::ExportName {
                return self.close(Ending::TlsRequired);
            }
            self.refuse(kind, OptionReplyKind::ErrTlsRequired, tls::REQUIRED);
            return Step::Answered;
        }
        match kind {
            OptionKind::ExportName => return self.export_name(data, directory),
            OptionKind::Abort => {
                self.reply(kind, OptionReplyKind::Ack, &[]);
                return self.close(Ending::Aborted);
            }
            OptionKind::Info | OptionKind::Go => return self.info(kind, data, directory),
            OptionKind::List => self.list(data, directory),
            OptionKind::StructuredReply => self.agree_on(kind, ReplyStyle::Structured, data),
            OptionKind::ExtendedHeaders => self.agree_on(kind, ReplyStyle::Extended, data),
            OptionKind::ListMetaContext | OptionKind::SetMetaContext => self.contexts(kind, data, directory),
            OptionKind::StartTls => return self.start_tls(data),
            OptionKind::Unknown(_) => {
                self.refuse(kind, OptionReplyKind::ErrUnsupported, "the option is not supported");
            }
        }
        Step::Answered
    }

    /// Agrees on replies of `style`, where nothing better was agreed on before: extended headers are not given up again.
    fn agree_on(&mut self, kind: OptionKind, style: ReplyStyle, data: &[u8]) {
        if !data.is_empty() {
            return self.refuse(kind, OptionReplyKind::ErrInvalid, "the option takes no data");
        }
        if self.negotiated.replies > style {
            let why = "extended headers were agreed on before";
            return self.refuse(kind, OptionReplyKind::ErrExtendedHeadersRequired, why);
        }
        self.negotiated.replies = style;
        self.reply(kind, OptionReplyKind::Ack, &[]);
    }

    fn start_tls(&mut self, data: &[u8]) -> Step {
        let kind = OptionKind::StartTls;
        match self.tls.start(data) {
            StartTls::Absent => self.refuse(kind, OptionReplyKind::ErrPolicy, "TLS is not configured"),
            StartTls::Invalid(why) => self.refuse(kind, OptionReplyKind::ErrInvalid, why),
            StartTls::Begin if !self.input.is_empty() => return self.close(Ending::PlainAfterStartTls),
            StartTls::Begin => {
                self.negotiated = Negotiated::default();
                self.reply(kind, OptionReplyKind::Ack, &[]);
                self.state = State::AwaitingTls;
                return Step::StartTls;
            }
        }
        Step::Answered
    }

    /// The old way to begin: size (8), flags (2), zeroes; and no way to refuse but to close.
    fn export_name(&mut self, data: &[u8], directory: &dyn Directory) -> Step {
        if self.negotiated.replies.is_extended() {
            return self.close(Ending::ExtendedNeedsGo);
        }
        let Ok(name) = Reader::new(data).rest_as_text() else { return self.close(Ending::ExportRefused) };
        let Some(export) = directory.find(name) else { return self.close(Ending::ExportRefused) };
        let Ok(info) = directory.describe(export) else { return self.close(Ending::ExportRefused) };
        let info = self.with_reply_flags(OptionKind::ExportName, export, info);
        self.output.put_u64(info.size);
        self.output.put_u16(info.flags.bits());
        if !self.client.contains(ClientFlags::NO_ZEROES) {
            self.output.put_bytes(0, ZEROES_AFTER_EXPORT_NAME);
        }
        self.begin(export, info)
    }

    fn info(&mut self, kind: OptionKind, data: &[u8], directory: &dyn Directory) -> Step {
        let Ok(request) = InfoRequest::parse(data) else {
            self.refuse(kind, OptionReplyKind::ErrInvalid, "the option's data is malformed");
            return Step::Answered;
        };
        let Some(export) = directory.find(request.name) else {
            self.refuse_name(kind, request.name, directory);
            return Step::Answered;
        };
        let info = match directory.describe(export) {
            Ok(info) => self.with_reply_flags(kind, export, info),
            Err(Refusal::Unavailable) => {
                self.refuse(kind, OptionReplyKind::ErrUnknown, "the export cannot be opened");
                return Step::Answered;
            }
            Err(Refusal::ShuttingDown) => {
                self.refuse(kind, OptionReplyKind::ErrShutdown, "the server is shutting down");
                return Step::Answered;
            }
        };
        self.tell(kind, &request, &info);
        self.reply(kind, OptionReplyKind::Ack, &[]);
        if kind == OptionKind::Go { self.begin(export, info) } else { Step::Answered }
    }

    fn tell(&mut self, kind: OptionKind, request: &InfoRequest<'_>, info: &ExportInfo) {
        let mut piece = BytesMut::new();
        piece.put_u16(InfoKind::Export.number());
        piece.put_u64(info.size);
        piece.put_u16(info.flags.bits());
        self.reply(kind, OptionReplyKind::Info, &piece);
        // An export may be listed under several names, and each is its canonical one for whoever asks by it.
        let name = if request.name.is_empty() { &info.name } else { request.name };
        for (info_kind, text) in [(InfoKind::Name, name), (InfoKind::Description, &info.description)] {
            if request.wants(info_kind) {
                piece.clear();
                piece.put_u16(info_kind.number());
                piece.put_slice(text.as_bytes());
                self.reply(kind, OptionReplyKind::Info, &piece);
            }
        }
        if request.wants(InfoKind::BlockSize) {
            piece.clear();
            piece.put_u16(InfoKind::BlockSize.number());
            piece.put_u32(info.block_sizes.minimum);
            piece.put_u32(info.block_sizes.preferred);
            piece.put_u32(info.block_sizes.maximum);
            self.reply(kind, OptionReplyKind::Info, &piece);
        }
    }

    /// A client that only asks is told that BLOCK_STATUS can be filtered whether or not it selected contexts by then.
    fn with_reply_flags(&self, option: OptionKind, export: ExportId, mut info: ExportInfo) -> ExportInfo {
        let Negotiated { replies, contexts } = &self.negotiated;
        let has_contexts = matches!(contexts, Some((on, contexts)) if *on == export && !contexts.is_empty());
        let filters = replies.is_extended() && (has_contexts || option == OptionKind::Info);
        info.flags = info
            .flags
            .with(TransmissionFlags::HAS_FLAGS)
            .with_if(replies.has_chunks(), TransmissionFlags::SEND_DF)
            .with_if(filters, TransmissionFlags::BLOCK_STATUS_PAYLOAD);
        info
    }

    fn begin(&mut self, export: ExportId, info: ExportInfo) -> Step {
        self.state = State::Over(None);
        let negotiated = std::mem::take(&mut self.negotiated);
        // Contexts selected on another export say nothing about this one.
        let contexts = match negotiated.contexts {
            Some((selected_on, contexts)) if selected_on == export => contexts,
            _ => Vec::new(),
        };
        Step::Transmission(Box::new(Agreed { export, info, replies: negotiated.replies, contexts }))
    }

    fn list(&mut self, data: &[u8], directory: &dyn Directory) {
        let kind = OptionKind::List;
        if !data.is_empty() {
            return self.refuse(kind, OptionReplyKind::ErrInvalid, "the option takes no data");
        }
        for listing in directory.list() {
            let mut piece = BytesMut::new();
            put_text32(&mut piece, &listing.name);
            piece.put_slice(listing.description.as_bytes());
            self.reply(kind, OptionReplyKind::Server, &piece);
        }
        self.reply(kind, OptionReplyKind::Ack, &[]);
    }

    fn contexts(&mut self, kind: OptionKind, data: &[u8], directory: &dyn Directory) {
        let setting = kind == OptionKind::SetMetaContext;
        if setting {
            // Whatever comes of it, the previous selection is gone.
            self.negotiated.contexts = None;
        }
        if self.negotiated.replies == ReplyStyle::Simple {
            return self.refuse(kind, OptionReplyKind::ErrInvalid, "structured replies come first");
        }
        let request = match ContextRequest::parse(data) {
            Ok(request) => request,
            Err(BadQueries::TooMany) => {
                return self.refuse(kind, OptionReplyKind::ErrTooBig, "too many queries");
            }
            Err(BadQueries::Malformed) => {
                return self.refuse(kind, OptionReplyKind::ErrInvalid, "the option's data is malformed");
            }
        };
        if !request.queries.iter().all(|query| ContextQuery(query).is_wellformed()) {
            return self.refuse(kind, OptionReplyKind::ErrInvalid, "a query has no namespace");
        }
        let Some(export) = directory.find(request.name) else {
            return self.refuse_name(kind, request.name, directory);
        };
        let mut chosen: Vec<SelectedContext> = Vec::new();
        for context in directory.contexts(export) {
            let wanted = if setting {
                request.queries.iter().any(|query| ContextQuery(query).selects(&context))
            } else {
                request.queries.is_empty()
                    || request.queries.iter().any(|query| ContextQuery(query).lists(&context))
            };
            if wanted && chosen.len() < MAX_CONTEXTS {
                let number = u32::try_from(chosen.len() + 1).expect("contexts are few");
                chosen.push(SelectedContext { id: ContextId(number), context });
            }
        }
        for selected in &chosen {
            // An id in a LIST means nothing and is zero.
            let id = if setting { selected.id } else { ContextId(0) };
            self.reply_context(kind, id, &selected.context);
        }
        self.reply(kind, OptionReplyKind::Ack, &[]);
        if setting {
            self.negotiated.contexts = Some((export, chosen));
        }
    }

    fn reply_context(&mut self, kind: OptionKind, id: ContextId, context: &MetaContext) {
        let mut piece = BytesMut::new();
        piece.put_u32(id.0);
        piece.put_slice(context.to_string().as_bytes());
        self.reply(kind, OptionReplyKind::MetaContext, &piece);
    }

    /// A name that once stood for something is refused by policy, with the reason; any other is unknown.
    fn refuse_name(&mut self, option: OptionKind, name: &str, directory: &dyn Directory) {
        match directory.why_absent(name) {
            Some(why) => self.refuse(option, OptionReplyKind::ErrPolicy, &why),
            None => self.refuse(option, OptionReplyKind::ErrUnknown, "no such export"),
        }
    }

    fn refuse(&mut self, option: OptionKind, reply: OptionReplyKind, why: &str) {
        self.reply(option, reply, why.as_bytes());
    }

    fn reply(&mut self, option: OptionKind, reply: OptionReplyKind, data: &[u8]) {
        self.output.put_u64(OPTION_REPLY_MAGIC);
        self.output.put_u32(option.number());
        self.output.put_u32(reply.number());
        self.output
            .put_u32(u32::try_from(data.len()).expect("a reply's pieces are strings of bounded length"));
        self.output.put_slice(data);
    }
}

fn put_text32(out: &mut BytesMut, text: &str) {
    out.put_u32(u32::try_from(text.len()).expect("an export's name was checked when it was added"));
    out.put_slice(text.as_bytes());
}
