//! Sums over rows of halves (IEEE 754 binary16), against halves or against the bytes of f32, widened as they are read.

use half::f16;

/// Of two rows: products, or squared differences.
pub type Sum = unsafe fn(&[u8], &[u8]) -> f32;

/// The four sums of one instruction set.
#[derive(Copy, Clone)]
pub struct Halves {
    pub dot: Sum,
    pub l2: Sum,
    /// The first row is of f32.
    pub dot_wide: Sum,
    pub l2_wide: Sum,
}

pub const SCALAR: Halves = Halves {
    dot: scalar::<false, false>,
    l2: scalar::<false, true>,
    dot_wide: scalar::<true, false>,
    l2_wide: scalar::<true, true>,
};

fn scalar<const WIDE: bool, const SQUARES: bool>(x: &[u8], row: &[u8]) -> f32 {
    let number = |at: usize| match WIDE {
        true => x.as_chunks::<4>().0.get(at).map_or(0.0, |b| f32::from_le_bytes(*b)),
        false => x.as_chunks::<2>().0.get(at).map_or(0.0, |b| f16::from_le_bytes(*b).to_f32()),
    };
    // Several sums, as small numbers get lost beside one large one.
    let mut lanes = [0f32; 16];
    for (at, half) in row.as_chunks::<2>().0.iter().enumerate() {
        let (a, b) = (number(at), f16::from_le_bytes(*half).to_f32());
        lanes[at % 16] += if SQUARES { (a - b) * (a - b) } else { a * b };
    }
    lanes.iter().sum()
}

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! halves {
    ($module:ident, $from:path, $features:literal, $lanes:literal, $load:ident, $widen:ident, $floats:ident, $zero:ident, $sub:ident,
     $fma:ident, $add:ident) => {
        pub mod $module {
            use $from::*;

            use super::Halves;

            pub const HALVES: Halves = Halves {
                dot: sum::<false, false>,
                l2: sum::<false, true>,
                dot_wide: sum::<true, false>,
                l2_wide: sum::<true, true>,
            };

            #[target_feature(enable = $features)]
            fn sum<const WIDE: bool, const SQUARES: bool>(x: &[u8], row: &[u8]) -> f32 {
                const ROW: usize = $lanes * 2;
                let size = if WIDE { ROW * 2 } else { ROW };
                let mut sums = [$zero(); 2];
                let mut pieces = x.chunks_exact(size).zip(row.chunks_exact(ROW));
                let add = |sum, x: *const u8, row: *const u8| {
                    // SAFETY: the callers below hand over `size` and `ROW` bytes; unaligned loads.
                    let (a, b) = unsafe {
                        let b = $widen($load(row.cast()));
                        (if WIDE { $floats(x.cast()) } else { $widen($load(x.cast())) }, b)
                    };
                    if SQUARES {
                        let apart = $sub(a, b);
                        $fma(apart, apart, sum)
                    } else {
                        $fma(a, b, sum)
                    }
                };
                for (n, (x, row)) in pieces.by_ref().enumerate() {
                    sums[n % 2] = add(sums[n % 2], x.as_ptr(), row.as_ptr());
                }
                let whole = (x.len() / size).min(row.len() / ROW);
                let (x, row) = (&x[whole * size..], &row[whole * ROW..]);
                if !row.is_empty() {
                    // Zeros count for nothing in either sum.
                    let (mut last_x, mut last) = ([0u8; ROW * 2], [0u8; ROW]);
                    last_x[..x.len().min(ROW * 2)].copy_from_slice(&x[..x.len().min(ROW * 2)]);
                    last[..row.len().min(ROW)].copy_from_slice(&row[..row.len().min(ROW)]);
                    sums[0] = add(sums[0], last_x.as_ptr(), last.as_ptr());
                }
                let mut lanes = [0f32; $lanes];
                // SAFETY: room for all lanes; both are plain numbers.
                unsafe { std::ptr::write_unaligned(lanes.as_mut_ptr().cast(), $add(sums[0], sums[1])) };
                lanes.iter().sum()
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
halves!(
    avx512,
    std::arch::x86_64,
    "avx512f,avx512bw,avx512vl,f16c,fma",
    16,
    _mm256_loadu_si256,
    _mm512_cvtph_ps,
    _mm512_loadu_ps,
    _mm512_setzero_ps,
    _mm512_sub_ps,
    _mm512_fmadd_ps,
    _mm512_add_ps
);
#[cfg(target_arch = "x86_64")]
halves!(
    avx2,
    std::arch::x86_64,
    "avx2,fma,f16c",
    8,
    _mm_loadu_si128,
    _mm256_cvtph_ps,
    _mm256_loadu_ps,
    _mm256_setzero_ps,
    _mm256_sub_ps,
    _mm256_fmadd_ps,
    _mm256_add_ps
);
#[cfg(target_arch = "aarch64")]
pub use neon as dotprod;
#[cfg(target_arch = "aarch64")]
halves!(neon, super::of_neon, "neon", 4, load, widen, vld1q_f32, zero, vsubq_f32, fma, vaddq_f32);

/// NEON's instructions in the shape of the others'.
#[cfg(target_arch = "aarch64")]
mod of_neon {
    pub use std::arch::aarch64::*;

    #[inline]
    #[target_feature(enable = "neon")]
    pub unsafe fn load(halves: *const u16) -> float16x4_t {
        // SAFETY: the caller's four halves.
        vreinterpret_f16_u16(unsafe { vld1_u16(halves) })
    }
    #[inline]
    #[target_feature(enable = "neon")]
    pub fn widen(halves: float16x4_t) -> float32x4_t {
        vcvt_f32_f16(halves)
    }
    #[inline]
    #[target_feature(enable = "neon")]
    pub fn zero() -> float32x4_t {
        vdupq_n_f32(0.0)
    }
    #[inline]
    #[target_feature(enable = "neon")]
    pub fn fma(a: float32x4_t, b: float32x4_t, sum: float32x4_t) -> float32x4_t {
        vfmaq_f32(sum, a, b)
    }
}
