//! The catalog: everything that must agree, in one transactional key-value store.
//!
//! The tables' rows are read once, at open; from then on memory is the authority and [`Catalog::write`] carries
//! the rows that changed, all of one moment in one durable transaction. A durable manifest never names a segment
//! that is not durable: segments are synced before their row is handed here.

use std::fmt;
use std::io;
use std::sync::Arc;

use redb::{Database, ReadableDatabase, ReadableTable, StorageBackend, TableDefinition};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::disk::{Disk, DiskFile};
use crate::error::{CommitError, OpenError};
use crate::id::{CollectionId, FileId, Generation, SegmentId};
use crate::schema::Config;

const META: TableDefinition<&str, &[u8]> = TableDefinition::new("meta");
const FILES: TableDefinition<u64, &[u8]> = TableDefinition::new("files");
const DIRS: TableDefinition<u64, &[u8]> = TableDefinition::new("dirs");
const COLLECTIONS: TableDefinition<u32, &[u8]> = TableDefinition::new("collections");
const SEGMENTS: TableDefinition<u64, u32> = TableDefinition::new("segments");

/// What tells whether a file's bytes are still those that were read.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// Bytes.
    pub size: u64,
    /// Modification time, nanoseconds since 1970.
    pub mtime: i128,
    /// Change time, nanoseconds since 1970.
    pub ctime: i128,
}

/// A directory entry: the folder and the name in it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Link {
    /// The folder.
    pub parent: FileId,
    /// The name's bytes; any but `/` and NUL.
    pub name: Vec<u8>,
}

/// What is known of a file's vectors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Content {
    /// Not read since it was seen.
    Unread,
    /// Holds no vector: no bytes, or no rows.
    Empty,
    /// In a collection.
    Indexed {
        /// Which.
        collection: CollectionId,
        /// Which reading of the file; rows of older readings are dead.
        generation: Generation,
        /// How many vectors.
        rows: u32,
    },
    /// Kept as a file, not indexed.
    Refused {
        /// What `close(2)` answers under `--strict`.
        errno: i32,
        /// Why, in words, for `vexfs status` and `user.vexfs.status`.
        reason: String,
    },
}

/// A file that has a vector file's name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FileRow {
    /// Every hard link whose name is a vector file's.
    pub links: Vec<Link>,
    /// As of the reading.
    pub fingerprint: Fingerprint,
    /// What the reading gave.
    pub content: Content,
}

/// A collection's row.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CollectionRow {
    /// Its root directory.
    pub dir: FileId,
    /// By `.vexfs.toml` (kept even while empty), or inferred from a first vector.
    pub declared: bool,
    /// What the `.vexfs.toml` says, or what was inferred.
    pub config: Config,
    /// Dimension and element, once a first vector came.
    pub shape: Option<(u32, String)>,
}

/// Facts about the volume as a whole.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Meta {
    /// The next segment, generation and collection number: never given twice.
    pub next_segment: u64,
    /// See `next_segment`.
    pub next_generation: u64,
    /// See `next_segment`.
    pub next_collection: u32,
    /// Inode number of the source's root directory when last open; another means a copied volume.
    pub root_inode: u64,
    /// The first scan of the source is over.
    pub scanned: bool,
}

/// How far the source's bytes are known to be durable. Readings may reach the disk before the bytes that they were read
/// from: what the source lost in a power cut must be read again.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SourceMark {
    /// The machine's boot in which the catalog was last written; in another one power may have been lost.
    pub boot: String,
    /// Readings up to this generation are of bytes that are durable.
    pub synced: u64,
    /// When the source's root directory was made, nanoseconds since 1970: another one means a copied volume, also where
    /// both have the inode number that the roots of file systems have. 0 where that isn't known.
    pub root_born: i128,
}

/// All rows, as read at open.
#[derive(Default)]
pub struct Rows {
    /// Volume facts.
    pub meta: Meta,
    /// `None` in a catalog that was never told.
    pub source: Option<SourceMark>,
    /// By file.
    pub files: Vec<(FileId, FileRow)>,
    /// By directory: its only link.
    pub dirs: Vec<(FileId, Link)>,
    /// By collection.
    pub collections: Vec<(CollectionId, CollectionRow)>,
    /// The manifests: segments and whose they are.
    pub segments: Vec<(SegmentId, CollectionId)>,
}

