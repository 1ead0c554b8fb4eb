//! Checking, repairing, rebuilding, compacting and copying a volume; kills and disks that are full.

use std::fs;
use std::path::PathBuf;

use rustix::fs::XattrFlags;

use crate::support::{Random, VEXFS, Volume, le_bytes, no_rsync, npy, text};

const ROWS: usize = 9_000;

fn rows(seed: u64) -> Vec<Vec<f32>> {
    let mut random = Random(seed);
    (0..ROWS).map(|_| random.vector(16)).collect()
}

fn segments(v: &Volume) -> Vec<PathBuf> {
    let entries = fs::read_dir(v.source().join(".vexfs/segments")).unwrap();
    entries.map(|entry| entry.unwrap().path()).collect()
}

/// What a search for a row finds first: path and row.
fn first(v: &Volume, vector: &[f32]) -> Option<(String, u64)> {
    let answer = v.ask("", &serde_json::json!({ "vector": vector, "k": 1, "exact": true }));
    let hit = answer["hits"].as_array()?.first()?;
    Some((hit["path"].as_str()?.to_owned(), hit["row"].as_u64()?))
}

fn check(v: &Volume, args: &[&str]) -> (i32, String) {
    let source = v.source();
    let mut all = vec!["check", source.to_str().unwrap()];
    all.extend(args);
    let output = v.command(&all);
    let said = [output.stdout, output.stderr].concat();
    (output.status.code().unwrap(), String::from_utf8(said).unwrap())
}

/// What is attached to `photo.jpg`: at right angles to what `small.vec` holds.
const ATTACHED: [f32; 16] = [1., -1., 1., -1., 1., -1., 1., -1., 1., -1., 1., -1., 1., -1., 1., -1.];

