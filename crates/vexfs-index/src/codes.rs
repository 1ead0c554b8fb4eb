//! 8-bit codes of rows: what a sealed graph is walked on.
//!
//! One scale serves all rows and dimensions, so a record is codes and nothing else, and distances between codes are
//! whole numbers: code = round((value − centre) / scale) + 128. Under L2 and cosine the centre is the rows' mean,
//! which changes no order. u8 and i8 under L2 are their own codes, exactly.

use half::f16;

use crate::kernels::codes::{PAD, Sum, best};
use crate::space::{Element, Metric, Space};

/// How a set of rows is coded.
#[derive(Clone)]
pub struct Coder {
    space: Space,
    /// 0 where the rows' bytes are the codes.
    scale: f32,
    /// By dimension, or empty.
    centre: Vec<f32>,
}

/// A query against codes: smaller keys are nearer.
#[derive(Default)]
pub struct CodedQuery {
    bytes: Vec<u8>,
    sum: Option<Sum>,
    /// Of the zero point, in products.
    bias: i32,
}

/// Values that the scale is fitted to.
const SAMPLED: usize = 1 << 20;

impl Coder {
    /// For these rows.
    pub fn fit(space: &Space, rows: &[u8]) -> Coder {
        if space.metric() == Metric::L2 && matches!(space.element(), Element::I8 | Element::U8) {
            return Coder { space: *space, scale: 0.0, centre: Vec::new() };
        }
        let count = (rows.len() / space.row_bytes()).max(1);
        let step = (count / (SAMPLED / space.dim()).max(256)).max(1);
        let sample: Vec<&[u8]> = rows.chunks_exact(space.row_bytes()).step_by(step).collect();
        let mut values = Vec::new();
        let mut centre = Vec::new();
        if space.metric() != Metric::InnerProduct {
            let mut sums = vec![0f64; space.dim()];
            for row in &sample {
                Coder::numbers(space, row, &mut values);
                for (sum, value) in sums.iter_mut().zip(&values) {
                    *sum += f64::from(*value);
                }
            }
            centre = sums.iter().map(|sum| (sum / sample.len().max(1) as f64) as f32).collect();
        }
        let mut sizes = Vec::with_capacity(sample.len() * space.dim());
        for row in &sample {
            Coder::numbers(space, row, &mut values);
            sizes.extend(values.iter().enumerate().map(|(at, v)| (v - centre.get(at).unwrap_or(&0.0)).abs()));
        }
        let most = sizes.iter().fold(0f32, |most, size| most.max(*size));
        // A few far-off values must not make all codes coarse; under inner product they are what is searched for.
        let reach = if space.metric() == Metric::InnerProduct || sizes.is_empty() {
            most
        } else {
            let at = (sizes.len() - 1) - sizes.len() / 2_000;
            let (_, usual, _) = sizes.select_nth_unstable_by(at, f32::total_cmp);
            most.min(*usual * 1.5)
        };
        let scale = if reach > 0.0 && (reach / 127.0).is_normal() { reach / 127.0 } else { 1.0 };
        Coder { space: *space, scale, centre }
    }

