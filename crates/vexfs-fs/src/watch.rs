//! Watches the source's directories: which of their names are worth a look. An event is a hint and no more; see
//! decision 14.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::inotify::{CreateFlags, ReadFlags, Reader, WatchFlags, add_watch, init, remove_watch};
use rustix::io::Errno;
use vexfs_store::{FileId, Link};

use crate::fanotify::{Event, Fanotify, handle_of};
use crate::reopen::path_of;

/// How long after a change its name is looked at: longer than an operation of the mount's own takes to tell the index.
const SETTLE: Duration = Duration::from_millis(500);
/// How long events gather before they are taken in: each waking is a core's time that the operations want which make the
/// events. The kernel keeps 16,384 of them.
const GATHER: Duration = Duration::from_millis(20);
/// More changed names than that are as good as lost events: the source is walked.
const MOST_CHANGED: usize = 1 << 20;

const WANTED: WatchFlags = WatchFlags::CREATE
    .union(WatchFlags::DELETE)
    .union(WatchFlags::MOVED_FROM)
    .union(WatchFlags::MOVED_TO)
    .union(WatchFlags::CLOSE_WRITE)
    .union(WatchFlags::ATTRIB)
    .union(WatchFlags::ONLYDIR)
    .union(WatchFlags::EXCL_UNLINK);

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

/// Who tells of changes.
#[derive(Default)]
enum Teller {
    #[default]
    Nobody,
    /// Of the whole file system, for the privileged; the files below cost nothing by it.
    Fanotify(Fanotify),
    /// Of each directory that was added; each read(2) and write(2) of a file in it takes a little longer.
    Inotify(OwnedFd),
}

/// By what its teller knows a directory: its file handle, or a watch's number.
type Key = Vec<u8>;

struct Dir {
    key: Key,
    /// `None`: the root.
    link: Option<Link>,
}

/// See the module.
#[derive(Default)]
pub struct Watch {
    teller: Teller,
    dirs: HashMap<FileId, Dir>,
    by_key: HashMap<Key, FileId>,
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

