//! A point's links in its graph, as hits.

use std::collections::HashMap;

use crate::id::FileId;
use crate::put::Standing;
use crate::search::{Candidate, Hit, Verdict, hit};
use crate::volume::Volume;

impl Volume {
    /// The points that a file's row is linked to in layer 0 of its graph, nearest first, that lie below `scope` and
    /// that `verdict` lets pass (see [`Volume::search`]). `None` where the volume holds no such row; empty while
    /// the row is in no graph: pending, or among so few that they are always compared with.
    pub fn neighbors(&self, file: FileId, row: u32, scope: FileId, verdict: &mut Verdict<'_>) -> Option<Vec<Hit>> {
        let inner = &*self.inner;
        let Standing { version, parts, reading, .. } = inner.standing(file)?;
        let (part, slot) = parts.iter().find_map(|part| Some((part, part.find(&reading, row)?)))?;
        let metric = part.index().space().metric();
        let linked = part.explore().map(|graph| graph.neighbours(slot, 0)).unwrap_or_default();
        let mut paths: HashMap<FileId, Option<Vec<u8>>> = HashMap::new();
        let hits = linked.into_iter().filter_map(|neighbor| {
            let (reading, row) = part.resolve(neighbor.slot)?;
            if !reading.live_at(version) {
                return None;
            }
            let path = paths.entry(reading.file).or_insert_with(|| inner.permitted_path(reading.file, scope, verdict));
            Some(hit(&Candidate { file: reading.file, row, distance: neighbor.distance }, path.clone()?, metric))
        });
        Some(hits.collect())
    }
}
