//! Names: which file is called what, and below which directory it lies.
//!
//! Only vector files and their ancestors are here. A path is found by walking up, so the rename of a directory is
//! one row, whatever lies below.

use std::collections::{BTreeSet, HashMap};
use std::hash::{BuildHasher, RandomState};

use hashbrown::HashTable;

use crate::catalog::{FileRow, Link};
use crate::id::FileId;
use crate::row::{LinkRef, Row};

/// Deeper than any path that Linux can name; a walk up that is longer has met a loop.
const MAX_DEPTH: usize = 4096;

/// What a file of a short name takes, its reading included; `tests/footprint.rs` measures it.
const FILE_BYTES: u64 = 200;

/// The rows of files and directories, in memory, and which of them the catalog has not got yet.
#[derive(Default)]
pub struct Tree {
    files: Files,
    dirs: HashMap<FileId, Link>,
    /// Rows of attached vectors.
    attached: usize,
    /// Changes of names since open, so that a cached scope can be told stale.
    epoch: u64,
    pub(crate) dirty_files: BTreeSet<FileId>,
    pub(crate) dirty_dirs: BTreeSet<FileId>,
}

impl Tree {
    /// From the catalog's rows.
    pub fn new(rows: impl ExactSizeIterator<Item = Row>, dirs: Vec<(FileId, Link)>) -> Tree {
        let mut tree = Tree { dirs: dirs.into_iter().collect(), ..Tree::default() };
        tree.files.reserve(rows.len());
        for row in rows {
            tree.attached += usize::from(row.file.is_attached());
            tree.files.insert(row);
        }
        tree
    }

    /// Of names alone.
    pub fn of_names(files: &[(FileId, FileRow)], dirs: Vec<(FileId, Link)>) -> Tree {
        let names = files.iter().map(|(file, row)| Row::unread(*file, row.links.iter().map(LinkRef::from).collect()));
        Tree::new(names, dirs)
    }

    /// A file's row.
    pub fn file(&self, file: FileId) -> Option<&Row> {
        self.files.get(file)
    }

    /// Bytes that the rows take in memory, with what else is kept of each file, about.
    pub fn bytes(&self) -> u64 {
        (self.files.rows.len() + self.dirs.len()) as u64 * FILE_BYTES
    }

    /// A file's row to change; it will be written.
    pub fn file_mut(&mut self, file: FileId) -> Option<&mut Row> {
        let row = self.files.get_mut(file)?;
        self.dirty_files.insert(file);
        Some(row)
    }

    /// Has any file a vector attached?
    pub fn any_attached(&self) -> bool {
        self.attached > 0
    }

    /// All files.
    pub fn files(&self) -> impl Iterator<Item = &Row> {
        self.files.rows.iter().map(|row| &**row)
    }

    /// All directories.
    pub fn dirs(&self) -> impl Iterator<Item = (FileId, &Link)> {
        self.dirs.iter().map(|(id, link)| (*id, link))
    }

    /// Directory rows.
    pub fn dir(&self, dir: FileId) -> Option<&Link> {
        self.dirs.get(&dir)
    }

    /// Names' version; unequal means that a scope computed before may be wrong now.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Is the directory known (the root always is)?
    pub fn knows_dir(&self, dir: FileId) -> bool {
        dir == FileId::ROOT || self.dirs.contains_key(&dir)
    }

    /// Sets where a directory is; true if that is news.
    pub fn set_dir(&mut self, dir: FileId, link: Link) -> bool {
        if dir == FileId::ROOT || self.dirs.get(&dir) == Some(&link) {
            return false;
        }
        self.dirs.insert(dir, link);
        self.dirty_dirs.insert(dir);
        self.epoch += 1;
        true
    }

    /// Forgets a directory that is gone.
    pub fn remove_dir(&mut self, dir: FileId) {
        if self.dirs.remove(&dir).is_some() {
            self.dirty_dirs.insert(dir);
            self.epoch += 1;
        }
    }

    /// Adds a name of a file, whose row is made if it isn't known yet. True if the name is news.
    pub fn add_link(&mut self, file: FileId, link: &Link) -> bool {
        match self.files.get_mut(file) {
            Some(row) if row.links.contains(link) => return false,
            Some(row) => {
                if !row.links.is_empty() {
                    self.epoch += 1;
                }
                row.links.add(link);
            }
            None => {
                self.attached += usize::from(file.is_attached());
                self.files.insert(Row::unread(file, std::iter::once(link.into()).collect()));
            }
        }
        self.dirty_files.insert(file);
        true
    }

