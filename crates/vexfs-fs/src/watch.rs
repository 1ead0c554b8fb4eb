//! Watches the source's directories by inotify: which of their names are worth a look. An event is a hint and no more;
//! see decision 14.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::inotify::{CreateFlags, ReadFlags, Reader, WatchFlags, add_watch, init, remove_watch};
use rustix::io::Errno;
use vexfs_store::{FileId, Link};

use crate::reopen::path_of;

/// How long after a change its name is looked at: longer than an operation of the mount's own takes to tell the index.
const SETTLE: Duration = Duration::from_millis(500);
/// More changed names than that are as good as lost events: the source is walked.
const MOST_CHANGED: usize = 1 << 20;

/// Changed names of a directory, and whether each was a directory's.
pub type Changed = BTreeMap<Vec<u8>, bool>;

/// Asks a thread to end.
pub struct Stop {
    set: AtomicBool,
    bell: OwnedFd,
}

impl Stop {
    /// Not yet.
    pub fn new() -> Result<Stop, Errno> {
        Ok(Stop { set: AtomicBool::new(false), bell: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)? })
    }

    /// Now.
    pub fn set(&self) {
        self.set.store(true, Ordering::Release);
        if let Err(errno) = rustix::io::write(&self.bell, &1u64.to_ne_bytes()) {
            log::warn!("the walker can't be woken ({errno}); it looks up soon");
        }
    }

    /// Has it been asked?
    pub fn is_set(&self) -> bool {
        self.set.load(Ordering::Acquire)
    }
}

struct Dir {
    number: i32,
    /// `None`: the root.
    link: Option<Link>,
}

/// See the module.
#[derive(Default)]
pub struct Watch {
    inotify: Option<OwnedFd>,
    dirs: HashMap<FileId, Dir>,
    by_number: HashMap<i32, FileId>,
    changed: HashMap<FileId, Changed>,
    names: usize,
    /// When the first of them changed.
    since: Option<Instant>,
    /// Events were lost since the last walk began.
    lost: bool,
    /// Directories could not be watched.
    holes: bool,
}

impl Watch {
    /// Watches nothing, and misses nothing by it.
    pub fn nothing() -> Watch {
        Watch::default()
    }

