//! The handshake as a client sees it. One option is under way at a time.

use bytes::{Buf, BufMut, BytesMut};

use super::greeting::{Told, put_context_option, put_info_option, put_option};
use super::{Goal, HandshakeError, Listed, Wish};
use crate::wire::{
    BlockSizes, CLIENT_OPTION_MAGIC, ClientFlags, ContextId, Cut, ExportInfo, HandshakeFlags, InfoKind,
    MAX_CONTEXTS, MAX_OPTION_BYTES, MetaContext, NBD_MAGIC, OPTION_REPLY_MAGIC, OptionKind, OptionReplyKind,
    Reader, ReplyStyle, SelectedContext, TransmissionFlags,
};

const GREETING_BYTES: usize = 18;
const REPLY_HEADER_BYTES: usize = 20;
/// How many exports a client lets a server list.
const MAX_LISTED: usize = 1 << 16;
/// How many pieces a client lets a server tell of one export.
const MAX_PIECES: usize = 64;
const MAX_SIZE: u64 = i64::MAX as u64;
const MAX_MINIMUM_BLOCK: u32 = 1 << 16;

/// A connection whose transmission begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connected {
    /// What the server told of the export.
    pub info: ExportInfo,
    /// Which kind of replies to expect.
    pub replies: ReplyStyle,
    /// Which contexts BLOCK_STATUS will tell of.
    pub contexts: Vec<SelectedContext>,
}

/// How far a handshake is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// More bytes are needed; the output may have some to send.
    Waiting,
    /// TLS begins, once the output is sent. [`Handshake::secured`] goes on when it has.
    StartTls,
    /// Transmission begins ([`Goal::Go`]).
    Ready(Box<Connected>),
    /// The export was told of ([`Goal::Info`]); the output says goodbye.
    Told(Box<Connected>),
    /// The exports were listed ([`Goal::List`]); the output says goodbye.
    Listed(Vec<Listed>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Greeting,
    Option(OptionKind),
    AwaitingTls,
    Over,
}

/// A handshake in progress.
#[derive(Debug)]
pub struct Handshake {
    wish: Wish,
    wants_tls: bool,
    state: State,
    replies: ReplyStyle,
    told: Told,
    listed: Vec<Listed>,
    input: BytesMut,
    output: BytesMut,
}

impl Handshake {
    /// A handshake without TLS that waits for the server's greeting.
    #[must_use]
    pub fn new(wish: Wish) -> Self {
        Self::begin(wish, false)
    }

    /// The same with TLS, or not at all: STARTTLS is the first option, and a server that refuses it is refused.
    #[must_use]
    pub fn with_tls(wish: Wish) -> Self {
        Self::begin(wish, true)
    }

    fn begin(wish: Wish, wants_tls: bool) -> Self {
        Self {
            wish,
            wants_tls,
            state: State::Greeting,
            replies: ReplyStyle::Simple,
            told: Told::default(),
            listed: Vec::new(),
            input: BytesMut::new(),
            output: BytesMut::new(),
        }
    }

    /// What is to be sent.
    pub fn take_output(&mut self) -> BytesMut {
        self.output.split()
    }

    /// TLS has begun: asks what was wished for, through it.
    pub fn secured(&mut self) {
        assert_eq!(self.state, State::AwaitingTls, "TLS begins after Progress::StartTls alone");
        self.ask_for_replies(self.wish.replies);
    }

    /// What the server sent after the handshake.
    #[must_use]
    pub fn into_rest(self) -> BytesMut {
        self.input
    }

    /// Takes what the server sent, and goes as far as that allows.
    ///
    /// # Errors
    /// Where the server refuses, or sends what no server may.
    pub fn receive(&mut self, bytes: &[u8]) -> Result<Progress, HandshakeError> {
        self.input.extend_from_slice(bytes);
        loop {
            let step = match self.state {
                State::Greeting => self.take_greeting()?,
                State::Option(kind) => self.take_reply(kind)?,
                // Nothing plain is to come before TLS.
                State::AwaitingTls if !self.input.is_empty() => {
                    return Err(HandshakeError::PlainAfterStartTls);
                }
                State::AwaitingTls => Some(Progress::StartTls),
                State::Over => Some(Progress::Waiting),
            };
            if let Some(progress) = step {
                return Ok(progress);
            }
        }
    }

