//! Changes of the source beneath the mount.

use std::ffi::CString;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use rustix::fs::XattrFlags;
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::process::{Pid, Signal, kill_process};

use crate::disks::SmallDisk;
use crate::support::{Volume, is_root, le_bytes, skip, text};

/// Waits for what comes soon, and fails if it doesn't come at all.
fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    for _ in 0..3_000 {
        if is_so() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("never came: {what}");
}

/// Also from one file system to another.
fn move_tree(from: &Path, to: &Path) {
    let moved = Command::new("mv").args([from, to]).output().unwrap();
    assert!(moved.status.success(), "{}", String::from_utf8_lossy(&moved.stderr));
}

/// The first walk is over: how the source is followed then.
fn followed(v: &Volume) -> String {
    let mut how = String::new();
    eventually("the first walk's end", || {
        how = v.stats("")["beneath"].as_str().unwrap().to_owned();
        how != "walking"
    });
    how
}

#[test]
fn what_changes_beneath_is_found_while_mounted() {
    let Some(v) = Volume::new(&[]) else { return };
    let how = followed(&v);
    // The privileged are told by the file system, where it has handles.
    assert!(["fanotify", "inotify"].contains(&how.as_str()), "{how}");
    changes_beneath_are_found(&v);
}

#[test]
fn what_changes_beneath_is_found_by_handles_on_xfs_and_btrfs() {
    for kind in ["xfs", "btrfs"] {
        let Some(v) = Volume::unmounted(&[]) else { return };
        if skip(!is_root(), "a file system of its own needs root") {
            return;
        }
        let Some(_disk) = SmallDisk::new(kind, 320, &v.dir.path().join("image"), &v.source()) else { return };
        v.mount();
        assert_eq!(followed(&v), "fanotify", "{kind}");
        changes_beneath_are_found(&v);
        v.umount();
    }
}

/// An overlay has no file handles unless asked, so each directory is watched, as for those who aren't privileged.
#[test]
fn what_changes_beneath_is_found_by_directories_on_an_overlay() {
    let Some(v) = Volume::unmounted(&[]) else { return };
    if skip(!is_root(), "a file system of its own needs root") {
        return;
    }
    let Some(_disk) = SmallDisk::new("ext4", 64, &v.dir.path().join("image"), &v.source()) else { return };
    let dirs = ["lower", "upper", "work"].map(|name| v.source().join(name));
    dirs.iter().for_each(|dir| fs::create_dir(dir).unwrap());
    let [lower, upper, work] = dirs.map(|dir| dir.display().to_string());
    let options = CString::new(format!("lowerdir={lower},upperdir={upper},workdir={work}")).unwrap();
    rustix::mount::mount("overlay", v.source(), "overlay", MountFlags::empty(), Some(options.as_c_str())).unwrap();
    v.mount();
    assert_eq!(followed(&v), "inotify");
    changes_beneath_are_found(&v);
    v.umount();
    // As long as a command that a test beside starts has our open files in it, it is busy.
    eventually("nobody holds the source", || rustix::mount::unmount(v.source(), UnmountFlags::empty()).is_ok());
}

