//! A volume from its directories to a served mount, and back.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};
use vexfs_store::disk::DirDisk;
use vexfs_store::{Options, SyncMode, Volume};

use crate::access::Gate;
use crate::events::IndexEvents;
use crate::files::Files;
use crate::fuse::{self, Fuse, Loops};
use crate::ingest::{Ingest, When};
use crate::nodes::Nodes;
use crate::pool::Pool;
use crate::source::Source;
use crate::views::{MountFacts, Views};
use crate::walk::{RESERVED, Walker};
use crate::watch::{Stop, Watch};

/// What to mount, where and how.
#[derive(Clone, Debug)]
pub struct MountOptions {
    /// The directory whose files are served.
    pub source: PathBuf,
    /// Where.
    pub mountpoint: PathBuf,
    /// The state directory; `SOURCE/.vexfs` unless named.
    pub state: Option<PathBuf>,
    /// When new points are linked.
    pub sync: SyncMode,
    /// Bytes that the index may keep in memory; `None`: as many as are useful.
    pub memory: Option<u64>,
    /// Bytes a second that the work behind may read and write; `None`: as many as it can.
    pub background_rate: Option<u64>,
    /// Nobody else writes to the source: it isn't watched, and the kernel keeps what it was told.
    pub exclusive: bool,
    /// Files that can't be indexed make close(2) fail.
    pub strict: bool,
    /// `-o` options, split at commas.
    pub options: Vec<String>,
}

/// Why a volume can't be mounted, in one line.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct MountError(String);

pub(crate) fn error(what: impl std::fmt::Display, why: impl std::fmt::Display) -> MountError {
    MountError(format!("{what}: {why}"))
}

/// Event loops: enough that some can wait for searches while others serve files.
const LOOPS: usize = 6;

/// A served mount.
pub struct Mounted {
    mountpoint: PathBuf,
    device: u64,
    volume: Arc<Volume>,
    stop: Arc<Stop>,
    walker: JoinHandle<()>,
    server: JoinHandle<io::Result<()>>,
    log: File,
}

struct Checked {
    source: PathBuf,
    mountpoint: PathBuf,
    state: PathBuf,
}

pub(crate) fn directory(path: &Path) -> Result<PathBuf, MountError> {
    let canonical = path.canonicalize().map_err(|why| error(path.display(), why))?;
    match canonical.is_dir() {
        true => Ok(canonical),
        false => Err(error(path.display(), "not a directory")),
    }
}

fn check(options: &MountOptions) -> Result<Checked, MountError> {
    let source = directory(&options.source)?;
    let mountpoint = directory(&options.mountpoint)?;
    if source != mountpoint && source.starts_with(&mountpoint) {
        return Err(error(source.display(), format!("the source lies inside the mountpoint {}", mountpoint.display())));
    }
    if source != mountpoint && mountpoint.starts_with(&source) {
        return Err(error(mountpoint.display(), format!("the mountpoint lies inside the source {}", source.display())));
    }
    let state = match &options.state {
        None => source.join(RESERVED),
        Some(state) => {
            std::fs::create_dir_all(state).map_err(|why| error(state.display(), why))?;
            let state = directory(state)?;
            if state.starts_with(&source) && state != source.join(RESERVED) {
                return Err(error(state.display(), "the state directory lies inside the source"));
            }
            if state.starts_with(&mountpoint) && state != source.join(RESERVED) {
                return Err(error(state.display(), "the state directory lies inside the mountpoint"));
            }
            state
        }
    };
    Ok(Checked { source, mountpoint, state })
}

pub(crate) fn open_dir(path: &Path) -> Result<OwnedFd, MountError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat(CWD, path, flags, Mode::empty()).map_err(|why| error(path.display(), io::Error::from(why)))
}

/// One open file for each inode that the kernel knows: as many as the system lets us have. Returns how many.
fn raise_file_limit() -> usize {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let allowed = Rlimit { current: limit.maximum, maximum: limit.maximum };
    // What the kernel would give to the privileged, beyond what the session was given.
    let system = std::fs::read_to_string("/proc/sys/fs/nr_open").ok().and_then(|most| most.trim().parse().ok());
    let most = Rlimit { current: system, maximum: system };
    if (system.is_none() || setrlimit(Resource::Nofile, most).is_err())
        && let Err(why) = setrlimit(Resource::Nofile, allowed)
    {
        log::warn!("the limit of open files stays at {:?}: {why}", limit.current);
    }
    getrlimit(Resource::Nofile).current.and_then(|most| usize::try_from(most).ok()).unwrap_or(usize::MAX)
}

