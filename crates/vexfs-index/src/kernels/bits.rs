//! Hamming distances of packed bits: how many of two rows' bits differ; and how many bits of a filter are set.
//!
//! Rows are as long as they are, not padded. Results are whole numbers, at most 65,536.

use std::sync::OnceLock;

use super::codes::{as_long, many};

type One = unsafe fn(&[u8], &[u8]) -> u32;
type Many = unsafe fn(&[u8], &[u8], &[u32], &mut [u32]);
type Set = unsafe fn(&[u64]) -> usize;

/// The kernels of one instruction set.
pub struct BitKernels {
    #[cfg_attr(not(test), allow(dead_code, reason = "names the variant that a test found wrong"))]
    name: &'static str,
    one: One,
    many: Many,
    set: Set,
}

impl BitKernels {
    /// All variants that this machine can run, best first.
    pub fn available() -> Vec<BitKernels> {
        let mut all = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vpopcntdq")
            {
                all.push(BitKernels {
                    name: "avx512-vpopcntdq",
                    one: avx512::one,
                    many: avx512::many,
                    set: avx512::set,
                });
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("popcnt") {
                all.push(BitKernels { name: "avx2", one: avx2::one, many: avx2::many, set: avx2::set });
            }
        }
        #[cfg(target_arch = "aarch64")]
        if std::arch::is_aarch64_feature_detected!("dotprod") {
            all.push(BitKernels { name: "neon-dotprod", one: dotprod::one, many: dotprod::many, set: dotprod::set });
        }
        all.push(SCALAR);
        all
    }

    /// Of two rows of one length; what one has more is left out.
    #[inline]
    pub fn one(&self, one: &[u8], other: &[u8]) -> u32 {
        // SAFETY: `available` makes kernels only where the machine has their features.
        unsafe { (self.one)(one, other) }
    }

    /// Every id's row must lie in `data`: that is checked, an id beyond panics.
    #[inline]
    pub fn many(&self, query: &[u8], data: &[u8], ids: &[u32], out: &mut [u32]) {
        // SAFETY: as above.
        unsafe { (self.many)(query, data, ids, out) }
    }

    /// How many bits of `words` are set.
    pub fn set(&self, words: &[u64]) -> usize {
        // SAFETY: as above.
        unsafe { (self.set)(words) }
    }
}

const SCALAR: BitKernels = BitKernels { name: "scalar", one: scalar::one, many: scalar::many, set: scalar::set };

/// The best of this machine.
pub fn best() -> &'static BitKernels {
    static BEST: OnceLock<BitKernels> = OnceLock::new();
    BEST.get_or_init(|| BitKernels::available().into_iter().next().unwrap_or(SCALAR))
}

/// A count of set bits for the machine's features.
macro_rules! set {
    ($($features:literal)?) => {
        $(#[target_feature(enable = $features)])?
        pub(super) fn set(words: &[u64]) -> usize {
            words.iter().map(|word| word.count_ones() as usize).sum()
        }
    };
}
use set;

#[inline(always)]
fn words(one: &[u8], other: &[u8]) -> u32 {
    let ((one, one_tail), (other, other_tail)) = (one.as_chunks::<8>(), other.as_chunks::<8>());
    let whole = one.iter().zip(other).map(|(a, b)| (u64::from_le_bytes(*a) ^ u64::from_le_bytes(*b)).count_ones());
    let tail = one_tail.iter().zip(other_tail).map(|(a, b)| (a ^ b).count_ones());
    whole.sum::<u32>() + tail.sum::<u32>()
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    super::many!(many, one, super::as_long, "avx512f,avx512bw,avx512vpopcntdq");
    super::set!("avx512f,avx512bw,avx512vpopcntdq");

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vpopcntdq")]
    pub(super) fn one(one: &[u8], other: &[u8]) -> u32 {
        let n = one.len().min(other.len());
        let ((one, one_tail), (other, other_tail)) = (one[..n].as_chunks::<64>(), other[..n].as_chunks::<64>());
        let mut sum = _mm512_setzero_si512();
        for (a, b) in one.iter().zip(other) {
            // SAFETY: both are 64 bytes; unaligned loads.
            let (a, b) = unsafe { (_mm512_loadu_si512(a.as_ptr().cast()), _mm512_loadu_si512(b.as_ptr().cast())) };
            sum = _mm512_add_epi64(sum, _mm512_popcnt_epi64(_mm512_xor_si512(a, b)));
        }
        if !one_tail.is_empty() {
            let mask = (1u64 << one_tail.len()) - 1;
            // SAFETY: the mask covers the tails, which are equally long; masked-out bytes are not read.
            let (a, b) = unsafe {
                (
                    _mm512_maskz_loadu_epi8(mask, one_tail.as_ptr().cast()),
                    _mm512_maskz_loadu_epi8(mask, other_tail.as_ptr().cast()),
                )
            };
            sum = _mm512_add_epi64(sum, _mm512_popcnt_epi64(_mm512_xor_si512(a, b)));
        }
        _mm512_reduce_add_epi64(sum) as u32
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    super::many!(many, one, super::as_long, "avx2,popcnt");
    super::set!("avx2,popcnt");

    /// Compiled into the nibble look-up for long rows and `popcnt` for short ones.
    #[inline]
    #[target_feature(enable = "avx2,popcnt")]
    pub(super) fn one(one: &[u8], other: &[u8]) -> u32 {
        super::words(one, other)
    }
}

#[cfg(target_arch = "aarch64")]
mod dotprod {
    super::many!(many, one, super::as_long, "neon,dotprod");
    super::set!("neon");

    /// Compiled into counts of each byte and their sums by `udot`.
    #[inline]
    #[target_feature(enable = "neon,dotprod")]
    pub(super) fn one(one: &[u8], other: &[u8]) -> u32 {
        one.iter().zip(other).map(|(a, b)| (a ^ b).count_ones()).sum()
    }
}

mod scalar {
    super::many!(many, one, super::as_long);
    super::set!();

    pub(super) fn one(one: &[u8], other: &[u8]) -> u32 {
        super::words(one, other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_variant_counts_alike() {
        let mut state = 3u64;
        let mut byte = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 40) as u8
        };
        // All rows of 1 to 4,096 bits, and the longest.
        for len in (1..=512).chain([8_192]) {
            let query: Vec<u8> = (0..len).map(|_| byte()).collect();
            let mut data: Vec<u8> = (0..len * 4).map(|_| byte()).collect();
            data.extend(query.iter().map(|byte| !byte));
            let ids = [3, 0, 4, 4, 1, 2, 0, 3, 1];
            for kernels in BitKernels::available() {
                let mut out = [0; 9];
                kernels.many(&query, &data, &ids, &mut out);
                for (id, got) in ids.iter().zip(out) {
                    let row = &data[*id as usize * len..][..len];
                    let bits = |row: &[u8], at: usize| row[at / 8] >> (at % 8) & 1;
                    let wanted = (0..len * 8).filter(|at| bits(&query, *at) != bits(row, *at)).count() as u32;
                    assert_eq!(got, wanted, "{} {len}", kernels.name);
                    assert_eq!(kernels.one(&query, row), wanted, "{} {len}", kernels.name);
                    let words: Vec<u64> = row.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word)).collect();
                    let set = (0..words.len() * 64).filter(|at| bits(row, *at) == 1).count();
                    assert_eq!(kernels.set(&words), set, "{} {len}", kernels.name);
                }
            }
        }
    }
}
