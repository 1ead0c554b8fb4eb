//! The seam between the store and the disk: all that the store asks of a file system.
//!
//! [`DirDisk`] is the real one, rooted at an open descriptor, so that a mount over the source directory can't
//! come between. [`MemDisk`] keeps everything in memory, fails on demand and forgets what wasn't synced.

mod dir;
mod mem;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

pub use dir::DirDisk;
pub use mem::{Fault, MemDisk, Survivors};
use vexfs_index::Region;

/// A directory for the store's files. Names are relative, with `/`; their folders exist or are made.
pub trait Disk: Send + Sync {
    /// Opens a file for reading and writing, made empty if it isn't there.
    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>>;
    /// Gives a name to a file that was written and synced under another; replaces what had it.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// Removes a name; one that isn't there is no error.
    fn remove(&self, name: &str) -> io::Result<()>;
    /// The names in a folder.
    fn list(&self, folder: &str) -> io::Result<Vec<String>>;
    /// Makes names of a folder (`""`: the root) durable.
    fn sync_dir(&self, folder: &str) -> io::Result<()>;
    /// A whole file, read-only. Its bytes must not change while the region lives.
    fn map(&self, name: &str) -> io::Result<Region>;
    /// A file of so many zeroed bytes that has no name and ends with its descriptor. All of it is on the disk: writing to
    /// it can't fail for want of space.
    fn scratch(&self, len: u64) -> io::Result<OwnedFd>;
    /// Takes the volume for this process; false if another holds it. Held until the disk is dropped.
    fn lock(&self) -> io::Result<bool>;
}

/// An open file of a [`Disk`].
pub trait DiskFile: Send + Sync {
    /// Length in bytes.
    fn len(&self) -> io::Result<u64>;
    /// Fills `out` from `offset`; an error if the file ends before.
    fn read_at(&self, offset: u64, out: &mut [u8]) -> io::Result<()>;
    /// Writes all of `data` at `offset`.
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()>;
    /// Cuts or extends with zeros.
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// Returns when all that was written is durable.
    fn sync(&self) -> io::Result<()>;
    /// True for a file without bytes.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
}

/// A small file as a whole; `None` if it has no bytes.
pub fn read_small(disk: &dyn Disk, name: &str) -> io::Result<Option<Vec<u8>>> {
    let file = disk.open(name)?;
    let len = usize::try_from(file.len()?).map_err(io::Error::other)?;
    if len == 0 {
        return Ok(None);
    }
    let mut bytes = vec![0; len];
    file.read_at(0, &mut bytes)?;
    Ok(Some(bytes))
}

/// Replaces a small file so that after a crash it is the old one or the new one.
pub fn write_small(disk: &dyn Disk, name: &str, bytes: &[u8]) -> io::Result<()> {
    let temporary = format!("{name}.tmp");
    let file = disk.open(&temporary)?;
    file.set_len(0)?;
    file.write_at(0, bytes)?;
    file.sync()?;
    disk.rename(&temporary, name)?;
    disk.sync_dir("")
}
