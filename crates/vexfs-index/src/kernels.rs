//! Distance kernels.
//!
//! Each kernel is written once as a plain loop and compiled for several instruction sets; which one runs is decided
//! once, at run time. The exceptions are written by hand: sums over codes on x86, as no loop is compiled into VNNI's
//! instruction, which is worth 2 to 4 times, sums over halves, as none is into the one that widens them, and over signs.
#![allow(unsafe_code)]

pub mod bits;
pub mod codes;
mod halves;
pub mod narrow;

use std::sync::OnceLock;

use crate::space::{Element, Metric, Space, pack};

#[cfg(test)]
mod tests;

/// Sums of terms; `FUSED` where the machine multiplies and adds in one instruction.
#[inline(always)]
fn sum_f32<const FUSED: bool>(x: &[u8], row: &[u8], factors: impl Fn(f32, f32) -> (f32, f32)) -> f32 {
    const LANES: usize = 32;
    let (xs, rows) = (x.as_chunks::<4>().0, row.as_chunks::<4>().0);
    let add = |sum: f32, x: [u8; 4], row: [u8; 4]| {
        let (a, b) = factors(f32::from_le_bytes(x), f32::from_le_bytes(row));
        if FUSED { a.mul_add(b, sum) } else { sum + a * b }
    };
    let mut lanes = [0f32; LANES];
    let n = xs.len().min(rows.len());
    let whole = n / LANES * LANES;
    for (x, row) in xs[..whole].chunks_exact(LANES).zip(rows[..whole].chunks_exact(LANES)) {
        for lane in 0..LANES {
            lanes[lane] = add(lanes[lane], x[lane], row[lane]);
        }
    }
    xs[whole..n].iter().zip(&rows[whole..n]).fold(lanes.iter().sum(), |sum, (x, row)| add(sum, *x, *row))
}

#[inline(always)]
fn dot_f32_body<const FUSED: bool>(x: &[u8], row: &[u8]) -> f32 {
    sum_f32::<FUSED>(x, row, |a, b| (a, b))
}
#[inline(always)]
fn l2_f32_body<const FUSED: bool>(x: &[u8], row: &[u8]) -> f32 {
    sum_f32::<FUSED>(x, row, |a, b| (a - b, a - b))
}

/// Sums of products of bytes' factors, as an i32 in a u32's bits where they are signed: at most 255² × 65,536, which a
/// u32 holds.
#[inline(always)]
fn sum_bytes(x: &[u8], row: &[u8], factors: impl Fn(u8, u8) -> (i16, i16)) -> u32 {
    const LANES: usize = 16;
    let term = |x: u8, row: u8| {
        let (a, b) = factors(x, row);
        (i32::from(a) * i32::from(b)) as u32
    };
    if cfg!(target_arch = "aarch64") {
        // What is compiled into a dot product of bytes.
        return x.iter().zip(row).fold(0, |sum: u32, (x, row)| sum.wrapping_add(term(*x, *row)));
    }
    let n = x.len().min(row.len());
    let ((x, x_tail), (row, row_tail)) = (x[..n].as_chunks::<{ 2 * LANES }>(), row[..n].as_chunks::<{ 2 * LANES }>());
    let mut lanes = [0u32; LANES];
    for (x, row) in x.iter().zip(row) {
        for lane in 0..LANES {
            // Two terms a lane: what is compiled into `pmaddwd`.
            let two = term(x[lane], row[lane]).wrapping_add(term(x[LANES + lane], row[LANES + lane]));
            lanes[lane] = lanes[lane].wrapping_add(two);
        }
    }
    let tail = x_tail.iter().zip(row_tail).map(|(x, row)| term(*x, *row));
    tail.chain(lanes).fold(0, u32::wrapping_add)
}

