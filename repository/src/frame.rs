//! JSON documents behind one line with their length and hash: the configuration, the manifests, the boot traces, the leases.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, Result};
use crate::header::{FORMAT_VERSION, newer};
use crate::id::ChunkId;

/// The largest document that is read.
pub(crate) const MAX_LEN: u64 = 4 << 20;
/// What a frame may have beside its document.
const MAX_LINE: usize = 256;

/// What a document is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Document {
    Config,
    Manifest,
    Trace,
    Lease,
}

impl Document {
    fn name(self) -> &'static str {
        match self {
            Self::Config => "config",
            Self::Manifest => "manifest",
            Self::Trace => "trace",
            Self::Lease => "lease",
        }
    }
}

/// What every document has, and what is looked at first.
#[derive(serde::Deserialize)]
struct Features {
    features: Vec<String>,
}

pub(crate) fn encode(what: Document, value: &impl Serialize) -> Result<Vec<u8>> {
    let mut body = serde_json::to_vec_pretty(value)
        .map_err(|error| Error::invalid(format!("cannot write a {}", what.name())).because(error))?;
    body.push(b'\n');
    if body.len() as u64 > MAX_LEN - MAX_LINE as u64 {
        return Err(Error::invalid(format!("a {} of {} bytes is too long", what.name(), body.len())));
    }
    let mut bytes = line(what, &body).into_bytes();
    bytes.append(&mut body);
    Ok(bytes)
}

fn line(what: Document, body: &[u8]) -> String {
    format!("lifeboot {} {FORMAT_VERSION} {} {}\n", what.name(), body.len(), ChunkId::of(body))
}

/// # Errors
/// `NewerFormat` for another version, an unknown feature or member; `Damaged` for all else.
pub(crate) fn decode<T: DeserializeOwned>(what: Document, bytes: &[u8]) -> Result<T> {
    let name = what.name();
    let damaged = |how: &str| Error::damaged(format!("the {name} {how}"));
    let end =
        bytes.iter().take(MAX_LINE).position(|b| *b == b'\n').ok_or_else(|| damaged("has no first line"))?;
    let (first, body) = bytes.split_at(end + 1);
    let words: Vec<&[u8]> = first[..end].split(|b| *b == b' ').collect();
    let own_version = FORMAT_VERSION.to_string();
    match words.as_slice() {
        [b"lifeboot", own, version, ..] if *own == name.as_bytes() => {
            // A version is a small number; anything else on this line is damage.
            let number = std::str::from_utf8(version).ok().and_then(|text| text.parse::<u16>().ok());
            match number {
                Some(number) if *version != own_version.as_bytes() && words.len() >= 5 => {
                    // Of another version only the hash at the end can be trusted to stand where it stands here.
                    if words[4] != ChunkId::of(body).to_string().as_bytes() {
                        return Err(damaged("is damaged"));
                    }
                    return Err(newer(format!("the {name} has format version {number}")));
                }
                _ => {}
            }
        }
        _ => return Err(damaged("does not begin as one")),
    }
    if first != line(what, body).as_bytes() {
        return Err(damaged("does not match its checksum"));
    }
    let features: Features =
        serde_json::from_slice(body).map_err(|error| damaged("is not what it should be").because(error))?;
    if let Some(feature) = features.features.first() {
        return Err(newer(format!("the {name} needs the feature {feature:?}")));
    }
    serde_json::from_slice(body).map_err(|error| {
        let text = error.to_string();
        if text.starts_with("unknown field") || text.starts_with("unknown variant") {
            // The checksum held, so somebody meant it.
            return newer(format!("the {name} has an {text}"));
        }
        damaged("is not what it should be").because(error)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[derive(serde::Serialize, serde::Deserialize, PartialEq, Debug)]
    #[serde(deny_unknown_fields)]
    struct Sample {
        features: Vec<String>,
        number: u32,
    }

    fn framed(json: &str) -> Vec<u8> {
        format!("{}{json}", line(Document::Manifest, json.as_bytes())).into_bytes()
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_noticed() {
        let sample = Sample { features: vec![], number: 5 };
        let good = encode(Document::Manifest, &sample).unwrap();
        assert_eq!(decode::<Sample>(Document::Manifest, &good).unwrap(), sample);
        for at in 0..8 * good.len() {
            let mut bad = good.clone();
            bad[at / 8] ^= 1 << (at % 8);
            assert!(decode::<Sample>(Document::Manifest, &bad).is_err(), "bit {at}");
        }
        for len in 0..good.len() {
            assert_eq!(
                decode::<Sample>(Document::Manifest, &good[..len]).unwrap_err().kind(),
                ErrorKind::Damaged
            );
        }
        assert!(decode::<Sample>(Document::Manifest, &[&good[..], b" "].concat()).is_err());
        assert!(decode::<Sample>(Document::Config, &good).is_err());
    }

    #[test]
    fn what_a_newer_release_wrote_is_refused_as_newer() {
        for json in [r#"{"features":["x"],"number":1,"y":2}"#, r#"{"features":[],"number":1,"y":2}"#] {
            let error = decode::<Sample>(Document::Manifest, &framed(json)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NewerFormat, "{json}");
        }
        let text = String::from_utf8(framed(r#"{"features":[],"number":1}"#)).unwrap();
        let newer = text.replacen("manifest 1 ", "manifest 2 ", 1);
        let error = decode::<Sample>(Document::Manifest, newer.as_bytes()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NewerFormat);
        let error = decode::<Sample>(Document::Manifest, &framed(r#"{"features":[]}"#)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Damaged);
    }
}
