//! Sets of flags, a type for each place of the protocol that has some.

macro_rules! flags {
    ($(#[$meta:meta])* $name:ident: $int:ty { $($(#[$flag_meta:meta])* $flag:ident = $bit:expr,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
        pub struct $name($int);

        impl $name {
            $($(#[$flag_meta])* pub const $flag: Self = Self(1 << $bit);)*

            /// No flag.
            pub const NONE: Self = Self(0);

            /// The flags as they stand on the wire, known or not.
            #[must_use]
            pub const fn from_bits(bits: $int) -> Self {
                Self(bits)
            }

            /// The flags for the wire.
            #[must_use]
            pub const fn bits(self) -> $int {
                self.0
            }

            /// Whether every flag of `other` is set.
            #[must_use]
            pub const fn contains(self, other: Self) -> bool {
                self.0 & other.0 == other.0
            }

            /// Whether any flag is set that `other` lacks.
            #[must_use]
            pub const fn exceeds(self, other: Self) -> bool {
                self.0 & !other.0 != 0
            }

            /// These flags and those of `other`.
            #[must_use]
            pub const fn with(self, other: Self) -> Self {
                Self(self.0 | other.0)
            }

            /// These flags, but for those of `other`.
            #[must_use]
            pub const fn without(self, other: Self) -> Self {
                Self(self.0 & !other.0)
            }

            /// These flags, and those of `other` where `condition` holds.
            #[must_use]
            pub const fn with_if(self, condition: bool, other: Self) -> Self {
                if condition { self.with(other) } else { self }
            }
        }
    };
}

flags! {
    /// What a server offers in its greeting.
    HandshakeFlags: u16 {
        /// It speaks the fixed newstyle handshake.
        FIXED_NEWSTYLE = 0,
        /// It can leave out the 124 zeroes after EXPORT_NAME.
        NO_ZEROES = 1,
    }
}

flags! {
    /// What a client answers to the greeting.
    ClientFlags: u32 {
        /// It speaks the fixed newstyle handshake.
        FIXED_NEWSTYLE = 0,
        /// It wants the 124 zeroes after EXPORT_NAME left out.
        NO_ZEROES = 1,
    }
}

flags! {
    /// What an export can do.
    TransmissionFlags: u16 {
        /// The other flags mean something; always set.
        HAS_FLAGS = 0,
        /// Writes are refused.
        READ_ONLY = 1,
        /// FLUSH is served.
        SEND_FLUSH = 2,
        /// The FUA flag is obeyed.
        SEND_FUA = 3,
        /// The medium prefers requests in order.
        ROTATIONAL = 4,
        /// TRIM is served.
        SEND_TRIM = 5,
        /// WRITE_ZEROES is served.
        SEND_WRITE_ZEROES = 6,
        /// The DF flag of a READ is obeyed.
        SEND_DF = 7,
        /// A flush on one connection covers the writes acknowledged on all.
        CAN_MULTI_CONN = 8,
        /// CACHE is served.
        SEND_CACHE = 10,
        /// The FAST_ZERO flag is obeyed.
        SEND_FAST_ZERO = 11,
        /// With extended headers: a BLOCK_STATUS may bring the contexts that it is about.
        BLOCK_STATUS_PAYLOAD = 12,
    }
}

flags! {
    /// How a request wants to be done.
    CommandFlags: u16 {
        /// Be on stable storage before the reply.
        FUA = 0,
        /// Keep the room of the zeroes allocated.
        NO_HOLE = 1,
        /// Send a READ's bytes as one chunk.
        DF = 2,
        /// Tell of one extent only.
        REQ_ONE = 3,
        /// Fail where zeroes would be no faster than writing them.
        FAST_ZERO = 4,
        /// With extended headers: the length is that of a payload.
        PAYLOAD_LEN = 5,
    }
}

flags! {
    /// What a chunk of a reply says about the reply.
    ReplyFlags: u16 {
        /// It is the last of its reply.
        DONE = 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flag_that_is_not_known_exceeds_the_known_ones() {
        let known = ClientFlags::FIXED_NEWSTYLE.with(ClientFlags::NO_ZEROES);
        assert!(!known.exceeds(known));
        assert!(ClientFlags::from_bits(0x10).exceeds(known));
    }
}
