//! Vectors attached to files: read from the attribute as others are from bytes, under the number that
//! [`FileId::attached`] gives.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::Stat;
use rustix::io::Errno;
use vexfs_store::index::Element;
use vexfs_store::{Content, FileId, Fingerprint, Link, PutError, Target};

use super::{ATTEMPTS, Ingest, STRIPES, Standing, When};
use crate::embedding::{self, Value, to_binary};
use crate::formats::Refusal;
use crate::source::fingerprint;

impl Ingest {
    /// Can this be attached to a file of that directory? The bytes to store.
    pub fn may_attach(&self, dir: FileId, file: FileId, value: &Value) -> Result<Vec<u8>, Refusal> {
        let vector = value.vector()?;
        self.encode_attached(dir, file, &vector)?;
        Ok(to_binary(&vector))
    }

    fn encode_attached(&self, dir: FileId, file: FileId, vector: &[f32]) -> Result<(Target, Vec<u8>), Refusal> {
        let target = self.volume.prepare_in(dir, file.attached(), vector.len(), Element::F32)?;
        let mut row = Vec::with_capacity(target.space.row_bytes());
        target.space.encode(vector, &mut row).map_err(|error| PutError::Vector { row: 0, error })?;
        Ok((target, row))
    }

    /// A file of this name has the attribute: it is read.
    pub fn attached(&self, file: FileId, link: Link, opened: BorrowedFd<'_>) -> Result<(), Refusal> {
        self.volume.attach(file, vec![link]);
        self.read_attached(file, opened, When::Now)
    }

    /// Reads what is attached to a file, if it is another vector than the last one.
    pub(super) fn read_attached(&self, file: FileId, opened: BorrowedFd<'_>, when: When) -> Result<(), Refusal> {
        let _one = self.reading[file.0 as usize % STRIPES].lock();
        let attached = file.attached();
        for _ in 0..ATTEMPTS {
            let (stat, value) = embedding::read(opened).map_err(std::io::Error::from)?;
            let Some(value) = value else {
                self.volume.detach(file);
                return Ok(());
            };
            let Some(link) = self.volume.links(attached).into_iter().next() else { return Ok(()) };
            let print = value.fingerprint(&stat);
            match self.volume.content(attached) {
                Some((known, Content::Refused { errno, reason })) if known == print => {
                    return Err(Refusal { errno: Errno::from_raw_os_error(errno), reason });
                }
                Some((known, Content::Indexed { .. })) if same(&known, &print) && !self.misplaced(attached, &link) => {
                    self.volume.touch(attached, print);
                    return Ok(());
                }
                Some(_) => {}
                None => return Ok(()),
            }
            let encoded = value.vector().and_then(|vector| self.encode_attached(link.parent, file, &vector));
            let result =
                encoded.and_then(|(target, row)| Ok(self.volume.put(attached, print, &when.target(target), row)?));
            if let Err(refusal) = &result {
                self.volume.refuse(attached, print, refusal.errno.raw_os_error(), refusal.reason.clone());
            }
            if fingerprint(&rustix::fs::fstat(opened).map_err(std::io::Error::from)?).ctime == print.ctime {
                return result.map(drop);
            }
        }
        // Somebody changes it on; what is found of it is held against the file.
        Ok(())
    }

    /// The file at a path, if that is what the vector is attached to.
    pub(super) fn holder(&self, path: &[u8], attached: FileId) -> Result<OwnedFd, Errno> {
        let (there, opened) = self.source.at(path)?;
        if there == attached.holder() { Ok(opened) } else { Err(Errno::STALE) }
    }

    /// As [`Ingest::standing`], for the vector attached to the file at `path`. Its change time moves with each write and
    /// chmod: then the value is looked at.
    pub fn standing_attached(&self, file: FileId, path: &[u8], found: &Stat, known: &Fingerprint) -> Standing {
        if self.source.id(found) != Some(file.holder()) {
            return Standing::Gone;
        }
        if fingerprint(found).ctime == known.ctime || *known == Fingerprint::default() {
            return Standing::Current;
        }
        match self.holder(path, file).and_then(|opened| embedding::read(opened.as_fd())) {
            Ok((stat, Some(value))) if same(known, &value.fingerprint(&stat)) => Standing::Aged,
            Ok(_) => Standing::Changed,
            Err(_) => Standing::Gone,
        }
    }
}

/// Is it the same value?
fn same(known: &Fingerprint, now: &Fingerprint) -> bool {
    (known.size, known.mtime) == (now.size, now.mtime)
}
