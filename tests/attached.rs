//! Vectors attached to files by extended attributes.

use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use rustix::fs::{CWD, RenameFlags, XattrFlags, renameat_with};
use rustix::io::Errno;
use serde_json::json;

use crate::support::{Volume, le_bytes, no_rsync, npy, paths};

const TEXT: &str = "user.vexfs.embedding";
const BINARY: &str = "user.vexfs.embedding.f32";

fn set(path: &Path, name: &str, value: impl AsRef<[u8]>) -> Result<(), Errno> {
    rustix::fs::setxattr(path, name, value.as_ref(), XattrFlags::empty())
}

fn get(path: &Path, name: &str) -> Result<Vec<u8>, Errno> {
    let mut value = Vec::with_capacity(64 << 10);
    let path = CString::new(path.as_os_str().as_bytes()).unwrap();
    rustix::fs::getxattr(&path, name, rustix::buffer::spare_capacity(&mut value))?;
    Ok(value)
}

fn status(v: &Volume, name: &str) -> String {
    String::from_utf8(get(&v.path(name), "user.vexfs.status").unwrap()).unwrap()
}

/// A volume with two photographs: `a.jpg` at (1,0,0), `b.jpg` at (0,1,0).
fn photographs() -> Option<Volume> {
    let v = Volume::new(&[])?;
    v.write("a.jpg", "not a vector");
    v.write("b.jpg", "not a vector either");
    set(&v.path("a.jpg"), TEXT, "[1, 0, 0]").unwrap();
    set(&v.path("b.jpg"), BINARY, le_bytes(&[0.0, 1.0, 0.0])).unwrap();
    Some(v)
}

#[test]
fn an_attached_vector_is_found_when_setxattr_returned_and_gone_when_removed() {
    let Some(v) = photographs() else { return };
    assert_eq!(v.near("", &[1.0, 0.0, 0.0], 1), ["a.jpg"]);
    assert_eq!(v.near("", &[0.0, 1.0, 0.0], 2), ["b.jpg", "a.jpg"]);
    set(&v.path("a.jpg"), BINARY, le_bytes(&[0.0, 0.0, 1.0])).unwrap();
    let answer = v.ask("", &json!({ "vector": [0.0, 0.0, 1.0], "k": 9 }));
    assert_eq!(paths(&answer), ["a.jpg", "b.jpg"], "the old one is replaced");
    assert_eq!((&answer["hits"][0]["distance"], &answer["hits"][0]["attached"]), (&json!(0.0), &json!(true)));
    rustix::fs::removexattr(v.path("a.jpg"), TEXT).unwrap();
    assert_eq!(v.near("", &[0.0, 0.0, 1.0], 9), ["b.jpg"]);
    assert_eq!(rustix::fs::removexattr(v.path("a.jpg"), BINARY), Err(Errno::NODATA));
    fs::remove_file(v.path("b.jpg")).unwrap();
    assert!(v.near("", &[0.0, 0.0, 1.0], 9).is_empty());
    assert_eq!(v.stats("")["files"]["attached"], 0);
}

#[test]
fn both_spellings_are_one_vector_and_the_source_has_it_in_binary() {
    let Some(v) = photographs() else { return };
    assert_eq!(get(&v.path("b.jpg"), TEXT).unwrap(), b"[0, 1, 0]");
    assert_eq!(get(&v.path("a.jpg"), BINARY).unwrap(), le_bytes(&[1.0, 0.0, 0.0]));
    assert_eq!(get(&v.source().join("a.jpg"), BINARY).unwrap(), le_bytes(&[1.0, 0.0, 0.0]));
    assert_eq!(get(&v.source().join("a.jpg"), TEXT), Err(Errno::NODATA));
    set(&v.path("b.jpg"), TEXT, "0.25 0.5 0.125").unwrap();
    assert_eq!(get(&v.path("b.jpg"), BINARY).unwrap(), le_bytes(&[0.25, 0.5, 0.125]));
    let created = rustix::fs::setxattr(v.path("b.jpg"), TEXT, b"[1, 1, 1]", XattrFlags::CREATE);
    assert_eq!(created, Err(Errno::EXIST));
    v.write("c.jpg", "");
    let replaced = rustix::fs::setxattr(v.path("c.jpg"), TEXT, b"[1, 1, 1]", XattrFlags::REPLACE);
    assert_eq!(replaced, Err(Errno::NODATA));
}

