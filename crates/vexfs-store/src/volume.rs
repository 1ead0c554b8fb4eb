//! An open volume: the catalog's rows in memory, the collections, and the threads that look after them.
//!
//! Lock order: `append` of a collection, then `writer`, then `tree`. Searches take none of the first two. Whatever must
//! agree (names, readings, collections, manifests) changes under `writer`, so that a commit writes one moment.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::thread::JoinHandle;

use serde::{Deserialize, Serialize};
use vexfs_index::Scratch;

use crate::background::Background;
use crate::budget::Budget;
use crate::catalog::{Catalog, Changes, CollectionRow, Content, FileRow, Meta, Rows, SourceMark};
use crate::collection::Collection;
use crate::disk::Disk;
use crate::error::{CommitError, OpenError};
use crate::id::{CollectionId, FileId, Generation, SegmentId};
use crate::identity;
use crate::maintain;
use crate::part::{Part, Reading};
use crate::rekey::{Locate, rekey};
use crate::row::{LinkRef, Refusal, Row, State};
use crate::schema::Schema;
use crate::segment::{Segment, SegmentError};
use crate::sync::{AtomicU64, Condvar, Mutex, RwLock, yield_now};
use crate::tree::Tree;

/// When a new point is linked into its graph. Both ways it is found as soon as `close(2)` returned.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SyncMode {
    /// Before close returns.
    Immediate,
    /// By a thread behind; until then it is found by exact scan.
    #[default]
    Lazy,
}

/// Makes all bytes of the source durable.
pub type SyncSource = Arc<dyn Fn() -> std::io::Result<()> + Send + Sync>;

/// How a volume is opened.
#[derive(Clone)]
pub struct Options {
    /// See [`SyncMode`].
    pub sync: SyncMode,
    /// The source's root directory, to tell a copied volume.
    pub root_inode: u64,
    /// When that directory was made, nanoseconds since 1970; 0 where the file system doesn't tell.
    pub root_born: i128,
    /// Finds the files of a copied volume; without it they are all read again.
    pub locate: Option<Locate>,
    /// Cores that building a segment may use.
    pub threads: usize,
    /// Bytes that may be kept in memory, see `budget.rs`; `None`: as many as are useful.
    pub memory: Option<u64>,
    /// Bytes a second that the work behind may read and write; `None`: as many as it can.
    pub background_rate: Option<u64>,
    /// Which boot of the machine this is: in another one than the last, power may have been lost.
    pub boot: String,
    /// So that fewer files must be read again after a power cut; without it all since the volume was made.
    pub sync_source: Option<SyncSource>,
}

impl Options {
    /// For measures and tests, of a source of which only a root is told: one core for builds, as much memory as is useful.
    pub fn new(sync: SyncMode) -> Options {
        Options {
            sync,
            root_inode: 2,
            root_born: 0,
            locate: None,
            threads: 1,
            memory: None,
            background_rate: None,
            boot: String::new(),
            sync_source: None,
        }
    }
}

pub(crate) struct Writer {
    pub(crate) meta: Meta,
    pub(crate) source: SourceMark,
    pub(crate) dirty_collections: BTreeSet<CollectionId>,
    /// Manifest rows to write.
    pub(crate) dirty_segments: BTreeMap<SegmentId, Option<CollectionId>>,
    /// Counts changes; a commit that began after a change has it.
    pub(crate) changes: u64,
}

