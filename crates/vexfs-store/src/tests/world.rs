//! A source directory whose durability is simulated, and what the file system does with it: tells the volume of each
//! change, reads files when they are closed, walks, and looks at each hit.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use vexfs_index::Element;

use crate::disk::{MemDisk, Survivors};
use crate::*;

/// Numbers of a vector.
pub const DIM: usize = 4;

/// A vector that no other number gives.
pub fn vector(n: u32) -> [f32; DIM] {
    let bits = |shift: u32| f32::from((n.wrapping_mul(0x9e37_79b1) >> shift) as u8) / 64.0 - 2.0;
    [bits(0), bits(8), bits(16), bits(24) + 5.0]
}

/// A file's bytes are the numbers of its vectors; one more vector may be attached.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bytes {
    rows: Vec<u32>,
    attached: Option<u32>,
    mtime: i128,
    ctime: i128,
}

impl Bytes {
    fn fingerprint(&self) -> Fingerprint {
        Fingerprint { size: self.rows.len() as u64, mtime: self.mtime, ctime: self.ctime }
    }

    /// Of what is attached: what it is, and the file's change time.
    fn fingerprint_attached(&self) -> Option<Fingerprint> {
        self.attached.map(|n| Fingerprint { size: 4, mtime: i128::from(n), ctime: self.ctime })
    }

    /// The vector that lies there.
    fn row(&self, row: u32) -> Option<u32> {
        if row == ATTACHED { self.attached } else { self.rows.get(row as usize).copied() }
    }

    /// Every place where a vector lies.
    pub fn places(&self) -> impl Iterator<Item = u32> {
        (0..self.rows.len() as u32).chain(self.attached.map(|_| ATTACHED))
    }
}

#[derive(Clone, Default, PartialEq, Eq, Hash)]
struct Inode {
    live: Bytes,
    durable: Bytes,
}

#[derive(Clone, PartialEq, Eq, Hash)]
enum NameChange {
    Set(String, u64),
    Remove(String),
    Rename(String, String),
}

fn apply(names: &mut BTreeMap<String, u64>, change: &NameChange) {
    match change {
        NameChange::Set(name, inode) => drop(names.insert(name.clone(), *inode)),
        NameChange::Remove(name) => drop(names.remove(name)),
        NameChange::Rename(from, to) => {
            if let Some(inode) = names.remove(from) {
                names.insert(to.clone(), inode);
            }
        }
    }
}

/// What of the source's bytes and names that were not synced a crash leaves.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub enum SourceSurvivors {
    /// Synced bytes under synced names.
    Nothing,
    /// All of it.
    All,
    /// Names and times, but of bytes only what was synced: a journal that orders nothing but metadata.
    Times,
    /// The first half of the names' changes, and all bytes.
    SomeNames,
}

/// The source directory.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct Source {
    inodes: BTreeMap<u64, Inode>,
    names: BTreeMap<String, u64>,
    durable_names: BTreeMap<String, u64>,
    waiting: Vec<NameChange>,
    clock: i128,
}

impl Source {
    fn change(&mut self, change: NameChange) {
        apply(&mut self.names, &change);
        self.waiting.push(change);
    }

    /// Synced name to synced vectors, where nothing newer waits.
    pub fn settled(&self) -> BTreeMap<String, Bytes> {
        let touched: BTreeSet<&String> = self
            .waiting
            .iter()
            .flat_map(|change| match change {
                NameChange::Set(name, _) | NameChange::Remove(name) => vec![name],
                NameChange::Rename(from, to) => vec![from, to],
            })
            .collect();
        let held = |bytes: &Bytes| (bytes.rows.clone(), bytes.attached);
        let synced = |inode: &Inode| held(&inode.live) == held(&inode.durable);
        let names =
            self.durable_names.iter().filter(|(name, inode)| !touched.contains(name) && synced(&self.inodes[inode]));
        names.map(|(name, inode)| (name.clone(), self.inodes[inode].live.clone())).collect()
    }