    /// Will watch what is added.
    pub fn new() -> Watch {
        match init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK) {
            Ok(inotify) => Watch { inotify: Some(inotify), ..Watch::default() },
            Err(errno) => {
                log::warn!("the source can't be watched (inotify: {errno}): it is walked now and then");
                Watch { holes: true, ..Watch::default() }
            }
        }
    }

    /// Watches a directory. To be called before it is listed.
    pub fn add(&mut self, fd: BorrowedFd<'_>, dir: FileId, link: Option<&Link>) {
        let Some(inotify) = &self.inotify else { return };
        let wanted = WatchFlags::CREATE
            | WatchFlags::DELETE
            | WatchFlags::MOVED_FROM
            | WatchFlags::MOVED_TO
            | WatchFlags::CLOSE_WRITE
            | WatchFlags::ATTRIB
            | WatchFlags::ONLYDIR
            | WatchFlags::EXCL_UNLINK;
        match add_watch(inotify, path_of(fd), wanted) {
            Ok(number) => {
                self.by_number.insert(number, dir);
                self.dirs.insert(dir, Dir { number, link: link.cloned() });
            }
            Err(errno) => {
                if !self.holes {
                    log::warn!(
                        "not all directories can be watched (inotify: {errno}): the source is walked now and then"
                    );
                }
                self.holes = true;
            }
        }
    }

    /// How the source is followed, in a word.
    pub fn state(&self) -> &'static str {
        match (&self.inotify, self.holes) {
            (_, true) => "walked",
            (Some(_), false) => "watched",
            (None, false) => "trusted",
        }
    }

    /// Is the source to be walked now and then?
    pub fn has_holes(&self) -> bool {
        self.holes
    }

    /// Were events lost? Asking forgets it.
    pub fn take_lost(&mut self) -> bool {
        std::mem::take(&mut self.lost)
    }

    /// Waits for events, for `stop`, or so long.
    pub fn wait(&self, stop: &Stop, longest: Duration) {
        let mut fds = vec![PollFd::new(&stop.bell, PollFlags::IN)];
        fds.extend(self.inotify.as_ref().map(|inotify| PollFd::new(inotify, PollFlags::IN)));
        let longest = Timespec { tv_sec: longest.as_secs() as i64, tv_nsec: i64::from(longest.subsec_nanos()) };
        // A signal ends it early, and nothing else can go wrong.
        poll(&mut fds, Some(&longest)).ok();
    }

    /// Takes the kernel's events in.
    pub fn drain(&mut self) {
        let Some(inotify) = self.inotify.take() else { return };
        let mut space = [MaybeUninit::uninit(); 8192];
        let mut events = Reader::new(inotify.as_fd(), &mut space);
        loop {
            match events.next() {
                Ok(event) => {
                    let name = event.file_name().map(|name| name.to_bytes());
                    self.note(event.wd(), event.events(), name);
                }
                Err(Errno::AGAIN) => break,
                Err(errno) => {
                    log::warn!("inotify: {errno}");
                    self.lost = true;
                    break;
                }
            }
        }
        self.inotify = Some(inotify);
    }

    fn note(&mut self, number: i32, what: ReadFlags, name: Option<&[u8]>) {
        if what.contains(ReadFlags::QUEUE_OVERFLOW) {
            self.lost = true;
        }
        let Some(dir) = self.by_number.get(&number).copied() else { return };
        if what.contains(ReadFlags::IGNORED) {
            self.by_number.remove(&number);
            if self.dirs.get(&dir).is_some_and(|known| known.number == number) {
                self.dirs.remove(&dir);
            }
        }
        let Some(name) = name else { return };
        if self.names == MOST_CHANGED {
            self.lost = true;
            return;
        }
        self.since.get_or_insert_with(Instant::now);
        let is_dir = what.contains(ReadFlags::ISDIR);
        self.names += usize::from(self.changed.entry(dir).or_default().insert(name.to_vec(), is_dir).is_none());
    }

    /// Names that changed, once they have settled.
    pub fn due(&mut self) -> HashMap<FileId, Changed> {
        if self.since.is_none_or(|since| since.elapsed() < SETTLE) {
            return HashMap::new();
        }
        self.since = None;
        self.names = 0;
        std::mem::take(&mut self.changed)
    }

    /// From the root's child down to a directory, as far as it is watched; empty for the root.
    pub fn chain(&self, dir: FileId) -> Option<Vec<(FileId, Link)>> {
        let mut chain = Vec::new();
        let mut at = dir;
        // A chain that is longer than there are directories has met a loop, of two moves of which one was seen.
        while let Some(link) = &self.dirs.get(&at)?.link {
            chain.push((at, link.clone()));
            at = link.parent;
            if chain.len() > self.dirs.len() {
                return None;
            }
        }
        chain.reverse();
        Some(chain)
    }

    /// A directory is found under a name. `None` if it was there before; where it was, if it moved.
    pub fn found(&mut self, dir: FileId, link: &Link) -> Found {
        match self.dirs.get_mut(&dir) {
            None => Found::New,
            Some(known) if known.link.as_ref() == Some(link) => Found::There,
            Some(known) => Found::Moved(known.link.replace(link.clone())),
        }
    }

    /// Forgets directories that had these names, with what is below them; those that there were.
    pub fn forget(&mut self, gone: &HashSet<Link>) -> Vec<FileId> {
        let is_gone = |link: &Option<Link>| link.as_ref().is_some_and(|link| gone.contains(link));
        let tops: HashSet<FileId> = self.dirs.iter().filter(|(_, dir)| is_gone(&dir.link)).map(|(id, _)| *id).collect();
        if tops.is_empty() {
            return Vec::new();
        }
        let below = |id: &FileId| self.chain(*id).is_none_or(|chain| chain.iter().any(|(dir, _)| tops.contains(dir)));
        let forgotten: Vec<FileId> = self.dirs.keys().filter(|id| below(id)).copied().collect();
        for id in &forgotten {
            if let Some(dir) = self.dirs.remove(id) {
                self.by_number.remove(&dir.number);
                if let Some(inotify) = &self.inotify {
                    // One that was removed has taken its watch along.
                    remove_watch(inotify, dir.number).ok();
                }
            }
        }
        forgotten
    }
}

/// What is known of a directory that was met.
pub enum Found {
    /// Nothing.
    New,
    /// It was there before.
    There,
    /// It had this name before.
    Moved(Option<Link>),
}
