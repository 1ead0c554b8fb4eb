//! The source directory as the index sees it: by paths relative to its descriptor, which was opened before mounting.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat, openat, statat};
use rustix::io::Errno;
use vexfs_store::{FileId, Fingerprint, Located};

use crate::embedding;

/// The source's root.
pub struct Source {
    root: OwnedFd,
    device: u64,
    inode: u64,
}

impl Source {
    /// `root` is a descriptor of the source directory.
    pub fn new(root: OwnedFd) -> Result<Source, Errno> {
        let stat = rustix::fs::fstat(&root)?;
        Ok(Source { device: stat.st_dev, inode: stat.st_ino, root })
    }

    /// The root's inode number on the file system below.
    pub fn inode(&self) -> u64 {
        self.inode
    }

    /// When the root was made, nanoseconds since 1970; 0 where the file system below doesn't tell.
    pub fn born(&self) -> i128 {
        use rustix::fs::{StatxFlags, statx};
        match statx(&self.root, "", AtFlags::EMPTY_PATH, StatxFlags::BTIME) {
            Ok(stat) if StatxFlags::from_bits_retain(stat.stx_mask).contains(StatxFlags::BTIME) => {
                i128::from(stat.stx_btime.tv_sec) * 1_000_000_000 + i128::from(stat.stx_btime.tv_nsec)
            }
            _ => 0,
        }
    }

    /// What the store calls the file or directory at a path, or the vector attached to it.
    pub fn locate(&self, path: &[u8], attached: bool) -> Option<Located> {
        if attached {
            let (file, found) = self.at(path).ok()?;
            let (stat, value) = embedding::read(found.as_fd()).ok()?;
            return Some(Located { id: file.attached(), fingerprint: Some(value?.fingerprint(&stat)) });
        }
        let stat = self.stat(path).ok()?;
        let id = self.id(&stat)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => Some(Located { id, fingerprint: None }),
            FileType::RegularFile => Some(Located { id, fingerprint: Some(fingerprint(&stat)) }),
            _ => None,
        }
    }

    /// The root's descriptor.
    pub fn root(&self) -> &OwnedFd {
        &self.root
    }

    /// The identity of what `stat` describes; `None` on another device than the root's, where nothing is indexed.
    pub fn id(&self, stat: &Stat) -> Option<FileId> {
        match (stat.st_dev == self.device, stat.st_ino) {
            (false, _) => None,
            (true, inode) if inode == self.inode => Some(FileId::ROOT),
            // The root's number at the mount; a file that has it below is served, not indexed.
            (true, 1) => None,
            (true, inode) => (inode <= FileId::MAX_FILE).then_some(FileId(inode)),
        }
    }

    /// What is at a path, links not followed.
    pub fn stat(&self, path: &[u8]) -> Result<Stat, Errno> {
        if path.is_empty() {
            return rustix::fs::fstat(&self.root);
        }
        statat(&self.root, path, AtFlags::SYMLINK_NOFOLLOW)
    }

    /// Opens the regular file `file` at `path` for reading; ESTALE if something else is there.
    pub fn open(&self, path: &[u8], file: FileId) -> Result<File, Errno> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
        let stat = self.stat(path)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile || self.id(&stat) != Some(file) {
            return Err(Errno::STALE);
        }
        let fd = openat(&self.root, path, flags, Mode::empty())?;
        match self.id(&rustix::fs::fstat(fd.as_fd())?) {
            Some(opened) if opened == file => Ok(File::from(fd)),
            _ => Err(Errno::STALE),
        }
    }

    /// A descriptor (`O_PATH`) of the regular file at `path`, and which file it is; ESTALE if it is something else.
    pub fn at(&self, path: &[u8]) -> Result<(FileId, OwnedFd), Errno> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = openat(&self.root, path, flags, Mode::empty())?;
        let stat = rustix::fs::fstat(&fd)?;
        match (FileType::from_raw_mode(stat.st_mode), self.id(&stat)) {
            (FileType::RegularFile, Some(file)) => Ok((file, fd)),
            _ => Err(Errno::STALE),
        }
    }

    /// Opens a directory for listing.
    pub fn open_dir(&self, path: &[u8]) -> Result<OwnedFd, Errno> {
        let path = if path.is_empty() { b"." } else { path };
        openat(&self.root, path, OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
    }
}

/// What tells whether bytes changed.
pub fn fingerprint(stat: &Stat) -> Fingerprint {
    let nanoseconds = |seconds: i64, nanos: u64| i128::from(seconds) * 1_000_000_000 + i128::from(nanos);
    Fingerprint {
        size: stat.st_size as u64,
        mtime: nanoseconds(stat.st_mtime, stat.st_mtime_nsec),
        ctime: nanoseconds(stat.st_ctime, stat.st_ctime_nsec),
    }
}
