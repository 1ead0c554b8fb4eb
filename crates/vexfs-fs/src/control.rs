//! `.vexfs/control`: what the volume's owner asks of it while it is mounted, a command a write.
//!
//! ```text
//! sync               all that happened is durable
//! sync indexed       and in a graph
//! mode lazy          how new vectors are linked from now on
//! mode immediate
//! optimize           one segment for each collection
//! optimize purge     and no byte of what was removed in any file
//! ```
//!
//! The write returns when it is done. One command at a time: EBUSY for the next.

use parking_lot::Mutex;
use rustix::io::Errno;
use vexfs_store::{SyncMode, Volume};

use crate::errors::Failure;

/// Does what one write asks.
pub fn obey(volume: &Volume, busy: &Mutex<()>, command: &[u8]) -> Result<(), Failure> {
    let words: Vec<&[u8]> = command.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty()).collect();
    match words[..] {
        [b"mode", b"lazy"] => volume.set_sync_mode(SyncMode::Lazy),
        [b"mode", b"immediate"] => volume.set_sync_mode(SyncMode::Immediate),
        [b"sync"] => return volume.commit().map_err(Failure::from),
        [b"sync", b"indexed"] => return alone(busy, || volume.settle()),
        [b"optimize"] => return alone(busy, || volume.optimize(false)),
        [b"optimize", b"purge"] => return alone(busy, || volume.optimize(true)),
        _ => return Err(Failure::new(Errno::INVAL, "not a command of the control file")),
    }
    Ok(())
}

/// Commands that take long must not take all the threads that serve.
fn alone(busy: &Mutex<()>, work: impl FnOnce() -> Result<(), vexfs_store::CommitError>) -> Result<(), Failure> {
    let Some(_alone) = busy.try_lock() else {
        return Err(Failure::new(Errno::BUSY, "another command is being done"));
    };
    work().map_err(Failure::from)
}
