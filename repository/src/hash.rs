//! SHA-256 of many chunks at once.
//!
//! One SHA-256 is a long chain of dependent steps, and a processor without instructions for it (SHA-NI) spends
//! most of its width waiting. Chunks are independent of each other, so the vector units take one chunk in each
//! lane. Measured on one core of a processor that has AVX-512 and no SHA-NI: 178 MB/s one by one, 910 MB/s in
//! eight lanes of AVX2, 2400 MB/s in sixteen of AVX-512; SHA-NI, where it is, gives about 1300 MB/s one by one.

use sha2::{Digest, Sha256};

use crate::id::ChunkId;

/// Blocks of each lane from one pause to the next: with 16 lanes of AVX-512 about 60 µs of work.
#[cfg(any(target_arch = "x86_64", test))]
const PAUSE_BLOCKS: usize = 128;
/// Bytes from one pause to the next where one chunk is hashed by itself: about 90 µs of work without SHA-NI.
const PAUSE_BYTES: usize = 16 << 10;

/// The ids of these chunks, in the same order. Many of one length at once are fastest.
pub fn chunk_ids(chunks: &[&[u8]]) -> Vec<ChunkId> {
    ids_with_pauses(chunks, &mut || ())
}

/// The same, calling `pause` now and then: at least once in some ten microseconds of work.
pub(crate) fn ids_with_pauses(chunks: &[&[u8]], pause: &mut dyn FnMut()) -> Vec<ChunkId> {
    #[cfg(target_arch = "x86_64")]
    if chunks.len() > 1 {
        use std::arch::is_x86_feature_detected as has;
        if has!("avx512f") && has!("avx512bw") {
            // SAFETY: the processor has both features.
            return lanes::ids(chunks, pause, |states, data, blocks| unsafe {
                wide::compress(states, data, blocks)
            });
        }
        if has!("avx2") && !(has!("sha") && has!("sse4.1")) {
            // SAFETY: the processor has the feature.
            return lanes::ids(chunks, pause, |states, data, blocks| unsafe {
                narrow::compress(states, data, blocks)
            });
        }
    }
    chunks.iter().map(|chunk| id_with_pauses(chunk, pause)).collect()
}

/// The id of one chunk, calling `pause` now and then.
pub(crate) fn id_with_pauses(chunk: &[u8], pause: &mut dyn FnMut()) -> ChunkId {
    let mut hash = Sha256::new();
    for part in chunk.chunks(PAUSE_BYTES) {
        hash.update(part);
        pause();
    }
    ChunkId::from_bytes(hash.finalize().into())
}

/// What the kernels share: the constants of FIPS 180-4, the sharing out of chunks to lanes, and the padding.
#[cfg(any(target_arch = "x86_64", test))]
mod lanes {
    use super::{ChunkId, PAUSE_BLOCKS, id_with_pauses};

    pub(super) const BLOCK: usize = 64;

    /// The eight words of the state, for each of `L` lanes.
    pub(super) type States<const L: usize> = [[u32; L]; 8];

    const INITIAL: [u32; 8] = [
        0x6a09_e667,
        0xbb67_ae85,
        0x3c6e_f372,
        0xa54f_f53a,
        0x510e_527f,
        0x9b05_688c,
        0x1f83_d9ab,
        0x5be0_cd19,
    ];

    #[rustfmt::skip]
    pub(super) const ROUNDS: [u32; 64] = [
        0x428a_2f98, 0x7137_4491, 0xb5c0_fbcf, 0xe9b5_dba5, 0x3956_c25b, 0x59f1_11f1, 0x923f_82a4, 0xab1c_5ed5,
        0xd807_aa98, 0x1283_5b01, 0x2431_85be, 0x550c_7dc3, 0x72be_5d74, 0x80de_b1fe, 0x9bdc_06a7, 0xc19b_f174,
        0xe49b_69c1, 0xefbe_4786, 0x0fc1_9dc6, 0x240c_a1cc, 0x2de9_2c6f, 0x4a74_84aa, 0x5cb0_a9dc, 0x76f9_88da,
        0x983e_5152, 0xa831_c66d, 0xb003_27c8, 0xbf59_7fc7, 0xc6e0_0bf3, 0xd5a7_9147, 0x06ca_6351, 0x1429_2967,
        0x27b7_0a85, 0x2e1b_2138, 0x4d2c_6dfc, 0x5338_0d13, 0x650a_7354, 0x766a_0abb, 0x81c2_c92e, 0x9272_2c85,
        0xa2bf_e8a1, 0xa81a_664b, 0xc24b_8b70, 0xc76c_51a3, 0xd192_e819, 0xd699_0624, 0xf40e_3585, 0x106a_a070,
        0x19a4_c116, 0x1e37_6c08, 0x2748_774c, 0x34b0_bcb5, 0x391c_0cb3, 0x4ed8_aa4a, 0x5b9c_ca4f, 0x682e_6ff3,
        0x748f_82ee, 0x78a5_636f, 0x84c8_7814, 0x8cc7_0208, 0x90be_fffa, 0xa450_6ceb, 0xbef9_a3f7, 0xc671_78f2,
    ];

