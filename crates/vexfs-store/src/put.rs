//! Files' vectors in: which collection they belong to, and one step from the old reading to the new.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use vexfs_index::{Bytes, Element, Flat, Mutable, Space, VectorError};

use crate::catalog::{CollectionRow, Content, Fingerprint};
use crate::collection::{BULK_ROWS, Collection};
use crate::error::PutError;
use crate::id::{CollectionId, FileId, Generation};
use crate::maintain;
use crate::part::{Part, Reading};
use crate::row::{Refusal, State};
use crate::rows::Rows;
use crate::schema::Config;
use crate::volume::{Inner, SyncMode, Volume, Writer};

/// Where a file's vectors go: from [`Volume::prepare`], for [`Volume::put`].
pub struct Target {
    collection: Arc<Collection>,
    /// What rows must be encoded for.
    pub space: Space,
    behind: bool,
}

impl Target {
    /// What is put there is linked behind, whatever the mode: nobody waits for it.
    pub fn behind(self) -> Target {
        Target { behind: true, ..self }
    }
}

/// A file's reading at a version at which it lives, with the parts that its collection then has.
pub(crate) struct Standing {
    pub(crate) collection: Arc<Collection>,
    pub(crate) version: u64,
    pub(crate) parts: Arc<Vec<Arc<Part>>>,
    pub(crate) reading: Arc<Reading>,
}

impl Volume {
    /// The collection that the file's vectors belong to; made, completed or inferred anew if need be.
    pub fn prepare(&self, file: FileId, dimension: usize, element: Element) -> Result<Target, PutError> {
        let dir = self.inner.tree.read().file(file).and_then(|row| row.links.iter().next().map(|link| link.parent));
        self.prepare_in(dir.unwrap_or(FileId::ROOT), file, dimension, element)
    }

    /// As [`Volume::prepare`], for a file of this directory that need not be known yet.
    pub fn prepare_in(
        &self,
        dir: FileId,
        file: FileId,
        dimension: usize,
        element: Element,
    ) -> Result<Target, PutError> {
        let inner = &*self.inner;
        let mut writer = inner.writer.lock();
        let collection = match inner.nearest(dir) {
            Some(collection) => collection,
            None => inner.new_collection(&mut writer, dir, false, Config::default()),
        };
        let collection = match collection.schema.load_full() {
            None => {
                inner.complete(&mut writer, &collection, dimension, element)?;
                collection
            }
            Some(schema) if schema.space.dim() == dimension => collection,
            Some(schema) => {
                // What was inferred from vectors that are all gone (or are this file's) binds nobody.
                let inferred = collection.row.lock().config.dimension.is_none();
                let own = inner.reading(file).map_or(0, |reading| u64::from(reading.rows));
                if !inferred || collection.live_points() > own {
                    let error = VectorError::WrongDimension { got: dimension, want: schema.space.dim() };
                    return Err(PutError::Vector { row: 0, error });
                }
                let row = collection.row.lock().clone();
                let anew = inner.new_collection(&mut writer, row.dir, row.declared, row.config);
                inner.complete(&mut writer, &anew, dimension, element)?;
                anew
            }
        };
        match collection.schema.load_full() {
            Some(schema) => Ok(Target { space: schema.space, collection, behind: false }),
            None => Err(PutError::TooLarge("the collection has no schema".to_owned())),
        }
    }

    /// Will a file of this directory that brings a row make no collection and no head, link nothing and wait for nothing?
    /// Then [`Volume::prepare`] and [`Volume::put`] take little stack.
    pub fn puts_shortly(&self, dir: FileId, file: FileId) -> bool {
        let inner = &*self.inner;
        inner.sync_mode() == SyncMode::Lazy
            && !inner.much_came()
            && inner.nearest(dir).is_some_and(|collection| {
                // The dimension is another's too.
                let newest = collection.head().and_then(|head| head.newest_reading().cloned());
                newest.is_some_and(|reading| reading.file != file && !reading.ended())
                    && !collection.is_far_behind()
                    && !collection.head_is_full(inner.budget.head)
            })
    }

