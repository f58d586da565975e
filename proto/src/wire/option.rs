//! The kinds of options, of replies to them, and of what INFO and GO tell.

macro_rules! numbers {
    ($(#[$meta:meta])* $name:ident: $int:ty { $($(#[$kind_meta:meta])* $kind:ident = $number:expr,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name {
            $($(#[$kind_meta])* $kind,)*
            /// One that this code does not know.
            Unknown($int),
        }

        impl $name {
            /// The kind of a number from the wire.
            #[must_use]
            pub const fn from_number(number: $int) -> Self {
                match number {
                    $($number => Self::$kind,)*
                    other => Self::Unknown(other),
                }
            }

            /// The number for the wire.
            #[must_use]
            pub const fn number(self) -> $int {
                match self {
                    $(Self::$kind => $number,)*
                    Self::Unknown(number) => number,
                }
            }
        }
    };
}
pub(crate) use numbers;

numbers! {
    /// What a client asks for in the handshake.
    OptionKind: u32 {
        /// Begin transmission, in the old way: there is no reply that could refuse.
        ExportName = 1,
        /// End the connection in good order.
        Abort = 2,
        /// Name every export.
        List = 3,
        /// Begin TLS.
        StartTls = 5,
        /// Tell of an export.
        Info = 6,
        /// Tell of an export and begin transmission.
        Go = 7,
        /// Agree on structured replies.
        StructuredReply = 8,
        /// Name the metadata contexts of an export.
        ListMetaContext = 9,
        /// Select metadata contexts of an export.
        SetMetaContext = 10,
        /// Agree on 64-bit headers.
        ExtendedHeaders = 11,
    }
}

const ERROR: u32 = 1 << 31;

numbers! {
    /// What a server answers to an option.
    OptionReplyKind: u32 {
        /// Done.
        Ack = 1,
        /// One export of a LIST.
        Server = 2,
        /// One piece of INFO or GO.
        Info = 3,
        /// One metadata context.
        MetaContext = 4,
        /// The option is not known.
        ErrUnsupported = 0x8000_0001,
        /// The server's policy forbids it.
        ErrPolicy = 0x8000_0002,
        /// Its data is not what the option must have.
        ErrInvalid = 0x8000_0003,
        /// The platform cannot do it.
        ErrPlatform = 0x8000_0004,
        /// TLS first.
        ErrTlsRequired = 0x8000_0005,
        /// No such export.
        ErrUnknown = 0x8000_0006,
        /// The server is ending.
        ErrShutdown = 0x8000_0007,
        /// The client must ask for block sizes.
        ErrBlockSizeRequired = 0x8000_0008,
        /// The option, or what it asks for, is too big.
        ErrTooBig = 0x8000_0009,
        /// Extended headers first.
        ErrExtendedHeadersRequired = 0x8000_000a,
    }
}

impl OptionReplyKind {
    /// Whether it refuses the option.
    #[must_use]
    pub const fn is_error(self) -> bool {
        self.number() & ERROR != 0
    }
}

numbers! {
    /// The pieces of what INFO and GO tell.
    InfoKind: u16 {
        /// Size and transmission flags.
        Export = 0,
        /// The export's own name.
        Name = 1,
        /// A text for people.
        Description = 2,
        /// Smallest, preferred and largest request.
        BlockSize = 3,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_survive_the_way_there_and_back() {
        for number in 0..=12 {
            assert_eq!(OptionKind::from_number(number).number(), number);
            assert_eq!(OptionReplyKind::from_number(ERROR + number).number(), ERROR + number);
        }
        assert!(OptionReplyKind::ErrUnknown.is_error());
        assert!(!OptionReplyKind::Ack.is_error());
    }
}
