//! The real disk: a directory, by descriptor.

use std::fs::{File, TryLockError};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use rustix::fs::{
    AtFlags, FallocateFlags, IFlags, Mode, OFlags, fallocate, ioctl_setflags, mkdirat, openat, renameat, unlinkat,
};
use rustix::io::Errno;
use vexfs_index::{Bytes, Region};

use super::{Disk, DiskFile};

/// The state directory of a volume.
pub struct DirDisk {
    root: OwnedFd,
    lock: Mutex<Option<File>>,
    /// Scratch files that were ever made.
    scratches: AtomicU64,
}

impl DirDisk {
    /// `root` is a descriptor of the directory, opened before anything is mounted over it.
    pub fn new(root: OwnedFd) -> DirDisk {
        DirDisk { root, lock: Mutex::new(None), scratches: AtomicU64::new(0) }
    }

    fn open_file(&self, name: &str, flags: OFlags) -> io::Result<File> {
        if let Some((folder, _)) = name.rsplit_once('/')
            && flags.contains(OFlags::CREATE)
        {
            match mkdirat(&self.root, folder, Mode::RWXU) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        let mode = Mode::RUSR | Mode::WUSR;
        Ok(File::from(openat(&self.root, name, flags | OFlags::CLOEXEC | OFlags::NOFOLLOW, mode)?))
    }
}

impl Disk for DirDisk {
    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        Ok(Arc::new(RealFile(self.open_file(name, OFlags::RDWR | OFlags::CREATE)?)))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        Ok(renameat(&self.root, from, &self.root, to)?)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        match unlinkat(&self.root, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    fn list(&self, folder: &str) -> io::Result<Vec<String>> {
        let folder = if folder.is_empty() { "." } else { folder };
        let fd = match openat(&self.root, folder, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => return Ok(Vec::new()),
            Err(errno) => return Err(errno.into()),
        };
        let mut names = Vec::new();
        for entry in rustix::fs::Dir::new(fd)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name != "." && name != ".." {
                names.push(name);
            }
        }
        Ok(names)
    }

    fn sync_dir(&self, folder: &str) -> io::Result<()> {
        let name = if folder.is_empty() { "." } else { folder };
        let fd = openat(&self.root, name, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        Ok(rustix::fs::fsync(fd.as_fd())?)
    }

    fn map(&self, name: &str) -> io::Result<Region> {
        let file = self.open_file(name, OFlags::RDONLY)?;
        Ok(Arc::new(Mapping(map_file(&file)?)))
    }

    fn scratch(&self, len: u64) -> io::Result<OwnedFd> {
        // By a name that is taken away again: not every file system makes files without one. Where a crash leaves it, the
        // next open removes it with all that no manifest names.
        let name = format!("segments/scratch-{}", self.scratches.fetch_add(1, Ordering::Relaxed));
        let file = self.open_file(&name, OFlags::RDWR | OFlags::CREATE | OFlags::EXCL)?;
        self.remove(&name)?;
        // btrfs: what is set aside is for the first writing of a page only, unless it is written in place.
        if let Err(errno) = ioctl_setflags(&file, IFlags::NOCOW) {
            log::debug!("a scratch file isn't written in place ({errno})");
        }
        match fallocate(&file, FallocateFlags::empty(), 0, len) {
            // Written out where space can't be set aside.
            Err(Errno::OPNOTSUPP) => {
                let zeros = vec![0; 1 << 20];
                for at in (0..len).step_by(zeros.len()) {
                    file.write_all_at(&zeros[..zeros.len().min((len - at) as usize)], at)?;
                }
            }
            done => done?,
        }
        Ok(file.into())
    }

    fn lock(&self) -> io::Result<bool> {
        let file = self.open_file("lock", OFlags::RDWR | OFlags::CREATE)?;
        match file.try_lock() {
            Ok(()) => {
                *self.lock.lock() = Some(file);
                Ok(true)
            }
            Err(TryLockError::WouldBlock) => Ok(false),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }
}

struct Mapping(memmap2::Mmap);

impl Bytes for Mapping {
    fn bytes(&self) -> &[u8] {
        &self.0
    }
}

#[allow(unsafe_code)]
fn map_file(file: &File) -> io::Result<memmap2::Mmap> {
    // SAFETY: only segments are mapped. A segment is written under a temporary name, synced, renamed and never
    // opened for writing again; the volume's lock keeps other VexFS processes out, and the state directory is
    // not reachable through the mount. Reading a copy instead would double the memory of a served volume.
    unsafe { memmap2::Mmap::map(file) }
}

struct RealFile(File);

impl DiskFile for RealFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }
    fn read_at(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(out, offset)
    }
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write_all_at(data, offset)
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }
    fn sync(&self) -> io::Result<()> {
        self.0.sync_data()
    }
}