pub(crate) struct Inner {
    pub(crate) options: Options,
    pub(crate) budget: Budget,
    pub(crate) background: Background,
    pub(crate) sync: AtomicU8,
    pub(crate) uuid: String,
    pub(crate) tree: RwLock<Tree>,
    pub(crate) collections: RwLock<BTreeMap<CollectionId, Arc<Collection>>>,
    /// Which collection is rooted where.
    pub(crate) roots: RwLock<HashMap<FileId, CollectionId>>,
    pub(crate) writer: Mutex<Writer>,
    /// Searches see what was born up to here.
    pub(crate) version: AtomicU64,
    /// Odd while a list of parts is exchanged; see [`Inner::snapshot`].
    pub(crate) exchange: AtomicU64,
    pub(crate) catalog: Mutex<Catalog>,
    durable: AtomicU64,
    pub(crate) last_error: Mutex<Option<String>>,
    /// Segments that were given up since open, with the reason.
    pub(crate) quarantined: Mutex<Vec<(SegmentId, String)>>,
    /// Files that are to be read again because what was known of them is lost.
    pub(crate) unread: Mutex<Vec<FileId>>,
    pub(crate) scratch: Mutex<Vec<Scratch>>,
    pub(crate) stop: AtomicBool,
    pub(crate) wake: (Mutex<bool>, Condvar),
    pub(crate) scanned_files: AtomicU64,
    /// Bytes by which heads and what waits grew since [`Inner::make_room`] looked at all collections.
    pub(crate) came: AtomicUsize,
    /// Held by who makes one segment of others.
    pub(crate) rewriting: Mutex<()>,
    /// Counts rewritings that failed.
    pub(crate) failures: AtomicU64,
    /// The threads run.
    pub(crate) tended: AtomicBool,
    /// Dropped last, as it holds the volume's lock: a catalog writes while it is closed, and another process that opened it
    /// meanwhile would find it torn.
    pub(crate) disk: Arc<dyn Disk>,
}

/// An open volume. Dropping it without [`Volume::close`] is what a crash does, but for the threads' end.
pub struct Volume {
    pub(crate) inner: Arc<Inner>,
    pub(crate) threads: Vec<JoinHandle<()>>,
}

/// What opening found to do before the volume may answer.
#[derive(Debug, Default)]
pub struct Recovery {
    /// Vector files whose points are in no segment and must be read again.
    pub unread: Vec<FileId>,
    /// Segments that could not be served, with the reason; their files are in `unread`.
    pub quarantined: Vec<(SegmentId, String)>,
    /// The catalog was another directory's; what was found under its path, size and time has its new number, and the
    /// rest must be found anew.
    pub rekeyed: bool,
}

impl Volume {
    /// Opens or makes the volume whose state directory is `disk`.
    pub fn open(disk: Arc<dyn Disk>, options: Options) -> Result<(Volume, Recovery), OpenError> {
        let (mut volume, recovery) = Volume::open_still(disk, options)?;
        volume.threads =
            maintain::start(&volume.inner).map_err(|source| OpenError::Io { what: "threads".to_owned(), source })?;
        volume.inner.tended.store(true, Ordering::Release);
        Ok((volume, recovery))
    }

    /// As [`Volume::open`], without the threads: nothing is linked, sealed or committed but by who asks for it.
    pub(crate) fn open_still(disk: Arc<dyn Disk>, options: Options) -> Result<(Volume, Recovery), OpenError> {
        let io = |what: &str| {
            let what = what.to_owned();
            move |source| OpenError::Io { what, source }
        };
        if !disk.lock().map_err(io("lock"))? {
            return Err(OpenError::Busy);
        }
        let uuid = identity::open(&*disk)?;
        let (catalog, rows) = Catalog::open(&*disk, Budget::new(options.memory).cache)?;
        let new = rows.never_written();
        let mut recovery = Recovery::default();
        let inner = Arc::new(load(disk, options, uuid, catalog, rows, &mut recovery)?);
        if new {
            // So that a catalog without a commit, beside segments, is one that was lost.
            inner.commit().map_err(|error| OpenError::Catalog(error.to_string()))?;
        }
        Ok((Volume { inner, threads: Vec::new() }, recovery))
    }

    /// Makes all that happened so far durable. Many callers share one transaction.
    pub fn commit(&self) -> Result<(), CommitError> {
        self.inner.commit()
    }

    /// Files that are to be read again because a segment had to be given up since the last call.
    pub fn take_unread(&self) -> Vec<FileId> {
        std::mem::take(&mut *self.inner.unread.lock())
    }

    /// The mode that new points are linked in.
    pub fn sync_mode(&self) -> SyncMode {
        self.inner.sync_mode()
    }

    /// Changes the mode; points that are pending stay so until the thread behind links them.
    pub fn set_sync_mode(&self, mode: SyncMode) {
        self.inner.sync.store(mode as u8, Ordering::Relaxed);
    }

