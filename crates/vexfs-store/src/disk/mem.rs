//! A disk in memory that fails on demand and forgets, at a crash, what wasn't synced.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

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
    /// As `Always`, but a write leaves its first half behind.
    Torn(i32),
}

type Content = Arc<Mutex<FileBytes>>;

#[derive(Default, Clone)]
struct FileBytes {
    live: Vec<u8>,
    durable: Vec<u8>,
}

#[derive(Default)]
struct Names {
    live: BTreeMap<String, Content>,
    durable: BTreeMap<String, Content>,
}

#[derive(Default)]
struct Shared {
    names: Mutex<Names>,
    calls: AtomicU64,
    fault: Mutex<Option<(u64, Fault)>>,
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

    /// Arms a fault for the `at`-th changing call, counted from 0 since the disk was made.
    pub fn fail_at(&self, at: u64, fault: Fault) {
        *self.0.fault.lock() = Some((at, fault));
    }

    /// No more faults.
    pub fn heal(&self) {
        *self.0.fault.lock() = None;
    }

    /// What a machine finds after power was cut now: synced names with synced bytes.
    pub fn crash(&self) -> MemDisk {
        let names = self.0.names.lock();
        let survived: BTreeMap<String, Content> = names
            .durable
            .iter()
            .map(|(name, content)| {
                let durable = content.lock().durable.clone();
                (name.clone(), Arc::new(Mutex::new(FileBytes { live: durable.clone(), durable })))
            })
            .collect();
        let after = MemDisk::default();
        *after.0.names.lock() = Names { live: survived.clone(), durable: survived };
        after
    }

    /// Changes bytes behind the store's back: the disk that rots.
    pub fn corrupt(&self, name: &str, change: impl FnOnce(&mut Vec<u8>)) -> bool {
        let names = self.0.names.lock();
        let Some(content) = names.live.get(name) else { return false };
        let mut bytes = content.lock();
        change(&mut bytes.live);
        bytes.durable = bytes.live.clone();
        true
    }

    /// Counts a call. `Some(errno)`: do half of it, then fail with this.
    fn turn(&self) -> io::Result<Option<i32>> {
        let call = self.0.calls.fetch_add(1, Ordering::SeqCst);
        match *self.0.fault.lock() {
            Some((at, Fault::Once(errno))) if call == at => Err(io::Error::from_raw_os_error(errno)),
            Some((at, Fault::Always(errno))) if call >= at => Err(io::Error::from_raw_os_error(errno)),
            Some((at, Fault::Torn(errno))) if call == at => Ok(Some(errno)),
            Some((at, Fault::Torn(errno))) if call > at => Err(io::Error::from_raw_os_error(errno)),
            _ => Ok(None),
        }
    }

    fn whole_turn(&self) -> io::Result<()> {
        match self.turn()? {
            None => Ok(()),
            Some(errno) => Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

impl Disk for MemDisk {
    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        self.whole_turn()?;
        let content = Arc::clone(self.0.names.lock().live.entry(name.to_owned()).or_default());
        Ok(Arc::new(MemFile { disk: self.clone(), content }))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.whole_turn()?;
        let mut names = self.0.names.lock();
        let content = names.live.remove(from).ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        names.live.insert(to.to_owned(), content);
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.whole_turn()?;
        self.0.names.lock().live.remove(name);
        Ok(())
    }

    fn list(&self, folder: &str) -> io::Result<Vec<String>> {
        let names = self.0.names.lock();
        Ok(names
            .live
            .keys()
            .filter_map(|name| name.strip_prefix(folder)?.strip_prefix('/').map(str::to_owned))
            .collect())
    }

    fn sync_dir(&self, folder: &str) -> io::Result<()> {
        self.whole_turn()?;
        let mut names = self.0.names.lock();
        let within = |name: &str| name.rsplit_once('/').map_or("", |(folder, _)| folder) == folder;
        let Names { live, durable } = &mut *names;
        durable.retain(|name, _| !within(name));
        for (name, content) in live.iter().filter(|(name, _)| within(name)) {
            durable.insert(name.clone(), Arc::clone(content));
        }
        Ok(())
    }

    fn map(&self, name: &str) -> io::Result<Region> {
        let names = self.0.names.lock();
        let content = names.live.get(name).ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
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
        Ok(self.content.lock().live.len() as u64)
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
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
        let torn = self.disk.turn()?;
        let data = if torn.is_some() { &data[..data.len() / 2] } else { data };
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        let mut bytes = self.content.lock();
        if bytes.live.len() < start + data.len() {
            bytes.live.resize(start + data.len(), 0);
        }
        bytes.live[start..start + data.len()].copy_from_slice(data);
        match torn {
            Some(errno) => {
                // A torn write is what reached the platter of it.
                bytes.durable = bytes.live.clone();
                Err(io::Error::from_raw_os_error(errno))
            }
            None => Ok(()),
        }
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.disk.whole_turn()?;
        let len = usize::try_from(len).map_err(io::Error::other)?;
        self.content.lock().live.resize(len, 0);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.disk.whole_turn()?;
        let mut bytes = self.content.lock();
        bytes.durable = bytes.live.clone();
        Ok(())
    }
}
