//! A peer's text as it may be shown: short, and without control characters.

use std::fmt;

use super::MAX_TEXT_CHARS;

/// Shows at most [`MAX_TEXT_CHARS`] characters of a peer's text, control characters escaped.
#[derive(Clone, Copy, Debug)]
pub struct Cut<'a>(pub &'a str);

impl fmt::Display for Cut<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = self.0.chars();
        for character in shown.by_ref().take(MAX_TEXT_CHARS) {
            if character.is_control() {
                write!(f, "{}", character.escape_default())?;
            } else {
                write!(f, "{character}")?;
            }
        }
        if shown.next().is_some() { write!(f, "…") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_text_is_cut_and_control_characters_are_escaped() {
        let long = "a\n".to_owned() + &"b".repeat(500);
        let shown = Cut(&long).to_string();
        assert!(shown.starts_with("a\\nb"));
        assert!(shown.ends_with("b…"));
        assert!(shown.chars().count() <= MAX_TEXT_CHARS + 2);
    }
}
