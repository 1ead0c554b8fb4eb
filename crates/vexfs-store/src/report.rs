//! What the volume tells of itself.

use std::collections::HashSet;
use std::sync::atomic::Ordering;
use std::time::Instant;

use serde::Serialize;

use crate::background::Kind;
use crate::error::SearchError;
use crate::id::FileId;
use crate::part::Part;
use crate::row::{LinkRef, State};
use crate::tree::Tree;
use crate::volume::{SyncMode, Volume};

/// State of a volume, or of a directory of it.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The volume's identity.
    pub uuid: String,
    /// How new points are linked.
    pub sync: SyncMode,
    /// The first scan of the source is over.
    pub scanned: bool,
    /// Vector files in the scope.
    pub files: FileCounts,
    /// Collections that have files in the scope or around it.
    pub collections: Vec<CollectionReport>,
    /// Points of these collections that are not in a graph yet.
    pub pending: u64,
    /// How long the oldest of them has waited, in milliseconds; null if none does.
    pub oldest_pending_ms: Option<u64>,
    /// The work behind.
    pub background: BackgroundReport,
    /// Memory that is kept, by what for.
    pub memory: MemoryReport,
    /// Files that are kept but not indexed, with the reason; at most [`MAX_ERRORS`].
    pub errors: Vec<FileError>,
    /// Segments that were given up since the volume was opened because their bytes are not those that were written.
    pub quarantined: Vec<Quarantined>,
    /// The last thing that went wrong behind; null if nothing has.
    pub last_error: Option<String>,
}

/// Bytes of memory that a volume keeps, by what for. Mapped files, the catalog's pages and builds aside.
#[derive(Clone, Debug, Serialize)]
pub struct MemoryReport {
    /// What `--memory` allows for all; null for what is useful.
    pub allowed: Option<u64>,
    /// Heads: points that are in no segment yet, and their graphs.
    pub heads: u64,
    /// Points that wait to be sealed.
    pub unsealed: u64,
    /// Copies on huge pages of what walks of segments read.
    pub copies: u64,
    /// Names and what else is known of each file, about.
    pub names: u64,
    /// Scratches of searches and inserts that are not in use.
    pub scratches: u64,
    /// Queries that indexes learn from.
    pub queries: u64,
}

/// What is done behind: linking, sealing, merging, verifying.
#[derive(Clone, Debug, Serialize)]
pub struct BackgroundReport {
    /// It is held back, but for what somebody waits for.
    pub paused: bool,
    /// Bytes a second that it may read and write; null for as many as it can.
    pub rate: Option<u64>,
    /// The segment that is being made, if one is.
    pub work: Option<WorkReport>,
}

/// A segment in the making.
#[derive(Clone, Debug, Serialize)]
pub struct WorkReport {
    /// `seal`, `merge` or `compact`.
    pub kind: Kind,
    /// Its collection's root, relative to the volume's.
    pub directory: String,
    /// Points that it is made of.
    pub points: u64,
    /// Of these, linked. What is left once all are is to write the file.
    pub linked: u64,
    /// Milliseconds since it began.
    pub elapsed_ms: u64,
}

/// A segment that was given up; its files are read again.
#[derive(Clone, Debug, Serialize)]
pub struct Quarantined {
    /// Its file's name under `segments/`.
    pub segment: String,
    /// Why.
    pub error: String,
}

/// Vector files by what came of them.
#[derive(Clone, Debug, Default, Serialize)]
pub struct FileCounts {
    /// Their vectors are found.
    pub indexed: u64,
    /// They hold no vector.
    pub empty: u64,
    /// Seen, not read yet.
    pub unread: u64,
    /// Kept, not indexed; see `errors`.
    pub refused: u64,
    /// Vectors attached to files; they count nowhere above.
    pub attached: u64,
}