    /// What a crash now leaves.
    pub fn crash(&self, survivors: SourceSurvivors) -> Source {
        let mut names = self.durable_names.clone();
        let kept = match survivors {
            SourceSurvivors::Nothing => 0,
            SourceSurvivors::All | SourceSurvivors::Times => self.waiting.len(),
            SourceSurvivors::SomeNames => self.waiting.len() / 2,
        };
        self.waiting.iter().take(kept).for_each(|change| apply(&mut names, change));
        let used: BTreeSet<u64> = names.values().copied().collect();
        let inodes = self.inodes.iter().filter(|(number, _)| used.contains(number)).map(|(number, inode)| {
            let live = match survivors {
                SourceSurvivors::Nothing => inode.durable.clone(),
                SourceSurvivors::All | SourceSurvivors::SomeNames => inode.live.clone(),
                // Blocks in place: the size is the new one's, so the bytes can only be old where it is the same.
                SourceSurvivors::Times if inode.live.rows.len() == inode.durable.rows.len() => {
                    Bytes { rows: inode.durable.rows.clone(), ..inode.live }
                }
                SourceSurvivors::Times => inode.live.clone(),
            };
            (*number, Inode { durable: live.clone(), live })
        });
        Source {
            inodes: inodes.collect(),
            durable_names: names.clone(),
            names,
            waiting: Vec::new(),
            clock: self.clock + 1_000,
        }
    }

    fn links(&self, inode: u64) -> usize {
        self.names.values().filter(|other| **other == inode).count()
    }
}

pub fn link(name: &str) -> Link {
    Link { parent: FileId::ROOT, name: name.as_bytes().to_vec() }
}

/// A mounted volume.
pub struct World {
    pub source: Source,
    pub volume: Volume,
    pub disk: MemDisk,
    next: u32,
}

/// In place of a row, what is attached.
pub const ATTACHED: u32 = u32::MAX;

/// A vector that was found: path and row.
pub type Found = BTreeSet<(String, u32)>;

impl World {
    /// Opens without threads and reads what is unread, as a mount does.
    pub fn mount(disk: MemDisk, source: Source, boot: &str) -> Result<World, OpenError> {
        let (volume, recovery) = Volume::open_still(Arc::new(disk.clone()), options(boot))?;
        let mut world = World { source, volume, disk, next: 0 };
        for file in recovery.unread {
            world.read_known(file);
        }
        Ok(world)
    }

    fn id(inode: u64) -> FileId {
        FileId(inode + 100)
    }

    /// The file of this name as the walk or a search sees it.
    fn at(&self, name: &str) -> Option<(FileId, Fingerprint)> {
        let inode = self.source.names.get(name)?;
        Some((World::id(*inode), self.source.inodes[inode].live.fingerprint()))
    }

    /// Reads a file if it changed since its last reading.
    pub fn read(&mut self, file: FileId) {
        let Some(inode) = self.source.inodes.get(&(file.0 - 100)) else { return };
        let now = inode.live.fingerprint();
        match self.volume.content(file) {
            Some((known, Content::Indexed { .. } | Content::Empty)) if known == now => return,
            None => return,
            Some(_) => {}
        }
        if inode.live.rows.is_empty() {
            return self.volume.put_empty(file, now);
        }
        let target = self.volume.prepare(file, DIM, Element::F32).unwrap();
        let mut bytes = Vec::new();
        inode.live.rows.iter().for_each(|n| target.space.encode(&vector(*n), &mut bytes).unwrap());
        self.volume.put(file, now, &target, bytes).unwrap();
    }

    /// Reads what is attached to a file, if it is another vector than the last one.
    fn read_attached(&mut self, file: FileId) {
        let Some(inode) = self.source.inodes.get(&(file.0 - 100)) else { return };
        let attached = file.attached();
        let (Some(n), Some(now)) = (inode.live.attached, inode.live.fingerprint_attached()) else {
            return self.volume.detach(file);
        };
        match self.volume.content(attached) {
            Some((known, Content::Indexed { .. })) if (known.size, known.mtime) == (now.size, now.mtime) => {
                self.volume.touch(attached, now);
                return;
            }
            None => return,
            Some(_) => {}
        }
        let target = self.volume.prepare(attached, DIM, Element::F32).unwrap();
        let mut bytes = Vec::new();
        target.space.encode(&vector(n), &mut bytes).unwrap();
        self.volume.put(attached, now, &target, bytes).unwrap();
    }

