//! Newtypes that can't be swapped by accident.

use serde::{Deserialize, Serialize};

/// A file or directory of the volume, by the inode number that the mount reports.
///
/// Only a cache of identity: [`crate::Fingerprint`] tells whether the number still means the same bytes.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct FileId(pub u64);

impl FileId {
    /// The volume's root directory.
    pub const ROOT: FileId = FileId(1);

    /// Set in the number of a vector that is attached to a file. No file has such a number: see [`FileId::MAX_FILE`].
    const ATTACHED: u64 = 1 << 63;
    /// Files of larger numbers are not indexed.
    pub const MAX_FILE: u64 = (1 << 62) - 1;

    /// The vector attached to this file (by an extended attribute), as if it were a file of its own with the same names:
    /// so it shares neither rows nor readings with the vectors in the file.
    pub fn attached(self) -> FileId {
        FileId(self.0 | FileId::ATTACHED)
    }

    /// Is it what [`FileId::attached`] gives?
    pub fn is_attached(self) -> bool {
        self.0 & FileId::ATTACHED != 0
    }

    /// The file itself.
    pub fn holder(self) -> FileId {
        FileId(self.0 & !FileId::ATTACHED)
    }
}

/// A collection; never used again after the collection is gone.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct CollectionId(pub u32);

/// A sealed segment; names its file under `segments/`.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SegmentId(pub u64);

impl SegmentId {
    /// The segment's file, relative to the state directory.
    pub fn path(self) -> String {
        format!("segments/{:016x}.seg", self.0)
    }
}

/// One reading of a file's vectors. A point in a segment is live when its generation is the one that the
/// catalog names for the file.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Generation(pub u64);
