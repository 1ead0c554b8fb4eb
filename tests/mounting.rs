//! Mounting, and how it says no.

use std::fs;
use std::process::Command;

use crate::support::{VEXFS, Volume, is_root, no_fuse, skip};

fn complaint(v: &Volume, source: &str, mnt: &str, more: &[&str]) -> String {
    let output = v.command(&[&["mount", source, mnt], more].concat());
    assert!(!output.status.success(), "{source} {mnt} {more:?} was mounted");
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(text.lines().count(), 1, "one line: {text}");
    text
}

#[test]
fn a_mount_that_cant_be_says_why_in_one_line() {
    let Some(v) = Volume::unmounted(&[]) else { return };
    let (source, mnt) = (v.source(), v.mnt());
    let (source, mnt) = (source.to_str().unwrap(), mnt.to_str().unwrap());
    let top = v.dir.path().to_str().unwrap().to_owned();
    fs::write(format!("{top}/file"), "").unwrap();
    assert!(complaint(&v, &format!("{top}/absent"), mnt, &[]).contains("No such file"));
    assert!(complaint(&v, source, &format!("{top}/absent"), &[]).contains("No such file"));
    assert!(complaint(&v, &format!("{top}/file"), mnt, &[]).contains("not a directory"));
    assert!(complaint(&v, source, &format!("{top}/file"), &[]).contains("not a directory"));
    assert!(complaint(&v, source, &top, &[]).contains("the source lies inside the mountpoint"));
    fs::create_dir(format!("{source}/below")).unwrap();
    assert!(complaint(&v, source, &format!("{source}/below"), &[]).contains("the mountpoint lies inside the source"));
    let state = format!("{source}/below");
    assert!(complaint(&v, source, mnt, &["--state", &state]).contains("the state directory lies inside the source"));
    assert!(complaint(&v, source, mnt, &["-o", "ro,colour=red"]).contains("\"colour=red\" is not an option"));
    v.mount();
    let second = format!("{top}/second");
    fs::create_dir(&second).unwrap();
    assert!(complaint(&v, source, &second, &[]).contains("in use by another process"));
    v.umount();
    fs::write(format!("{source}/.vexfs/volume.toml"), "format = 99\nuuid = \"x\"\n").unwrap();
    assert!(complaint(&v, source, mnt, &[]).contains("format version 99"));
    fs::write(format!("{source}/.vexfs/volume.toml"), "what").unwrap();
    assert!(complaint(&v, source, mnt, &[]).contains("volume.toml"));
}

#[test]
fn umount_of_what_is_no_volume_is_refused() {
    let Some(v) = Volume::unmounted(&[]) else { return };
    let output = v.command(&["umount", v.mnt().to_str().unwrap()]);
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("no VexFS volume is mounted there"));
    v.mount();
    let open = fs::File::open(v.mnt()).unwrap();
    let output = v.command(&["umount", v.mnt().to_str().unwrap()]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("files are open"));
    drop(open);
    v.umount();
    assert!(!v.is_mounted());
}

#[test]
fn sigterm_and_sigint_unmount_cleanly() {
    for signal in [rustix::process::Signal::TERM, rustix::process::Signal::INT] {
        let Some(v) = Volume::new(&[]) else { return };
        v.write("a.vec", "1,2");
        let pid = rustix::process::Pid::from_raw(v.pid()).unwrap();
        let fd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
        rustix::process::pidfd_send_signal(&fd, signal).unwrap();
        let mut fds = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
        rustix::event::poll(&mut fds, None).unwrap();
        assert!(!v.is_mounted());
        v.mount();
        assert_eq!(v.near("", &[1.0, 2.0], 1), ["a.vec"]);
    }
}

#[test]
fn foreground_serves_until_it_is_unmounted() {
    let Some(v) = Volume::unmounted(&[]) else { return };
    let mut child = Command::new(VEXFS).args(["mount", "--foreground"]).args([v.source(), v.mnt()]).spawn().unwrap();
    while !v.is_mounted() {
        assert!(child.try_wait().unwrap().is_none(), "it ended");
        std::thread::yield_now();
    }
    v.write("a.vec", "1,2");
    assert_eq!(v.near("", &[1.0, 2.0], 1), ["a.vec"]);
    assert_eq!(v.pid(), child.id() as i32);
    assert!(keeps_nothing_for_each_thread(&v));
    v.umount();
    assert!(child.wait().unwrap().success());
    v.mount();
    assert!(keeps_nothing_for_each_thread(&v), "in the background");
}

