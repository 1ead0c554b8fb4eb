//! One query against many 8-bit codes. Whoever knows early which records it will compare asks for them ([`ask`]).
//!
//! Codes and queries are padded to multiples of 64 bytes, so that no kernel has a tail. Results are whole numbers:
//! the sum of squared differences of unsigned bytes (at most 255² × 65,536, which a u32 holds), or the dot product
//! of signed query bytes with unsigned codes (at most 128 × 255 × 65,536, which an i32 holds).

use std::sync::OnceLock;

use super::squares_u8;

/// Bytes that a record of codes is padded to.
pub const PAD: usize = 64;

/// Distances of one query to the records `ids` of `data`, each as long as the query, into `out`.
type Many = unsafe fn(&[u8], &[u8], &[u32], &mut [u32]);

pub struct CodeKernels {
    #[cfg_attr(not(test), allow(dead_code, reason = "names the variant that a test found wrong"))]
    name: &'static str,
    squares: Many,
    products: Many,
}

/// What is summed.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Sum {
    /// Squared differences of unsigned bytes.
    Squares,
    /// Products of the query's signed bytes with unsigned ones, as an i32 in a u32's bits.
    Products,
}

impl CodeKernels {
    /// All machines' variants that this one can run, best first.
    pub fn available() -> Vec<CodeKernels> {
        let mut all = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2");
            if avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vnni")
            {
                all.push(CodeKernels { name: "avx512-vnni", squares: vnni::squares, products: vnni::products });
            }
            if avx2 {
                all.push(CodeKernels { name: "avx2", squares: avx2::squares, products: avx2::products });
            }
        }
        #[cfg(target_arch = "aarch64")]
        if std::arch::is_aarch64_feature_detected!("dotprod") {
            all.push(CodeKernels { name: "neon-dotprod", squares: dotprod::squares, products: dotprod::products });
        }
        all.push(SCALAR);
        all
    }

    /// Every id's record must lie in `data`: that is checked, an id beyond panics.
    #[inline]
    pub fn many(&self, sum: Sum, query: &[u8], data: &[u8], ids: &[u32], out: &mut [u32]) {
        // SAFETY: `available` makes kernels only where the machine has their features.
        unsafe {
            match sum {
                Sum::Squares => (self.squares)(query, data, ids, out),
                Sum::Products => (self.products)(query, data, ids, out),
            }
        }
    }
}

const SCALAR: CodeKernels = CodeKernels { name: "scalar", squares: scalar::squares, products: scalar::products };

/// The best of this machine.
pub fn best() -> &'static CodeKernels {
    static BEST: OnceLock<CodeKernels> = OnceLock::new();
    BEST.get_or_init(|| CodeKernels::available().into_iter().next().unwrap_or(SCALAR))
}

/// Asks for record `id` of `len` bytes ahead of its use.
#[inline(always)]
pub fn ask(data: &[u8], id: u32, len: usize) {
    let start = id as usize * len;
    // A long record's later lines are fetched by the machine itself.
    for at in (0..len.min(512)).step_by(64) {
        super::prefetch(data, start + at);
    }
}

