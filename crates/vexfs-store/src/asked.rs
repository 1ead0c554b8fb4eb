//! Queries that a collection was asked, for its indexes to learn from: how hard they are its rows don't tell. See
//! decision 19.

use std::collections::hash_map::DefaultHasher;
use std::hash::Hasher;

use crate::sync::Mutex;

/// Queries that are kept.
const MOST: usize = 500;
/// Bytes that they take at most.
const MOST_BYTES: usize = 2 << 20;

/// See the module.
#[derive(Default)]
pub struct Asked(Mutex<Kept>);

#[derive(Default)]
struct Kept {
    /// The last ones, in any order, each with its hash.
    queries: Vec<(u64, Vec<f32>)>,
    /// How many there have been, those not counted that were kept when they came.
    count: u64,
}

/// Queries to learn from.
pub struct Lesson {
    /// How many there had been.
    pub count: u64,
    /// The last ones.
    pub queries: Vec<Vec<f32>>,
}

fn room(query: &[f32]) -> usize {
    (MOST_BYTES / size_of_val(query).max(1)).clamp(1, MOST)
}

impl Asked {
    /// Notes a query, unless another thread notes one just now: no search waits for it.
    pub fn note(&self, query: &[f32]) {
        let mut hasher = DefaultHasher::new();
        query.iter().for_each(|number| hasher.write_u32(number.to_bits()));
        let hash = hasher.finish();
        let Some(mut kept) = self.0.try_lock() else { return };
        // The same one again and again tells nothing of others.
        if kept.queries.iter().any(|(other, _)| *other == hash) {
            return;
        }
        let at = (kept.count % room(query) as u64) as usize;
        kept.count += 1;
        match kept.queries.get_mut(at) {
            Some((known, numbers)) => {
                *known = hash;
                numbers.clear();
                numbers.extend_from_slice(query);
            }
            None => kept.queries.push((hash, query.to_vec())),
        }
    }

    /// For who has learned when there had been so many: something new, if there are enough queries and twice as many as then.
    pub fn lesson(&self, learned: u64) -> Option<Lesson> {
        let kept = self.0.lock();
        let enough = kept.queries.first().is_some_and(|(_, query)| kept.queries.len() >= room(query));
        (enough && kept.count >= 2 * learned).then(|| Lesson {
            count: kept.count,
            queries: kept.queries.iter().map(|(_, query)| query.clone()).collect(),
        })
    }

    /// Bytes of memory that they take.
    pub fn bytes(&self) -> usize {
        let kept = self.0.lock();
        kept.queries.iter().map(|(_, query)| size_of_val(&query[..]) + size_of::<(u64, Vec<f32>)>()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn different_queries_are_kept_and_the_last_of_them() {
        let asked = Asked::default();
        for n in 0..499 {
            asked.note(&[n as f32, 0.0]);
            asked.note(&[0.0, 0.0]);
        }
        assert!(asked.lesson(0).is_none(), "one is missing");
        (499..750).for_each(|n| asked.note(&[n as f32, 0.0]));
        let lesson = asked.lesson(0).unwrap();
        assert_eq!((lesson.count, lesson.queries.len()), (750, 500));
        let mut kept: Vec<u32> = lesson.queries.iter().map(|query| query[0] as u32).collect();
        kept.sort_unstable();
        assert_eq!(kept, (250..750).collect::<Vec<u32>>());
        assert!(asked.lesson(400).is_none());
        assert!(asked.lesson(375).is_some());
        assert!(asked.bytes() < 30_000);
    }

    #[test]
    fn long_queries_are_fewer() {
        let asked = Asked::default();
        for n in 0..200 {
            asked.note(&[n as f32; 4096]);
        }
        assert_eq!(asked.lesson(0).unwrap().queries.len(), 128);
        assert!(asked.bytes() < MOST_BYTES + (16 << 10));
    }
}
