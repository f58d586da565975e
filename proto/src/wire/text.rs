//! A peer's text as it may be shown, and ours as it may be sent: short, and without control characters.

use std::fmt;

use super::{MAX_MESSAGE_BYTES, MAX_TEXT_CHARS};

/// Shows at most [`MAX_TEXT_CHARS`] characters of a peer's text; those that cannot be seen, or turn the line around, are escaped.
#[derive(Clone, Copy, Debug)]
pub struct Cut<'a>(pub &'a str);

impl fmt::Display for Cut<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = self.0.chars();
        for character in shown.by_ref().take(MAX_TEXT_CHARS) {
            match character {
                '"' | '\'' | '\\' => write!(f, "{character}")?,
                _ => write!(f, "{}", character.escape_debug())?,
            }
        }
        if shown.next().is_some() { write!(f, "…") } else { Ok(()) }
    }
}

/// A text as the message of an error: one line of at most [`MAX_MESSAGE_BYTES`] bytes.
#[must_use]
pub fn message(text: &str) -> String {
    let mut message = String::with_capacity(text.len().min(MAX_MESSAGE_BYTES));
    for character in text.chars() {
        if message.len() + character.len_utf8() > MAX_MESSAGE_BYTES {
            break;
        }
        message.push(if character.is_control() { ' ' } else { character });
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_seen_of_a_text_is_escaped() {
        let hidden = "a\u{202e}gnp\u{2028}b\u{200b}\u{85}\u{7}\n";
        assert_eq!(Cut(hidden).to_string(), r"a\u{202e}gnp\u{2028}b\u{200b}\u{85}\u{7}\n");
        let plain = "web's \"disk\" \\ ü 磁碟";
        assert_eq!(Cut(plain).to_string(), plain);
    }

    #[test]
    fn a_message_is_one_line_and_cut_between_characters() {
        assert_eq!(message("chunk 7\nof disk\0"), "chunk 7 of disk ");
        let long = message(&"ö".repeat(MAX_MESSAGE_BYTES));
        assert_eq!(long.len(), MAX_MESSAGE_BYTES);
        assert_eq!(message(&format!("x{}", "ö".repeat(MAX_MESSAGE_BYTES))).len(), MAX_MESSAGE_BYTES - 1);
    }

    #[test]
    fn long_text_is_cut_and_control_characters_are_escaped() {
        let long = "a\n".to_owned() + &"b".repeat(500);
        let shown = Cut(&long).to_string();
        assert!(shown.starts_with("a\\nb"));
        assert!(shown.ends_with("b…"));
        assert!(shown.chars().count() <= MAX_TEXT_CHARS + 2);
    }
}
