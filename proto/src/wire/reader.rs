//! The one way to take a peer's message apart: every length is checked against what is left
//! before it is used, and nothing can be read twice or left over unnoticed.

use std::str;

use super::MAX_NAME_BYTES;

/// A message that does not hold what its kind must hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// It ends before its content does.
    #[error("the message is too short")]
    TooShort,
    /// It goes on after its content.
    #[error("the message has bytes left over")]
    LeftOver,
    /// A string in it is longer than the protocol allows.
    #[error("a string is too long")]
    StringTooLong,
    /// A string in it is not UTF-8, or holds a zero byte.
    #[error("a string is not text")]
    NotText,
}

/// Takes a message apart from its front.
#[derive(Clone, Debug)]
pub struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// A reader of the whole of `message`.
    #[must_use]
    pub const fn new(message: &'a [u8]) -> Self {
        Self { rest: message }
    }

    /// How many bytes are left.
    #[must_use]
    pub const fn remaining(&self) -> usize {
        self.rest.len()
    }

    /// The next `len` bytes.
    ///
    /// # Errors
    /// [`Malformed::TooShort`] where fewer are left.
    pub fn bytes(&mut self, len: usize) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self.rest.split_at_checked(len).ok_or(Malformed::TooShort)?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (taken, rest) = self.rest.split_first_chunk::<N>().ok_or(Malformed::TooShort)?;
        self.rest = rest;
        Ok(*taken)
    }

    /// The next 16-bit number.
    ///
    /// # Errors
    /// [`Malformed::TooShort`].
    pub fn u16(&mut self) -> Result<u16, Malformed> {
        self.array().map(u16::from_be_bytes)
    }

    /// The next 32-bit number.
    ///
    /// # Errors
    /// [`Malformed::TooShort`].
    pub fn u32(&mut self) -> Result<u32, Malformed> {
        self.array().map(u32::from_be_bytes)
    }

    /// The next 64-bit number.
    ///
    /// # Errors
    /// [`Malformed::TooShort`].
    pub fn u64(&mut self) -> Result<u64, Malformed> {
        self.array().map(u64::from_be_bytes)
    }

    /// The next `len` bytes as text.
    ///
    /// # Errors
    /// Where they are too many for a string of the protocol, too many for the message, or no text.
    pub fn text(&mut self, len: usize) -> Result<&'a str, Malformed> {
        if len > self.rest.len() {
            return Err(Malformed::TooShort);
        }
        if len > MAX_NAME_BYTES {
            return Err(Malformed::StringTooLong);
        }
        let text = str::from_utf8(self.bytes(len)?).map_err(|_| Malformed::NotText)?;
        if text.contains('\0') { Err(Malformed::NotText) } else { Ok(text) }
    }

    /// The next text, preceded by its length in 32 bits.
    ///
    /// # Errors
    /// As [`Reader::text`].
    pub fn text32(&mut self) -> Result<&'a str, Malformed> {
        let len = self.u32()?;
        self.text(usize::try_from(len).map_err(|_| Malformed::TooShort)?)
    }

    /// Everything that is left, as text.
    ///
    /// # Errors
    /// As [`Reader::text`].
    pub fn rest_as_text(&mut self) -> Result<&'a str, Malformed> {
        self.text(self.rest.len())
    }

    /// Ends the reading.
    ///
    /// # Errors
    /// [`Malformed::LeftOver`] where something was not read.
    pub const fn finish(self) -> Result<(), Malformed> {
        if self.rest.is_empty() { Ok(()) } else { Err(Malformed::LeftOver) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_length_beyond_the_message_is_too_short() {
        let mut reader = Reader::new(&[0xff, 0xff, 0xff, 0xff, b'a']);
        assert_eq!(reader.text32(), Err(Malformed::TooShort));
    }

    #[test]
    fn a_long_string_is_refused_even_when_it_is_all_there() {
        let long = vec![b'a'; MAX_NAME_BYTES + 1];
        assert_eq!(Reader::new(&long).rest_as_text(), Err(Malformed::StringTooLong));
        assert!(Reader::new(&long[1..]).rest_as_text().is_ok());
    }

    #[test]
    fn what_was_not_read_is_noticed() {
        let mut reader = Reader::new(&[0, 1, 2]);
        assert_eq!(reader.u16(), Ok(1));
        assert_eq!(reader.finish(), Err(Malformed::LeftOver));
    }

    #[test]
    fn a_zero_byte_is_no_text() {
        assert_eq!(Reader::new(b"a\0b").rest_as_text(), Err(Malformed::NotText));
    }
}
