//! The file system: inode table, passthrough, vector formats, ingest, virtual views and permission checks.
