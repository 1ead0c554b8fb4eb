//! A disk or a quota that is full: the errno passes, reads and searches go on, and writes resume when there is space again.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::Command;

use rustix::io::Errno;

use crate::support::{Random, Volume, is_root, npy, skip, text};

/// A small file system of its own, mounted over a volume's source until it is dropped.
pub struct SmallDisk(std::path::PathBuf);

impl SmallDisk {
    pub fn new(kind: &str, megabytes: u64, image: &Path, mountpoint: &Path) -> Option<SmallDisk> {
        File::create(image).unwrap().set_len(megabytes << 20).unwrap();
        let made = Command::new(format!("mkfs.{kind}")).arg("-q").arg(image).output();
        if skip(!made.is_ok_and(|output| output.status.success()), &format!("no mkfs.{kind}")) {
            return None;
        }
        let mounted = Command::new("mount").args(["-o", "loop"]).arg(image).arg(mountpoint).output().unwrap();
        if skip(!mounted.status.success(), &String::from_utf8_lossy(&mounted.stderr)) {
            return None;
        }
        Some(SmallDisk(mountpoint.to_owned()))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        if let Err(error) = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH) {
            eprintln!("{} stays mounted: {error}", self.0.display());
        }
    }
}

fn synced(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// `full`: the errno to expect, of a disk or of a quota.
fn a_full_disk(kind: &str, megabytes: u64, full: Errno) {
    if skip(!is_root(), "a file system of its own needs root") {
        return;
    }
    let Some(v) = Volume::unmounted(&[]) else { return };
    let Some(_disk) = SmallDisk::new(kind, megabytes, &v.dir.path().join("image"), &v.source()) else { return };
    if full == Errno::DQUOT {
        for args in [&["quota", "enable"][..], &["qgroup", "limit", "24M"]] {
            let output = Command::new("btrfs").args(args).arg(v.source()).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
    }
    v.mount();
    let mut random = Random(5);
    let rows: Vec<Vec<f32>> = (0..9_000).map(|_| random.vector(16)).collect();
    v.write("bulk.npy", npy(&rows));
    let filler = v.source().join("filler");
    let mut file = File::create(&filler).unwrap();
    let full = Some(full.raw_os_error());
    let mut fill = || {
        let mut step = vec![0u8; 1 << 20];
        while !step.is_empty() {
            match file.write_all(&step) {
                Ok(()) => {}
                Err(error) => {
                    assert_eq!(error.raw_os_error(), full);
                    step.truncate(step.len() / 2);
                }
            }
        }
        file.sync_all().unwrap_or_else(|error| assert_eq!(error.raw_os_error(), full));
    };
    let mut refused = 0;
    for n in 0..40 {
        if refused == 0 {
            // What was set aside for other files, or freed by the index, comes back after a while.
            fill();
        }
        let vectors: Vec<Vec<f32>> = (0..200).map(|_| random.vector(16)).collect();
        if let Err(error) = synced(&v.path(&format!("more{n}.npy")), &npy(&vectors)) {
            assert_eq!(error.raw_os_error(), full, "{kind}");
            refused += 1;
        }
        // Reads and searches go on.
        let row = random.below(rows.len());
        let answer = v.ask("", &serde_json::json!({ "vector": rows[row], "k": 1, "exact": true }));
        assert_eq!(answer["hits"][0]["row"], row, "{kind}: {answer}");
        assert_eq!(fs::read(v.path("bulk.npy")).unwrap().len(), npy(&rows).len());
    }
    assert!(refused > 0, "{kind} was not full");
    drop(file);
    fs::remove_file(&filler).unwrap();
    let new = random.vector(16);
    synced(&v.path("new.vec"), text(&new).as_bytes()).unwrap();
    assert_eq!(v.near("", &new, 1), ["new.vec"], "{kind}");
    let mnt = v.mnt();
    // What failed while there was no space is tried again.
    let mut output = v.command(&["sync", mnt.to_str().unwrap(), "--indexed"]);
    for _ in 0..20 {
        if output.status.success() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(200));
        output = v.command(&["sync", mnt.to_str().unwrap(), "--indexed"]);
    }
    assert!(output.status.success(), "{kind}: {}", String::from_utf8_lossy(&output.stderr));
    v.umount();
    let source = v.source();
    let output = v.command(&["check", source.to_str().unwrap()]);
    assert!(output.status.success(), "{kind}: {}", String::from_utf8_lossy(&output.stdout));
}

#[test]
fn on_a_full_ext4_searches_go_on_and_writes_resume() {
    a_full_disk("ext4", 24, Errno::NOSPC);
}

#[test]
fn on_a_full_xfs_searches_go_on_and_writes_resume() {
    a_full_disk("xfs", 320, Errno::NOSPC);
}

#[test]
fn on_a_full_btrfs_searches_go_on_and_writes_resume() {
    a_full_disk("btrfs", 160, Errno::NOSPC);
}

#[test]
fn past_a_quota_searches_go_on_and_writes_resume() {
    // Btrfs counts quotas by itself; those of ext4 and XFS need a kernel that was built with them.
    a_full_disk("btrfs", 160, Errno::DQUOT);
}

/// A large file's rows wait for their segment on the disk where memory is short. Of one that there is no room for the status
/// says so, and it is found when there is room, though nobody touches it.
#[test]
fn a_file_that_the_state_directory_has_no_room_for_is_indexed_when_it_has() {
    if skip(!is_root(), "a file system of its own needs root") {
        return;
    }
    let state = tempfile::tempdir().unwrap();
    let Some(v) = Volume::unmounted(&["--memory", "3M", "--state", state.path().to_str().unwrap()]) else { return };
    let Some(_disk) = SmallDisk::new("ext4", 24, &v.dir.path().join("image"), state.path()) else { return };
    v.mount();
    v.write("small.vec", text(&Random(6).vector(64)));
    let filler = state.path().join("filler");
    fs::write(&filler, vec![1u8; 15 << 20]).unwrap();
    let mut random = Random(7);
    let rows: Vec<Vec<f32>> = (0..40_000).map(|_| random.vector(64)).collect();
    v.write("large.npy", npy(&rows));
    let (errno, reason) = v.error_of("large.npy").unwrap();
    assert_eq!(errno, i64::from(Errno::NOSPC.raw_os_error()), "{reason}");
    assert_eq!(v.near("", &rows[7], 1), ["small.vec"]);
    fs::remove_file(&filler).unwrap();
    for _ in 0..150 {
        if v.near("", &rows[7], 1) == ["large.npy"] {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(200));
    }
    panic!("{:?}", v.error_of("large.npy"));
}