/// Opens the volume, reads what a crash left unread, mounts, and serves from threads of its own. Returns when the
/// mount answers.
pub fn mount(options: &MountOptions) -> Result<Mounted, MountError> {
    let Checked { source, mountpoint, state } = check(options)?;
    let most_files = raise_file_limit();
    // Modes come from callers, their umask taken off by the kernel; ours must not come on top.
    rustix::process::umask(Mode::empty());
    // Everything is opened before the mount: from then on no path is resolved that could lead into it.
    let root = open_dir(&source)?;
    if let Err(why) = rustix::fs::mkdirat(CWD, &state, Mode::RWXU)
        && why != Errno::EXIST
    {
        return Err(error(state.display(), io::Error::from(why)));
    }
    let state_fd = open_dir(&state)?;
    let log = open_log(&state_fd).map_err(|why| error(state.join(LOG).display(), io::Error::from(why)))?;
    let owned = |why: Errno| error(source.display(), io::Error::from(why));
    let room = (most_files / 2).min(most_files.saturating_sub(ON_THEIR_WAY));
    let nodes = Arc::new(Nodes::new(rustix::io::dup(&root).map_err(owned)?, room).map_err(owned)?);
    let files_root = Arc::new(Source::new(root).map_err(owned)?);
    let store = Options {
        memory: options.memory,
        background_rate: options.background_rate,
        ..store_options(&files_root, options.sync)
    };
    let (volume, recovery) =
        Volume::open(Arc::new(DirDisk::new(state_fd)), store).map_err(|why| error(state.display(), why))?;
    let volume = Arc::new(volume);
    let written = Arc::clone(&nodes);
    let being_written = Box::new(move |file| written.is_written(file));
    let ingest = Arc::new(Ingest::new(Arc::clone(&volume), Arc::clone(&files_root), options.strict, being_written));
    for file in recovery.unread {
        ingest.read_known(file, When::Quiet);
    }

    let facts = MountFacts {
        mountpoint: mountpoint.to_string_lossy().into_owned(),
        source: source.to_string_lossy().into_owned(),
        state: state.to_string_lossy().into_owned(),
        strict: options.strict,
    };
    let pool = Arc::new(Pool::new(LOOPS).map_err(|why| error("threads", why))?);
    let events = IndexEvents { ingest: Arc::clone(&ingest), nodes: Arc::clone(&nodes), pool: Arc::clone(&pool) };
    let files = Arc::new(Files::new(Arc::clone(&nodes), Arc::new(events)));
    let access = Gate::new(Arc::clone(&files_root)).map_err(owned)?;
    let views = Arc::new(Views::new(Arc::clone(&ingest), access, nodes, facts));
    let fuse = Fuse::new(files, views, pool, stack_depth(&files_root), options.exclusive);

    let server = start(fuse, &mountpoint, &source, &options.options)?;
    // The kernel has been answered: this stat goes to our own threads, as any caller's does, and from a thread that
    // serves nobody.
    let device = rustix::fs::stat(&mountpoint).map_err(|why| error(mountpoint.display(), io::Error::from(why)))?.st_dev;
    let stop = Arc::new(Stop::new().map_err(|why| error("eventfd", why))?);
    let exclusive = options.exclusive;
    let walker = {
        let (ingest, stop) = (Arc::clone(&ingest), Arc::clone(&stop));
        std::thread::Builder::new()
            .name("vexfs-walk".to_owned())
            .spawn(move || {
                let watch = if exclusive { Watch::nothing() } else { Watch::new(ingest.source.root().as_fd()) };
                Walker::new(&ingest, watch, &stop).follow();
            })
            .map_err(|why| error("thread", why))?
    };
    Ok(Mounted { mountpoint, device, volume, stop, walker, server, log })
}

/// Descriptors that stay for files which come while others are being forgotten: the evictor may have to wait for a processor.
const ON_THEIR_WAY: usize = 750;
/// The log of a daemon that nobody watches, in the state directory.
const LOG: &str = "log";
/// One that is longer at a mount makes place for a new one; the one before is kept.
const LONG_LOG: i64 = 4 << 20;

fn open_log(state: &OwnedFd) -> Result<File, Errno> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::APPEND | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let open = || openat(state, LOG, flags, Mode::RUSR | Mode::WUSR);
    let log = open()?;
    if rustix::fs::fstat(&log)?.st_size < LONG_LOG {
        return Ok(File::from(log));
    }
    rustix::fs::renameat(state, LOG, state, "log.1")?;
    Ok(File::from(open()?))
}

/// How the store of a source is opened.
pub(crate) fn store_options(source: &Arc<Source>, sync: SyncMode) -> Options {
    let (root, files) = (Arc::clone(source), Arc::clone(source));
    Options {
        sync,
        root_inode: source.inode(),
        root_born: source.born(),
        locate: Some(Arc::new(move |path, attached| files.locate(path, attached))),
        threads: std::thread::available_parallelism().map_or(1, usize::from),
        memory: None,
        background_rate: None,
        boot: boot_id(),
        sync_source: Some(Arc::new(move || Ok(rustix::fs::syncfs(root.root())?))),
    }
}