    /// Replaces a file's vectors by `rows` (encoded for the target's space). A search sees the old ones until
    /// this returns, the new ones afterwards. False if the file is gone meanwhile or a newer reading was faster.
    pub fn put(
        &self,
        file: FileId,
        fingerprint: Fingerprint,
        target: &Target,
        rows: impl Into<Rows>,
    ) -> Result<bool, PutError> {
        let inner = &*self.inner;
        let collection = &target.collection;
        let rows = rows.into();
        let count = rows.bytes().len() / target.space.row_bytes();
        let count_u32 = u32::try_from(count)
            .map_err(|_| PutError::TooLarge(format!("{count} rows are more than a file may bring")))?;
        // By the writer too, as the thread that seals may be at a build: a head is never much larger than it may be.
        maintain::freeze_full_head(inner, collection);
        inner.make_room();
        let generation = {
            let mut writer = inner.writer.lock();
            writer.meta.next_generation += 1;
            Generation(writer.meta.next_generation)
        };
        let reading = Reading::unborn(file, count_u32);
        if count >= BULK_ROWS {
            let index = Flat::new(target.space, Arc::new(rows));
            let part = Part::flat(index, Arc::clone(&reading), generation);
            let _writer = inner.writer.lock();
            let mut parts = Vec::clone(&collection.parts.load());
            inner.came.fetch_add(part.waiting_bytes(), Ordering::AcqRel);
            parts.push(part);
            inner.exchange_parts(collection, parts);
        } else {
            let link = inner.sync_mode() == SyncMode::Immediate && !target.behind;
            if let Some(appended) = collection.append(&reading, generation, rows.bytes()) {
                inner.came.fetch_add(appended.grown, Ordering::AcqRel);
                if link || collection.is_far_behind() {
                    inner.with_scratch(|scratch| appended.link(scratch));
                }
            }
        }

        let mut writer = inner.writer.lock();
        let state = State::Indexed { collection: collection.id, generation, reading };
        let published = inner.publish(&mut writer, file, fingerprint, state);
        if published && !inner.collections.read().contains_key(&collection.id) {
            // It had no points left, and went, while these were on their way.
            inner.collections.write().insert(collection.id, Arc::clone(collection));
            writer.dirty_collections.insert(collection.id);
        }
        drop(writer);
        // A small head is linked when the thread that links looks by itself.
        if !collection.head().is_some_and(|head| head.as_head().is_some_and(Mutable::is_small)) {
            inner.wake();
        }
        Ok(published)
    }

    /// The file has no vectors: it is empty.
    pub fn put_empty(&self, file: FileId, fingerprint: Fingerprint) {
        let mut writer = self.inner.writer.lock();
        self.inner.publish(&mut writer, file, fingerprint, State::Empty);
    }

    /// The file can't be indexed, for `reason`; searches see none of its former vectors either.
    pub fn refuse(&self, file: FileId, fingerprint: Fingerprint, errno: i32, mut reason: String) {
        // It stays in memory, and quotes the file.
        reason.truncate(reason.floor_char_boundary(MAX_REASON));
        let mut writer = self.inner.writer.lock();
        let state = State::Refused(Box::new(Refusal { errno, reason }));
        self.inner.publish(&mut writer, file, fingerprint, state);
    }

    /// The next reading of the file finds it changed, whatever its times say.
    pub fn forget_fingerprint(&self, file: FileId) {
        let mut writer = self.inner.writer.lock();
        if let Some(row) = self.inner.tree.write().file_mut(file) {
            row.fingerprint = Fingerprint::default().into();
            self.inner.changed(&mut writer);
        }
    }

    /// Notes a new change time of a file whose name changed and whose bytes did not. False if it isn't indexed, or
    /// its size or modification time moved too.
    pub fn touch(&self, file: FileId, fingerprint: Fingerprint) -> bool {
        let mut writer = self.inner.writer.lock();
        let mut tree = self.inner.tree.write();
        let Some(row) = tree.file_mut(file) else { return false };
        let known = row.fingerprint.get();
        let same = (known.size, known.mtime) == (fingerprint.size, fingerprint.mtime);
        if !same || !matches!(row.state, State::Indexed { .. }) {
            return false;
        }
        row.fingerprint = fingerprint.into();
        self.inner.changed(&mut writer);
        true
    }