/// A function over many records from one over one; `$len` is a record's length by the query's.
macro_rules! many {
    ($name:ident, $one:ident, $len:path $(, $features:literal)?) => {
        $(#[target_feature(enable = $features)])?
        pub(super) fn $name(query: &[u8], data: &[u8], ids: &[u32], out: &mut [u32]) {
            let len = $len(query.len());
            for (id, out) in ids.iter().zip(out) {
                let start = *id as usize * len;
                *out = $one(query, &data[start..start + len]);
            }
        }
    };
}
pub(super) use many;

/// Records are as long as their queries.
pub(super) fn as_long(len: usize) -> usize {
    len
}

#[cfg(target_arch = "x86_64")]
mod vnni {
    use std::arch::x86_64::*;

    /// Four records at a time share their sums' last steps.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub(super) fn squares(query: &[u8], data: &[u8], ids: &[u32], out: &mut [u32]) {
        let len = query.len();
        let record = |id: u32| &data[id as usize * len..][..len];
        let (fours, rest) = ids.as_chunks::<4>();
        let (out_fours, out_rest) = out.split_at_mut(ids.len() - rest.len());
        for (ids, out) in fours.iter().zip(out_fours.as_chunks_mut::<4>().0) {
            *out = squares_four(query, ids.map(record));
        }
        for (id, out) in rest.iter().zip(out_rest) {
            *out = squares_one(query, record(*id));
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn squares_four(query: &[u8], records: [&[u8]; 4]) -> [u32; 4] {
        let zero = _mm512_setzero_si512();
        let (mut even, mut odd) = ([zero; 4], [zero; 4]);
        let query = query.as_chunks::<64>().0;
        let records = records.map(|record| &record.as_chunks::<64>().0[..query.len()]);
        for (n, q) in query.iter().enumerate() {
            // SAFETY: 64 bytes; an unaligned load.
            let q = unsafe { _mm512_loadu_si512(q.as_ptr().cast()) };
            for at in 0..4 {
                // SAFETY: as above.
                let c = unsafe { _mm512_loadu_si512(records[at][n].as_ptr().cast()) };
                let apart = _mm512_or_si512(_mm512_subs_epu8(q, c), _mm512_subs_epu8(c, q));
                let (low, high) = (_mm512_unpacklo_epi8(apart, zero), _mm512_unpackhi_epi8(apart, zero));
                even[at] = _mm512_dpwssd_epi32(even[at], low, low);
                odd[at] = _mm512_dpwssd_epi32(odd[at], high, high);
            }
        }
        let [a, b, c, d] = std::array::from_fn(|at| _mm512_add_epi32(even[at], odd[at]));
        let ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        let cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
        // In each 128-bit lane a part of all four sums.
        let all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
        let half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64::<1>(all));
        let sums = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256::<1>(half));
        let mut out = [0u32; 4];
        // SAFETY: room for 16 bytes; an unaligned store.
        unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), sums) };
        out
    }

    many!(products, products_one, super::as_long, "avx512f,avx512bw,avx512vnni");

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn squares_one(query: &[u8], codes: &[u8]) -> u32 {
        let zero = _mm512_setzero_si512();
        let (mut even, mut odd) = (zero, zero);
        for (q, c) in query.as_chunks::<64>().0.iter().zip(codes.as_chunks::<64>().0) {
            // SAFETY: both are 64 bytes; unaligned loads.
            let (q, c) = unsafe { (_mm512_loadu_si512(q.as_ptr().cast()), _mm512_loadu_si512(c.as_ptr().cast())) };
            let apart = _mm512_or_si512(_mm512_subs_epu8(q, c), _mm512_subs_epu8(c, q));
            let (low, high) = (_mm512_unpacklo_epi8(apart, zero), _mm512_unpackhi_epi8(apart, zero));
            even = _mm512_dpwssd_epi32(even, low, low);
            odd = _mm512_dpwssd_epi32(odd, high, high);
        }
        _mm512_reduce_add_epi32(_mm512_add_epi32(even, odd)) as u32
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn products_one(query: &[u8], codes: &[u8]) -> u32 {
        let mut sums = [_mm512_setzero_si512(); 2];
        for (n, (q, c)) in query.as_chunks::<64>().0.iter().zip(codes.as_chunks::<64>().0).enumerate() {
            // SAFETY: both are 64 bytes; unaligned loads.
            let (q, c) = unsafe { (_mm512_loadu_si512(q.as_ptr().cast()), _mm512_loadu_si512(c.as_ptr().cast())) };
            sums[n % 2] = _mm512_dpbusd_epi32(sums[n % 2], c, q);
        }
        _mm512_reduce_add_epi32(_mm512_add_epi32(sums[0], sums[1])) as u32
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;

    many!(squares, squares_one, super::as_long, "avx2");
    many!(products, products_one, super::as_long, "avx2");

    #[target_feature(enable = "avx2")]
    fn total(sums: __m256i) -> u32 {
        let four = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256::<1>(sums));
        let two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
        let one = _mm_add_epi32(two, _mm_shuffle_epi32::<1>(two));
        _mm_cvtsi128_si32(one) as u32
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn squares_one(query: &[u8], codes: &[u8]) -> u32 {
        let zero = _mm256_setzero_si256();
        let (mut even, mut odd) = (zero, zero);
        for (q, c) in query.as_chunks::<32>().0.iter().zip(codes.as_chunks::<32>().0) {
            // SAFETY: both are 32 bytes; unaligned loads.
            let (q, c) = unsafe { (_mm256_loadu_si256(q.as_ptr().cast()), _mm256_loadu_si256(c.as_ptr().cast())) };
            let apart = _mm256_or_si256(_mm256_subs_epu8(q, c), _mm256_subs_epu8(c, q));
            let (low, high) = (_mm256_unpacklo_epi8(apart, zero), _mm256_unpackhi_epi8(apart, zero));
            even = _mm256_add_epi32(even, _mm256_madd_epi16(low, low));
            odd = _mm256_add_epi32(odd, _mm256_madd_epi16(high, high));
        }
        total(_mm256_add_epi32(even, odd))
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn products_one(query: &[u8], codes: &[u8]) -> u32 {
        let mut sum = _mm256_setzero_si256();
        for (q, c) in query.as_chunks::<16>().0.iter().zip(codes.as_chunks::<16>().0) {
            // SAFETY: both are 16 bytes; unaligned loads.
            let (q, c) = unsafe { (_mm_loadu_si128(q.as_ptr().cast()), _mm_loadu_si128(c.as_ptr().cast())) };
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_cvtepi8_epi16(q), _mm256_cvtepu8_epi16(c)));
        }
        total(sum)
    }
}