/// A collection.
#[derive(Clone, Debug, Serialize)]
pub struct CollectionReport {
    /// Its root, relative to the volume's; empty for the volume's root itself.
    pub directory: String,
    /// By a `.vexfs.toml`; otherwise inferred.
    pub declared: bool,
    /// Null until the first vector.
    pub dimension: Option<usize>,
    /// `cosine`, `l2`, `ip`.
    pub metric: Option<String>,
    /// `f32`, `f16`, `i8`, `u8`.
    pub element: Option<String>,
    /// `sq8`, `none`.
    pub quantization: Option<String>,
    /// Vectors that searches can find.
    pub points: u64,
    /// Of these, found by exact scan until they are linked.
    pub pending: u64,
    /// Vectors that are dead and still take space.
    pub dead: u64,
    /// Sealed segments.
    pub segments: u64,
    /// Bytes of the segments on disk.
    pub segment_bytes: u64,
    /// Heads and segments that have learned what a recall takes from queries that were asked.
    pub learned: u64,
}

/// A file that isn't indexed.
#[derive(Clone, Debug, Serialize)]
pub struct FileError {
    /// Relative to the directory asked in.
    pub path: String,
    /// Errno that `close(2)` answers under `--strict`.
    pub errno: i32,
    /// Why.
    pub error: String,
}

/// Errors that a report lists.
pub const MAX_ERRORS: usize = 1_000;

impl Volume {
    /// The state of `scope` and below.
    pub fn report(&self, scope: FileId) -> Report {
        let inner = &*self.inner;
        let scanned = inner.writer.lock().meta.scanned;
        // What is published while this is held is of a later version.
        let tree = inner.tree.read();
        let version = inner.version.load(Ordering::Acquire);
        let mut files = FileCounts::default();
        let mut errors = Vec::new();
        for row in tree.files() {
            let file = row.file;
            if scope != FileId::ROOT && !tree.in_scope(file, scope) {
                continue;
            }
            match &row.state {
                State::Indexed { .. } if file.is_attached() => files.attached += 1,
                State::Indexed { .. } => files.indexed += 1,
                State::Empty => files.empty += 1,
                State::Unread => files.unread += 1,
                State::Refused(refusal) => {
                    files.refused += 1;
                    if errors.len() < MAX_ERRORS {
                        let path = tree.paths(file, scope).into_iter().next().unwrap_or_default();
                        errors.push(FileError {
                            path: String::from_utf8_lossy(&path).into_owned(),
                            errno: refusal.errno,
                            error: refusal.reason.clone(),
                        });
                    }
                }
            }
        }
        errors.sort_by(|a, b| a.path.cmp(&b.path));
        let mut collections = Vec::new();
        let mut oldest: Option<Instant> = None;
        for collection in inner.collections.read().values() {
            let row = collection.row.lock().clone();
            if !tree.dir_in_scope(row.dir, scope) && !tree.dir_in_scope(scope, row.dir) {
                continue;
            }
            let schema = collection.schema.load_full();
            let parts = collection.parts.load();
            let sum = |count: fn(&Part) -> u64| parts.iter().map(|part| count(part)).sum::<u64>();
            oldest = parts.iter().filter_map(|part| part.oldest_pending()).chain(oldest).min();
            let directory = tree.dir_path(row.dir, FileId::ROOT).unwrap_or_default();
            collections.push(CollectionReport {
                directory: String::from_utf8_lossy(&directory).into_owned(),
                declared: row.declared,
                dimension: schema.as_ref().map(|s| s.space.dim()),
                metric: schema.as_ref().map(|s| s.space.metric().to_string()),
                element: schema.as_ref().map(|s| s.space.element().to_string()),
                quantization: schema.as_ref().map(|s| s.params.quantization.to_string()),
                points: parts.iter().map(|part| part.points_at(version)).sum(),
                pending: sum(Part::pending),
                dead: sum(Part::ended_points),
                segments: sum(|part| u64::from(part.as_segment().is_some())),
                segment_bytes: sum(|part| part.as_segment().map_or(0, |s| s.bytes)),
                learned: sum(|part| u64::from(part.has_learned())),
            });
        }
        let pending = collections.iter().map(|collection| collection.pending).sum();
        let work = inner.background.work().map(|(work, linked)| {
            let root = inner.collections.read().get(&work.collection).map(|collection| collection.row.lock().dir);
            let directory = root.and_then(|dir| tree.dir_path(dir, FileId::ROOT)).unwrap_or_default();
            WorkReport {
                kind: work.kind,
                directory: String::from_utf8_lossy(&directory).into_owned(),
                points: work.points,
                linked,
                elapsed_ms: work.since.elapsed().as_millis() as u64,
            }
        });
        Report {
            uuid: inner.uuid.clone(),
            sync: inner.sync_mode(),
            scanned,
            files,
            collections,
            pending,
            background: BackgroundReport { paused: inner.background.is_paused(), rate: inner.background.rate(), work },
            memory: self.memory(&tree),
            oldest_pending_ms: oldest.map(|at| at.elapsed().as_millis() as u64),
            errors,
            quarantined: inner
                .quarantined
                .lock()
                .iter()
                .map(|(id, error)| Quarantined { segment: format!("{:016x}.seg", id.0), error: error.clone() })
                .collect(),
            last_error: inner.last_error.lock().clone(),
        }
    }

