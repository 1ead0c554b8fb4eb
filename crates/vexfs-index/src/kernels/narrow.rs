//! One query against many codes of 4 bits or 1 bit a number, with the records asked for ahead of their use.
//!
//! Nibbles: a record's byte `64 b + i` holds number `128 b + i` in its low half and number `128 b + 64 + i` in its
//! high half; a nibble n stands for the 8-bit code 17 n, so that results are those of [`super::codes`]. Signs: bit
//! `i % 8` of byte `i / 8` says whether number i is positive; 8 bytes that belong to the record follow. Queries are as
//! long as records have numbers, a multiple of 128 or 64.

use std::sync::OnceLock;

use super::codes::many;

/// Bytes after a record's signs.
pub const TAIL: usize = 8;

type Many = unsafe fn(&[u8], &[u8], &[u32], &mut [u32]);

/// The kernels of one instruction set.
pub struct NarrowKernels {
    #[cfg_attr(not(test), allow(dead_code, reason = "names the variant that a test found wrong"))]
    name: &'static str,
    squares: Many,
    products: Many,
    signs: Many,
}

/// What is summed.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Narrow {
    /// Squared differences of unsigned query bytes and nibbles.
    Squares,
    /// Products of signed query bytes and nibbles, as an i32 in a u32's bits.
    Products,
    /// The signed query bytes where a sign is positive, as an i32 in a u32's bits.
    Signs,
}

impl NarrowKernels {
    /// All variants that this machine can run, best first.
    pub fn available() -> Vec<NarrowKernels> {
        let mut all = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2");
            if avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vnni")
            {
                let (squares, products, signs) = (vnni::squares, vnni::products, vnni::signs);
                all.push(NarrowKernels { name: "avx512-vnni", squares, products, signs });
            }
            if avx2 {
                let (squares, products, signs) = (avx2::squares, avx2::products, avx2::signs);
                all.push(NarrowKernels { name: "avx2", squares, products, signs });
            }
        }
        #[cfg(target_arch = "aarch64")]
        if std::arch::is_aarch64_feature_detected!("dotprod") {
            let (squares, products, signs) = (dotprod::squares, dotprod::products, dotprod::signs);
            all.push(NarrowKernels { name: "neon-dotprod", squares, products, signs });
        }
        all.push(SCALAR);
        all
    }

    /// Every id's record must lie in `data`: that is checked, an id beyond panics.
    #[inline]
    pub fn many(&self, sum: Narrow, query: &[u8], data: &[u8], ids: &[u32], out: &mut [u32]) {
        // SAFETY: `available` makes kernels only where the machine has their features.
        unsafe {
            match sum {
                Narrow::Squares => (self.squares)(query, data, ids, out),
                Narrow::Products => (self.products)(query, data, ids, out),
                Narrow::Signs => (self.signs)(query, data, ids, out),
            }
        }
    }
}

const SCALAR: NarrowKernels =
    NarrowKernels { name: "scalar", squares: scalar::squares, products: scalar::products, signs: scalar::signs };

/// The best of this machine.
pub fn best() -> &'static NarrowKernels {
    static BEST: OnceLock<NarrowKernels> = OnceLock::new();
    BEST.get_or_init(|| NarrowKernels::available().into_iter().next().unwrap_or(SCALAR))
}

/// Bytes of a record of nibbles that a query of `len` numbers is compared with.
pub fn nibbles(len: usize) -> usize {
    len / 2
}

/// Bytes of a record of signs and what follows them.
pub fn signs(len: usize) -> usize {
    len / 8 + TAIL
}

#[cfg(target_arch = "x86_64")]
mod vnni {
    use std::arch::x86_64::*;

    super::many!(squares, squares_one, super::nibbles, "avx512f,avx512bw,avx512vnni");
    super::many!(products, products_one, super::nibbles, "avx512f,avx512bw,avx512vnni");
    super::many!(signs, signs_one, super::signs, "avx512f,avx512bw,avx512vnni");