    fn take_greeting(&mut self) -> Result<Option<Progress>, HandshakeError> {
        if self.input.len() < GREETING_BYTES {
            let right = NBD_MAGIC.to_be_bytes();
            let seen = self.input.len().min(right.len());
            let plausible = self.input[..seen] == right[..seen];
            return if plausible { Ok(Some(Progress::Waiting)) } else { Err(HandshakeError::NotNbd) };
        }
        if self.input.get_u64() != NBD_MAGIC {
            return Err(HandshakeError::NotNbd);
        }
        if self.input.get_u64() != CLIENT_OPTION_MAGIC {
            return Err(HandshakeError::TooOld);
        }
        let offered = HandshakeFlags::from_bits(self.input.get_u16());
        if !offered.contains(HandshakeFlags::FIXED_NEWSTYLE) {
            return Err(HandshakeError::TooOld);
        }
        let no_zeroes = offered.contains(HandshakeFlags::NO_ZEROES);
        let flags = ClientFlags::FIXED_NEWSTYLE.with_if(no_zeroes, ClientFlags::NO_ZEROES);
        self.output.put_u32(flags.bits());
        if self.wants_tls {
            self.send(OptionKind::StartTls);
        } else {
            self.ask_for_replies(self.wish.replies);
        }
        Ok(None)
    }

    fn send(&mut self, kind: OptionKind) {
        put_option(&mut self.output, kind, &[]);
        self.state = State::Option(kind);
    }

    fn ask_for_replies(&mut self, style: ReplyStyle) {
        match style {
            ReplyStyle::Extended => self.send(OptionKind::ExtendedHeaders),
            ReplyStyle::Structured => self.send(OptionKind::StructuredReply),
            ReplyStyle::Simple => self.send_goal(),
        }
    }

    fn send_goal(&mut self) {
        match &self.wish.goal {
            Goal::List => self.send(OptionKind::List),
            Goal::Go(name) => {
                put_info_option(&mut self.output, OptionKind::Go, name);
                self.state = State::Option(OptionKind::Go);
            }
            Goal::Info(name) => {
                put_info_option(&mut self.output, OptionKind::Info, name);
                self.state = State::Option(OptionKind::Info);
            }
        }
    }

    fn send_contexts_or_goal(&mut self) {
        let (Goal::Go(name) | Goal::Info(name)) = &self.wish.goal else { return self.send_goal() };
        if self.wish.contexts.is_empty() {
            return self.send_goal();
        }
        put_context_option(&mut self.output, name, &self.wish.contexts);
        self.state = State::Option(OptionKind::SetMetaContext);
    }

    fn take_reply(&mut self, kind: OptionKind) -> Result<Option<Progress>, HandshakeError> {
        let mut header = Reader::new(&self.input);
        let (Ok(magic), Ok(option), Ok(reply), Ok(len)) =
            (header.u64(), header.u32(), header.u32(), header.u32())
        else {
            return Ok(Some(Progress::Waiting));
        };
        if magic != OPTION_REPLY_MAGIC || option != kind.number() {
            return Err(HandshakeError::WrongReply(kind));
        }
        let len = usize::try_from(len)
            .ok()
            .filter(|len| *len <= MAX_OPTION_BYTES)
            .ok_or(HandshakeError::TooMuch(kind))?;
        if self.input.len() < REPLY_HEADER_BYTES + len {
            return Ok(Some(Progress::Waiting));
        }
        self.input.advance(REPLY_HEADER_BYTES);
        let data = self.input.split_to(len);
        let reply = OptionReplyKind::from_number(reply);
        if reply.is_error() {
            return self.refused(kind, reply, &data);
        }
        let malformed = |source| HandshakeError::Malformed { kind, source };
        match (kind, reply) {
            (_, OptionReplyKind::Ack) => self.acknowledged(kind),
            (OptionKind::List, OptionReplyKind::Server) => {
                if self.listed.len() == MAX_LISTED {
                    return Err(HandshakeError::TooMuch(kind));
                }
                let mut reader = Reader::new(&data);
                let name = reader.text32().map_err(malformed)?.to_owned();
                let description = reader.rest_as_text().map_err(malformed)?.to_owned();
                self.listed.push(Listed { name, description });
                Ok(None)
            }
            (OptionKind::Info | OptionKind::Go, OptionReplyKind::Info) => {
                self.told.pieces += 1;
                if self.told.pieces > MAX_PIECES {
                    return Err(HandshakeError::TooMuch(kind));
                }
                self.take_piece(kind, &data).map(|()| None)
            }
            (OptionKind::SetMetaContext, OptionReplyKind::MetaContext) => {
                let mut reader = Reader::new(&data);
                let id = ContextId(reader.u32().map_err(malformed)?);
                let name = reader.rest_as_text().map_err(malformed)?;
                self.take_context(id, name).map(|()| None)
            }
            _ => Err(HandshakeError::WrongReply(kind)),
        }
    }

