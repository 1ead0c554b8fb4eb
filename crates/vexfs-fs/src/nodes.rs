//! The inode table: which files the kernel knows, each pinned by an `O_PATH` descriptor so that its number can't be
//! given to another file meanwhile.
//!
//! A node's number is its inode number on the source, so numbers are the same after a remount. The root is 1, as
//! FUSE wants it. A file on another device than the root's gets a number of its own with bit 62 set, as does one
//! that has the number 1. Numbers from [`VIRTUAL_BASE`] on belong to the virtual directories.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::thread::Thread;
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, Stat, openat};
use rustix::io::Errno;
use vexfs_store::{FileId, memory};

use crate::reopen::{Reopener, path_of};

/// First number of virtual nodes.
pub const VIRTUAL_BASE: u64 = 0xf000_0000_0000_0000;
/// First number given to what is on another file system.
pub const SYNTHETIC: u64 = 1 << 62;

/// A file that the kernel knows.
pub struct Node {
    /// Its number.
    pub id: u64,
    /// `O_PATH` descriptor.
    pub fd: OwnedFd,
    /// What it is; never changes.
    pub kind: FileType,
    /// On the root's file system, where numbers are the store's.
    pub native: bool,
    lookups: AtomicU64,
    /// A directory's only name; of a file that had several at a time or where few are known, the one by which it was last met.
    place: Mutex<Option<(u64, OsString)>>,
    /// One of its names is a vector file's.
    pub interesting: AtomicBool,
    /// Handles.
    pub handles: AtomicU32,
    /// Handles open for writing.
    pub writers: AtomicU32,
    /// Those of them whose writes take set-id bits away.
    pub strangers: AtomicU32,
    /// The modification time up to which the file's set-id bits are rightly there, while strangers may write.
    pub set_id_since: Mutex<Option<(i64, u64)>>,
    /// By which it was last opened for writing, while that is open.
    pub written_by: Mutex<Weak<File>>,
}

/// See the module.
pub struct Nodes {
    /// Opens nodes.
    pub reopener: Reopener,
    device: u64,
    root_inode: u64,
    known: RwLock<HashMap<u64, Arc<Node>>>,
    foreign: Mutex<HashMap<(u64, u64), u64>>,
    /// With more nodes than that the kernel is asked to forget some.
    room: usize,
    /// Who asks it.
    evictor: OnceLock<Thread>,
    /// The most nodes since memory was last given back.
    most: AtomicUsize,
}

/// Fewer nodes than that leave no memory worth the trouble.
const MANY: usize = 4096;

/// How long a new node waits where there are too many, so that they don't come faster than others go.
const CROWDED: Duration = Duration::from_micros(100);
/// How long the evictor waits for the kernel to forget before it goes on.
const FORGETTING: Duration = Duration::from_millis(20);
/// With room for fewer nodes than that all names are known.
const SMALL: usize = 10_000;
/// No node has gone for so long: memory is given back.
const QUIET: Duration = Duration::from_millis(300);

impl Nodes {
    /// `root` is a descriptor of the source directory, `room` how many files the kernel may know before it is asked to
    /// forget some: each takes a descriptor.
    pub fn new(root: OwnedFd, room: usize) -> Result<Nodes, Errno> {
        let stat = rustix::fs::fstat(&root)?;
        let nodes = Nodes {
            reopener: Reopener::new()?,
            device: stat.st_dev,
            root_inode: stat.st_ino,
            known: RwLock::new(HashMap::new()),
            foreign: Mutex::new(HashMap::new()),
            room,
            evictor: OnceLock::new(),
            most: AtomicUsize::new(0),
        };
        let root = nodes.node(FileId::ROOT.0, root, &stat);
        nodes.known.write().insert(FileId::ROOT.0, Arc::new(root));
        Ok(nodes)
    }

    fn node(&self, id: u64, fd: OwnedFd, stat: &Stat) -> Node {
        Node {
            id,
            fd,
            kind: FileType::from_raw_mode(stat.st_mode),
            native: stat.st_dev == self.device && id < SYNTHETIC,
            lookups: AtomicU64::new(0),
            place: Mutex::new(None),
            interesting: AtomicBool::new(false),
            handles: AtomicU32::new(0),
            writers: AtomicU32::new(0),
            strangers: AtomicU32::new(0),
            set_id_since: Mutex::new(None),
            written_by: Mutex::default(),
        }
    }

