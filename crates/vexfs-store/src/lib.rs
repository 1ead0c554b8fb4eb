//! Collections on disk: catalog, head, sealed segments, manifest, sync modes and recovery.
//!
//! Knows `vexfs-index`, knows no FUSE. A [`Volume`] is told what happened to files ([`Volume::link`],
//! [`Volume::put`], [`Volume::rename`]…) after it happened, and answers a [`Query`] with [`Hit`]s. Files are the
//! truth: what a file holds is not logged here but read from it again after a crash ([`Recovery::unread`]).

mod asked;
mod background;
mod barrier;
mod budget;
mod catalog;
mod check;
mod collection;
pub mod disk;
mod error;
mod id;
mod identity;
mod maintain;
pub mod memory;
mod names;
mod neighbors;
mod part;
mod put;
mod rekey;
mod report;
mod row;
mod rows;
#[cfg(test)]
#[cfg(feature = "schedules")]
mod schedules;
mod schema;
mod search;
pub mod segment;
mod sync;
#[cfg(test)]
#[cfg(not(feature = "schedules"))]
mod tests;
mod tree;
mod volume;

pub use background::Kind;
pub use barrier::Cancelled;
pub use catalog::{Content, Fingerprint, Link};
pub use check::{Checked, Finding, check, forget};
pub use collection::{BULK_ROWS, SEAL_POINTS};
pub use error::{CommitError, OpenError, PutError, SearchError};
pub use id::{CollectionId, FileId, Generation, SegmentId};
pub use identity::FORMAT_VERSION;
pub use put::Target;
pub use rekey::{Locate, Located};
pub use report::{
    BackgroundReport, CollectionReport, FileCounts, FileError, MemoryReport, Quarantined, Report, WorkReport,
};
pub use rows::Rows;
pub use schema::{Config, Schema};
pub use search::{Answer, Hit, MAX_K, Query, Verdict};
pub use vexfs_index as index;
pub use volume::{Options, Recovery, SyncMode, SyncSource, Volume};
