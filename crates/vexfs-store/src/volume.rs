//! An open volume: the catalog's rows in memory, the collections, and the threads that look after them.
//!
//! Lock order: `append` of a collection, then `writer`, then `tree`. Searches take none of the first two. Whatever must
//! agree (names, readings, collections, manifests) changes under `writer`, so that a commit writes one moment.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::thread::JoinHandle;

use parking_lot::{Condvar, Mutex, RwLock};
use serde::{Deserialize, Serialize};
use vexfs_index::Scratch;

use crate::catalog::{Catalog, Changes, CollectionRow, Content, FileRow, Meta, Rows, SourceMark};
use crate::collection::Collection;
use crate::disk::{Disk, read_small, write_small};
use crate::error::{CommitError, OpenError};
use crate::id::{CollectionId, FileId, Generation, SegmentId};
use crate::maintain;
use crate::part::{Part, Reading};
use crate::schema::Schema;
use crate::segment::Segment;
use crate::tree::Tree;

/// The state directory's version that this build reads and writes.
pub const FORMAT_VERSION: u32 = 1;

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
    /// Cores that building a segment may use.
    pub threads: usize,
    /// Which boot of the machine this is: in another one than the last, power may have been lost.
    pub boot: String,
    /// So that fewer files must be read again after a power cut; without it all since the volume was made.
    pub sync_source: Option<SyncSource>,
}

/// What `volume.toml` holds.
#[derive(Serialize, Deserialize)]
struct VolumeFile {
    format: u32,
    uuid: String,
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
    pub(crate) disk: Arc<dyn Disk>,
    pub(crate) options: Options,
    pub(crate) sync: AtomicU8,
    pub(crate) uuid: String,
    pub(crate) tree: RwLock<Tree>,
    pub(crate) collections: RwLock<BTreeMap<CollectionId, Arc<Collection>>>,
    /// Which collection is rooted where.
    pub(crate) roots: RwLock<HashMap<FileId, CollectionId>>,
    /// The live reading of each indexed file.
    pub(crate) readings: Mutex<HashMap<FileId, Arc<Reading>>>,
    pub(crate) writer: Mutex<Writer>,
    /// Searches see what was born up to here.
    pub(crate) version: AtomicU64,
    /// Odd while a list of parts is exchanged; see [`Inner::snapshot`].
    pub(crate) exchange: AtomicU64,
    catalog: Mutex<Catalog>,
    durable: AtomicU64,
    pub(crate) last_error: Mutex<Option<String>>,
    pub(crate) scratch: Mutex<Vec<Scratch>>,
    pub(crate) stop: AtomicBool,
    pub(crate) wake: (Mutex<bool>, Condvar),
    pub(crate) scanned_files: AtomicU64,
}

/// An open volume. Dropping it without [`Volume::close`] is what a crash does, but for the threads' end.
pub struct Volume {
    pub(crate) inner: Arc<Inner>,
    threads: Vec<JoinHandle<()>>,
}

/// What opening found to do before the volume may answer.
#[derive(Debug, Default)]
pub struct Recovery {
    /// Vector files whose points are in no segment and must be read again.
    pub unread: Vec<FileId>,
    /// Segments that could not be served, with the reason; their files are in `unread`.
    pub quarantined: Vec<(SegmentId, String)>,
    /// The catalog was another directory's; all files must be found anew.
    pub rekeyed: bool,
}

impl Volume {
    /// Opens or makes the volume whose state directory is `disk`.
    pub fn open(disk: Arc<dyn Disk>, options: Options) -> Result<(Volume, Recovery), OpenError> {
        let (mut volume, recovery) = Volume::open_still(disk, options)?;
        volume.threads =
            maintain::start(&volume.inner).map_err(|source| OpenError::Io { what: "threads".to_owned(), source })?;
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
        let uuid = open_volume_file(&*disk)?;
        let (catalog, rows) = Catalog::open(&*disk)?;
        let mut recovery = Recovery::default();
        let inner = Arc::new(load(disk, options, uuid, catalog, rows, &mut recovery)?);
        Ok((Volume { inner, threads: Vec::new() }, recovery))
    }

    /// Makes all that happened so far durable. Many callers share one transaction.
    pub fn commit(&self) -> Result<(), CommitError> {
        self.inner.commit()
    }

    /// The mode that new points are linked in.
    pub fn sync_mode(&self) -> SyncMode {
        self.inner.sync_mode()
    }

