//! An open directory of the source, listed in the kernel's own order with the kernel's own cookies, so that a
//! listing goes on where it was although names come and go.

use std::ffi::OsStr;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;

use rustix::fs::{FileType, RawDir, SeekFrom};
use rustix::io::Errno;

use crate::walk::RESERVED;

/// Names read from the source at once.
const BUFFER: usize = 32 << 10;

/// An entry.
pub struct Item<'a> {
    /// Inode number below.
    pub inode: u64,
    /// What it is, where the file system below tells.
    pub kind: FileType,
    /// Its name.
    pub name: &'a OsStr,
    /// Cookie of the entry that follows.
    pub next: u64,
}

/// See the module.
pub struct Listing {
    fd: OwnedFd,
    id: u64,
}

impl Listing {
    /// Of the directory with this number.
    pub fn new(fd: OwnedFd, id: u64) -> Listing {
        Listing { fd, id }
    }

    /// A descriptor of the directory.
    pub fn descriptor(&self) -> Result<OwnedFd, Errno> {
        rustix::io::dup(&self.fd)
    }

    /// Gives entries from a cookie on (0: the first) until `add` says that there is no more room.
    pub fn from(&mut self, cookie: u64, add: &mut dyn FnMut(&Listing, Item<'_>) -> bool) -> Result<(), Errno> {
        rustix::fs::seek(&self.fd, SeekFrom::Start(cookie))?;
        let mut buffer = vec![MaybeUninit::<u8>::uninit(); BUFFER];
        let mut entries = RawDir::new(&self.fd, &mut buffer);
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            // Every directory answers to this name with its virtual one; none lists it.
            if name == RESERVED {
                continue;
            }
            let inode = if name == "." { self.id } else { entry.ino() };
            let item = Item { inode, kind: entry.file_type(), name, next: entry.next_entry_cookie() };
            if add(self, item) {
                break;
            }
        }
        Ok(())
    }
}