    /// Holds linking, sealing, merging and verifying back, or lets them go on. Not while somebody waits for them.
    pub fn pause(&self, paused: bool) {
        self.inner.background.pause(paused);
    }

    /// Bounds the bytes a second that sealing, merging and verifying read and write; 0: no bound.
    pub fn set_background_rate(&self, rate: u64) {
        self.inner.background.set_rate(rate);
    }

    /// The volume's identity, as in `volume.toml`.
    pub fn uuid(&self) -> &str {
        &self.inner.uuid
    }

    /// Stops the threads, seals what is worth it, commits.
    pub fn close(mut self) -> Result<(), CommitError> {
        self.stop_threads();
        maintain::seal_for_close(&self.inner);
        self.inner.sync_source();
        self.inner.commit()
    }

    fn stop_threads(&mut self) {
        self.inner.tended.store(false, Ordering::Release);
        self.inner.stop.store(true, Ordering::Release);
        self.inner.wake();
        self.inner.background.wake();
        for thread in self.threads.drain(..) {
            thread.thread().unpark();
            if thread.join().is_err() {
                log::error!("a thread of the volume panicked");
            }
        }
        self.inner.stop.store(false, Ordering::Release);
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        self.stop_threads();
    }
}

fn load(
    disk: Arc<dyn Disk>,
    options: Options,
    uuid: String,
    catalog: Catalog,
    mut rows: Rows,
    recovery: &mut Recovery,
) -> Result<Inner, OpenError> {
    let mut dirty_segments = BTreeMap::new();
    let mut dirty_collections = BTreeSet::new();
    let mut tree = Tree::default();
    let new = rows.never_written();
    let mut source = rows.source.take().unwrap_or_default();
    let born = |known: i128| known != 0 && options.root_born != 0 && known != options.root_born;
    let copied = rows.meta.root_inode != 0 && rows.meta.root_inode != options.root_inode || born(source.root_born);
    if !source.boot.is_empty() && source.boot != options.boot {
        distrust(&mut rows.files, source.synced, &mut tree.dirty_files);
    }
    if copied {
        // Inode numbers mean nothing here.
        recovery.rekeyed = true;
        tree.dirty_files.extend(rows.files.iter().map(|(id, _)| *id));
        tree.dirty_dirs.extend(rows.dirs.iter().map(|(id, _)| *id));
        dirty_collections.extend(rows.collections.iter().map(|(id, _)| *id));
        let locate = options.locate.clone().unwrap_or_else(|| Arc::new(|_: &[u8], _| None));
        rekey(&mut rows, &*locate);
        tree.dirty_files.extend(rows.files.iter().map(|(id, _)| *id));
        tree.dirty_dirs.extend(rows.dirs.iter().map(|(id, _)| *id));
        log::warn!("the source is another directory than it was: {} files have new numbers", rows.files.len());
    }
    rows.meta.root_inode = options.root_inode;
    source.root_born = options.root_born;
    source.boot.clone_from(&options.boot);
    let known: BTreeSet<String> =
        rows.segments.iter().filter_map(|(id, _)| id.path().strip_prefix("segments/").map(str::to_owned)).collect();
    let orphans = disk.list("segments").map_err(|source| OpenError::Io { what: "segments".to_owned(), source })?;
    for name in orphans.iter().filter(|name| !known.contains(*name)) {
        let path = format!("segments/{name}");
        disk.remove(&path).map_err(|source| OpenError::Io { what: path, source })?;
    }

    // A generation is given once: it says whose rows these are, whatever number the file had then.
    let mut owners: HashMap<Generation, Owner> = rows
        .files
        .iter()
        .filter_map(|(file, row)| match row.content {
            Content::Indexed { generation, .. } => Some((generation, Owner { file: *file, reading: None })),
            _ => None,
        })
        .collect();
    let mut collections = BTreeMap::new();
    let mut roots = HashMap::new();
    let dirs: HashSet<FileId> = rows.dirs.iter().map(|(dir, _)| *dir).chain([FileId::ROOT]).collect();
    for (id, row) in rows.collections {
        let schema = schema_of(&row);
        // One whose root is gone is about to go; another directory may have the number.
        if dirs.contains(&row.dir) {
            roots.insert(row.dir, id);
        }
        collections.insert(id, Collection::new(id, row, schema));
    }
    for (id, collection) in rows.segments {
        let Some(collection) = collections.get(&collection) else {
            dirty_segments.insert(id, None);
            continue;
        };
        let schema = collection.schema.load_full();
        let opened = Segment::open(&*disk, id).and_then(|segment| {
            segment.fits(schema.as_ref().map(|schema| &schema.space))?;
            Ok(segment)
        });
        match opened {
            Ok(segment) => {
                let part = revive(segment, &mut owners);
                let mut parts = Vec::clone(&collection.parts.load());
                parts.push(part);
                collection.parts.store(Arc::new(parts));
            }
            Err(error) => {
                log::error!("segment {:016x}: {error}; its files are read again", id.0);
                recovery.quarantined.push((id, error.to_string()));
                dirty_segments.insert(id, None);
            }
        }
    }
    let files = rows.files.into_iter().map(|(file, row)| {
        let links = row.links.iter().map(LinkRef::from).collect();
        let state = state_of(file, row.content, &mut owners);
        if matches!(state, State::Unread) {
            recovery.unread.push(file);
        }
        Row { file, links, fingerprint: row.fingerprint.into(), state }
    });
    let (dirty_files, dirty_dirs) = (tree.dirty_files, tree.dirty_dirs);
    tree = Tree::new(files, rows.dirs);
    tree.dirty_files = dirty_files;
    tree.dirty_dirs = dirty_dirs;
    let mut last_error =
        recovery.quarantined.last().map(|(id, reason)| format!("segment {:016x} was given up: {reason}", id.0));
    if catalog.repaired() {
        last_error = Some("the catalog was damaged; redb went back to its last sound state".to_owned());
    }
    if new && !orphans.is_empty() {
        last_error = Some("the catalog was lost; every file is read again".to_owned());
    }
    if let Some(error) = &last_error {
        log::error!("{error}");
    }
    Ok(Inner {
        budget: Budget::new(options.memory),
        background: Background::new(options.background_rate.unwrap_or(0)),
        sync: AtomicU8::new(options.sync as u8),
        disk,
        options,
        uuid,
        tree: RwLock::new(tree),
        collections: RwLock::new(collections),
        roots: RwLock::new(roots),
        writer: Mutex::new(Writer { meta: rows.meta, source, dirty_collections, dirty_segments, changes: 1 }),
        version: AtomicU64::new(1),
        exchange: AtomicU64::new(0),
        catalog: Mutex::new(catalog),
        durable: AtomicU64::new(0),
        last_error: Mutex::new(last_error),
        quarantined: Mutex::new(recovery.quarantined.clone()),
        unread: Mutex::new(Vec::new()),
        scratch: Mutex::new(Vec::new()),
        stop: AtomicBool::new(false),
        wake: (Mutex::new(false), Condvar::new()),
        scanned_files: AtomicU64::new(0),
        rewriting: Mutex::new(()),
        came: AtomicUsize::new(0),
        failures: AtomicU64::new(0),
        tended: AtomicBool::new(false),
    })
}

