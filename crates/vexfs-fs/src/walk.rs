//! The walk over the source: finds what changed while nobody looked, in the directory's own order of names. After it
//! the walker looks at what changes beneath the mount.
//!
//! A directory's `.vexfs.toml` is read first, then its vector files by name, then the directories below, so that
//! what is inferred from a first vector comes out the same each time.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, Dir, FileType};
use rustix::io::Errno;
use vexfs_store::{FileId, Link};

use crate::embedding;
use crate::ingest::{CONFIG_NAME, Ingest, When, is_interesting};
use crate::watch::{Found, Stop, Watch};

/// The name that every directory of the mount answers and none lists.
pub const RESERVED: &str = ".vexfs";

/// How often a source that can't be watched as a whole is walked.
const AGAIN: Duration = Duration::from_secs(300);
/// How soon files of a segment that was given up are read again.
const REREAD_EVERY: Duration = Duration::from_millis(200);
/// How soon a file is read again that was refused for a reason which may pass, as a full disk does; twice as long each time
/// that it hasn't.
const RETRY_AFTER: Duration = Duration::from_secs(2);
/// How often at least.
const RETRY_AT_LEAST: Duration = Duration::from_secs(30);

struct Folder {
    path: Vec<u8>,
    /// From the root's child down to this directory; empty for the root.
    chain: Vec<(FileId, Link)>,
}

impl Folder {
    fn new(chain: Vec<(FileId, Link)>) -> Folder {
        let names: Vec<&[u8]> = chain.iter().map(|(_, link)| &link.name[..]).collect();
        Folder { path: names.join(&b'/'), chain }
    }

    fn id(&self) -> FileId {
        self.chain.last().map_or(FileId::ROOT, |(dir, _)| *dir)
    }

    fn below(&self, dir: FileId, link: Link) -> Folder {
        let mut chain = self.chain.clone();
        chain.push((dir, link));
        Folder::new(chain)
    }
}

/// However the walk ends, nobody waits for it any longer.
struct Ended<'a>(&'a Ingest);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.walk_ended();
    }
}

/// What a directory's names lead to, of what the index wants to know.
#[derive(Default)]
struct Names {
    files: Vec<(FileId, Link)>,
    attached: Vec<(FileId, Link)>,
    dirs: Vec<(FileId, Link)>,
}

/// Goes through the source, and after its changes.
pub struct Walker<'a> {
    ingest: &'a Ingest,
    watch: Watch,
    stop: &'a Stop,
}

