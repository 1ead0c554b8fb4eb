//! Shared mounts: who may do what, and what a search may tell whom.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;

use rustix::fs::{Access, CWD, Mode, OFlags, XattrFlags};
use rustix::io::Errno;
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
use serde_json::{Value, json};

use crate::support::{Random, Volume, ask, is_root, paths, skip, text};

#[derive(Clone, Debug)]
struct User {
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
}

impl User {
    /// Does `work` as this user, on a thread of its own.
    fn act<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let as_user = || {
                let groups: Vec<_> = self.groups.iter().map(|group| rustix::process::Gid::from_raw(*group)).collect();
                let gid = rustix::process::Gid::from_raw(self.gid);
                let uid = rustix::process::Uid::from_raw(self.uid);
                set_thread_groups(&groups).unwrap();
                set_thread_res_gid(gid, gid, gid).unwrap();
                set_thread_res_uid(uid, uid, uid).unwrap();
                work()
            };
            scope.spawn(as_user).join().unwrap()
        })
    }
}

fn shared() -> Option<Volume> {
    if skip(!is_root(), "other users need root") {
        return None;
    }
    Volume::new(&["-o", "allow_other,suid"])
}

const ACCESS: &str = "system.posix_acl_access";
const DEFAULT: &str = "system.posix_acl_default";