/// After a power cut the bytes of a file may be older than its times tell: what was read of bytes that were not known to
/// be durable is to be read again.
fn distrust(files: &mut [(FileId, FileRow)], synced: u64, dirty: &mut BTreeSet<FileId>) {
    for (id, row) in files {
        let durable = match row.content {
            Content::Indexed { generation, .. } => generation.0 <= synced,
            Content::Unread => true,
            Content::Empty | Content::Refused { .. } => false,
        };
        if !durable {
            row.content = Content::Unread;
            dirty.insert(*id);
        }
    }
}

/// The schema of a row that has its shape.
pub(crate) fn schema_of(row: &CollectionRow) -> Option<Schema> {
    let (dimension, element) = row.shape.as_ref()?;
    row.config.complete(*dimension as usize, element.parse().ok()?).ok()
}

/// Whose rows those of a generation are, by the catalog, and the reading if a segment has them.
struct Owner {
    file: FileId,
    reading: Option<Arc<Reading>>,
}

/// Tells which rows of a segment are live: those whose generation the catalog names.
fn revive(segment: Segment, owners: &mut HashMap<Generation, Owner>) -> Arc<Part> {
    let readings = segment
        .files()
        .map(|entry| {
            let owner = owners.get_mut(&entry.generation);
            let reading = Reading::unborn(owner.as_ref().map_or(entry.file, |owner| owner.file), entry.rows);
            reading.bear(0);
            match owner {
                Some(owner) => owner.reading = Some(Arc::clone(&reading)),
                None => reading.end(0),
            }
            reading
        })
        .collect();
    Part::sealed(segment, readings)
}

