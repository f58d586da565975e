//! What becomes of a request: everything that can be said of it without the device, before
//! anything is allocated for it.

use crate::wire::{
    CommandFlags, CommandKind, ContextFilter, Errno, MAX_PAYLOAD_BYTES, ReplyStyle, RequestHeader,
    SelectedContext, TransmissionFlags,
};

/// A request that may be done: its range lies within the export, and its flags are ones it may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Send the range's bytes.
    Read {
        /// As one chunk (DF).
        whole: bool,
    },
    /// Take the range's bytes, which follow the header.
    Write {
        /// Be on stable storage before the reply.
        fua: bool,
    },
    /// Put everything acknowledged on stable storage.
    Flush,
    /// Forget the range.
    Trim {
        /// Be on stable storage before the reply.
        fua: bool,
    },
    /// Make the range read as zeroes.
    WriteZeroes {
        /// Be on stable storage before the reply.
        fua: bool,
        /// Keep its room allocated.
        no_hole: bool,
        /// Fail where it would be no faster than writing.
        fast: bool,
    },
    /// Fetch the range to where it is fast.
    Cache,
    /// Tell what is known of the range.
    BlockStatus {
        /// One extent per context.
        one: bool,
    },
}

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is done.
    Perform(Command),
    /// It is a BLOCK_STATUS, and what it is about stands in the payload (at most [`ContextFilter::MAX_BYTES`]) that
    /// follows its header: [`Admission::filter`].
    Filter {
        /// One extent per context.
        one: bool,
    },
    /// It does nothing and succeeds: a length of zero. Nothing follows its header.
    Nothing,
    /// It is answered with this error, once the payload (at most [`MAX_PAYLOAD_BYTES`]) that follows its header was skipped.
    Refuse(Errno),
    /// The client says goodbye; there is no reply.
    Disconnect,
    /// Its payload is longer than anybody reads past: the connection ends.
    TooLong,
}

/// What requests on one connection are measured by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Admission {
    /// The export's size in bytes.
    pub size: u64,
    /// What the client was told that the export can do.
    pub flags: TransmissionFlags,
    /// Which kind of replies was agreed on.
    pub replies: ReplyStyle,
    /// Whether a context was selected, so that BLOCK_STATUS may be asked.
    pub has_contexts: bool,
    /// The longest READ or WRITE, in bytes; at most [`MAX_PAYLOAD_BYTES`].
    pub max_request: u32,
}

impl Admission {
    /// What becomes of the request with this header.
    #[must_use]
    pub fn check(&self, header: &RequestHeader) -> Verdict {
        if header.payload_len(self.replies) > u64::from(MAX_PAYLOAD_BYTES) {
            return Verdict::TooLong;
        }
        match self.command(header) {
            Ok(Some(Command::BlockStatus { one })) if header.flags.contains(CommandFlags::PAYLOAD_LEN) => {
                Verdict::Filter { one }
            }
            Ok(Some(command)) => Verdict::Perform(command),
            Ok(None) if header.kind == CommandKind::Disconnect => Verdict::Disconnect,
            Ok(None) => Verdict::Nothing,
            Err(errno) => Verdict::Refuse(errno),
        }
    }

    /// What a BLOCK_STATUS with this payload asks: as if it had none, of these contexts, which are among `selected`.
    ///
    /// # Errors
    /// [`Errno::Invalid`] where the payload is malformed, names no context, an unknown one or one twice, or a range that is not
    /// within the export.
    pub fn filter(
        &self,
        header: &RequestHeader,
        payload: &[u8],
        selected: &[SelectedContext],
    ) -> Result<(RequestHeader, Vec<SelectedContext>), Errno> {
        let filter = ContextFilter::decode(payload).map_err(|_| Errno::Invalid)?;
        let mut contexts: Vec<SelectedContext> = Vec::with_capacity(filter.contexts.len());
        for id in filter.contexts {
            let context = selected.iter().find(|context| context.id == id).ok_or(Errno::Invalid)?;
            if contexts.contains(context) {
                return Err(Errno::Invalid);
            }
            contexts.push(context.clone());
        }
        let flags = header.flags.without(CommandFlags::PAYLOAD_LEN);
        let request = RequestHeader { flags, len: filter.len, ..*header };
        if contexts.is_empty() || request.len == 0 {
            return Err(Errno::Invalid);
        }
        self.bound(&request, Errno::Invalid)?;
        Ok((request, contexts))
    }

