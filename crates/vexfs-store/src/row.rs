//! A file's row as it is kept in memory: what the catalog's says, in fewer bytes. There is one for each file, and nothing
//! bounds how many there are.

use std::num::NonZeroI64;
use std::sync::Arc;

use crate::catalog::{Content, FileRow, Fingerprint, Link};
use crate::id::{CollectionId, FileId, Generation};
use crate::part::Reading;

/// See the module.
pub struct Row {
    /// The file.
    pub file: FileId,
    /// As [`FileRow::links`].
    pub links: Links,
    /// As [`FileRow::fingerprint`].
    pub fingerprint: Print,
    /// As [`FileRow::content`].
    pub state: State,
}

impl Row {
    /// Of a file of which nothing is known but its names.
    pub fn unread(file: FileId, links: Links) -> Row {
        Row { file, links, fingerprint: Fingerprint::default().into(), state: State::Unread }
    }

    /// As the catalog has it.
    pub fn to_catalog(&self) -> FileRow {
        FileRow { links: self.links.to_vec(), fingerprint: self.fingerprint.get(), content: self.state.content() }
    }
}

/// [`Content`], with the reading where there is one.
pub enum State {
    /// See [`Content::Unread`].
    Unread,
    /// See [`Content::Empty`].
    Empty,
    /// See [`Content::Indexed`].
    Indexed {
        /// Which collection.
        collection: CollectionId,
        /// Which reading this is.
        generation: Generation,
        /// The live one.
        reading: Arc<Reading>,
    },
    /// See [`Content::Refused`].
    Refused(Box<Refusal>),
}

/// See [`Content::Refused`].
pub struct Refusal {
    /// See there.
    pub errno: i32,
    /// See there.
    pub reason: String,
}

impl State {
    /// What is told of it, and written.
    pub fn content(&self) -> Content {
        match self {
            State::Unread => Content::Unread,
            State::Empty => Content::Empty,
            State::Indexed { collection, generation, reading } => {
                Content::Indexed { collection: *collection, generation: *generation, rows: reading.rows }
            }
            State::Refused(refusal) => Content::Refused { errno: refusal.errno, reason: refusal.reason.clone() },
        }
    }

    /// The collection that it is in.
    pub fn collection(&self) -> Option<CollectionId> {
        match self {
            State::Indexed { collection, .. } => Some(*collection),
            State::Unread | State::Empty | State::Refused(_) => None,
        }
    }

    /// The live reading.
    pub fn reading(&self) -> Option<&Arc<Reading>> {
        match self {
            State::Indexed { reading, .. } => Some(reading),
            State::Unread | State::Empty | State::Refused(_) => None,
        }
    }
}

/// A [`Fingerprint`], exactly.
pub struct Print(Width);

enum Width {
    /// Times from 1677 to 2262. The modification time is one more than it is: so the compiler has a value left to tell
    /// the two by, and takes no bytes for it.
    Usual { size: u64, mtime: NonZeroI64, ctime: i64 },
    /// Other times; digests, of attached vectors.
    Any(Box<Fingerprint>),
}

impl From<Fingerprint> for Print {
    fn from(print: Fingerprint) -> Print {
        let mtime = i64::try_from(print.mtime.wrapping_add(1)).ok().and_then(NonZeroI64::new);
        Print(match (mtime, i64::try_from(print.ctime)) {
            (Some(mtime), Ok(ctime)) => Width::Usual { size: print.size, mtime, ctime },
            _ => Width::Any(Box::new(print)),
        })
    }
}

impl Print {
    /// The fingerprint.
    pub fn get(&self) -> Fingerprint {
        match &self.0 {
            Width::Usual { size, mtime, ctime } => {
                Fingerprint { size: *size, mtime: i128::from(mtime.get()) - 1, ctime: i128::from(*ctime) }
            }
            Width::Any(print) => **print,
        }
    }
}

/// A file's names, one after the other: the parent's number, the name's length, the name.
#[derive(Default)]
pub struct Links(Box<[u8]>);

/// A [`Link`] in a row.
#[derive(Copy, Clone, PartialEq, Eq, Hash)]
pub struct LinkRef<'a> {
    /// See [`Link::parent`].
    pub parent: FileId,
    /// See [`Link::name`].
    pub name: &'a [u8],
}

impl LinkRef<'_> {
    /// A copy.
    pub fn to_link(self) -> Link {
        Link { parent: self.parent, name: self.name.to_vec() }
    }
}

impl<'a> From<&'a Link> for LinkRef<'a> {
    fn from(link: &'a Link) -> LinkRef<'a> {
        LinkRef { parent: link.parent, name: &link.name }
    }
}

impl<'a> FromIterator<LinkRef<'a>> for Links {
    fn from_iter<I: IntoIterator<Item = LinkRef<'a>>>(links: I) -> Links {
        let mut bytes = Vec::new();
        for link in links {
            // Longer names than any file system's are cut.
            let len = u16::try_from(link.name.len()).unwrap_or(u16::MAX);
            bytes.extend_from_slice(&link.parent.0.to_le_bytes());
            bytes.extend_from_slice(&len.to_le_bytes());
            bytes.extend_from_slice(&link.name[..usize::from(len)]);
        }
        Links(bytes.into_boxed_slice())
    }
}

impl Links {
    /// In the order in which they were added.
    pub fn iter(&self) -> impl Iterator<Item = LinkRef<'_>> {
        let mut rest = &*self.0;
        std::iter::from_fn(move || {
            let (parent, after) = rest.split_first_chunk()?;
            let (len, after) = after.split_first_chunk()?;
            let (name, after) = after.split_at_checked(usize::from(u16::from_le_bytes(*len)))?;
            rest = after;
            Some(LinkRef { parent: FileId(u64::from_le_bytes(*parent)), name })
        })
    }

    /// Copies of all.
    pub fn to_vec(&self) -> Vec<Link> {
        self.iter().map(LinkRef::to_link).collect()
    }

    /// Is it one of them?
    pub fn contains(&self, link: &Link) -> bool {
        self.iter().any(|known| known == link.into())
    }

    /// Is there none?
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Adds one, last.
    pub fn add(&mut self, link: &Link) {
        *self = self.iter().chain([link.into()]).collect();
    }

    /// Takes one away.
    pub fn remove(&mut self, link: &Link) {
        *self = self.iter().filter(|known| *known != link.into()).collect();
    }
}

#[cfg(test)]
mod tests;
