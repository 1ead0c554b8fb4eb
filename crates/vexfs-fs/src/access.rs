//! Who asks, and what they may see. The kernel decides: a question is put to it with the caller's credentials on this
//! thread, so modes, groups, ACLs and whatever the file system below adds count as they do for `open(2)`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use rustix::fs::{Access, Mode, OFlags, ResolveFlags, Stat, fstat, openat2};
use rustix::io::Errno;
use rustix::process::{Gid, Uid, geteuid};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};

use crate::errors::Failure;
use crate::reopen::Reopener;
use crate::source::Source;

/// The process behind a request, as FUSE tells it.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// File-system user id.
    pub uid: u32,
    /// File-system group id.
    pub gid: u32,
    /// Process (thread) id in the daemon's namespace; 0 where it isn't visible.
    pub pid: u32,
}

/// A caller with the groups that FUSE doesn't tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Identity {
    /// The daemon's own user: nothing to put on.
    Own,
    /// Somebody else.
    Other {
        /// User.
        uid: Uid,
        /// Group.
        gid: Gid,
        /// Supplementary groups.
        groups: Vec<Gid>,
    },
}

impl Caller {
    /// Do its writes take set-id bits away? (CAP_FSETID, which FUSE doesn't tell: taken to be root's.)
    pub fn is_stranger(self) -> bool {
        self.uid != 0
    }

    /// Looks the supplementary groups up; EACCES where that can't be done, never fewer groups than there are.
    pub fn identify(self) -> Result<Identity, Errno> {
        let own = geteuid();
        if self.uid == own.as_raw() {
            return Ok(Identity::Own);
        }
        let groups = groups_of(self.pid).ok_or(Errno::ACCESS)?;
        Ok(Identity::Other { uid: Uid::from_raw(self.uid), gid: Gid::from_raw(self.gid), groups })
    }
}

/// Supplementary groups of a process.
fn groups_of(pid: u32) -> Option<Vec<Gid>> {
    if pid == 0 {
        return None;
    }
    let line = status(pid, "Groups:")?;
    line.split_whitespace().map(|group| group.parse().ok().map(Gid::from_raw)).collect()
}

/// What the kernel tells of a thread.
fn status(pid: u32, key: &str) -> Option<String> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix(key)).map(|value| value.trim().to_owned())
}

/// Looks, while a caller waits for its answer, whether it was killed: it can't go before the answer comes. (FUSE would say so
/// by INTERRUPT, which the FUSE crate doesn't pass on; see decision 15.)
pub struct Killed {
    pid: u32,
    began: Instant,
    /// Milliseconds since then.
    next_look: AtomicU64,
    found: AtomicBool,
}

/// A look costs some 20 microseconds.
const LOOK_EVERY_MS: u64 = 20;
/// SIGKILL's place among pending signals. The kernel makes one of every signal that ends a process without a core.
const SIGKILL: u64 = 1 << 8;

impl Killed {
    /// To be made when the request comes.
    pub fn new(caller: Caller) -> Killed {
        Killed {
            pid: caller.pid,
            began: Instant::now(),
            next_look: AtomicU64::new(LOOK_EVERY_MS),
            found: AtomicBool::new(false),
        }
    }

    /// Was it, as of some milliseconds ago? A caller that isn't visible never was. May be asked as often as one likes.
    pub fn is_so(&self) -> bool {
        let now = self.began.elapsed().as_millis() as u64;
        if self.pid > 0 && now >= self.next_look.load(Ordering::Relaxed) {
            self.next_look.store(now + LOOK_EVERY_MS, Ordering::Relaxed);
            let pending = status(self.pid, "SigPnd:").and_then(|bits| u64::from_str_radix(&bits, 16).ok());
            self.found.fetch_or(pending.is_some_and(|bits| bits & SIGKILL != 0), Ordering::Relaxed);
        }
        self.found.load(Ordering::Relaxed)
    }
}

impl Identity {
    /// Does `work` with this identity on the calling thread only. The thread's own is put back before this
    /// returns; if that failed the process would act for a stranger, so it ends instead.
    pub fn act<T>(&self, work: impl FnOnce() -> T) -> Result<T, Errno> {
        let Identity::Other { uid, gid, groups } = self else { return Ok(work()) };
        let own = own_groups()?;
        let _restore = Restore { groups: own };
        set_thread_groups(groups)?;
        set_thread_res_gid(None::<Gid>, *gid, None::<Gid>)?;
        set_thread_res_uid(None::<Uid>, *uid, None::<Uid>)?;
        Ok(work())
    }
}

fn own_groups() -> Result<Vec<Gid>, Errno> {
    rustix::process::getgroups()
}

struct Restore {
    groups: Vec<Gid>,
}

impl Drop for Restore {
    fn drop(&mut self) {
        let (uid, gid) = (rustix::process::getuid(), rustix::process::getgid());
        let restored = set_thread_res_uid(None::<Uid>, uid, None::<Uid>)
            .and_then(|()| set_thread_res_gid(None::<Gid>, gid, None::<Gid>))
            .and_then(|()| set_thread_groups(&self.groups));
        if restored.is_err() {
            log::error!("the daemon's credentials can't be put back; ending");
            std::process::abort();
        }
    }
}

/// Asks the kernel about files of the source.
pub struct Gate {
    source: Arc<Source>,
    reopener: Reopener,
}

impl Gate {
    /// For files below the source's root.
    pub fn new(source: Arc<Source>) -> Result<Gate, Errno> {
        Ok(Gate { source, reopener: Reopener::new()? })
    }

    /// What is at `path`, if `identity` could open it for reading there now. One object is found, checked and
    /// described, so nothing can take its place in between; symlinks on the way are not followed.
    pub fn readable(&self, identity: &Identity, path: &[u8]) -> Option<Stat> {
        let look = || {
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
            let path = if path.is_empty() { b"." } else { path };
            let found = openat2(self.source.root(), path, flags, Mode::empty(), resolve)?;
            self.reopener.may(&found, Access::READ_OK)?;
            fstat(&found)
        };
        match identity.act(look) {
            Ok(Ok(stat)) => Some(stat),
            Ok(Err(_)) | Err(_) => None,
        }
    }

    /// The identity of a caller of the search.
    pub fn identify(&self, caller: Caller) -> Result<Identity, Failure> {
        caller
            .identify()
            .map_err(|errno| Failure::new(errno, format!("the groups of process {} can't be read", caller.pid)))
    }
}