    /// What is known of a file.
    pub fn content(&self, file: FileId) -> Option<(Fingerprint, Content)> {
        self.inner.tree.read().file(file).map(|row| (row.fingerprint.get(), row.state.content()))
    }

    /// A vector that the volume holds, in full precision as stored (normalised under cosine).
    pub fn vector(&self, file: FileId, row: u32) -> Option<Vec<f32>> {
        let Standing { collection, parts, reading, .. } = self.inner.standing(file)?;
        let (part, slot) = parts.iter().find_map(|part| Some((part, part.find(&reading, row)?)))?;
        if let Err(error) = part.trust(slot) {
            self.inner.quarantine(&collection, part, &error);
            return None;
        }
        let (mut bytes, mut vector) = (Vec::new(), Vec::new());
        let held = part.index().read(slot, &mut bytes);
        part.index().space().decode(&bytes, &mut vector);
        held.then_some(vector)
    }

    /// Declares a collection at `dir` by a `.vexfs.toml`, or takes the declaration back. Returns the files whose
    /// vectors must be read again because they belong to another collection now; until then they are found in
    /// the one that they were in.
    pub fn configure(&self, dir: FileId, config: Option<Config>) -> Vec<FileId> {
        let inner = &*self.inner;
        let mut writer = inner.writer.lock();
        let current = inner.roots.read().get(&dir).copied();
        let current = current.and_then(|id| inner.collections.read().get(&id).cloned());
        match (current, config) {
            (None, None) => return Vec::new(),
            (Some(collection), Some(config)) => {
                let row = collection.row.lock().clone();
                if row.declared && row.config == config {
                    return Vec::new();
                }
                inner.new_collection(&mut writer, dir, true, config);
            }
            (None, Some(config)) => drop(inner.new_collection(&mut writer, dir, true, config)),
            (Some(collection), None) => {
                if !collection.row.lock().declared {
                    return Vec::new();
                }
                inner.roots.write().remove(&dir);
                inner.changed(&mut writer);
            }
        }
        drop(writer);
        self.misplaced(dir)
    }

    /// Files below `dir` whose vectors are in another collection than their nearest, or were refused and might
    /// fit now.
    pub fn misplaced(&self, dir: FileId) -> Vec<FileId> {
        let tree = self.inner.tree.read();
        let roots = self.inner.roots.read();
        tree.files()
            .filter(|row| tree.in_scope(row.file, dir))
            .filter(|row| {
                let Some(link) = row.links.iter().next() else { return false };
                let nearest = tree.ancestors(link.parent).iter().find_map(|dir| roots.get(dir).copied());
                match row.state {
                    State::Indexed { collection, .. } => nearest != Some(collection),
                    State::Refused(_) | State::Unread => true,
                    State::Empty => false,
                }
            })
            .map(|row| row.file)
            .collect()
    }

    /// The collection that a directory's files belong to.
    pub fn nearest_collection(&self, dir: FileId) -> Option<CollectionId> {
        self.inner.nearest(dir).map(|collection| collection.id)
    }

    /// The dimension that a directory's files must have, where that is settled.
    pub fn dimension(&self, dir: FileId) -> Option<usize> {
        let schema = self.inner.nearest(dir)?.schema.load_full()?;
        Some(schema.space.dim())
    }
}

/// Bytes of a refusal's reason that are kept.
const MAX_REASON: usize = 1_024;
/// How often a writer looks whether there is room.
const ROOM_STEP: Duration = Duration::from_millis(5);

impl Inner {
    /// Back pressure, by who brings more: has the largest heads sealed while all are too large, and waits while too much is
    /// unsealed. Not for a disk that refuses: then the points stay in memory, and are found.
    fn make_room(&self) {
        if !self.much_came() {
            return;
        }
        self.came.store(0, Ordering::Release);
        maintain::freeze_largest_heads(self);
        let before = self.failures.load(Ordering::Acquire);
        let _waiting = self.background.wait_for();
        while self.unsealed_bytes() > self.budget.unsealed
            && self.tended.load(Ordering::Acquire)
            && self.failures.load(Ordering::Acquire) == before
        {
            std::thread::sleep(ROOM_STEP);
        }
    }

