//! Vectors in memory: distance kernels, quantisation, HNSW graphs, filters.
//!
//! A pure library: it opens no file, knows no FUSE and starts no thread but those of a sealed build.
