//! `.vec`: one vector as text, its numbers separated by commas, spaces, tabs or line ends.

use std::fs::File;
use std::io::Read;

use super::Refusal;

/// A vector of the largest dimension, generously written.
const MAX_TEXT: u64 = 4 << 20;

/// Reads a file of `len` bytes; `None` if it holds nothing but white space.
pub fn read(file: &File, len: u64) -> Result<Option<Vec<f32>>, Refusal> {
    if len > MAX_TEXT {
        return Err(Refusal::too_big(format!("{len} bytes of text; a .vec may have {MAX_TEXT}")));
    }
    let mut bytes = Vec::with_capacity(len as usize);
    ReadAt { file, at: 0 }.take(MAX_TEXT).read_to_end(&mut bytes)?;
    let text = std::str::from_utf8(&bytes)
        .map_err(|error| Refusal::malformed(format!("byte {} is not text", error.valid_up_to())))?;
    parse(text)
}

/// Reads from a place of its own, so that the handle's offset (which a caller may share) stays.
pub struct ReadAt<'a> {
    /// What is read.
    pub file: &'a File,
    /// Where the next read begins.
    pub at: u64,
}

impl Read for ReadAt<'_> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        let n = std::os::unix::fs::FileExt::read_at(self.file, out, self.at)?;
        self.at += n as u64;
        Ok(n)
    }
}

/// Parses the text of a `.vec`. Lines must hold equally many numbers: a ragged table is no vector.
pub fn parse(text: &str) -> Result<Option<Vec<f32>>, Refusal> {
    let mut vector = Vec::new();
    let mut first: Option<(usize, usize)> = None;
    // True where a number must follow: after a comma.
    let mut owed = false;
    let mut end = (1, 1);
    for (number, line) in text.lines().enumerate() {
        let number = number + 1;
        let before = vector.len();
        for (column, token) in tokens(line) {
            end = (number, column);
            if token == "," {
                if owed || vector.is_empty() {
                    return Err(at(number, column, "a number is missing before the comma"));
                }
                owed = true;
                continue;
            }
            let value: f32 =
                token.parse().map_err(|_| at(number, column, &format!("\"{}\" is not a number", shorten(token))))?;
            if !value.is_finite() {
                return Err(at(number, column, &format!("\"{}\" is not a finite f32", shorten(token))));
            }
            vector.push(value);
            owed = false;
        }
        let count = vector.len() - before;
        match first {
            _ if count == 0 => {}
            None => first = Some((number, count)),
            Some((line, wanted)) if wanted != count => {
                return Err(Refusal::malformed(format!(
                    "line {number}: ragged: {count} numbers, where line {line} has {wanted}"
                )));
            }
            Some(_) => {}
        }
    }
    if owed {
        return Err(at(end.0, end.1, "a number is missing after the comma"));
    }
    Ok(if vector.is_empty() { None } else { Some(vector) })
}

fn at(line: usize, column: usize, what: &str) -> Refusal {
    Refusal::malformed(format!("line {line}, column {column}: {what}"))
}

fn shorten(token: &str) -> String {
    let mut short: String = token.chars().take(24).collect();
    if short.len() < token.len() {
        short.push('…');
    }
    short
}

/// Numbers and commas with their columns (from 1, in bytes).
fn tokens(line: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut rest = line;
    std::iter::from_fn(move || {
        rest = rest.trim_start_matches([' ', '\t', '\r']);
        let column = line.len() - rest.len() + 1;
        let end = match rest.find([' ', '\t', '\r', ',']) {
            Some(0) => 1,
            Some(end) => end,
            None if rest.is_empty() => return None,
            None => rest.len(),
        };
        let (token, after) = rest.split_at(end);
        rest = after;
        Some((column, token))
    })
}
