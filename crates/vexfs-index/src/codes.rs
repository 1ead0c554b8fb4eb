//! 8-bit codes of float rows: what a sealed graph is walked on.
//!
//! Under L2 the rows' mean is taken off first, which changes no distance and makes the codes finer. Each row is then
//! scaled by itself: code = round(value / scale), scale = largest value / 127 (the per-vector scalar
//! quantisation of LVQ, arXiv 2304.04759, without its residuals). A code is stored biased by 128.

use half::f16;

use crate::kernels::{dot_biased, dot_codes, prefetch};
use crate::space::{Element, Metric, Space};

/// Bytes that follow the codes of a row: f32 scale, f32 squared length.
const AUX: usize = 8;
/// Codes are padded to a multiple, so that kernels have no tail.
const PAD: usize = 32;

/// How a set of rows is coded.
pub struct Coder {
    space: Space,
    /// Empty but under L2.
    mean: Vec<f32>,
}

/// A query against codes.
pub struct CodedQuery {
    metric: Metric,
    codes: Vec<i8>,
    scale: f32,
    square: f32,
    /// What the bias of the stored codes adds to the dot product.
    bias: i32,
}

impl Coder {
    /// For these rows.
    pub fn fit(space: &Space, rows: &[u8]) -> Coder {
        let mut mean = Vec::new();
        if space.metric() == Metric::L2 {
            let mut sums = vec![0f64; space.dim()];
            let count = (rows.len() / space.row_bytes()).max(1);
            for row in rows.chunks_exact(space.row_bytes()) {
                for (sum, value) in sums.iter_mut().zip(numbers(space, row)) {
                    *sum += f64::from(value);
                }
            }
            mean = sums.iter().map(|sum| (sum / count as f64) as f32).collect();
        }
        Coder { space: *space, mean }
    }

    /// From stored bytes; `None` if they are not a coder of the space.
    pub fn from_bytes(space: &Space, bytes: &[u8]) -> Option<Coder> {
        let mean: Vec<f32> = bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        let wanted = if space.metric() == Metric::L2 { space.dim() } else { 0 };
        (mean.len() == wanted && bytes.len() == wanted * 4 && mean.iter().all(|v| v.is_finite()))
            .then_some(Coder { space: *space, mean })
    }

    /// What `from_bytes` reads.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.mean.iter().flat_map(|value| value.to_le_bytes()).collect()
    }

    /// Bytes of a coded row.
    pub fn stride(space: &Space) -> usize {
        space.dim().next_multiple_of(PAD) + AUX
    }

    /// Appends the codes of a row.
    pub fn encode(&self, row: &[u8], out: &mut Vec<u8>) {
        let (codes, scale, square) = self.quantise(numbers(&self.space, row));
        out.extend(codes.iter().map(|code| (i16::from(*code) + 128) as u8));
        out.extend_from_slice(&scale.to_le_bytes());
        out.extend_from_slice(&square.to_le_bytes());
    }

    fn quantise(&self, values: impl Iterator<Item = f32>) -> (Vec<i8>, f32, f32) {
        let centred: Vec<f32> =
            values.enumerate().map(|(at, value)| value - self.mean.get(at).copied().unwrap_or(0.0)).collect();
        let largest = centred.iter().fold(0f32, |most, value| most.max(value.abs()));
        let scale = if largest > 0.0 { largest / 127.0 } else { 1.0 };
        let mut codes: Vec<i8> = centred.iter().map(|value| (value / scale).round() as i8).collect();
        codes.resize(self.space.dim().next_multiple_of(PAD), 0);
        let square = centred.iter().map(|value| value * value).sum();
        (codes, scale, square)
    }

    /// A query as it is compared with codes.
    pub fn query(&self, query: &[f32]) -> CodedQuery {
        let metric = self.space.metric();
        let length = match metric {
            Metric::Cosine => query.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>().sqrt(),
            Metric::L2 | Metric::InnerProduct => 1.0,
        };
        let (codes, scale, square) = self.quantise(query.iter().map(|v| (f64::from(*v) / length) as f32));
        CodedQuery::new(metric, codes, scale, square)
    }

    /// Estimated distance between two coded rows.
    pub fn between(space: &Space, one: &[u8], other: &[u8]) -> f32 {
        let ((a, a_scale, a_square), (b, b_scale, b_square)) = (split(one), split(other));
        let dot = dot_biased(a, b) as f32 * a_scale * b_scale;
        match space.metric() {
            Metric::L2 => a_square + b_square - 2.0 * dot,
            Metric::InnerProduct => -dot,
            Metric::Cosine => 1.0 - dot,
        }
    }

    /// A coded row as a query.
    pub fn query_of(&self, coded: &[u8]) -> CodedQuery {
        let (codes, scale, square) = split(coded);
        let codes = codes.iter().map(|code| (i16::from(*code) - 128) as i8).collect();
        CodedQuery::new(self.space.metric(), codes, scale, square)
    }
}

impl CodedQuery {
    fn new(metric: Metric, codes: Vec<i8>, scale: f32, square: f32) -> CodedQuery {
        let bias = 128 * codes.iter().map(|code| i32::from(*code)).sum::<i32>();
        CodedQuery { metric, codes, scale, square, bias }
    }

    /// Estimated distance to a coded row.
    #[inline]
    pub fn distance(&self, coded: &[u8]) -> f32 {
        let (codes, scale, square) = split(coded);
        let dot = (dot_codes(&self.codes, codes) - self.bias) as f32 * self.scale * scale;
        match self.metric {
            Metric::L2 => self.square + square - 2.0 * dot,
            Metric::InnerProduct => -dot,
            Metric::Cosine => 1.0 - dot,
        }
    }
}

fn split(coded: &[u8]) -> (&[u8], f32, f32) {
    let (codes, aux) = coded.split_at(coded.len() - AUX);
    let number = |at: usize| f32::from_le_bytes([aux[at], aux[at + 1], aux[at + 2], aux[at + 3]]);
    (codes, number(0), number(4))
}

fn numbers<'a>(space: &Space, row: &'a [u8]) -> Box<dyn Iterator<Item = f32> + 'a> {
    match space.element() {
        Element::F32 => Box::new(row.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b))),
        Element::F16 => Box::new(row.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f32())),
        Element::I8 => Box::new(row.iter().map(|b| f32::from(*b as i8))),
        Element::U8 => Box::new(row.iter().map(|b| f32::from(*b))),
    }
}

/// Asks for all cache lines of a record.
#[inline]
pub fn prefetch_record(bytes: &[u8], start: usize, len: usize) {
    for at in (0..len).step_by(64) {
        prefetch(bytes, start + at);
    }
}
