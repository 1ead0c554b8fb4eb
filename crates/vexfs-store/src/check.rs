//! A volume that nobody has open, looked at as a whole: every checksum, and whether what must agree does.
//!
//! Repair gives up what is wrong and leaves its files to be read again; what is right is not touched.

use std::collections::{BTreeMap, HashMap, HashSet};

use vexfs_index::Index;

use crate::budget::CACHE_BYTES;
use crate::catalog::{self, Catalog, Changes, Content, Rows};
use crate::disk::{Disk, read_small};
use crate::error::OpenError;
use crate::id::{CollectionId, FileId, Generation};
use crate::identity;
use crate::segment::{Segment, SegmentError, SegmentFile};
use crate::tree::Tree;
use crate::volume::schema_of;
use crate::{Fingerprint, Link};

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Which file of the state directory, or which row of the catalog.
    pub place: String,
    /// What is wrong.
    pub problem: String,
    /// It is left to do: what a crash leaves behind and the next mount does by itself is no error.
    pub error: bool,
}

/// What a check found.
#[derive(Debug, Default)]
pub struct Checked {
    /// In the order in which they were found.
    pub findings: Vec<Finding>,
    /// The errors among them were repaired.
    pub repaired: bool,
    /// Segments that are sound.
    pub segments: u64,
    /// Points in them, dead ones included.
    pub points: u64,
    /// Every file that the catalog knows, with its names and what its bytes were when they were read.
    pub files: Vec<(FileId, Vec<Vec<u8>>, Fingerprint)>,
}

impl Checked {
    fn error(&mut self, place: impl Into<String>, problem: impl ToString) {
        self.findings.push(Finding { place: place.into(), problem: problem.to_string(), error: true });
    }

    fn note(&mut self, place: impl Into<String>, problem: impl ToString) {
        self.findings.push(Finding { place: place.into(), problem: problem.to_string(), error: false });
    }

    /// Is there an error?
    pub fn has_errors(&self) -> bool {
        self.findings.iter().any(|finding| finding.error)
    }
}

fn io(what: &str) -> impl FnOnce(std::io::Error) -> OpenError {
    let what = what.to_owned();
    move |source| OpenError::Io { what, source }
}

/// Checks the volume whose state directory is `disk`, and repairs it if asked. An error where it can't be looked at.
pub fn check(disk: &dyn Disk, repair: bool) -> Result<Checked, OpenError> {
    if !disk.lock().map_err(io("lock"))? {
        return Err(OpenError::Busy);
    }
    let mut checked = Checked::default();
    let names = disk.list("").map_err(io("the state directory"))?;
    let has = |name: &str| names.iter().any(|known| known == name);
    if !has(identity::NAME) && !has(catalog::FILE) {
        return Err(OpenError::VolumeFile("there is none, and no catalog: this is no volume".to_owned()));
    }
    let identity = match read_small(disk, identity::NAME).map_err(io(identity::NAME))? {
        Some(bytes) => identity::read(&bytes).map(drop),
        None => Err(OpenError::VolumeFile("it is empty or missing".to_owned())),
    };
    match identity {
        Ok(()) => {}
        Err(version @ OpenError::Version { .. }) => return Err(version),
        Err(error) => {
            checked.error(identity::NAME, error);
            if repair {
                identity::write(disk, &identity::new_uuid().map_err(io(identity::NAME))?)?;
            }
        }
    }
    match Catalog::open(disk, CACHE_BYTES) {
        Ok((catalog, rows)) => {
            if catalog.repaired() {
                checked.note(catalog::FILE, "redb went back to its last sound state");
            }
            let lost = rows.never_written();
            let changes = look(disk, rows, &mut checked);
            match repair && checked.has_errors() {
                true if lost => {
                    drop(catalog);
                    forget_locked(disk)?;
                }
                true => apply(disk, catalog, &changes)?,
                false => {}
            }
        }
        Err(error) => {
            checked.error(catalog::FILE, error);
            if repair {
                forget_locked(disk)?;
            }
        }
    }
    checked.repaired = repair && checked.has_errors();
    Ok(checked)
}