/// Is the daemon's allocator told so?
fn keeps_nothing_for_each_thread(v: &Volume) -> bool {
    let environment = fs::read(format!("/proc/{}/environ", v.pid())).unwrap();
    // glibc takes the value apart in place.
    let environment = String::from_utf8_lossy(&environment);
    ["GLIBC_TUNABLES=", "glibc.malloc.arena_max=1", "glibc.malloc.tcache_count=0"]
        .iter()
        .all(|set| environment.contains(set))
}

/// Each file that the kernel knows takes a descriptor of the daemon's, and the kernel forgets by itself only when memory
/// is short.
#[test]
fn more_files_are_looked_at_than_the_daemon_may_have_open() {
    let Some(v) = Volume::unmounted(&[]) else { return };
    let names: Vec<String> = (0..5_000).map(|n| format!("{}/{n}", n / 500)).collect();
    (0..10).for_each(|dir| fs::create_dir(v.source().join(dir.to_string())).unwrap());
    names.iter().for_each(|name| fs::write(v.source().join(name), name).unwrap());
    let mount = format!("ulimit -n 1000 && exec {VEXFS} mount {} {}", v.source().display(), v.mnt().display());
    // Without the right to raise its limits.
    let mounted = match is_root() {
        true => Command::new("setpriv").args(["--bounding-set", "-sys_resource", "sh", "-c", &mount]).output(),
        false => Command::new("sh").args(["-c", &mount]).output(),
    };
    assert!(mounted.as_ref().is_ok_and(|output| output.status.success()), "{mounted:?}");
    let held = fs::File::open(v.path("3/1500")).unwrap();
    for _ in 0..3 {
        for name in &names {
            assert_eq!(fs::symlink_metadata(v.path(name)).unwrap().len(), name.len() as u64);
        }
    }
    assert!(names.iter().all(|name| fs::read_to_string(v.path(name)).unwrap() == *name));
    let walked = (0..10).flat_map(|dir| fs::read_dir(v.path(&dir.to_string())).unwrap());
    assert_eq!(walked.filter(|entry| entry.as_ref().unwrap().metadata().unwrap().is_file()).count(), names.len());
    // What somebody has open keeps its name.
    let path = fs::read_link(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&held))).unwrap();
    assert_eq!(path, v.path("3/1500"));
    let open = fs::read_dir(format!("/proc/{}/fd", v.pid())).unwrap().count();
    assert!(open < 1_000, "{open}");
}

#[test]
fn systemd_is_told_when_the_mount_answers_goes_on_and_ends() {
    let Some(v) = Volume::unmounted(&[]) else { return };
    let path = v.dir.path().join("notify");
    let socket = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
    let mut child = Command::new(VEXFS)
        .args(["mount", "--foreground"])
        .args([v.source(), v.mnt()])
        .envs([("NOTIFY_SOCKET", path.to_str().unwrap()), ("WATCHDOG_USEC", "30000")])
        .spawn()
        .unwrap();
    let hear = || {
        let mut word = [0; 256];
        let got = socket.recv(&mut word).unwrap();
        String::from_utf8(word[..got].to_vec()).unwrap()
    };
    let mut heard = vec![hear()];
    while !heard.contains(&"READY=1\n".to_owned()) {
        heard.push(hear());
    }
    v.write("a.vec", "1,2");
    for _ in 0..3 {
        while hear() != "WATCHDOG=1\n" {}
    }
    v.umount();
    while hear() != "STOPPING=1\n" {}
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_directory_can_be_mounted_over_itself_and_its_state_kept_elsewhere() {
    let Some(v) = Volume::unmounted(&[]) else { return };
    fs::write(v.source().join("a.vec"), "1,2").unwrap();
    let source = v.source();
    let source = source.to_str().unwrap();
    assert!(v.command(&["mount", source, source]).status.success());
    let found = crate::support::ask(&v.source(), &serde_json::json!({ "vector": [1, 2] }));
    assert_eq!(crate::support::paths(&found), ["a.vec"]);
    v.umount_at(&v.source());

    let state = v.dir.path().join("state");
    let mnt = v.mnt();
    let mounted = v.command(&["mount", source, mnt.to_str().unwrap(), "--state", state.to_str().unwrap()]);
    assert!(mounted.status.success());
    assert_eq!(v.near("", &[1.0, 2.0], 1), ["a.vec"]);
    v.umount();
    assert!(state.join("catalog").exists());
}

#[test]
fn a_read_only_mount_takes_no_writes() {
    let Some(v) = Volume::unmounted(&["-o", "ro"]) else { return };
    fs::write(v.source().join("a.vec"), "1,2").unwrap();
    v.mount();
    let error = fs::write(v.path("b.vec"), "1,2").unwrap_err();
    assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::ROFS.raw_os_error()));
}