/// Which boot of the machine this is; where it can't be told, each mount counts as one.
fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").map_or_else(
        |why| {
            log::warn!("the boot's identity can't be read ({why}): files are read again as after a power cut");
            format!("{:?}", std::time::SystemTime::now())
        },
        |id| id.trim().to_owned(),
    )
}

/// A source that is stacked itself takes one of the two layers that the kernel allows.
fn stack_depth(source: &Source) -> u32 {
    const OVERLAYFS: i64 = 0x794c_7630;
    const FUSE: i64 = 0x6573_5546;
    match rustix::fs::fstatfs(source.root()) {
        Ok(stat) if [OVERLAYFS, FUSE].contains(&stat.f_type) => 2,
        _ => 1,
    }
}

/// `-o` options as mount(2) takes them.
struct Parsed {
    flags: MountFlags,
    allow_other: bool,
    /// The kernel checks modes and lists.
    checked: bool,
    /// As fusermount3 takes them.
    plain: Vec<String>,
}

fn parse(options: &[String]) -> Result<Parsed, MountError> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    // Where only root may enter nothing would be refused, and to check costs a round trip after each change of a directory:
    // see decision 16.
    let mut parsed =
        Parsed { flags, allow_other: false, checked: !rustix::process::geteuid().is_root(), plain: Vec::new() };
    for option in options {
        let (flag, on) = match option.as_str() {
            "ro" => (MountFlags::RDONLY, true),
            "rw" => (MountFlags::RDONLY, false),
            "nosuid" => (MountFlags::NOSUID, true),
            "suid" => (MountFlags::NOSUID, false),
            "nodev" => (MountFlags::NODEV, true),
            "dev" => (MountFlags::NODEV, false),
            "noexec" => (MountFlags::NOEXEC, true),
            "exec" => (MountFlags::NOEXEC, false),
            "noatime" => (MountFlags::NOATIME, true),
            "atime" => (MountFlags::NOATIME, false),
            "sync" => (MountFlags::SYNCHRONOUS, true),
            "async" => (MountFlags::SYNCHRONOUS, false),
            "dirsync" => (MountFlags::DIRSYNC, true),
            "allow_other" => {
                (parsed.allow_other, parsed.checked) = (true, true);
                continue;
            }
            "default_permissions" => {
                parsed.checked = true;
                continue;
            }
            other => return Err(error("-o", format!("\"{other}\" is not an option of vexfs"))),
        };
        parsed.flags.set(flag, on);
        parsed.plain.push(option.clone());
    }
    Ok(parsed)
}

fn start(
    fuse: Fuse,
    mountpoint: &Path,
    source: &Path,
    options: &[String],
) -> Result<JoinHandle<io::Result<()>>, MountError> {
    let parsed = parse(options)?;
    let loops = Loops { threads: LOOPS, allow_other: parsed.allow_other, checked: parsed.checked };
    let device = match openat(CWD, "/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) {
        Ok(device) => Some(device),
        // fusermount3 has the rights that we haven't.
        Err(Errno::ACCESS | Errno::PERM) => None,
        Err(Errno::NOENT | Errno::NXIO | Errno::NODEV) => {
            return Err(error("/dev/fuse", "FUSE is missing: is the fuse kernel module there?"));
        }
        Err(why) => return Err(error("/dev/fuse", io::Error::from(why))),
    };
    let (tell, told) = std::sync::mpsc::sync_channel(1);
    let ready = {
        let tell = tell.clone();
        move || drop(tell.send(Ok(())))
    };
    let device = match device.map(|device| (mount_directly(&device, mountpoint, source, &parsed), device)) {
        Some((Ok(()), device)) => device,
        Some((Err(Errno::PERM), _)) | None => mount_by_helper(mountpoint, source, &parsed)?,
        Some((Err(why), _)) => return Err(error(mountpoint.display(), io::Error::from(why))),
    };
    let serve = move || {
        let result = fuse::serve(fuse, device, &loops, ready);
        if let Err(why) = &result {
            // Nobody listens where serving had begun; the caller of `wait` gets the error then.
            drop(tell.send(Err(why.to_string())));
        }
        result
    };
    let server =
        std::thread::Builder::new().name("vexfs-serve".to_owned()).spawn(serve).map_err(|why| error("thread", why))?;
    match told.recv() {
        Ok(Ok(())) => Ok(server),
        Ok(Err(why)) => Err(error("the FUSE handshake failed", why)),
        Err(_) => Err(MountError("the server ended before the mount answered".to_owned())),
    }
}