/// What a file's row comes to: it is to be read again if no segment has its rows.
fn state_of(file: FileId, content: Content, owners: &mut HashMap<Generation, Owner>) -> State {
    match content {
        Content::Unread => State::Unread,
        Content::Empty => State::Empty,
        Content::Refused { errno, reason } => State::Refused(Box::new(Refusal { errno, reason })),
        Content::Indexed { collection, generation, rows } => {
            let owner = owners.get_mut(&generation).filter(|owner| owner.file == file);
            let reading = owner.and_then(|owner| owner.reading.take());
            // Of no rows there need be none.
            match reading.or_else(|| (rows == 0).then(|| Reading::unborn(file, 0))) {
                Some(reading) => State::Indexed { collection, generation, reading },
                None => State::Unread,
            }
        }
    }
}

impl Inner {
    pub(crate) fn sync_mode(&self) -> SyncMode {
        if self.sync.load(Ordering::Relaxed) == SyncMode::Immediate as u8 {
            SyncMode::Immediate
        } else {
            SyncMode::Lazy
        }
    }

    /// Notes a change under the writer's lock.
    pub(crate) fn changed(&self, writer: &mut Writer) {
        writer.changes += 1;
    }

    /// Copies what walks of a segment read, where there is memory for it.
    pub(crate) fn warm(&self, segment: &Segment) {
        let names = self.tree.read().bytes();
        self.budget.warm(segment, names);
    }

    /// See [`Background::go_on`].
    pub(crate) fn go_on(&self, bytes: usize) -> bool {
        self.background.go_on(&self.stop, bytes)
    }

    /// Tells the threads that there is work.
    pub(crate) fn wake(&self) {
        *self.wake.0.lock() = true;
        self.wake.1.notify_all();
    }

    pub(crate) fn commit(&self) -> Result<(), CommitError> {
        let wanted = self.writer.lock().changes;
        let mut catalog = self.catalog.lock();
        if self.durable.load(Ordering::Acquire) >= wanted {
            return Ok(());
        }
        let (changes, at) = self.take_changes();
        match catalog.write(Some(&changes)) {
            Ok(()) => {
                self.durable.store(at, Ordering::Release);
                Ok(())
            }
            Err(error) => {
                self.give_back(&changes);
                *self.last_error.lock() = Some(error.to_string());
                Err(error)
            }
        }
    }

    /// Makes the source's bytes durable, if something was read that may not be, and notes it for the next commit.
    pub(crate) fn sync_source(&self) {
        let Some(sync) = &self.options.sync_source else { return };
        let read = {
            let writer = self.writer.lock();
            if writer.source.synced >= writer.meta.next_generation {
                return;
            }
            writer.meta.next_generation
        };
        match sync() {
            Ok(()) => {
                let mut writer = self.writer.lock();
                writer.source.synced = read;
                self.changed(&mut writer);
            }
            Err(error) => self.note(format!("the source can't be synced: {error}")),
        }
    }

    /// Something went wrong behind: it is logged, and status tells it.
    pub(crate) fn note(&self, message: String) {
        log::error!("{message}");
        *self.last_error.lock() = Some(message);
    }

    /// All that changed since the last commit, of one moment.
    fn take_changes(&self) -> (Changes, u64) {
        let mut writer = self.writer.lock();
        let mut tree = self.tree.write();
        let files = std::mem::take(&mut tree.dirty_files);
        let dirs = std::mem::take(&mut tree.dirty_dirs);
        let collections = std::mem::take(&mut writer.dirty_collections);
        let known = self.collections.read();
        let changes = Changes {
            meta: writer.meta.clone(),
            source: writer.source.clone(),
            files: files.into_iter().map(|id| (id, tree.file(id).map(Row::to_catalog))).collect(),
            dirs: dirs.into_iter().map(|id| (id, tree.dir(id).cloned())).collect(),
            collections: collections
                .into_iter()
                .map(|id| (id, known.get(&id).map(|collection| collection.row.lock().clone())))
                .collect(),
            segments: std::mem::take(&mut writer.dirty_segments).into_iter().collect(),
        };
        (changes, writer.changes)
    }

