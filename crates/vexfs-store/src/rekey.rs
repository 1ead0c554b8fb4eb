//! A volume that was copied or restored: its files have other inode numbers, and the same paths, sizes and times.

use std::collections::HashMap;
use std::sync::Arc;

use crate::catalog::{Content, FileRow, Fingerprint, Link, Rows};
use crate::id::{CollectionId, FileId};
use crate::tree::Tree;

/// What is at a path relative to the source's root.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Located {
    /// The file's or directory's number now.
    pub id: FileId,
    /// Of a directory there is none.
    pub fingerprint: Option<Fingerprint>,
}

/// Looks a path up: what is there or, if `true` is asked, the vector attached to it. `None` where nothing is.
pub type Locate = Arc<dyn Fn(&[u8], bool) -> Option<Located> + Send + Sync>;

/// Gives files, directories and collections the numbers that they have now. What isn't there any more goes; what has
/// another size or modification time is to be read. Segments know their rows by generation and need nothing.
pub fn rekey(rows: &mut Rows, locate: &dyn Fn(&[u8], bool) -> Option<Located>) {
    let files = std::mem::take(&mut rows.files);
    let tree = Tree::of_names(&files, std::mem::take(&mut rows.dirs));
    let mut dirs: HashMap<FileId, FileId> = HashMap::from([(FileId::ROOT, FileId::ROOT)]);
    for (dir, _) in tree.dirs() {
        let now = tree.dir_path(dir, FileId::ROOT).and_then(|path| locate(&path, false));
        if let Some(Located { id, fingerprint: None }) = now {
            dirs.insert(dir, id);
        }
    }
    let moved = |link: &Link| Some(Link { parent: *dirs.get(&link.parent)?, name: link.name.clone() });
    rows.dirs = tree.dirs().filter_map(|(dir, link)| Some((*dirs.get(&dir)?, moved(link)?))).collect();
    let mut now: HashMap<FileId, FileRow> = HashMap::new();
    for (file, row) in files {
        // Names in the order of the row, each with what it leads to.
        for (link, path) in row.links.iter().zip(tree.paths(file, FileId::ROOT)) {
            let Some((Located { id, fingerprint: Some(fingerprint) }, link)) =
                locate(&path, file.is_attached()).zip(moved(link))
            else {
                continue;
            };
            let same = (fingerprint.size, fingerprint.mtime) == (row.fingerprint.size, row.fingerprint.mtime);
            let content = if same { row.content.clone() } else { Content::Unread };
            now.entry(id).or_insert_with(|| FileRow { links: Vec::new(), fingerprint, content }).links.push(link);
        }
    }
    // A copy that made two files of two hard links: the rows of a reading are one file's.
    let mut owners = std::collections::HashSet::new();
    for row in now.values_mut() {
        if matches!(row.content, Content::Indexed { generation, .. } if !owners.insert(generation)) {
            row.content = Content::Unread;
        }
    }
    rows.files = now.into_iter().collect();
    let collections: Vec<_> = std::mem::take(&mut rows.collections);
    rows.collections = collections
        .into_iter()
        .filter_map(|(id, mut row)| {
            row.dir = *dirs.get(&row.dir)?;
            Some((id, row))
        })
        .collect();
    let kept: std::collections::HashSet<CollectionId> = rows.collections.iter().map(|(id, _)| *id).collect();
    for (_, row) in &mut rows.files {
        if matches!(row.content, Content::Indexed { collection, .. } if !kept.contains(&collection)) {
            row.content = Content::Unread;
        }
    }
}
