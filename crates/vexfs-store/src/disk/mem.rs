//! A disk in memory that fails on demand and forgets, at a crash, what wasn't synced.
//!
//! A file keeps what is durable and, in order, the writes since its last sync; folders keep the same of their names. At
//! a crash any part of what waits may have reached the disk ([`Survivors`]): file systems promise no order.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use vexfs_index::Region;

use super::{Disk, DiskFile};

/// What a call does when its turn comes.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// This call alone fails with the given errno; nothing of it happens.
    Once(i32),
    /// This call and all after it fail.
    Always(i32),
    /// As `Always`, but a write leaves its first half behind, durably.
    Torn(i32),
    /// This call alone fails; a write leaves its first half behind.
    Short(i32),
    /// A write's middle byte arrives with this bit flipped; nobody is told.
    Flip(u8),
    /// This call and all after it take so long.
    Slow(Duration),
}

/// What of the writes and names that were not synced a crash leaves behind.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub enum Survivors {
    /// Nothing of it.
    Nothing,
    /// All of it: the process was killed, not the machine.
    All,
    /// What came before some moment; of the write at that moment a part of its last block.
    Torn(u64),
    /// Any pages of it and any names, whatever their order was.
    Some(u64),
}

/// A write reaches the disk by pages.
const PAGE: usize = 4096;
/// The part of a page that a torn write leaves is a multiple of this.
const SECTOR: usize = 512;

type Content = Arc<Mutex<FileBytes>>;

#[derive(Clone)]
enum Write {
    Bytes(usize, Vec<u8>),
    Len(usize),
}

impl Write {
    fn apply(&self, bytes: &mut Vec<u8>) {
        match self {
            Write::Bytes(at, data) => {
                if bytes.len() < at + data.len() {
                    bytes.resize(at + data.len(), 0);
                }
                bytes[*at..at + data.len()].copy_from_slice(data);
            }
            Write::Len(len) => bytes.resize(*len, 0),
        }
    }

    /// As it goes to the disk: by pages.
    fn pages(&self) -> Vec<Write> {
        let Write::Bytes(at, data) = self else { return vec![self.clone()] };
        let mut pages = Vec::new();
        let mut start = 0;
        while start < data.len() {
            let end = data.len().min(start + PAGE - (at + start) % PAGE);
            pages.push(Write::Bytes(at + start, data[start..end].to_vec()));
            start = end;
        }
        pages
    }
}

#[derive(Default, Clone)]
struct FileBytes {
    live: Vec<u8>,
    durable: Vec<u8>,
    waiting: Vec<Write>,
}

impl FileBytes {
    fn write(&mut self, write: Write) {
        write.apply(&mut self.live);
        self.waiting.push(write);
    }

    fn sync(&mut self) {
        self.durable.clone_from(&self.live);
        self.waiting.clear();
    }

    fn after(&self, survivors: Survivors, luck: &mut Luck) -> Vec<u8> {
        let mut bytes = self.durable.clone();
        let pages: Vec<Write> = self.waiting.iter().flat_map(Write::pages).collect();
        match survivors {
            Survivors::Nothing => {}
            Survivors::All => bytes.clone_from(&self.live),
            Survivors::Torn(_) => {
                let cut = luck.below(pages.len() + 1);
                pages.iter().take(cut).for_each(|page| page.apply(&mut bytes));
                if let Some(Write::Bytes(at, data)) = pages.get(cut) {
                    let part = luck.below(data.len() / SECTOR + 1) * SECTOR;
                    Write::Bytes(*at, data[..part.min(data.len())].to_vec()).apply(&mut bytes);
                }
            }
            Survivors::Some(_) => pages.iter().filter(|_| luck.below(2) == 0).for_each(|page| page.apply(&mut bytes)),
        }
        bytes
    }
}

#[derive(Clone)]
enum NameChange {
    /// A folder was made.
    Folder(String),
    Set(String, Content),
    Renamed(String, String, Content),
    Removed(String),
}