    /// Shares chunks of one length out to the lanes. `compress` takes whole blocks from the start of each lane's data.
    pub(super) fn ids<const L: usize>(
        chunks: &[&[u8]],
        pause: &mut dyn FnMut(),
        compress: impl Fn(&mut States<L>, &[&[u8]; L], usize),
    ) -> Vec<ChunkId> {
        let mut ids = vec![ChunkId::from_bytes([0; 32]); chunks.len()];
        let mut by_len: Vec<usize> = (0..chunks.len()).collect();
        by_len.sort_by_key(|at| chunks[*at].len());
        for same in by_len.chunk_by(|a, b| chunks[*a].len() == chunks[*b].len()) {
            for group in same.chunks(L) {
                if let [single] = group {
                    ids[*single] = id_with_pauses(chunks[*single], pause);
                    continue;
                }
                // Lanes that nobody needs hash the first chunk once more.
                let data: [&[u8]; L] =
                    std::array::from_fn(|lane| chunks[*group.get(lane).unwrap_or(&group[0])]);
                let states = hash(&data, pause, &compress);
                for (lane, at) in group.iter().enumerate() {
                    let mut id = [0; 32];
                    for (bytes, word) in id.chunks_exact_mut(4).zip(&states) {
                        bytes.copy_from_slice(&word[lane].to_be_bytes());
                    }
                    ids[*at] = ChunkId::from_bytes(id);
                }
            }
        }
        ids
    }

    fn hash<const L: usize>(
        data: &[&[u8]; L],
        pause: &mut dyn FnMut(),
        compress: &impl Fn(&mut States<L>, &[&[u8]; L], usize),
    ) -> States<L> {
        let mut states: States<L> = INITIAL.map(|word| [word; L]);
        let len = data[0].len();
        let whole = len / BLOCK;
        for at in (0..whole).step_by(PAUSE_BLOCKS) {
            compress(&mut states, &data.map(|data| &data[at * BLOCK..]), PAUSE_BLOCKS.min(whole - at));
            pause();
        }
        // The rest, a one bit, zeroes, and the length in bits: one block, or two where the length does not fit.
        let mut tails = [[0; 2 * BLOCK]; L];
        let rest = len % BLOCK;
        let blocks = if rest + 1 + 8 <= BLOCK { 1 } else { 2 };
        for (tail, data) in tails.iter_mut().zip(data) {
            tail[..rest].copy_from_slice(&data[whole * BLOCK..]);
            tail[rest] = 0x80;
            tail[blocks * BLOCK - 8..blocks * BLOCK].copy_from_slice(&(8 * len as u64).to_be_bytes());
        }
        compress(&mut states, &std::array::from_fn(|lane| &tails[lane][..]), blocks);
        states
    }

    /// The same number of blocks of every lane, as plain loops over the lanes: the compiler makes vectors of them.
    #[inline(always)]
    pub(super) fn compress<const L: usize>(states: &mut States<L>, data: &[&[u8]; L], blocks: usize) {
        #[inline(always)]
        fn each<const L: usize>(mut f: impl FnMut(usize) -> u32) -> [u32; L] {
            let mut out = [0; L];
            for (lane, out) in out.iter_mut().enumerate() {
                *out = f(lane);
            }
            out
        }
        for at in (0..blocks).map(|block| block * BLOCK) {
            let mut w = [[0; L]; 16];
            for (lane, data) in data.iter().enumerate() {
                for (word, bytes) in w.iter_mut().zip(data[at..at + BLOCK].chunks_exact(4)) {
                    word[lane] = u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
                }
            }
            let [mut a, mut b, mut c, mut d, mut e, mut f, mut g, mut h] = *states;
            for (round, k) in ROUNDS.iter().enumerate() {
                let t = round % 16;
                if round >= 16 {
                    let (w1, w14, w9) = (w[(t + 1) % 16], w[(t + 14) % 16], w[(t + 9) % 16]);
                    w[t] = each(|i| {
                        let s0 = w1[i].rotate_right(7) ^ w1[i].rotate_right(18) ^ (w1[i] >> 3);
                        let s1 = w14[i].rotate_right(17) ^ w14[i].rotate_right(19) ^ (w14[i] >> 10);
                        w[t][i].wrapping_add(s0).wrapping_add(w9[i]).wrapping_add(s1)
                    });
                }
                let t1: [u32; L] = each(|i| {
                    let s1 = e[i].rotate_right(6) ^ e[i].rotate_right(11) ^ e[i].rotate_right(25);
                    let choice = (e[i] & f[i]) ^ (!e[i] & g[i]);
                    h[i].wrapping_add(s1).wrapping_add(choice).wrapping_add(*k).wrapping_add(w[t][i])
                });
                let t2: [u32; L] = each(|i| {
                    let s0 = a[i].rotate_right(2) ^ a[i].rotate_right(13) ^ a[i].rotate_right(22);
                    s0.wrapping_add((a[i] & b[i]) ^ (a[i] & c[i]) ^ (b[i] & c[i]))
                });
                (h, g, f) = (g, f, e);
                e = each(|i| d[i].wrapping_add(t1[i]));
                (d, c, b) = (c, b, a);
                a = each(|i| t1[i].wrapping_add(t2[i]));
            }
            for (state, word) in states.iter_mut().zip([a, b, c, d, e, f, g, h]) {
                *state = each(|i| state[i].wrapping_add(word[i]));
            }
        }
    }
}