impl<'a> Walker<'a> {
    /// `watch` is given each directory. Ends early, without drawing conclusions, when `stop` is set.
    pub fn new(ingest: &'a Ingest, watch: Watch, stop: &'a Stop) -> Walker<'a> {
        Walker { ingest, watch, stop }
    }

    /// Walks the whole source.
    pub fn walk(&mut self) {
        let _ended = Ended(self.ingest);
        let mut seen = HashSet::new();
        self.descend(vec![Folder::new(Vec::new())], &mut seen);
        for file in self.ingest.volume.known_files() {
            if self.stop.is_set() {
                return;
            }
            self.drop_stale_links(file, seen.contains(&file));
        }
        self.drop_stale_dirs();
        self.ingest.volume.scan_finished();
        if let Err(failure) = self.ingest.commit() {
            log::error!("after the walk: {}", failure.message);
        }
        *self.ingest.beneath.lock() = self.watch.state();
    }

    /// Walks, then looks at what changes, and reads files again whose segment had to be given up, until `stop`.
    pub fn follow(&mut self) {
        let mut began = Instant::now();
        self.walk();
        let (mut ended, mut took) = (Instant::now(), began.elapsed());
        let (mut tried, mut pause) = (Instant::now(), RETRY_AFTER);
        while !self.stop.is_set() {
            self.watch.wait(self.stop, REREAD_EVERY);
            self.watch.drain();
            self.look_again();
            for file in self.ingest.volume.take_unread() {
                self.ingest.read_known(file, When::Quiet);
            }
            if tried.elapsed() > pause {
                pause = if self.ingest.retry() { RETRY_AT_LEAST.min(pause * 2) } else { RETRY_AFTER };
                tried = Instant::now();
            }
            // On a machine so busy that events get lost again and again, walks have a tenth of the time.
            let lost = self.watch.has_lost() && ended.elapsed() > 9 * took;
            if lost || (self.watch.has_holes() && ended.elapsed() > AGAIN) {
                self.watch.forget_lost();
                began = Instant::now();
                self.walk();
                (ended, took) = (Instant::now(), began.elapsed());
            }
        }
    }

    fn descend(&mut self, mut folders: Vec<Folder>, seen: &mut HashSet<FileId>) {
        while let Some(folder) = folders.pop() {
            if self.stop.is_set() {
                return;
            }
            match self.visit(&folder, seen) {
                Ok(mut below) => folders.append(&mut below),
                // Gone or moved while we looked: its rename or removal was told to the index.
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {}
                Err(errno) => {
                    log::warn!("/{} can't be listed: {errno}", String::from_utf8_lossy(&folder.path));
                }
            }
        }
    }

    fn visit(&mut self, folder: &Folder, seen: &mut HashSet<FileId>) -> Result<Vec<Folder>, Errno> {
        let fd = self.ingest.source.open_dir(&folder.path)?;
        self.watch.add(fd.as_fd(), folder.id(), folder.chain.last().map(|(_, link)| link));
        let mut names = Names::default();
        let mut entries = Dir::read_from(&fd)?;
        while let Some(entry) = entries.read() {
            let entry = entry?;
            match self.look(fd.as_fd(), folder, entry.file_name().to_bytes(), entry.file_type(), &mut names) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(errno) => return Err(errno),
            }
        }
        self.read(folder, &mut names, seen);
        // Last in, first out: the first name is visited next.
        names.dirs.sort_by(|a, b| b.1.name.cmp(&a.1.name));
        Ok(names.dirs.into_iter().map(|(dir, link)| folder.below(dir, link)).collect())
    }

    /// What a name in a directory leads to; `kind` as far as it is known.
    fn look(
        &self,
        fd: BorrowedFd<'_>,
        folder: &Folder,
        name: &[u8],
        kind: FileType,
        names: &mut Names,
    ) -> Result<(), Errno> {
        let interesting = is_interesting(OsStr::from_bytes(name));
        if name == b"." || name == b".." || name == RESERVED.as_bytes() {
            return Ok(());
        }
        let may_be_dir = matches!(kind, FileType::Directory | FileType::Unknown);
        let may_be_file = matches!(kind, FileType::RegularFile | FileType::Unknown);
        let has_attached = may_be_file
            && match embedding::is_there(fd, name) {
                Err(errno) if errno != Errno::NOENT => {
                    let path = [&folder.path[..], b"/", name].concat();
                    log::warn!("attributes of /{}: {errno}", String::from_utf8_lossy(&path));
                    false
                }
                there => there?,
            };
        if !(interesting || may_be_dir || has_attached) {
            return Ok(());
        }
        let stat = rustix::fs::statat(fd, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let Some(id) = self.ingest.source.id(&stat) else { return Ok(()) };
        let link = Link { parent: folder.id(), name: name.to_vec() };
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => {
                if has_attached {
                    names.attached.push((id, link.clone()));
                }
                if interesting {
                    names.files.push((id, link));
                }
            }
            FileType::Directory => names.dirs.push((id, link)),
            _ => {}
        }
        Ok(())
    }

    /// Tells the index of a directory's files, and reads those that it doesn't know as they are.
    fn read(&mut self, folder: &Folder, names: &mut Names, seen: &mut HashSet<FileId>) {
        let ingest = self.ingest;
        names.files.sort_by(|a, b| {
            let config = |link: &Link| link.name != CONFIG_NAME.as_bytes();
            (config(&a.1), &a.1.name).cmp(&(config(&b.1), &b.1.name))
        });
        names.attached.sort_by(|a, b| a.1.name.cmp(&b.1.name));
        if !names.files.is_empty() || !names.attached.is_empty() {
            self.place(&folder.chain);
        }
        for (file, link) in names.files.drain(..) {
            seen.insert(file);
            ingest.met(&link, file);
            ingest.read_known(file, When::Quiet);
            ingest.volume.scan_progress();
            // Reading may take long: the kernel keeps no more than so many events.
            self.watch.drain();
        }
        for (file, link) in names.attached.drain(..) {
            seen.insert(file.attached());
            ingest.met_attached(&link, file);
            ingest.read_known(file.attached(), When::Quiet);
        }
    }

    /// Looks at names that changed.
    fn look_again(&mut self) {
        // Names that lead to nothing, or to something else than they did.
        let mut gone = HashSet::new();
        let mut new = Vec::new();
        let told = |file: FileId, link: &Link| self.ingest.volume.links(file).contains(link);
        for (dir, changed) in self.watch.due() {
            // A directory that is no longer where it was has changed a name of another.
            let Some(folder) = self.watch.chain(dir).map(Folder::new) else { continue };
            let Ok(fd) = self.ingest.source.open_dir(&folder.path) else { continue };
            if rustix::fs::fstat(&fd).ok().and_then(|stat| self.ingest.source.id(&stat)) != Some(dir) {
                continue;
            }
            let mut names = Names::default();
            for (name, is_dir) in changed {
                let kind = if is_dir { FileType::Directory } else { FileType::RegularFile };
                match self.look(fd.as_fd(), &folder, &name, kind, &mut names) {
                    Ok(()) if !is_dir && self.ingest.volume.any_attached() => {
                        self.read_attached(fd.as_fd(), &name);
                        gone.insert(Link { parent: dir, name });
                    }
                    Ok(()) => {}
                    Err(Errno::NOENT) => drop(gone.insert(Link { parent: dir, name })),
                    Err(errno) => {
                        let path = [&folder.path[..], b"/", &name].concat();
                        log::warn!("/{} changed and can't be looked at: {errno}", String::from_utf8_lossy(&path));
                    }
                }
            }
            gone.extend(names.files.iter().filter(|(file, link)| !told(*file, link)).map(|(_, link)| link.clone()));
            self.read(&folder, &mut names, &mut HashSet::new());
            for (dir, link) in names.dirs {
                let folder = folder.below(dir, link.clone());
                if self.is_new(&folder, &link) {
                    gone.insert(link);
                    new.push(folder);
                }
            }
        }
        if !gone.is_empty() {
            self.drop_gone(&gone);
        }
        self.descend(new, &mut HashSet::new());
    }

    /// What was attached to a changed file may be gone.
    fn read_attached(&self, fd: BorrowedFd<'_>, name: &[u8]) {
        let ingest = self.ingest;
        if let Ok(stat) = rustix::fs::statat(fd, name, AtFlags::SYMLINK_NOFOLLOW)
            && let Some(id) = ingest.source.id(&stat)
            && ingest.volume.has_attached(id)
        {
            ingest.read_known(id.attached(), When::Quiet);
        }
    }

    /// Is it to be walked? One that is known may be here now.
    fn is_new(&mut self, folder: &Folder, link: &Link) -> bool {
        // Gone again: its directory will tell.
        let Ok(fd) = self.ingest.source.open_dir(&folder.path) else { return false };
        match self.watch.found(fd.as_fd(), folder.id(), link) {
            Found::There => {}
            Found::New => return true,
            Found::Moved(from) => {
                if self.ingest.volume.knows_dir(folder.id()) {
                    self.place(&folder.chain);
                    let from = from.map_or(FileId::ROOT, |link| link.parent);
                    self.ingest.dir_moved(folder.id(), from, link.parent);
                }
            }
        }
        false
    }

    /// Names that lead no longer where they did: the index may have files there, or below there.
    fn drop_gone(&mut self, gone: &HashSet<Link>) {
        let volume = &self.ingest.volume;
        let below = self.watch.forget(gone).into_iter().any(|dir| volume.knows_dir(dir));
        let files = if below { volume.known_files() } else { volume.files_named(gone) };
        for file in files {
            self.drop_stale_links(file, false);
        }
        if below {
            self.drop_stale_dirs();
        }
    }

    /// Directories that are gone, with all that was known below them.
    fn drop_stale_dirs(&self) {
        for dir in self.ingest.volume.barren_dirs() {
            self.ingest.drop_stale_dir(dir);
        }
    }

    /// Takes away names under which the file is no longer found.
    fn drop_stale_links(&self, file: FileId, seen: bool) {
        let ingest = self.ingest;
        if file.is_attached() && !seen {
            // The attribute may be gone and the file there.
            return ingest.read_known(file, When::Quiet);
        }
        let links = ingest.volume.links(file);
        let file = file.holder();
        if seen && links.len() < 2 {
            return;
        }
        for link in links {
            ingest.drop_stale(file, &link);
        }
    }

    /// The volume knows where the directory is, and those above it. One that moved meanwhile, before the volume knew it, is
    /// found by another walk.
    fn place(&mut self, chain: &[(FileId, Link)]) {
        let ingest = self.ingest;
        for (dir, link) in chain {
            ingest.volume.set_dir_if(*dir, link.clone(), || ingest.leads_to(link, *dir));
            if !ingest.volume.knows_dir(*dir) {
                self.watch.lose();
            }
        }
    }
}

#[cfg(test)]
mod tests;
