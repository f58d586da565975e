//! As much of an X.509 certificate as names and dates take, read from its DER. Whether it may be believed is for the
//! verifier to say; every length is checked all the same, because certificates come from peers.

use std::fmt::Write as _;
use std::net::{Ipv4Addr, Ipv6Addr};

const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
const INTEGER: u8 = 0x02;
const OCTET_STRING: u8 = 0x04;
const OBJECT_ID: u8 = 0x06;
const BOOLEAN: u8 = 0x01;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;
const VERSION: u8 = 0xa0;
const EXTENSIONS: u8 = 0xa3;

/// 2.5.4.3
const COMMON_NAME: &[u8] = &[0x55, 0x04, 0x03];
/// 2.5.29.17
const SUBJECT_ALTERNATIVE_NAME: &[u8] = &[0x55, 0x1d, 0x11];

/// Attributes of a distinguished name that have a short name (RFC 4514, and `EMAIL` as GnuTLS has it).
const ATTRIBUTES: &[(&[u8], &str)] = &[
    (COMMON_NAME, "CN"),
    (&[0x55, 0x04, 0x06], "C"),
    (&[0x55, 0x04, 0x07], "L"),
    (&[0x55, 0x04, 0x08], "ST"),
    (&[0x55, 0x04, 0x09], "STREET"),
    (&[0x55, 0x04, 0x0a], "O"),
    (&[0x55, 0x04, 0x0b], "OU"),
    (&[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x09, 0x01], "EMAIL"),
    (&[0x09, 0x92, 0x26, 0x89, 0x93, 0xf2, 0x2c, 0x64, 0x01, 0x01], "UID"),
    (&[0x09, 0x92, 0x26, 0x89, 0x93, 0xf2, 0x2c, 0x64, 0x01, 0x19], "DC"),
];

/// What a certificate says of its owner and its time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Certificate {
    /// The subject as RFC 4514 writes it, the most special part first: `CN=backup,O=Example,C=DE`.
    pub(super) distinguished_name: String,
    pub(super) common_names: Vec<String>,
    /// The subject's alternative names: DNS names, mail addresses, URIs, IP addresses.
    pub(super) alternative_names: Vec<AlternativeName>,
    pub(super) not_before: Moment,
    pub(super) not_after: Moment,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum AlternativeName {
    /// A DNS name or a mail address: upper and lower case are the same.
    AnyCase(String),
    Exact(String),
}

/// A time of a certificate, in UTC: `2026-11-21 18:30:00`, so that the order of texts is that of times.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Moment(pub(super) String);

impl Moment {
    /// The moment so many seconds after 1970.
    pub(super) fn from_unix(seconds: u64) -> Self {
        let (days, second) = (seconds / 86_400, seconds % 86_400);
        let (year, month, day) = civil(days);
        let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
        Self(format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}"))
    }
}

/// Year, month and day of a day after 1970-01-01, counted in years that begin in March.
const fn civil(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let of_era = shifted % 146_097;
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + if month <= 2 { 1 } else { 0 };
    (year, month, day)
}

impl Certificate {
    /// Reads a certificate; `None` where it is none.
    pub(super) fn parse(der: &[u8]) -> Option<Self> {
        let mut certificate = Der(Der(der).take(SEQUENCE)?);
        let mut body = Der(certificate.take(SEQUENCE)?);
        body.take_if(VERSION)?;
        body.take(INTEGER)?;
        // The algorithm of the signature, the issuer.
        body.take(SEQUENCE)?;
        body.take(SEQUENCE)?;
        let mut validity = Der(body.take(SEQUENCE)?);
        let (not_before, not_after) = (validity.moment()?, validity.moment()?);
        let subject = body.take(SEQUENCE)?;
        // The public key.
        body.take(SEQUENCE)?;
        let mut read = Self { not_before, not_after, ..Self::default() };
        read.take_subject(Der(subject))?;
        while let Some((tag, content)) = body.next()? {
            if tag == EXTENSIONS {
                read.take_extensions(Der(Der(content).take(SEQUENCE)?))?;
            }
        }
        Some(read)
    }

    fn take_subject(&mut self, mut subject: Der<'_>) -> Option<()> {
        let mut parts = Vec::new();
        while let Some((_, set)) = subject.next_of(SET)? {
            let mut set = Der(set);
            let mut attributes = Vec::new();
            while let Some((_, attribute)) = set.next_of(SEQUENCE)? {
                let mut attribute = Der(attribute);
                let kind = attribute.take(OBJECT_ID)?;
                let (tag, value) = attribute.next()??;
                let text = text(tag, value);
                if let (COMMON_NAME, Some(text)) = (kind, text) {
                    self.common_names.push(text.to_owned());
                }
                attributes.push(format!("{}={}", attribute_name(kind), attribute_value(text, value)));
            }
            parts.push(attributes.join("+"));
        }
        parts.reverse();
        self.distinguished_name = parts.join(",");
        Some(())
    }