impl Rows {
    /// Has nothing been committed yet? No segment is older than the first commit.
    pub fn never_written(&self) -> bool {
        self.source.is_none()
    }
}

/// Rows to write; `None` removes the row.
#[derive(Default)]
pub struct Changes {
    /// Always written.
    pub meta: Meta,
    /// Always written.
    pub source: SourceMark,
    /// Changed files.
    pub files: Vec<(FileId, Option<FileRow>)>,
    /// Changed directories.
    pub dirs: Vec<(FileId, Option<Link>)>,
    /// Changed collections.
    pub collections: Vec<(CollectionId, Option<CollectionRow>)>,
    /// Changed manifests.
    pub segments: Vec<(SegmentId, Option<CollectionId>)>,
}

/// The open store.
pub struct Catalog {
    /// `None` after redb met an I/O error, until the next write opens it anew.
    database: Option<Database>,
    file: Arc<dyn DiskFile>,
    repaired: bool,
    cache: usize,
}

/// The file's name in the state directory.
pub const FILE: &str = "catalog";
impl Catalog {
    /// Opens or makes the catalog, with so many bytes for pages in memory.
    pub fn open(disk: &dyn Disk, cache: usize) -> Result<(Catalog, Rows), OpenError> {
        let file = disk.open(FILE).map_err(|source| OpenError::Io { what: FILE.to_owned(), source })?;
        let catalog = |error: &dyn fmt::Display| OpenError::Catalog(error.to_string());
        let mut this = Catalog { database: None, file, repaired: false, cache };
        // A clean database is taken on trust by redb, page by page; ours must not be.
        if let Err(error) = this.verify() {
            this.let_go();
            return Err(catalog(&error));
        }
        // The tables exist from the first moment, so that reading needs no special case.
        this.write(None).map_err(|error| catalog(&error))?;
        disk.sync_dir("").map_err(|source| OpenError::Io { what: FILE.to_owned(), source })?;
        let rows = contained(|| this.read()).map_err(|error| catalog(&error))?;
        Ok((this, rows))
    }

    /// Was it damaged when it was opened?
    pub fn repaired(&self) -> bool {
        self.repaired
    }

    /// Gives the space of what was removed back, and with it the bytes.
    pub fn compact(&mut self) -> Result<(), CommitError> {
        let result = contained(|| {
            self.database()?;
            match self.database.as_mut().map(Database::compact) {
                Some(Err(error)) => Err(error.into()),
                Some(Ok(_)) | None => Ok(()),
            }
        });
        result.map_err(|error| self.failed(&error))
    }

    fn verify(&mut self) -> Result<(), redb::Error> {
        contained(|| {
            self.database()?;
            match self.database.as_mut().map(Database::check_integrity) {
                Some(Ok(true)) | None => Ok(()),
                // redb went back to what it was before its last commit: of what is gone the files hold the truth.
                Some(Ok(false)) => {
                    log::warn!("the catalog was damaged; redb repaired it");
                    self.repaired = true;
                    Ok(())
                }
                Some(Err(error)) => Err(error.into()),
            }
        })
    }

    fn database(&mut self) -> Result<&Database, redb::Error> {
        match &mut self.database {
            Some(database) => Ok(database),
            empty => {
                let database = Database::builder()
                    .set_cache_size(self.cache)
                    .create_with_backend(Backend(Arc::clone(&self.file)))?;
                Ok(empty.insert(database))
            }
        }
    }