/// An access control list as the kernel takes it: (tag, permissions, id).
fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut bytes = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(permissions.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

const NOBODY: u32 = u32::MAX;

/// The owner may all, one user and one group may what is said, others nothing.
fn acl_for(user: (u32, u16), group: (u32, u16)) -> Vec<u8> {
    acl(&[
        (0x01, 7, NOBODY),
        (0x02, user.1, user.0),
        (0x04, 0, NOBODY),
        (0x08, group.1, group.0),
        (0x10, 7, NOBODY),
        (0x20, 0, NOBODY),
    ])
}

fn xattr(path: &Path, name: &str) -> Option<Vec<u8>> {
    let mut value = Vec::with_capacity(4096);
    match rustix::fs::getxattr(path, name, rustix::buffer::spare_capacity(&mut value)) {
        Ok(_) => Some(value),
        Err(_) => None,
    }
}

#[test]
fn access_control_lists_are_kept_inherited_and_enforced() {
    let Some(v) = shared() else { return };
    let native = v.dir.path().join("native");
    fs::create_dir(&native).unwrap();
    let user = User { uid: 61_001, gid: 61_001, groups: vec![] };
    let member = User { uid: 61_002, gid: 61_002, groups: vec![61_100] };
    let stranger = User { uid: 61_003, gid: 61_003, groups: vec![61_101] };
    // The same on the source file system and on the mount: what comes of it must be equal.
    let outcome = |top: &Path| {
        let dir = top.join("dir");
        fs::create_dir(&dir).unwrap();
        fs::set_permissions(&dir, PermissionsExt::from_mode(0o755)).unwrap();
        let file = dir.join("f");
        fs::write(&file, "x").unwrap();
        fs::set_permissions(&file, PermissionsExt::from_mode(0o600)).unwrap();
        let list = acl_for((user.uid, 4), (61_100, 6));
        match rustix::fs::setxattr(&file, ACCESS, &list, XattrFlags::empty()) {
            Err(Errno::OPNOTSUPP) => return None,
            done => done.unwrap(),
        }
        let mut seen: Vec<String> = Vec::new();
        for who in [&user, &member, &stranger] {
            let (read, write) =
                who.act(|| (File::open(&file).is_ok(), File::options().write(true).open(&file).is_ok()));
            seen.push(format!("{who:?}: {read} {write}"));
        }
        // A default list counts, and the umask doesn't; without one it is the other way round.
        rustix::fs::setxattr(&dir, DEFAULT, &acl_for((user.uid, 7), (61_100, 5)), XattrFlags::empty()).unwrap();
        let output = std::process::Command::new("sh")
            .args(["-ec", "umask 077; echo > below; mkdir sub; mkfifo pipe; cd ..; echo > plain; mkdir other"])
            .current_dir(&dir)
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        for name in ["dir/f", "dir/below", "dir/sub", "dir/pipe", "plain", "other"] {
            let path = top.join(name);
            let mode = fs::metadata(&path).unwrap().mode();
            seen.push(format!("{name} {mode:o} {:?} {:?}", xattr(&path, ACCESS), xattr(&path, DEFAULT)));
        }
        // Somebody outside the file's group who sets a list loses the set-group-id bit.
        let mine = top.join("mine");
        fs::write(&mine, "").unwrap();
        chown(&mine, Some(user.uid), Some(61_100)).unwrap();
        fs::set_permissions(&mine, PermissionsExt::from_mode(0o2775)).unwrap();
        user.act(|| rustix::fs::setxattr(&mine, ACCESS, &list, XattrFlags::empty())).unwrap();
        seen.push(format!("{:o}", fs::metadata(&mine).unwrap().mode()));
        fs::set_permissions(&file, PermissionsExt::from_mode(0o640)).unwrap();
        seen.push(format!("{:?}", xattr(&file, ACCESS)));
        Some(seen)
    };
    let below = outcome(&native);
    if skip(below.is_none(), "the file system of the temporary directory has no access control lists") {
        return;
    }
    fs::set_permissions(v.dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
    assert_eq!(outcome(&v.mnt()), below);
}

/// Without the kernel's checks: a mount that is not shared asks for less.
#[test]
fn where_only_root_may_enter_modes_and_lists_are_the_sources_all_the_same() {
    if skip(!is_root(), "for others the kernel checks") {
        return;
    }
    let Some(v) = Volume::new(&[]) else { return };
    let mounted = || {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        mounts.lines().find(|line| line.contains(v.mnt().to_str().unwrap())).unwrap().to_owned()
    };
    assert!(!mounted().contains("default_permissions"), "{}", mounted());
    let outcome = |top: &Path| {
        let mut seen: Vec<String> = Vec::new();
        for mode in [0o000, 0o100, 0o644, 0o001] {
            let script = top.join(format!("script-{mode:o}"));
            fs::write(&script, "#!/bin/sh\nexit 7\n").unwrap();
            fs::set_permissions(&script, PermissionsExt::from_mode(mode)).unwrap();
            let ran = std::process::Command::new(&script).status().map(|status| status.code());
            seen.push(format!("{mode:o} runs {:?}", ran.map_err(|error| error.kind())));
            for access in [Access::EXISTS, Access::READ_OK, Access::WRITE_OK, Access::EXEC_OK] {
                seen.push(format!("{mode:o} {access:?} {:?}", rustix::fs::access(&script, access)));
            }
        }
        let dir = top.join("dir");
        fs::create_dir(&dir).unwrap();
        let list = acl_for((61_001, 4), (61_100, 6));
        if rustix::fs::setxattr(&dir, DEFAULT, &list, XattrFlags::empty()) == Err(Errno::OPNOTSUPP) {
            return seen;
        }
        let script = "umask 077; echo > below; mkdir sub; cd ..; echo > plain; mkdir other";
        let made = std::process::Command::new("sh").args(["-ec", script]).current_dir(&dir).status().unwrap();
        assert!(made.success());
        fs::set_permissions(dir.join("below"), PermissionsExt::from_mode(0o604)).unwrap();
        for name in ["dir", "dir/below", "dir/sub", "plain", "other"] {
            let path = top.join(name);
            let mode = fs::metadata(&path).unwrap().mode();
            seen.push(format!("{name} {mode:o} {:?} {:?}", xattr(&path, ACCESS), xattr(&path, DEFAULT)));
        }
        seen
    };
    let native = v.dir.path().join("native");
    fs::create_dir(&native).unwrap();
    assert_eq!(outcome(&v.mnt()), outcome(&native));
    v.umount();
    let options = ["mount", "-o", "default_permissions", v.source().to_str().unwrap(), v.mnt().to_str().unwrap()]
        .map(str::to_owned);
    assert!(v.command(&options.each_ref().map(String::as_str)).status.success());
    assert!(mounted().contains("default_permissions"), "{}", mounted());
}

#[test]
fn a_strangers_write_takes_set_id_bits_away() {
    // Under passthrough the kernel neither takes them away nor tells us of the write: a file that its group may write
    // would stay set-uid with a stranger's bytes in it.
    let Some(v) = shared() else { return };
    let stranger = User { uid: 61_003, gid: 61_003, groups: vec![] };
    let path = v.path("f");
    let mode = || fs::metadata(&path).unwrap().mode() & 0o7777;
    let give = |mode| fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
    v.write("f", "old");
    give(0o6777);
    v.write("f", "root's own");
    assert_eq!(mode() & 0o777, 0o777);
    give(0o6777);
    stranger.act(|| {
        let mut file = File::options().write(true).open(&path).unwrap();
        assert_eq!(file.metadata().unwrap().mode() & 0o7777, 0o6777, "opening changes nothing");
        file.write_all(b"new").unwrap();
        assert_eq!(file.metadata().unwrap().mode() & 0o7777, 0o777, "seen at once");
    });
    assert_eq!(mode(), 0o777);
    assert_eq!(fs::metadata(v.source().join("f")).unwrap().mode() & 0o7777, 0o777);
    // Given while the stranger has it open: they stay until the next write.
    let (ready, given) = (std::sync::Barrier::new(2), std::sync::Barrier::new(2));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            stranger.act(|| {
                let mut file = File::options().write(true).open(&path).unwrap();
                file.write_all(b"1").unwrap();
                ready.wait();
                given.wait();
                assert_eq!(file.metadata().unwrap().mode() & 0o7777, 0o4777);
                // File times have the resolution of the kernel's tick.
                std::thread::sleep(std::time::Duration::from_millis(20));
                file.write_all(b"2").unwrap();
            });
        });
        ready.wait();
        give(0o4777);
        given.wait();
    });
    assert_eq!(fs::metadata(v.source().join("f")).unwrap().mode() & 0o7777, 0o777, "gone when close(2) returned");
    let other_ways: [(&str, Act); 3] = [
        ("truncate", |path| rustix::fs::open(path, OFlags::WRONLY | OFlags::TRUNC, Mode::empty()).map(drop)),
        ("ftruncate", |path| rustix::fs::ftruncate(rustix::fs::open(path, OFlags::WRONLY, Mode::empty())?, 1)),
        ("fallocate", |path| {
            let file = rustix::fs::open(path, OFlags::WRONLY, Mode::empty())?;
            rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, 100)
        }),
    ];
    for (name, act) in other_ways {
        give(0o6777);
        stranger.act(|| act(&path)).unwrap();
        assert_eq!(mode(), 0o777, "{name}");
    }
}

