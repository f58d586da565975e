//! Names that users type and that files have. The input is text.

use repository::{ChunkId, DiskName, GroupName, PackId, SnapshotName, SnapshotSpec, When, fuzzing};

fn is_plain(name: &str) -> bool {
    let byte = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    (1..=128).contains(&name.len()) && name.bytes().all(byte) && !name.starts_with(['.', '_', '-'])
}

/// Names: what is taken for one prints as one that is taken for the same; no name leaves its directory; of a file's name
/// nothing is guessed.
pub fn names(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(group) = text.parse::<GroupName>() {
        assert!(group.as_str() == text && is_plain(text));
    }
    if let Ok(disk) = text.parse::<DiskName>() {
        assert!(disk.as_str() == text && is_plain(text));
    }
    if let Ok(id) = text.parse::<ChunkId>() {
        assert_eq!(id.to_string(), text);
    }
    if let Ok(id) = text.parse::<PackId>() {
        assert_eq!(id.to_string(), text);
    }
    if let Ok(spec) = text.parse::<SnapshotSpec>() {
        assert!(
            is_plain(spec.group.as_str()) && spec.disk.as_ref().is_none_or(|disk| is_plain(disk.as_str()))
        );
        if let When::At(time) = spec.when {
            let name = SnapshotName::new(spec.group, time);
            assert_eq!(name.to_string().parse().ok().as_ref(), Some(&name), "it does not come back");
        }
    }
    if let Ok(name) = text.parse::<SnapshotName>() {
        assert_eq!(name.to_string().parse().ok().as_ref(), Some(&name), "it does not come back");
    }
    let any: SnapshotName = "web01@2026-11-21T00:33:12Z".parse().expect("it is one");
    if let Some((name, file)) = fuzzing::snapshot_of_file(&any, text) {
        assert!(file == text && name.group() == any.group() && !text.contains('/'));
        assert_eq!(name.to_string().parse().ok().as_ref(), Some(&name), "it does not come back");
    }
}

/// A name of each kind.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    let texts = [
        "web01",
        "web01@latest",
        "web01@latest/disk0",
        "web01@2026-11-21T00:33:12Z",
        "web01@2026-11-21T00:33:12.5+02:00/disk-0.raw",
        "20261121T003312Z.manifest",
        "00112233445566778899aabbccddeeff",
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    ];
    texts.map(|text| text.as_bytes().to_vec()).to_vec()
}
