//! Collections on disk: catalog, head, sealed segments, manifest, sync modes and recovery.
//!
//! Knows `vexfs-index`, knows no FUSE. A [`Volume`] is told what happened to files ([`Volume::link`],
//! [`Volume::put`], [`Volume::rename`]…) after it happened, and answers a [`Query`] with [`Hit`]s. Files are the
//! truth: what a file holds is not logged here but read from it again after a crash ([`Recovery::unread`]).

mod catalog;
mod collection;
pub mod disk;
mod error;
mod id;
mod maintain;
mod names;
mod part;
mod put;
mod report;
mod schema;
mod search;
pub mod segment;
#[cfg(test)]
mod tests;
mod tree;
mod volume;

pub use catalog::{Content, Fingerprint, Link};
pub use collection::{BULK_ROWS, SEAL_POINTS};
pub use error::{CommitError, OpenError, PutError, SearchError};
pub use id::{CollectionId, FileId, Generation, SegmentId};
pub use put::Target;
pub use report::{CollectionReport, FileCounts, FileError, Report};
pub use schema::{Config, Schema};
pub use search::{Answer, Hit, MAX_K, Query, Verdict};
pub use vexfs_index as index;
pub use volume::{FORMAT_VERSION, Options, Recovery, SyncMode, SyncSource, Volume};
