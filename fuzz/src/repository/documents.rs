//! The configuration and the manifests: framed JSON.
//!
//! | bytes of the input | what |
//! |---|---|
//! | 0 | bit 0: a configuration, otherwise a manifest; bit 1: a first line that fits is put before the rest |
//! | 1.. | the file, or the document in it |

use repository::{Config, Manifest, SnapshotName, fuzzing};

use super::{framed, has};
use crate::memory::bounded;

const CONFIG: &str = r#"{
  "features": [],
  "id": "00112233445566778899aabbccddeeff",
  "chunk_size": 131072,
  "created": "2026-11-21T00:33:12.123456Z"
}
"#;

const MANIFEST: &str = r#"{
  "features": [],
  "group": "web01",
  "time": "2026-11-21T00:33:12Z",
  "host": "größe \"1\"",
  "tool": "lifeboot 0.1.0",
  "consistency": "crash",
  "parent": "2026-11-20T00:33:12Z",
  "note": null,
  "disks": [
    {
      "name": "disk0",
      "size": 1099511627776,
      "chunk_size": 65536,
      "map": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
      "stats": { "data_chunks": 1, "zero_chunks": 2, "new_chunks": 3, "new_bytes": 4, "new_stored_bytes": 5 }
    },
    {
      "name": "disk1",
      "size": 0,
      "chunk_size": 4194304,
      "map": null,
      "stats": { "data_chunks": 0, "zero_chunks": 0, "new_chunks": 0, "new_bytes": 0, "new_stored_bytes": 0 }
    }
  ],
  "attachments": [
    { "name": "vm.conf", "size": 77, "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad" }
  ]
}
"#;

fn name() -> SnapshotName {
    "web01@2026-11-21T00:33:12Z".parse().expect("it is one")
}

fn check_config(config: &Config) {
    assert!(config.chunk_size.is_power_of_two() && (65536..=4 << 20).contains(&config.chunk_size));
    let file = fuzzing::encode_config(config).expect("what was read can be written");
    assert_eq!(fuzzing::config(&file).ok().as_ref(), Some(config), "it does not come back");
}

fn check_manifest(manifest: &Manifest) {
    assert_eq!(manifest.name(), name());
    assert!(manifest.disks.len() <= 256 && manifest.attachments.len() <= 256);
    assert!(manifest.size() <= 256 * (256 << 40));
    for disk in &manifest.disks {
        assert!(disk.size <= 256 << 40 && disk.chunk_size.is_power_of_two());
    }
    let file = fuzzing::encode_manifest(manifest).expect("what was read can be written");
    assert_eq!(fuzzing::manifest(&file, &name()).ok().as_ref(), Some(manifest), "it does not come back");
}

/// Configurations and manifests: little memory is held; what is read can be written, and comes back the same; what it says
/// can be.
pub fn documents(data: &[u8]) {
    let Some((mode, rest)) = data.split_first() else { return };
    let is_config = has(*mode, 0);
    let what = if is_config { "config" } else { "manifest" };
    let file = if has(*mode, 1) { framed(what, rest) } else { rest.to_vec() };
    if is_config {
        if let Ok(config) = bounded(file.len(), 32, 16 << 10, || fuzzing::config(&file)) {
            check_config(&config);
        }
    } else if let Ok(manifest) = bounded(file.len(), 32, 16 << 10, || fuzzing::manifest(&file, &name())) {
        check_manifest(&manifest);
    }
}

/// One of each, bare and framed.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    let (config, manifest) = (CONFIG.as_bytes(), MANIFEST.as_bytes());
    vec![
        [&[3], config].concat(),
        [&[2], manifest].concat(),
        [&[1], &framed("config", config)[..]].concat(),
        [&[0], &framed("manifest", manifest)[..]].concat(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seeds_are_documents() {
        fuzzing::config(&framed("config", CONFIG.as_bytes())).unwrap();
        fuzzing::manifest(&framed("manifest", MANIFEST.as_bytes()), &name()).unwrap();
    }
}