    /// The number under which a file is, or would be, known.
    pub fn id(&self, stat: &Stat) -> u64 {
        match (stat.st_dev == self.device, stat.st_ino) {
            (true, inode) if inode == self.root_inode => FileId::ROOT.0,
            (true, inode) if inode != FileId::ROOT.0 && inode < SYNTHETIC => inode,
            _ => {
                let mut foreign = self.foreign.lock();
                let next = SYNTHETIC + foreign.len() as u64;
                *foreign.entry((stat.st_dev, stat.st_ino)).or_insert(next)
            }
        }
    }

    /// A node that the kernel knows; ESTALE for one that it has forgotten.
    pub fn get(&self, id: u64) -> Result<Arc<Node>, Errno> {
        self.known.read().get(&id).cloned().ok_or(Errno::STALE)
    }

    /// Counts a lookup of a file that is known already.
    pub fn meet(&self, stat: &Stat, place: (u64, &OsStr)) -> Option<Arc<Node>> {
        let id = self.id(stat);
        let known = self.known.read();
        let node = known.get(&id)?;
        node.lookups.fetch_add(1, Ordering::AcqRel);
        node.settle(place, self.keeps_name(stat));
        Some(Arc::clone(node))
    }

    /// Counts a lookup of a file, opened as `fd`.
    pub fn add(&self, stat: &Stat, fd: OwnedFd, place: (u64, &OsStr)) -> Arc<Node> {
        let id = self.id(stat);
        let mut known = self.known.write();
        let node = known.entry(id).or_insert_with(|| Arc::new(self.node(id, fd, stat)));
        node.lookups.fetch_add(1, Ordering::AcqRel);
        node.settle(place, self.keeps_name(stat));
        let node = Arc::clone(node);
        let nodes = known.len();
        self.most.fetch_max(nodes, Ordering::AcqRel);
        drop(known);
        if nodes > self.room {
            self.wake_evictor();
            // The less room is left the longer.
            std::thread::sleep(if nodes - self.room > self.room / 2 { 10 * CROWDED } else { CROWDED });
        }
        node
    }

    /// Is it worth its memory to know what a file is called? It is where the file may be met under another name, and where so
    /// few files may be known that the evictor has no time to look for their names.
    fn keeps_name(&self, stat: &Stat) -> bool {
        stat.st_nlink > 1 || self.room < SMALL
    }

    /// Are so many gone that the memory is worth giving back?
    fn are_few(&self, left: usize) -> bool {
        let most = self.most.load(Ordering::Acquire);
        most >= MANY && left < most / 4
    }

    /// Are there more than there is room for?
    pub fn is_crowded(&self) -> bool {
        self.known.read().len() > self.room
    }

    fn wake_evictor(&self) {
        if let Some(evictor) = self.evictor.get() {
            evictor.unpark();
        }
    }

    /// Whenever there are too many nodes, has the kernel `forget` names that lead to files which nobody has open, until
    /// half of the room is free; and gives memory back when most nodes are gone. Until `over`, and this thread is unparked. Not for a thread that serves: the kernel may
    /// wait for an answer with the directory locked that `forget` needs.
    pub fn keep_room(&self, over: &AtomicBool, forget: &dyn Fn(u64, &OsStr)) {
        if self.evictor.set(std::thread::current()).is_err() {
            return;
        }
        while !over.load(Ordering::Acquire) {
            let known = self.known.read().len();
            if known > self.room {
                self.evict(over, forget);
                std::thread::park_timeout(FORGETTING);
            } else if self.are_few(known) {
                std::thread::sleep(QUIET);
                // The last of those that go have gone.
                if self.known.read().len() >= known {
                    self.most.store(known, Ordering::Release);
                    self.known.write().shrink_to_fit();
                    memory::give_back();
                }
            } else {
                std::thread::park();
            }
        }
    }