    /// Removes a name; true if it was the last one known, the row then stays for the caller to take away.
    pub fn remove_link(&mut self, file: FileId, link: &Link) -> bool {
        let Some(row) = self.files.get_mut(file).filter(|row| row.links.contains(link)) else { return false };
        row.links.remove(link);
        let last = row.links.is_empty();
        self.epoch += 1;
        self.dirty_files.insert(file);
        last
    }

    /// Takes a file's row away.
    pub fn remove_file(&mut self, file: FileId) -> Option<Row> {
        let row = self.files.remove(file)?;
        self.attached -= usize::from(file.is_attached());
        self.dirty_files.insert(file);
        self.epoch += 1;
        Some(row)
    }

    /// The chain of directories from `dir` up to the root, `dir` first; empty if it doesn't reach the root.
    pub fn ancestors(&self, dir: FileId) -> Vec<FileId> {
        let mut chain = vec![dir];
        let mut at = dir;
        while at != FileId::ROOT {
            match self.dirs.get(&at) {
                Some(link) if chain.len() < MAX_DEPTH => at = link.parent,
                _ => return Vec::new(),
            }
            chain.push(at);
        }
        chain
    }

    /// Is `dir` the directory `scope` or below it?
    pub fn dir_in_scope(&self, dir: FileId, scope: FileId) -> bool {
        let mut at = dir;
        for _ in 0..MAX_DEPTH {
            if at == scope {
                return true;
            }
            if at == FileId::ROOT {
                return false;
            }
            match self.dirs.get(&at) {
                Some(link) => at = link.parent,
                None => return false,
            }
        }
        false
    }

    /// Has the file a name below `scope`?
    pub fn in_scope(&self, file: FileId, scope: FileId) -> bool {
        self.files.get(file).is_some_and(|row| row.links.iter().any(|link| self.dir_in_scope(link.parent, scope)))
    }

    /// A directory's path relative to `scope`; `None` if it isn't below.
    pub fn dir_path(&self, dir: FileId, scope: FileId) -> Option<Vec<u8>> {
        let mut names: Vec<&[u8]> = Vec::new();
        let mut at = dir;
        while at != scope {
            if at == FileId::ROOT || names.len() >= MAX_DEPTH {
                return None;
            }
            let link = self.dirs.get(&at)?;
            names.push(&link.name);
            at = link.parent;
        }
        names.reverse();
        Some(names.join(&b'/'))
    }

    /// Every path of a file relative to `scope`, as far as it has one there.
    pub fn paths(&self, file: FileId, scope: FileId) -> Vec<Vec<u8>> {
        let Some(row) = self.files.get(file) else { return Vec::new() };
        row.links
            .iter()
            .filter_map(|link| {
                let mut path = self.dir_path(link.parent, scope)?;
                if !path.is_empty() {
                    path.push(b'/');
                }
                path.extend_from_slice(link.name);
                Some(path)
            })
            .collect()
    }
}

/// Rows by file. A row has its key in it; boxed, so that a table that must have room takes little.
#[derive(Default)]
struct Files {
    rows: HashTable<Box<Row>>,
    hasher: RandomState,
}

impl Files {
    fn get(&self, file: FileId) -> Option<&Row> {
        self.rows.find(self.hasher.hash_one(file), |row| row.file == file).map(|row| &**row)
    }

    fn get_mut(&mut self, file: FileId) -> Option<&mut Row> {
        self.rows.find_mut(self.hasher.hash_one(file), |row| row.file == file).map(|row| &mut **row)
    }

    /// Adds the row of a file that has none.
    fn insert(&mut self, row: Row) {
        let hash = self.hasher.hash_one(row.file);
        self.rows.insert_unique(hash, Box::new(row), |row| self.hasher.hash_one(row.file));
    }

    fn remove(&mut self, file: FileId) -> Option<Row> {
        let found = self.rows.find_entry(self.hasher.hash_one(file), |row| row.file == file).ok()?;
        Some(*found.remove().0)
    }

    fn reserve(&mut self, more: usize) {
        self.rows.reserve(more, |row| self.hasher.hash_one(row.file));
    }
}
