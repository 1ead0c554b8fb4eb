//! Segments learn from what they are asked.

use super::*;

const DIM: usize = 24;

/// Rows around twenty centres, and midpoints of two of them, which are around none.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 20) as usize % end
    }
    fn vector(&mut self, scale: f32) -> Vec<f32> {
        (0..DIM)
            .map(|_| (0..4).map(|_| self.below(1 << 20) as f32 / (1 << 19) as f32 - 1.0).sum::<f32>() * scale)
            .collect()
    }
    fn midpoint(&mut self, rows: &[Vec<f32>]) -> Vec<f32> {
        let (one, other) = (&rows[self.below(rows.len())], &rows[self.below(rows.len())]);
        one.iter().zip(other).map(|(one, other)| (one + other) / 2.0).collect()
    }
}

fn found(volume: &Volume, query: &[f32], exact: bool) -> Vec<u32> {
    let query = Query { exact, ..Query::nearest(query.to_vec(), 10) };
    let answer = volume.search(&query, &mut |_, _, _| true).unwrap();
    answer.hits.into_iter().map(|hit| hit.row).collect()
}

fn recall(volume: &Volume, queries: &[Vec<f32>]) -> f64 {
    let right = |query: &Vec<f32>| {
        let truth = found(volume, query, true);
        found(volume, query, false).iter().filter(|row| truth.contains(row)).count()
    };
    queries.iter().map(right).sum::<usize>() as f64 / (10 * queries.len()) as f64
}

#[test]
fn what_is_asked_for_by_recall_is_found_also_where_queries_are_not_like_rows() {
    let (volume, _) = open(&MemDisk::default()).unwrap();
    let mut random = Random(3);
    let centres: Vec<Vec<f32>> = (0..20).map(|_| random.vector(1.0)).collect();
    let rows: Vec<Vec<f32>> = (0..12_000)
        .map(|n| random.vector(0.12).iter().zip(&centres[n % 20]).map(|(off, centre)| off + centre).collect())
        .collect();
    put(&volume, 10, "bulk.npy", &rows.iter().map(Vec::as_slice).collect::<Vec<&[f32]>>());
    settle(&volume);
    let learned = || volume.report(FileId::ROOT).collections[0].learned;
    let some: Vec<Vec<f32>> = (0..150).map(|_| random.midpoint(&rows)).collect();
    let before = recall(&volume, &some);
    assert!(before < 0.92, "{before}, so that there is something to learn");
    assert_eq!(learned(), 0, "from so few");
    while learned() == 0 {
        // Others do not come often enough to wait for, and these are no others.
        found(&volume, &random.midpoint(&rows), false);
    }
    let fresh: Vec<Vec<f32>> = (0..150).map(|_| random.midpoint(&rows)).collect();
    let after = recall(&volume, &fresh);
    assert!(after >= 0.92, "{before}, then {after}");
    let kept = volume.report(FileId::ROOT).memory.queries;
    assert!((500 * DIM as u64 * 4..100_000).contains(&kept), "{kept}");
}
