//! Ordinary files: one method for each operation, in terms of system calls on the source. No lock is held across one.
//!
//! After an operation changed a name or a vector file's bytes, [`Events`] is told before the caller is answered.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use rustix::fs::{
    Access, AtFlags, CWD, Dev, FallocateFlags, FileType, Gid, Mode, OFlags, RenameFlags, SeekFrom, Stat, StatVfs,
    Timespec, Timestamps, Uid, XattrFlags,
};
use rustix::io::Errno;
use vexfs_store::FileId;

use crate::access::Caller;
use crate::embedding::{self, Form, Value};
use crate::events::{Cause, Events, Known, Moved};
use crate::nodes::{Node, Nodes, SYNTHETIC};
use crate::reopen::{o_path, path_of};
use crate::umask::with_umask;
use crate::walk::RESERVED;

/// A file with what the kernel is told of it.
pub struct Entry {
    /// Its number.
    pub id: u64,
    /// Its attributes.
    pub stat: Stat,
}

/// An open file.
pub struct Handle {
    /// Open for reading at least where that was possible.
    pub file: Arc<File>,
    /// What it is of.
    pub node: Arc<Node>,
    /// Open for writing.
    pub writable: bool,
    /// Open for writing by somebody whose writes take set-id bits away.
    pub stranger: bool,
    /// Its closing must be told before close(2) returns.
    pub flushed: bool,
}

impl Handle {
    /// Could closing this handle change vectors?
    pub fn matters(&self) -> bool {
        self.writable && self.node.interesting.load(Ordering::Acquire)
    }
}

/// A time to set.
#[derive(Copy, Clone, Debug)]
pub enum SetTime {
    /// As it is when it is done.
    Now,
    /// This one.
    At(SystemTime),
}

/// Attributes to set.
#[derive(Copy, Clone, Debug, Default)]
pub struct SetAttr {
    /// Permission bits.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Length.
    pub size: Option<u64>,
    /// Access time.
    pub atime: Option<SetTime>,
    /// Modification time.
    pub mtime: Option<SetTime>,
}

/// See the module.
pub struct Files {
    /// What the kernel knows.
    pub nodes: Arc<Nodes>,
    events: Arc<dyn Events>,
}

fn proc_path(node: &Node) -> String {
    path_of(node.fd.as_fd())
}

/// The extended attribute that is a file's access control list.
const ACL: &str = "system.posix_acl_access";
/// Most extended attributes are smaller.
const SMALL_XATTR: usize = 256;

/// The bits that a write by somebody without CAP_FSETID takes away: set-group-id without group execution is none.
fn set_id_bits(mode: u32) -> u32 {
    let group = if mode & 0o2010 == 0o2010 { 0o2000 } else { 0 };
    (mode & 0o4000) | group
}

fn set_id(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile && set_id_bits(stat.st_mode) != 0
}

/// A writer of a node, counted until it is released; taken back if it doesn't come to a handle.
struct Counted {
    node: Arc<Node>,
    stranger: bool,
    kept: bool,
}

impl Counted {
    fn new(caller: Caller, node: &Arc<Node>) -> Counted {
        let stranger = caller.is_stranger();
        node.writers.fetch_add(1, Ordering::AcqRel);
        node.strangers.fetch_add(u32::from(stranger), Ordering::AcqRel);
        Counted { node: Arc::clone(node), stranger, kept: false }
    }

    /// The handle takes it over. True for a stranger's.
    fn keep(mut self) -> bool {
        self.kept = true;
        self.stranger
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        if !self.kept {
            self.node.writers.fetch_sub(1, Ordering::AcqRel);
            self.node.strangers.fetch_sub(u32::from(self.stranger), Ordering::AcqRel);
        }
    }
}

fn refuse_reserved(name: &OsStr) -> Result<(), Errno> {
    if name == RESERVED { Err(Errno::PERM) } else { Ok(()) }
}

impl Files {
    /// Over the nodes of a source.
    pub fn new(nodes: Arc<Nodes>, events: Arc<dyn Events>) -> Files {
        Files { nodes, events }
    }

    /// Does the source have POSIX access control lists?
    pub fn has_acls(&self) -> bool {
        let list = |id| rustix::fs::getxattr_query(self.xattr_path(id)?, ACL);
        !matches!(list(FileId::ROOT.0), Err(Errno::OPNOTSUPP))
    }

