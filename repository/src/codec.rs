//! Chunks to stored bytes and back. One encoder or decoder per worker thread: each keeps its context and buffers.

use std::io;

use crate::error::{Error, ErrorKind, Result};
use crate::hash::{id_with_pauses, ids_with_pauses};
use crate::id::ChunkId;
use crate::record::{Codec, KeyRef, Location};

/// zstd's level where nobody asks for another.
pub const DEFAULT_LEVEL: i32 = 1;

/// The longest thing that is stored as one record.
pub const MAX_PLAIN_LEN: usize = 16 << 20;

/// Whether all bytes are zero, at the speed of memory.
pub fn is_zero(bytes: &[u8]) -> bool {
    const STRIDE: usize = 256;
    let (body, tail) = bytes.split_at(bytes.len() - bytes.len() % STRIDE);
    body.chunks_exact(STRIDE).all(|part| {
        let words =
            part.chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().expect("eight bytes")));
        words.fold(0, |all, word| all | word) == 0
    }) && tail.iter().all(|byte| *byte == 0)
}

/// A chunk as it will stand in a pack. Borrows the encoder's buffer, or the plain bytes where they are the smaller.
#[derive(Clone, Copy, Debug)]
pub struct StoredChunk<'a> {
    /// The stored bytes.
    pub bytes: &'a [u8],
    /// How many bytes it decodes to.
    pub plain_len: u32,
    /// The CRC-32 of `bytes`.
    pub crc: u32,
    /// How it was compressed.
    pub codec: Codec,
    /// How it was encrypted.
    pub key: KeyRef,
}

/// Compresses chunks.
pub struct ChunkEncoder {
    zstd: zstd::bulk::Compressor<'static>,
    buffer: Vec<u8>,
}

impl ChunkEncoder {
    /// An encoder at a zstd level.
    ///
    /// # Errors
    /// `InvalidInput` for a level that zstd does not have.
    pub fn new(level: i32) -> Result<Self> {
        let levels = zstd::compression_level_range();
        if !levels.contains(&level) {
            return Err(Error::invalid(format!("zstd has no level {level}")).hint(format!(
                "levels go from {} to {}",
                levels.start(),
                levels.end()
            )));
        }
        let zstd =
            zstd::bulk::Compressor::new(level).map_err(|error| Error::io("cannot set up zstd", error))?;
        Ok(Self { zstd, buffer: Vec::new() })
    }

    /// What a chunk of these bytes is called.
    pub fn id(&self, plain: &[u8]) -> ChunkId {
        ChunkId::of(plain)
    }

    /// Compresses one chunk; it is stored plain where that is not smaller.
    ///
    /// # Errors
    /// `InvalidInput` for nothing at all, or for more than [`MAX_PLAIN_LEN`].
    pub fn encode<'a>(&'a mut self, plain: &'a [u8]) -> Result<StoredChunk<'a>> {
        if plain.is_empty() || plain.len() > MAX_PLAIN_LEN {
            return Err(Error::invalid(format!("a chunk of {} bytes cannot be stored", plain.len())));
        }
        let bound = zstd::zstd_safe::compress_bound(plain.len());
        if self.buffer.len() < bound {
            self.buffer.resize(bound, 0);
        }
        let compressed = self
            .zstd
            .compress_to_buffer(plain, self.buffer.as_mut_slice())
            .map_err(|error| Error::io("zstd failed", error))?;
        let (bytes, codec) = if compressed < plain.len() {
            (&self.buffer[..compressed], Codec::ZSTD)
        } else {
            (plain, Codec::PLAIN)
        };
        Ok(StoredChunk {
            bytes,
            plain_len: plain.len() as u32,
            crc: crc32fast::hash(bytes),
            codec,
            key: KeyRef::NONE,
        })
    }
}

/// Decodes and verifies chunks.
pub struct ChunkDecoder {
    zstd: zstd::bulk::Decompressor<'static>,
    pause: Box<dyn FnMut() + Send>,
}

impl ChunkDecoder {
    /// A decoder.
    ///
    /// # Errors
    /// `Io` if zstd has no memory.
    pub fn new() -> Result<Self> {
        let zstd = zstd::bulk::Decompressor::new().map_err(|error| Error::io("cannot set up zstd", error))?;
        Ok(Self { zstd, pause: Box::new(|| ()) })
    }

    /// Calls `pause` between pieces of work, which take some ten microseconds up to a few hundred: for a thread that makes way for
    /// others meanwhile.
    pub fn with_pauses(self, pause: impl FnMut() + Send + 'static) -> Self {
        Self { pause: Box::new(pause), ..self }
    }