fn mount_directly(device: &OwnedFd, mountpoint: &Path, source: &Path, parsed: &Parsed) -> Result<(), Errno> {
    let user = rustix::process::geteuid().as_raw();
    let group = rustix::process::getegid().as_raw();
    let other = if parsed.allow_other { ",allow_other" } else { "" };
    let checked = if parsed.checked { ",default_permissions" } else { "" };
    let data = format!("fd={},rootmode=40000,user_id={user},group_id={group}{checked}{other}", device.as_raw_fd());
    let data = CString::new(data).map_err(|_| Errno::INVAL)?;
    rustix::mount::mount(source, mountpoint, "fuse.vexfs", parsed.flags, Some(data.as_c_str()))
}

/// Without privileges fusermount3 mounts and sends us its `/dev/fuse` descriptor over a socket, its standard input.
fn mount_by_helper(mountpoint: &Path, source: &Path, parsed: &Parsed) -> Result<OwnedFd, MountError> {
    const HELPER: &str = "fusermount3";
    let failed = |why: io::Error| error(HELPER, why);
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(failed)?;
    // fusermount3 takes options by comma; a backslash keeps one in a name.
    let name = source.to_string_lossy().replace('\\', "\\\\").replace(',', "\\,");
    let mut options = format!("fsname={name},subtype=vexfs,default_permissions");
    for option in parsed.plain.iter().map(String::as_str).chain(parsed.allow_other.then_some("allow_other")) {
        options.push(',');
        options.push_str(option);
    }
    let child = std::process::Command::new(HELPER)
        .args(["-o", &options, "--"])
        .arg(mountpoint)
        .env("_FUSE_COMMFD", "0")
        .stdin(OwnedFd::from(theirs))
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .map_err(|why| error(HELPER, format!("{why} (without privileges the package fuse3 is needed)")))?;
    let device = receive_descriptor(&ours);
    let output = child.wait_with_output().map_err(failed)?;
    match device {
        Ok(Some(device)) => Ok(device),
        Ok(None) | Err(_) => {
            let said = String::from_utf8_lossy(&output.stderr);
            let said = said.trim().trim_start_matches("fusermount3: ");
            Err(error(HELPER, said.lines().next().unwrap_or("it ended without a word")))
        }
    }
}

/// The one descriptor that the peer sends; `None` if it hangs up.
fn receive_descriptor(socket: &std::os::unix::net::UnixStream) -> Result<Option<OwnedFd>, Errno> {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let mut buffers = [io::IoSliceMut::new(&mut byte)];
    recvmsg(socket, &mut buffers, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let sent = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    Ok(sent)
}

impl Mounted {
    /// Where the log of a daemon in the background goes: `log` in the state directory.
    pub fn log(&self) -> &File {
        &self.log
    }

    /// Asks the kernel to unmount, if what is mounted there is still this volume. `lazily`: also while files are
    /// open; they keep working until they are closed.
    pub fn unmount(&self, lazily: bool) -> io::Result<()> {
        unmount(&self.mountpoint, Some(self.device), lazily)
    }

    /// Asks for what only the handlers can tell. Not to be called by a thread that serves.
    pub fn answers(&self) -> io::Result<()> {
        rustix::fs::statvfs(&self.mountpoint)?;
        Ok(())
    }

    /// Has the mount ended?
    pub fn is_over(&self) -> bool {
        self.server.is_finished()
    }

    /// Waits for the end of the mount, then closes the volume.
    pub fn wait(self) -> Result<(), MountError> {
        let served = self.server.join();
        self.stop.set();
        if self.walker.join().is_err() {
            log::error!("the walk panicked");
        }
        match Arc::try_unwrap(self.volume) {
            Ok(volume) => volume.close().map_err(|why| error("closing the volume", why))?,
            Err(shared) => shared.commit().map_err(|why| error("closing the volume", why))?,
        }
        match served {
            Ok(Ok(())) => Ok(()),
            Ok(Err(why)) => Err(error("serving ended", why)),
            Err(_) => Err(MountError("the server panicked".to_owned())),
        }
    }
}

/// Unmounts; `device` is what must be mounted there.
pub fn unmount(mountpoint: &Path, device: Option<u64>, lazily: bool) -> io::Result<()> {
    if let Some(device) = device
        && rustix::fs::stat(mountpoint)?.st_dev != device
    {
        return Err(io::Error::other("something else is mounted there now"));
    }
    let flags = if lazily { UnmountFlags::DETACH } else { UnmountFlags::empty() };
    match rustix::mount::unmount(mountpoint, flags | UnmountFlags::NOFOLLOW) {
        Err(Errno::PERM) => {}
        other => return Ok(other?),
    }
    let mut command = std::process::Command::new("fusermount3");
    command.arg("-u").args(lazily.then_some("-z")).arg("--").arg(mountpoint);
    let output = command.output()?;
    match output.status.success() {
        true => Ok(()),
        false => Err(io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_owned())),
    }
}