#[test]
fn what_is_no_vector_cannot_be_attached_and_what_was_stands() {
    let Some(v) = photographs() else { return };
    let a = v.path("a.jpg");
    v.write(".vexfs.toml", "dimension = 3\nmetric = \"cosine\"\n");
    for bad in ["", "[]", "[1, 2", "words", "[1, nan, 0]", "[0, 0, 0]"] {
        assert_eq!(set(&a, TEXT, bad), Err(Errno::INVAL), "{bad}");
    }
    assert_eq!(set(&a, BINARY, [1, 2, 3]), Err(Errno::INVAL));
    assert_eq!(set(&a, TEXT, "[1, 0]"), Err(Errno::MSGSIZE));
    assert_eq!(set(&a, BINARY, le_bytes(&[1.0; 4])), Err(Errno::MSGSIZE));
    assert_eq!(v.near("", &[1.0, 0.0, 0.0], 1), ["a.jpg"]);
    assert_eq!(get(&a, TEXT).unwrap(), b"[1, 0, 0]");
    assert_eq!(status(&v, "a.jpg"), "attached: indexed 1");
    // Beneath the mount nobody refuses it; the status tells.
    v.umount();
    set(&v.source().join("a.jpg"), BINARY, le_bytes(&[1.0; 4])).unwrap();
    v.mount();
    assert_eq!(v.near("", &[1.0, 0.0, 0.0], 9), ["b.jpg"]);
    assert!(status(&v, "a.jpg").starts_with("attached: EMSGSIZE: "), "{}", status(&v, "a.jpg"));
}

#[test]
fn an_attached_vector_follows_names_and_survives_what_changes_the_file() {
    let Some(v) = photographs() else { return };
    let near = |dir: &str| v.near(dir, &[1.0, 0.0, 0.0], 1);
    fs::rename(v.path("a.jpg"), v.path("moved.jpg")).unwrap();
    assert_eq!(near(""), ["moved.jpg"]);
    fs::create_dir_all(v.path("deep/down")).unwrap();
    fs::hard_link(v.path("moved.jpg"), v.path("deep/down/linked.jpg")).unwrap();
    assert_eq!(near("deep"), ["down/linked.jpg"]);
    fs::remove_file(v.path("moved.jpg")).unwrap();
    assert_eq!(near(""), ["deep/down/linked.jpg"]);
    fs::rename(v.path("deep"), v.path("shallow")).unwrap();
    assert_eq!(near(""), ["shallow/down/linked.jpg"]);
    fs::set_permissions(v.path("shallow/down/linked.jpg"), fs::Permissions::from_mode(0o600)).unwrap();
    assert_eq!(near(""), ["shallow/down/linked.jpg"], "chmod");
    v.write("shallow/down/linked.jpg", "other bytes");
    assert_eq!(near(""), ["shallow/down/linked.jpg"], "write");
    renameat_with(CWD, v.path("shallow/down/linked.jpg"), CWD, v.path("b.jpg"), RenameFlags::EXCHANGE).unwrap();
    assert_eq!(near(""), ["b.jpg"], "exchange");
    assert_eq!(v.near("shallow", &[0.0, 1.0, 0.0], 1), ["down/linked.jpg"]);
    v.write("new.jpg", "");
    fs::rename(v.path("new.jpg"), v.path("b.jpg")).unwrap();
    assert_eq!(v.near("", &[1.0, 0.0, 0.0], 9), ["shallow/down/linked.jpg"], "renamed over");
    // A name that makes a vector file of it changes nothing of what is attached.
    fs::rename(v.path("shallow/down/linked.jpg"), v.path("both.npy")).unwrap();
    v.write("both.npy", npy(&[vec![0.0, 0.0, 1.0]]));
    let answer = v.ask("", &json!({ "vector": [0.0, 1.0, 0.0], "k": 9 }));
    assert_eq!(paths(&answer), ["both.npy", "both.npy"]);
    assert_eq!(answer["hits"][0]["attached"], true);
    assert_eq!(answer["hits"][1]["attached"], json!(null));
    assert_eq!(status(&v, "both.npy"), "indexed 1; attached: indexed 1");
    fs::remove_file(v.path("both.npy")).unwrap();
    assert!(v.near("", &[0.0, 1.0, 0.0], 9).is_empty());
}