#[test]
fn a_normal_user_mounts_through_fusermount_with_the_same_semantics() {
    if no_fuse() || skip(!is_root(), "becoming another user needs root") {
        return;
    }
    let missing = Command::new("fusermount3").arg("-V").output().is_err();
    if skip(missing, "no fusermount3 (Debian: fuse3)") {
        return;
    }
    use std::os::unix::fs::PermissionsExt;
    let open_to_all = fs::metadata("/dev/fuse").unwrap().permissions().mode() & 0o006 == 0o006;
    if skip(!open_to_all, "/dev/fuse is closed to other users (`make test` opens it, as udev does)") {
        return;
    }
    // Root's own test directory is closed to others.
    let program = Command::new("setpriv").args(["--reuid=65534", "--clear-groups", VEXFS, "--version"]).output();
    if skip(!program.is_ok_and(|output| output.status.success()), "others can't run the built program here") {
        return;
    }
    let v = Volume::unmounted(&[]).unwrap().owned_by(65_534);
    v.mount();
    // Without allow_other only its owner enters: write below, ask as the owner does.
    let as_owner = |script: &str| {
        let output = Command::new("setpriv")
            .args(["--reuid=65534", "--regid=65534", "--clear-groups", "sh", "-ec", script])
            .current_dir("/")
            .output()
            .unwrap();
        assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let mnt = v.mnt().display().to_string();
    as_owner(&format!("cd {mnt}; echo 1,2 > a.vec; echo 3,1 > b.vec; mv b.vec c.vec; mkdir d; cp a.vec d/e.vec"));
    let found = as_owner(&format!("{VEXFS} search {mnt} --vector '[3,1]' -k 1 --tsv"));
    assert!(found.trim_end().ends_with("c.vec"), "{found}");
    let status = as_owner(&format!("{VEXFS} status {mnt} --json"));
    assert!(status.contains("\"page cache\""), "{status}");
    as_owner(&format!("{VEXFS} umount {mnt}"));
    assert!(!v.is_mounted());
}

#[test]
fn mount_8_finds_its_helper_and_the_daemon_has_a_log() {
    let Some(v) = Volume::unmounted(&[]) else { return };
    let helper = v.dir.path().join("mount.fuse.vexfs");
    std::os::unix::fs::symlink(VEXFS, &helper).unwrap();
    let mounted = Command::new(&helper)
        .args([v.source(), v.mnt()])
        .args(["-n", "-o", "rw,noauto,nofail,vexfs.strict,vexfs.sync=immediate"])
        .output()
        .unwrap();
    assert!(mounted.status.success(), "{}", String::from_utf8_lossy(&mounted.stderr));
    let stats = v.stats("");
    assert_eq!((&stats["strict"], &stats["sync"]), (&true.into(), &"immediate".into()));
    assert_eq!(stats["panics"], 0);
    let log = fs::read_link(format!("/proc/{}/fd/2", v.pid())).unwrap();
    assert_eq!(log, v.source().join(".vexfs/log"));
    v.umount();
}

#[test]
fn a_mount_is_forced_away_while_files_are_open_and_after_its_daemon_died() {
    let Some(v) = Volume::new(&[]) else { return };
    if skip(!is_root(), "aborting a connection needs root") {
        return;
    }
    let mnt = v.mnt();
    let mnt = mnt.to_str().unwrap();
    let open = fs::File::open(v.mnt()).unwrap();
    let forced = v.command(&["umount", "--force", mnt]);
    assert!(forced.status.success(), "{}", String::from_utf8_lossy(&forced.stderr));
    assert!(!v.is_mounted());
    drop(open);
    let refused = v.command(&["umount", "--force", mnt]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("no VexFS volume is mounted there"));

    // The daemon of the first mount may still be closing the volume.
    let mut tries = 0..3_000;
    loop {
        let mounted = v.try_mount();
        if mounted.status.success() {
            break;
        }
        let why = String::from_utf8_lossy(&mounted.stderr);
        assert!(why.contains("in use") && tries.next().is_some(), "{why}");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let pid = rustix::process::Pid::from_raw(v.pid()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    while fs::metadata(v.mnt()).is_ok() {
        std::thread::yield_now();
    }
    let status = v.command(&["status"]);
    assert!(String::from_utf8_lossy(&status.stdout).contains("vexfs umount --force"), "{status:?}");
    assert!(v.command(&["umount", "--force", mnt]).status.success());
    assert!(!v.is_mounted());
}