/// Eight lanes of AVX2.
#[cfg(target_arch = "x86_64")]
mod narrow {
    use super::lanes::{self, States};

    #[target_feature(enable = "avx2")]
    pub(super) fn compress(states: &mut States<8>, data: &[&[u8]; 8], blocks: usize) {
        lanes::compress(states, data, blocks);
    }
}

/// Sixteen lanes of AVX-512. Written out, because the compiler would gather every word by itself, which halves the speed.
#[cfg(target_arch = "x86_64")]
mod wide {
    use std::arch::x86_64::{
        __m512i, _mm512_add_epi32, _mm512_loadu_si512, _mm512_ror_epi32, _mm512_set1_epi32,
        _mm512_set4_epi32, _mm512_setzero_si512, _mm512_shuffle_epi8, _mm512_shuffle_i32x4,
        _mm512_srli_epi32, _mm512_storeu_si512, _mm512_ternarylogic_epi32, _mm512_unpackhi_epi32,
        _mm512_unpackhi_epi64, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
    };

    use super::lanes::{BLOCK, ROUNDS, States};

    /// Truth tables of three inputs.
    const XOR: i32 = 0x96;
    const CHOICE: i32 = 0xca;
    const MAJORITY: i32 = 0xe8;

    #[target_feature(enable = "avx512f,avx512bw")]
    pub(super) fn compress(states: &mut States<16>, data: &[&[u8]; 16], blocks: usize) {
        // SAFETY: each row is 64 bytes, and the load asks for no alignment.
        let mut state: [__m512i; 8] =
            std::array::from_fn(|i| unsafe { _mm512_loadu_si512(states[i].as_ptr().cast()) });
        for at in (0..blocks).map(|block| block * BLOCK) {
            let mut w = words(data, at);
            let [mut a, mut b, mut c, mut d, mut e, mut f, mut g, mut h] = state;
            for sixteen in 0..4 {
                for t in 0..16 {
                    if sixteen > 0 {
                        let (w1, w14) = (w[(t + 1) % 16], w[(t + 14) % 16]);
                        let s0 = _mm512_ternarylogic_epi32::<XOR>(
                            _mm512_ror_epi32::<7>(w1),
                            _mm512_ror_epi32::<18>(w1),
                            _mm512_srli_epi32::<3>(w1),
                        );
                        let s1 = _mm512_ternarylogic_epi32::<XOR>(
                            _mm512_ror_epi32::<17>(w14),
                            _mm512_ror_epi32::<19>(w14),
                            _mm512_srli_epi32::<10>(w14),
                        );
                        w[t] = _mm512_add_epi32(
                            _mm512_add_epi32(w[t], s0),
                            _mm512_add_epi32(w[(t + 9) % 16], s1),
                        );
                    }
                    let s1 = _mm512_ternarylogic_epi32::<XOR>(
                        _mm512_ror_epi32::<6>(e),
                        _mm512_ror_epi32::<11>(e),
                        _mm512_ror_epi32::<25>(e),
                    );
                    let choice = _mm512_ternarylogic_epi32::<CHOICE>(e, f, g);
                    let k = _mm512_set1_epi32(ROUNDS[sixteen * 16 + t].cast_signed());
                    let t1 = _mm512_add_epi32(
                        _mm512_add_epi32(h, _mm512_add_epi32(w[t], k)),
                        _mm512_add_epi32(s1, choice),
                    );
                    let s0 = _mm512_ternarylogic_epi32::<XOR>(
                        _mm512_ror_epi32::<2>(a),
                        _mm512_ror_epi32::<13>(a),
                        _mm512_ror_epi32::<22>(a),
                    );
                    let t2 = _mm512_add_epi32(s0, _mm512_ternarylogic_epi32::<MAJORITY>(a, b, c));
                    (h, g, f, e) = (g, f, e, _mm512_add_epi32(d, t1));
                    (d, c, b, a) = (c, b, a, _mm512_add_epi32(t1, t2));
                }
            }
            for (state, word) in state.iter_mut().zip([a, b, c, d, e, f, g, h]) {
                *state = _mm512_add_epi32(*state, word);
            }
        }
        for (row, state) in states.iter_mut().zip(state) {
            // SAFETY: as for the load above.
            unsafe { _mm512_storeu_si512(row.as_mut_ptr().cast(), state) }
        }
    }