    /// Decodes `stored`, which was read from `at`, into all of `out`, and checks that it is the chunk `id`.
    ///
    /// Nothing is ever written past `out`. On an error `out` holds anything.
    ///
    /// # Errors
    /// `Damaged` when the lengths, the CRC, the compressed form or the hash do not hold; `UnknownCodec`, `UnknownKey` for what a newer release wrote.
    pub fn decode(&mut self, at: &Location, stored: &[u8], id: &ChunkId, out: &mut [u8]) -> Result<()> {
        self.expand(at, stored, id, out)?;
        if id_with_pauses(out, &mut self.pause) != *id {
            return Err(unlike_its_hash(at, id));
        }
        Ok(())
    }

    /// Decodes several chunks as [`ChunkDecoder::decode`] does, and hashes them side by side, which is several times faster
    /// on a processor without instructions for SHA-256. How each went, in the same order.
    pub fn decode_each(&mut self, chunks: &mut [Undecoded<'_>]) -> Vec<Result<()>> {
        let mut results: Vec<Result<()>> =
            chunks.iter_mut().map(|chunk| self.expand(chunk.at, chunk.stored, chunk.id, chunk.out)).collect();
        let expanded: Vec<usize> = (0..chunks.len()).filter(|at| results[*at].is_ok()).collect();
        let plain: Vec<&[u8]> = expanded.iter().map(|at| &*chunks[*at].out).collect();
        for (at, id) in expanded.into_iter().zip(ids_with_pauses(&plain, &mut self.pause)) {
            if id != *chunks[at].id {
                results[at] = Err(unlike_its_hash(chunks[at].at, chunks[at].id));
            }
        }
        results
    }

    /// Everything but the hash: nothing of `out` may be given to anybody yet.
    fn expand(&mut self, at: &Location, stored: &[u8], id: &ChunkId, out: &mut [u8]) -> Result<()> {
        let damaged = |how: &str| damaged(at, id, how);
        if stored.len() != at.stored_len as usize || out.len() != at.plain_len as usize {
            return Err(damaged("has another length than its use wants"));
        }
        if crc32fast::hash(stored) != at.crc {
            return Err(damaged("does not match its CRC"));
        }
        if at.key != KeyRef::NONE {
            return Err(Error::new(
                ErrorKind::UnknownKey,
                format!("chunk {id} is encrypted under key {}, which is not known here", at.key.0),
            )
            .hint("use the release and the key that wrote it"));
        }
        (self.pause)();
        match at.codec {
            Codec::PLAIN if stored.len() == out.len() => out.copy_from_slice(stored),
            Codec::PLAIN => return Err(damaged("is stored plain in another length")),
            Codec::ZSTD => {
                let len = self
                    .zstd
                    .decompress_to_buffer(stored, out)
                    .map_err(|error: io::Error| damaged("cannot be decompressed").because(error))?;
                if len != out.len() {
                    return Err(damaged("decompresses to another length"));
                }
            }
            Codec(other) => {
                return Err(Error::new(
                    ErrorKind::UnknownCodec,
                    format!("chunk {id} is stored with codec {other}, which this release does not know"),
                )
                .hint("use the release that wrote it, or a newer one"));
            }
        }
        Ok(())
    }
}

/// A chunk to decode together with others.
pub struct Undecoded<'a> {
    /// Where its stored bytes were read from.
    pub at: &'a Location,
    /// They.
    pub stored: &'a [u8],
    /// The chunk that it must be.
    pub id: &'a ChunkId,
    /// What to fill. On an error it holds anything.
    pub out: &'a mut [u8],
}

fn damaged(at: &Location, id: &ChunkId, how: &str) -> Error {
    Error::damaged(format!("chunk {id} at offset {} of pack {} {how}", at.offset, at.pack))
}