    fn command(&self, header: &RequestHeader) -> Result<Option<Command>, Errno> {
        use TransmissionFlags as Can;
        let fua = header.flags.contains(CommandFlags::FUA);
        let command = match header.kind {
            CommandKind::Disconnect => return Ok(None),
            CommandKind::Flush => {
                self.require(Can::SEND_FLUSH)?;
                self.allow(header, CommandFlags::NONE)?;
                if header.offset != 0 || header.len != 0 {
                    return Err(Errno::Invalid);
                }
                return Ok(Some(Command::Flush));
            }
            CommandKind::Read => {
                let chunks = self.replies.has_chunks();
                self.allow(header, CommandFlags::NONE.with_if(chunks, CommandFlags::DF))?;
                self.bound(header, Errno::Invalid)?;
                self.portable(header, if chunks { Errno::Overflow } else { Errno::Invalid })?;
                Command::Read { whole: header.flags.contains(CommandFlags::DF) }
            }
            CommandKind::Write => {
                self.writable()?;
                let extended = self.replies.is_extended();
                let payload = CommandFlags::NONE.with_if(extended, CommandFlags::PAYLOAD_LEN);
                self.allow(header, payload)?;
                self.bound(header, Errno::NoSpace)?;
                self.portable(header, Errno::Invalid)?;
                Command::Write { fua }
            }
            CommandKind::Trim => {
                self.writable()?;
                self.require(Can::SEND_TRIM)?;
                self.allow(header, CommandFlags::NONE)?;
                self.bound(header, Errno::Invalid)?;
                Command::Trim { fua }
            }
            CommandKind::WriteZeroes => {
                self.writable()?;
                self.require(Can::SEND_WRITE_ZEROES)?;
                let fast = if self.flags.contains(Can::SEND_FAST_ZERO) {
                    CommandFlags::FAST_ZERO
                } else {
                    CommandFlags::NONE
                };
                self.allow(header, CommandFlags::NO_HOLE.with(fast))?;
                self.bound(header, Errno::NoSpace)?;
                Command::WriteZeroes {
                    fua,
                    no_hole: header.flags.contains(CommandFlags::NO_HOLE),
                    fast: header.flags.contains(CommandFlags::FAST_ZERO),
                }
            }
            CommandKind::Cache => {
                self.require(Can::SEND_CACHE)?;
                self.allow(header, CommandFlags::NONE)?;
                self.bound(header, Errno::Invalid)?;
                Command::Cache
            }
            CommandKind::BlockStatus => {
                let filters = self.flags.contains(Can::BLOCK_STATUS_PAYLOAD) && self.replies.is_extended();
                let payload = CommandFlags::NONE.with_if(filters, CommandFlags::PAYLOAD_LEN);
                self.allow(header, CommandFlags::REQ_ONE.with(payload))?;
                if !self.has_contexts || header.len == 0 {
                    return Err(Errno::Invalid);
                }
                if header.flags.contains(CommandFlags::PAYLOAD_LEN) {
                    // More than this names a context twice, or one that is not there.
                    if header.len > ContextFilter::MAX_BYTES as u64 {
                        return Err(Errno::Invalid);
                    }
                } else {
                    self.bound(header, Errno::Invalid)?;
                }
                Command::BlockStatus { one: header.flags.contains(CommandFlags::REQ_ONE) }
            }
            CommandKind::Unknown(_) => return Err(Errno::Invalid),
        };
        Ok((header.len > 0).then_some(command))
    }

    /// FUA may stand on any command where it was offered.
    fn allow(&self, header: &RequestHeader, flags: CommandFlags) -> Result<(), Errno> {
        let allowed = flags.with_if(self.flags.contains(TransmissionFlags::SEND_FUA), CommandFlags::FUA);
        if header.flags.exceeds(allowed) { Err(Errno::Invalid) } else { Ok(()) }
    }

    fn require(&self, flag: TransmissionFlags) -> Result<(), Errno> {
        if self.flags.contains(flag) { Ok(()) } else { Err(Errno::Invalid) }
    }

    fn writable(&self) -> Result<(), Errno> {
        if self.flags.contains(TransmissionFlags::READ_ONLY) { Err(Errno::NotPermitted) } else { Ok(()) }
    }

    fn bound(&self, header: &RequestHeader, errno: Errno) -> Result<(), Errno> {
        let fits = header.offset <= self.size && header.len <= self.size - header.offset;
        if fits { Ok(()) } else { Err(errno) }
    }

