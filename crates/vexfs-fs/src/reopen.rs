//! What an `O_PATH` descriptor is of, reached by its entry in `/proc/self/fd`, which is resolved once.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{Access, AtFlags, CWD, Mode, OFlags, accessat, chmodat, openat};
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};
use rustix::path::DecInt;

/// The entry as a path, for system calls that take no descriptor. It leads to a symlink itself, not to where that points.
pub fn path_of(fd: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// An `O_PATH` descriptor of what is open.
pub fn o_path(open: impl AsFd) -> Result<OwnedFd, Errno> {
    open_tree(open, c"", OpenTreeFlags::AT_EMPTY_PATH | OpenTreeFlags::OPEN_TREE_CLOEXEC)
}

/// See the module.
pub struct Reopener {
    descriptors: OwnedFd,
}

impl Reopener {
    /// For descriptors of this process.
    pub fn new() -> Result<Reopener, Errno> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Reopener { descriptors: openat(CWD, c"/proc/self/fd", flags, Mode::empty())? })
    }

    /// Opens with other flags.
    pub fn open(&self, known: impl AsFd, flags: OFlags) -> Result<OwnedFd, Errno> {
        openat(&self.descriptors, DecInt::from_fd(known), flags | OFlags::CLOEXEC, Mode::empty())
    }

    /// Sets permission bits.
    pub fn chmod(&self, known: impl AsFd, mode: Mode) -> Result<(), Errno> {
        chmodat(&self.descriptors, DecInt::from_fd(known), mode, AtFlags::empty())
    }

    /// May the thread do that, with the credentials that it has on?
    pub fn may(&self, known: impl AsFd, access: Access) -> Result<(), Errno> {
        accessat(&self.descriptors, DecInt::from_fd(known), access, AtFlags::EACCESS)
    }
}
