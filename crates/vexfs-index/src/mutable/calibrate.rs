//! From a recall target to a number of candidates, on the head's own points.
//!
//! A point that is about to be linked is a fresh question to the graph. Some are asked, by an exact scan and by walks with
//! more and more candidates; the larger the head the fewer, so that it costs some hundredths of linking at any size. What
//! the last of them needed is what searches use, a little more as the points are more by now.

use super::super::sync::{AtomicU32, AtomicUsize, Mutex, Ordering};
use super::cells::Pin;
use super::{Graph, Mutable, lock};
use crate::build::reaching;
use crate::hnsw::{descend, walk_layer};
use crate::kernels::Prepared;
use crate::request::{Budget, Candidate, keep};
use crate::sealed::{CALIBRATED_K, TARGETS, with_learned};
use crate::{Effort, GoOn, Index, Request, Scratch};

/// One of so many points is asked: of all that there are by this.
const RARE: usize = 800;
/// Points whose answers are taken together.
const BLOCK: usize = 64;
/// Blocks that are remembered.
const BLOCKS: usize = 5;
/// Numbers of candidates that are tried, smallest first.
const EFS: [f32; 18] =
    [10.0, 12.0, 14.0, 17.0, 20.0, 24.0, 28.0, 34.0, 40.0, 48.0, 56.0, 68.0, 80.0, 112.0, 160.0, 256.0, 512.0, 1024.0];
/// Candidates for a recall grow with this power of the points.
const RISE: f32 = 0.2;

/// What is known.
#[derive(Default)]
pub struct Efs {
    /// Of the head's own points.
    rows: Needed,
    /// Of queries that were asked.
    queries: Needed,
    /// Points linked since the last was asked.
    passed: AtomicUsize,
    /// The newest first.
    blocks: Mutex<[Block; BLOCKS]>,
}

/// What some vectors needed.
#[derive(Default)]
struct Needed {
    /// By target; 0 as long as nothing is known.
    efs: [AtomicU32; TARGETS.len()],
    /// How many points there were.
    points: AtomicUsize,
}

impl Needed {
    /// Takes in what was found of `asked` vectors' neighbours, by [`EFS`].
    fn set(&self, found: [usize; EFS.len()], asked: usize, points: usize) {
        let recalls = found.map(|found| found as f32 / (asked * CALIBRATED_K) as f32);
        for (target, ef) in TARGETS.iter().zip(&self.efs) {
            let needed = reaching(*target, &recalls, &EFS).unwrap_or(EFS[EFS.len() - 1]);
            ef.store(needed.ceil() as u32, Ordering::SeqCst);
        }
        self.points.store(points, Ordering::SeqCst);
    }

    /// Candidates for one of [`TARGETS`] among so many points.
    fn ef(&self, target: usize, points: usize) -> Option<usize> {
        let ef = self.efs[target].load(Ordering::SeqCst);
        let grown = points as f32 / self.points.load(Ordering::SeqCst).max(1) as f32;
        (ef > 0).then(|| (ef as f32 * grown.clamp(0.5, 4.0).powf(RISE)).round() as usize)
    }
}

#[derive(Copy, Clone, Default)]
struct Block {
    asked: usize,
    /// Points that there were, summed over the questions.
    points: usize,
    /// By [`EFS`]: true neighbours found.
    found: [usize; EFS.len()],
}

impl Mutable {
    /// Candidates to keep.
    pub(super) fn ef(&self, request: &Request<'_>) -> usize {
        let ef = match request.effort {
            Effort::Ef(ef) => ef,
            Effort::Recall(recall) => {
                let target = TARGETS.iter().position(|target| *target >= recall).unwrap_or(TARGETS.len() - 1);
                // More hits need as many more candidates.
                self.calibrated(target) + request.k.saturating_sub(CALIBRATED_K)
            }
        };
        ef.max(request.k).max(1)
    }

    fn calibrated(&self, target: usize) -> usize {
        let live = self.live();
        // Above what SIFT and MiniLM heads need.
        let unknown = || [32, 48, 64, 96, 128, 200, 300, 500][target];
        let rows = self.efs.rows.ef(target, live).unwrap_or_else(unknown);
        with_learned(rows, self.efs.queries.ef(target, live).unwrap_or(0))
    }