    fn take_extensions(&mut self, mut extensions: Der<'_>) -> Option<()> {
        while let Some((_, extension)) = extensions.next_of(SEQUENCE)? {
            let mut extension = Der(extension);
            let kind = extension.take(OBJECT_ID)?;
            extension.take_if(BOOLEAN)?;
            let value = extension.take(OCTET_STRING)?;
            if kind != SUBJECT_ALTERNATIVE_NAME {
                continue;
            }
            let mut names = Der(Der(value).take(SEQUENCE)?);
            while let Some((tag, name)) = names.next()? {
                self.alternative_names.extend(alternative_name(tag, name));
            }
        }
        Some(())
    }
}

/// By when a list of revoked certificates is followed by the next one; `None` where it does not say, or is no such list.
pub(super) fn next_update(list: &[u8]) -> Option<Moment> {
    let mut list = Der(Der(list).take(SEQUENCE)?);
    let mut body = Der(list.take(SEQUENCE)?);
    body.take_if(INTEGER)?;
    // The algorithm of the signature, the issuer, when it was made.
    body.take(SEQUENCE)?;
    body.take(SEQUENCE)?;
    body.moment()?;
    body.moment()
}

fn alternative_name(tag: u8, name: &[u8]) -> Option<AlternativeName> {
    let text = || std::str::from_utf8(name).ok().map(str::to_owned);
    match tag {
        // A mail address, a DNS name.
        0x81 | 0x82 => text().map(AlternativeName::AnyCase),
        0x86 => text().map(AlternativeName::Exact),
        0x87 => {
            let address = match name.len() {
                4 => Ipv4Addr::from(<[u8; 4]>::try_from(name).ok()?).to_string(),
                16 => Ipv6Addr::from(<[u8; 16]>::try_from(name).ok()?).to_string(),
                _ => return None,
            };
            Some(AlternativeName::Exact(address))
        }
        _ => None,
    }
}

fn attribute_name(kind: &[u8]) -> String {
    match ATTRIBUTES.iter().find(|(known, _)| *known == kind) {
        Some((_, name)) => (*name).to_owned(),
        None => dotted(kind),
    }
}

/// An object id in numbers: 1.3.6.1.…
fn dotted(kind: &[u8]) -> String {
    let mut numbers = Vec::new();
    let mut number = 0_u64;
    for byte in kind {
        number = number.wrapping_shl(7) | u64::from(byte & 0x7f);
        if byte & 0x80 == 0 {
            if numbers.is_empty() {
                let first = (number / 40).min(2);
                numbers.push(first.to_string());
                number -= first * 40;
            }
            numbers.push(number.to_string());
            number = 0;
        }
    }
    numbers.join(".")
}

/// UTF-8, printable, teletex and IA5 strings, where they are UTF-8.
fn text(tag: u8, value: &[u8]) -> Option<&str> {
    matches!(tag, 0x0c | 0x13 | 0x14 | 0x16).then(|| std::str::from_utf8(value).ok()).flatten()
}

/// A value of an attribute as RFC 4514 escapes it.
fn attribute_value(text: Option<&str>, raw: &[u8]) -> String {
    let mut out = String::new();
    let Some(text) = text else {
        out.push('#');
        for byte in raw {
            let _ = write!(out, "{byte:02x}");
        }
        return out;
    };
    let last = text.chars().count().saturating_sub(1);
    for (place, character) in text.chars().enumerate() {
        let special = "\"+,;<>\\".contains(character)
            || (character == ' ' && (place == 0 || place == last))
            || (character == '#' && place == 0);
        match character {
            _ if special => {
                out.push('\\');
                out.push(character);
            }
            character if character.is_control() => {
                let mut bytes = [0; 4];
                for byte in character.encode_utf8(&mut bytes).bytes() {
                    let _ = write!(out, "\\{byte:02x}");
                }
            }
            character => out.push(character),
        }
    }
    out
}

/// Elements one after another.
struct Der<'a>(&'a [u8]);

impl<'a> Der<'a> {
    /// The next element's tag and content: `None` where it is cut short, `Some(None)` at the end.
    #[expect(clippy::option_option, reason = "the outer one is for `?`, the inner one for loops")]
    fn next(&mut self) -> Option<Option<(u8, &'a [u8])>> {
        let Some((&tag, rest)) = self.0.split_first() else { return Some(None) };
        let (&first, mut rest) = rest.split_first()?;
        let len = if first < 0x80 {
            usize::from(first)
        } else {
            // No certificate has a part of 2^32 bytes.
            let (digits, after) = rest.split_at_checked(usize::from(first & 0x7f)).filter(|(d, _)| {
                let count = d.len();
                (1..=4).contains(&count)
            })?;
            rest = after;
            digits.iter().fold(0, |len, digit| len << 8 | usize::from(*digit))
        };
        let (content, after) = rest.split_at_checked(len)?;
        self.0 = after;
        Some(Some((tag, content)))
    }