/// Makes the volume forget its index: the next mount reads every file again.
pub fn forget(disk: &dyn Disk) -> Result<(), OpenError> {
    if !disk.lock().map_err(io("lock"))? {
        return Err(OpenError::Busy);
    }
    let identity = read_small(disk, identity::NAME).map_err(io(identity::NAME))?;
    match identity.map(|bytes| identity::read(&bytes)) {
        Some(Ok(_)) | None => {}
        Some(Err(version @ OpenError::Version { .. })) => return Err(version),
        Some(Err(_)) => identity::write(disk, &identity::new_uuid().map_err(io(identity::NAME))?)?,
    }
    forget_locked(disk)
}

fn forget_locked(disk: &dyn Disk) -> Result<(), OpenError> {
    // The catalog first: what it doesn't name is nobody's.
    disk.remove(catalog::FILE).and_then(|()| disk.sync_dir("")).map_err(io(catalog::FILE))?;
    for name in disk.list("segments").map_err(io("segments"))? {
        let path = format!("segments/{name}");
        disk.remove(&path).map_err(io(&path))?;
    }
    sync_segments(disk)
}

fn sync_segments(disk: &dyn Disk) -> Result<(), OpenError> {
    match disk.sync_dir("segments") {
        // There are none yet.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        result => result.map_err(io("segments")),
    }
}

/// Looks at everything that the catalog names; returns what repairs it.
fn look(disk: &dyn Disk, rows: Rows, checked: &mut Checked) -> Changes {
    let mut changes =
        Changes { meta: rows.meta.clone(), source: rows.source.clone().unwrap_or_default(), ..Changes::default() };
    let collections: HashMap<CollectionId, _> = rows.collections.iter().cloned().collect();
    for id in collections.keys().filter(|id| id.0 > rows.meta.next_collection) {
        checked.error(format!("collection {}", id.0), "its number has not been given out yet");
        changes.meta.next_collection = changes.meta.next_collection.max(id.0);
    }
    let never_written = rows.never_written();
    let named: HashSet<String> = rows.segments.iter().map(|(id, _)| id.path()).collect();
    let mut owners: HashMap<Generation, FileId> = HashMap::new();
    for (id, row) in &rows.files {
        if let Content::Indexed { generation, .. } = row.content {
            owners.insert(generation, *id);
        }
    }
    let mut held: BTreeMap<FileId, u32> = BTreeMap::new();
    for (id, collection) in &rows.segments {
        changes.meta.next_segment = changes.meta.next_segment.max(id.0);
        let Some(row) = collections.get(collection) else {
            checked.error(id.path(), format!("its collection {} is missing", collection.0));
            changes.segments.push((*id, None));
            continue;
        };
        let sound = Segment::open(disk, *id).and_then(|segment| {
            segment.verify(&|_| true)?;
            segment.index.verify()?;
            segment.fits(schema_of(row).map(|schema| schema.space).as_ref())?;
            rows_of(&segment, &owners)
        });
        match sound {
            Ok((points, live)) => {
                checked.segments += 1;
                checked.points += points;
                for (file, rows) in live {
                    if held.insert(file, rows).is_some() {
                        checked.error(id.path(), format!("file {} is in another segment too", file.0));
                        changes.segments.push((*id, None));
                    }
                }
            }
            Err(error) => {
                checked.error(id.path(), error);
                changes.segments.push((*id, None));
            }
        }
    }
    look_at_files(rows, &held, &collections.keys().copied().collect(), &mut changes, checked);
    orphans(disk, &named, never_written, checked);
    changes
}

type Live = Vec<(FileId, u32)>;