    fn read_known(&mut self, file: FileId) {
        for path in self.volume.paths(file, FileId::ROOT) {
            let path = String::from_utf8(path).unwrap();
            if self.at(&path).is_some_and(|(there, _)| there == file.holder()) {
                return if file.is_attached() { self.read_attached(file.holder()) } else { self.read(file) };
            }
        }
        for link in self.volume.links(file) {
            self.volume.unlink(file.holder(), &link);
        }
    }

    /// Finds what changed beneath us.
    pub fn walk(&mut self) {
        let names: Vec<(String, FileId)> =
            self.source.names.iter().map(|(name, inode)| (name.clone(), World::id(*inode))).collect();
        let mut seen = BTreeSet::new();
        for (name, file) in names {
            self.volume.link(file, link(&name));
            self.read(file);
            seen.insert((file, link(&name)));
            if self.source.inodes[&(file.0 - 100)].live.attached.is_some() {
                self.volume.attach(file, vec![link(&name)]);
                self.read_attached(file);
                seen.insert((file.attached(), link(&name)));
            }
        }
        for file in self.volume.known_files() {
            if file.is_attached() && !seen.iter().any(|(known, _)| *known == file) {
                self.read_known(file);
            }
            for link in self.volume.links(file) {
                if !seen.contains(&(file, link.clone())) {
                    self.volume.unlink(file.holder(), &link);
                }
            }
        }
        self.volume.scan_finished();
    }

    /// The next vector is of this number: none that was before.
    pub fn count_from(&mut self, n: u32) {
        self.next = n;
    }

    fn fresh(&mut self) -> u32 {
        self.next += 1;
        self.next
    }

    fn now(&mut self) -> i128 {
        self.source.clock += 1;
        self.source.clock
    }

    fn write(&mut self, inode: u64, rows: Vec<u32>) {
        let now = self.now();
        let live = &mut self.source.inodes.entry(inode).or_default().live;
        *live = Bytes { rows, mtime: now, ctime: now, ..*live };
        self.read(World::id(inode));
    }

    /// A new file of this name, with this many vectors; overwrites what has the name.
    pub fn create(&mut self, name: &str, count: usize) {
        let rows: Vec<u32> = (0..count).map(|_| self.fresh()).collect();
        if let Some(inode) = self.source.names.get(name).copied() {
            return self.write(inode, rows);
        }
        // Numbers are given again as soon as they are free, as file systems do.
        let inode = (0..).find(|number| !self.source.inodes.contains_key(number)).unwrap();
        self.source.inodes.insert(inode, Inode::default());
        self.source.change(NameChange::Set(name.to_owned(), inode));
        self.volume.link(World::id(inode), link(name));
        self.write(inode, rows);
    }

    pub fn overwrite(&mut self, name: &str) {
        let Some(inode) = self.source.names.get(name).copied() else { return };
        let count = self.source.inodes[&inode].live.rows.len();
        let rows = (0..count).map(|_| self.fresh()).collect();
        self.write(inode, rows);
    }

    pub fn append(&mut self, name: &str) {
        let Some(inode) = self.source.names.get(name).copied() else { return };
        let mut rows = self.source.inodes[&inode].live.rows.clone();
        rows.push(self.fresh());
        self.write(inode, rows);
    }

    /// Another vector is attached to the file.
    pub fn attach(&mut self, name: &str) {
        let Some(inode) = self.source.names.get(name).copied() else { return };
        let n = self.fresh();
        self.touch(inode);
        self.source.inodes.entry(inode).or_default().live.attached = Some(n);
        self.volume.attach(World::id(inode), vec![link(name)]);
        self.read_attached(World::id(inode));
    }

    pub fn detach(&mut self, name: &str) {
        let Some(inode) = self.source.names.get(name).copied() else { return };
        self.touch(inode);
        self.source.inodes.entry(inode).or_default().live.attached = None;
        self.volume.detach(World::id(inode));
    }