    /// As [`Self::next`], where nothing but elements of `tag` may stand.
    #[expect(clippy::option_option, reason = "as above")]
    fn next_of(&mut self, tag: u8) -> Option<Option<(u8, &'a [u8])>> {
        self.next().filter(|element| element.is_none_or(|(found, _)| found == tag))
    }

    fn take(&mut self, tag: u8) -> Option<&'a [u8]> {
        self.next_of(tag)?.map(|(_, content)| content)
    }

    /// Passes over an element that may be left out.
    fn take_if(&mut self, tag: u8) -> Option<()> {
        if self.0.first() == Some(&tag) { self.take(tag).map(|_| ()) } else { Some(()) }
    }

    fn moment(&mut self) -> Option<Moment> {
        let (tag, digits) = self.next()??;
        let digits = std::str::from_utf8(digits).ok()?.strip_suffix('Z')?;
        let digits = match tag {
            // Two digits of a year mean 1950 to 2049.
            UTC_TIME if digits.get(..2)? < "50" => format!("20{digits}"),
            UTC_TIME => format!("19{digits}"),
            GENERALIZED_TIME => digits.to_owned(),
            _ => return None,
        };
        if digits.len() != 14 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        let part = |from: usize, to: usize| &digits[from..to];
        Some(Moment(format!(
            "{}-{}-{} {}:{}:{}",
            part(0, 4),
            part(4, 6),
            part(6, 8),
            part(8, 10),
            part(10, 12),
            part(12, 14)
        )))
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, SanType, date_time_ymd};

    use super::*;

    fn certificate() -> Vec<u8> {
        let mut params = CertificateParams::new(vec!["Disk.example".to_owned()]).unwrap();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CountryName, "DE");
        params.distinguished_name.push(DnType::OrganizationName, "Backup, Inc.");
        params.distinguished_name.push(DnType::CommonName, "disk \u{fc}");
        params.subject_alt_names.push(SanType::Rfc822Name("a@example".try_into().unwrap()));
        params.subject_alt_names.push(SanType::URI("spiffe://x/y".try_into().unwrap()));
        params.subject_alt_names.push(SanType::IpAddress("10.0.0.1".parse().unwrap()));
        params.subject_alt_names.push(SanType::IpAddress("::1".parse().unwrap()));
        params.not_before = date_time_ymd(2020, 2, 29);
        params.not_after = date_time_ymd(2051, 12, 31);
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().to_vec()
    }

    #[test]
    fn a_certificate_tells_its_names_and_its_time() {
        let read = Certificate::parse(&certificate()).unwrap();
        assert_eq!(read.distinguished_name, "CN=disk \u{fc},O=Backup\\, Inc.,C=DE");
        assert_eq!(read.common_names, ["disk \u{fc}"]);
        let names = [
            AlternativeName::AnyCase("Disk.example".into()),
            AlternativeName::AnyCase("a@example".into()),
            AlternativeName::Exact("spiffe://x/y".into()),
            AlternativeName::Exact("10.0.0.1".into()),
            AlternativeName::Exact("::1".into()),
        ];
        assert_eq!(read.alternative_names, names);
        assert_eq!(read.not_before.0, "2020-02-29 00:00:00");
        assert_eq!(read.not_after.0, "2051-12-31 00:00:00");
    }

    #[test]
    fn a_certificate_that_is_cut_or_bent_is_never_a_panic() {
        let whole = certificate();
        for len in 0..whole.len() {
            assert_eq!(Certificate::parse(&whole[..len]), None, "cut to {len} bytes");
        }
        for place in 0..whole.len() {
            for bent in [0, 0x7f, 0x80, 0x84, 0xff] {
                let mut bytes = whole.clone();
                bytes[place] = bent;
                let _ = Certificate::parse(&bytes);
            }
        }
    }

    #[test]
    fn moments_are_those_of_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00"),
            (951_782_400, "2000-02-29 00:00:00"),
            (1_709_251_199, "2024-02-29 23:59:59"),
            (4_102_444_800, "2100-01-01 00:00:00"),
        ] {
            assert_eq!(Moment::from_unix(seconds).0, text);
        }
    }

    #[test]
    fn values_of_attributes_are_escaped() {
        assert_eq!(attribute_value(Some(" #a\"b+\u{1} "), b""), "\\ #a\\\"b\\+\\01\\ ");
        assert_eq!(attribute_value(Some("#x"), b""), "\\#x");
        assert_eq!(attribute_value(None, &[0, 0x6d]), "#006d");
        assert_eq!(dotted(&[0x2b, 0x06, 0x01, 0x04, 0x01, 0x82, 0x37]), "1.3.6.1.4.1.311");
    }
}
