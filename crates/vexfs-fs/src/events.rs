//! What the file system tells the index. Each call comes after the system call on the source succeeded and before
//! the caller is answered.

use std::ffi::OsStr;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use parking_lot::RwLockReadGuard;
use rustix::io::Errno;
use vexfs_store::{FileId, Link, Volume};

use crate::embedding::Value;
use crate::errors::Failure;
use crate::ingest::{Ingest, When, is_interesting};
use crate::nodes::Nodes;
use crate::pool::Pool;

/// Why a file's bytes are looked at.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Cause {
    /// close(2).
    Flush,
    /// The last close, or the end of the last mapping.
    Release,
    /// fsync(2): what is read must be durable.
    Fsync,
    /// Truncated or re-dated by path.
    Setattr,
}

/// A directory or a regular file.
#[derive(Copy, Clone)]
pub struct Known {
    /// Its number.
    pub file: FileId,
    /// Which of the two.
    pub is_dir: bool,
    /// A file had a vector attached, as far as the index knew, before it was renamed.
    pub has_attached: bool,
}

/// A rename that has been done.
pub struct Moved<'a> {
    /// Where it was.
    pub from: (FileId, &'a OsStr),
    /// Where it is.
    pub to: (FileId, &'a OsStr),
    /// The file or directory.
    pub what: Known,
    /// What had the new name.
    pub other: Option<Known>,
    /// It has the old name now; otherwise its name is gone.
    pub exchange: bool,
}

/// See the module.
pub trait Events: Send + Sync {
    /// Does a regular file of this name hold vectors or configure a collection?
    fn interested(&self, name: &OsStr) -> bool;
    /// A file of an interesting name is here; `created` if it was just made.
    fn seen(&self, parent: FileId, name: &OsStr, file: FileId, created: bool);
    /// Has one of the file's names been told?
    fn knows(&self, file: FileId) -> bool;
    /// An interesting file's bytes may have changed. The error is what close(2) or fsync(2) answers.
    fn changed(&self, file: FileId, fd: BorrowedFd<'_>, cause: Cause) -> Result<(), Errno>;
    /// Can this vector be attached to a file of that directory? The bytes to store.
    fn may_attach(&self, parent: FileId, file: FileId, value: &Value) -> Result<Vec<u8>, Errno>;
    /// A file of this name has another vector attached.
    fn attached(&self, parent: FileId, name: &OsStr, file: FileId, fd: BorrowedFd<'_>) -> Result<(), Errno>;
    /// A file has no vector attached any more.
    fn detached(&self, file: FileId);
    /// Has the file a vector attached?
    fn has_attached(&self, file: FileId) -> bool;
    /// Has any file a vector attached?
    fn any_attached(&self) -> bool;
    /// A file that has a vector attached is here.
    fn met_attached(&self, parent: FileId, name: &OsStr, file: FileId);
    /// A directory was synced.
    fn synced_dir(&self) -> Result<(), Errno>;
    /// An interesting name is gone.
    fn unlinked(&self, parent: FileId, name: &OsStr, file: FileId);
    /// A directory is gone.
    fn removed_dir(&self, dir: FileId);
    /// To be held while a directory is renamed.
    fn moving(&self) -> RwLockReadGuard<'_, ()>;
    /// Something was renamed.
    fn moved(&self, moved: &Moved<'_>, moving: Option<RwLockReadGuard<'_, ()>>);
}

/// The index's side.
pub struct IndexEvents {
    /// Reads files.
    pub ingest: Arc<Ingest>,
    /// Knows where directories are.
    pub nodes: Arc<Nodes>,
    /// Reads, commits and moves there.
    pub pool: Arc<Pool>,
}

impl IndexEvents {
    fn place(&self, dir: FileId) {
        place(&self.ingest.volume, &self.nodes, dir);
    }

    /// Puts a directory where it is now; true if the volume knows it.
    fn move_dir(&self, dir: FileId, to: (FileId, &OsStr)) -> bool {
        let known = self.ingest.volume.knows_dir(dir);
        if known {
            self.place(to.0);
            self.ingest.volume.set_dir(dir, link(to.0, to.1));
        }
        known
    }
}

/// Tells the volume where a directory and its ancestors are, which it learns only when it has to: when the first vector
/// file appears below, or a question is asked there.
pub fn place(volume: &Volume, nodes: &Nodes, dir: FileId) {
    let mut unknown: Vec<(FileId, Link)> = Vec::new();
    let mut at = dir;
    while !volume.knows_dir(at) {
        let Some((parent, name)) = nodes.place(at) else { break };
        unknown.push((at, link(parent, &name)));
        at = parent;
    }
    for (dir, mut told) in unknown.into_iter().rev() {
        // Of a rename meanwhile the volume was not told, as it didn't know the directory.
        loop {
            volume.set_dir(dir, told.clone());
            match nodes.place(dir).map(|(parent, name)| link(parent, &name)) {
                Some(now) if now != told => told = now,
                _ => break,
            }
        }
    }
}

fn link(parent: FileId, name: &OsStr) -> Link {
    Link { parent, name: name.as_bytes().to_vec() }
}

impl Events for IndexEvents {
    fn interested(&self, name: &OsStr) -> bool {
        is_interesting(name)
    }

    fn seen(&self, parent: FileId, name: &OsStr, file: FileId, created: bool) {
        self.place(parent);
        // A file that was just made is read when it is closed; one that came from beneath us is read now.
        let link = link(parent, name);
        if created {
            self.ingest.volume.link(file, link);
        } else if !self.ingest.volume.knows_link(file, &link) {
            self.pool.run(|| {
                if self.ingest.met(&link, file) {
                    self.ingest.read_known(file, When::Quiet);
                }
            });
        }
    }

    fn knows(&self, file: FileId) -> bool {
        self.ingest.volume.content(file).is_some()
    }

    fn changed(&self, file: FileId, fd: BorrowedFd<'_>, cause: Cause) -> Result<(), Errno> {
        let failed = |failure: Failure| {
            log::debug!("inode {}: {}", file.0, failure.message);
            failure.errno
        };
        let when = match cause {
            Cause::Flush | Cause::Fsync | Cause::Setattr => When::Now,
            Cause::Release => When::Quiet,
        };
        if matches!(cause, Cause::Flush | Cause::Release) && self.ingest.is_short(file, fd) {
            return self.ingest.read(file, fd, when).map_err(failed);
        }
        self.pool.run(|| {
            self.ingest.read(file, fd, when).map_err(failed)?;
            match cause {
                Cause::Fsync => self.ingest.commit().map_err(failed),
                Cause::Flush | Cause::Release | Cause::Setattr => Ok(()),
            }
        })
    }

    fn may_attach(&self, parent: FileId, file: FileId, value: &Value) -> Result<Vec<u8>, Errno> {
        self.place(parent);
        self.pool.run(|| self.ingest.may_attach(parent, file, value)).map_err(|refusal| {
            log::info!("inode {}: {}", file.0, refusal.reason);
            refusal.errno
        })
    }

    fn attached(&self, parent: FileId, name: &OsStr, file: FileId, fd: BorrowedFd<'_>) -> Result<(), Errno> {
        self.place(parent);
        self.pool.run(|| self.ingest.attached(file, link(parent, name), fd)).map_err(|refusal| {
            log::info!("inode {}: {}", file.0, refusal.reason);
            refusal.errno
        })
    }

    fn detached(&self, file: FileId) {
        self.ingest.volume.detach(file);
    }

    fn has_attached(&self, file: FileId) -> bool {
        self.ingest.volume.has_attached(file)
    }

    fn any_attached(&self) -> bool {
        self.ingest.volume.any_attached()
    }

    fn met_attached(&self, parent: FileId, name: &OsStr, file: FileId) {
        self.place(parent);
        let link = link(parent, name);
        if !self.ingest.volume.knows_link(file.attached(), &link) {
            self.pool.run(|| self.ingest.met_attached(&link, file));
        }
    }

    fn synced_dir(&self) -> Result<(), Errno> {
        self.pool.run(|| self.ingest.commit()).map_err(|failure| failure.errno)
    }

    fn unlinked(&self, parent: FileId, name: &OsStr, file: FileId) {
        self.pool.run(|| self.ingest.unlinked(parent, name, file));
    }

    fn removed_dir(&self, dir: FileId) {
        self.ingest.volume.remove_dir(dir);
    }

    fn moving(&self) -> RwLockReadGuard<'_, ()> {
        self.ingest.moving.read()
    }

    fn moved(&self, moved: &Moved<'_>, moving: Option<RwLockReadGuard<'_, ()>>) {
        let (from, to) = (link(moved.from.0, moved.from.1), link(moved.to.0, moved.to.1));
        let (what, other) = (moved.what, moved.other.filter(|_| moved.exchange));
        let replaced = moved.other.filter(|_| !moved.exchange);
        if let Some(replaced) = replaced.filter(|replaced| replaced.is_dir) {
            self.ingest.volume.remove_dir(replaced.file);
        }
        let dirs = [(Some(what), from.parent, moved.to), (other, to.parent, moved.from)].map(|(dir, from, to)| {
            let dir = dir.filter(|dir| dir.is_dir && self.move_dir(dir.file, to));
            dir.map(|dir| (dir.file, from, to.0))
        });
        // Reading takes long, and may look for names itself.
        drop(moving);
        for (dir, from, to) in dirs.into_iter().flatten() {
            self.pool.run(|| self.ingest.dir_moved(dir, from, to));
        }
        let other_file = other.filter(|other| !other.is_dir);
        if what.is_dir {
            if let Some(file) = other_file {
                self.pool.run(|| self.ingest.renamed(file, &to, &from, None));
            }
        } else if is_interesting(moved.from.1)
            || is_interesting(moved.to.1)
            || what.has_attached
            || moved.other.is_some_and(|other| other.has_attached)
        {
            self.place(to.parent);
            self.place(from.parent);
            self.pool.run(|| match other_file {
                Some(other) => self.ingest.exchanged((what, &from), (other, &to)),
                None => self.ingest.renamed(what, &from, &to, replaced.map(|replaced| replaced.file)),
            });
        }
    }
}
