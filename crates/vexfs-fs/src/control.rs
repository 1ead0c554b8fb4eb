//! `.vexfs/control`: what the volume's owner asks of it while it is mounted, a command a write.
//!
//! ```text
//! sync               all that happened is durable
//! sync indexed       and in a graph
//! mode lazy          how new vectors are linked from now on
//! mode immediate
//! optimize           one segment for each collection
//! optimize purge     and no byte of what was removed in any file
//! background pause   linking, sealing, merging and verifying are held back, but for what somebody waits for
//! background resume
//! background rate N  they read and write N bytes a second at most; 0: as many as they can
//! ```
//!
//! The write returns when it is done, or with EINTR when who wrote was killed. Of those that take long one at a time: EBUSY
//! for the next.

use parking_lot::Mutex;
use rustix::io::Errno;
use vexfs_store::{SyncMode, Volume};

use crate::access::{Caller, Killed};
use crate::errors::Failure;

/// Does what one write asks.
pub fn obey(volume: &Volume, busy: &Mutex<()>, caller: Caller, command: &[u8]) -> Result<(), Failure> {
    let killed = Killed::new(caller);
    let cancelled = || killed.is_so();
    let words: Vec<&[u8]> = command.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty()).collect();
    match words[..] {
        [b"mode", b"lazy"] => volume.set_sync_mode(SyncMode::Lazy),
        [b"mode", b"immediate"] => volume.set_sync_mode(SyncMode::Immediate),
        [b"sync"] => return volume.commit().map_err(Failure::from),
        [b"sync", b"indexed"] => return alone(busy, || volume.settle(&cancelled)),
        [b"optimize"] => return alone(busy, || volume.optimize(false, &cancelled)),
        [b"optimize", b"purge"] => return alone(busy, || volume.optimize(true, &cancelled)),
        [b"background", b"pause"] => volume.pause(true),
        [b"background", b"resume"] => volume.pause(false),
        [b"background", b"rate", rate] => {
            let rate = std::str::from_utf8(rate).ok().and_then(|rate| rate.parse().ok());
            let wrong = || Failure::new(Errno::INVAL, "background rate: a number of bytes a second is wanted");
            volume.set_background_rate(rate.ok_or_else(wrong)?);
        }
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