fn folder_of(name: &str) -> &str {
    name.rsplit_once('/').map_or("", |(folder, _)| folder)
}

#[derive(Default, Clone)]
struct Table {
    files: BTreeMap<String, Content>,
    folders: std::collections::BTreeSet<String>,
}

impl Table {
    fn apply(&mut self, change: &NameChange) {
        match change {
            NameChange::Folder(name) => drop(self.folders.insert(name.clone())),
            NameChange::Set(name, content) => drop(self.files.insert(name.clone(), Arc::clone(content))),
            NameChange::Renamed(from, to, content) => {
                self.files.remove(from);
                self.files.insert(to.clone(), Arc::clone(content));
            }
            NameChange::Removed(name) => drop(self.files.remove(name)),
        }
    }
}

#[derive(Default)]
struct Names {
    live: Table,
    durable: Table,
    waiting: Vec<NameChange>,
}

impl Names {
    fn change(&mut self, change: NameChange) {
        self.live.apply(&change);
        self.waiting.push(change);
    }

    fn after(&self, survivors: Survivors, luck: &mut Luck) -> Table {
        let mut table = self.durable.clone();
        match survivors {
            Survivors::Nothing => {}
            Survivors::All => self.waiting.iter().for_each(|change| table.apply(change)),
            Survivors::Torn(_) => {
                let cut = luck.below(self.waiting.len() + 1);
                self.waiting.iter().take(cut).for_each(|change| table.apply(change));
            }
            Survivors::Some(_) => {
                self.waiting.iter().filter(|_| luck.below(2) == 0).for_each(|change| table.apply(change));
            }
        }
        let folders = std::mem::take(&mut table.folders);
        table.files.retain(|name, _| folder_of(name).is_empty() || folders.contains(folder_of(name)));
        table.folders = folders;
        table
    }
}

/// The same each time for the same seed.
struct Luck(u64);

impl Luck {
    fn of(survivors: Survivors) -> Luck {
        match survivors {
            Survivors::Nothing | Survivors::All => Luck(1),
            Survivors::Torn(seed) | Survivors::Some(seed) => Luck(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1),
        }
    }

    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 20) as usize % n.max(1)
    }
}

type Watcher = Arc<dyn Fn(&MemDisk) + Send + Sync>;

#[derive(Default)]
struct Shared {
    names: Mutex<Names>,
    calls: AtomicU64,
    reads: AtomicU64,
    scratched: AtomicU64,
    fault: Mutex<Option<(u64, Fault)>>,
    read_fault: Mutex<Option<(u64, i32)>>,
    watcher: Mutex<Option<Watcher>>,
    locked: AtomicBool,
}

/// A disk in memory. Clones share the same files.
#[derive(Clone, Default)]
pub struct MemDisk(Arc<Shared>);

impl MemDisk {
    /// Calls that changed or could have changed the disk so far.
    pub fn calls(&self) -> u64 {
        self.0.calls.load(Ordering::SeqCst)
    }

    /// Calls that read.
    pub fn reads(&self) -> u64 {
        self.0.reads.load(Ordering::SeqCst)
    }

    /// Bytes of all scratch files that were ever made.
    pub fn scratched(&self) -> u64 {
        self.0.scratched.load(Ordering::SeqCst)
    }

    /// Arms a fault for the `at`-th changing call, counted from 0 since the disk was made.
    pub fn fail_at(&self, at: u64, fault: Fault) {
        *self.0.fault.lock() = Some((at, fault));
    }

    /// The `at`-th reading call and all after it fail.
    pub fn fail_reads_from(&self, at: u64, errno: i32) {
        *self.0.read_fault.lock() = Some((at, errno));
    }

    /// No more faults.
    pub fn heal(&self) {
        *self.0.fault.lock() = None;
        *self.0.read_fault.lock() = None;
    }

    /// `watcher` is called before each changing call takes effect: a moment at which power could be cut.
    pub fn watch(&self, watcher: impl Fn(&MemDisk) + Send + Sync + 'static) {
        *self.0.watcher.lock() = Some(Arc::new(watcher));
    }

