//! What happens to names: links, unlinks, renames, directories. Called after the file system has done it.

use std::sync::atomic::Ordering;

use crate::catalog::Link;
use crate::id::FileId;
use crate::volume::Volume;

impl Volume {
    /// Is the directory known? The root always is.
    pub fn knows_dir(&self, dir: FileId) -> bool {
        self.inner.tree.read().knows_dir(dir)
    }

    /// Says where a directory is: after mkdir, at its first sight, and after its rename. Renaming costs one row.
    pub fn set_dir(&self, dir: FileId, link: Link) {
        if self.inner.tree.read().dir(dir) == Some(&link) {
            return;
        }
        let mut writer = self.inner.writer.lock();
        if self.inner.tree.write().set_dir(dir, link) {
            self.inner.changed(&mut writer);
        }
    }

    /// Forgets a directory that was removed, and the collection rooted there.
    pub fn remove_dir(&self, dir: FileId) {
        let mut writer = self.inner.writer.lock();
        self.inner.tree.write().remove_dir(dir);
        if let Some(id) = self.inner.roots.write().remove(&dir) {
            self.inner.collections.write().remove(&id);
            writer.dirty_collections.insert(id);
        }
        self.inner.changed(&mut writer);
    }

    /// A vector file has this name. True if the volume didn't know the file: it is to be read.
    pub fn link(&self, file: FileId, link: Link) -> bool {
        if let Some(row) = self.inner.tree.read().file(file)
            && row.links.contains(&link)
        {
            return false;
        }
        let mut writer = self.inner.writer.lock();
        let mut tree = self.inner.tree.write();
        let known = tree.file(file).is_some();
        tree.add_link(file, link);
        self.inner.changed(&mut writer);
        !known
    }

    /// A vector file's name is gone; with its last one its vectors are.
    pub fn unlink(&self, file: FileId, link: &Link) {
        if self.inner.tree.read().file(file).is_none() {
            return;
        }
        let mut writer = self.inner.writer.lock();
        let mut tree = self.inner.tree.write();
        if tree.remove_link(file, link) {
            tree.remove_file(file);
            self.end_reading(file);
        }
        self.inner.changed(&mut writer);
    }

    /// A vector file goes by another name now, in one step for searches and for the catalog. `replaced` had that
    /// name before.
    pub fn rename(&self, file: FileId, from: &Link, to: Link, replaced: Option<FileId>) {
        let mut writer = self.inner.writer.lock();
        let mut tree = self.inner.tree.write();
        if let Some(replaced) = replaced.filter(|replaced| *replaced != file)
            && tree.remove_link(replaced, &to)
        {
            tree.remove_file(replaced);
            self.end_reading(replaced);
        }
        if tree.file(file).is_some() {
            tree.add_link(file, to);
            tree.remove_link(file, from);
        }
        self.inner.changed(&mut writer);
    }

    /// Two names exchange their files.
    pub fn exchange(&self, one: (FileId, &Link), other: (FileId, &Link)) {
        let mut writer = self.inner.writer.lock();
        let mut tree = self.inner.tree.write();
        for ((file, from), to) in [(one, other.1), (other, one.1)] {
            if tree.file(file).is_some() {
                tree.add_link(file, to.clone());
                tree.remove_link(file, from);
            }
        }
        self.inner.changed(&mut writer);
    }

    /// Ends a file's reading for searches from now on. Under the writer's lock.
    pub(crate) fn end_reading(&self, file: FileId) {
        if let Some(reading) = self.inner.readings.lock().remove(&file) {
            let next = self.inner.version.load(Ordering::Acquire) + 1;
            reading.end(next);
            self.inner.version.store(next, Ordering::Release);
        }
    }
}