    /// Changes the mode; points that are pending stay so until the thread behind links them.
    pub fn set_sync_mode(&self, mode: SyncMode) {
        self.inner.sync.store(mode as u8, Ordering::Relaxed);
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
        self.inner.stop.store(true, Ordering::Release);
        self.inner.wake();
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

fn open_volume_file(disk: &dyn Disk) -> Result<String, OpenError> {
    const NAME: &str = "volume.toml";
    let io = |source| OpenError::Io { what: NAME.to_owned(), source };
    if let Some(bytes) = read_small(disk, NAME).map_err(io)? {
        let text = std::str::from_utf8(&bytes).map_err(|error| OpenError::VolumeFile(error.to_string()))?;
        let file: VolumeFile =
            toml::from_str(text).map_err(|error| OpenError::VolumeFile(error.message().to_owned()))?;
        if file.format != FORMAT_VERSION {
            return Err(OpenError::Version { found: file.format, supported: FORMAT_VERSION });
        }
        return Ok(file.uuid);
    }
    let uuid = new_uuid().map_err(io)?;
    let text = format!("# A VexFS volume's state. Don't edit.\nformat = {FORMAT_VERSION}\nuuid = \"{uuid}\"\n");
    write_small(disk, NAME, text.as_bytes()).map_err(io)?;
    Ok(uuid)
}

/// A random UUID (RFC 9562, version 4) from the kernel's generator.
fn new_uuid() -> std::io::Result<String> {
    let mut b = [0u8; 16];
    rustix::rand::getrandom(&mut b, rustix::rand::GetRandomFlags::empty())?;
    b[6] = b[6] & 0x0f | 0x40;
    b[8] = b[8] & 0x3f | 0x80;
    let hex: String = b.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok([&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-"))
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
    if rows.meta.root_inode != 0 && rows.meta.root_inode != options.root_inode {
        // A copied or restored volume: inode numbers mean nothing here. Files hold the truth.
        log::warn!("the source directory is another one than when the volume was closed: reading all files anew");
        recovery.rekeyed = true;
        tree.dirty_files.extend(rows.files.drain(..).map(|(id, _)| id));
        tree.dirty_dirs.extend(rows.dirs.drain(..).map(|(id, _)| id));
        dirty_collections.extend(rows.collections.drain(..).map(|(id, _)| id));
        dirty_segments.extend(rows.segments.drain(..).map(|(id, _)| (id, None)));
        rows.meta.scanned = false;
    }
    rows.meta.root_inode = options.root_inode;
    let mut source = rows.source.take().unwrap_or_default();
    if !source.boot.is_empty() && source.boot != options.boot {
        distrust(&mut rows.files, source.synced, &mut tree.dirty_files);
    }
    source.boot.clone_from(&options.boot);
    let known: BTreeSet<String> =
        rows.segments.iter().filter_map(|(id, _)| id.path().strip_prefix("segments/").map(str::to_owned)).collect();
    let orphans = disk.list("segments").map_err(|source| OpenError::Io { what: "segments".to_owned(), source })?;
    for name in orphans.iter().filter(|name| !known.contains(*name)) {
        let path = format!("segments/{name}");
        disk.remove(&path).map_err(|source| OpenError::Io { what: path, source })?;
    }

    let generations: HashMap<FileId, Generation> = rows
        .files
        .iter()
        .filter_map(|(id, row)| match row.content {
            Content::Indexed { generation, .. } => Some((*id, generation)),
            _ => None,
        })
        .collect();
    let mut collections = BTreeMap::new();
    let mut roots = HashMap::new();
    for (id, row) in rows.collections {
        let schema = schema_of(&row);
        roots.insert(row.dir, id);
        collections.insert(id, Collection::new(id, row, schema));
    }
    let mut readings: HashMap<FileId, Arc<Reading>> = HashMap::new();
    for (id, collection) in rows.segments {
        let Some(collection) = collections.get(&collection) else {
            dirty_segments.insert(id, None);
            continue;
        };
        match Segment::open(&*disk, id) {
            Ok(segment) => {
                let part = revive(segment, &generations, &mut readings);
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
    for (id, row) in &mut rows.files {
        let lost = match row.content {
            Content::Unread => true,
            Content::Indexed { rows, .. } => rows > 0 && !readings.contains_key(id),
            Content::Empty | Content::Refused { .. } => false,
        };
        if lost {
            row.content = Content::Unread;
            recovery.unread.push(*id);
        }
    }
    let (dirty_files, dirty_dirs) = (tree.dirty_files, tree.dirty_dirs);
    tree = Tree::new(rows.files, rows.dirs);
    tree.dirty_files = dirty_files;
    tree.dirty_dirs = dirty_dirs;
    let last_error =
        recovery.quarantined.last().map(|(id, reason)| format!("segment {:016x} was given up: {reason}", id.0));
    Ok(Inner {
        sync: AtomicU8::new(options.sync as u8),
        disk,
        options,
        uuid,
        tree: RwLock::new(tree),
        collections: RwLock::new(collections),
        roots: RwLock::new(roots),
        readings: Mutex::new(readings),
        writer: Mutex::new(Writer { meta: rows.meta, source, dirty_collections, dirty_segments, changes: 1 }),
        version: AtomicU64::new(1),
        exchange: AtomicU64::new(0),
        catalog: Mutex::new(catalog),
        durable: AtomicU64::new(0),
        last_error: Mutex::new(last_error),
        scratch: Mutex::new(Vec::new()),
        stop: AtomicBool::new(false),
        wake: (Mutex::new(false), Condvar::new()),
        scanned_files: AtomicU64::new(0),
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
fn schema_of(row: &CollectionRow) -> Option<Schema> {
    let (dimension, element) = row.shape.as_ref()?;
    row.config.complete(*dimension as usize, element.parse().ok()?).ok()
}

/// Tells which rows of a segment are live: those whose generation the catalog names.
fn revive(
    segment: Segment,
    generations: &HashMap<FileId, Generation>,
    live: &mut HashMap<FileId, Arc<Reading>>,
) -> Arc<Part> {
    let readings = segment
        .files
        .iter()
        .map(|file| {
            let reading = Reading::unborn(file.file, file.generation, file.rows);
            reading.bear(0);
            if generations.get(&file.file) == Some(&file.generation) {
                live.insert(file.file, Arc::clone(&reading));
            } else {
                reading.end(0);
            }
            reading
        })
        .collect();
    Part::sealed(segment, readings)
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
            files: files.into_iter().map(|id| (id, tree.file(id).cloned())).collect(),
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
            std::thread::yield_now();
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