    /// Counts a lookup of the file that a name leads to. `hint` is its number, where the caller knows it.
    fn enter(&self, parent: &Node, name: &OsStr, hint: Option<u64>, created: bool) -> Result<Entry, Errno> {
        let place = (parent.id, name);
        // One system call for a file that is known, two for one that isn't; a listing tells which it is.
        if hint.is_none_or(|id| self.nodes.get(id).is_ok()) {
            let stat = rustix::fs::statat(&parent.fd, name, AtFlags::SYMLINK_NOFOLLOW)?;
            if let Some(node) = self.nodes.meet(&stat, place) {
                return Ok(self.met(&node, stat, parent, name, created));
            }
        }
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&parent.fd, name, flags, Mode::empty())?;
        // What was opened counts, should the name have changed hands since.
        let stat = rustix::fs::fstat(&fd)?;
        let node = self.nodes.add(&stat, fd, place);
        Ok(self.met(&node, stat, parent, name, created))
    }

    fn met(&self, node: &Node, mut stat: Stat, parent: &Node, name: &OsStr, created: bool) -> Entry {
        if node.kind == FileType::RegularFile && node.native && self.events.interested(name) {
            node.interesting.store(true, Ordering::Release);
            self.events.seen(parent.file(), name, node.file(), created);
        } else if node.kind == FileType::RegularFile && node.native {
            if stat.st_nlink > 1 && self.events.knows(node.file()) {
                // Another of its names is a vector file's.
                node.interesting.store(true, Ordering::Release);
            }
            if self.events.has_attached(node.file()) {
                self.events.met_attached(parent.file(), name, node.file());
            }
        }
        self.settle_privileges(node, &mut stat);
        Entry { id: node.id, stat }
    }

    /// Under passthrough the kernel leaves it to us to take set-id bits away when somebody without CAP_FSETID writes,
    /// and doesn't tell us of the write. While such a writer has the file open, whoever looks at it finds out.
    fn settle_privileges(&self, node: &Node, stat: &mut Stat) {
        if node.strangers.load(Ordering::Acquire) == 0 || !set_id(stat) {
            return;
        }
        match *node.set_id_since.lock() {
            Some(since) if since != (stat.st_mtime, stat.st_mtime_nsec) => {}
            _ => return,
        }
        if let Err(errno) = self.take_privileges(node, stat) {
            log::error!("inode {}: its set-id bits can't be taken away: {errno}", node.id);
        }
    }

    /// As [`Files::settle_privileges`], for a handle that may have written.
    fn settle_stranger(&self, handle: &Handle) -> Result<(), Errno> {
        self.settle_privileges(&handle.node, &mut rustix::fs::fstat(&handle.file)?);
        Ok(())
    }

    fn take_privileges(&self, node: &Node, stat: &mut Stat) -> Result<(), Errno> {
        let mode = stat.st_mode & 0o7777 & !set_id_bits(stat.st_mode);
        self.nodes.reopener.chmod(&node.fd, Mode::from_raw_mode(mode))?;
        *stat = rustix::fs::fstat(&node.fd)?;
        Ok(())
    }

    /// After a change of bytes that the daemon made for `caller`.
    fn wrote(&self, caller: Caller, node: &Node) -> Result<(), Errno> {
        if !caller.is_stranger() {
            return Ok(());
        }
        let mut stat = rustix::fs::fstat(&node.fd)?;
        match set_id(&stat) {
            true => self.take_privileges(node, &mut stat),
            false => Ok(()),
        }
    }

    /// Looks a name up; counts as one lookup.
    pub fn lookup(&self, parent: u64, name: &OsStr) -> Result<Entry, Errno> {
        self.enter(&*self.nodes.get(parent)?, name, None, false)
    }

    /// Looks a name up that a listing gave with its inode number; counts as one lookup.
    pub fn lookup_listed(&self, parent: &Node, name: &OsStr, inode: u64) -> Result<Entry, Errno> {
        self.enter(parent, name, Some(inode), false)
    }

    /// Takes lookups back.
    pub fn forget(&self, id: u64, count: u64) {
        self.nodes.forget(id, count);
    }

    /// A file's attributes.
    pub fn getattr(&self, id: u64) -> Result<Entry, Errno> {
        let node = self.nodes.get(id)?;
        let mut stat = rustix::fs::fstat(&node.fd)?;
        self.settle_privileges(&node, &mut stat);
        Ok(Entry { id, stat })
    }

    /// Sets attributes, in the order that keeps set-id bits as the caller asked.
    pub fn setattr(&self, caller: Caller, id: u64, handle: Option<&Handle>, set: &SetAttr) -> Result<Entry, Errno> {
        let node = self.nodes.get(id)?;
        if let Some(size) = set.size {
            match handle.filter(|handle| handle.writable) {
                Some(handle) => rustix::fs::ftruncate(&handle.file, size)?,
                None => {
                    let fd = self.nodes.reopener.open(&node.fd, OFlags::WRONLY | OFlags::NONBLOCK)?;
                    rustix::fs::ftruncate(&fd, size)?;
                }
            }
            self.wrote(caller, &node)?;
        }
        if set.uid.is_some() || set.gid.is_some() {
            let (uid, gid) = (set.uid.map(Uid::from_raw), set.gid.map(Gid::from_raw));
            rustix::fs::chownat(&node.fd, c"", uid, gid, AtFlags::EMPTY_PATH)?;
        }
        if let Some(mode) = set.mode {
            self.nodes.reopener.chmod(&node.fd, Mode::from_raw_mode(mode))?;
        }
        if set.atime.is_some() || set.mtime.is_some() {
            let times = Timestamps { last_access: timespec(set.atime), last_modification: timespec(set.mtime) };
            // By descriptor, so that a symlink's own times are set.
            rustix::fs::utimensat(&node.fd, c"", &times, AtFlags::EMPTY_PATH)?;
        }
        let touched = set.size.is_some() || set.mtime.is_some();
        if touched
            && node.interesting.load(Ordering::Acquire)
            && node.writers.load(Ordering::Acquire) == 0
            && let Ok(fd) = self.nodes.reopener.open(&node.fd, OFlags::RDONLY)
        {
            self.events.changed(node.file(), fd.as_fd(), Cause::Setattr)?;
        }
        let stat = rustix::fs::fstat(&node.fd)?;
        if node.strangers.load(Ordering::Acquire) > 0 && (set.mode.is_some() || set.mtime.is_some()) {
            // Bits that were given now stay until the next write.
            *node.set_id_since.lock() = Some((stat.st_mtime, stat.st_mtime_nsec));
        }
        Ok(Entry { id, stat })
    }

    /// A symlink's target.
    pub fn readlink(&self, id: u64) -> Result<Vec<u8>, Errno> {
        let node = self.nodes.get(id)?;
        Ok(rustix::fs::readlinkat(&node.fd, c"", Vec::new())?.into_bytes())
    }

    /// Makes a name with the caller's credentials, so that owner, group and set-id bits come out as below.
    fn make(
        &self,
        caller: Caller,
        parent: u64,
        name: &OsStr,
        umask: u32,
        make: impl FnOnce(&OwnedFd) -> Result<(), Errno>,
    ) -> Result<Entry, Errno> {
        refuse_reserved(name)?;
        let parent = self.nodes.get(parent)?;
        caller.identify()?.act(|| with_umask(umask, || make(&parent.fd)))???;
        self.enter(&parent, name, None, true)
    }

    /// Makes a file, device, FIFO or socket.
    pub fn mknod(
        &self,
        caller: Caller,
        (parent, name): (u64, &OsStr),
        (mode, umask): (u32, u32),
        device: u32,
    ) -> Result<Entry, Errno> {
        let (kind, mode) = (FileType::from_raw_mode(mode), Mode::from_raw_mode(mode & 0o7777));
        // The kernel packs a device number as minor 0-7, major 8-19, minor 20-31 (new_encode_dev).
        let (major, minor) = ((device >> 8) & 0xfff, (device & 0xff) | ((device >> 12) & 0xfff00));
        let device: Dev = rustix::fs::makedev(major, minor);
        self.make(caller, parent, name, umask, |fd| rustix::fs::mknodat(fd, name, kind, mode, device))
    }

    /// Makes a directory.
    pub fn mkdir(
        &self,
        caller: Caller,
        (parent, name): (u64, &OsStr),
        (mode, umask): (u32, u32),
    ) -> Result<Entry, Errno> {
        let mode = Mode::from_raw_mode(mode & 0o7777);
        self.make(caller, parent, name, umask, |fd| rustix::fs::mkdirat(fd, name, mode))
    }

    /// Makes a symlink.
    pub fn symlink(&self, caller: Caller, parent: u64, name: &OsStr, target: &OsStr) -> Result<Entry, Errno> {
        self.make(caller, parent, name, 0, |fd| rustix::fs::symlinkat(target, fd, name))
    }

    /// Gives a file another name.
    pub fn link(&self, id: u64, parent: u64, name: &OsStr) -> Result<Entry, Errno> {
        refuse_reserved(name)?;
        let (node, parent) = (self.nodes.get(id)?, self.nodes.get(parent)?);
        match rustix::fs::linkat(&node.fd, c"", &parent.fd, name, AtFlags::EMPTY_PATH) {
            // Without CAP_DAC_READ_SEARCH only the path of the descriptor can be linked.
            Err(Errno::NOENT) => {
                rustix::fs::linkat(CWD, proc_path(&node), &parent.fd, name, AtFlags::SYMLINK_FOLLOW)?;
            }
            other => other?,
        }
        // Nobody will close it: what it holds is read now, if the name says that there are vectors.
        self.enter(&parent, name, None, false)
    }

    /// What a name leads to, without counting a lookup.
    fn peek(&self, parent: &Node, name: &OsStr) -> Result<(u64, Stat), Errno> {
        let stat = rustix::fs::statat(&parent.fd, name, AtFlags::SYMLINK_NOFOLLOW)?;
        Ok((self.nodes.id(&stat), stat))
    }

    /// Removes a name of a file.
    pub fn unlink(&self, parent: u64, name: &OsStr) -> Result<(), Errno> {
        refuse_reserved(name)?;
        let parent = self.nodes.get(parent)?;
        if !self.events.interested(name) && !self.events.any_attached() {
            return rustix::fs::unlinkat(&parent.fd, name, AtFlags::empty());
        }
        let (id, _) = self.peek(&parent, name)?;
        rustix::fs::unlinkat(&parent.fd, name, AtFlags::empty())?;
        self.events.unlinked(parent.file(), name, FileId(id));
        Ok(())
    }

    /// Removes a directory.
    pub fn rmdir(&self, parent: u64, name: &OsStr) -> Result<(), Errno> {
        refuse_reserved(name)?;
        let parent = self.nodes.get(parent)?;
        let (id, _) = self.peek(&parent, name)?;
        rustix::fs::unlinkat(&parent.fd, name, AtFlags::REMOVEDIR)?;
        self.events.removed_dir(FileId(id));
        Ok(())
    }

    /// Moves a name; with EXCHANGE two names change places.
    pub fn rename(
        &self,
        (from, old): (u64, &OsStr),
        (to, new): (u64, &OsStr),
        flags: RenameFlags,
    ) -> Result<(), Errno> {
        refuse_reserved(old)?;
        refuse_reserved(new)?;
        if flags.contains(RenameFlags::WHITEOUT) {
            return Err(Errno::INVAL);
        }
        let (from, to) = (self.nodes.get(from)?, self.nodes.get(to)?);
        let (moved, stat) = self.peek(&from, old)?;
        let other = self.peek(&to, new).ok();
        // Asked before: until the rename is told, a look at the source finds the file under none of the names known.
        let attached = |id: u64| self.events.has_attached(FileId(id));
        let (has_attached, other_has) = (attached(moved), other.as_ref().is_some_and(|(id, _)| attached(*id)));
        let is_dir = |stat: &Stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        let moves_dir = is_dir(&stat) || other.as_ref().is_some_and(|(_, stat)| is_dir(stat));
        let moving = moves_dir.then(|| self.events.moving());
        rustix::fs::renameat_with(&from.fd, old, &to.fd, new, flags)?;
        if other.as_ref().is_some_and(|(id, _)| *id == moved) {
            // Two names of one file: rename(2) leaves both.
            return Ok(());
        }
        let exchange = flags.contains(RenameFlags::EXCHANGE);
        self.settle(moved, (to.id, new));
        if let (true, Some((id, _))) = (exchange, &other) {
            self.settle(*id, (from.id, old));
        }
        for (name, id) in [(new, Some(moved)), (old, other.as_ref().map(|(id, _)| *id))] {
            if let Some(Ok(node)) = id.map(|id| self.nodes.get(id))
                && node.kind == FileType::RegularFile
                && self.events.interested(name)
            {
                node.interesting.store(true, Ordering::Release);
            }
        }
        // The index knows of nothing but directories and regular files on the root's file system.
        let known = |id: u64, stat: &Stat, has_attached: bool| match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => Some(Known { file: FileId(id), is_dir: true, has_attached: false }),
            FileType::RegularFile if id < SYNTHETIC => Some(Known { file: FileId(id), is_dir: false, has_attached }),
            _ => None,
        };
        let moved = known(moved, &stat, has_attached);
        let other = other.and_then(|(id, stat)| known(id, &stat, other_has));
        let (from, to) = ((from.file(), old), (to.file(), new));
        match (moved, other) {
            (Some(what), other) => self.events.moved(&Moved { from, to, what, other, exchange }, moving),
            (None, Some(what)) if exchange => {
                self.events.moved(&Moved { from: to, to: from, what, other: None, exchange }, moving);
            }
            (None, Some(replaced)) => self.events.unlinked(to.0, new, replaced.file),
            (None, None) => {}
        }
        Ok(())
    }

    fn settle(&self, id: u64, place: (u64, &OsStr)) {
        if let Ok(node) = self.nodes.get(id) {
            node.settle(place, false);
        }
    }

    /// May the daemon's own user do what the mask of access(2) says? Only they can ask.
    pub fn may(&self, id: u64, mask: u32) -> Result<(), Errno> {
        self.nodes.reopener.may(&self.nodes.get(id)?.fd, Access::from_bits_truncate(mask))
    }

    /// Opens a file with the caller's flags, for reading too where that is allowed, so that its vectors can be read.
    pub fn open(&self, caller: Caller, id: u64, flags: i32) -> Result<Handle, Errno> {
        let node = self.nodes.get(id)?;
        let flags = OFlags::from_bits_retain(flags as u32);
        let writable = flags.intersects(OFlags::WRONLY | OFlags::RDWR | OFlags::TRUNC);
        let dropped = OFlags::NOFOLLOW | OFlags::CREATE | OFlags::EXCL | OFlags::DIRECT | OFlags::RWMODE;
        let kept = flags.difference(dropped);
        if !writable {
            let file = File::from(self.nodes.reopener.open(&node.fd, kept | OFlags::RDONLY)?);
            return Ok(Handle { file: Arc::new(file), node, writable, stranger: false, flushed: false });
        }
        // Counted before the file may be truncated: until close its old vectors stand.
        let counted = Counted::new(caller, &node);
        let opened = self
            .nodes
            .reopener
            .open(&node.fd, kept | OFlags::RDWR)
            .or_else(|_| self.nodes.reopener.open(&node.fd, kept | (flags & OFlags::RWMODE)))?;
        if flags.contains(OFlags::TRUNC) {
            self.wrote(caller, &node)?;
        }
        let flushed = caller.is_stranger() && watch_privileges(caller, &node, &rustix::fs::fstat(&node.fd)?);
        let stranger = counted.keep();
        Ok(Handle { file: opened_for_writing(&node, opened), stranger, flushed, node, writable })
    }

    /// Makes a file and opens it.
    pub fn create(
        &self,
        caller: Caller,
        (parent, name): (u64, &OsStr),
        (mode, umask): (u32, u32),
        flags: i32,
    ) -> Result<(Entry, Handle), Errno> {
        refuse_reserved(name)?;
        let parent = self.nodes.get(parent)?;
        let flags = OFlags::from_bits_retain(flags as u32);
        let writable = flags.intersects(OFlags::WRONLY | OFlags::RDWR);
        let mode_bits = Mode::from_raw_mode(mode & 0o7777);
        let kept = flags & (OFlags::EXCL | OFlags::APPEND | OFlags::TRUNC);
        let made = OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC | kept;
        let make = |access: OFlags| rustix::fs::openat(&parent.fd, name, made | access, mode_bits);
        let open = || match writable {
            // One that came to be there meanwhile may be closed to the caller's reading.
            true => make(OFlags::RDWR).or_else(|errno| match errno {
                Errno::ACCESS => make(flags & OFlags::RWMODE),
                other => Err(other),
            }),
            false => make(OFlags::RDONLY),
        };
        let fd = caller.identify()?.act(|| with_umask(umask, open))???;
        let stat = rustix::fs::fstat(&fd)?;
        let node = match self.nodes.meet(&stat, (parent.id, name)) {
            Some(node) => node,
            None => {
                let path = o_path(&fd)?;
                self.nodes.add(&stat, path, (parent.id, name))
            }
        };
        let counted = writable.then(|| Counted::new(caller, &node));
        let flushed = writable && caller.is_stranger() && watch_privileges(caller, &node, &stat);
        let entry = self.met(&node, stat, &parent, name, true);
        let stranger = counted.is_some_and(Counted::keep);
        let file = if writable { opened_for_writing(&node, fd) } else { Arc::new(File::from(fd)) };
        Ok((entry, Handle { file, node, writable, stranger, flushed }))
    }

    /// Reads.
    pub fn read(&self, handle: &Handle, offset: u64, size: u32) -> Result<Vec<u8>, Errno> {
        let mut bytes = vec![0; size as usize];
        let mut got = 0;
        while got < bytes.len() {
            match rustix::io::pread(&handle.file, &mut bytes[got..], offset + got as u64)? {
                0 => break,
                n => got += n,
            }
        }
        bytes.truncate(got);
        Ok(bytes)
    }

    /// Writes.
    pub fn write(&self, handle: &Handle, offset: u64, data: &[u8], strip: bool) -> Result<usize, Errno> {
        let written = rustix::io::pwrite(&handle.file, data, offset)?;
        if strip {
            let mut stat = rustix::fs::fstat(&handle.file)?;
            if set_id(&stat) {
                self.take_privileges(&handle.node, &mut stat)?;
            }
        }
        Ok(written)
    }

    /// One descriptor of the handle was closed: what it wrote is read now.
    pub fn flush(&self, handle: &Handle) -> Result<(), Errno> {
        if handle.stranger {
            self.settle_stranger(handle)?;
        }
        if !handle.matters() {
            return Ok(());
        }
        self.events.changed(handle.node.file(), handle.file.as_fd(), Cause::Flush)
    }

    /// The last descriptor was closed, the last mapping is gone.
    pub fn release(&self, handle: &Handle) {
        if handle.stranger {
            if let Err(errno) = self.settle_stranger(handle) {
                log::error!("inode {}: {errno} at release", handle.node.id);
            }
            if handle.node.strangers.fetch_sub(1, Ordering::AcqRel) == 1 {
                *handle.node.set_id_since.lock() = None;
            }
        }
        let last = handle.writable && handle.node.writers.fetch_sub(1, Ordering::AcqRel) == 1;
        if last && handle.matters() {
            // Nobody waits for the answer; what was refused is in the file's status.
            if let Err(errno) = self.events.changed(handle.node.file(), handle.file.as_fd(), Cause::Release) {
                log::debug!("inode {}: {errno} at release", handle.node.id);
            }
        }
    }

    /// Makes bytes durable, then the index's knowledge of them.
    pub fn fsync(&self, handle: &Handle, data_only: bool) -> Result<(), Errno> {
        match data_only {
            true => rustix::fs::fdatasync(&handle.file)?,
            false => rustix::fs::fsync(&handle.file)?,
        }
        if handle.node.interesting.load(Ordering::Acquire) || self.events.has_attached(handle.node.file()) {
            self.events.changed(handle.node.file(), handle.file.as_fd(), Cause::Fsync)?;
        }
        Ok(())
    }

    /// Makes a directory's names durable.
    pub fn fsync_dir(&self, dir: BorrowedFd<'_>) -> Result<(), Errno> {
        rustix::fs::fsync(dir)?;
        self.events.synced_dir()
    }

    /// Opens a directory for listing.
    pub fn open_dir(&self, id: u64) -> Result<OwnedFd, Errno> {
        let node = self.nodes.get(id)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::openat(&node.fd, c".", flags, Mode::empty())
    }

    /// Space and counts of the file system below.
    pub fn statfs(&self, id: u64) -> Result<StatVfs, Errno> {
        rustix::fs::fstatvfs(&self.nodes.get(id)?.fd)
    }

    /// Reserves or frees space.
    pub fn fallocate(&self, caller: Caller, handle: &Handle, mode: i32, offset: u64, length: u64) -> Result<(), Errno> {
        rustix::fs::fallocate(&handle.file, FallocateFlags::from_bits_retain(mode as u32), offset, length)?;
        self.wrote(caller, &handle.node)
    }

    /// Finds data or a hole.
    pub fn lseek(&self, handle: &Handle, offset: i64, whence: i32) -> Result<u64, Errno> {
        let at = u64::try_from(offset).map_err(|_| Errno::INVAL)?;
        // SEEK_DATA and SEEK_HOLE; the kernel does the others itself.
        match whence {
            3 => rustix::fs::seek(&handle.file, SeekFrom::Data(at)),
            4 => rustix::fs::seek(&handle.file, SeekFrom::Hole(at)),
            _ => Err(Errno::INVAL),
        }
    }

    /// Copies within the file system below.
    pub fn copy_range(
        &self,
        caller: Caller,
        from: (&Handle, u64),
        to: (&Handle, u64),
        len: u64,
    ) -> Result<usize, Errno> {
        let (mut start, mut end) = (from.1, to.1);
        let len = len.min(1 << 30) as usize;
        let copied = rustix::fs::copy_file_range(&from.0.file, Some(&mut start), &to.0.file, Some(&mut end), len)?;
        self.wrote(caller, &to.0.node)?;
        Ok(copied)
    }

    /// Sets an extended attribute.
    pub fn setxattr(&self, caller: Caller, id: u64, name: &OsStr, value: &[u8], flags: i32) -> Result<(), Errno> {
        if let Some((form, node)) = self.embedding(id, name)? {
            return self.attach(&node, &Value::new(form, value.to_vec()), XattrFlags::from_bits_retain(flags as u32));
        }
        let path = self.xattr_path(id)?;
        let set = || rustix::fs::setxattr(path, name.as_bytes(), value, XattrFlags::from_bits_retain(flags as u32));
        // An ACL that somebody outside the file's group sets takes the set-group-id bit: for the kernel to decide.
        match name.as_bytes() == ACL.as_bytes() && caller.is_stranger() {
            true => caller.identify()?.act(set)?,
            false => set(),
        }
    }

    /// Reads an extended attribute.
    pub fn getxattr(&self, id: u64, name: &OsStr) -> Result<Vec<u8>, Errno> {
        if let Some((Form::Text, node)) = self.embedding(id, name)?
            && let (_, Some(value)) = embedding::read(node.fd.as_fd())?
            && let Ok(vector) = value.vector()
        {
            return Ok(embedding::to_text(&vector));
        }
        let node = self.nodes.get(id)?;
        let (name, written_by) = (name.as_bytes(), node.written_by.lock().upgrade());
        let read = |room| {
            let mut value = Vec::with_capacity(room);
            let spare = rustix::buffer::spare_capacity(&mut value);
            // The first write to a file has the kernel ask: by a descriptor that takes a fifth of the time.
            match &written_by {
                Some(file) => rustix::fs::fgetxattr(file, name, spare)?,
                None => rustix::fs::getxattr(proc_path(&node), name, spare)?,
            };
            Ok(value)
        };
        // The kernel clears as much room as it is given, at the first write of every new file.
        match read(SMALL_XATTR) {
            Err(Errno::RANGE) => read(embedding::XATTR_MAX),
            done => done,
        }
    }

    /// Names of extended attributes, each ended by NUL.
    pub fn listxattr(&self, id: u64) -> Result<Vec<u8>, Errno> {
        let mut names = Vec::with_capacity(embedding::XATTR_MAX);
        rustix::fs::listxattr(self.xattr_path(id)?, rustix::buffer::spare_capacity(&mut names))?;
        Ok(names)
    }

    /// Removes an extended attribute.
    pub fn removexattr(&self, id: u64, name: &OsStr) -> Result<(), Errno> {
        if let Some((_, node)) = self.embedding(id, name)? {
            let path = proc_path(&node);
            let removed = [embedding::TEXT, embedding::BINARY].map(|name| rustix::fs::removexattr(&path, name));
            if removed.contains(&Ok(())) {
                self.events.detached(node.file());
            }
            // Two spellings of one vector: it is gone when neither is there.
            return match removed.into_iter().find(|result| !matches!(result, Ok(()) | Err(Errno::NODATA))) {
                Some(failed) => failed,
                None if removed.contains(&Ok(())) => Ok(()),
                None => Err(Errno::NODATA),
            };
        }
        rustix::fs::removexattr(self.xattr_path(id)?, name.as_bytes())
    }

    /// The spelling and the file, where the attribute is a vector attached to a file of the source's own file system.
    fn embedding(&self, id: u64, name: &OsStr) -> Result<Option<(Form, Arc<Node>)>, Errno> {
        let Some(form) = Form::of(name.as_bytes()) else { return Ok(None) };
        let node = self.nodes.get(id)?;
        Ok((node.kind == FileType::RegularFile && node.native).then_some((form, node)))
    }

    /// Attaches a vector: refused before anything is stored, found when this returns. It replaces the one that was there,
    /// however that was spelt.
    fn attach(&self, node: &Node, value: &Value, flags: XattrFlags) -> Result<(), Errno> {
        let path = proc_path(node);
        let (stat, known) = embedding::read(node.fd.as_fd())?;
        if flags.contains(XattrFlags::CREATE) && known.is_some() {
            return Err(Errno::EXIST);
        }
        if flags.contains(XattrFlags::REPLACE) && known.is_none() {
            return Err(Errno::NODATA);
        }
        let place = match self.nodes.name_of(node) {
            // A file without a name is in no answer.
            Err(Errno::STALE) if stat.st_nlink == 0 => None,
            place => Some(place?),
        };
        let parent = place.as_ref().map_or(FileId::ROOT, |(parent, _)| *parent);
        let bytes = self.events.may_attach(parent, node.file(), value)?;
        rustix::fs::setxattr(&path, embedding::BINARY, &bytes, XattrFlags::empty())?;
        match rustix::fs::removexattr(&path, embedding::TEXT) {
            Ok(()) | Err(Errno::NODATA) => {}
            Err(errno) => return Err(errno),
        }
        match place {
            Some((parent, name)) => self.events.attached(parent, &name, node.file(), node.fd.as_fd()),
            None => Ok(()),
        }
    }

    /// Attributes can't be reached by an `O_PATH` descriptor, but by its path, which leads to a symlink itself.
    fn xattr_path(&self, id: u64) -> Result<String, Errno> {
        let node = self.nodes.get(id)?;
        Ok(proc_path(&node))
    }
}

