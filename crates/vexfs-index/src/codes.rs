//! Codes of rows: what a sealed graph is walked on.
//!
//! *Bytes*: one scale serves all rows and dimensions, so a record is codes and nothing else, and distances between
//! codes are whole numbers: code = round((value − centre) / scale) + 128. u8 and i8 under L2, and bits, are their own codes,
//! exactly. *Nibbles*: the same with 4 bits, after a rotation. *Signs*: after a rotation one bit a number, with two
//! factors of the row's own that make the estimate unbiased (RaBitQ, Gao & Long, SIGMOD 2024, arXiv 2405.12497).
//! Under L2 and cosine the centre is the rows' mean, which changes no order.

mod rotation;

use crate::kernels::codes::{PAD, Sum};
use crate::kernels::narrow::{Narrow, TAIL};
use crate::kernels::{bits, codes, narrow};
use crate::space::{Element, Metric, Space, pack};
use rotation::rotate;

/// How a number is written.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Width {
    /// 8 bits.
    Byte = 0,
    /// 4 bits.
    Nibble = 1,
    /// 1 bit.
    Sign = 2,
}

/// How a set of rows is coded.
#[derive(Clone)]
pub struct Coder {
    space: Space,
    width: Width,
    /// 0 where the rows' bytes are the codes; 1 for signs, which have none.
    scale: f32,
    /// By dimension, or empty.
    centre: Vec<f32>,
}

/// A query against codes: smaller keys are nearer.
#[derive(Default)]
pub struct CodedQuery {
    bytes: Vec<u8>,
    sum: Option<Kind>,
    /// Signed bytes' sum.
    total: i32,
    /// Signs: what a unit of the query's bytes counts for in a key.
    step: f32,
    /// The key of what is at no distance, as a number; NaN where nothing is nearest.
    zero: f64,
    /// Bytes: how far a key may be off by rounding, three and a half standard deviations, for one of 1.
    error: f32,
}

/// What the keys of a coded query are.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Keyed {
    /// The distances.
    Exactly,
    /// Off by rounding.
    Nearly,
    /// Of no use: the query lies so far outside of what codes can say that more is cut off it than rounding takes.
    Outside,
}

#[derive(Copy, Clone, PartialEq)]
enum Kind {
    Bytes(Sum),
    Nibbles(Sum),
    /// Distances, or else products.
    Signs(Sum),
    /// Bits that differ.
    Bits,
}

/// Values that the scale is fitted to.
const SAMPLED: usize = 1 << 20;
/// Reach of nibbles in standard deviations of what is rotated, which is nearly normal.
const NIBBLE_REACH: f32 = 2.7;

impl Coder {
    /// For these rows.
    pub fn fit(space: &Space, rows: &[u8], width: Width) -> Coder {
        let mut coder = Coder { space: *space, width, scale: 1.0, centre: Vec::new() };
        if coder.could_be_exact() {
            coder.scale = 0.0;
            return coder;
        }
        let count = (rows.len() / space.row_bytes()).max(1);
        let step = (count / (SAMPLED / space.dim()).max(256)).max(1);
        let sample: Vec<&[u8]> = rows.chunks_exact(space.row_bytes()).step_by(step).collect();
        let mut values = Vec::new();
        if space.metric() != Metric::InnerProduct {
            let mut sums = vec![0f64; space.dim()];
            for row in &sample {
                numbers(space, row, &mut values);
                for (sum, value) in sums.iter_mut().zip(&values) {
                    *sum += f64::from(*value);
                }
            }
            coder.centre = sums.iter().map(|sum| (sum / sample.len().max(1) as f64) as f32).collect();
        }
        if width == Width::Sign {
            return coder;
        }
        let mut sizes = Vec::with_capacity(sample.len() * coder.padded());
        for row in &sample {
            numbers(space, row, &mut values);
            coder.place(&mut values);
            sizes.extend(values.iter().map(|v| v.abs()));
        }
        let most = sizes.iter().fold(0f32, |most, size| most.max(*size));
        // A few far-off values must not make all codes coarse; under inner product they are what is searched for.
        let reach = if space.metric() == Metric::InnerProduct || sizes.is_empty() {
            most
        } else if width == Width::Nibble {
            let square: f64 = sizes.iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
            most.min((square / sizes.len() as f64).sqrt() as f32 * NIBBLE_REACH)
        } else {
            let at = (sizes.len() - 1) - sizes.len() / 2_000;
            let (_, usual, _) = sizes.select_nth_unstable_by(at, f32::total_cmp);
            most.min(*usual * 1.5)
        };
        coder.scale = if reach > 0.0 && (reach / 127.0).is_normal() { reach / 127.0 } else { 1.0 };
        coder
    }