    fn read(&mut self) -> Result<Rows, redb::Error> {
        let mut rows = Rows::default();
        let transaction = self.database()?.begin_read()?;
        let meta = transaction.open_table(META)?;
        if let Some(value) = meta.get("volume")? {
            rows.meta = decode(value.value())?;
        }
        if let Some(value) = meta.get("source")? {
            rows.source = Some(decode(value.value())?);
        }
        for entry in transaction.open_table(FILES)?.iter()? {
            let (key, value) = entry?;
            rows.files.push((FileId(key.value()), decode(value.value())?));
        }
        for entry in transaction.open_table(DIRS)?.iter()? {
            let (key, value) = entry?;
            rows.dirs.push((FileId(key.value()), decode(value.value())?));
        }
        for entry in transaction.open_table(COLLECTIONS)?.iter()? {
            let (key, value) = entry?;
            rows.collections.push((CollectionId(key.value()), decode(value.value())?));
        }
        for entry in transaction.open_table(SEGMENTS)?.iter()? {
            let (key, value) = entry?;
            rows.segments.push((SegmentId(key.value()), CollectionId(value.value())));
        }
        Ok(rows)
    }

    /// Makes `changes` durable, all or nothing. `None` only makes the tables.
    pub fn write(&mut self, changes: Option<&Changes>) -> Result<(), CommitError> {
        contained(|| self.try_write(changes)).map_err(|error| self.failed(&error))
    }

    /// Closing a damaged database may fail as reading it does.
    fn let_go(&mut self) {
        let database = self.database.take();
        let closed = contained(|| {
            drop(database);
            Ok(())
        });
        if let Err(error) = closed {
            log::warn!("closing the catalog: {error}");
        }
    }

    fn failed(&mut self, error: &redb::Error) -> CommitError {
        // redb refuses all further work after an I/O error until it is opened again.
        self.let_go();
        let errno = match error {
            redb::Error::Io(error) => error.raw_os_error(),
            _ => None,
        };
        CommitError::Io { errno: errno.unwrap_or(rustix::io::Errno::IO.raw_os_error()), message: error.to_string() }
    }

    fn try_write(&mut self, changes: Option<&Changes>) -> Result<(), redb::Error> {
        let mut transaction = self.database()?.begin_write()?;
        transaction.set_two_phase_commit(true);
        {
            let mut meta = transaction.open_table(META)?;
            let mut files = transaction.open_table(FILES)?;
            let mut dirs = transaction.open_table(DIRS)?;
            let mut collections = transaction.open_table(COLLECTIONS)?;
            let mut segments = transaction.open_table(SEGMENTS)?;
            if let Some(changes) = changes {
                meta.insert("volume", encode(&changes.meta)?.as_slice())?;
                meta.insert("source", encode(&changes.source)?.as_slice())?;
                for (id, row) in &changes.files {
                    match row {
                        Some(row) => drop(files.insert(id.0, encode(row)?.as_slice())?),
                        None => drop(files.remove(id.0)?),
                    }
                }
                for (id, row) in &changes.dirs {
                    match row {
                        Some(row) => drop(dirs.insert(id.0, encode(row)?.as_slice())?),
                        None => drop(dirs.remove(id.0)?),
                    }
                }
                for (id, row) in &changes.collections {
                    match row {
                        Some(row) => drop(collections.insert(id.0, encode(row)?.as_slice())?),
                        None => drop(collections.remove(id.0)?),
                    }
                }
                for (id, row) in &changes.segments {
                    match row {
                        Some(row) => drop(segments.insert(id.0, row.0)?),
                        None => drop(segments.remove(id.0)?),
                    }
                }
            }
        }
        transaction.commit()?;
        Ok(())
    }
}

/// redb asserts much of what it reads of its own pages. Bytes that rotted must not end the process.
fn contained<T>(work: impl FnOnce() -> Result<T, redb::Error>) -> Result<T, redb::Error> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let said = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        Err(redb::Error::Corrupted(format!("its pages contradict each other ({})", said.unwrap_or("no reason given"))))
    })
}

fn encode<T: Serialize>(row: &T) -> Result<Vec<u8>, redb::Error> {
    postcard::to_stdvec(row).map_err(|error| redb::Error::Corrupted(error.to_string()))
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, redb::Error> {
    postcard::from_bytes(bytes).map_err(|error| redb::Error::Corrupted(format!("row: {error}")))
}

/// redb over the store's disk seam.
struct Backend(Arc<dyn DiskFile>);

impl fmt::Debug for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Backend")
    }
}

impl StorageBackend for Backend {
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }
    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.read_at(offset, out)
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }
    fn sync_data(&self) -> io::Result<()> {
        self.0.sync()
    }
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write_at(offset, data)
    }
}
