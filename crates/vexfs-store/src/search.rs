//! Questions and answers: one [`Query`], one [`Hit`].

use std::collections::HashMap;
use std::sync::Arc;

use vexfs_index::{Effort, Metric, Neighbor, Request, Until, VectorError};

use crate::catalog::Fingerprint;
use crate::collection::Collection;
use crate::error::SearchError;
use crate::id::FileId;
use crate::part::{Part, PartFilter, View};
use crate::row::Row;
use crate::segment::SegmentError;
use crate::volume::{Inner, Volume};

/// Most hits that a query may ask for.
pub const MAX_K: usize = 10_000;

/// A question: what in `scope` is near `vector`?
#[derive(Clone)]
pub struct Query<'a> {
    /// As many numbers as the collection's dimension.
    pub vector: Vec<f32>,
    /// How many hits, at most [`MAX_K`].
    pub k: usize,
    /// `ef`, or the recall that it should come to.
    pub effort: Effort,
    /// Compare with every vector in full precision.
    pub exact: bool,
    /// Only hits at most this far, in the unit of [`Hit::distance`].
    pub max_distance: Option<f32>,
    /// The directory asked in: it and all below.
    pub scope: FileId,
    /// The point that the vector is from; it is no answer.
    pub exclude: Option<(FileId, u32)>,
    /// How long the answer is wanted.
    pub until: Until<'a>,
}

impl Query<'_> {
    /// The `k` nearest in the whole volume, with default effort and as long as it takes.
    pub fn nearest(vector: Vec<f32>, k: usize) -> Query<'static> {
        Query {
            vector,
            k,
            effort: Effort::default(),
            exact: false,
            max_distance: None,
            scope: FileId::ROOT,
            exclude: None,
            until: Until::default(),
        }
    }
}

/// One result.
#[derive(Clone, Debug, PartialEq)]
pub struct Hit {
    /// The file that holds the vector.
    pub file: FileId,
    /// The vector's row in it, from 0.
    pub row: u32,
    /// The file's path relative to the scope; bytes, as file names are.
    pub path: Vec<u8>,
    /// l2: Euclidean distance. cosine: 1 − cosine similarity (0 to 2). ip: minus the inner product. hamming: bits that
    /// differ.
    pub distance: f32,
    /// Larger is nearer. l2, hamming: 1 / (1 + distance). cosine: cosine similarity. ip: inner product.
    pub score: f32,
}

/// Hits, nearest first, and what they cost.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    /// Nearest first; ties by file and row.
    pub hits: Vec<Hit>,
    /// Distances computed.
    pub distances: u64,
}

/// What the file system says of a candidate: is the file, at this path and with these bytes, still there and the
/// caller's to read?
pub type Verdict<'a> = dyn FnMut(FileId, &[u8], &Fingerprint) -> bool + 'a;

/// A row that may become a hit.
pub(crate) struct Candidate {
    pub file: FileId,
    pub row: u32,
    pub distance: f32,
}

impl Volume {
    /// Answers a query. `verdict` is asked once for each path of a file that would be a hit; a file that has none
    /// left is passed over for the next nearest, so `k` hits are returned where `k` exist.
    pub fn search(&self, query: &Query<'_>, verdict: &mut Verdict<'_>) -> Result<Answer, SearchError> {
        let inner = &*self.inner;
        let Some((metric, chosen)) = inner.choose(query, verdict)? else { return Ok(Answer::default()) };
        // A row is as hard as the rows that indexes were measured with.
        if matches!(query.effort, Effort::Recall(_)) && !query.exact && query.exclude.is_none() {
            chosen.iter().for_each(|collection| collection.asked.note(&query.vector));
        }
        let k = query.k.min(MAX_K);
        let mut answer = Answer::default();
        let mut paths: HashMap<FileId, Option<Vec<u8>>> = HashMap::new();
        let mut rejected: Vec<FileId> = Vec::new();
        let mut want = k;
        loop {
            let candidates = inner.gather(query, metric, &chosen, want, &rejected, &mut answer.distances)?;
            let all = candidates.len() < want;
            let before = rejected.len();
            answer.hits.clear();
            for candidate in candidates {
                // A verdict is a look at the file system, and there may be thousands.
                query.until.check()?;
                let path = paths
                    .entry(candidate.file)
                    .or_insert_with(|| inner.permitted_path(candidate.file, query.scope, verdict));
                match path {
                    Some(path) if answer.hits.len() < k => {
                        answer.hits.push(hit(&candidate, path.clone(), metric));
                    }
                    Some(_) => {}
                    None if rejected.contains(&candidate.file) => {}
                    None => rejected.push(candidate.file),
                }
            }
            if answer.hits.len() == k || all || rejected.len() == before {
                if answer.hits.is_empty() && !rejected.is_empty() {
                    // What can't be seen at all must not make the answer another than where it isn't.
                    inner.choose_of(query, inner.shown(query, verdict)?)?;
                }
                return Ok(answer);
            }
            // What was rejected once is filtered in the walk; ask for more to meet the next ones sooner.
            want = want.saturating_mul(2).max(k + 16);
        }
    }
}