mod scalar {
    use super::{products_one, squares_u8};

    many!(squares, squares_u8, super::as_long);
    many!(products, products_one, super::as_long);
}

/// The same sums, compiled into NEON's dot products of bytes.
#[cfg(target_arch = "aarch64")]
mod dotprod {
    use super::{products_one, squares_u8};

    many!(squares, squares_u8, super::as_long, "neon,dotprod");
    many!(products, products_one, super::as_long, "neon,dotprod");
}

/// Codes less 128 are signed bytes as the query's are: what compilers know as `sdot`.
#[inline(always)]
pub(super) fn products_one(query: &[u8], codes: &[u8]) -> u32 {
    let (sum, queries) = query.iter().zip(codes).fold((0i32, 0i32), |(sum, queries), (q, c)| {
        let (q, c) = (i32::from(*q as i8), i32::from((c ^ 0x80) as i8));
        (sum.wrapping_add(q * c), queries.wrapping_add(q))
    });
    sum.wrapping_add(128 * queries) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_variant_sums_alike() {
        let mut state = 7u64;
        let mut byte = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 40) as u8
        };
        for len in (1..=64).map(|n| n * PAD).chain([65_536]) {
            for extreme in [false, true] {
                let query: Vec<u8> = (0..len).map(|_| if extreme { 0x80 } else { byte() }).collect();
                let data: Vec<u8> = (0..len * 9).map(|_| if extreme { 0xff } else { byte() }).collect();
                let ids = [3, 0, 8, 8, 1, 2, 7, 5, 6, 4];
                for kernels in CodeKernels::available() {
                    let mut out = [0; 10];
                    kernels.many(Sum::Squares, &query, &data, &ids, &mut out);
                    for (id, got) in ids.iter().zip(out) {
                        let row = &data[*id as usize * len..][..len];
                        let wanted: u64 = query.iter().zip(row).map(|(q, c)| u64::from(q.abs_diff(*c)).pow(2)).sum();
                        assert_eq!(u64::from(got), wanted, "{} squares {len}", kernels.name);
                    }
                    kernels.many(Sum::Products, &query, &data, &ids, &mut out);
                    for (id, got) in ids.iter().zip(out) {
                        let row = &data[*id as usize * len..][..len];
                        let wanted: i64 = query.iter().zip(row).map(|(q, c)| i64::from(*q as i8) * i64::from(*c)).sum();
                        assert_eq!(i64::from(got as i32), wanted, "{} products {len}", kernels.name);
                    }
                }
            }
        }
    }
}