    const fn portable(&self, header: &RequestHeader, errno: Errno) -> Result<(), Errno> {
        if header.len <= self.max_request as u64 { Ok(()) } else { Err(errno) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{ContextId, Cookie, MetaContext};

    const ALL: TransmissionFlags = TransmissionFlags::from_bits(!2);

    fn admission() -> Admission {
        Admission {
            size: 1 << 20,
            flags: ALL,
            replies: ReplyStyle::Structured,
            has_contexts: true,
            max_request: MAX_PAYLOAD_BYTES,
        }
    }

    fn header(kind: CommandKind, offset: u64, len: u64) -> RequestHeader {
        RequestHeader { flags: CommandFlags::NONE, kind, cookie: Cookie(1), offset, len }
    }

    #[test]
    fn outside_the_export_a_write_has_no_room_and_a_read_is_invalid() {
        for (kind, errno) in [
            (CommandKind::Write, Errno::NoSpace),
            (CommandKind::WriteZeroes, Errno::NoSpace),
            (CommandKind::Read, Errno::Invalid),
            (CommandKind::Trim, Errno::Invalid),
            (CommandKind::Cache, Errno::Invalid),
            (CommandKind::BlockStatus, Errno::Invalid),
        ] {
            for offset in [1 << 20, (1 << 20) - 511, u64::MAX, u64::MAX - 511] {
                assert_eq!(
                    admission().check(&header(kind, offset, 512)),
                    Verdict::Refuse(errno),
                    "{kind:?} {offset}"
                );
            }
            let inside = admission().check(&header(kind, (1 << 20) - 512, 512));
            assert!(matches!(inside, Verdict::Perform(_)), "{kind:?} {inside:?}");
        }
    }

    #[test]
    fn a_read_only_export_permits_no_change() {
        let admission = Admission { flags: ALL.with(TransmissionFlags::READ_ONLY), ..admission() };
        for kind in [CommandKind::Write, CommandKind::WriteZeroes, CommandKind::Trim] {
            assert_eq!(admission.check(&header(kind, 0, 512)), Verdict::Refuse(Errno::NotPermitted));
        }
        assert!(matches!(admission.check(&header(CommandKind::Flush, 0, 0)), Verdict::Perform(_)));
    }

    #[test]
    fn a_payload_that_nobody_drains_ends_the_connection() {
        let long = header(CommandKind::Write, 0, u64::from(MAX_PAYLOAD_BYTES) + 1);
        assert_eq!(admission().check(&long), Verdict::TooLong);
        let refused = header(CommandKind::Write, 0, u64::from(MAX_PAYLOAD_BYTES));
        assert_eq!(admission().check(&refused), Verdict::Refuse(Errno::NoSpace));
    }

    #[test]
    fn flags_that_a_command_cannot_have_are_invalid() {
        let with = |kind, flags| RequestHeader { flags, ..header(kind, 0, 512) };
        for (kind, flags) in [
            (CommandKind::Read, CommandFlags::NO_HOLE),
            (CommandKind::Read, CommandFlags::PAYLOAD_LEN),
            (CommandKind::Write, CommandFlags::DF),
            (CommandKind::Trim, CommandFlags::FAST_ZERO),
            (CommandKind::WriteZeroes, CommandFlags::REQ_ONE),
            (CommandKind::Cache, CommandFlags::DF),
            (CommandKind::BlockStatus, CommandFlags::DF),
        ] {
            assert_eq!(admission().check(&with(kind, flags)), Verdict::Refuse(Errno::Invalid), "{kind:?}");
        }
        let simple = Admission { replies: ReplyStyle::Simple, ..admission() };
        let df = with(CommandKind::Read, CommandFlags::DF);
        assert_eq!(simple.check(&df), Verdict::Refuse(Errno::Invalid));
        assert_eq!(admission().check(&df), Verdict::Perform(Command::Read { whole: true }));
    }

    #[test]
    fn what_was_not_offered_is_refused() {
        let nothing = Admission { flags: TransmissionFlags::HAS_FLAGS, has_contexts: false, ..admission() };
        for kind in
            [CommandKind::Trim, CommandKind::WriteZeroes, CommandKind::Cache, CommandKind::BlockStatus]
        {
            assert_eq!(nothing.check(&header(kind, 0, 512)), Verdict::Refuse(Errno::Invalid), "{kind:?}");
        }
        assert_eq!(nothing.check(&header(CommandKind::Flush, 0, 0)), Verdict::Refuse(Errno::Invalid));
        assert_eq!(nothing.check(&header(CommandKind::Unknown(77), 0, 0)), Verdict::Refuse(Errno::Invalid));
    }

    #[test]
    fn a_length_of_zero_does_nothing() {
        for kind in [CommandKind::Read, CommandKind::Write, CommandKind::Trim, CommandKind::WriteZeroes] {
            assert_eq!(admission().check(&header(kind, 0, 0)), Verdict::Nothing, "{kind:?}");
        }
        assert_eq!(admission().check(&header(CommandKind::Disconnect, 0, 0)), Verdict::Disconnect);
    }

    fn extended() -> Admission {
        Admission { size: 1 << 50, replies: ReplyStyle::Extended, ..admission() }
    }

    fn with_payload(kind: CommandKind, len: u64) -> RequestHeader {
        RequestHeader { flags: CommandFlags::PAYLOAD_LEN, ..header(kind, 0, len) }
    }

    #[test]
    fn an_extended_effect_may_be_as_long_as_the_export_and_a_payload_may_not() {
        let (size, most) = (extended().size, u64::from(MAX_PAYLOAD_BYTES));
        for kind in
            [CommandKind::Trim, CommandKind::WriteZeroes, CommandKind::Cache, CommandKind::BlockStatus]
        {
            let whole = extended().check(&header(kind, 0, size));
            assert!(matches!(whole, Verdict::Perform(_)), "{kind:?}: {whole:?}");
            for (offset, len) in [(1, size), (0, size + 1), (0, u64::MAX), (u64::MAX, u64::MAX)] {
                let errno = if kind == CommandKind::WriteZeroes { Errno::NoSpace } else { Errno::Invalid };
                assert_eq!(extended().check(&header(kind, offset, len)), Verdict::Refuse(errno));
            }
        }
        let write = extended().check(&with_payload(CommandKind::Write, most));
        assert_eq!(write, Verdict::Perform(Command::Write { fua: false }));
        let read = extended().check(&header(CommandKind::Read, 0, most));
        assert_eq!(read, Verdict::Perform(Command::Read { whole: false }));
        for len in [most + 1, 1 << 32, 1 << 50] {
            let read = extended().check(&header(CommandKind::Read, 0, len));
            assert_eq!(read, Verdict::Refuse(Errno::Overflow));
        }
        for len in [most + 1, 1 << 32, (1 << 32) + 512, u64::MAX] {
            for kind in [CommandKind::Write, CommandKind::BlockStatus, CommandKind::Unknown(77)] {
                assert_eq!(extended().check(&with_payload(kind, len)), Verdict::TooLong, "{kind:?} {len}");
            }
        }
    }

    #[test]
    fn a_payload_stands_with_a_write_and_with_no_other_command_but_block_status() {
        for write in [header(CommandKind::Write, 0, 512), with_payload(CommandKind::Write, 512)] {
            assert_eq!(extended().check(&write), Verdict::Perform(Command::Write { fua: false }));
            assert_eq!(write.payload_len(ReplyStyle::Extended), 512, "QEMU forgets the flag");
        }
        for kind in [
            CommandKind::Read,
            CommandKind::Trim,
            CommandKind::WriteZeroes,
            CommandKind::Cache,
            CommandKind::Flush,
            CommandKind::Unknown(9),
        ] {
            let with = with_payload(kind, 512);
            assert_eq!(extended().check(&with), Verdict::Refuse(Errno::Invalid), "{kind:?}");
            assert_eq!(with.payload_len(ReplyStyle::Extended), 512, "it is skipped");
        }
        let compact = admission().check(&with_payload(CommandKind::Write, 512));
        assert_eq!(compact, Verdict::Refuse(Errno::Invalid), "the flag was not agreed on");
    }

    #[test]
    fn a_filter_names_each_of_its_contexts_once() {
        let selected: Vec<_> = (1..)
            .zip([MetaContext::Allocation, MetaContext::Depth])
            .map(|(id, context)| SelectedContext { id: ContextId(id), context })
            .collect();
        let status = |payload: &[u8]| {
            let header = with_payload(CommandKind::BlockStatus, payload.len() as u64);
            match extended().check(&header) {
                Verdict::Filter { one: false } => extended().filter(&header, payload, &selected),
                Verdict::Refuse(errno) => Err(errno),
                verdict => panic!("{verdict:?}"),
            }
        };
        let payload = |len, ids: &[u32]| {
            let contexts = ids.iter().copied().map(ContextId).collect();
            ContextFilter { len, contexts }.encode()
        };
        let (request, contexts) = status(&payload(1 << 40, &[2])).unwrap();
        assert_eq!(request, header(CommandKind::BlockStatus, 0, 1 << 40));
        assert_eq!(contexts, [selected[1].clone()]);
        assert_eq!(status(&payload(1, &[2, 1])).unwrap().1.len(), 2);
        for wrong in [
            payload(4096, &[]),
            payload(4096, &[1, 1]),
            payload(4096, &[3]),
            payload(4096, &[1, 2, 3]),
            payload(0, &[1]),
            payload((1 << 50) + 1, &[1]),
            payload(u64::MAX, &[1]),
            payload(4096, &[1])[..11].to_vec(),
            vec![0; 7],
            vec![0; ContextFilter::MAX_BYTES + 4],
        ] {
            assert_eq!(status(&wrong), Err(Errno::Invalid), "{wrong:?}");
        }
        let unfiltered = Admission {
            flags: extended().flags.without(TransmissionFlags::BLOCK_STATUS_PAYLOAD),
            ..extended()
        };
        let with = with_payload(CommandKind::BlockStatus, 12);
        assert_eq!(unfiltered.check(&with), Verdict::Refuse(Errno::Invalid), "it was not offered");
        let none = Admission { has_contexts: false, ..extended() };
        assert_eq!(none.check(&with), Verdict::Refuse(Errno::Invalid), "none was selected");
    }
}
