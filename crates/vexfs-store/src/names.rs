//! What happens to names: links, unlinks, renames, directories. Called after the file system has done it.

use std::sync::atomic::Ordering;

use crate::catalog::Link;
use crate::id::FileId;
use crate::tree::Tree;
use crate::volume::Volume;

impl Volume {
    /// Is the directory known? The root always is.
    pub fn knows_dir(&self, dir: FileId) -> bool {
        self.inner.tree.read().knows_dir(dir)
    }

    /// Says where a directory is: after mkdir, at its first sight, and after its rename. Renaming costs one row.
    pub fn set_dir(&self, dir: FileId, link: Link) {
        self.set_dir_if(dir, link, || true);
    }

    /// The same, if it is `there` while no name can change here: who moved it meanwhile tells after this.
    pub fn set_dir_if(&self, dir: FileId, link: Link, there: impl FnOnce() -> bool) {
        if self.inner.tree.read().dir(dir) == Some(&link) {
            return;
        }
        let mut writer = self.inner.writer.lock();
        if there() && self.inner.tree.write().set_dir(dir, link) {
            self.inner.changed(&mut writer);
        }
    }

    /// Forgets a directory that was removed. The collection rooted there goes when its segments have gone.
    pub fn remove_dir(&self, dir: FileId) {
        self.remove_dir_if(dir, || true);
    }

    /// The same, if it is `gone` while no name can change here.
    pub fn remove_dir_if(&self, dir: FileId, gone: impl FnOnce() -> bool) {
        let mut writer = self.inner.writer.lock();
        if !gone() {
            return;
        }
        self.inner.tree.write().remove_dir(dir);
        self.inner.roots.write().remove(&dir);
        self.inner.changed(&mut writer);
    }

    /// Does a file have this name, and what is attached to it?
    pub fn knows_link(&self, file: FileId, link: &Link) -> bool {
        let tree = self.inner.tree.read();
        let has = |id| tree.file(id).map(|row| row.links.contains(link));
        has(file) == Some(true) && has(file.attached()) != Some(false)
    }

    /// A vector file has this name. True if the volume didn't know the file: it is to be read. What is attached to it
    /// has the name too.
    pub fn link(&self, file: FileId, link: Link) -> bool {
        if self.knows_link(file, &link) {
            return false;
        }
        let mut writer = self.inner.writer.lock();
        let mut tree = self.inner.tree.write();
        let known = tree.file(file).is_some();
        if tree.file(file.attached()).is_some() {
            tree.add_link(file.attached(), &link);
        }
        tree.add_link(file, &link);
        self.inner.changed(&mut writer);
        !known
    }

    /// A file that has a vector attached, or is about to be told one by [`Volume::put`], has these names.
    pub fn attach(&self, file: FileId, links: Vec<Link>) {
        let attached = file.attached();
        {
            let tree = self.inner.tree.read();
            if tree.file(attached).is_some_and(|row| links.iter().all(|link| row.links.contains(link))) {
                return;
            }
        }
        let mut writer = self.inner.writer.lock();
        let mut tree = self.inner.tree.write();
        // Names of the file that are known because they are a vector file's.
        let held = tree.file(file).map(|row| row.links.to_vec()).unwrap_or_default();
        for link in links.into_iter().chain(held) {
            tree.add_link(attached, &link);
        }
        self.inner.changed(&mut writer);
    }

    /// A file has no vector attached any more.
    pub fn detach(&self, file: FileId) {
        let attached = file.attached();
        if self.inner.tree.read().file(attached).is_none() {
            return;
        }
        let mut writer = self.inner.writer.lock();
        let mut tree = self.inner.tree.write();
        self.forget(&mut tree, attached);
        self.inner.changed(&mut writer);
    }

    /// Has the file a vector attached?
    pub fn has_attached(&self, file: FileId) -> bool {
        let tree = self.inner.tree.read();
        tree.any_attached() && tree.file(file.attached()).is_some()
    }

    /// Has any file a vector attached?
    pub fn any_attached(&self) -> bool {
        self.inner.tree.read().any_attached()
    }

    /// A file's name is gone; with its last one its vectors are, those that it holds and the one attached to it.
    pub fn unlink(&self, file: FileId, link: &Link) {
        self.unlink_if(file, link, || true);
    }

    /// The same, if it is `gone` while no name can change here: who made it again meanwhile tells after this. False if it
    /// isn't gone, or the file wasn't known.
    pub fn unlink_if(&self, file: FileId, link: &Link, gone: impl FnOnce() -> bool) -> bool {
        {
            let tree = self.inner.tree.read();
            if tree.file(file).is_none() && tree.file(file.attached()).is_none() {
                return false;
            }
        }
        let mut writer = self.inner.writer.lock();
        if !gone() {
            return false;
        }
        let mut tree = self.inner.tree.write();
        self.lose(&mut tree, file, link);
        self.lose(&mut tree, file.attached(), link);
        self.inner.changed(&mut writer);
        true
    }

    /// A file goes by another name now, in one step for searches and for the catalog: with the vectors that it holds, as
    /// far as the old and the new name are vector files', and with the one that is attached to it, or that `had` been
    /// before a look at the source found neither name. `replaced` had the new name before. A file or attached vector that
    /// isn't known is to be read.
    pub fn rename(
        &self,
        (file, had): (FileId, bool),
        (from, was): (&Link, bool),
        (to, is): (Link, bool),
        replaced: Option<FileId>,
    ) {
        let mut writer = self.inner.writer.lock();
        let mut tree = self.inner.tree.write();
        if let Some(replaced) = replaced.filter(|replaced| *replaced != file) {
            self.lose(&mut tree, replaced, &to);
            self.lose(&mut tree, replaced.attached(), &to);
        }
        if is {
            tree.add_link(file, &to);
        }
        if was {
            self.lose(&mut tree, file, from);
        }
        let attached = file.attached();
        if had || tree.file(attached).is_some() {
            tree.add_link(attached, &to);
            tree.remove_link(attached, from);
        }
        self.inner.changed(&mut writer);
    }

    /// Two names, both vector files' (`vectors`) or neither, exchange their files; of each whether it had a vector attached,
    /// and its old name. See [`Volume::rename`].
    pub fn exchange(&self, one: (FileId, bool, Link), other: (FileId, bool, Link), vectors: bool) {
        let mut writer = self.inner.writer.lock();
        let mut tree = self.inner.tree.write();
        for ((file, had, from), to) in [(&one, &other.2), (&other, &one.2)] {
            for (id, known) in [(*file, vectors), (file.attached(), *had)] {
                if known || tree.file(id).is_some() {
                    tree.add_link(id, to);
                    tree.remove_link(id, from);
                }
            }
        }
        self.inner.changed(&mut writer);
    }

    /// Takes a name away, and with the last one the row and its reading. Under the locks of writer and tree.
    fn lose(&self, tree: &mut Tree, file: FileId, link: &Link) {
        if tree.remove_link(file, link) {
            self.forget(tree, file);
        }
    }

    /// Takes a file's row away, and ends its reading for searches from now on. Under the locks of writer and tree.
    fn forget(&self, tree: &mut Tree, file: FileId) {
        let row = tree.remove_file(file);
        if let Some(reading) = row.as_ref().and_then(|row| row.state.reading()) {
            let next = self.inner.version.load(Ordering::Acquire) + 1;
            reading.end(next);
            self.inner.version.store(next, Ordering::Release);
        }
    }
}