    /// The sixteen words of the block at `at` of every lane: word `t` of all lanes in vector `t`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn words(data: &[&[u8]; 16], at: usize) -> [__m512i; 16] {
        let big_endian = _mm512_set4_epi32(0x0c0d_0e0f, 0x0809_0a0b, 0x0405_0607, 0x0001_0203);
        let rows: [__m512i; 16] = std::array::from_fn(|lane| {
            let block = &data[lane][at..at + BLOCK];
            // SAFETY: the slice was checked to have the 64 bytes that are loaded; no alignment is asked for.
            let row = unsafe { _mm512_loadu_si512(block.as_ptr().cast()) };
            _mm512_shuffle_epi8(row, big_endian)
        });
        let mut pairs = [_mm512_setzero_si512(); 16];
        for i in 0..8 {
            pairs[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
            pairs[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
        }
        let mut fours = [_mm512_setzero_si512(); 16];
        for i in 0..4 {
            let [a, b, c, d] = [pairs[4 * i], pairs[4 * i + 1], pairs[4 * i + 2], pairs[4 * i + 3]];
            fours[4 * i] = _mm512_unpacklo_epi64(a, c);
            fours[4 * i + 1] = _mm512_unpackhi_epi64(a, c);
            fours[4 * i + 2] = _mm512_unpacklo_epi64(b, d);
            fours[4 * i + 3] = _mm512_unpackhi_epi64(b, d);
        }
        // Vector `4i + j` now has, of lanes 4i to 4i + 3, the words j, j + 4, j + 8 and j + 12.
        let mut words = [_mm512_setzero_si512(); 16];
        for j in 0..4 {
            let [a, b, c, d] = [fours[j], fours[4 + j], fours[8 + j], fours[12 + j]];
            let (ab_even, ab_odd) = (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xdd>(a, b));
            let (cd_even, cd_odd) = (_mm512_shuffle_i32x4::<0x88>(c, d), _mm512_shuffle_i32x4::<0xdd>(c, d));
            words[j] = _mm512_shuffle_i32x4::<0x88>(ab_even, cd_even);
            words[j + 4] = _mm512_shuffle_i32x4::<0x88>(ab_odd, cd_odd);
            words[j + 8] = _mm512_shuffle_i32x4::<0xdd>(ab_even, cd_even);
            words[j + 12] = _mm512_shuffle_i32x4::<0xdd>(ab_odd, cd_odd);
        }
        words
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lengths around every edge of the padding, several of each, and a long one.
    fn chunks() -> Vec<Vec<u8>> {
        let lens = (0..200).chain([65536, 65537]);
        lens.flat_map(|len| (0..1 + len % 19).map(move |salt| (len, salt)))
            .map(|(len, salt)| (0..len).map(|at| (at * 31 + salt * 7 + (at >> 8)) as u8).collect())
            .collect()
    }

    #[test]
    fn many_at_once_have_the_ids_that_they_have_one_by_one() {
        let chunks = chunks();
        let chunks: Vec<&[u8]> = chunks.iter().map(Vec::as_slice).collect();
        let single: Vec<ChunkId> = chunks.iter().map(|chunk| ChunkId::of(chunk)).collect();
        assert_eq!(chunk_ids(&chunks), single);
        // The plain loops, whatever this processor has.
        assert_eq!(lanes::ids(&chunks, &mut || (), lanes::compress::<8>), single);
        assert_eq!(lanes::ids(&chunks, &mut || (), lanes::compress::<16>), single);
        assert!(chunk_ids(&[]).is_empty());
    }

    #[test]
    fn there_is_a_pause_for_each_piece_of_work() {
        let chunk = vec![7; 128 << 10];
        let pauses = |count| {
            let mut pauses = 0;
            ids_with_pauses(&vec![chunk.as_slice(); count], &mut || pauses += 1);
            pauses
        };
        assert_eq!(pauses(1), chunk.len() / PAUSE_BYTES);
        assert!(pauses(16) >= chunk.len() / lanes::BLOCK / PAUSE_BLOCKS, "{}", pauses(16));
    }
}