    /// The 8-bit codes of the low and the high halves.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn widen(codes: &[u8; 64]) -> [__m512i; 2] {
        let half = _mm512_set1_epi8(0x0f);
        // SAFETY: 64 bytes; an unaligned load.
        let both = unsafe { _mm512_loadu_si512(codes.as_ptr().cast()) };
        let (low, high) = (_mm512_and_si512(both, half), _mm512_and_si512(_mm512_srli_epi16::<4>(both), half));
        [_mm512_or_si512(low, _mm512_slli_epi16::<4>(low)), _mm512_or_si512(high, _mm512_slli_epi16::<4>(high))]
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn squares_one(query: &[u8], codes: &[u8]) -> u32 {
        let zero = _mm512_setzero_si512();
        let (mut even, mut odd) = (zero, zero);
        for (q, c) in query.as_chunks::<128>().0.iter().zip(codes.as_chunks::<64>().0) {
            for (q, c) in q.as_chunks::<64>().0.iter().zip(widen(c)) {
                // SAFETY: 64 bytes; an unaligned load.
                let q = unsafe { _mm512_loadu_si512(q.as_ptr().cast()) };
                let apart = _mm512_or_si512(_mm512_subs_epu8(q, c), _mm512_subs_epu8(c, q));
                let (low, high) = (_mm512_unpacklo_epi8(apart, zero), _mm512_unpackhi_epi8(apart, zero));
                even = _mm512_dpwssd_epi32(even, low, low);
                odd = _mm512_dpwssd_epi32(odd, high, high);
            }
        }
        _mm512_reduce_add_epi32(_mm512_add_epi32(even, odd)) as u32
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn products_one(query: &[u8], codes: &[u8]) -> u32 {
        let mut sum = _mm512_setzero_si512();
        for (q, c) in query.as_chunks::<128>().0.iter().zip(codes.as_chunks::<64>().0) {
            for (q, c) in q.as_chunks::<64>().0.iter().zip(widen(c)) {
                // SAFETY: 64 bytes; an unaligned load.
                let q = unsafe { _mm512_loadu_si512(q.as_ptr().cast()) };
                sum = _mm512_dpbusd_epi32(sum, c, q);
            }
        }
        _mm512_reduce_add_epi32(sum) as u32
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn signs_one(query: &[u8], record: &[u8]) -> u32 {
        let ones = _mm512_set1_epi8(1);
        let mut sum = _mm512_setzero_si512();
        for (q, signs) in query.as_chunks::<64>().0.iter().zip(record.as_chunks::<8>().0) {
            // SAFETY: 64 bytes; an unaligned load.
            let q = unsafe { _mm512_maskz_loadu_epi8(u64::from_le_bytes(*signs), q.as_ptr().cast()) };
            sum = _mm512_dpbusd_epi32(sum, ones, q);
        }
        _mm512_reduce_add_epi32(sum) as u32
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;

    super::many!(squares, squares_one, super::nibbles, "avx2");
    super::many!(products, products_one, super::nibbles, "avx2");
    super::many!(signs, signs_one, super::signs, "avx2");

    #[target_feature(enable = "avx2")]
    fn total(sums: __m256i) -> u32 {
        let four = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256::<1>(sums));
        let two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
        let one = _mm_add_epi32(two, _mm_shuffle_epi32::<1>(two));
        _mm_cvtsi128_si32(one) as u32
    }

    /// For each half of 64 bytes of codes: where in the 128 numbers it begins, and its 8-bit codes.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn widen(codes: &[u8; 64]) -> [(usize, __m256i); 4] {
        let half = _mm256_set1_epi8(0x0f);
        let of = |at: usize| {
            // SAFETY: `at` is 0 or 32 and 32 bytes follow; an unaligned load.
            let both = unsafe { _mm256_loadu_si256(codes.as_ptr().add(at).cast()) };
            let (low, high) = (_mm256_and_si256(both, half), _mm256_and_si256(_mm256_srli_epi16::<4>(both), half));
            [_mm256_or_si256(low, _mm256_slli_epi16::<4>(low)), _mm256_or_si256(high, _mm256_slli_epi16::<4>(high))]
        };
        let ([a, c], [b, d]) = (of(0), of(32));
        [(0, a), (32, b), (64, c), (96, d)]
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn squares_one(query: &[u8], codes: &[u8]) -> u32 {
        let zero = _mm256_setzero_si256();
        let mut sum = zero;
        for (q, c) in query.as_chunks::<128>().0.iter().zip(codes.as_chunks::<64>().0) {
            for (at, c) in widen(c) {
                // SAFETY: `at` is at most 96; an unaligned load of 32 bytes.
                let q = unsafe { _mm256_loadu_si256(q.as_ptr().add(at).cast()) };
                let apart = _mm256_or_si256(_mm256_subs_epu8(q, c), _mm256_subs_epu8(c, q));
                let (low, high) = (_mm256_unpacklo_epi8(apart, zero), _mm256_unpackhi_epi8(apart, zero));
                sum = _mm256_add_epi32(sum, _mm256_madd_epi16(low, low));
                sum = _mm256_add_epi32(sum, _mm256_madd_epi16(high, high));
            }
        }
        total(sum)
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn products_one(query: &[u8], codes: &[u8]) -> u32 {
        let mut sum = _mm256_setzero_si256();
        for (q, c) in query.as_chunks::<128>().0.iter().zip(codes.as_chunks::<64>().0) {
            for (at, c) in widen(c) {
                // SAFETY: `at` is at most 96; an unaligned load of 32 bytes.
                let q = unsafe { _mm256_loadu_si256(q.as_ptr().add(at).cast()) };
                let (q_low, q_high) = (_mm256_castsi256_si128(q), _mm256_extracti128_si256::<1>(q));
                let (c_low, c_high) = (_mm256_castsi256_si128(c), _mm256_extracti128_si256::<1>(c));
                let low = _mm256_madd_epi16(_mm256_cvtepi8_epi16(q_low), _mm256_cvtepu8_epi16(c_low));
                let high = _mm256_madd_epi16(_mm256_cvtepi8_epi16(q_high), _mm256_cvtepu8_epi16(c_high));
                sum = _mm256_add_epi32(sum, _mm256_add_epi32(low, high));
            }
        }
        total(sum)
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn signs_one(query: &[u8], record: &[u8]) -> u32 {
        // Byte i of a vector gets the byte of signs that its own is in, and of it its own.
        let spread = _mm256_setr_epi64x(0, 0x0101_0101_0101_0101, 0x0202_0202_0202_0202, 0x0303_0303_0303_0303);
        let own = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
        let mut sum = _mm256_setzero_si256();
        for (q, signs) in query.as_chunks::<32>().0.iter().zip(record.as_chunks::<4>().0) {
            // SAFETY: 32 bytes; an unaligned load.
            let q = unsafe { _mm256_loadu_si256(q.as_ptr().cast()) };
            let all = _mm256_shuffle_epi8(_mm256_set1_epi32(i32::from_le_bytes(*signs)), spread);
            let positive = _mm256_cmpeq_epi8(_mm256_and_si256(all, own), own);
            let pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), _mm256_and_si256(positive, q));
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
        }
        total(sum)
    }
}

mod scalar {
    use super::{products_one, squares_one};

    super::many!(squares, squares_one, super::nibbles);
    super::many!(products, products_one, super::nibbles);
    super::many!(signs, signs_one, super::signs);

    #[inline]
    fn signs_one(query: &[u8], record: &[u8]) -> u32 {
        let positive = |at: &usize| record[at / 8] >> (at % 8) & 1 == 1;
        (0..query.len()).filter(positive).map(|at| i32::from(query[at] as i8)).sum::<i32>() as u32
    }
}

#[cfg(target_arch = "aarch64")]
mod dotprod {
    use std::arch::aarch64::*;

    use super::{products_one, squares_one};

    super::many!(squares, squares_one, super::nibbles, "neon,dotprod");
    super::many!(products, products_one, super::nibbles, "neon,dotprod");
    super::many!(signs, signs_one, super::signs, "neon");

    #[inline]
    #[target_feature(enable = "neon")]
    fn signs_one(query: &[u8], record: &[u8]) -> u32 {
        let own = vreinterpretq_u8_u64(vdupq_n_u64(0x8040_2010_0804_0201));
        let mut sum = vdupq_n_s32(0);
        for (q, signs) in query.as_chunks::<16>().0.iter().zip(record.as_chunks::<2>().0) {
            // SAFETY: 16 bytes.
            let q = unsafe { vld1q_u8(q.as_ptr()) };
            let positive = vtstq_u8(vcombine_u8(vdup_n_u8(signs[0]), vdup_n_u8(signs[1])), own);
            sum = vpadalq_s16(sum, vpaddlq_s8(vreinterpretq_s8_u8(vandq_u8(positive, q))));
        }
        vaddvq_s32(sum) as u32
    }
}

/// The sum that `one` comes to over queries and the 8-bit codes that nibbles stand for.
#[inline(always)]
fn of_codes(query: &[u8], codes: &[u8], one: impl Fn(&[u8; 64], &[u8; 64]) -> u32) -> u32 {
    query.as_chunks::<128>().0.iter().zip(codes.as_chunks::<64>().0).fold(0, |sum: u32, (q, c)| {
        let halves = [c.map(|c| (c & 15) * 17), c.map(|c| (c >> 4) * 17)];
        let sums = q.as_chunks::<64>().0.iter().zip(&halves).map(|(q, c)| one(q, c));
        sums.fold(sum, u32::wrapping_add)
    })
}

#[inline(always)]
fn squares_one(query: &[u8], codes: &[u8]) -> u32 {
    of_codes(query, codes, |q, c| super::squares_u8(q, c))
}

#[inline(always)]
fn products_one(query: &[u8], codes: &[u8]) -> u32 {
    of_codes(query, codes, |q, c| super::codes::products_one(q, c))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_variant_sums_alike() {
        let mut state = 9u64;
        let mut byte = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 40) as u8
        };
        let ids = [3, 0, 8, 8, 1, 2, 7, 5, 6, 4];
        for len in (1..=33).map(|n| n * 64).chain([65_536]) {
            for extreme in [false, true] {
                let query: Vec<u8> = (0..len).map(|_| if extreme { 0x80 } else { byte() }).collect();
                let data: Vec<u8> = (0..(len / 2 + TAIL) * 9).map(|_| if extreme { 0xff } else { byte() }).collect();
                for kernels in NarrowKernels::available() {
                    let mut out = [0; 10];
                    kernels.many(Narrow::Signs, &query, &data, &ids, &mut out);
                    for (id, got) in ids.iter().zip(out) {
                        let row = &data[*id as usize * (len / 8 + TAIL)..];
                        let positive = (0..len).filter(|at| row[at / 8] >> (at % 8) & 1 == 1);
                        let wanted: i64 = positive.map(|at| i64::from(query[at] as i8)).sum();
                        assert_eq!(i64::from(got as i32), wanted, "{} signs {len}", kernels.name);
                    }
                    if !len.is_multiple_of(128) {
                        continue;
                    }
                    let code = |id: u32, at: usize| {
                        let byte = data[id as usize * (len / 2) + at / 128 * 64 + at % 64];
                        i64::from(if at % 128 < 64 { byte & 15 } else { byte >> 4 }) * 17
                    };
                    kernels.many(Narrow::Squares, &query, &data, &ids, &mut out);
                    for (id, got) in ids.iter().zip(out) {
                        let wanted: i64 = (0..len).map(|at| (i64::from(query[at]) - code(*id, at)).pow(2)).sum();
                        assert_eq!(i64::from(got), wanted, "{} squares {len}", kernels.name);
                    }
                    kernels.many(Narrow::Products, &query, &data, &ids, &mut out);
                    for (id, got) in ids.iter().zip(out) {
                        let wanted: i64 = (0..len).map(|at| i64::from(query[at] as i8) * code(*id, at)).sum();
                        assert_eq!(i64::from(got as i32), wanted, "{} products {len}", kernels.name);
                    }
                }
            }
        }
    }
}