fn changes_beneath_are_found(v: &Volume) {
    let near = |numbers: &[f32]| v.near("", numbers, 1);
    let beneath = |name: &str| v.source().join(name);
    v.write("a.vec", text(&[1.0, 0.0, 0.0]));
    fs::write(beneath("b.vec"), text(&[0.0, 1.0, 0.0])).unwrap();
    eventually("a new file", || near(&[0.0, 1.0, 0.0]) == ["b.vec"]);
    fs::write(beneath("a.vec"), text(&[0.0, 0.0, 1.0])).unwrap();
    eventually("other bytes", || near(&[0.0, 0.0, 1.0]) == ["a.vec"]);
    fs::rename(beneath("b.vec"), beneath("c.vec")).unwrap();
    eventually("another name", || near(&[0.0, 1.0, 0.0]) == ["c.vec"]);

    // A tree that comes as a whole, and what is then made in it.
    let outside = v.dir.path().join("outside");
    fs::create_dir_all(outside.join("deep")).unwrap();
    fs::write(outside.join("deep/d.vec"), text(&[1.0, 1.0, 0.0])).unwrap();
    move_tree(&outside, &beneath("tree"));
    eventually("a tree", || near(&[1.0, 1.0, 0.0]) == ["tree/deep/d.vec"]);
    fs::write(beneath("tree/deep/e.vec"), text(&[1.0, 0.0, 1.0])).unwrap();
    eventually("a file in it", || near(&[1.0, 0.0, 1.0]) == ["tree/deep/e.vec"]);
    fs::rename(beneath("tree/deep"), beneath("moved")).unwrap();
    eventually("a directory elsewhere", || near(&[1.0, 0.0, 1.0]) == ["moved/e.vec"]);
    fs::write(beneath("moved/f.vec"), text(&[-1.0, 0.0, 0.0])).unwrap();
    eventually("a file there", || near(&[-1.0, 0.0, 0.0]) == ["moved/f.vec"]);

    // What is gone leaves nothing behind.
    let indexed = || v.stats("")["files"]["indexed"].as_u64().unwrap();
    assert_eq!(indexed(), 5);
    fs::remove_file(beneath("c.vec")).unwrap();
    eventually("a file's end", || indexed() == 4);
    move_tree(&beneath("moved"), &outside);
    eventually("a directory's end", || indexed() == 1);
    fs::write(outside.join("g.vec"), text(&[1.0, 1.0, 1.0])).unwrap();

    // Settings, and a vector attached to a plain file.
    fs::write(beneath(".vexfs.toml"), "metric = \"l2\"\n").unwrap();
    eventually("settings", || v.stats("")["collections"][0]["metric"] == "l2");
    fs::write(beneath("photo.jpg"), "a photograph").unwrap();
    let attribute = "user.vexfs.embedding.f32";
    rustix::fs::setxattr(beneath("photo.jpg"), attribute, &le_bytes(&[0.0, 5.0, 0.0]), XattrFlags::empty()).unwrap();
    eventually("an attached vector", || near(&[0.0, 5.0, 0.0]) == ["photo.jpg"]);
    rustix::fs::removexattr(beneath("photo.jpg"), attribute).unwrap();
    eventually("its end", || v.stats("")["files"]["attached"] == 0);
    assert_eq!(v.near("", &[1.0, 1.0, 1.0], 9), ["a.vec"], "and nothing from outside");
}

#[test]
fn changes_through_the_mount_are_no_news_from_beneath() {
    let Some(v) = Volume::new(&[]) else { return };
    followed(&v);
    for n in 0..200 {
        let at = |name: String| v.path(&name);
        v.write(&format!("{n}.vec"), text(&[n as f32, 1.0]));
        fs::create_dir(at(format!("dir{n}"))).unwrap();
        fs::rename(at(format!("{n}.vec")), at(format!("dir{n}/{n}.vec"))).unwrap();
        fs::rename(at(format!("dir{n}")), at(format!("there{n}"))).unwrap();
        fs::set_permissions(at(format!("there{n}/{n}.vec")), fs::Permissions::from_mode(0o600)).unwrap();
    }
    // What comes after it in the queue has been looked at: so have they.
    fs::write(v.source().join("last.vec"), text(&[-1.0, 0.0])).unwrap();
    eventually("the last", || v.near("", &[-1.0, 0.0], 1) == ["last.vec"]);
    let stats = v.stats("");
    assert_eq!((&stats["files"]["indexed"], &stats["collections"][0]["points"]), (&201.into(), &201.into()), "{stats}");
    assert_eq!(v.near("there7", &[0.0, 1.0], 9), ["7.vec"]);
}

/// The kernel keeps 16,384 events: more are lost, and it says so.
#[test]
fn lost_events_make_a_walk() {
    let Some(v) = Volume::new(&[]) else { return };
    followed(&v);
    let daemon = Pid::from_raw(v.pid()).unwrap();
    kill_process(daemon, Signal::STOP).unwrap();
    let most: usize = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").unwrap().trim().parse().unwrap();
    for n in 0..most / 2 + 10 {
        fs::write(v.source().join(format!("{n}.txt")), "").unwrap();
    }
    fs::write(v.source().join("unheard.vec"), text(&[1.0, 2.0])).unwrap();
    kill_process(daemon, Signal::CONT).unwrap();
    eventually("what was not told of", || v.near("", &[1.0, 2.0], 1) == ["unheard.vec"]);
}

#[test]
fn an_exclusive_mount_keeps_names_and_trusts() {
    let Some(v) = Volume::new(&["--exclusive"]) else { return };
    assert_eq!(followed(&v), "trusted");
    v.write("here.txt", "");
    assert!(!v.path("missing.txt").exists() && v.path("here.txt").exists());
    fs::remove_file(v.source().join("here.txt")).unwrap();
    fs::write(v.source().join("missing.txt"), "").unwrap();
    // Longer than any other mount keeps a name.
    std::thread::sleep(Duration::from_millis(1_200));
    assert!(!v.path("missing.txt").exists(), "that there was nothing is kept");
    // Through the mount all is seen.
    v.write("missing.vec", text(&[1.0, 2.0]));
    assert_eq!(v.near("", &[1.0, 2.0], 1), ["missing.vec"]);
    fs::rename(v.path("missing.vec"), v.path("other.vec")).unwrap();
    assert!(!v.path("missing.vec").exists() && v.path("other.vec").exists());
}
