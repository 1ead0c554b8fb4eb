//! The adapter to FUSE: the one file that names the FUSE crate. Requests go to [`Files`] or, for virtual nodes, to
//! [`Views`]; what they answer becomes a reply.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    AccessFlags, BackingId, BsdFileFlags, Config, CopyFileRangeFlags, Errno, FileAttr, FileHandle, FileType,
    Filesystem, FopenFlags, Generation, INodeNo, InitFlags, KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr,
    ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen,
    ReplyStatfs, ReplyWrite, ReplyXattr, Request, Session, SessionACL, TimeOrNow, WriteFlags,
};
use parking_lot::{Mutex, RwLock};
use rustix::fs::{FileType as Kind, Stat};
use rustix::io::Errno as Sys;

use crate::access::Caller;
use crate::files::{Entry, Files, Handle, SetAttr, SetTime};
use crate::handling::Handling;
use crate::listing::Listing;
use crate::nodes::VIRTUAL_BASE;
use crate::pool::Pool;
use crate::views::{Kind as VirtualKind, Listed, Views, VirtualAttr};
use crate::walk::RESERVED;

/// How long the kernel may use a name or attributes without asking: the source may change beneath us.
const TTL: Duration = Duration::from_secs(1);
/// The same where nobody else changes the source, but for files' attributes: a mapping's writes change them unseen.
const LONG: Duration = Duration::from_secs(24 * 60 * 60);
/// Virtual nodes are asked for each time.
const NOW: Duration = Duration::ZERO;

enum Dir {
    Real(Mutex<Listing>),
    Virtual(Mutex<Vec<Listed>>),
}

/// Backing files by inode.
type Backings = Mutex<HashMap<u64, Weak<Backing>>>;

/// The kernel's backing file of an inode.
struct Backing {
    id: BackingId,
    inode: u64,
    all: Arc<Backings>,
    /// How many there are.
    count: Arc<AtomicUsize>,
}

impl Drop for Backing {
    /// By whoever has it last: that may be an open whose answer was sent, and the file closed again, before it is done.
    fn drop(&mut self) {
        let mut all = self.all.lock();
        // Another one may be in its place.
        if all.get(&self.inode).is_some_and(|known| known.strong_count() == 0) {
            all.remove(&self.inode);
            self.count.store(all.len(), Ordering::Relaxed);
        }
    }
}

struct OpenFile {
    handle: Handle,
    /// Keeps the kernel's backing file; all handles of an inode share it.
    _backing: Option<Arc<Backing>>,
}

/// The file system as FUSE calls it.
pub struct Fuse {
    files: Arc<Files>,
    views: Arc<Views>,
    pool: Arc<Pool>,
    next: AtomicU64,
    open: RwLock<HashMap<u64, Arc<OpenFile>>>,
    dirs: RwLock<HashMap<u64, Arc<Dir>>>,
    backing: Arc<Backings>,
    /// Until the kernel or a missing capability says no.
    passthrough: AtomicBool,
    stack_depth: u32,
    exclusive: bool,
    /// See [`Loops::checked`].
    checked: bool,
}

fn errno(error: Sys) -> Errno {
    Errno::from_i32(error.raw_os_error())
}

fn caller(request: &Request) -> Caller {
    Caller { uid: request.uid(), gid: request.gid(), pid: request.pid() }
}

fn empty(handling: &Handling, reply: ReplyEmpty, work: impl FnOnce() -> Result<(), Sys>) {
    match handling.guard(work) {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(errno(error)),
    }
}

fn time(seconds: i64, nanos: u64) -> SystemTime {
    let nanos = Duration::from_nanos(nanos);
    match u64::try_from(seconds) {
        Ok(after) => UNIX_EPOCH + Duration::from_secs(after) + nanos,
        Err(_) => UNIX_EPOCH - Duration::from_secs(seconds.unsigned_abs()) + nanos,
    }
}