type Act = fn(&Path) -> rustix::io::Result<()>;

#[test]
fn what_cant_be_read_is_not_told_of() {
    let Some(v) = shared() else { return };
    fs::create_dir(v.path("hidden")).unwrap();
    v.write("hidden/.vexfs.toml", "metric = \"l2\"\n");
    v.write("hidden/three.vec", "1,2,3");
    v.write("hidden/two.vec#1", "");
    v.write("secret#x", "");
    v.write("open.vec", "1,2");
    v.write("hidden/bad.vec", "1,nan");
    for name in ["hidden", "secret#x"] {
        fs::set_permissions(v.path(name), PermissionsExt::from_mode(0o700)).unwrap();
    }
    let stranger = User { uid: 61_003, gid: 61_003, groups: vec![] };
    let mnt = v.mnt();
    let asked = |request: Value| stranger.act(|| ask(&mnt, &request));
    // A collection of which nothing can be read is none: neither its dimension nor its name stands in an error.
    assert_eq!(v.ask("", &json!({ "vector": [1, 2, 3, 4] }))["error"]["code"], "EMSGSIZE");
    let said = |vector: Value| asked(json!({ "vector": vector }))["error"]["message"].as_str().unwrap().to_owned();
    assert_eq!(said(json!([1, 2, 3])), said(json!([9, 9, 9, 9])).replace("has 4", "has 3"));
    assert_eq!(paths(&asked(json!({ "vector": [1, 2] }))), ["open.vec"]);
    let answer = asked(json!({ "like": "open.vec" }));
    assert!(answer.get("distances").is_none_or(Value::is_null), "{answer}");
    // Names.
    for (there, absent) in [("secret#x", "absent#x"), ("hidden/three.vec", "hidden/none.vec")] {
        let code = |name: &str| asked(json!({ "like": name }))["error"]["code"].clone();
        assert_eq!(code(there), code(absent), "{there}");
    }
    // Counts.
    let stats: Value = stranger
        .act(|| fs::read(mnt.join(".vexfs/stats.json")).map(|text| serde_json::from_slice(&text).unwrap()))
        .unwrap();
    for key in ["files", "pending", "collections", "last_error"] {
        assert!(stats.get(key).is_none(), "{key}: {stats}");
    }
    assert_eq!(stats["errors"], json!([]));
}