fn filled() -> Option<(Volume, Vec<Vec<f32>>)> {
    let v = Volume::new(&[])?;
    let data = rows(3);
    v.write("bulk.npy", npy(&data));
    v.write("small.vec", text(&[0.5; 16]));
    v.write("photo.jpg", "");
    rustix::fs::setxattr(v.path("photo.jpg"), "user.vexfs.embedding.f32", &le_bytes(&ATTACHED), XattrFlags::empty())
        .unwrap();
    let mnt = v.mnt();
    let output = v.command(&["sync", mnt.to_str().unwrap(), "--indexed"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some((v, data))
}

#[test]
fn check_tells_what_rotted_repair_gives_it_up_and_the_next_mount_reads_it_again() {
    let Some((v, data)) = filled() else { return };
    assert_eq!(check(&v, &[]).0, 8, "it is mounted");
    v.umount();
    assert_eq!(check(&v, &[]).0, 0);
    let segment = segments(&v).remove(0);
    let mut bytes = fs::read(&segment).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 16;
    fs::write(&segment, bytes).unwrap();
    let (status, said) = check(&v, &[]);
    assert_eq!(status, 4, "{said}");
    assert!(said.contains("checksum"), "{said}");
    assert_eq!(check(&v, &["--repair"]).0, 1);
    let (status, said) = check(&v, &[]);
    assert_eq!(status, 0, "{said}");
    v.mount();
    assert_eq!(first(&v, &data[77]), Some(("bulk.npy".to_owned(), 77)));
}

#[test]
fn a_rotten_segment_is_given_up_while_it_is_served_and_its_files_are_read_again() {
    let Some((v, data)) = filled() else { return };
    v.umount();
    for segment in segments(&v) {
        let mut bytes = fs::read(&segment).unwrap();
        // Full vectors begin after files and points.
        bytes[4096 * 20 + ROWS * 8] ^= 1;
        fs::write(&segment, bytes).unwrap();
    }
    v.mount();
    let mut tries = 0;
    while first(&v, &data[5]) != Some(("bulk.npy".to_owned(), 5)) || v.stats("")["quarantined"] == serde_json::json!([])
    {
        tries += 1;
        assert!(tries < 600, "{}", v.stats(""));
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    assert!(v.stats("")["last_error"].as_str().unwrap().contains("given up"));
}

#[test]
fn rebuild_makes_the_index_again_from_the_files() {
    let Some((v, data)) = filled() else { return };
    v.write("bad.vec", "words");
    v.umount();
    fs::write(v.source().join(".vexfs/catalog"), "nothing that was a catalog").unwrap();
    assert_eq!(check(&v, &[]).0, 4);
    let source = v.source();
    let output = v.command(&["rebuild", source.to_str().unwrap()]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "3 files were read; 1 of them can't be indexed\n");
    let (status, said) = check(&v, &[]);
    assert_eq!(status, 0, "{said}");
    v.mount();
    assert_eq!(first(&v, &data[42]), Some(("bulk.npy".to_owned(), 42)));
    assert_eq!(first(&v, &[0.5; 16]), Some(("small.vec".to_owned(), 0)));
    assert_eq!(first(&v, &ATTACHED), Some(("photo.jpg".to_owned(), 0)));
}

#[test]
fn a_purge_leaves_no_byte_of_a_removed_vector() {
    let Some((v, data)) = filled() else { return };
    let secret: Vec<f32> = data[11].iter().map(|x| x * 0.9 + 0.01).collect();
    let mut more = data.clone();
    more[0].clone_from(&secret);
    v.write("secret.npy", npy(&more));
    let mnt = v.mnt();
    let run = |args: &[&str]| {
        let output = v.command(args);
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    };
    run(&["sync", mnt.to_str().unwrap(), "--indexed"]);
    let norm = secret.iter().map(|x| x * x).sum::<f32>().sqrt();
    // As stored: normalised. The last bit may differ by the order of a sum, so half of each number is looked for.
    let normal: Vec<f32> = secret.iter().map(|x| x / norm).collect();
    let holds = || {
        segments(&v).into_iter().chain([v.source().join(".vexfs/catalog")]).any(|path| {
            let bytes = fs::read(path).unwrap();
            bytes.chunks_exact(4).collect::<Vec<_>>().windows(16).any(|window| {
                window
                    .iter()
                    .zip(&normal)
                    .all(|(bytes, x)| (f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) - x).abs() < 1e-6)
            })
        })
    };
    assert!(holds(), "it was sealed");
    fs::remove_file(v.path("secret.npy")).unwrap();
    run(&["optimize", mnt.to_str().unwrap(), "--purge"]);
    assert!(!holds());
    assert_eq!(first(&v, &data[11]), Some(("bulk.npy".to_owned(), 11)));
}

#[test]
fn the_mode_is_switched_while_mounted_and_sync_waits() {
    let Some((v, _)) = filled() else { return };
    let mnt = v.mnt();
    let run = |args: &[&str]| v.command(args).status.success();
    assert_eq!(v.stats("")["sync"], "lazy");
    assert!(run(&["sync", mnt.to_str().unwrap(), "--mode", "immediate"]));
    assert_eq!(v.stats("")["sync"], "immediate");
    v.write("one.vec", text(&[0.25; 16]));
    assert!(run(&["sync", mnt.to_str().unwrap(), "--indexed"]));
    assert_eq!(v.stats("")["pending"], 0);
    assert_eq!(v.stats("")["oldest_pending_ms"], serde_json::Value::Null);
    assert!(fs::write(v.path(".vexfs/control"), "sing").is_err());
    assert!(!run(&["sync", "/"]));
}

#[test]
fn the_work_behind_is_held_back_and_bounded_but_not_for_who_waits() {
    let Some(v) = Volume::new(&["--background-rate", "900M"]) else { return };
    let mnt = v.mnt();
    let background = |args: &[&str]| {
        let output = v.command(&[&["background", mnt.to_str().unwrap()], args].concat());
        (output.status.success(), String::from_utf8(output.stderr).unwrap())
    };
    assert_eq!(v.stats("")["background"]["rate"], 900 << 20);
    assert!(!background(&[]).0, "nothing is asked for");
    let (done, said) = background(&["--pause", "--rate", "0"]);
    assert!(done, "{said}");
    v.write("bulk.npy", npy(&rows(5)));
    std::thread::sleep(std::time::Duration::from_millis(200));
    let stats = v.stats("");
    assert_eq!((&stats["pending"], &stats["background"]["rate"]), (&ROWS.into(), &serde_json::Value::Null));
    let status = v.command(&["status", mnt.to_str().unwrap()]);
    assert!(String::from_utf8_lossy(&status.stdout).contains("background paused"));
    assert_eq!(first(&v, &rows(5)[7]), Some(("bulk.npy".to_owned(), 7)));
    assert!(v.command(&["sync", mnt.to_str().unwrap(), "--indexed"]).status.success());
    assert_eq!((&v.stats("")["pending"], &v.stats("")["background"]["paused"]), (&0.into(), &true.into()));
    assert!(background(&["--resume"]).0);
    assert_eq!(v.stats("")["background"]["paused"], false);
    let wrong = fs::write(v.path(".vexfs/control"), "background rate -1").unwrap_err();
    assert_eq!(wrong.raw_os_error(), Some(rustix::io::Errno::INVAL.raw_os_error()));
}

#[test]
fn who_is_killed_while_it_waits_ends_what_it_waits_for() {
    let Some(v) = Volume::new(&[]) else { return };
    let mut random = Random(11);
    for name in ["one.npy", "two.npy"] {
        let rows: Vec<Vec<f32>> = (0..20_000).map(|_| random.vector(32)).collect();
        v.write(name, npy(&rows));
    }
    let mnt = v.mnt();
    assert!(v.command(&["sync", mnt.to_str().unwrap(), "--indexed"]).status.success());
    let segments = || v.stats("")["collections"][0]["segments"].as_u64().unwrap();
    assert_eq!(segments(), 2);
    let mut child = std::process::Command::new(VEXFS).args(["optimize", mnt.to_str().unwrap()]).spawn().unwrap();
    while v.stats("")["background"]["work"]["linked"].as_u64().is_none_or(|linked| linked == 0) {
        assert!(child.try_wait().unwrap().is_none(), "it ended before it was seen to begin");
    }
    child.kill().unwrap();
    child.wait().unwrap();
    // It can't go before its call is answered, and it would be when all is one segment.
    assert_eq!(segments(), 2);
    assert!(v.command(&["optimize", mnt.to_str().unwrap()]).status.success(), "nothing is held by the one before");
    assert_eq!(segments(), 1);
}

#[test]
fn a_copied_volume_answers_as_before() {
    for with in ["cp", "tar", "rsync"] {
        if with == "rsync" && no_rsync() {
            continue;
        }
        let Some((v, data)) = filled() else { return };
        fs::create_dir(v.path("below")).unwrap();
        fs::rename(v.path("small.vec"), v.path("below/small.vec")).unwrap();
        v.umount();
        // Another file system with other inode numbers, where there is one.
        let there = tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| tempfile::tempdir().unwrap());
        let copy = there.path().join("copy");
        fs::create_dir(&copy).unwrap();
        let (from, to) = (v.source(), copy.to_str().unwrap());
        let script = match with {
            "cp" => format!("cp -a {}/. {to}/", from.display()),
            "rsync" => format!("rsync -aX {}/ {to}/", from.display()),
            _ => format!(
                "tar -C {} --format=posix --xattrs -cf - . | tar -C {to} --numeric-owner --xattrs --xattrs-include='*' -xpf -",
                from.display()
            ),
        };
        assert!(std::process::Command::new("sh").args(["-c", &script]).status().unwrap().success());
        fs::remove_dir_all(&from).unwrap();
        let segments = fs::read_dir(copy.join(".vexfs/segments")).unwrap().count();
        let mount = v.command(&["mount", to, v.mnt().to_str().unwrap()]);
        assert!(mount.status.success(), "{}", String::from_utf8_lossy(&mount.stderr));
        assert_eq!(v.stats("")["files"]["unread"], 0, "{with}");
        assert_eq!(first(&v, &data[99]), Some(("bulk.npy".to_owned(), 99)), "{with}");
        assert_eq!(first(&v, &[0.5; 16]), Some(("below/small.vec".to_owned(), 0)), "{with}");
        assert_eq!(first(&v, &ATTACHED), Some(("photo.jpg".to_owned(), 0)), "{with}");
        // Nothing was built again: the segments are those that were copied.
        assert_eq!(fs::read_dir(copy.join(".vexfs/segments")).unwrap().count(), segments, "{with}");
        assert_eq!(v.stats("")["collections"][0]["dead"], 0, "{with}");
        v.umount();
    }
}