    /// Nobody watches any more.
    pub fn unwatch(&self) {
        *self.0.watcher.lock() = None;
    }

    /// What a machine finds after power was cut now and nothing but what was synced reached the disk.
    pub fn crash(&self) -> MemDisk {
        self.crash_with(Survivors::Nothing)
    }

    /// What is found after a crash now.
    pub fn crash_with(&self, survivors: Survivors) -> MemDisk {
        let mut luck = Luck::of(survivors);
        let names = self.0.names.lock();
        let Table { files, folders } = names.after(survivors, &mut luck);
        let mut table = Table { files: BTreeMap::new(), folders };
        for (name, content) in files {
            let live = content.lock().after(survivors, &mut luck);
            let durable = live.clone();
            let content = Arc::new(Mutex::new(FileBytes { live, durable, waiting: Vec::new() }));
            table.files.insert(name, content);
        }
        let after = MemDisk::default();
        *after.0.names.lock() = Names { live: table.clone(), durable: table, waiting: Vec::new() };
        after
    }

    /// A number that tells states of the disk apart.
    pub fn digest(&self) -> u64 {
        use std::hash::{DefaultHasher, Hash, Hasher};
        let mut hasher = DefaultHasher::new();
        for (name, content) in &self.0.names.lock().live.files {
            name.hash(&mut hasher);
            content.lock().live.hash(&mut hasher);
        }
        hasher.finish()
    }

    /// Names of all files.
    pub fn files(&self) -> Vec<String> {
        self.0.names.lock().live.files.keys().cloned().collect()
    }

    /// A file's bytes.
    pub fn bytes(&self, name: &str) -> Option<Vec<u8>> {
        self.0.names.lock().live.files.get(name).map(|content| content.lock().live.clone())
    }

    /// Changes bytes behind the store's back: the disk that rots.
    pub fn corrupt(&self, name: &str, change: impl FnOnce(&mut Vec<u8>)) -> bool {
        let names = self.0.names.lock();
        let Some(content) = names.live.files.get(name) else { return false };
        let mut bytes = content.lock();
        change(&mut bytes.live);
        bytes.sync();
        true
    }

    fn turn(&self) -> io::Result<Option<Fault>> {
        let watcher = self.0.watcher.lock().clone();
        if let Some(watcher) = watcher {
            watcher(self);
        }
        let call = self.0.calls.fetch_add(1, Ordering::SeqCst);
        let Some((at, fault)) = *self.0.fault.lock() else { return Ok(None) };
        match fault {
            Fault::Once(errno) if call == at => Err(io::Error::from_raw_os_error(errno)),
            Fault::Always(errno) if call >= at => Err(io::Error::from_raw_os_error(errno)),
            Fault::Torn(errno) if call > at => Err(io::Error::from_raw_os_error(errno)),
            Fault::Torn(_) | Fault::Short(_) | Fault::Flip(_) if call == at => Ok(Some(fault)),
            Fault::Slow(time) if call >= at => {
                std::thread::sleep(time);
                Ok(None)
            }
            _ => Ok(None),
        }
    }

    fn whole_turn(&self) -> io::Result<()> {
        match self.turn()? {
            Some(Fault::Torn(errno) | Fault::Short(errno)) => Err(io::Error::from_raw_os_error(errno)),
            _ => Ok(()),
        }
    }

    fn read_turn(&self) -> io::Result<()> {
        let call = self.0.reads.fetch_add(1, Ordering::SeqCst);
        match *self.0.read_fault.lock() {
            Some((at, errno)) if call >= at => Err(io::Error::from_raw_os_error(errno)),
            _ => Ok(()),
        }
    }
}