/// The daemon learns a file's name for an attached vector only when one is set, whichever name was used before.
#[test]
fn a_vector_is_attached_under_the_name_that_the_file_has_then() {
    let Some(v) = Volume::new(&[]) else { return };
    let near = || v.near("", &[1.0, 0.0], 9);
    let attach = |name: &str| set(&v.path(name), TEXT, "[1, 0]").unwrap();
    v.write("first.jpg", "");
    fs::rename(v.path("first.jpg"), v.path("second.jpg")).unwrap();
    attach("second.jpg");
    assert_eq!(near(), ["second.jpg"]);
    rustix::fs::removexattr(v.path("second.jpg"), TEXT).unwrap();
    // Saved by a link and the removal of the old name, as some programs do.
    fs::hard_link(v.path("second.jpg"), v.path("third.jpg")).unwrap();
    fs::remove_file(v.path("second.jpg")).unwrap();
    attach("third.jpg");
    assert_eq!(near(), ["third.jpg"]);
    rustix::fs::removexattr(v.path("third.jpg"), TEXT).unwrap();
    fs::create_dir_all(v.path("deep/down")).unwrap();
    fs::rename(v.path("third.jpg"), v.path("deep/down/fourth.jpg")).unwrap();
    fs::rename(v.path("deep"), v.path("shallow")).unwrap();
    attach("shallow/down/fourth.jpg");
    assert_eq!(near(), ["shallow/down/fourth.jpg"]);
    // Without a name it can have a vector, which is in no answer.
    let open = fs::File::open(v.path("shallow/down/fourth.jpg")).unwrap();
    fs::remove_file(v.path("shallow/down/fourth.jpg")).unwrap();
    rustix::fs::fsetxattr(&open, TEXT, b"[0, 1]", XattrFlags::empty()).unwrap();
    assert!(near().is_empty());
}

#[test]
fn an_attached_vector_survives_remounts_kills_and_changes_beneath() {
    let Some(v) = photographs() else { return };
    let near = || v.near("", &[1.0, 0.0, 0.0], 1);
    v.remount();
    assert_eq!(near(), ["a.jpg"]);
    set(&v.path("a.jpg"), TEXT, "[0, 0, 1]").unwrap();
    set(&v.path("b.jpg"), TEXT, "[1, 0, 0]").unwrap();
    for name in ["a.jpg", "b.jpg"] {
        fs::File::open(v.path(name)).unwrap().sync_all().unwrap();
    }
    if crate::support::is_root() {
        v.kill();
        v.mount();
        assert_eq!(near(), ["b.jpg"]);
        assert_eq!(v.near("", &[0.0, 0.0, 1.0], 1), ["a.jpg"]);
    }
    // Beneath the mount: found by the look at each hit.
    set(&v.source().join("b.jpg"), BINARY, le_bytes(&[0.0, 1.0, 0.0])).unwrap();
    assert_eq!(near(), ["a.jpg"], "what was indexed of b.jpg holds no more");
    assert_eq!(v.near("", &[0.0, 1.0, 0.0], 1), ["b.jpg"], "and was read again");
    // While nothing is mounted: found by the walk.
    v.umount();
    rustix::fs::removexattr(v.source().join("a.jpg"), BINARY).unwrap();
    fs::rename(v.source().join("b.jpg"), v.source().join("c.jpg")).unwrap();
    fs::write(v.source().join("d.jpg"), "").unwrap();
    set(&v.source().join("d.jpg"), TEXT, "[0, 0.5, 1]").unwrap();
    v.mount();
    assert_eq!(v.near("", &[0.0, 1.0, 0.0], 9), ["c.jpg", "d.jpg"]);
}