    /// See [`Index::learn`].
    pub(super) fn learn_from(&self, queries: &[Vec<f32>], go_on: GoOn<'_>) -> bool {
        let (mut scratch, mut found, mut asked) = (Scratch::default(), [0; EFS.len()], 0);
        for query in queries {
            if !go_on() {
                return false;
            }
            let Some(entry) = self.entry.get().filter(|_| self.space.check_query(query).is_ok()) else { continue };
            // Not held from one to the next: what is deleted meanwhile waits for it.
            let pin = self.cells.pin();
            let more = self.ask(&pin, &Prepared::new(&self.space, query), entry, &mut scratch);
            found.iter_mut().zip(more).for_each(|(sum, more)| *sum += more);
            asked += 1;
        }
        if asked > 0 {
            self.efs.queries.set(found, asked, self.live());
        }
        true
    }

    /// Asks for a point that is not linked yet, if it is time for one.
    pub(super) fn sample(&self, pin: &Pin<'_>, node: u32, scratch: &mut Scratch) {
        let points = self.live();
        if !self.is_walked() || self.efs.passed.fetch_add(1, Ordering::SeqCst) < points / RARE {
            return;
        }
        self.efs.passed.store(0, Ordering::SeqCst);
        let (Some(row), Some(entry)) = (pin.row(node), self.entry.get()) else { return };
        let mut numbers = std::mem::take(&mut scratch.values);
        self.space.decode(row, &mut numbers);
        if self.space.check_query(&numbers).is_ok() {
            let query = Prepared::again(scratch.exact.take(), &self.space, &numbers);
            let found = self.ask(pin, &query, entry, scratch);
            scratch.exact = Some(query);
            self.note(points, found);
        }
        scratch.values = numbers;
    }

    /// For each of [`EFS`] how many of the nearest a walk finds.
    fn ask(
        &self,
        pin: &Pin<'_>,
        query: &Prepared,
        (entry, top): (u32, usize),
        scratch: &mut Scratch,
    ) -> [usize; EFS.len()] {
        let mut found = [0; EFS.len()];
        scratch.best.clear();
        for node in (0..self.cells.len() as u32).filter(|node| self.in_graph(*node)) {
            let Some(row) = pin.row(node) else { continue };
            keep(&mut scratch.best, CALIBRATED_K, Candidate { distance: query.distance(row), node });
        }
        // Equally far is equally right.
        let limit = scratch.best.peek().map_or(f32::INFINITY, |farthest| farthest.distance);
        let graph = Graph { head: self, pin };
        let distance = |node: u32| pin.row(node).map_or(f32::INFINITY, |row| query.distance(row));
        let accept = |node: u32| self.in_graph(node);
        let mut budget = Budget::unlimited();
        for (n, ef) in EFS.iter().enumerate() {
            let walked =
                descend(&graph, &distance, entry, (top, 0), &mut scratch.links, &mut budget).and_then(|start| {
                    walk_layer(&graph, &distance, &accept, start, (*ef as usize, 0), scratch, &mut budget)
                });
            if walked.is_err() {
                break;
            }
            found[n] = scratch.best.iter().filter(|hit| hit.distance <= limit).count().min(CALIBRATED_K);
            if found[n] == CALIBRATED_K {
                // What more candidates find is no less.
                found[n..].fill(CALIBRATED_K);
                break;
            }
        }
        found
    }

    /// Takes an answer in; with each full block what searches use is settled anew.
    fn note(&self, points: usize, found: [usize; EFS.len()]) {
        let mut blocks = lock(&self.efs.blocks);
        let newest = &mut blocks[0];
        newest.asked += 1;
        newest.points += points;
        newest.found.iter_mut().zip(found).for_each(|(sum, found)| *sum += found);
        if newest.asked < BLOCK {
            return;
        }
        let sum = |of: fn(&Block) -> usize| blocks.iter().map(of).sum::<usize>();
        let asked = sum(|block| block.asked);
        let found = std::array::from_fn(|n| blocks.iter().map(|block| block.found[n]).sum());
        self.efs.rows.set(found, asked, sum(|block| block.points) / asked);
        blocks.rotate_right(1);
        blocks[0] = Block::default();
    }
}