/// The file of a handle, which the node then knows.
fn opened_for_writing(node: &Node, fd: OwnedFd) -> Arc<File> {
    let file = Arc::new(File::from(fd));
    *node.written_by.lock() = Arc::downgrade(&file);
    file
}

/// A stranger opened the file for writing. True if its closing must be told: what others own may be given set-id bits
/// while the stranger writes.
fn watch_privileges(caller: Caller, node: &Node, stat: &Stat) -> bool {
    node.set_id_since.lock().get_or_insert((stat.st_mtime, stat.st_mtime_nsec));
    set_id(stat) || stat.st_uid != caller.uid
}

fn timespec(time: Option<SetTime>) -> Timespec {
    let special = |tv_nsec| Timespec { tv_sec: 0, tv_nsec };
    match time {
        None => special(rustix::fs::UTIME_OMIT),
        Some(SetTime::Now) => special(rustix::fs::UTIME_NOW),
        Some(SetTime::At(time)) => match time.duration_since(SystemTime::UNIX_EPOCH) {
            Ok(after) => Timespec { tv_sec: after.as_secs() as i64, tv_nsec: i64::from(after.subsec_nanos()) },
            Err(before) => {
                // Nanoseconds count forwards, also before 1970.
                let before = before.duration();
                let part = i64::from(before.subsec_nanos() > 0);
                let nanos = i64::from(before.subsec_nanos());
                Timespec { tv_sec: -(before.as_secs() as i64) - part, tv_nsec: part * 1_000_000_000 - nanos }
            }
        },
    }
}