#[test]
fn cp_and_rsync_carry_an_attached_vector() {
    let Some(v) = photographs() else { return };
    let run = |command: &str| {
        let status = Command::new("sh").args(["-c", command]).current_dir(v.mnt()).status().unwrap();
        assert!(status.success(), "{command}");
    };
    run("mkdir copy && cp -a a.jpg b.jpg copy/");
    assert_eq!(v.near("copy", &[1.0, 0.0, 0.0], 9), ["a.jpg", "b.jpg"]);
    if !no_rsync() {
        run("rsync -aX a.jpg b.jpg synced/");
        assert_eq!(v.near("synced", &[0.0, 1.0, 0.0], 9), ["b.jpg", "a.jpg"]);
    }
    // Out of the mount and into another volume's, by way of any directory.
    let aside = tempfile::tempdir_in(v.dir.path()).unwrap();
    run(&format!("cp -a a.jpg {0}/ && rm a.jpg && cp -a {0}/a.jpg back.jpg", aside.path().display()));
    assert!(v.near("", &[1.0, 0.0, 0.0], 9).contains(&"back.jpg".to_owned()));
}

#[test]
fn like_and_similar_ask_by_an_attached_vector() {
    let Some(v) = photographs() else { return };
    v.write("c.vec", "1, 1, 0");
    set(&v.path("c.vec"), TEXT, "[0, 0, 1]").unwrap();
    assert_eq!(paths(&v.ask("", &json!({ "like": "a.jpg", "k": 1 }))), ["c.vec"]);
    // What a vector file holds comes first; the attached one is asked for by name.
    assert_eq!(v.ask("", &json!({ "like": "c.vec", "k": 9 }))["hits"][2]["attached"], true);
    let answer = v.ask("", &json!({ "like": "c.vec#embedding", "k": 9 }));
    assert_eq!(answer["hits"].as_array().unwrap().len(), 3);
    assert!(answer["hits"].as_array().unwrap().iter().all(|hit| hit["distance"] == json!(1.0)), "{answer}");
    let listed = |path: &str| {
        let mut names: Vec<_> = fs::read_dir(v.path(path)).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names.into_iter().map(|name| name.into_string().unwrap()).collect::<Vec<_>>()
    };
    let names = listed(".vexfs/similar/b.jpg");
    assert_eq!(names[0], "01-0.7071-c.vec");
    // Two are as near as each other.
    let mut others = [names[1].strip_prefix("02-").unwrap(), names[2].strip_prefix("03-").unwrap()];
    others.sort_unstable();
    assert_eq!((names.len(), others), (3, ["0.0000-a.jpg", "0.0000-c.vec#embedding"]));
    let (mnt, like) = (v.mnt(), v.path("c.vec#embedding"));
    let found = v.command(&["search", mnt.to_str().unwrap(), "--like", like.to_str().unwrap(), "-k", "9"]);
    assert!(found.status.success(), "{}", String::from_utf8_lossy(&found.stderr));
    assert_eq!(String::from_utf8_lossy(&found.stdout).lines().count(), 4);
    v.write("none.jpg", "");
    let none = v.ask("", &json!({ "like": "none.jpg", "k": 1 }));
    assert_eq!(none["error"]["code"], "ENODATA", "{none}");
}
