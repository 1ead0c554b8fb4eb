//! The file system: inode table, passthrough, vector formats, ingest, virtual views and permission checks.
//!
//! A request's way: [`fuse`] takes it from the kernel; `files` does it on the source and tells `events`; `ingest`
//! reads what changed into the store. A question's way: `views` (or the CLI's query file) to `service` to the store,
//! and each hit past `access` on the way back.

mod access;
mod control;
mod embedding;
pub mod errors;
mod events;
mod fanotify;
mod files;
pub mod formats;
mod fuse;
mod handling;
mod ingest;
mod listing;
pub mod mount;
mod nodes;
mod pool;
mod reopen;
mod service;
mod source;
mod umask;
pub mod upkeep;
mod views;
mod walk;
mod watch;
pub mod wire;

pub use vexfs_store::{self as store, SyncMode, index};