fn unlike_its_hash(at: &Location, id: &ChunkId) -> Error {
    damaged(at, id, "does not match its hash")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::PackId;
    use crate::record::RecordKind;
    use proptest::prelude::*;

    fn location(stored: &StoredChunk<'_>) -> Location {
        Location {
            pack: PackId::from_bytes([0; 16]),
            offset: 64,
            stored_len: stored.bytes.len() as u32,
            plain_len: stored.plain_len,
            crc: stored.crc,
            codec: stored.codec,
            key: stored.key,
            kind: RecordKind::CHUNK,
        }
    }

    #[test]
    fn zeroes_are_found_and_a_single_bit_among_them_too() {
        for len in [0, 1, 7, 255, 256, 4096, 65536 + 3] {
            let mut bytes = vec![0; len];
            assert!(is_zero(&bytes));
            for at in [0, len / 2, len.wrapping_sub(1)] {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = 0x80;
                    assert!(!is_zero(&bytes));
                    bytes[at] = 0;
                }
            }
        }
    }

    #[test]
    fn what_does_not_shrink_is_stored_plain() {
        let mut noise = vec![0; 70_000];
        crate::id::fill_random(&mut noise).unwrap();
        let mut encoder = ChunkEncoder::new(DEFAULT_LEVEL).unwrap();
        assert_eq!(encoder.encode(&noise).unwrap().codec, Codec::PLAIN);
        assert_eq!(encoder.encode(&[7; 70_000]).unwrap().codec, Codec::ZSTD);
        assert_eq!(encoder.encode(&[]).unwrap_err().kind(), ErrorKind::InvalidInput);
        assert!(ChunkEncoder::new(1000).is_err());
    }

    #[test]
    fn unknown_codecs_and_keys_are_refused_by_name() {
        let plain = [5; 1000];
        let id = ChunkId::of(&plain);
        let mut encoder = ChunkEncoder::new(DEFAULT_LEVEL).unwrap();
        let stored = encoder.encode(&plain).unwrap();
        let mut decoder = ChunkDecoder::new().unwrap();
        let mut out = [0; 1000];
        let at = Location { codec: Codec(9), ..location(&stored) };
        assert_eq!(
            decoder.decode(&at, stored.bytes, &id, &mut out).unwrap_err().kind(),
            ErrorKind::UnknownCodec
        );
        let at = Location { key: KeyRef(1), ..location(&stored) };
        assert_eq!(
            decoder.decode(&at, stored.bytes, &id, &mut out).unwrap_err().kind(),
            ErrorKind::UnknownKey
        );
    }

    #[test]
    fn a_chunk_that_decodes_to_more_than_it_must_is_refused() {
        let plain = [5; 5000];
        let id = ChunkId::of(&plain[..4000]);
        let mut encoder = ChunkEncoder::new(DEFAULT_LEVEL).unwrap();
        let stored = encoder.encode(&plain).unwrap();
        let at = Location { plain_len: 4000, ..location(&stored) };
        let mut out = [0xee; 4100];
        let error =
            ChunkDecoder::new().unwrap().decode(&at, stored.bytes, &id, &mut out[..4000]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Damaged);
        assert_eq!(out[4000..], [0xee; 100]);
    }

    #[test]
    fn of_several_decoded_together_only_the_damaged_one_fails() {
        let plains: Vec<Vec<u8>> = (0..20u8).map(|n| vec![n; 4000]).collect();
        let mut encoder = ChunkEncoder::new(DEFAULT_LEVEL).unwrap();
        let stored: Vec<(Location, Vec<u8>)> = plains
            .iter()
            .map(|plain| {
                let stored = encoder.encode(plain).unwrap();
                (location(&stored), stored.bytes.to_vec())
            })
            .collect();
        let mut ids: Vec<ChunkId> = plains.iter().map(|plain| ChunkId::of(plain)).collect();
        ids[7] = ids[8];
        let mut outs = vec![vec![0; 4000]; 20];
        let mut chunks: Vec<Undecoded<'_>> = stored
            .iter()
            .zip(&ids)
            .zip(&mut outs)
            .map(|(((at, stored), id), out)| Undecoded { at, stored, id, out })
            .collect();
        let results = ChunkDecoder::new().unwrap().decode_each(&mut chunks);
        for (at, result) in results.iter().enumerate() {
            assert_eq!(result.as_ref().err().map(Error::kind), (at == 7).then_some(ErrorKind::Damaged));
        }
        assert_eq!(outs, plains);
    }

    proptest! {
        #[test]
        fn a_chunk_comes_back_as_it_was_and_any_flipped_bit_is_noticed(
            plain in proptest::collection::vec(0u8..4, 1..3000), flip in any::<proptest::sample::Index>()
        ) {
            let id = ChunkId::of(&plain);
            let mut encoder = ChunkEncoder::new(DEFAULT_LEVEL).unwrap();
            let stored = encoder.encode(&plain).unwrap();
            let mut at = location(&stored);
            let mut decoder = ChunkDecoder::new().unwrap();
            let mut out = vec![0; plain.len()];
            decoder.decode(&at, stored.bytes, &id, &mut out).unwrap();
            prop_assert_eq!(&out, &plain);
            let mut bad = stored.bytes.to_vec();
            let bit = flip.index(8 * bad.len());
            bad[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(decoder.decode(&at, &bad, &id, &mut out).is_err());
            // Even under a CRC that was made to fit, the hash decides.
            at.crc = crc32fast::hash(&bad);
            if decoder.decode(&at, &bad, &id, &mut out).is_ok() {
                prop_assert_eq!(&out, &plain);
            }
        }
    }
}