    fn refused(
        &mut self,
        kind: OptionKind,
        reply: OptionReplyKind,
        data: &[u8],
    ) -> Result<Option<Progress>, HandshakeError> {
        match kind {
            // All can be done without: by a lesser kind of replies, by no contexts.
            OptionKind::ExtendedHeaders => self.ask_for_replies(ReplyStyle::Structured),
            OptionKind::StructuredReply => self.ask_for_replies(ReplyStyle::Simple),
            OptionKind::SetMetaContext => {
                self.told.contexts.clear();
                self.send_goal();
            }
            _ => {
                let text = Cut(&String::from_utf8_lossy(data)).to_string();
                return Err(HandshakeError::Refused { kind, reply, text });
            }
        }
        Ok(None)
    }

    fn take_context(&mut self, id: ContextId, name: &str) -> Result<(), HandshakeError> {
        let kind = OptionKind::SetMetaContext;
        let known = MetaContext::from_name(name).filter(|context| self.wish.contexts.contains(context));
        let Some(context) = known else { return Err(HandshakeError::WrongReply(kind)) };
        let contexts = &mut self.told.contexts;
        if contexts.len() == MAX_CONTEXTS {
            return Err(HandshakeError::TooMuch(kind));
        }
        if contexts.iter().any(|other| other.id == id || other.context == context) {
            return Err(HandshakeError::WrongReply(kind));
        }
        contexts.push(SelectedContext { id, context });
        Ok(())
    }

    fn take_piece(&mut self, kind: OptionKind, data: &[u8]) -> Result<(), HandshakeError> {
        let malformed = |source| HandshakeError::Malformed { kind, source };
        let mut reader = Reader::new(data);
        match InfoKind::from_number(reader.u16().map_err(malformed)?) {
            InfoKind::Export => {
                let size = reader.u64().map_err(malformed)?;
                let flags = TransmissionFlags::from_bits(reader.u16().map_err(malformed)?);
                if size > MAX_SIZE {
                    return Err(HandshakeError::BadSize(size));
                }
                self.told.info = Some(ExportInfo {
                    name: String::new(),
                    description: String::new(),
                    size,
                    flags,
                    block_sizes: BlockSizes::DEFAULT,
                });
            }
            InfoKind::Name => self.told.name = Some(reader.rest_as_text().map_err(malformed)?.to_owned()),
            InfoKind::Description => {
                self.told.description = Some(reader.rest_as_text().map_err(malformed)?.to_owned());
            }
            InfoKind::BlockSize => {
                let minimum = reader.u32().map_err(malformed)?;
                let preferred = reader.u32().map_err(malformed)?;
                let maximum = reader.u32().map_err(malformed)?;
                let sensible = minimum.is_power_of_two()
                    && minimum <= MAX_MINIMUM_BLOCK
                    && preferred.is_power_of_two()
                    && preferred >= minimum
                    && maximum >= preferred;
                if !sensible {
                    return Err(HandshakeError::BadBlockSizes);
                }
                self.told.block_sizes = Some(BlockSizes { minimum, preferred, maximum });
            }
            // What a newer server tells beyond that is passed over, as the protocol asks.
            InfoKind::Unknown(_) => return Ok(()),
        }
        reader.finish().map_err(malformed)
    }

    fn acknowledged(&mut self, kind: OptionKind) -> Result<Option<Progress>, HandshakeError> {
        match kind {
            OptionKind::StartTls => {
                self.state = State::AwaitingTls;
                Ok(None)
            }
            OptionKind::StructuredReply | OptionKind::ExtendedHeaders => {
                let extended = kind == OptionKind::ExtendedHeaders;
                self.replies = if extended { ReplyStyle::Extended } else { ReplyStyle::Structured };
                self.send_contexts_or_goal();
                Ok(None)
            }
            OptionKind::SetMetaContext => {
                self.send_goal();
                Ok(None)
            }
            OptionKind::List => {
                self.say_goodbye();
                Ok(Some(Progress::Listed(std::mem::take(&mut self.listed))))
            }
            OptionKind::Info => {
                let connected = self.connected()?;
                self.say_goodbye();
                Ok(Some(Progress::Told(connected)))
            }
            _ => {
                self.state = State::Over;
                self.connected().map(|connected| Some(Progress::Ready(connected)))
            }
        }
    }

    fn say_goodbye(&mut self) {
        put_option(&mut self.output, OptionKind::Abort, &[]);
        self.state = State::Over;
    }

    fn connected(&mut self) -> Result<Box<Connected>, HandshakeError> {
        let told = std::mem::take(&mut self.told);
        let mut info = told.info.ok_or(HandshakeError::NoSize)?;
        let (Goal::Go(asked) | Goal::Info(asked)) = &self.wish.goal else {
            return Err(HandshakeError::NoSize);
        };
        info.name = told.name.unwrap_or_else(|| asked.clone());
        info.description = told.description.unwrap_or_default();
        info.block_sizes = told.block_sizes.unwrap_or(BlockSizes::DEFAULT);
        Ok(Box::new(Connected { info, replies: self.replies, contexts: told.contexts }))
    }
}
