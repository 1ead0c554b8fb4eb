//! The walk over the source: finds what changed while nobody looked, in the directory's own order of names.
//!
//! A directory's `.vexfs.toml` is read first, then its vector files by name, then the directories below, so that
//! what is inferred from a first vector comes out the same each time.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{AtFlags, Dir, FileType};
use rustix::io::Errno;
use vexfs_store::{FileId, Link};

use crate::embedding;
use crate::ingest::{CONFIG_NAME, Ingest, When, is_interesting};

/// The name that every directory of the mount answers and none lists.
pub const RESERVED: &str = ".vexfs";

struct Folder {
    path: Vec<u8>,
    /// From the root's child down to this directory; empty for the root.
    chain: Vec<(FileId, Link)>,
}

/// However the walk ends, nobody waits for it any longer.
struct Ended<'a>(&'a Ingest);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.walk_ended();
    }
}

/// Walks the whole source. Returns early, without drawing conclusions, when `stop` is set.
pub fn walk(ingest: &Ingest, stop: &AtomicBool) {
    let _ended = Ended(ingest);
    let mut seen = HashSet::new();
    let mut folders = vec![Folder { path: Vec::new(), chain: Vec::new() }];
    while let Some(folder) = folders.pop() {
        if stop.load(Ordering::Acquire) {
            return;
        }
        match visit(ingest, &folder, &mut seen) {
            Ok(mut below) => folders.append(&mut below),
            // Gone or moved while we looked: its rename or removal was told to the index.
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {}
            Err(errno) => {
                log::warn!("/{} can't be listed: {errno}", String::from_utf8_lossy(&folder.path));
            }
        }
    }
    for file in ingest.volume.known_files() {
        if stop.load(Ordering::Acquire) {
            return;
        }
        drop_stale_links(ingest, file, seen.contains(&file));
    }
    ingest.volume.scan_finished();
    if let Err(failure) = ingest.commit() {
        log::error!("after the walk: {}", failure.message);
    }
}

fn visit(ingest: &Ingest, folder: &Folder, seen: &mut HashSet<FileId>) -> Result<Vec<Folder>, Errno> {
    let fd = ingest.source.open_dir(&folder.path)?;
    let parent = folder.chain.last().map_or(FileId::ROOT, |(dir, _)| *dir);
    let mut files = Vec::new();
    let mut attached = Vec::new();
    let mut below = Vec::new();
    let mut entries = Dir::read_from(&fd)?;
    while let Some(entry) = entries.read() {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        let interesting = is_interesting(OsStr::from_bytes(name));
        let may_be_dir = matches!(entry.file_type(), FileType::Directory | FileType::Unknown);
        if name == b"." || name == b".." || name == RESERVED.as_bytes() {
            continue;
        }
        let may_be_file = matches!(entry.file_type(), FileType::RegularFile | FileType::Unknown);
        let has_attached = may_be_file
            && embedding::is_there(fd.as_fd(), name).unwrap_or_else(|errno| {
                let path = [&folder.path[..], b"/", name].concat();
                log::warn!("attributes of /{}: {errno}", String::from_utf8_lossy(&path));
                false
            });
        if !(interesting || may_be_dir || has_attached) {
            continue;
        }
        let stat = match rustix::fs::statat(&fd, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => continue,
            Err(errno) => return Err(errno),
        };
        let Some(id) = ingest.source.id(&stat) else { continue };
        let link = Link { parent, name: name.to_vec() };
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => {
                if has_attached {
                    attached.push((id, link.clone()));
                }
                if interesting {
                    files.push((id, link));
                }
            }
            FileType::Directory => {
                let mut path = folder.path.clone();
                if !path.is_empty() {
                    path.push(b'/');
                }
                path.extend_from_slice(name);
                let mut chain = folder.chain.clone();
                chain.push((id, link));
                below.push(Folder { path, chain });
            }
            _ => {}
        }
    }
    files.sort_by(|a, b| {
        let config = |link: &Link| link.name != CONFIG_NAME.as_bytes();
        (config(&a.1), &a.1.name).cmp(&(config(&b.1), &b.1.name))
    });
    // Last in, first out: the first name is visited next.
    below.sort_by(|a, b| b.path.cmp(&a.path));
    attached.sort_by(|a, b| a.1.name.cmp(&b.1.name));
    if !files.is_empty() || !attached.is_empty() {
        for (dir, link) in &folder.chain {
            ingest.volume.set_dir(*dir, link.clone());
        }
    }
    for (file, link) in files {
        seen.insert(file);
        ingest.linked(link.parent, OsStr::from_bytes(&link.name), file);
        ingest.read_known(file, When::Quiet);
        ingest.volume.scan_progress();
    }
    for (file, link) in attached {
        seen.insert(file.attached());
        ingest.volume.attach(file, vec![link]);
        ingest.read_known(file.attached(), When::Quiet);
    }
    Ok(below)
}

/// Takes away names under which the file is no longer found.
fn drop_stale_links(ingest: &Ingest, file: FileId, seen: bool) {
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
        let Some(mut path) = ingest.volume.dir_path(link.parent) else {
            ingest.volume.unlink(file, &link);
            continue;
        };
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(&link.name);
        let there = ingest.source.stat(&path).is_ok_and(|stat| ingest.source.id(&stat) == Some(file));
        // A rename through the mount may have been faster than this look: only what is still recorded goes.
        if !there {
            ingest.unlinked(link.parent, OsStr::from_bytes(&link.name), file);
        }
    }
}