#[inline(always)]
fn dot_u8_body(x: &[u8], row: &[u8]) -> i64 {
    sum_bytes(x, row, |a, b| (a.into(), b.into())).into()
}
#[inline(always)]
fn dot_i8_body(x: &[u8], row: &[u8]) -> i64 {
    (sum_bytes(x, row, |a, b| ((a as i8).into(), (b as i8).into())) as i32).into()
}
// NEON's differences of bytes are bytes without a sign: what compilers know as `uabd` and `sabd`.
#[inline(always)]
fn squares_u8(x: &[u8], row: &[u8]) -> u32 {
    let apart = |a: u8, b: u8| match cfg!(target_arch = "aarch64") {
        true => i16::from(a.max(b) - a.min(b)),
        false => i16::from(a) - i16::from(b),
    };
    sum_bytes(x, row, |a, b| (apart(a, b), apart(a, b)))
}
#[inline(always)]
fn l2_u8_body(x: &[u8], row: &[u8]) -> i64 {
    squares_u8(x, row).into()
}
#[inline(always)]
fn l2_i8_body(x: &[u8], row: &[u8]) -> i64 {
    let apart = |a: i8, b: i8| match cfg!(target_arch = "aarch64") {
        true => i16::from(a.abs_diff(b)),
        false => i16::from(a) - i16::from(b),
    };
    sum_bytes(x, row, |a, b| (apart(a as i8, b as i8), apart(a as i8, b as i8))).into()
}

/// The kernels of one instruction set.
pub struct Kernels {
    name: &'static str,
    dot_f32: unsafe fn(&[u8], &[u8]) -> f32,
    l2_f32: unsafe fn(&[u8], &[u8]) -> f32,
    dot_u8: unsafe fn(&[u8], &[u8]) -> i64,
    l2_u8: unsafe fn(&[u8], &[u8]) -> i64,
    dot_i8: unsafe fn(&[u8], &[u8]) -> i64,
    l2_i8: unsafe fn(&[u8], &[u8]) -> i64,
    halves: halves::Halves,
}

macro_rules! variant {
    ($module:ident, $name:literal, $features:literal) => {
        mod $module {
            use super::*;

            #[target_feature(enable = $features)]
            fn dot_f32(x: &[u8], row: &[u8]) -> f32 {
                dot_f32_body::<true>(x, row)
            }
            #[target_feature(enable = $features)]
            fn l2_f32(x: &[u8], row: &[u8]) -> f32 {
                l2_f32_body::<true>(x, row)
            }
            #[target_feature(enable = $features)]
            fn dot_u8(x: &[u8], row: &[u8]) -> i64 {
                dot_u8_body(x, row)
            }
            #[target_feature(enable = $features)]
            fn l2_u8(x: &[u8], row: &[u8]) -> i64 {
                l2_u8_body(x, row)
            }
            #[target_feature(enable = $features)]
            fn dot_i8(x: &[u8], row: &[u8]) -> i64 {
                dot_i8_body(x, row)
            }
            #[target_feature(enable = $features)]
            fn l2_i8(x: &[u8], row: &[u8]) -> i64 {
                l2_i8_body(x, row)
            }

            pub(super) static KERNELS: Kernels =
                Kernels { name: $name, dot_f32, l2_f32, dot_u8, l2_u8, dot_i8, l2_i8, halves: halves::$module::HALVES };
        }
    };
}

#[cfg(target_arch = "x86_64")]
variant!(avx512, "avx512-vnni", "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c");
#[cfg(target_arch = "x86_64")]
variant!(avx2, "avx2", "avx2,fma,f16c");
#[cfg(target_arch = "aarch64")]
variant!(dotprod, "neon-dotprod", "neon,dotprod");
#[cfg(target_arch = "aarch64")]
variant!(neon, "neon", "neon");

static SCALAR: Kernels = Kernels {
    name: "scalar",
    dot_f32: dot_f32_body::<false>,
    l2_f32: l2_f32_body::<false>,
    dot_u8: dot_u8_body,
    l2_u8: l2_u8_body,
    dot_i8: dot_i8_body,
    l2_i8: l2_i8_body,
    halves: halves::SCALAR,
};

/// The kernels that this machine can run, best first.
fn available() -> Vec<&'static Kernels> {
    let mut all = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        let avx2 =
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        if avx2
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vnni")
        {
            all.push(&avx512::KERNELS);
        }
        if avx2 {
            all.push(&avx2::KERNELS);
        }
    }
    #[cfg(target_arch = "aarch64")]
    {
        if std::arch::is_aarch64_feature_detected!("dotprod") {
            all.push(&dotprod::KERNELS);
        }
        if std::arch::is_aarch64_feature_detected!("neon") {
            all.push(&neon::KERNELS);
        }
    }
    all.push(&SCALAR);
    all
}

