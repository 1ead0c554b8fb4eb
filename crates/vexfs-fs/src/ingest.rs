//! From files to the store: what is read when, and what becomes of it.
//!
//! A file is read when its last change is closed, when a vector file's name appears, and by the walk. One reading of a
//! file at a time; whoever finds the fingerprint unchanged does nothing.

mod attached;

use std::cell::Cell;
use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Mutex, RwLock};
use rustix::fs::Stat;
use rustix::io::Errno;
use vexfs_store::{Config, Content, FileId, Fingerprint, Link, Target, Volume};

use crate::errors::Failure;
use crate::events::Known;
use crate::formats::{Format, Refusal, Source as Vectors};
use crate::source::{Source, fingerprint};
use crate::walk::RESERVED;

/// The name of a collection's settings.
pub const CONFIG_NAME: &str = ".vexfs.toml";
/// What a file is called between two renames that are an exchange: no file is, so nothing is read there.
const ASIDE: &[u8] = RESERVED.as_bytes();
/// Longest `.vexfs.toml`.
const MAX_CONFIG: u64 = 64 << 10;
/// A file that changes while it is read is read again this often; then the next close reads it.
const ATTEMPTS: usize = 3;
/// Bytes of text that are read where they are asked for: a vector of 4,096 dimensions and more.
const SHORT: i64 = 64 << 10;
/// Files are read one at a time by the lowest bits of their number.
const STRIPES: usize = 64;

/// See the module.
pub struct Ingest {
    /// The store.
    pub volume: Arc<Volume>,
    /// Where the files are.
    pub source: Arc<Source>,
    strict: bool,
    /// Has somebody the file open for writing through the mount?
    being_written: Box<dyn Fn(FileId) -> bool + Send + Sync>,
    reading: Vec<Mutex<()>>,
    /// Settings are read one at a time.
    configuring: Mutex<()>,
    /// Until the walk after mounting is over, files may have names that the volume hasn't heard of.
    walked: AtomicBool,
    /// How changes beneath the mount are found: by "fanotify" or "inotify", or the source is "walked" now and then or
    /// "trusted" not to change. "walking": the first walk isn't over.
    pub beneath: Mutex<&'static str>,
    /// A file that was to be read was under none of its names: no answer is whole before the walk.
    lost: AtomicBool,
    /// Files that were refused for a reason that may pass.
    passing: Mutex<HashSet<FileId>>,
    /// Shared by who moves a directory through the mount, until the volume knows where it is. Taken before the volume's
    /// locks, or not waited for.
    pub moving: RwLock<()>,
}

/// Does a regular file of this name hold vectors or configure a collection?
pub fn is_interesting(name: &OsStr) -> bool {
    name == CONFIG_NAME || Format::of(name).is_some()
}

fn is_config(link: &Link) -> bool {
    link.name == CONFIG_NAME.as_bytes()
}

fn format_of(link: &Link) -> Option<Format> {
    Format::of(OsStr::from_bytes(&link.name))
}

impl Ingest {
    /// `strict`: a file that can't be indexed makes close and fsync fail. `being_written` tells whether somebody
    /// has a file open for writing through the mount.
    pub fn new(
        volume: Arc<Volume>,
        source: Arc<Source>,
        strict: bool,
        being_written: Box<dyn Fn(FileId) -> bool + Send + Sync>,
    ) -> Ingest {
        let reading = (0..STRIPES).map(|_| Mutex::new(())).collect();
        Ingest {
            volume,
            source,
            strict,
            being_written,
            reading,
            configuring: Mutex::new(()),
            walked: AtomicBool::new(false),
            beneath: Mutex::new("walking"),
            lost: AtomicBool::new(false),
            passing: Mutex::default(),
            moving: RwLock::new(()),
        }
    }

    /// Is the walk after mounting over?
    pub fn walked(&self) -> bool {
        self.walked.load(Ordering::Acquire)
    }