    fn touch(&mut self, inode: u64) {
        let now = self.now();
        if let Some(found) = self.source.inodes.get_mut(&inode) {
            found.live.ctime = now;
        }
    }

    fn forget_if_unlinked(&mut self, inode: u64) {
        // The number is free at once; what is durable may still name it until the removal is.
        if self.source.links(inode) == 0 && !self.source.durable_names.values().any(|other| *other == inode) {
            self.source.inodes.remove(&inode);
        }
    }

    pub fn rename(&mut self, from: &str, to: &str) {
        let Some(inode) = self.source.names.get(from).copied() else { return };
        let replaced = self.source.names.get(to).copied();
        if replaced == Some(inode) {
            return;
        }
        self.source.change(NameChange::Rename(from.to_owned(), to.to_owned()));
        self.touch(inode);
        self.volume.rename((World::id(inode), false), (&link(from), true), (link(to), true), replaced.map(World::id));
        let print = self.source.inodes[&inode].live.fingerprint();
        if !self.volume.touch(World::id(inode), print) {
            self.read_known(World::id(inode));
        }
        self.read_attached(World::id(inode));
        if let Some(replaced) = replaced {
            self.touch(replaced);
            self.forget_if_unlinked(replaced);
        }
    }

    /// Two names take each other's files.
    pub fn exchange(&mut self, one: &str, other: &str) {
        let numbers = (self.source.names.get(one).copied(), self.source.names.get(other).copied());
        let (Some(first), Some(second)) = numbers else { return };
        if first == second {
            return;
        }
        self.source.change(NameChange::Set(one.to_owned(), second));
        self.source.change(NameChange::Set(other.to_owned(), first));
        self.volume.exchange((World::id(first), false, link(one)), (World::id(second), false, link(other)), true);
        for inode in [first, second] {
            self.touch(inode);
            let print = self.source.inodes[&inode].live.fingerprint();
            if !self.volume.touch(World::id(inode), print) {
                self.read_known(World::id(inode));
            }
            self.read_attached(World::id(inode));
        }
    }

    pub fn truncate(&mut self, name: &str) {
        if let Some(inode) = self.source.names.get(name).copied() {
            self.write(inode, Vec::new());
        }
    }

    pub fn unlink(&mut self, name: &str) {
        let Some(inode) = self.source.names.get(name).copied() else { return };
        self.source.change(NameChange::Remove(name.to_owned()));
        self.volume.unlink(World::id(inode), &link(name));
        self.touch(inode);
        self.forget_if_unlinked(inode);
    }

    pub fn link(&mut self, name: &str, new: &str) {
        let Some(inode) = self.source.names.get(name).copied() else { return };
        if self.source.names.contains_key(new) {
            return;
        }
        self.source.change(NameChange::Set(new.to_owned(), inode));
        self.touch(inode);
        self.volume.link(World::id(inode), link(new));
        self.read(World::id(inode));
    }

    /// fsync(2) of a file: its bytes, and as every journal does it, the names so far.
    pub fn sync_source(&mut self, name: &str) {
        let Some(inode) = self.source.names.get(name).copied() else { return };
        self.source.durable_names = self.source.names.clone();
        self.source.waiting.clear();
        if let Some(found) = self.source.inodes.get_mut(&inode) {
            found.durable = found.live.clone();
        }
        let used: BTreeSet<u64> = self.source.names.values().copied().collect();
        self.source.inodes.retain(|number, _| used.contains(number));
    }

    /// As the file system does fsync(2): the file, then what the index knows of it.
    pub fn fsync(&mut self, name: &str) -> Result<(), CommitError> {
        let Some(inode) = self.source.names.get(name).copied() else { return Ok(()) };
        self.sync_source(name);
        self.read(World::id(inode));
        self.volume.commit()
    }

    /// Do both names lead to one file?
    pub fn same(&self, one: &str, other: &str) -> bool {
        self.source.names.get(one).is_some_and(|inode| self.source.names.get(other) == Some(inode))
    }

