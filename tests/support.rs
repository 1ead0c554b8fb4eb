//! A volume in a temporary directory that is unmounted whatever happens.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};
use tempfile::TempDir;

pub const VEXFS: &str = env!("CARGO_BIN_EXE_vexfs");

/// Bytes of stack that a request's handler may take, from its thread's first frame.
const MOST_STACK: u64 = 6144;

/// True where a test can't run; it has said why, or failed if it must run.
pub fn skip(missing: bool, why: &str) -> bool {
    if missing {
        assert!(std::env::var_os("VEXFS_REQUIRE_FUSE").is_none(), "can't be skipped here: {why}");
        eprintln!("skipped: {why}");
    }
    missing
}

pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

pub fn no_fuse() -> bool {
    skip(fs::File::options().read(true).write(true).open("/dev/fuse").is_err(), "no /dev/fuse")
}

pub fn no_rsync() -> bool {
    skip(Command::new("rsync").arg("--version").output().is_err(), "no rsync")
}

/// Numbers as a binary attribute and an f32 .npy have them.
pub fn le_bytes(numbers: &[f32]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

/// A mounted volume.
pub struct Volume {
    pub dir: TempDir,
    args: Vec<String>,
    user: Option<u32>,
}

impl Volume {
    /// `None` where there is no FUSE.
    pub fn new(args: &[&str]) -> Option<Volume> {
        Volume::unmounted(args).inspect(Volume::mount)
    }

    pub fn unmounted(args: &[&str]) -> Option<Volume> {
        if no_fuse() {
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        fs::create_dir(dir.path().join("source")).unwrap();
        fs::create_dir(dir.path().join("mnt")).unwrap();
        let args = args.iter().map(|arg| (*arg).to_owned()).collect();
        Some(Volume { dir, args, user: None })
    }

    /// Mounted by another user, who owns source and mountpoint.
    pub fn owned_by(mut self, user: u32) -> Volume {
        for path in [self.source(), self.mnt()] {
            std::os::unix::fs::chown(path, Some(user), Some(user)).unwrap();
        }
        self.user = Some(user);
        self
    }

    pub fn source(&self) -> PathBuf {
        self.dir.path().join("source")
    }

    pub fn mnt(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.mnt().join(name)
    }

    pub fn command(&self, args: &[&str]) -> Output {
        let mut command = Command::new(VEXFS);
        command.args(args);
        if let Some(user) = self.user {
            command.uid(user).gid(user);
        }
        command.output().unwrap()
    }

    pub fn try_mount(&self) -> Output {
        let (source, mnt) = (self.source(), self.mnt());
        let mut args = vec!["mount", source.to_str().unwrap(), mnt.to_str().unwrap()];
        args.extend(self.args.iter().map(String::as_str));
        self.command(&args)
    }

    pub fn mount(&self) {
        let output = self.try_mount();
        assert!(output.status.success(), "mount: {}", String::from_utf8_lossy(&output.stderr));
    }

    pub fn umount(&self) {
        self.note_stacks();
        self.umount_at(&self.mnt());
    }

    /// A test beside that starts a command has our open files in it until the command's program begins: then the mount is busy.
    pub fn umount_at(&self, mountpoint: &Path) {
        let mut tries = 0..50;
        loop {
            let output = self.command(&["umount", mountpoint.to_str().unwrap()]);
            if output.status.success() {
                return;
            }
            let why = String::from_utf8_lossy(&output.stderr);
            assert!(why.contains("files are open") && tries.next().is_some(), "umount: {why}");
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
    }

    /// Checks how much stack the daemon's handlers took, and writes it down for `make test` to tell the most.
    fn note_stacks(&self) {
        // A dead daemon has nothing to tell, and another user's doesn't answer us.
        let Ok(text) = fs::read(self.path(".vexfs/stats.json")) else { return };
        let stats: Value = serde_json::from_slice(&text).unwrap();
        let line = |(what, bytes): (&String, &Value)| {
            let bytes = bytes.as_u64().unwrap();
            assert!(bytes <= MOST_STACK || what == "pool", "{what}: {bytes} bytes of stack");
            format!("{bytes} {what}\n")
        };
        let lines: Vec<String> = stats["stack"].as_object().unwrap().iter().map(line).collect();
        let noted = Path::new(env!("CARGO_TARGET_TMPDIR")).join("stacks");
        fs::File::options()
            .create(true)
            .append(true)
            .open(noted)
            .unwrap()
            .write_all(lines.concat().as_bytes())
            .unwrap();
    }

    pub fn remount(&self) {
        self.umount();
        self.mount();
    }

    pub fn is_mounted(&self) -> bool {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        table.contains(&format!(" {} ", self.mnt().display()))
    }

    /// The daemon, as the volume tells it.
    pub fn pid(&self) -> i32 {
        self.stats("")["pid"].as_i64().unwrap() as i32
    }

    /// Ends the daemon as a crash does, and clears the dead mount away.
    pub fn kill(&self) {
        let pid = rustix::process::Pid::from_raw(self.pid()).unwrap();
        let fd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
        rustix::process::pidfd_send_signal(&fd, rustix::process::Signal::KILL).unwrap();
        let mut fds = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
        rustix::event::poll(&mut fds, None).unwrap();
        rustix::mount::unmount(self.mnt(), rustix::mount::UnmountFlags::DETACH).unwrap();
    }

    pub fn stats(&self, dir: &str) -> Value {
        let text = fs::read(self.path(dir).join(".vexfs/stats.json")).unwrap();
        serde_json::from_slice(&text).unwrap()
    }

    /// The reason why a file isn't indexed.
    pub fn error_of(&self, name: &str) -> Option<(i64, String)> {
        let stats = self.stats("");
        let errors = stats["errors"].as_array().unwrap();
        let error = errors.iter().find(|error| error["path"] == name)?;
        Some((error["errno"].as_i64().unwrap(), error["error"].as_str().unwrap().to_owned()))
    }

    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        fs::write(self.path(name), content).unwrap_or_else(|error| panic!("{name}: {error}"));
    }

    pub fn ask(&self, dir: &str, request: &Value) -> Value {
        ask(&self.path(dir), request)
    }

    /// Paths of the hits, nearest first.
    pub fn near(&self, dir: &str, vector: &[f32], k: usize) -> Vec<String> {
        paths(&self.ask(dir, &json!({ "vector": vector, "k": k })))
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        if self.is_mounted() {
            if !std::thread::panicking() {
                self.note_stacks();
            }
            // Also after a failed test: files may still be open.
            if let Err(error) = rustix::mount::unmount(self.mnt(), rustix::mount::UnmountFlags::DETACH) {
                eprintln!("{} stays mounted: {error}", self.mnt().display());
            }
        }
    }
}

pub fn ask(dir: &Path, request: &Value) -> Value {
    let mut file = fs::File::options().read(true).write(true).open(dir.join(".vexfs/query")).unwrap();
    file.write_all(format!("{request}\n").as_bytes()).unwrap();
    let mut answer = Vec::new();
    file.read_to_end(&mut answer).unwrap();
    serde_json::from_slice(&answer).unwrap()
}

pub fn paths(answer: &Value) -> Vec<String> {
    let hits = answer["hits"].as_array().unwrap_or_else(|| panic!("{answer}"));
    hits.iter().map(|hit| hit["path"].as_str().unwrap().to_owned()).collect()
}

/// The text of a `.vec`.
pub fn text(vector: &[f32]) -> String {
    vector.iter().map(f32::to_string).collect::<Vec<_>>().join(",")
}

/// Numbers that look random and are the same each time.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() >> 16) as usize % n
    }

    pub fn vector(&mut self, dimension: usize) -> Vec<f32> {
        (0..dimension).map(|_| (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0).collect()
    }
}

/// The bytes of a `.npy` (version 1) of f32 rows.
pub fn npy(rows: &[Vec<f32>]) -> Vec<u8> {
    let data: Vec<u8> = rows.iter().flat_map(|row| le_bytes(row)).collect();
    npy_raw(1, &format!("'descr': '<f4', 'fortran_order': False, 'shape': ({}, {})", rows.len(), rows[0].len()), &data)
}

/// Any `.npy`: version, header fields, data.
pub fn npy_raw(version: u8, fields: &str, data: &[u8]) -> Vec<u8> {
    let header = format!("{{{fields}, }}\n");
    let mut bytes = b"\x93NUMPY".to_vec();
    bytes.extend([version, 0]);
    match version {
        1 => bytes.extend((header.len() as u16).to_le_bytes()),
        _ => bytes.extend((header.len() as u32).to_le_bytes()),
    }
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    bytes
}
