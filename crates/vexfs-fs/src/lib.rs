//! The file system: inode table, passthrough, vector formats, ingest, virtual views and permission checks.

pub mod errors;
pub mod formats;
mod ingest;
mod source;
mod walk;
pub mod wire;