    /// The head becomes a segment.
    pub fn seal(&mut self) -> std::io::Result<()> {
        let collections: Vec<_> = self.volume.inner.collections.read().values().cloned().collect();
        for collection in collections {
            maintain::freeze(&self.volume.inner, &collection);
            let parts = collection.parts.load_full();
            for part in parts.iter().skip(1).filter(|part| part.as_segment().is_none()) {
                maintain::rewrite(&self.volume.inner, &collection, std::slice::from_ref(part), &|_| true)?;
            }
        }
        Ok(())
    }

    /// All segments of a collection become one.
    pub fn merge(&mut self) -> std::io::Result<()> {
        let collections: Vec<_> = self.volume.inner.collections.read().values().cloned().collect();
        for collection in collections {
            let parts = collection.parts.load_full();
            let segments: Vec<_> = parts.iter().filter(|part| part.as_segment().is_some()).cloned().collect();
            if !segments.is_empty() {
                maintain::rewrite(&self.volume.inner, &collection, &segments, &|_| true)?;
            }
        }
        Ok(())
    }

    /// Every vector that an exact search finds, with the look that the file system has at each hit.
    pub fn found(&self) -> Result<Found, String> {
        let query = Query { exact: true, ..Query::nearest(vector(0).to_vec(), 1_000) };
        let mut verdict = |file: FileId, path: &[u8], known: &Fingerprint| {
            let path = std::str::from_utf8(path).unwrap();
            let Some((there, now)) = self.at(path).filter(|(there, _)| *there == file.holder()) else { return false };
            let now = match file.is_attached() {
                true => self.source.inodes[&(there.0 - 100)].live.fingerprint_attached(),
                false => Some(now),
            };
            now.is_some_and(|now| (now.size, now.mtime) == (known.size, known.mtime))
        };
        let answer = self.volume.search(&query, &mut verdict).map_err(|error| error.to_string())?;
        let mut found = Found::new();
        for hit in answer.hits {
            let path = String::from_utf8(hit.path).unwrap();
            let inode = self.source.names[&path];
            let row = if hit.file.is_attached() { ATTACHED } else { hit.row };
            let Some(n) = self.source.inodes[&inode].live.row(row) else {
                return Err(format!("{path} has no row {row}"));
            };
            // The vector that was found is the one that lies there.
            let mut bytes = Vec::new();
            let space = vexfs_index::Space::new(DIM, vexfs_index::Metric::Cosine, Element::F32).unwrap();
            space.encode(&vector(n), &mut bytes).unwrap();
            let mut expected = Vec::new();
            space.decode(&bytes, &mut expected);
            if self.volume.vector(hit.file, hit.row).as_deref() != Some(&expected[..]) {
                return Err(format!("{path} row {row} is not what its file holds"));
            }
            found.insert((path, row));
        }
        Ok(found)
    }

    /// Is exactly what the source holds found?
    pub fn exact(&self, when: &str) -> Result<(), String> {
        let found = self.found().map_err(|error| format!("{when}: {error}"))?;
        let expected = self.expected();
        if let Some(missing) = expected.iter().find(|names| names.is_disjoint(&found)) {
            return Err(format!("{when}: {missing:?} is not found"));
        }
        if found.len() != expected.len() {
            return Err(format!("{when}: found {found:?} where there is {expected:?}"));
        }
        Ok(())
    }

    /// What must be found when nothing is left to do: one name of each file, every row.
    fn expected(&self) -> Vec<BTreeSet<(String, u32)>> {
        let mut by_inode: BTreeMap<u64, BTreeSet<String>> = BTreeMap::new();
        for (name, inode) in &self.source.names {
            by_inode.entry(*inode).or_default().insert(name.clone());
        }
        by_inode
            .into_iter()
            .flat_map(|(inode, names)| {
                let places: Vec<u32> = self.source.inodes[&inode].live.places().collect();
                places.into_iter().map(move |row| names.iter().map(|name| (name.clone(), row)).collect())
            })
            .collect()
    }
}

fn options(boot: &str) -> Options {
    Options { boot: boot.to_owned(), threads: 1, ..super::options(SyncMode::Lazy) }
}

/// Is the machine still up?
pub fn is_kill(disk: Survivors, source: SourceSurvivors) -> bool {
    disk == Survivors::All && source == SourceSurvivors::All
}
