//! Files of pre-shared keys, as GnuTLS's `psktool` makes them: a line `NAME:KEY` for each client, the key in hex.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::files;
use crate::Result;

/// The longest key in bytes, and the longest name: what TLS libraries hold.
const MAX_KEY_BYTES: usize = 64;
const MAX_NAME_BYTES: usize = 128;
/// Shorter ones can be guessed.
const MIN_KEY_BYTES: usize = 16;

/// The keys of a file, by the names of who has them.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct PskKeys(HashMap<String, Vec<u8>>);

impl std::fmt::Debug for PskKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("PskKeys").field(&self.0.len()).finish()
    }
}

impl PskKeys {
    /// Reads a file that only its owner, and at most its group, can read.
    pub(crate) fn load(path: &Path) -> Result<Self> {
        let text = files::read(path, "the pre-shared keys")?;
        let shown = path.display();
        let mode = fs::metadata(path).map_or(0, |metadata| metadata.mode());
        if mode & 0o027 != 0 {
            return Err(files::invalid(format!(
                "the pre-shared keys in {shown} can be read by others, or changed (its mode is {:04o}): chmod 600 it, and make new keys \
                 if somebody may have seen them",
                mode & 0o7777
            )));
        }
        let bad = |line: usize, why: &str| {
            Err(files::invalid(format!(
                "line {line} of {shown} is no pre-shared key: {why}; a line is NAME:KEY with the key in hex, as \
                 `psktool -u NAME -p {shown}` makes it"
            )))
        };
        let mut keys = HashMap::new();
        for (number, line) in text.split(|&byte| byte == b'\n').enumerate() {
            let number = number + 1;
            let line = line.trim_ascii_end();
            if line.is_empty() || line.starts_with(b"#") {
                continue;
            }
            let Ok(line) = std::str::from_utf8(line) else { return bad(number, "it is not text") };
            // A name may have a colon in it; a key has none.
            let Some((name, hex)) = line.rsplit_once(':') else { return bad(number, "it has no colon") };
            if name.is_empty() || name.len() > MAX_NAME_BYTES || name.contains('\0') {
                return bad(number, "the name has no bytes, or more than 128");
            }
            let Some(key) = from_hex(hex) else { return bad(number, "the key is not hex") };
            if !(MIN_KEY_BYTES..=MAX_KEY_BYTES).contains(&key.len()) {
                return bad(number, "the key must have 16 to 64 bytes");
            }
            if keys.insert(name.to_owned(), key).is_some() {
                return bad(number, "its name stands there twice");
            }
        }
        if keys.is_empty() {
            return Err(files::invalid(format!(
                "there is no pre-shared key in {shown}; `psktool -u NAME -p {shown}` makes one"
            )));
        }
        Ok(Self(keys))
    }

    /// The key of this name.
    pub(crate) fn key(&self, name: &str) -> Option<&[u8]> {
        self.0.get(name).map(Vec::as_slice)
    }
}

fn from_hex(hex: &str) -> Option<Vec<u8>> {
    let digits = hex.as_bytes();
    if !digits.len().is_multiple_of(2) || !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    digits.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn load(text: &str, mode: u32) -> Result<PskKeys> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys.psk");
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        PskKeys::load(&path)
    }

    const KEY: &str = "00112233445566778899aabbccddeeFF";

    #[test]
    fn keys_are_found_by_their_names() {
        let keys = load(&format!("# made by psktool\nalice:{KEY}\r\n\nbob:b:{KEY}{KEY}\n"), 0o600).unwrap();
        assert_eq!(keys.key("alice").unwrap()[..3], [0, 0x11, 0x22]);
        assert_eq!(keys.key("bob:b").unwrap().len(), 32);
        assert_eq!(keys.key("bob"), None);
        assert_eq!(format!("{keys:?}"), "PskKeys(2)", "keys are not shown");
    }

    #[test]
    fn a_file_that_others_may_read_is_refused_with_its_mode() {
        for mode in [0o604, 0o644, 0o602, 0o620] {
            let error = load(&format!("alice:{KEY}\n"), mode).unwrap_err().to_string();
            for word in [format!("{mode:04o}").as_str(), "keys.psk", "chmod 600"] {
                assert!(error.contains(word), "{error}");
            }
        }
        assert!(load(&format!("alice:{KEY}\n"), 0o640).is_ok(), "a group may be let in");
    }

    #[test]
    fn what_is_no_key_is_named_by_its_line_and_never_shown() {
        for (text, why) in [
            ("alice", "no colon"),
            (":00112233445566778899aabbccddeeff", "the name"),
            ("alice:00112233445566778899aabbccddeef", "not hex"),
            ("alice:0011223344556677é899aabbccddeef", "not hex"),
            ("alice:001122", "16 to 64"),
            ("bob:00112233445566778899aabbccddeeff", "twice"),
        ] {
            let error = load(&format!("bob:{KEY}\n{text}\n"), 0o600).unwrap_err().to_string();
            assert!(error.contains(why) && error.contains("line 2"), "{error}");
            assert!(!error.contains("001122"), "{error}");
        }
        assert!(load("# nothing\n", 0o600).unwrap_err().to_string().contains("no pre-shared key"));
    }
}