fn best() -> &'static Kernels {
    static BEST: OnceLock<&'static Kernels> = OnceLock::new();
    BEST.get_or_init(|| available().first().copied().unwrap_or(&SCALAR))
}

/// The name of the instruction set in use.
pub fn name() -> &'static str {
    best().name
}

/// Asks for a cache line ahead of its use; any address will do.
#[inline(always)]
pub fn prefetch(bytes: &[u8], at: usize) {
    ask_for(bytes.as_ptr().wrapping_add(at));
}

/// Asks for the cache line of a word ahead of its use.
#[inline(always)]
pub fn prefetch_word(words: &[std::sync::atomic::AtomicU32], at: usize) {
    ask_for(words.as_ptr().wrapping_add(at).cast());
}

/// Asks for the cache lines of a row ahead of its use; the later ones of a long row are fetched by the machine itself.
#[inline(always)]
pub fn prefetch_row(row: &[u8]) {
    (0..row.len().min(1024)).step_by(64).for_each(|at| prefetch(row, at));
}

/// The items in their order, each asked for while `many` before it are worked on: memory is the price of most walks.
#[inline(always)]
pub fn asked_ahead<'a, T>(items: &'a [T], many: usize, ask: impl Fn(&T) + 'a) -> impl Iterator<Item = &'a T> {
    items.iter().take(many).for_each(&ask);
    items.iter().enumerate().map(move |(at, item)| {
        if let Some(later) = items.get(at + many) {
            ask(later);
        }
        item
    })
}

