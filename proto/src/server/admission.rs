//! What becomes of a request: everything that can be said of it without the device, before
//! anything is allocated for it.

use crate::wire::{
    CommandFlags, CommandKind, Errno, MAX_PAYLOAD_BYTES, ReplyStyle, RequestHeader, TransmissionFlags,
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
        if header.payload_len() > MAX_PAYLOAD_BYTES {
            return Verdict::TooLong;
        }
        match self.command(header) {
            Ok(Some(command)) => Verdict::Perform(command),
            Ok(None) if header.kind == CommandKind::Disconnect => Verdict::Disconnect,
            Ok(None) => Verdict::Nothing,
            Err(errno) => Verdict::Refuse(errno),
        }
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
                let df =
                    if self.replies == ReplyStyle::Simple { CommandFlags::NONE } else { CommandFlags::DF };
                self.allow(header, df)?;
                self.bound(header, Errno::Invalid)?;
                self.portable(header)?;
                Command::Read { whole: header.flags.contains(CommandFlags::DF) }
            }
            CommandKind::Write => {
                self.writable()?;
                self.allow(header, CommandFlags::NONE)?;
                self.bound(header, Errno::NoSpace)?;
                self.portable(header)?;
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
                self.allow(header, CommandFlags::REQ_ONE)?;
                if !self.has_contexts || header.len == 0 {
                    return Err(Errno::Invalid);
                }
                self.bound(header, Errno::Invalid)?;
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
        let fits = header.offset <= self.size && u64::from(header.len) <= self.size - header.offset;
        if fits { Ok(()) } else { Err(errno) }
    }

    const fn portable(&self, header: &RequestHeader) -> Result<(), Errno> {
        if header.len <= self.max_request { Ok(()) } else { Err(Errno::Invalid) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Cookie;

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

    fn header(kind: CommandKind, offset: u64, len: u32) -> RequestHeader {
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
        let long = header(CommandKind::Write, 0, MAX_PAYLOAD_BYTES + 1);
        assert_eq!(admission().check(&long), Verdict::TooLong);
        let refused = header(CommandKind::Write, 0, MAX_PAYLOAD_BYTES);
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
}