    fn memory(&self, tree: &Tree) -> MemoryReport {
        let inner = &*self.inner;
        let (mut heads, mut unsealed, mut queries) = (0, 0, 0);
        for collection in inner.collections.read().values() {
            heads += collection.head().map_or(0, |head| head.waiting_bytes()) as u64;
            unsealed += collection.unsealed_bytes() as u64;
            queries += collection.asked.bytes() as u64;
        }
        MemoryReport {
            allowed: inner.options.memory,
            heads,
            unsealed,
            copies: inner.budget.copied(),
            names: tree.bytes(),
            scratches: inner.scratch.lock().iter().map(|scratch| scratch.bytes() as u64).sum(),
            queries,
        }
    }

    /// Is the first scan of the source over? The error tells how far it is.
    pub fn ready(&self) -> Result<(), SearchError> {
        if self.inner.writer.lock().meta.scanned {
            return Ok(());
        }
        Err(SearchError::Scanning { done: self.inner.scanned_files.load(Ordering::Relaxed) })
    }

    /// Counts a file of the first scan.
    pub fn scan_progress(&self) {
        self.inner.scanned_files.fetch_add(1, Ordering::Relaxed);
    }

    /// The source has been walked as a whole.
    pub fn scan_finished(&self) {
        let mut writer = self.inner.writer.lock();
        if !writer.meta.scanned {
            writer.meta.scanned = true;
            self.inner.changed(&mut writer);
        }
    }

    /// Every file that is known, with its paths relative to the root: for a walk to find those that are gone.
    pub fn known_files(&self) -> Vec<FileId> {
        self.inner.tree.read().files().map(|row| row.file).collect()
    }

    /// Every directory that is known, but for the root.
    pub fn known_dirs(&self) -> Vec<FileId> {
        self.inner.tree.read().dirs().map(|(dir, _)| dir).collect()
    }

    /// Directories below which no file is known.
    pub fn barren_dirs(&self) -> Vec<FileId> {
        let tree = self.inner.tree.read();
        let mut held = HashSet::new();
        for mut dir in tree.files().flat_map(|row| row.links.iter().map(|link| link.parent)) {
            // Those above one that is held are.
            while held.insert(dir) {
                let Some(above) = tree.dir(dir) else { break };
                dir = above.parent;
            }
        }
        tree.dirs().map(|(dir, _)| dir).filter(|dir| !held.contains(dir)).collect()
    }

    /// Files, and vectors attached to files, that have one of these names.
    pub fn files_named(&self, names: &HashSet<crate::catalog::Link>) -> Vec<FileId> {
        let tree = self.inner.tree.read();
        let names: HashSet<LinkRef<'_>> = names.iter().map(LinkRef::from).collect();
        let named = tree.files().filter(|row| row.links.iter().any(|link| names.contains(&link)));
        named.map(|row| row.file).collect()
    }

    /// The file's links.
    pub fn links(&self, file: FileId) -> Vec<crate::catalog::Link> {
        self.inner.tree.read().file(file).map(|row| row.links.to_vec()).unwrap_or_default()
    }

    /// A file's paths relative to `scope`.
    pub fn paths(&self, file: FileId, scope: FileId) -> Vec<Vec<u8>> {
        self.inner.tree.read().paths(file, scope)
    }

    /// A directory's path relative to the root.
    pub fn dir_path(&self, dir: FileId) -> Option<Vec<u8>> {
        self.inner.tree.read().dir_path(dir, FileId::ROOT)
    }
}
