//! Collections on disk: catalog, head, sealed segments, manifest, sync modes and recovery.