    /// Was a file that had to be read under none of the names that the volume knows?
    pub fn lost_any(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    /// The walk after mounting is over.
    pub fn walk_ended(&self) {
        self.walked.store(true, Ordering::Release);
    }

    /// Reads a file if it changed since its last reading. Under `--strict` a file that isn't indexed is an error.
    pub fn read(&self, file: FileId, fd: BorrowedFd<'_>, when: When) -> Result<(), Failure> {
        let result = self.read_unless_known(file, &File::from(fd.try_clone_to_owned().map_err(from_io)?), when);
        match result {
            Ok(()) => Ok(()),
            Err(refusal) if self.strict => Err(Failure::new(refusal.errno, refusal.reason)),
            Err(_) => Ok(()),
        }
    }

    /// Does [`Ingest::read`] take so little stack that the request's handler can do it? A thread of the pool has to be woken
    /// and wakes the handler again, which takes longer than to read one vector.
    pub fn is_short(&self, file: FileId, fd: BorrowedFd<'_>) -> bool {
        let Some(link) = self.volume.links(file).into_iter().next() else { return true };
        let Ok(stat) = rustix::fs::fstat(fd) else { return false };
        self.is_read(file, &link, fingerprint(&stat))
            || format_of(&link) == Some(Format::Text)
                && stat.st_size <= SHORT
                && self.volume.puts_shortly(link.parent, file)
    }

    /// As [`Ingest::read`], by one of the paths that the volume knows.
    pub fn read_known(&self, file: FileId, when: When) {
        for path in self.volume.paths(file, FileId::ROOT) {
            let read = match file.is_attached() {
                true => self.holder(&path, file).map(|opened| self.read_attached(file.holder(), opened.as_fd(), when)),
                false => self.source.open(&path, file).map(|opened| self.read_unless_known(file, &opened, when)),
            };
            match read {
                Ok(Ok(())) => return,
                Ok(Err(refusal)) => {
                    let what = if file.is_attached() { "attached to " } else { "" };
                    log::info!("{what}{}: {}", String::from_utf8_lossy(&path), refusal.reason);
                    return;
                }
                Err(Errno::STALE | Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {}
                Err(errno) => {
                    self.refuse(file, Fingerprint::default(), &Refusal::from(std::io::Error::from(errno)));
                    return;
                }
            }
        }
        // No path leads to it any more: the source changed beneath us. The walk may find it elsewhere.
        self.lost.store(true, Ordering::Release);
        for link in self.volume.links(file) {
            self.drop_stale(file.holder(), &link);
        }
    }

    /// Takes a name away that doesn't lead to the file any more. Looked at while no name can change in the volume: a
    /// rename through the mount, done and not told yet, tells after this, and brings the file back. What lies below a
    /// directory it could not, so none is being moved meanwhile.
    pub fn drop_stale(&self, file: FileId, link: &Link) {
        self.drop_if(|| !self.leads_to(link, file), |gone| self.unlinked_if(file, link, gone));
    }

    /// Does a name lead to the file or directory, as the source is now?
    pub fn leads_to(&self, link: &Link, file: FileId) -> bool {
        let Some(mut path) = self.volume.dir_path(link.parent) else { return false };
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(&link.name);
        self.source.stat(&path).is_ok_and(|stat| self.source.id(&stat) == Some(file))
    }

    /// Forgets a directory that isn't there any more, looked at in the same way.
    pub fn drop_stale_dir(&self, dir: FileId) {
        let is_gone = || {
            let Some(path) = self.volume.dir_path(dir) else { return true };
            match self.source.stat(&path) {
                Ok(stat) => self.source.id(&stat) != Some(dir),
                Err(errno) => matches!(errno, Errno::NOENT | Errno::NOTDIR),
            }
        };
        self.drop_if(is_gone, |gone| self.volume.remove_dir_if(dir, gone));
    }

    /// Has `drop` take away what is `gone`, which it asks while no name can change in the volume.
    fn drop_if(&self, gone: impl Fn() -> bool, drop: impl Fn(&dyn Fn() -> bool)) {
        while gone() {
            let moving = Cell::new(false);
            drop(&|| {
                let alone = self.moving.try_write();
                moving.set(alone.is_none());
                alone.is_some() && gone()
            });
            if !moving.get() {
                return;
            }
            std::thread::yield_now();
        }
    }

    fn read_unless_known(&self, file: FileId, opened: &File, when: When) -> Result<(), Refusal> {
        let Some(link) = self.volume.links(file).into_iter().next() else { return Ok(()) };
        // Settings have vector files read while they are held: those may have any stripe, and never settings.
        let _one = if is_config(&link) { &self.configuring } else { &self.reading[file.0 as usize % STRIPES] }.lock();
        for _ in 0..ATTEMPTS {
            let before = fingerprint(&rustix::fs::fstat(opened).map_err(std::io::Error::from)?);
            match self.volume.content(file) {
                Some((known, Content::Refused { errno, reason })) if known == before => {
                    return Err(Refusal { errno: Errno::from_raw_os_error(errno), reason });
                }
                Some(_) if self.is_read(file, &link, before) => return Ok(()),
                Some(_) => {}
                None => return Ok(()),
            }
            let result = match is_config(&link) {
                true => self.read_config(link.parent, opened),
                false => self.read_vectors(file, &link, opened, before, when),
            };
            let after = fingerprint(&rustix::fs::fstat(opened).map_err(std::io::Error::from)?);
            let same = (before.size, before.mtime) == (after.size, after.mtime);
            match &result {
                // Bytes that changed under the reader say nothing.
                Err(_) if !same => continue,
                Err(_) if when == When::Quiet && (self.being_written)(file) => return Ok(()),
                Err(refusal) => self.refuse(file, before, refusal),
                Ok(()) if is_config(&link) => self.volume.put_empty(file, before),
                Ok(()) => {}
            }
            if same {
                return result;
            }
        }
        // Somebody writes on; their close will read it.
        Ok(())
    }

    fn refuse(&self, file: FileId, before: Fingerprint, refusal: &Refusal) {
        let print = if refusal.may_pass() { Fingerprint::default() } else { before };
        self.volume.refuse(file, print, refusal.errno.raw_os_error(), refusal.reason.clone());
        if refusal.may_pass() {
            self.passing.lock().insert(file);
        }
    }

    /// Is what was read of the file what is there now?
    fn is_read(&self, file: FileId, link: &Link, now: Fingerprint) -> bool {
        let content = self.volume.content(file);
        matches!(content, Some((known, Content::Indexed { .. } | Content::Empty)) if known == now)
            && !self.misplaced(file, link)
    }

    /// Is the file indexed in another collection than its directory's?
    fn misplaced(&self, file: FileId, link: &Link) -> bool {
        match self.volume.content(file) {
            Some((_, Content::Indexed { collection, .. })) => {
                self.volume.nearest_collection(link.parent) != Some(collection)
            }
            _ => false,
        }
    }

    fn read_vectors(
        &self,
        file: FileId,
        link: &Link,
        opened: &File,
        before: Fingerprint,
        when: When,
    ) -> Result<(), Refusal> {
        let Some(format) = Format::of(OsStr::from_bytes(&link.name)) else { return Ok(()) };
        // A writer is counted before it truncates: if there is none now, what was read is what a close left.
        let leave = || when == When::Quiet && (self.being_written)(file);
        let Some(vectors) = Vectors::open(format, opened)? else {
            if !leave() {
                self.volume.put_empty(file, before);
            }
            return Ok(());
        };
        let shape = vectors.shape();
        let target = when.target(self.volume.prepare(file, shape.dimension, shape.element)?);
        vectors.encoded_bytes(&target.space)?;
        let mut rows = self.volume.rows(&target, shape.rows)?;
        vectors.encode_each(&target.space, &mut |row| rows.push(row))?;
        if !leave() {
            self.volume.put(file, before, &target, rows)?;
        }
        Ok(())
    }

    fn read_config(&self, dir: FileId, opened: &File) -> Result<(), Refusal> {
        let len = opened.metadata()?.len();
        if len > MAX_CONFIG {
            return Err(Refusal::too_big(format!("{len} bytes; a {CONFIG_NAME} may have {MAX_CONFIG}")));
        }
        let mut bytes = vec![0; len as usize];
        std::os::unix::fs::FileExt::read_exact_at(opened, &mut bytes, 0)?;
        let text = String::from_utf8(bytes).map_err(|error| Refusal::malformed(error.to_string()))?;
        let config = Config::parse(&text).map_err(Refusal::malformed)?;
        self.configure(dir, Some(config));
        Ok(())
    }

    fn configure(&self, dir: FileId, config: Option<Config>) {
        for file in self.volume.configure(dir, config) {
            let of_config = !file.is_attached() && self.volume.links(file).first().is_some_and(is_config);
            if !of_config {
                self.reread(file);
            }
        }
    }

    /// Reads again what was refused for a reason that may pass. True if some of it was refused again.
    pub fn retry(&self) -> bool {
        // Not locked while they are read: what is refused again is put back.
        let files = std::mem::take(&mut *self.passing.lock());
        for file in files {
            self.read_known(file, When::Quiet);
        }
        !self.passing.lock().is_empty()
    }

    /// Reads a file again whatever its fingerprint says, because its collection changed.
    fn reread(&self, file: FileId) {
        self.volume.forget_fingerprint(file);
        self.read_known(file, When::Now);
    }

    /// A name was seen to lead to a file, by who isn't told of renames: what was seen may be over. True if the file's bytes
    /// are to be read.
    pub fn met(&self, link: &Link, file: FileId) -> bool {
        if self.volume.knows_link(file, link) {
            return false;
        }
        let unread = self.volume.link(file, link.clone());
        self.drop_stale(file, link);
        unread
    }

    /// The same of what is attached to it.
    pub fn met_attached(&self, link: &Link, file: FileId) {
        if !self.volume.knows_link(file.attached(), link) {
            self.volume.attach(file, vec![link.clone()]);
            self.drop_stale(file, link);
        }
    }

    /// A name is gone.
    pub fn unlinked(&self, parent: FileId, name: &OsStr, file: FileId) {
        self.unlinked_if(file, &Link { parent, name: name.as_bytes().to_vec() }, || true);
    }

    fn unlinked_if(&self, file: FileId, link: &Link, gone: impl FnOnce() -> bool) {
        if !self.volume.unlink_if(file, link, gone) {
            return;
        }
        self.lost_name(file, link);
        if is_config(link) {
            self.configure(link.parent, None);
        }
    }

    /// A file is read as its first name says: again, where one that is gone may have said something else.
    fn lost_name(&self, file: FileId, lost: &Link) {
        let left = self.volume.links(file).into_iter().next();
        if left.is_some_and(|left| format_of(&left) != format_of(lost)) {
            self.reread(file);
        }
    }

    /// A file moved. Its vectors move with it, and are read anew only where another collection or format begins.
    pub fn renamed(&self, what: Known, from: &Link, to: &Link, replaced: Option<FileId>) {
        let file = what.file;
        let was = is_interesting(OsStr::from_bytes(&from.name));
        let is = is_interesting(OsStr::from_bytes(&to.name));
        self.volume.rename((file, what.has_attached), (from, was), (to.clone(), is), replaced);
        if to.name != ASIDE {
            self.refresh_attached(file);
        }
        if is_config(from) && (from.parent != to.parent || !is_config(to)) {
            self.configure(from.parent, None);
        }
        if let Some(replaced) = replaced {
            self.lost_name(replaced, to);
        }
        match is {
            true => self.refresh(file, from, to),
            false => self.lost_name(file, from),
        }
    }

    /// Reads a renamed file where its new name makes something else of it.
    fn refresh(&self, file: FileId, from: &Link, to: &Link) {
        if format_of(from) != format_of(to) || self.misplaced(file, to) {
            self.reread(file);
        } else if !self.touch(file) {
            self.read_known(file, When::Now);
        }
    }

    /// What is attached to a file may belong to another collection where the file is now.
    fn refresh_attached(&self, file: FileId) {
        if self.volume.has_attached(file) {
            self.read_known(file.attached(), When::Now);
        }
    }

    /// Two files took each other's names.
    pub fn exchanged(&self, one: (Known, &Link), other: (Known, &Link)) {
        let vectors = |link: &Link| is_interesting(OsStr::from_bytes(&link.name)) && !is_config(link);
        let exchange = |vectors| {
            let of = |(known, link): (Known, &Link)| (known.file, known.has_attached, link.clone());
            self.volume.exchange(of(one), of(other), vectors);
        };
        if vectors(one.1) && vectors(other.1) {
            exchange(true);
            for (known, from, to) in [(one.0, one.1, other.1), (other.0, other.1, one.1)] {
                self.refresh(known.file, from, to);
                self.refresh_attached(known.file);
            }
            return;
        }
        let plain = |link: &Link| !is_interesting(OsStr::from_bytes(&link.name));
        if plain(one.1) && plain(other.1) {
            exchange(false);
            self.refresh_attached(one.0.file);
            self.refresh_attached(other.0.file);
            return;
        }
        // One of the names means nothing to the index, or settings: as two renames past each other.
        let aside = Link { parent: one.1.parent, name: ASIDE.to_vec() };
        self.renamed(one.0, one.1, &aside, None);
        self.renamed(other.0, other.1, one.1, None);
        self.renamed(one.0, &aside, other.1, None);
    }

    /// After a rename only the change time of an indexed file is new. False if there is more to it.
    fn touch(&self, file: FileId) -> bool {
        self.volume.paths(file, FileId::ROOT).iter().any(|path| {
            self.source
                .stat(path)
                .is_ok_and(|stat| self.source.id(&stat) == Some(file) && self.volume.touch(file, fingerprint(&stat)))
        })
    }

    /// A directory moved from one parent to another: nothing is read unless another collection begins there.
    pub fn dir_moved(&self, dir: FileId, from: FileId, to: FileId) {
        if from != to && self.volume.nearest_collection(from) != self.volume.nearest_collection(to) {
            for file in self.volume.misplaced(dir) {
                self.reread(file);
            }
        }
    }

    /// Makes all that was read durable.
    pub fn commit(&self) -> Result<(), Failure> {
        Ok(self.volume.commit()?)
    }

    /// Is what was found under a file's name still what the index was told?
    pub fn standing(&self, file: FileId, found: &Stat, known: &Fingerprint) -> Standing {
        if self.source.id(found) != Some(file) {
            return Standing::Gone;
        }
        let now = fingerprint(found);
        // What is about to be read again stands until then.
        if *known == Fingerprint::default() {
            return Standing::Current;
        }
        // While somebody has it open for writing the old vectors stand: close brings the new ones.
        if (now.size, now.mtime) == (known.size, known.mtime) || (self.being_written)(file) {
            Standing::Current
        } else {
            Standing::Changed
        }
    }
}

/// Whether somebody who is just writing the file counts.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum When {
    /// Its bytes as they are: somebody closed or synced them.
    Now,
    /// Not while somebody has it open for writing, whose close will read it.
    Quiet,
}

impl When {
    /// Somebody waits for what was closed; nobody for what is met on a walk or read after a crash.
    fn target(self, target: Target) -> Target {
        match self {
            When::Now => target,
            When::Quiet => target.behind(),
        }
    }
}

/// What a look at a file says of the index's knowledge.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It holds what was indexed, or is being written.
    Current,
    /// It holds what was indexed, and other things of the file changed.
    Aged,
    /// It changed beneath us: read it again.
    Changed,
    /// It isn't there under this name.
    Gone,
}

fn from_io(error: std::io::Error) -> Failure {
    Failure::new(Errno::from_io_error(&error).unwrap_or(Errno::IO), error.to_string())
}