fn kind(kind: Kind) -> FileType {
    match kind {
        Kind::Directory => FileType::Directory,
        Kind::Symlink => FileType::Symlink,
        Kind::Fifo => FileType::NamedPipe,
        Kind::Socket => FileType::Socket,
        Kind::CharacterDevice => FileType::CharDevice,
        Kind::BlockDevice => FileType::BlockDevice,
        Kind::RegularFile | Kind::Unknown => FileType::RegularFile,
    }
}

fn attr(id: u64, stat: &Stat) -> FileAttr {
    let (major, minor) = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
    FileAttr {
        ino: INodeNo(id),
        size: stat.st_size as u64,
        blocks: stat.st_blocks as u64,
        atime: time(stat.st_atime, stat.st_atime_nsec),
        mtime: time(stat.st_mtime, stat.st_mtime_nsec),
        ctime: time(stat.st_ctime, stat.st_ctime_nsec),
        crtime: UNIX_EPOCH,
        kind: kind(Kind::from_raw_mode(stat.st_mode)),
        perm: (stat.st_mode & 0o7777) as u16,
        nlink: stat.st_nlink as u32,
        uid: stat.st_uid,
        gid: stat.st_gid,
        // new_encode_dev: minor 0-7, major 8-19, minor 20-31.
        rdev: (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12),
        blksize: stat.st_blksize as u32,
        flags: 0,
    }
}

fn virtual_kind(kind: VirtualKind) -> FileType {
    match kind {
        VirtualKind::Dir => FileType::Directory,
        VirtualKind::File => FileType::RegularFile,
        VirtualKind::Link => FileType::Symlink,
    }
}

/// What is not there has no attributes.
fn nothing() -> FileAttr {
    virtual_attr(&VirtualAttr { id: 0, kind: VirtualKind::File, mode: 0, size: 0 })
}