    /// Has so much come that room is to be looked for? To look at all collections for each file would be too slow where
    /// they are many.
    fn much_came(&self) -> bool {
        self.came.load(Ordering::Acquire) >= self.budget.head / 8
    }

    /// Bytes that wait to be sealed, heads aside. Not of a collection that is gone, which nobody seals.
    fn unsealed_bytes(&self) -> usize {
        self.collections.read().values().map(|collection| collection.unsealed_bytes()).sum()
    }

    /// The collection of the nearest ancestor that has one.
    pub(crate) fn nearest(&self, dir: FileId) -> Option<Arc<Collection>> {
        let chain = self.tree.read().ancestors(dir);
        let roots = self.roots.read();
        let id = chain.iter().find_map(|dir| roots.get(dir))?;
        self.collections.read().get(id).cloned()
    }

    /// A new collection rooted at `dir`, in place of the one that was. The old one is searched as long as it
    /// has points.
    fn new_collection(&self, writer: &mut Writer, dir: FileId, declared: bool, config: Config) -> Arc<Collection> {
        writer.meta.next_collection += 1;
        let id = CollectionId(writer.meta.next_collection);
        let row = CollectionRow { dir, declared, config, shape: None };
        let collection = Collection::new(id, row, None);
        self.collections.write().insert(id, Arc::clone(&collection));
        self.roots.write().insert(dir, id);
        writer.dirty_collections.insert(id);
        self.changed(writer);
        collection
    }

    fn complete(
        &self,
        writer: &mut Writer,
        collection: &Collection,
        dimension: usize,
        element: Element,
    ) -> Result<(), PutError> {
        let schema = collection.row.lock().config.complete(dimension, element)?;
        if schema.space.dim() != dimension {
            let error = VectorError::WrongDimension { got: dimension, want: schema.space.dim() };
            return Err(PutError::Vector { row: 0, error });
        }
        collection.row.lock().shape = Some((dimension as u32, schema.space.element().to_string()));
        collection.complete(schema);
        writer.dirty_collections.insert(collection.id);
        self.changed(writer);
        Ok(())
    }

    /// A file's reading as of one moment.
    pub(crate) fn standing(&self, file: FileId) -> Option<Standing> {
        loop {
            let (id, reading) = {
                let tree = self.tree.read();
                let state = &tree.file(file)?.state;
                (state.collection()?, Arc::clone(state.reading()?))
            };
            let collection = self.collections.read().get(&id).cloned()?;
            let (version, mut parts) = self.snapshot(std::slice::from_ref(&collection));
            if reading.live_at(version) {
                return Some(Standing { collection, version, parts: parts.pop()?, reading });
            }
            // Replaced, or gone, meanwhile.
        }
    }

    /// The live reading of a file.
    pub(crate) fn reading(&self, file: FileId) -> Option<Arc<Reading>> {
        self.tree.read().file(file)?.state.reading().cloned()
    }

    /// From one reading of a file to the next, in one version. Under the writer's lock. False (and the new reading
    /// never lives) if the file is gone or has a newer reading.
    pub(crate) fn publish(&self, writer: &mut Writer, file: FileId, fingerprint: Fingerprint, mut new: State) -> bool {
        let mut tree = self.tree.write();
        let overtaken = match (tree.file(file).map(|row| &row.state), &new) {
            (Some(State::Indexed { generation: current, .. }), State::Indexed { generation, .. }) => {
                current > generation
            }
            _ => false,
        };
        let row = if overtaken { None } else { tree.file_mut(file) };
        let Some(row) = row else {
            if let Some(reading) = new.reading() {
                reading.end(0);
            }
            return false;
        };
        if new.reading().is_some_and(|reading| reading.ended()) {
            // The segment that it came into was given up before anybody saw it.
            new = State::Unread;
            self.unread.lock().push(file);
        }
        let next = self.version.load(Ordering::Acquire) + 1;
        if let Some(reading) = new.reading() {
            reading.bear(next);
        }
        row.fingerprint = fingerprint.into();
        let old = std::mem::replace(&mut row.state, new);
        if let Some(reading) = old.reading() {
            reading.end(next);
        }
        self.version.store(next, Ordering::Release);
        self.changed(writer);
        true
    }
}
