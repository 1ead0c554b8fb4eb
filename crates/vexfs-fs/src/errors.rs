//! The one place where an error becomes an errno, its name and its words.

use rustix::io::Errno;
use vexfs_store::{CommitError, SearchError};

/// An errno with what a person needs to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The number.
    pub errno: Errno,
    /// In words.
    pub message: String,
}

impl Failure {
    /// An error of the asker's making.
    pub fn new(errno: Errno, message: impl Into<String>) -> Failure {
        Failure { errno, message: message.into() }
    }
}

impl From<SearchError> for Failure {
    fn from(error: SearchError) -> Failure {
        let errno = match &error {
            SearchError::WrongDimension { .. } => Errno::MSGSIZE,
            SearchError::Incomparable(_) | SearchError::Query(_) => Errno::INVAL,
            SearchError::Deadline => Errno::TIMEDOUT,
            SearchError::Cancelled => Errno::INTR,
            SearchError::Scanning { .. } => Errno::AGAIN,
            _ => Errno::IO,
        };
        Failure { errno, message: error.to_string() }
    }
}

impl From<CommitError> for Failure {
    fn from(error: CommitError) -> Failure {
        let errno = match &error {
            CommitError::Cancelled => Errno::INTR,
            CommitError::Io { errno, .. } => Errno::from_raw_os_error(*errno),
            _ => Errno::IO,
        };
        Failure { errno, message: error.to_string() }
    }
}

impl From<Errno> for Failure {
    fn from(errno: Errno) -> Failure {
        Failure { errno, message: std::io::Error::from(errno).to_string() }
    }
}

/// The name of an errno that VexFS itself answers; `EIO` and the like from below by their number.
pub fn name(errno: Errno) -> String {
    let known = [
        (Errno::INVAL, "EINVAL"),
        (Errno::MSGSIZE, "EMSGSIZE"),
        (Errno::TOOBIG, "E2BIG"),
        (Errno::NODATA, "ENODATA"),
        (Errno::STALE, "ESTALE"),
        (Errno::TIMEDOUT, "ETIMEDOUT"),
        (Errno::BUSY, "EBUSY"),
        (Errno::INTR, "EINTR"),
        (Errno::NOSPC, "ENOSPC"),
        (Errno::DQUOT, "EDQUOT"),
        (Errno::IO, "EIO"),
        (Errno::ACCESS, "EACCES"),
        (Errno::PERM, "EPERM"),
        (Errno::NOENT, "ENOENT"),
        (Errno::AGAIN, "EAGAIN"),
        (Errno::NOTDIR, "ENOTDIR"),
        (Errno::NAMETOOLONG, "ENAMETOOLONG"),
    ];
    known
        .iter()
        .find(|(known, _)| *known == errno)
        .map_or_else(|| format!("E{}", errno.raw_os_error()), |(_, name)| (*name).to_owned())
}
