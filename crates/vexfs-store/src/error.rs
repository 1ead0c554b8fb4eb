//! What can go wrong in the store, by operation.

use vexfs_index::{SearchError as GaveUp, SpaceError, VectorError};

/// A volume could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// Another process holds the volume's lock.
    #[error("the volume is in use by another process")]
    Busy,
    /// The state directory was written by a version this one can't read.
    #[error("the state directory has format version {found}; this version reads up to {supported}")]
    Version {
        /// What `volume.toml` says.
        found: u32,
        /// The newest that this build reads.
        supported: u32,
    },
    /// `volume.toml` doesn't parse.
    #[error("volume.toml: {0}")]
    VolumeFile(String),
    /// The catalog can't be read, even by redb's own repair.
    #[error("catalog: {0}")]
    Catalog(String),
    /// The state directory can't be read or written.
    #[error("{what}: {source}")]
    Io {
        /// Which file or step.
        what: String,
        /// The system's error.
        source: std::io::Error,
    },
}

/// A change could not be made durable.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum CommitError {
    /// Who waited for it is gone.
    #[error("nobody waits for it any more")]
    Cancelled,
    /// The disk below refused; `errno` is its word (ENOSPC, EIO…).
    #[error("catalog: {message}")]
    Io {
        /// The system's error number, EIO where it gave none.
        errno: i32,
        /// In words.
        message: String,
    },
}

/// A file's vectors can't be indexed. The file itself is never touched.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum PutError {
    /// One of its vectors is not valid in the collection.
    #[error("row {row}: {error}")]
    Vector {
        /// Row of the file, from 0.
        row: usize,
        /// What is wrong with it.
        error: VectorError,
    },
    /// The collection's settings contradict the vectors.
    #[error("{0}")]
    Space(#[from] SpaceError),
    /// More rows or bytes than a file may bring.
    #[error("{0}")]
    TooLarge(String),
    /// There is no room in the state directory for the rows on their way to their segment; `errno` is the system's word.
    #[error("no room for {bytes} bytes of rows on their way to the index: {message}")]
    Room {
        /// Bytes that were wanted.
        bytes: usize,
        /// The system's error number, EIO where it gave none.
        errno: i32,
        /// In words.
        message: String,
    },
}

/// A search could not be answered.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SearchError {
    /// Collections lie in the scope, none of this dimension.
    #[error("the query has {got} dimensions; here are collections of {have:?}")]
    WrongDimension {
        /// The query's.
        got: usize,
        /// Those in the scope.
        have: Vec<usize>,
    },
    /// Several collections fit, with metrics whose distances can't be compared.
    #[error("distances can't be compared between {0}")]
    Incomparable(String),
    /// The query vector itself is not valid.
    #[error("query: {0}")]
    Query(#[from] VectorError),
    /// The deadline passed.
    #[error("the search passed its deadline")]
    Deadline,
    /// Who asked is gone.
    #[error("the search was cancelled")]
    Cancelled,
    /// The first scan of an adopted directory is not over.
    #[error("the volume is still being scanned for the first time ({done} vector files so far)")]
    Scanning {
        /// Files read so far.
        done: u64,
    },
}

impl From<GaveUp> for SearchError {
    fn from(error: GaveUp) -> SearchError {
        match error {
            // The store sets no limit of distances.
            GaveUp::Deadline | GaveUp::WorkLimit => SearchError::Deadline,
            GaveUp::Cancelled => SearchError::Cancelled,
        }
    }
}