    fn evict(&self, over: &AtomicBool, forget: &dyn Fn(u64, &OsStr)) {
        let is_idle = |node: &Arc<Node>| !node.is_dir() && node.handles.load(Ordering::Acquire) == 0;
        let has_room = || self.known.read().len() <= self.room / 2 || over.load(Ordering::Acquire);
        // Numbers, because a node that is held here keeps its descriptor.
        let numbers = |of: &dyn Fn(&Arc<Node>) -> bool| {
            self.known.read().values().filter(|node| of(node)).map(|node| node.id).collect::<Vec<u64>>()
        };
        let mut named = 0;
        for id in numbers(&is_idle) {
            let place = self.known.read().get(&id).and_then(|node| node.place.lock().clone());
            let Some((dir, name)) = place else { continue };
            forget(dir, &name);
            named += 1;
            if has_room() {
                return;
            }
        }
        if named > self.room / 4 {
            // What the kernel forgets comes back a little later.
            return;
        }
        for id in numbers(&|node| node.is_dir()) {
            let Ok(dir) = self.get(id) else { continue };
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let listed = openat(&dir.fd, c".", flags, Mode::empty()).and_then(Dir::read_from);
            // One that can't be listed keeps what is known of it.
            for entry in listed.into_iter().flatten().flatten() {
                if self.known.read().get(&entry.ino()).is_some_and(is_idle) {
                    forget(dir.id, OsStr::from_bytes(entry.file_name().to_bytes()));
                }
            }
            if has_room() {
                return;
            }
        }
    }

    /// Takes lookups back; the node goes with its last one.
    pub fn forget(&self, id: u64, count: u64) {
        if id == FileId::ROOT.0 {
            return;
        }
        let mut known = self.known.write();
        let Some(node) = known.get(&id) else { return };
        let before = node.lookups.fetch_sub(count, Ordering::AcqRel);
        if before <= count {
            let gone = known.remove(&id);
            let few = self.are_few(known.len());
            drop(known);
            // Closing the descriptor may free an inode below: not under the lock.
            drop(gone);
            if few {
                self.wake_evictor();
            }
        }
    }

    /// Where a directory is, as far as the kernel has been told.
    pub fn place(&self, dir: FileId) -> Option<(FileId, OsString)> {
        let node = self.known.read().get(&dir.0).cloned()?;
        let place = node.place.lock().clone()?;
        Some((FileId(place.0), place.1))
    }

    /// One of a file's names: ESTALE if the kernel has been told of none that is left.
    pub fn name_of(&self, node: &Node) -> Result<(FileId, OsString), Errno> {
        let is_there = |dir: &OwnedFd, name: &OsStr| {
            rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW).is_ok_and(|stat| self.id(&stat) == node.id)
        };
        let met = node.place.lock().clone();
        if let Some((parent, name)) = met
            && self.get(parent).is_ok_and(|dir| is_there(&dir.fd, &name))
        {
            return Ok((FileId(parent), name));
        }
        // The name under which it was opened, as that is called now.
        let path = |node: &Node| rustix::fs::readlinkat(CWD, path_of(node.fd.as_fd()), Vec::new());
        let root = self.get(FileId::ROOT.0)?;
        let (above, path) = (path(&root)?.into_bytes(), path(node)?.into_bytes());
        let above = above.strip_suffix(b"/").unwrap_or(&above);
        let below = path.strip_prefix(above).and_then(|path| path.strip_prefix(b"/")).ok_or(Errno::STALE)?;
        let (dir, name) = match below.iter().rposition(|byte| *byte == b'/') {
            Some(at) => (&below[..at], &below[at + 1..]),
            None => (&b"."[..], below),
        };
        let dir = rustix::fs::statat(&root.fd, dir, AtFlags::SYMLINK_NOFOLLOW).map_err(|_| Errno::STALE)?;
        match is_there(&root.fd, OsStr::from_bytes(below)) {
            true => Ok((FileId(self.id(&dir)), OsStr::from_bytes(name).to_owned())),
            false => Err(Errno::STALE),
        }
    }

    /// Has somebody the file open for writing?
    pub fn is_written(&self, file: FileId) -> bool {
        self.known.read().get(&file.0).is_some_and(|node| node.writers.load(Ordering::Acquire) > 0)
    }
}

impl Node {
    /// The number as the store knows it.
    pub fn file(&self) -> FileId {
        FileId(self.id)
    }

    /// Is it a directory?
    pub fn is_dir(&self) -> bool {
        self.kind == FileType::Directory
    }

    /// It is here now, and may have other names.
    pub fn settle(&self, (parent, name): (u64, &OsStr), several: bool) {
        let kept = if self.is_dir() { self.id != FileId::ROOT.0 } else { several };
        let mut place = self.place.lock();
        let same = place.as_ref().is_some_and(|(known, called)| *known == parent && called == name);
        if (kept || place.is_some()) && !same {
            *place = Some((parent, name.to_owned()));
        }
    }
}