/// Random users, modes, lists, owners and places: results are what `open(2)` allows, all of it, nearest first.
#[test]
fn searches_tell_of_what_open_allows_and_of_all_of_it() {
    let Some(v) = shared() else { return };
    let cases: usize = std::env::var("VEXFS_LEAK_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(400);
    let mut random = Random(0x5eed);
    let users: Vec<User> = (0..6)
        .map(|n| User {
            uid: 61_000 + n,
            gid: 62_000 + n % 3,
            groups: (0..3).filter(|group| (n + group) % 2 == 0).map(|group| 63_000 + group).collect(),
        })
        .collect();
    let dirs = ["", "a", "a/b", "c"];
    for dir in &dirs[1..] {
        fs::create_dir(v.path(dir)).unwrap();
    }
    // Where each file is now, and its vector.
    let mut files: BTreeMap<String, Vec<f32>> = BTreeMap::new();
    for n in 0..40 {
        let name = format!("{}/f{n}.vec", dirs[n % dirs.len()]).trim_start_matches('/').to_owned();
        let vector = random.vector(3);
        v.write(&name, text(&vector));
        files.insert(name, vector);
    }
    let mut shown = 0;
    for case in 0..cases {
        // Between the index and the question something changes.
        for _ in 0..2 {
            let at = random.below(files.len());
            let name = files.keys().nth(at).unwrap().clone();
            let target = match random.below(4) {
                0 => dirs[1 + random.below(dirs.len() - 1)].to_owned(),
                _ => name.clone(),
            };
            let path = v.path(&target);
            let directory = path.is_dir();
            match random.below(5) {
                0 => {
                    let mode = random.below(0o1000) as u32;
                    fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
                }
                1 => {
                    let mode = if directory { 0o755 } else { 0o644 };
                    fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
                }
                2 => {
                    let (user, group) = (61_000 + random.below(6) as u32, 63_000 + random.below(3) as u32);
                    chown(&path, Some(user), Some(group)).unwrap();
                }
                3 => {
                    let permissions = |random: &mut Random| random.below(8) as u16;
                    let (one, other) = (permissions(&mut random), permissions(&mut random));
                    let list =
                        acl_for((61_000 + random.below(6) as u32, one), (63_000 + random.below(3) as u32, other));
                    match rustix::fs::setxattr(&path, ACCESS, &list, XattrFlags::empty()) {
                        Ok(()) | Err(Errno::OPNOTSUPP) => {}
                        Err(errno) => panic!("{target}: {errno}"),
                    }
                }
                _ => {
                    let file = name.rsplit('/').next().unwrap().to_owned();
                    let to = format!("{}/{file}", dirs[random.below(dirs.len())]).trim_start_matches('/').to_owned();
                    if to != name {
                        rustix::fs::renameat(CWD, v.path(&name), CWD, v.path(&to)).unwrap();
                        let vector = files.remove(&name).unwrap();
                        files.insert(to, vector);
                    }
                }
            }
        }
        let user = &users[random.below(users.len())];
        let query = random.vector(3);
        let k = 1 + random.below(45);
        let mnt = v.mnt();
        let (answer, open) = user.act(|| {
            let answer = ask(&mnt, &json!({ "vector": query, "k": k, "exact": case % 2 == 0 }));
            let open: Vec<&String> = files.keys().filter(|name| File::open(mnt.join(name)).is_ok()).collect();
            (answer, open)
        });
        let cosine = |vector: &[f32]| {
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| f64::from(x * y)).sum::<f64>();
            dot(vector, &query) / (dot(vector, vector) * dot(&query, &query)).sqrt()
        };
        let mut wanted: Vec<(f64, &String)> = open.iter().map(|name| (cosine(&files[*name]), *name)).collect();
        wanted.sort_by(|a, b| b.0.total_cmp(&a.0));
        let found = paths(&answer);
        let hidden: Vec<&String> = found.iter().filter(|path| !open.contains(path)).collect();
        assert!(hidden.is_empty(), "case {case}, {user:?}: {hidden:?} can't be opened");
        assert_eq!(found.len(), k.min(wanted.len()), "case {case}, {user:?}, k {k}: {found:?} of {wanted:?}");
        for (path, (nearness, name)) in found.iter().zip(&wanted) {
            // Two that are as near but for rounding may change places.
            let near = (cosine(&files[path]) - nearness).abs() < 1e-5;
            assert!(near, "case {case}, {user:?}, k {k}: {path} where {name} is nearer");
        }
        shown += found.len();
    }
    assert!(shown > cases, "{shown} hits in {cases} cases: hardly anything was readable");
    eprintln!("{cases} cases, {shown} hits");
}