pub(crate) fn hit(candidate: &Candidate, path: Vec<u8>, metric: Metric) -> Hit {
    let raw = candidate.distance;
    let (distance, score) = match metric {
        Metric::L2 => {
            let distance = raw.max(0.0).sqrt();
            (distance, 1.0 / (1.0 + distance))
        }
        Metric::InnerProduct => (raw, -raw),
        Metric::Hamming => (raw, 1.0 / (1.0 + raw)),
        // Rounding may step past what a cosine can be.
        Metric::Cosine => (raw.clamp(0.0, 2.0), (1.0 - raw).clamp(-1.0, 1.0)),
    };
    Hit { file: candidate.file, row: candidate.row, path, distance, score }
}

/// The unit of [`Hit::distance`] back to the index's.
fn raw_distance(distance: f32, metric: Metric) -> f32 {
    match metric {
        Metric::L2 if distance < 0.0 => -1.0,
        Metric::L2 => distance * distance,
        Metric::InnerProduct | Metric::Cosine | Metric::Hamming => distance,
    }
}

/// Collections that can be asked together, and their metric.
type Chosen = (Metric, Vec<Arc<Collection>>);

impl Inner {
    /// The collections that a query asks; `None` where the scope has none with points.
    fn choose(&self, query: &Query<'_>, verdict: &mut Verdict<'_>) -> Result<Option<Chosen>, SearchError> {
        match self.choose_of(query, self.related(query)?) {
            Err(SearchError::WrongDimension { .. } | SearchError::Incomparable(_)) => {}
            answer => return answer,
        }
        // Collections of which the asker may see nothing neither stand in the way nor are told of.
        self.choose_of(query, self.shown(query, verdict)?)
    }

    /// Collections in the scope of which the asker may see something.
    fn shown(&self, query: &Query<'_>, verdict: &mut Verdict<'_>) -> Result<Vec<Arc<Collection>>, SearchError> {
        let mut related = self.related(query)?;
        related.retain(|collection| self.shows_any(collection, query.scope, verdict));
        Ok(related)
    }

    /// Has the collection a file below the scope that `verdict` lets pass?
    fn shows_any(&self, collection: &Collection, scope: FileId, verdict: &mut Verdict<'_>) -> bool {
        let files: Vec<FileId> = {
            let tree = self.tree.read();
            let in_it = |row: &&Row| row.state.collection() == Some(collection.id);
            tree.files().filter(in_it).map(|row| row.file).collect()
        };
        files.into_iter().any(|file| self.permitted_path(file, scope, verdict).is_some())
    }

    /// Collections with points in the scope.
    fn related(&self, query: &Query<'_>) -> Result<Vec<Arc<Collection>>, SearchError> {
        let all: Vec<Arc<Collection>> = self.collections.read().values().cloned().collect();
        let mut related: Vec<Arc<Collection>> = Vec::new();
        for collection in all {
            let root = collection.row.lock().dir;
            let (below, around) = {
                let tree = self.tree.read();
                (tree.dir_in_scope(root, query.scope), tree.dir_in_scope(query.scope, root))
            };
            let mut asked = false;
            for part in collection.parts.load().iter() {
                let alive = part.index().len() as u64 > part.ended_points();
                // One that begins above counts if it has files here.
                if alive && (below || around && part.reaches(&self.tree, query.scope, query.until)?) {
                    asked = true;
                    break;
                }
            }
            if asked {
                related.push(collection);
            }
        }
        Ok(related)
    }

    fn choose_of(&self, query: &Query<'_>, related: Vec<Arc<Collection>>) -> Result<Option<Chosen>, SearchError> {
        let mut have = Vec::new();
        let mut fitting: Vec<(Metric, Arc<Collection>)> = Vec::new();
        for collection in related {
            let Some(schema) = collection.schema.load_full() else { continue };
            if schema.space.dim() == query.vector.len() {
                fitting.push((schema.space.metric(), collection));
            } else if !have.contains(&schema.space.dim()) {
                have.push(schema.space.dim());
            }
        }
        let Some((metric, first)) = fitting.first() else {
            return match have.is_empty() {
                true => Ok(None),
                false => Err(SearchError::WrongDimension { got: query.vector.len(), have }),
            };
        };
        if fitting.iter().any(|(other, _)| other != metric) {
            let tree = self.tree.read();
            let names: Vec<String> = fitting
                .iter()
                .map(|(metric, collection)| {
                    let path = tree.dir_path(collection.row.lock().dir, FileId::ROOT).unwrap_or_default();
                    format!("/{} ({metric})", String::from_utf8_lossy(&path))
                })
                .collect();
            return Err(SearchError::Incomparable(names.join(", ")));
        }
        if let Some(schema) = first.schema.load_full() {
            schema.space.check_query(&query.vector).map_err(|error: VectorError| SearchError::Query(error))?;
        }
        Ok(Some((*metric, fitting.into_iter().map(|(_, collection)| collection).collect())))
    }