    fn could_be_exact(&self) -> bool {
        if self.space.element() == Element::Bits {
            return true;
        }
        let bytes = matches!(self.space.element(), Element::I8 | Element::U8);
        self.width == Width::Byte && self.space.metric() == Metric::L2 && bytes
    }

    /// From stored bytes; `None` if they are not such a coder of the space.
    pub fn from_bytes(space: &Space, width: Width, bytes: &[u8]) -> Option<Coder> {
        let values: Vec<f32> = bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        if bytes.len() != values.len() * 4 || !values.iter().all(|v| v.is_finite()) {
            return None;
        }
        let (scale, centre) = values.split_first()?;
        let coder = Coder { space: *space, width, scale: *scale, centre: centre.to_vec() };
        let exact = coder.could_be_exact();
        let wanted = if exact || space.metric() == Metric::InnerProduct { 0 } else { space.dim() };
        let fits = centre.len() == wanted && if exact { *scale == 0.0 } else { *scale > 0.0 };
        fits.then_some(coder)
    }

    /// What `from_bytes` reads.
    pub fn to_bytes(&self) -> Vec<u8> {
        std::iter::once(&self.scale).chain(&self.centre).flat_map(|value| value.to_le_bytes()).collect()
    }

    /// How numbers are written.
    pub fn width(&self) -> Width {
        self.width
    }

    /// Are the rows' own bytes the codes?
    pub fn is_exact(&self) -> bool {
        self.scale == 0.0
    }

    /// Numbers of a query's code.
    fn padded(&self) -> usize {
        let to = if self.width == Width::Nibble { 2 * PAD } else { PAD };
        self.space.dim().next_multiple_of(to)
    }

    /// Bytes of a coded row.
    pub fn stride(&self) -> usize {
        match self.width {
            _ if self.space.element() == Element::Bits => self.space.row_bytes(),
            Width::Byte => self.padded(),
            Width::Nibble => narrow::nibbles(self.padded()),
            Width::Sign => narrow::signs(self.padded()),
        }
    }

    /// From numbers to what is coded: less the centre, and rotated where the width asks for it.
    fn place(&self, values: &mut Vec<f32>) {
        values.iter_mut().zip(&self.centre).for_each(|(value, centre)| *value -= centre);
        if self.width != Width::Byte {
            values.resize(self.padded(), 0.0);
            rotate(values);
        }
    }

    /// Writes the codes of a row; `out` is [`Coder::stride`] long and zeroed.
    pub fn encode(&self, row: &[u8], values: &mut Vec<f32>, out: &mut [u8]) {
        if self.is_exact() {
            let flip = if self.space.element() == Element::I8 { 0x80 } else { 0 };
            for (out, byte) in out.iter_mut().zip(row) {
                *out = byte ^ flip;
            }
            return;
        }
        numbers(&self.space, row, values);
        self.place(values);
        match self.width {
            Width::Byte => {
                self.quantise(values, out);
            }
            Width::Nibble => {
                for (at, value) in values.iter().enumerate() {
                    // The cast saturates below.
                    let nibble = ((value / self.scale + 127.5) / 17.0).round().min(15.0) as u8;
                    out[at / 128 * 64 + at % 64] |= nibble << (at % 128 / 64 * 4);
                }
            }
            Width::Sign => {
                let (mut square, mut sum) = (0f64, 0f64);
                for (at, value) in values.iter().enumerate() {
                    out[at / 8] |= u8::from(*value > 0.0) << (at % 8);
                    square += f64::from(*value) * f64::from(*value);
                    sum += f64::from(value.abs());
                }
                let factor = if sum > 0.0 { square / sum } else { 0.0 };
                let tail = out.len() - TAIL;
                out[tail..tail + 4].copy_from_slice(&(square as f32).to_le_bytes());
                out[tail + 4..].copy_from_slice(&(factor as f32).to_le_bytes());
            }
        }
    }

    /// Returns the square of what was cut off.
    fn quantise(&self, values: &[f32], out: &mut [u8]) -> f32 {
        let (inverse, centre) = match (self.is_exact(), self.width) {
            (true, _) => (1.0, if self.space.element() == Element::I8 { 128.0 } else { 0.0 }),
            (false, Width::Nibble) => (1.0 / self.scale, 127.5),
            (false, _) => (1.0 / self.scale, 128.0),
        };
        let mut cut = 0.0;
        for (out, value) in out.iter_mut().zip(values) {
            let code = (value * inverse + centre + 0.5).floor();
            // The cast saturates.
            *out = code as u8;
            cut += (code - f32::from(*out)).powi(2);
        }
        cut
    }

