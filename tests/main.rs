//! End to end: a real mount, real system calls, the real command.
//!
//! Where there is no FUSE these tests say that they were skipped; with `VEXFS_REQUIRE_FUSE=1`, as in CI, that is a
//! failure. Tests that need root or fusermount3 say so likewise.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod attached;
mod beneath;
mod crash;
mod disks;
mod files;
mod inputs;
mod model;
mod mounting;
mod permissions;
mod searching;
mod semantics;
mod support;
mod upkeep;
mod vectors;