fn virtual_attr(node: &VirtualAttr) -> FileAttr {
    let now = SystemTime::now();
    FileAttr {
        ino: INodeNo(node.id),
        size: node.size,
        blocks: 0,
        atime: now,
        mtime: now,
        ctime: now,
        crtime: now,
        kind: virtual_kind(node.kind),
        perm: node.mode,
        nlink: 1,
        uid: rustix::process::geteuid().as_raw(),
        gid: rustix::process::getegid().as_raw(),
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

const GENERATION: Generation = Generation(0);

impl Fuse {
    /// Over real files and virtual views, whose answers are worked out on `pool`. `stack_depth`: how many layers of stacked file systems may lie below for
    /// kernel passthrough (1, or 2 where the source is on one itself). `exclusive`: nobody else changes the source.
    pub fn new(files: Arc<Files>, views: Arc<Views>, pool: Arc<Pool>, stack_depth: u32, exclusive: bool) -> Fuse {
        Fuse {
            files,
            views,
            pool,
            next: AtomicU64::new(1),
            open: RwLock::default(),
            dirs: RwLock::default(),
            backing: Arc::default(),
            passthrough: AtomicBool::new(true),
            stack_depth,
            exclusive,
            checked: true,
        }
    }

    /// How long the kernel may use a name, and the attributes of what is there.
    fn lives(&self, stat: &Stat) -> (Duration, Duration) {
        match (self.exclusive, Kind::from_raw_mode(stat.st_mode)) {
            (false, _) => (TTL, TTL),
            (true, Kind::Directory | Kind::Symlink) => (LONG, LONG),
            (true, _) => (LONG, TTL),
        }
    }

    fn entry(&self, handling: &Handling, reply: ReplyEntry, work: impl FnOnce() -> Result<Entry, Sys>) {
        match handling.guard(work) {
            Ok(entry) => {
                let (name, attributes) = self.lives(&entry.stat);
                reply.entry_with_ttls(&attributes, &name, &attr(entry.id, &entry.stat), GENERATION);
            }
            Err(error) => reply.error(errno(error)),
        }
    }

    /// What a virtual node answers.
    fn virtually<T: Send>(&self, work: impl FnOnce(&Views) -> Result<T, Sys> + Send) -> Result<T, Sys> {
        self.pool.run(|| work(&self.views))
    }

    fn number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    fn file(&self, handle: FileHandle) -> Result<Arc<OpenFile>, Sys> {
        self.open.read().get(&handle.0).cloned().ok_or(Sys::BADF)
    }

    fn dir(&self, handle: FileHandle) -> Result<Arc<Dir>, Sys> {
        self.dirs.read().get(&handle.0).cloned().ok_or(Sys::BADF)
    }

    /// The inode's backing file: the one that is in use, or a new one. The lock is held across the ioctl, because two
    /// backing files of one inode would make the second open fail.
    fn back(&self, handle: &Handle, open: impl FnOnce(&Handle) -> std::io::Result<BackingId>) -> Option<Arc<Backing>> {
        if handle.node.kind != Kind::RegularFile || !self.passthrough.load(Ordering::Acquire) {
            return None;
        }
        let mut backing = self.backing.lock();
        if let Some(known) = backing.get(&handle.node.id).and_then(Weak::upgrade) {
            return Some(known);
        }
        match open(handle) {
            Ok(id) => {
                *self.views.io.lock() = "passthrough";
                let (all, count) = (Arc::clone(&self.backing), Arc::clone(&self.views.backed));
                let new = Arc::new(Backing { id, inode: handle.node.id, all, count });
                backing.insert(new.inode, Arc::downgrade(&new));
                self.views.backed.store(backing.len(), Ordering::Relaxed);
                Some(new)
            }
            Err(error) => {
                // Decided once for the mount: an inode must not be open both ways.
                log::warn!("no kernel passthrough ({error}): reads and writes go through the daemon");
                *self.views.io.lock() = "page cache";
                self.passthrough.store(false, Ordering::Release);
                None
            }
        }
    }

    fn keep(&self, handle: Handle, backing: Option<Arc<Backing>>) -> (FileHandle, FopenFlags) {
        let mut flags = FopenFlags::empty();
        if !handle.matters() && !handle.flushed {
            flags |= FopenFlags::FOPEN_NOFLUSH;
        }
        let number = self.number();
        handle.node.handles.fetch_add(1, Ordering::AcqRel);
        self.open.write().insert(number, Arc::new(OpenFile { handle, _backing: backing }));
        (FileHandle(number), flags)
    }

    fn real_dir<R>(
        &self,
        handle: FileHandle,
        offset: u64,
        mut add: impl FnMut(&mut R, &Listing, crate::listing::Item<'_>) -> bool,
        reply: &mut R,
    ) -> Result<bool, Sys> {
        match &*self.dir(handle)? {
            Dir::Real(listing) => {
                listing.lock().from(offset, &mut |listing, item| add(reply, listing, item))?;
                Ok(true)
            }
            Dir::Virtual(_) => Ok(false),
        }
    }
}

impl Filesystem for Fuse {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        let wanted = [
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_READDIRPLUS_AUTO,
            InitFlags::FUSE_CACHE_SYMLINKS,
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_AUTO_INVAL_DATA,
            InitFlags::FUSE_ATOMIC_O_TRUNC,
            // Without it each write asks for security.capability first; `files` takes set-id bits away instead.
            InitFlags::FUSE_HANDLE_KILLPRIV_V2,
            InitFlags::FUSE_DONT_MASK,
        ];
        for flag in wanted {
            if config.add_capabilities(flag).is_err() {
                log::info!("the kernel lacks {flag:?}");
            }
        }
        // With lists the kernel checks, whatever the mount's options say.
        if self.checked && self.files.has_acls() && config.add_capabilities(InitFlags::FUSE_POSIX_ACL).is_err() {
            log::warn!("the kernel lacks POSIX ACLs over FUSE: those of the source aren't enforced");
        }
        let passthrough = config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_ok()
            && config.set_max_stack_depth(self.stack_depth).is_ok();
        self.passthrough.store(passthrough, Ordering::Release);
        if !passthrough {
            *self.views.io.lock() = "page cache";
        }
        if config.set_max_write(1 << 20).is_err() || config.set_max_readahead(1 << 20).is_err() {
            log::info!("the kernel keeps its own sizes of reads and writes");
        }
        Ok(())
    }

    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let handling = Handling::of("lookup");
        if parent.0 >= VIRTUAL_BASE || name == RESERVED {
            return match handling.guard(|| self.virtually(|views| views.lookup(caller(request), parent.0, name))) {
                Ok(node) => reply.entry(&NOW, &virtual_attr(&node), GENERATION),
                Err(error) => reply.error(errno(error)),
            };
        }
        match handling.guard(|| self.files.lookup(parent.0, name)) {
            // The kernel keeps it that there is nothing: number 0.
            Err(Sys::NOENT) if self.exclusive => reply.entry_with_ttls(&NOW, &LONG, &nothing(), GENERATION),
            looked => self.entry(&handling, reply, || looked),
        }
    }

    fn forget(&self, _request: &Request, ino: INodeNo, count: u64) {
        let handling = Handling::of("forget");
        let forgotten = handling.guard(|| {
            match ino.0 >= VIRTUAL_BASE {
                true => self.views.forget(ino.0, count),
                false => self.files.forget(ino.0, count),
            }
            Ok(())
        });
        // Nobody is answered; a panic has been logged.
        forgotten.ok();
    }

    fn getattr(&self, _request: &Request, ino: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        let handling = Handling::of("getattr");
        if ino.0 >= VIRTUAL_BASE {
            return match self.views.getattr(ino.0) {
                Ok(node) => reply.attr(&NOW, &virtual_attr(&node)),
                Err(error) => reply.error(errno(error)),
            };
        }
        match handling.guard(|| self.files.getattr(ino.0)) {
            Ok(entry) => reply.attr(&self.lives(&entry.stat).1, &attr(entry.id, &entry.stat)),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn setattr(
        &self,
        request: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let handling = Handling::of("setattr");
        if ino.0 >= VIRTUAL_BASE {
            // Opening a query file with O_TRUNC is how shells write.
            return match (self.views.getattr(ino.0), size) {
                (Ok(node), Some(0)) => reply.attr(&NOW, &virtual_attr(&node)),
                (Ok(_), _) => reply.error(Errno::EPERM),
                (Err(error), _) => reply.error(errno(error)),
            };
        }
        let set_time = |time: TimeOrNow| match time {
            TimeOrNow::Now => SetTime::Now,
            TimeOrNow::SpecificTime(time) => SetTime::At(time),
        };
        let set = SetAttr { mode, uid, gid, size, atime: atime.map(set_time), mtime: mtime.map(set_time) };
        let result = handling.guard(|| {
            let open = handle.and_then(|handle| self.file(handle).ok());
            self.files.setattr(caller(request), ino.0, open.as_ref().map(|open| &open.handle), &set)
        });
        match result {
            Ok(entry) => reply.attr(&self.lives(&entry.stat).1, &attr(entry.id, &entry.stat)),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn readlink(&self, _request: &Request, ino: INodeNo, reply: ReplyData) {
        let handling = Handling::of("readlink");
        let result = handling.guard(|| match ino.0 >= VIRTUAL_BASE {
            true => self.views.readlink(ino.0),
            false => self.files.readlink(ino.0),
        });
        match result {
            Ok(target) => reply.data(&target),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        device: u32,
        reply: ReplyEntry,
    ) {
        let handling = Handling::of("mknod");
        let made = || self.files.mknod(caller(request), (real(parent)?, name), (mode, umask), device);
        self.entry(&handling, reply, made);
    }

    fn mkdir(&self, request: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, reply: ReplyEntry) {
        let handling = Handling::of("mkdir");
        self.entry(&handling, reply, || self.files.mkdir(caller(request), (real(parent)?, name), (mode, umask)));
    }

    fn unlink(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let handling = Handling::of("unlink");
        empty(&handling, reply, || self.files.unlink(real(parent)?, name));
    }

    fn rmdir(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let handling = Handling::of("rmdir");
        empty(&handling, reply, || self.files.rmdir(real(parent)?, name));
    }

    fn symlink(&self, request: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        let handling = Handling::of("symlink");
        let made = || self.files.symlink(caller(request), real(parent)?, name, target.as_os_str());
        self.entry(&handling, reply, made);
    }

    fn rename(
        &self,
        _request: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let handling = Handling::of("rename");
        let flags = rustix::fs::RenameFlags::from_bits_retain(flags.bits());
        empty(&handling, reply, || self.files.rename((real(parent)?, name), (real(newparent)?, newname), flags));
    }

    fn link(&self, _request: &Request, ino: INodeNo, newparent: INodeNo, newname: &OsStr, reply: ReplyEntry) {
        let handling = Handling::of("link");
        self.entry(&handling, reply, || self.files.link(real(ino)?, real(newparent)?, newname));
    }

    fn open(&self, request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let handling = Handling::of("open");
        if ino.0 >= VIRTUAL_BASE {
            let writable = flags.0 & 3 != 0;
            return match handling.guard(|| self.virtually(|views| views.open(caller(request), ino.0, writable))) {
                Ok(handle) => {
                    reply.opened(FileHandle(handle), FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_NOFLUSH);
                }
                Err(error) => reply.error(errno(error)),
            };
        }
        let opened = handling.guard(|| self.files.open(caller(request), ino.0, flags.0));
        let handle = match opened {
            Ok(handle) => handle,
            Err(error) => return reply.error(errno(error)),
        };
        let backing = self.back(&handle, |handle| reply.open_backing(&handle.file));
        let (handle, flags) = self.keep(handle, backing.clone());
        match backing {
            Some(backing) => reply.opened_passthrough(handle, flags, &backing.id),
            None => reply.opened(handle, flags),
        }
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let handling = Handling::of("create");
        let made = handling.guard(|| self.files.create(caller(request), (real(parent)?, name), (mode, umask), flags));
        let (entry, handle) = match made {
            Ok(made) => made,
            Err(error) => return reply.error(errno(error)),
        };
        let backing = self.back(&handle, |handle| reply.open_backing(&handle.file));
        let (handle, flags) = self.keep(handle, backing.clone());
        let attr = attr(entry.id, &entry.stat);
        match backing {
            Some(backing) => reply.created_passthrough(&TTL, &attr, GENERATION, handle, flags, &backing.id),
            None => reply.created(&TTL, &attr, GENERATION, handle, flags),
        }
    }

    fn read(
        &self,
        request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let handling = Handling::of("read");
        let result = handling.guard(|| match ino.0 >= VIRTUAL_BASE {
            true => self.virtually(|views| views.read(caller(request), handle.0, offset, size as usize)),
            false => self.files.read(&self.file(handle)?.handle, offset, size),
        });
        match result {
            Ok(bytes) => reply.data(&bytes),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn write(
        &self,
        request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let handling = Handling::of("write");
        let result = handling.guard(|| match ino.0 >= VIRTUAL_BASE {
            true => self.virtually(|views| views.write(caller(request), handle.0, data)),
            false => {
                let strip = write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID);
                self.files.write(&self.file(handle)?.handle, offset, data, strip)
            }
        });
        match result {
            Ok(written) => reply.written(written as u32),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn flush(&self, _request: &Request, ino: INodeNo, handle: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        let handling = Handling::of("flush");
        empty(&handling, reply, || match ino.0 >= VIRTUAL_BASE {
            true => Ok(()),
            false => self.files.flush(&self.file(handle)?.handle),
        });
    }

    fn release(
        &self,
        _request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        let handling = Handling::of("release");
        empty(&handling, reply, || {
            if ino.0 >= VIRTUAL_BASE {
                self.views.release(handle.0);
                return Ok(());
            }
            // The table is locked no longer than this.
            let gone = self.open.write().remove(&handle.0);
            if let Some(open) = gone {
                self.files.release(&open.handle);
                open.handle.node.handles.fetch_sub(1, Ordering::AcqRel);
            }
            Ok(())
        });
    }

    fn fsync(&self, _request: &Request, ino: INodeNo, handle: FileHandle, datasync: bool, reply: ReplyEmpty) {
        let handling = Handling::of("fsync");
        empty(&handling, reply, || match ino.0 >= VIRTUAL_BASE {
            true => Ok(()),
            false => self.files.fsync(&self.file(handle)?.handle, datasync),
        });
    }

    fn opendir(&self, request: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let handling = Handling::of("opendir");
        let opened = handling.guard(|| {
            Ok(match ino.0 >= VIRTUAL_BASE {
                true => Dir::Virtual(Mutex::new(self.virtually(|views| views.list(caller(request), ino.0))?)),
                false => Dir::Real(Mutex::new(Listing::new(self.files.open_dir(ino.0)?, ino.0))),
            })
        });
        match opened {
            Ok(dir) => {
                let number = self.number();
                self.dirs.write().insert(number, Arc::new(dir));
                reply.opened(FileHandle(number), FopenFlags::empty());
            }
            Err(error) => reply.error(errno(error)),
        }
    }

    fn readdir(&self, request: &Request, ino: INodeNo, handle: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let handling = Handling::of("readdir");
        let result = handling.guard(|| {
            let real = self.real_dir(
                handle,
                offset,
                |reply: &mut ReplyDirectory, _, item| {
                    reply.add(INodeNo(item.inode), item.next, kind(item.kind), item.name)
                },
                &mut reply,
            )?;
            if !real {
                self.list_virtual(caller(request), ino.0, handle, offset, &mut reply)?;
            }
            Ok(())
        });
        match result {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn readdirplus(
        &self,
        request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let handling = Handling::of("readdirplus");
        if ino.0 >= VIRTUAL_BASE {
            return match handling.guard(|| self.list_virtual_plus(caller(request), ino.0, handle, offset, &mut reply)) {
                Ok(()) => reply.ok(),
                Err(error) => reply.error(errno(error)),
            };
        }
        let mut failed = None;
        let mut added = false;
        let result = handling.guard(|| {
            let parent = self.files.nodes.get(ino.0)?;
            self.real_dir(
                handle,
                offset,
                |reply: &mut ReplyDirectoryPlus, _, item| {
                    let dots = item.name == "." || item.name == "..";
                    let looked = match dots {
                        true => self.files.getattr(ino.0),
                        false => self.files.lookup_listed(&parent, item.name, item.inode),
                    };
                    let entry = match looked {
                        Ok(entry) => entry,
                        // Gone since it was listed.
                        Err(Sys::NOENT) => return false,
                        Err(error) => {
                            failed = Some(error);
                            return true;
                        }
                    };
                    let attr = attr(entry.id, &entry.stat);
                    let full = reply.add(INodeNo(entry.id), item.next, item.name, &TTL, &attr, GENERATION);
                    if full && !dots {
                        // It didn't fit: the kernel never hears of this lookup.
                        self.files.forget(entry.id, 1);
                    }
                    added |= !full;
                    // Others are being forgotten: no more than one at a time comes meanwhile.
                    full || self.files.nodes.is_crowded()
                },
                &mut reply,
            )?;
            // What came before is given; the next call begins with what failed.
            match failed {
                Some(error) if !added => Err(error),
                _ => Ok(()),
            }
        });
        match result {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn releasedir(&self, _request: &Request, _ino: INodeNo, handle: FileHandle, _flags: OpenFlags, reply: ReplyEmpty) {
        let handling = Handling::of("releasedir");
        empty(&handling, reply, || {
            let gone = self.dirs.write().remove(&handle.0);
            drop(gone);
            Ok(())
        });
    }

    fn fsyncdir(&self, _request: &Request, _ino: INodeNo, handle: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        let handling = Handling::of("fsyncdir");
        empty(&handling, reply, || match &*self.dir(handle)? {
            Dir::Real(listing) => {
                let fd = listing.lock().descriptor()?;
                self.files.fsync_dir(std::os::fd::AsFd::as_fd(&fd))
            }
            Dir::Virtual(_) => Ok(()),
        });
    }

    fn statfs(&self, _request: &Request, ino: INodeNo, reply: ReplyStatfs) {
        let handling = Handling::of("statfs");
        let ino = if ino.0 >= VIRTUAL_BASE { INodeNo::ROOT } else { ino };
        match handling.guard(|| self.files.statfs(ino.0)) {
            Ok(s) => reply.statfs(
                s.f_blocks,
                s.f_bfree,
                s.f_bavail,
                s.f_files,
                s.f_ffree,
                s.f_bsize as u32,
                s.f_namemax as u32,
                s.f_frsize as u32,
            ),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn setxattr(
        &self,
        request: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        let handling = Handling::of("setxattr");
        empty(&handling, reply, || {
            if name == crate::views::STATUS {
                return Err(Sys::PERM);
            }
            self.files.setxattr(caller(request), real(ino)?, name, value, flags)
        });
    }

    fn getxattr(&self, _request: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let handling = Handling::of("getxattr");
        let result = handling.guard(|| {
            if ino.0 >= VIRTUAL_BASE {
                return Err(Sys::NODATA);
            }
            match self.views.xattr(vexfs_store::FileId(ino.0), name) {
                Some(computed) => computed,
                None => self.files.getxattr(ino.0, name),
            }
        });
        answer_xattr(reply, size, result);
    }

    fn listxattr(&self, _request: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        let handling = Handling::of("listxattr");
        let result = handling.guard(|| match ino.0 >= VIRTUAL_BASE {
            true => Ok(Vec::new()),
            false => self.files.listxattr(ino.0),
        });
        answer_xattr(reply, size, result);
    }

    fn removexattr(&self, _request: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let handling = Handling::of("removexattr");
        empty(&handling, reply, || self.files.removexattr(real(ino)?, name));
    }

    fn access(&self, _request: &Request, ino: INodeNo, mask: AccessFlags, reply: ReplyEmpty) {
        let handling = Handling::of("access");
        // Asked only where the kernel doesn't check by itself.
        empty(&handling, reply, || match ino.0 >= VIRTUAL_BASE {
            true => Ok(()),
            false => self.files.may(ino.0, mask.bits() as u32),
        });
    }

    fn fallocate(
        &self,
        request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let handling = Handling::of("fallocate");
        empty(&handling, reply, || {
            self.files.fallocate(caller(request), &self.file(handle)?.handle, mode, offset, length)
        });
    }

    fn lseek(&self, _request: &Request, ino: INodeNo, handle: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        let handling = Handling::of("lseek");
        let result = handling.guard(|| match ino.0 >= VIRTUAL_BASE {
            true => Err(Sys::INVAL),
            false => self.files.lseek(&self.file(handle)?.handle, offset, whence),
        });
        match result {
            Ok(at) => reply.offset(at as i64),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn copy_file_range(
        &self,
        request: &Request,
        _ino_in: INodeNo,
        from: FileHandle,
        offset_in: u64,
        _ino_out: INodeNo,
        to: FileHandle,
        offset_out: u64,
        len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        let handling = Handling::of("copy_file_range");
        let result = handling.guard(|| {
            let (from, to) = (self.file(from)?, self.file(to)?);
            self.files.copy_range(caller(request), (&from.handle, offset_in), (&to.handle, offset_out), len)
        });
        match result {
            Ok(copied) => reply.written(copied as u32),
            Err(error) => reply.error(errno(error)),
        }
    }
}

impl Fuse {
    /// The snapshot of an open virtual directory; reading from the start asks anew, as after rewinddir(3).
    fn snapshot(&self, caller: Caller, ino: u64, handle: FileHandle, offset: u64) -> Result<Vec<Listed>, Sys> {
        let dir = self.dir(handle)?;
        let Dir::Virtual(snapshot) = &*dir else { return Err(Sys::NOTDIR) };
        if offset == 0 {
            let fresh = self.virtually(|views| views.list(caller, ino))?;
            *snapshot.lock() = fresh;
        }
        let listed = snapshot.lock().clone();
        Ok(listed)
    }

    fn list_virtual(
        &self,
        caller: Caller,
        ino: u64,
        handle: FileHandle,
        offset: u64,
        reply: &mut ReplyDirectory,
    ) -> Result<(), Sys> {
        let listed = self.snapshot(caller, ino, handle, offset)?;
        for at in offset..listed.len() as u64 + DOTS.len() as u64 {
            let (kind, name) = match entry_at(&listed, at) {
                At::Dot(name) => (VirtualKind::Dir, OsStr::new(name)),
                At::Listed(entry) => (entry.kind(), entry.name.as_os_str()),
            };
            if reply.add(INodeNo(ino), at + 1, virtual_kind(kind), name) {
                break;
            }
        }
        Ok(())
    }

    fn list_virtual_plus(
        &self,
        caller: Caller,
        ino: u64,
        handle: FileHandle,
        offset: u64,
        reply: &mut ReplyDirectoryPlus,
    ) -> Result<(), Sys> {
        let listed = self.snapshot(caller, ino, handle, offset)?;
        for at in offset..listed.len() as u64 + DOTS.len() as u64 {
            let full = match entry_at(&listed, at) {
                At::Dot(name) => {
                    let attr = virtual_attr(&self.views.getattr(ino)?);
                    reply.add(INodeNo(ino), at + 1, name, &NOW, &attr, GENERATION)
                }
                At::Listed(entry) => {
                    let node = self.views.enter_listed(entry);
                    let attr = virtual_attr(&node);
                    let full = reply.add(INodeNo(node.id), at + 1, &entry.name, &NOW, &attr, GENERATION);
                    if full {
                        // It didn't fit: the kernel never hears of this lookup.
                        self.views.forget(node.id, 1);
                    }
                    full
                }
            };
            if full {
                break;
            }
        }
        Ok(())
    }
}

const DOTS: [&str; 2] = [".", ".."];

enum At<'a> {
    Dot(&'static str),
    Listed(&'a Listed),
}

fn entry_at(listed: &[Listed], at: u64) -> At<'_> {
    match DOTS.get(at as usize) {
        Some(name) => At::Dot(name),
        None => At::Listed(&listed[at as usize - DOTS.len()]),
    }
}

/// Virtual nodes can't be changed.
fn real(ino: INodeNo) -> Result<u64, Sys> {
    if ino.0 >= VIRTUAL_BASE { Err(Sys::PERM) } else { Ok(ino.0) }
}

fn answer_xattr(reply: ReplyXattr, size: u32, result: Result<Vec<u8>, Sys>) {
    match result {
        Ok(value) if size == 0 => reply.size(value.len() as u32),
        Ok(value) if value.len() > size as usize => reply.error(Errno::ERANGE),
        Ok(value) => reply.data(&value),
        Err(error) => reply.error(errno(error)),
    }
}

/// How the kernel is to be served.
pub struct Loops {
    /// Event loops.
    pub threads: usize,
    /// Other users may enter.
    pub allow_other: bool,
    /// The kernel checks modes and lists.
    pub checked: bool,
}

/// Serves a mount that was made with this `/dev/fuse` descriptor until it is unmounted. `ready` is called when the
/// kernel has been answered.
pub fn serve(mut fuse: Fuse, device: OwnedFd, loops: &Loops, ready: impl FnOnce()) -> std::io::Result<()> {
    // The mount itself is made by `mount`: fuser 0.18.0 may unmount what somebody else mounted there later.
    let mut config = Config::default();
    fuse.checked = loops.checked;
    config.acl = if loops.allow_other { SessionACL::All } else { SessionACL::Owner };
    config.n_threads = Some(loops.threads);
    config.clone_fd = true;
    let nodes = Arc::clone(&fuse.files.nodes);
    let session = Session::from_fd(fuse, device, config.acl, config)?;
    let notifier = session.notifier();
    let over = AtomicBool::new(false);
    let forget = |dir: u64, name: &OsStr| {
        if let Err(error) = notifier.inval_entry(INodeNo(dir), name) {
            log::debug!("{} of inode {dir} isn't forgotten: {error}", name.display());
        }
    };
    std::thread::scope(|scope| {
        // The only one that tells the kernel anything unasked.
        let evictor = std::thread::Builder::new()
            .name("vexfs-evict".to_owned())
            .spawn_scoped(scope, || nodes.keep_room(&over, &forget))?;
        ready();
        let served = session.run();
        over.store(true, Ordering::Release);
        evictor.thread().unpark();
        served
    })
}