    /// Makes `out` a query against codes.
    pub fn query(&self, query: &[f32], values: &mut Vec<f32>, out: &mut CodedQuery) -> Keyed {
        out.bytes.clear();
        out.zero = if self.space.metric() == Metric::InnerProduct { f64::NAN } else { 0.0 };
        if self.space.element() == Element::Bits {
            out.sum = Some(Kind::Bits);
            out.bytes.resize(self.stride(), 0);
            pack(query, &mut out.bytes);
            return Keyed::Exactly;
        }
        out.bytes.resize(self.padded(), 0);
        values.clear();
        values.extend_from_slice(query);
        let squares = self.space.metric() == Metric::L2;
        if squares && self.is_exact() {
            out.sum = Some(Kind::Bytes(Sum::Squares));
            let cut = self.quantise(values, &mut out.bytes);
            let exact = cut == 0.0 && values.iter().all(|value| value.fract() == 0.0);
            // Only a query with fractions is rounded.
            out.error = if exact { 0.0 } else { 3.5 };
            return if exact { Keyed::Exactly } else { self.keyed(cut) };
        }
        if !squares && self.width == Width::Byte {
            // Products with what is not centred: the centre's own product is the same for all rows.
            out.sum = Some(Kind::Bytes(Sum::Products));
            let unit = out.signed(values);
            if self.space.metric() == Metric::Cosine {
                // Of the row that points where the query does.
                let centre = dot(values, &self.centre);
                let product = (dot(values, values).sqrt() - centre) / f64::from(self.scale * unit);
                out.zero = f64::from(i32::MAX) - product;
            }
            return Keyed::Nearly;
        }
        if self.space.metric() == Metric::Cosine {
            normalise(values);
        }
        if self.space.metric() == Metric::InnerProduct {
            values.resize(self.padded(), 0.0);
            rotate(values);
        } else {
            self.place(values);
        }
        let sum = if self.space.metric() == Metric::InnerProduct { Sum::Products } else { Sum::Squares };
        let cut = match self.width {
            Width::Byte => {
                out.sum = Some(Kind::Bytes(Sum::Squares));
                out.error = 3.5;
                self.quantise(values, &mut out.bytes)
            }
            Width::Nibble => {
                out.sum = Some(Kind::Nibbles(sum));
                match sum {
                    Sum::Squares => self.quantise(values, &mut out.bytes),
                    Sum::Products => {
                        out.signed(values);
                        0.0
                    }
                }
            }
            Width::Sign => {
                out.sum = Some(Kind::Signs(sum));
                let unit = out.signed(values);
                out.zero -= dot(values, values);
                out.step = if sum == Sum::Squares { 2.0 * unit } else { unit };
                0.0
            }
        };
        self.keyed(cut)
    }

    /// What keys are where the square of what was cut off a query is `cut`.
    fn keyed(&self, cut: f32) -> Keyed {
        let step = if self.width == Width::Nibble { 17.0 } else { 1.0 };
        let rounding = step * step / 12.0 * self.space.dim() as f32;
        if cut > rounding { Keyed::Outside } else { Keyed::Nearly }
    }

    /// The divisor of what is added to a distance between two neighbours before one crowds the other out: a tenth
    /// where keys are distances, which finds 0.5 to 1 percentage point more on SIFT for the same ef; nothing where
    /// they are products, which have no zero.
    pub fn slack(&self) -> u32 {
        if self.space.metric() == Metric::InnerProduct { u32::MAX } else { 10 }
    }

    /// Makes `out` a query of a row coded in bytes, to compare it with others while a graph is built.
    pub fn query_of(&self, codes: &[u8], out: &mut CodedQuery) {
        out.bytes.clear();
        if self.space.metric() == Metric::InnerProduct {
            out.sum = Some(Kind::Bytes(Sum::Products));
            out.bytes.extend(codes.iter().map(|code| code ^ 0x80));
            // The padding is zero in codes and −128 as signed bytes: times zero it counts for nothing, but not here.
            let sum: i32 = out.bytes.iter().take(self.space.dim()).map(|code| i32::from(*code as i8)).sum();
            out.total = sum;
        } else if self.space.element() == Element::Bits {
            out.sum = Some(Kind::Bits);
            out.bytes.extend_from_slice(codes);
        } else {
            // Rows of one length are ordered by their differences as by their products.
            out.sum = Some(Kind::Bytes(Sum::Squares));
            out.bytes.extend_from_slice(codes);
        }
    }
}