    /// What could not be written is still to be written.
    fn give_back(&self, changes: &Changes) {
        let mut writer = self.writer.lock();
        let mut tree = self.tree.write();
        tree.dirty_files.extend(changes.files.iter().map(|(id, _)| *id));
        tree.dirty_dirs.extend(changes.dirs.iter().map(|(id, _)| *id));
        writer.dirty_collections.extend(changes.collections.iter().map(|(id, _)| *id));
        for (id, row) in &changes.segments {
            writer.dirty_segments.entry(*id).or_insert(*row);
        }
    }

    /// Gives up a part whose bytes are not those that were written: from now on it is not searched, and its files are to
    /// be read again.
    pub(crate) fn quarantine(&self, collection: &Collection, part: &Arc<Part>, why: &SegmentError) {
        let mut writer = self.writer.lock();
        let mut parts = Vec::clone(&collection.parts.load());
        let before = parts.len();
        parts.retain(|known| !Arc::ptr_eq(known, part));
        let Some(segment) = part.as_segment().filter(|_| parts.len() < before) else { return };
        writer.dirty_segments.insert(segment.id, None);
        let mut lost = Vec::new();
        {
            let mut tree = self.tree.write();
            let next = self.version.load(Ordering::Acquire) + 1;
            for reading in part.readings().filter(|reading| !reading.ended()) {
                reading.end(next);
                let current = tree.file(reading.file).and_then(|row| row.state.reading());
                if current.is_some_and(|current| Arc::ptr_eq(current, reading))
                    && let Some(row) = tree.file_mut(reading.file)
                {
                    row.state = State::Unread;
                    lost.push(reading.file);
                }
            }
            self.version.store(next, Ordering::Release);
        }
        self.exchange_parts(collection, parts);
        self.changed(&mut writer);
        drop(writer);
        self.note(format!(
            "segment {:016x} is given up and its {} files are read again: {why}",
            segment.id.0,
            lost.len()
        ));
        self.quarantined.lock().push((segment.id, why.to_string()));
        self.unread.lock().extend(lost);
    }

    /// Exchanges a collection's parts. Held under the writer's lock.
    pub(crate) fn exchange_parts(&self, collection: &Collection, parts: Vec<Arc<Part>>) {
        self.exchange.fetch_add(1, Ordering::AcqRel);
        collection.parts.store(Arc::new(parts));
        self.exchange.fetch_add(1, Ordering::AcqRel);
    }

    /// A version and, of each chosen collection, the parts that hold every reading that is live at it.
    ///
    /// An exchange leaves out readings that had ended by then, so a version taken before it and parts taken after
    /// it don't go together; the counter shows that, and the rare clash is tried again.
    pub(crate) fn snapshot(&self, chosen: &[Arc<Collection>]) -> (u64, Vec<Arc<Vec<Arc<Part>>>>) {
        loop {
            let before = self.exchange.load(Ordering::Acquire);
            let version = self.version.load(Ordering::Acquire);
            let parts = chosen.iter().map(|collection| collection.parts.load_full()).collect();
            if before.is_multiple_of(2) && self.exchange.load(Ordering::Acquire) == before {
                return (version, parts);
            }
            yield_now();
        }
    }

    /// A scratch from the pool for the time of `work`.
    pub(crate) fn with_scratch<T>(&self, work: impl FnOnce(&mut Scratch) -> T) -> T {
        let mut scratch = self.scratch.lock().pop().unwrap_or_default();
        let result = work(&mut scratch);
        let mut pool = self.scratch.lock();
        if pool.len() < MAX_SCRATCH {
            pool.push(scratch);
        }
        result
    }
}

/// Scratches kept for reuse; more are made while more searches run at once.
const MAX_SCRATCH: usize = 16;