#[inline(always)]
fn ask_for(at: *const u8) {
    // SAFETY (both): a prefetch never faults, whatever the address.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(at.cast());
    }
    #[cfg(target_arch = "aarch64")]
    unsafe {
        std::arch::asm!("prfm pldl1keep, [{at}]", at = in(reg) at, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = at;
}

/// Distance between two rows of a space.
pub fn between(space: &Space, one: &[u8], other: &[u8]) -> f32 {
    rows(best(), space, one, other)
}

fn rows(kernels: &Kernels, space: &Space, one: &[u8], other: &[u8]) -> f32 {
    let cosine = |dot: i64, square: unsafe fn(&[u8], &[u8]) -> i64| {
        // SAFETY: as below.
        let lengths = unsafe { square(one, one) as f64 * square(other, other) as f64 };
        1.0 - (dot as f64 / lengths.sqrt()) as f32
    };
    // SAFETY (all): a `Kernels` is handed out only where the machine has its features.
    unsafe {
        match (space.element(), space.metric()) {
            // Of bits as numbers 0 and 1 hamming is l2.
            (Element::Bits, _) => bits::best().one(one, other) as f32,
            (Element::F32, Metric::L2 | Metric::Hamming) => (kernels.l2_f32)(one, other),
            (Element::F32, Metric::InnerProduct) => -(kernels.dot_f32)(one, other),
            (Element::F32, Metric::Cosine) => 1.0 - (kernels.dot_f32)(one, other),
            (Element::U8, Metric::L2 | Metric::Hamming) => (kernels.l2_u8)(one, other) as f32,
            (Element::U8, Metric::InnerProduct) => -((kernels.dot_u8)(one, other) as f32),
            (Element::U8, Metric::Cosine) => cosine((kernels.dot_u8)(one, other), kernels.dot_u8),
            (Element::I8, Metric::L2 | Metric::Hamming) => (kernels.l2_i8)(one, other) as f32,
            (Element::I8, Metric::InnerProduct) => -((kernels.dot_i8)(one, other) as f32),
            (Element::I8, Metric::Cosine) => cosine((kernels.dot_i8)(one, other), kernels.dot_i8),
            (Element::F16, Metric::L2) => (kernels.halves.l2)(one, other),
            (Element::F16, metric) => from_dot(metric, (kernels.halves.dot)(one, other)),
        }
    }
}

fn from_dot(metric: Metric, dot: f32) -> f32 {
    if metric == Metric::Cosine { 1.0 - dot } else { -dot }
}

/// How a query is compared with rows.
#[derive(Copy, Clone)]
enum Numbers {
    /// As a row of the space.
    Row,
    /// As the bytes of f32, against halves.
    Wide,
    /// With fractions, against integers.
    Fraction,
}

/// A query ready to be compared with many rows at full precision.
pub struct Prepared {
    space: Space,
    numbers: Numbers,
    query: Vec<f32>,
    /// What is compared, unless there are fractions.
    bytes: Vec<u8>,
    /// The query's length.
    length: f32,
    kernels: &'static Kernels,
}

impl Prepared {
    /// `query` has passed [`Space::check_query`].
    pub fn new(space: &Space, query: &[f32]) -> Prepared {
        Prepared::again(None, space, query)
    }

    /// The same, in the memory of an earlier one.
    pub fn again(earlier: Option<Prepared>, space: &Space, query: &[f32]) -> Prepared {
        Prepared::with(best(), earlier, space, query)
    }

    fn with(kernels: &'static Kernels, earlier: Option<Prepared>, space: &Space, query: &[f32]) -> Prepared {
        let (mut numbers, mut bytes) = earlier.map_or_else(Default::default, |earlier| (earlier.query, earlier.bytes));
        numbers.clear();
        numbers.extend_from_slice(query);
        bytes.clear();
        let length = query.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>().sqrt();
        let whole = |low: f32, high: f32| query.iter().all(|v| v.fract() == 0.0 && (low..=high).contains(v));
        let kind = match space.element() {
            Element::F32 | Element::F16 => {
                let scale = if space.metric() == Metric::Cosine { 1.0 / length } else { 1.0 };
                bytes.extend(query.iter().flat_map(|v| ((f64::from(*v) * scale) as f32).to_le_bytes()));
                if space.element() == Element::F32 { Numbers::Row } else { Numbers::Wide }
            }
            Element::U8 if whole(0.0, 255.0) => {
                bytes.extend(query.iter().map(|v| *v as u8));
                Numbers::Row
            }
            Element::I8 if whole(-128.0, 127.0) => {
                bytes.extend(query.iter().map(|v| *v as i8 as u8));
                Numbers::Row
            }
            Element::Bits => {
                bytes.resize(space.row_bytes(), 0);
                pack(query, &mut bytes);
                Numbers::Row
            }
            Element::U8 | Element::I8 => Numbers::Fraction,
        };
        Prepared { space: *space, numbers: kind, query: numbers, bytes, length: length as f32, kernels }
    }

    /// What was asked.
    pub fn query(&self) -> &[f32] {
        &self.query
    }

    /// Distance to a row of the space.
    pub fn distance(&self, row: &[u8]) -> f32 {
        match self.numbers {
            Numbers::Row => rows(self.kernels, &self.space, &self.bytes, row),
            Numbers::Wide => {
                let halves = &self.kernels.halves;
                // SAFETY: a `Kernels` is handed out only where the machine has its features.
                match self.space.metric() {
                    Metric::L2 => unsafe { (halves.l2_wide)(&self.bytes, row) },
                    metric => from_dot(metric, unsafe { (halves.dot_wide)(&self.bytes, row) }),
                }
            }
            Numbers::Fraction => self.fraction(row),
        }
    }

    fn fraction(&self, row: &[u8]) -> f32 {
        let signed = self.space.element() == Element::I8;
        let number = |b: u8| {
            if signed { f32::from(b as i8) } else { f32::from(b) }
        };
        let pairs = || self.query.iter().zip(row).map(|(x, b)| (*x, number(*b)));
        match self.space.metric() {
            Metric::L2 | Metric::Hamming => pairs().map(|(x, y)| (x - y) * (x - y)).sum(),
            Metric::InnerProduct => -pairs().map(|(x, y)| x * y).sum::<f32>(),
            Metric::Cosine => {
                let square: f32 = row.iter().map(|b| number(*b) * number(*b)).sum();
                1.0 - pairs().map(|(x, y)| x * y).sum::<f32>() / (self.length * square.sqrt())
            }
        }
    }
}