impl CodedQuery {
    /// Fills in signed bytes, their sum and error; returns what a unit of them is worth.
    fn signed(&mut self, values: &[f32]) -> f32 {
        let most = values.iter().fold(0f32, |most, value| most.max(value.abs()));
        let inverse = if most > 0.0 && (127.0 / most).is_finite() { 127.0 / most } else { 0.0 };
        let (mut sum, mut square) = (0i32, 0i64);
        for (out, value) in self.bytes.iter_mut().zip(values) {
            let code = (*value * inverse).round() as i8;
            *out = code as u8;
            sum += i32::from(code);
            square += i64::from(code).pow(2);
        }
        self.total = sum;
        self.error = 2.0 * (square as f32).sqrt();
        if inverse > 0.0 { 1.0 / inverse } else { 0.0 }
    }

    /// Keys of the records `ids` of `data`: the smaller, the nearer.
    #[inline]
    pub fn keys(&self, data: &[u8], ids: &[u32], out: &mut [u32]) {
        let out = &mut out[..ids.len()];
        match self.sum {
            Some(Kind::Bytes(sum)) => codes::best().many(sum, &self.bytes, data, ids, out),
            Some(Kind::Nibbles(Sum::Squares)) => narrow::best().many(Narrow::Squares, &self.bytes, data, ids, out),
            Some(Kind::Nibbles(Sum::Products)) => narrow::best().many(Narrow::Products, &self.bytes, data, ids, out),
            Some(Kind::Signs(sum)) => {
                narrow::best().many(Narrow::Signs, &self.bytes, data, ids, out);
                return self.estimate(sum, data, ids, out);
            }
            Some(Kind::Bits) => bits::best().many(&self.bytes, data, ids, out),
            None => {}
        }
        if let Some(Kind::Bytes(Sum::Products) | Kind::Nibbles(Sum::Products)) = self.sum {
            for key in out {
                // From the largest product, 0, to the smallest.
                *key = !((*key as i32).saturating_sub(128 * self.total) as u32 ^ 0x8000_0000);
            }
        }
    }

    /// From sums over the positive signs to ordered estimates of distances, less the query's own part.
    fn estimate(&self, sum: Sum, data: &[u8], ids: &[u32], out: &mut [u32]) {
        let len = narrow::signs(self.bytes.len());
        for (id, key) in ids.iter().zip(out) {
            let tail = &data[(*id as usize + 1) * len - TAIL..][..TAIL];
            let (square, factor) = match tail.as_chunks::<4>().0 {
                [square, factor] => (f32::from_le_bytes(*square), f32::from_le_bytes(*factor)),
                _ => (0.0, 0.0),
            };
            let product = factor * self.step * (2 * (*key as i32) - self.total) as f32;
            let estimate = if sum == Sum::Squares { square - product } else { -product };
            *key = ordered(estimate);
        }
    }

    /// The largest key of what may in truth be nearer than the row of this key, if rounding puts keys off by up to
    /// `errors` times [`CodedQuery::error`]; `None` where codes are too coarse to tell.
    pub fn not_beyond(&self, key: u32, errors: f32) -> Option<u32> {
        let off = match self.sum? {
            Kind::Bits => 0.0,
            Kind::Bytes(Sum::Squares) => self.error * (key as f32 + self.bytes.len() as f32 / 6.0).sqrt(),
            Kind::Bytes(Sum::Products) => self.error,
            Kind::Nibbles(_) | Kind::Signs(_) => return None,
        };
        Some(key.saturating_add((off * errors).ceil() as u32))
    }

    /// The largest key of what is at most `reach` times as far as the row of this key, by squared distance; of all where
    /// distances have no zero.
    pub fn within(&self, reach: f32, key: u32) -> u32 {
        let is_float = matches!(self.sum, Some(Kind::Signs(_)));
        let key = if is_float { f64::from(unordered(key)) } else { f64::from(key) };
        let limit = self.zero + (key - self.zero).max(0.0) * f64::from(reach);
        match limit.is_nan() {
            true => u32::MAX,
            false if is_float => ordered(limit as f32),
            false => limit.ceil() as u32,
        }
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

/// A float's bits, so that they are ordered as the floats are.
pub fn ordered(value: f32) -> u32 {
    let bits = value.to_bits();
    if bits >> 31 == 1 { !bits } else { bits | 0x8000_0000 }
}

/// What [`ordered`] was made from.
pub fn unordered(bits: u32) -> f32 {
    f32::from_bits(if bits >> 31 == 1 { bits & 0x7fff_ffff } else { !bits })
}

/// The numbers of a row as they are compared: under cosine of length 1.
fn numbers(space: &Space, row: &[u8], out: &mut Vec<f32>) {
    space.decode(row, out);
    if space.metric() == Metric::Cosine {
        normalise(out);
    }
}

fn normalise(values: &mut [f32]) {
    let square: f64 = values.iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
    if square > 0.0 {
        let scale = 1.0 / square.sqrt();
        values.iter_mut().for_each(|v| *v = (f64::from(*v) * scale) as f32);
    }
}
