//! The JSON of the query file: a request a line in, an answer a line out. The one codec of every surface that
//! speaks JSON.

use serde::{Deserialize, Serialize};

/// What follows a path's `#` where the attached vector is meant, not one in the file.
pub const ATTACHED: &str = "embedding";

/// A question. Exactly one of `vector` and `like` is given.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Request {
    /// As many numbers as the collection's dimension.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vector: Option<Vec<f32>>,
    /// A vector of the volume: `path`, `path#row` or `path#embedding` (the attached one), relative to the directory asked in. It is no answer itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub like: Option<String>,
    /// Hits wanted; 10 unless said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub k: Option<usize>,
    /// Candidates kept in the walk. Not with `recall`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ef: Option<usize>,
    /// Recall that the walk should come to, above 0 and at most 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recall: Option<f32>,
    /// Compare with every vector.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub exact: bool,
    /// Only hits at most this far, in the unit of `distance`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_distance: Option<f32>,
    /// Milliseconds after which ETIMEDOUT is answered; 30,000 unless said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
}

/// One result.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HitLine {
    /// Relative to the directory asked in; characters that are not UTF-8 are replaced, see `path_bytes`.
    pub path: String,
    /// The path's bytes, where it isn't UTF-8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path_bytes: Option<Vec<u8>>,
    /// Row of the file, from 0.
    pub row: u32,
    /// It is the vector attached to the file, not one in it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub attached: bool,
    /// l2: Euclidean; cosine: 1 − cosine similarity; ip: minus the inner product.
    pub distance: f32,
    /// Larger is nearer. l2: 1 / (1 + distance); cosine: cosine similarity; ip: inner product.
    pub score: f32,
}

/// What went wrong.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ErrorLine {
    /// The number, as in `errno.h`.
    pub errno: i32,
    /// Its name.
    pub code: String,
    /// In words.
    pub message: String,
}

/// The answer to one request: `hits`, or `error`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Reply {
    /// Nearest first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hits: Option<Vec<HitLine>>,
    /// Microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub took_us: Option<u64>,
    /// Distances computed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub distances: Option<u64>,
    /// Instead of hits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ErrorLine>,
}

impl Reply {
    /// The line, with its end.
    pub fn to_line(&self) -> Vec<u8> {
        let mut line = serde_json::to_vec(self).unwrap_or_else(|error| {
            // Numbers and strings always serialise; were it otherwise, the reader is told.
            format!("{{\"error\":{{\"errno\":5,\"code\":\"EIO\",\"message\":\"{error}\"}}}}").into_bytes()
        });
        line.push(b'\n');
        line
    }
}
