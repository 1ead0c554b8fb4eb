//! What is done to a volume that isn't mounted: check it, or make its index again from its files.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vexfs_store::disk::DirDisk;
use vexfs_store::{Checked, FileId, Fingerprint, SyncMode, Volume};

use crate::ingest::Ingest;
use crate::mount::{MountError, directory, error, open_dir, store_options};
use crate::source::Source;
use crate::walk::{RESERVED, Walker};
use crate::watch::{Stop, Watch};

/// What [`check`] found.
pub struct Found {
    /// In the state directory.
    pub store: Checked,
    /// Files that are not, under any name, what they were when they were read; the next mount reads them.
    pub changed: u64,
}

fn place(source: &Path, state: Option<&Path>) -> Result<(PathBuf, OwnedFd, OwnedFd), MountError> {
    let source = directory(source)?;
    let state = state.map_or_else(|| source.join(RESERVED), Path::to_owned);
    Ok((state.clone(), open_dir(&source)?, open_dir(&state)?))
}

/// Checks every checksum and invariant of the volume of a source directory, and whether its files are as they were read.
pub fn check(source: &Path, state: Option<&Path>, repair: bool) -> Result<Found, MountError> {
    let (state, root, state_fd) = place(source, state)?;
    let store = vexfs_store::check(&DirDisk::new(state_fd), repair).map_err(|why| error(state.display(), why))?;
    let files = Source::new(root).map_err(|why| error(source.display(), why))?;
    let as_read = |id: FileId, path: &[u8], known: &Fingerprint| {
        files.locate(path, id.is_attached()).is_some_and(|there| {
            let same = |now: Fingerprint| (now.size, now.mtime) == (known.size, known.mtime);
            there.id == id && there.fingerprint.is_some_and(same)
        })
    };
    let changed = store.files.iter().filter(|(id, paths, known)| !paths.iter().any(|path| as_read(*id, path, known)));
    Ok(Found { changed: changed.count() as u64, store })
}

/// Forgets the index and makes it again from the files. Returns how many were found, and how many of them can't be
/// indexed.
pub fn rebuild(source: &Path, state: Option<&Path>) -> Result<(u64, u64), MountError> {
    let (state, root, state_fd) = place(source, state)?;
    let failed = |why: &dyn std::fmt::Display| error(state.display(), why);
    vexfs_store::forget(&DirDisk::new(state_fd)).map_err(|why| failed(&why))?;
    let files = Arc::new(Source::new(root).map_err(|why| error(source.display(), why))?);
    let options = store_options(&files, SyncMode::Lazy);
    let disk = Arc::new(DirDisk::new(open_dir(&state)?));
    let (volume, _) = Volume::open(disk, options).map_err(|why| failed(&why))?;
    let volume = Arc::new(volume);
    let ingest = Ingest::new(Arc::clone(&volume), files, false, Box::new(|_| false));
    Walker::new(&ingest, Watch::nothing(), &Stop::new().map_err(|why| error("eventfd", why))?).walk();
    drop(ingest);
    volume.settle(&|| false).map_err(|why| failed(&why))?;
    let counts = volume.report(FileId::ROOT).files;
    if let Some(volume) = Arc::into_inner(volume) {
        volume.close().map_err(|why| failed(&why))?;
    }
    Ok((counts.indexed + counts.empty + counts.refused, counts.refused))
}