    /// The numbers of a row as they are compared: under cosine of length 1.
    fn numbers(space: &Space, row: &[u8], out: &mut Vec<f32>) {
        out.clear();
        match space.element() {
            Element::F32 => out.extend(row.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b))),
            Element::F16 => out.extend(row.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f32())),
            Element::I8 => out.extend(row.iter().map(|b| f32::from(*b as i8))),
            Element::U8 => out.extend(row.iter().map(|b| f32::from(*b))),
        }
        if space.metric() == Metric::Cosine {
            normalise(out);
        }
    }

    /// From stored bytes; `None` if they are not a coder of the space.
    pub fn from_bytes(space: &Space, bytes: &[u8]) -> Option<Coder> {
        let values: Vec<f32> = bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        if bytes.len() != values.len() * 4 || !values.iter().all(|v| v.is_finite()) {
            return None;
        }
        let (scale, centre) = values.split_first()?;
        let exact = space.metric() == Metric::L2 && matches!(space.element(), Element::I8 | Element::U8);
        let wanted = if exact || space.metric() == Metric::InnerProduct { 0 } else { space.dim() };
        let fits = centre.len() == wanted && if exact { *scale == 0.0 } else { *scale > 0.0 };
        fits.then(|| Coder { space: *space, scale: *scale, centre: centre.to_vec() })
    }

    /// What `from_bytes` reads.
    pub fn to_bytes(&self) -> Vec<u8> {
        std::iter::once(&self.scale).chain(&self.centre).flat_map(|value| value.to_le_bytes()).collect()
    }

    /// Are the rows' own bytes the codes?
    pub fn is_exact(&self) -> bool {
        self.scale == 0.0
    }

    /// Bytes of a coded row.
    pub fn stride(space: &Space) -> usize {
        space.dim().next_multiple_of(PAD)
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
        Coder::numbers(&self.space, row, values);
        self.quantise(values, out);
    }

    fn quantise(&self, values: &[f32], out: &mut [u8]) {
        let inverse = 1.0 / self.scale;
        for (at, (out, value)) in out.iter_mut().zip(values).enumerate() {
            let centred = value - self.centre.get(at).unwrap_or(&0.0);
            // The cast saturates.
            *out = (centred * inverse + 128.5).floor() as u8;
        }
    }

    /// Makes `out` a query against codes. True if its keys are the exact distances.
    pub fn query(&self, query: &[f32], values: &mut Vec<f32>, out: &mut CodedQuery) -> bool {
        out.bytes.clear();
        out.bytes.resize(Coder::stride(&self.space), 0);
        values.clear();
        values.extend_from_slice(query);
        if self.space.metric() == Metric::L2 {
            out.sum = Some(Sum::Squares);
            out.bias = 0;
            if !self.is_exact() {
                self.quantise(values, &mut out.bytes);
                return false;
            }
            let zero = if self.space.element() == Element::I8 { 128.0 } else { 0.0 };
            let mut exact = true;
            for (out, value) in out.bytes.iter_mut().zip(values) {
                let shifted = (*value + zero).round();
                *out = shifted as u8;
                exact &= f32::from(*out) == *value + zero;
            }
            return exact;
        }
        out.sum = Some(Sum::Products);
        let most = values.iter().fold(0f32, |most, value| most.max(value.abs()));
        let inverse = if most > 0.0 && (127.0 / most).is_finite() { 127.0 / most } else { 0.0 };
        let mut sum = 0i32;
        for (out, value) in out.bytes.iter_mut().zip(values) {
            let code = (*value * inverse).round() as i8;
            *out = code as u8;
            sum += i32::from(code);
        }
        out.bias = 128 * sum;
        false
    }

    /// The divisor of what is added to a distance between two neighbours before one crowds the other out: a tenth
    /// where keys are distances, which finds 0.5 to 1 percentage point more on SIFT for the same ef; nothing where
    /// they are products, which have no zero.
    pub fn slack(&self) -> u32 {
        if self.space.metric() == Metric::InnerProduct { u32::MAX } else { 10 }
    }

    /// Makes `out` a query of a coded row, to compare it with others while a graph is built.
    pub fn query_of(&self, codes: &[u8], out: &mut CodedQuery) {
        out.bytes.clear();
        if self.space.metric() == Metric::InnerProduct {
            out.sum = Some(Sum::Products);
            out.bytes.extend(codes.iter().map(|code| code ^ 0x80));
            // The padding is zero in codes and −128 as signed bytes: times zero it counts for nothing, but not here.
            let sum: i32 = out.bytes.iter().take(self.space.dim()).map(|code| i32::from(*code as i8)).sum();
            out.bias = 128 * sum;
        } else {
            // Rows of one length are ordered by their differences as by their products.
            out.sum = Some(Sum::Squares);
            out.bytes.extend_from_slice(codes);
            out.bias = 0;
        }
    }
}

impl CodedQuery {
    /// Keys of the records `ids` of `data`: the smaller, the nearer.
    #[inline]
    pub fn keys(&self, data: &[u8], ids: &[u32], out: &mut [u32]) {
        match self.sum {
            Some(Sum::Products) => {
                best().many(Sum::Products, &self.bytes, data, ids, out);
                for key in out.iter_mut().take(ids.len()) {
                    // From the largest product, 0, to the smallest.
                    *key = !((*key as i32).saturating_sub(self.bias) as u32 ^ 0x8000_0000);
                }
            }
            _ => best().many(Sum::Squares, &self.bytes, data, ids, out),
        }
    }
}

fn normalise(values: &mut [f32]) {
    let square: f64 = values.iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
    if square > 0.0 {
        let scale = 1.0 / square.sqrt();
        values.iter_mut().for_each(|v| *v = (f64::from(*v) * scale) as f32);
    }
}