/// The segment's points, and the live readings in it; an error unless each has each of its rows once.
fn rows_of(segment: &Segment, owners: &HashMap<Generation, FileId>) -> Result<(u64, Live), SegmentError> {
    let points = segment.index.len();
    let mut seen = HashSet::with_capacity(points);
    let files: Vec<SegmentFile> = segment.files().collect();
    let mut counts = vec![0u32; files.len()];
    for slot in 0..points {
        let Some((file, row)) = segment.point(slot) else {
            return Err(SegmentError::Malformed("a slot without a point"));
        };
        if files.get(file as usize).is_none_or(|entry| row >= entry.rows) || !seen.insert((file, row)) {
            return Err(SegmentError::Malformed("a row that its file hasn't, or twice"));
        }
        counts[file as usize] += 1;
    }
    let mut live = Vec::new();
    for (entry, count) in files.iter().zip(counts) {
        let Some(owner) = owners.get(&entry.generation) else { continue };
        if count != entry.rows {
            return Err(SegmentError::Malformed("a file whose rows are not all there"));
        }
        live.push((*owner, entry.rows));
    }
    Ok((points as u64, live))
}

fn look_at_files(
    rows: Rows,
    held: &BTreeMap<FileId, u32>,
    collections: &HashSet<CollectionId>,
    changes: &mut Changes,
    checked: &mut Checked,
) {
    let mut waiting = 0u64;
    let tree = Tree::of_names(&rows.files, rows.dirs);
    for (id, row) in rows.files {
        let place = match id.is_attached() {
            true => format!("what is attached to file {}", id.holder().0),
            false => format!("file {}", id.0),
        };
        let lost = |links: &[Link]| links.iter().any(|link| tree.ancestors(link.parent).is_empty());
        if row.links.is_empty() || lost(&row.links) {
            checked.error(&place, "it has no path to the root");
            changes.files.push((id, None));
            continue;
        }
        let mut repaired = row.clone();
        match &row.content {
            Content::Indexed { collection, .. } if !collections.contains(collection) => {
                checked.error(&place, format!("its collection {} is missing", collection.0));
                repaired.content = Content::Unread;
            }
            Content::Indexed { generation, .. } if generation.0 > changes.meta.next_generation => {
                checked.error(&place, "its reading's number has not been given out yet");
                repaired.content = Content::Unread;
            }
            Content::Indexed { rows, .. } if held.get(&id).is_some_and(|there| there != rows) => {
                checked.error(&place, "its segment has another number of rows than the catalog");
                repaired.content = Content::Unread;
            }
            Content::Indexed { rows, .. } => waiting += u64::from(*rows > 0 && !held.contains_key(&id)),
            Content::Unread => waiting += 1,
            Content::Empty | Content::Refused { .. } => {}
        }
        if repaired != row {
            changes.files.push((id, Some(repaired)));
        }
        checked.files.push((id, tree.paths(id, FileId::ROOT), row.fingerprint));
    }
    if waiting > 0 {
        checked.note("catalog", format!("{waiting} files are in no segment; the next mount reads them"));
    }
}

fn orphans(disk: &dyn Disk, named: &HashSet<String>, never_written: bool, checked: &mut Checked) {
    match disk.list("segments") {
        Ok(names) => {
            if !names.is_empty() && never_written {
                checked.error(catalog::FILE, "it is empty, and there are segments: it was lost");
            }
            for path in names.iter().map(|name| format!("segments/{name}")).filter(|path| !named.contains(path)) {
                checked.note(path, "the catalog doesn't name it; the next mount removes it");
            }
        }
        Err(error) => checked.error("segments", error),
    }
}

/// Writes what repairs; then the files that nothing names any more go.
fn apply(disk: &dyn Disk, mut catalog: Catalog, changes: &Changes) -> Result<(), OpenError> {
    catalog.write(Some(changes)).map_err(|error| OpenError::Catalog(error.to_string()))?;
    for (id, _) in changes.segments.iter().filter(|(_, row)| row.is_none()) {
        disk.remove(&id.path()).map_err(io(&id.path()))?;
    }
    sync_segments(disk)
}