    /// The nearest `want` rows of all parts, nearest first. A part that has rotted is given up, and the rest is asked.
    fn gather(
        &self,
        query: &Query<'_>,
        metric: Metric,
        chosen: &[Arc<Collection>],
        want: usize,
        rejected: &[FileId],
        distances: &mut u64,
    ) -> Result<Vec<Candidate>, SearchError> {
        loop {
            match self.gather_from_sound(query, metric, chosen, want, rejected, distances) {
                Ok(found) => return Ok(found),
                Err(Trouble::Search(error)) => return Err(error),
                Err(Trouble::Rotten(collection, part, error)) => self.quarantine(&collection, &part, &error),
            }
        }
    }

    fn gather_from_sound(
        &self,
        query: &Query<'_>,
        metric: Metric,
        chosen: &[Arc<Collection>],
        want: usize,
        rejected: &[FileId],
        distances: &mut u64,
    ) -> Result<Vec<Candidate>, Trouble> {
        let (version, snapshot) = self.snapshot(chosen);
        let mut found = Vec::new();
        self.with_scratch(|scratch| {
            let mut neighbors: Vec<Neighbor> = Vec::new();
            for (collection, parts) in chosen.iter().zip(&snapshot) {
                let root = collection.row.lock().dir;
                let whole = self.tree.read().dir_in_scope(root, query.scope);
                let view = View {
                    version,
                    tree: &self.tree,
                    scope: (!whole).then_some(query.scope),
                    exclude: query.exclude,
                    rejected,
                    until: query.until,
                };
                for part in parts.iter() {
                    query.until.check().map_err(SearchError::from)?;
                    let mut ask = |filter: Option<&PartFilter<'_>>| {
                        let request = Request {
                            k: want + usize::from(query.exclude.is_some()),
                            effort: query.effort,
                            exact: query.exact,
                            max_distance: query.max_distance.map(|d| raw_distance(d, metric)),
                            filter: filter.map(|filter| filter as &dyn vexfs_index::Filter),
                            until: query.until,
                            max_distances: None,
                        };
                        let stats = part
                            .index()
                            .search(&query.vector, &request, scratch, &mut neighbors)
                            .map_err(SearchError::from)?;
                        *distances += stats.distances;
                        take(part, &view, &neighbors, &mut found)
                            .map_err(|error| Trouble::Rotten(Arc::clone(collection), Arc::clone(part), error))
                    };
                    if !ask(part.filter(&view).map_err(SearchError::from)?.as_ref())? {
                        // Rows are being written or have just ended: ask again with the filter on.
                        ask(Some(&part.forced_filter(&view).map_err(SearchError::from)?))?;
                    }
                }
            }
            Ok::<(), Trouble>(())
        })?;
        found.sort_by(|a, b| a.distance.total_cmp(&b.distance).then(a.file.cmp(&b.file)).then(a.row.cmp(&b.row)));
        found.truncate(want);
        Ok(found)
    }

    /// The first path of the file below the scope that `verdict` lets pass.
    pub(crate) fn permitted_path(&self, file: FileId, scope: FileId, verdict: &mut Verdict<'_>) -> Option<Vec<u8>> {
        let (paths, fingerprint) = {
            let tree = self.tree.read();
            (tree.paths(file, scope), tree.file(file)?.fingerprint.get())
        };
        paths.into_iter().find(|path| verdict(file, path, &fingerprint))
    }
}

/// Why parts could not be asked.
enum Trouble {
    Search(SearchError),
    Rotten(Arc<Collection>, Arc<Part>, SegmentError),
}

impl From<SearchError> for Trouble {
    fn from(error: SearchError) -> Trouble {
        Trouble::Search(error)
    }
}

/// Adds what the view allows; false (and nothing is added) if something isn't but for the excluded point. An error if
/// a distance was computed from bytes that are not those that were written.
fn take(
    part: &Part,
    view: &View<'_>,
    neighbors: &[Neighbor],
    found: &mut Vec<Candidate>,
) -> Result<bool, SegmentError> {
    let before = found.len();
    for neighbor in neighbors {
        part.trust(neighbor.slot)?;
        let Some((reading, row)) = part.resolve(neighbor.slot) else { continue };
        if view.exclude == Some((reading.file, row)) {
            continue;
        }
        if !view.allows(reading, row) {
            found.truncate(before);
            return Ok(false);
        }
        found.push(Candidate { file: reading.file, row, distance: neighbor.distance });
    }
    Ok(true)
}