    /// Will watch what is added of the source with this root.
    pub fn new(root: BorrowedFd<'_>) -> Watch {
        let fanotify = handle_of(root).and_then(|_| Fanotify::new(root)).map(Teller::Fanotify);
        let inotify = || init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).map(Teller::Inotify);
        match fanotify.or_else(|_| inotify()) {
            Ok(teller) => Watch { teller, ..Watch::default() },
            Err(errno) => {
                log::warn!("the source can't be watched (inotify: {errno}): it is walked now and then");
                Watch { holes: true, ..Watch::default() }
            }
        }
    }

    /// By what a directory is known from now on; it need not have been before.
    fn key_of(&self, fd: BorrowedFd<'_>) -> Result<Key, Errno> {
        match &self.teller {
            Teller::Nobody => Ok(Key::new()),
            Teller::Fanotify(_) => handle_of(fd),
            Teller::Inotify(inotify) => Ok(add_watch(inotify, path_of(fd), WANTED)?.to_ne_bytes().to_vec()),
        }
    }

    /// Watches a directory. To be called before it is listed.
    pub fn add(&mut self, fd: BorrowedFd<'_>, dir: FileId, link: Option<&Link>) {
        if matches!(self.teller, Teller::Nobody) {
            return;
        }
        match self.key_of(fd) {
            Ok(key) => {
                self.by_key.insert(key.clone(), dir);
                let known = self.dirs.insert(dir, Dir { key: key.clone(), link: link.cloned() });
                // Another one had the number.
                if let Some(known) = known.filter(|known| known.key != key) {
                    self.by_key.remove(&known.key);
                }
            }
            Err(errno) => {
                if !self.holes {
                    log::warn!("not all directories can be watched ({errno}): the source is walked now and then");
                }
                self.holes = true;
            }
        }
    }

    /// How the source is followed, in a word.
    pub fn state(&self) -> &'static str {
        match (&self.teller, self.holes) {
            (_, true) => "walked",
            (Teller::Fanotify(_), false) => "fanotify",
            (Teller::Inotify(_), false) => "inotify",
            (Teller::Nobody, false) => "trusted",
        }
    }

    /// Directories that are known, and keys that lead to one.
    #[cfg(test)]
    pub fn watched(&self) -> (usize, usize) {
        (self.dirs.len(), self.by_key.len())
    }

    /// Is the source to be walked now and then?
    pub fn has_holes(&self) -> bool {
        self.holes
    }

    /// Were events lost?
    pub fn has_lost(&self) -> bool {
        self.lost
    }

    /// Something was seen that was over already: as if events were lost.
    pub fn lose(&mut self) {
        self.lost = true;
    }

    /// A walk begins, which finds what they told.
    pub fn forget_lost(&mut self) {
        self.lost = false;
    }

    /// Waits for events and until there may be more of them, for `stop`, or so long.
    pub fn wait(&self, stop: &Stop, longest: Duration) {
        let bell = || PollFd::new(&stop.bell, PollFlags::IN);
        let mut fds = vec![bell()];
        fds.extend(match &self.teller {
            Teller::Nobody => None,
            Teller::Fanotify(fanotify) => Some(PollFd::new(fanotify, PollFlags::IN)),
            Teller::Inotify(inotify) => Some(PollFd::new(inotify, PollFlags::IN)),
        });
        if wait_for(&mut fds, longest) {
            wait_for(&mut [bell()], GATHER);
        }
    }

    /// Takes the kernel's events in.
    pub fn drain(&mut self) {
        let teller = std::mem::take(&mut self.teller);
        let ended = match &teller {
            Teller::Nobody => return,
            Teller::Fanotify(fanotify) => self.drain_fanotify(fanotify),
            Teller::Inotify(inotify) => self.drain_inotify(inotify),
        };
        if ended != Errno::AGAIN {
            log::warn!("the source's changes can't be read: {ended}");
            self.lost = true;
        }
        self.teller = teller;
    }

    /// Returns why there are no more.
    fn drain_fanotify(&mut self, fanotify: &Fanotify) -> Errno {
        let mut space = [0; 8192];
        loop {
            let note = |event: Event<'_>| {
                let dir = self.by_key.get(event.handle).copied();
                // The index was told of what the mount did; where directories are, is known here alone.
                if let Some(dir) = dir.filter(|_| event.is_dir || !event.own) {
                    self.note(dir, event.name, event.is_dir);
                }
            };
            match fanotify.read(&mut space, note) {
                Ok(lost) => self.lost |= lost,
                Err(errno) => return errno,
            }
        }
    }

    /// Returns why there are no more.
    fn drain_inotify(&mut self, inotify: &OwnedFd) -> Errno {
        let mut space = [MaybeUninit::uninit(); 8192];
        let mut events = Reader::new(inotify, &mut space);
        loop {
            let event = match events.next() {
                Ok(event) => event,
                Err(errno) => return errno,
            };
            let (key, what) = (event.wd().to_ne_bytes(), event.events());
            self.lost |= what.contains(ReadFlags::QUEUE_OVERFLOW);
            let Some(dir) = self.by_key.get(&key[..]).copied() else { continue };
            if what.contains(ReadFlags::IGNORED) {
                // It is gone, and where it was is told by the directory above.
                self.by_key.remove(&key[..]);
            }
            if let Some(name) = event.file_name() {
                self.note(dir, name.to_bytes(), what.contains(ReadFlags::ISDIR));
            }
        }
    }

    fn note(&mut self, dir: FileId, name: &[u8], is_dir: bool) {
        if self.names == MOST_CHANGED {
            self.lost = true;
            return;
        }
        self.since.get_or_insert_with(Instant::now);
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

    /// A directory is found under a name. Another one may have had its number before.
    pub fn found(&mut self, fd: BorrowedFd<'_>, dir: FileId, link: &Link) -> Found {
        let key = self.key_of(fd).ok();
        match self.dirs.get_mut(&dir).filter(|known| key.as_ref() == Some(&known.key)) {
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
                self.by_key.remove(&dir.key);
                if let (Teller::Inotify(inotify), Ok(number)) = (&self.teller, dir.key[..].try_into()) {
                    // One that was removed has taken its watch along.
                    remove_watch(inotify, i32::from_ne_bytes(number)).ok();
                }
            }
        }
        forgotten
    }
}

/// Did one of them come?
fn wait_for(fds: &mut [PollFd<'_>], longest: Duration) -> bool {
    let longest = Timespec { tv_sec: longest.as_secs() as i64, tv_nsec: i64::from(longest.subsec_nanos()) };
    // A signal ends it early, and nothing else can go wrong.
    poll(fds, Some(&longest)).is_ok_and(|ready| ready > 0)
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
