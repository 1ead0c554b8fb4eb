//! A request's umask, put on for one system call.
//!
//! Where a directory has a default ACL it counts and the umask doesn't; only the file system below knows which. So it
//! is given both: the mode as the caller asked for it, and the caller's umask, on this thread alone.

use std::cell::Cell;

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::thread::{UnshareFlags, unshare_unsafe};

thread_local! {
    /// This thread has a umask (and working directory) of its own.
    static APART: Cell<bool> = const { Cell::new(false) };
}

/// Does `work` with this umask; the daemon's own is none, before and after.
pub fn with_umask<T>(umask: u32, work: impl FnOnce() -> T) -> Result<T, Errno> {
    if umask == 0 {
        return Ok(work());
    }
    if !APART.get() {
        apart()?;
        APART.set(true);
    }
    let _restore = Restore;
    rustix::process::umask(Mode::from_raw_mode(umask));
    Ok(work())
}

struct Restore;

impl Drop for Restore {
    fn drop(&mut self) {
        rustix::process::umask(Mode::empty());
    }
}

#[allow(unsafe_code)]
fn apart() -> Result<(), Errno> {
    // SAFETY: CLONE_FS parts root, working directory and umask only; descriptors stay shared.
    unsafe { unshare_unsafe(UnshareFlags::FS) }?;
    // Its own working directory would keep the one where the daemon was started busy.
    rustix::process::chdir("/")
}