impl Disk for MemDisk {
    fn scratch(&self, len: u64) -> io::Result<OwnedFd> {
        self.whole_turn()?;
        self.0.scratched.fetch_add(len, Ordering::SeqCst);
        let fd = rustix::fs::memfd_create("scratch", rustix::fs::MemfdFlags::CLOEXEC)?;
        rustix::fs::ftruncate(&fd, len)?;
        Ok(fd)
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        self.whole_turn()?;
        let mut names = self.0.names.lock();
        let folder = folder_of(name);
        if !folder.is_empty() && !names.live.folders.contains(folder) {
            names.change(NameChange::Folder(folder.to_owned()));
        }
        let content = match names.live.files.get(name) {
            Some(content) => Arc::clone(content),
            None => {
                let content = Content::default();
                names.change(NameChange::Set(name.to_owned(), Arc::clone(&content)));
                content
            }
        };
        Ok(Arc::new(MemFile { disk: self.clone(), content }))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.whole_turn()?;
        let mut names = self.0.names.lock();
        let content = names.live.files.get(from).cloned().ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        names.change(NameChange::Renamed(from.to_owned(), to.to_owned(), content));
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.whole_turn()?;
        let mut names = self.0.names.lock();
        if names.live.files.contains_key(name) {
            names.change(NameChange::Removed(name.to_owned()));
        }
        Ok(())
    }

    fn list(&self, folder: &str) -> io::Result<Vec<String>> {
        self.read_turn()?;
        let names = self.0.names.lock();
        let within = |name: &String| folder_of(name) == folder;
        let bare = |name: &String| name.rsplit('/').next().unwrap_or_default().to_owned();
        Ok(names.live.files.keys().filter(|name| within(name)).map(bare).collect())
    }

    fn sync_dir(&self, folder: &str) -> io::Result<()> {
        self.whole_turn()?;
        let mut names = self.0.names.lock();
        let waiting = std::mem::take(&mut names.waiting);
        for change in waiting {
            let within = match &change {
                NameChange::Folder(_) => folder.is_empty(),
                NameChange::Set(name, _) | NameChange::Renamed(_, name, _) | NameChange::Removed(name) => {
                    folder_of(name) == folder
                }
            };
            match within {
                true => names.durable.apply(&change),
                false => names.waiting.push(change),
            }
        }
        Ok(())
    }

    fn map(&self, name: &str) -> io::Result<Region> {
        self.read_turn()?;
        let names = self.0.names.lock();
        let content = names.live.files.get(name).ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        Ok(vexfs_index::region(&content.lock().live))
    }

    fn lock(&self) -> io::Result<bool> {
        Ok(!self.0.locked.swap(true, Ordering::SeqCst))
    }
}

struct MemFile {
    disk: MemDisk,
    content: Content,
}

impl DiskFile for MemFile {
    fn len(&self) -> io::Result<u64> {
        self.disk.read_turn()?;
        Ok(self.content.lock().live.len() as u64)
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.disk.read_turn()?;
        let bytes = self.content.lock();
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        let source = start
            .checked_add(out.len())
            .and_then(|end| bytes.live.get(start..end))
            .ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?;
        out.copy_from_slice(source);
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let fault = self.disk.turn()?;
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        let mut data = data.to_vec();
        match fault {
            Some(Fault::Torn(_) | Fault::Short(_)) => data.truncate(data.len() / 2),
            Some(Fault::Flip(bit)) => {
                let middle = data.len() / 2;
                if let Some(byte) = data.get_mut(middle) {
                    *byte ^= 1 << (bit % 8);
                }
            }
            _ => {}
        }
        let mut bytes = self.content.lock();
        bytes.write(Write::Bytes(start, data));
        match fault {
            Some(Fault::Torn(errno)) => {
                // What reached the platter of it.
                bytes.sync();
                Err(io::Error::from_raw_os_error(errno))
            }
            Some(Fault::Short(errno)) => Err(io::Error::from_raw_os_error(errno)),
            _ => Ok(()),
        }
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.disk.whole_turn()?;
        let len = usize::try_from(len).map_err(io::Error::other)?;
        self.content.lock().write(Write::Len(len));
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.disk.whole_turn()?;
        self.content.lock().sync();
        Ok(())
    }
}
