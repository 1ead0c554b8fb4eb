//! Random operations on a mount and on a plain directory beside it: whatever the file system below does, the mount does,
//! and a search, wherever it is asked, finds what the files of the plain directory hold.
//!
//! `cargo test` takes 16 histories of up to 60 operations, `VEXFS_MODEL=FIRST-LASTxOPERATIONS` those of the seeds and the
//! length that it says. A failure tells its seed, is shrunk and prints the operations that are left.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CString;
use std::fs;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner};
use rustix::fs::{CWD, RenameFlags, XattrFlags, renameat_with};
use serde_json::json;

use crate::support::{Volume, ask, le_bytes, npy, text};

/// The first and the last seed, and the most operations of a history.
const DEFAULT: &str = "1-16x60";
/// How it is mounted, by the seed.
const MODES: [&[&str]; 3] = [&[], &["--sync", "immediate"], &["--exclusive"]];
/// Numbers of a vector.
const DIMENSION: usize = 3;
const SETTINGS: &str = "metric = \"l2\"\ndimension = 3\nelement = \"f32\"\n";
const EMBEDDING: &str = "user.vexfs.embedding.f32";

type Vector = [i8; DIMENSION];

#[derive(Clone, Debug)]
enum Operation {
    Vec(PathBuf, Vector),
    Npy(PathBuf, Vec<Vector>),
    Text(PathBuf, &'static str),
    Append(PathBuf, &'static str),
    Truncate(PathBuf, u64),
    Rename(PathBuf, PathBuf),
    Exchange(PathBuf, PathBuf),
    NoReplace(PathBuf, PathBuf),
    Link(PathBuf, PathBuf),
    Symlink(PathBuf, PathBuf),
    Unlink(PathBuf),
    Mkdir(PathBuf),
    Rmdir(PathBuf),
    Chmod(PathBuf, u32),
    Attach(PathBuf, Vector),
    Detach(PathBuf),
    /// A collection of its own begins at the directory.
    Settings(PathBuf),
    NoSettings(PathBuf),
    /// Written, and kept open.
    Hold(PathBuf, Vector),
    /// One of those kept open.
    Close(usize),
    Search(Vector),
    Compare,
    Remount,
}

fn floats(vector: &Vector) -> Vec<f32> {
    vector.iter().map(|number| f32::from(*number)).collect()
}

fn operation() -> impl Strategy<Value = Operation> {
    use Operation::*;
    let names = ["a.vec", "b.vec", "c.npy", "d.npy", "p.txt", "x", "y"];
    let path = || {
        (prop::sample::select(vec!["", "x", "y", "x/y"]), prop::sample::select(names.to_vec()))
            .prop_map(|(dir, name)| Path::new(dir).join(name))
    };
    let dir = || prop::sample::select(vec!["x", "y", "x/y"]).prop_map(PathBuf::from);
    let vector = any::<Vector>;
    prop_oneof![
        6 => (path(), vector()).prop_map(|(path, vector)| Vec(path, vector)),
        4 => (path(), prop::collection::vec(vector(), 1..4)).prop_map(|(path, rows)| Npy(path, rows)),
        2 => (path(), prop::sample::select(vec!["", "1,2", "words"])).prop_map(|(path, text)| Text(path, text)),
        1 => (path(), prop::sample::select(vec!["0", ",1", "\n"])).prop_map(|(path, text)| Append(path, text)),
        1 => (path(), 0..200u64).prop_map(|(path, size)| Truncate(path, size)),
        5 => (path(), path()).prop_map(|(from, to)| Rename(from, to)),
        2 => (path(), path()).prop_map(|(from, to)| Exchange(from, to)),
        1 => (path(), path()).prop_map(|(from, to)| NoReplace(from, to)),
        3 => (path(), path()).prop_map(|(from, to)| Link(from, to)),
        1 => (path(), path()).prop_map(|(to, at)| Symlink(to, at)),
        3 => path().prop_map(Unlink),
        5 => path().prop_map(Mkdir),
        1 => path().prop_map(Rmdir),
        1 => (path(), prop::sample::select(vec![0o600, 0o644, 0o755])).prop_map(|(path, mode)| Chmod(path, mode)),
        3 => (path(), vector()).prop_map(|(path, vector)| Attach(path, vector)),
        1 => path().prop_map(Detach),
        1 => dir().prop_map(Settings),
        1 => dir().prop_map(NoSettings),
        2 => (path(), vector()).prop_map(|(path, vector)| Hold(path, vector)),
        2 => any::<usize>().prop_map(Close),
        6 => vector().prop_map(Search),
        1 => Just(Compare),
        1 => Just(Remount),
    ]
}

/// One of the two directories, its files that are kept open, and those that ever had several names.
struct Side {
    root: PathBuf,
    held: std::vec::Vec<fs::File>,
    linked: BTreeSet<u64>,
}

/// Does it on one side.
fn act(side: &mut Side, operation: &Operation) -> io::Result<()> {
    use Operation::*;
    let at = |path: &PathBuf| side.root.join(path);
    let rename = |from, to, flags| Ok(renameat_with(CWD, at(from), CWD, at(to), flags)?);
    match operation {
        Vec(path, vector) => fs::write(at(path), text(&floats(vector))),
        Npy(path, rows) => fs::write(at(path), npy(&rows.iter().map(floats).collect::<std::vec::Vec<_>>())),
        Text(path, text) => fs::write(at(path), text),
        Append(path, text) => fs::File::options().append(true).open(at(path))?.write_all(text.as_bytes()),
        Truncate(path, size) => fs::File::options().write(true).open(at(path))?.set_len(*size),
        Rename(from, to) => fs::rename(at(from), at(to)),
        Exchange(from, to) => rename(from, to, RenameFlags::EXCHANGE),
        NoReplace(from, to) => rename(from, to, RenameFlags::NOREPLACE),
        Link(from, to) => {
            fs::hard_link(at(from), at(to))?;
            let inode = fs::symlink_metadata(at(to))?.ino();
            side.linked.insert(inode);
            Ok(())
        }
        Symlink(to, path) => std::os::unix::fs::symlink(to, at(path)),
        Unlink(path) => fs::remove_file(at(path)),
        Mkdir(path) => fs::create_dir(at(path)),
        Rmdir(path) => fs::remove_dir(at(path)),
        Chmod(path, mode) => fs::set_permissions(at(path), fs::Permissions::from_mode(*mode)),
        Attach(path, vector) => {
            Ok(rustix::fs::lsetxattr(at(path), EMBEDDING, &le_bytes(&floats(vector)), XattrFlags::empty())?)
        }
        Detach(path) => Ok(rustix::fs::lremovexattr(at(path), EMBEDDING)?),
        Settings(dir) => fs::write(at(dir).join(".vexfs.toml"), SETTINGS),
        NoSettings(dir) => fs::remove_file(at(dir).join(".vexfs.toml")),
        Hold(path, vector) => {
            let mut file = fs::File::options().write(true).truncate(true).open(at(path))?;
            file.write_all(text(&floats(vector)).as_bytes())?;
            side.held.push(file);
            Ok(())
        }
        Close(which) => {
            if !side.held.is_empty() {
                drop(side.held.remove(which % side.held.len()));
            }
            Ok(())
        }
        Search(_) | Compare => Ok(()),
        // Nothing may be open.
        Remount => {
            side.held.clear();
            Ok(())
        }
    }
}

/// What can be seen of a file.
#[derive(Debug, PartialEq)]
struct Seen {
    mode: u32,
    links: u64,
    /// Bytes of a file, target of a link.
    content: Vec<u8>,
    embedding: Option<Vec<u8>>,
}

fn embedding(path: &Path) -> Option<Vec<u8>> {
    let mut value = Vec::with_capacity(4096);
    let path = CString::new(path.as_os_str().as_bytes()).unwrap();
    rustix::fs::lgetxattr(&path, EMBEDDING, rustix::buffer::spare_capacity(&mut value)).ok()?;
    Some(value)
}

fn paths_below(root: &Path) -> Vec<PathBuf> {
    let (mut dirs, mut paths) = (vec![root.to_owned()], Vec::new());
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() {
                dirs.push(entry.path());
            }
            paths.push(entry.path().strip_prefix(root).unwrap().to_owned());
        }
    }
    paths
}

fn tree(root: &Path) -> BTreeMap<PathBuf, Seen> {
    let see = |path: &Path| {
        let at = root.join(path);
        let stat = fs::symlink_metadata(&at).unwrap();
        let content = match stat.file_type() {
            kind if kind.is_file() => fs::read(&at).unwrap(),
            kind if kind.is_symlink() => fs::read_link(&at).unwrap().into_os_string().into_encoded_bytes(),
            _ => Vec::new(),
        };
        Seen { mode: stat.mode(), links: stat.nlink(), content, embedding: embedding(&at) }
    };
    paths_below(root).into_iter().map(|path| (path.clone(), see(&path))).collect()
}

/// A vector: inode, row, whether it is the one attached.
type Point = (u64, u64, bool);

fn vectors_of(path: &Path) -> Vec<Vec<f32>> {
    let bytes = fs::read(path).unwrap();
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("vec") => {
            let Ok(numbers) = String::from_utf8(bytes) else { return Vec::new() };
            let separator = |c: char| c == ',' || c.is_ascii_whitespace();
            let vector: Option<Vec<f32>> = numbers.trim().split(separator).map(|number| number.parse().ok()).collect();
            vector.into_iter().collect()
        }
        // What was written here as a whole, or is none.
        Some("npy") => (1..4usize)
            .find(|rows| {
                let whole = npy(&vec![vec![0.0; DIMENSION]; *rows]);
                let head = whole.len() - rows * DIMENSION * 4;
                bytes.len() >= whole.len() && bytes.get(..head) == Some(&whole[..head])
            })
            .map(|rows| {
                let head = npy(&vec![vec![0.0; DIMENSION]; rows]).len() - rows * DIMENSION * 4;
                let numbers = bytes[head..].as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
                numbers.collect::<Vec<_>>().chunks(DIMENSION).take(rows).map(<[f32]>::to_vec).collect()
            })
            .unwrap_or_default(),
        _ => Vec::new(),
    }
}

/// Files that are called as two formats' are: which counts depends on which name was known first.
fn ambiguous(root: &Path) -> BTreeSet<u64> {
    let of = |extension: &str| {
        let named = move |path: &PathBuf| path.extension().is_some_and(|found| found == extension);
        let inode = |path: PathBuf| fs::symlink_metadata(root.join(path)).unwrap().ino();
        paths_below(root).into_iter().filter(named).map(inode).collect::<BTreeSet<u64>>()
    };
    of("vec").intersection(&of("npy")).copied().collect()
}

/// What a search below this plain directory would find, and how far.
fn expected(root: &Path, query: &[f32]) -> BTreeMap<Point, f32> {
    let mut found = BTreeMap::new();
    for path in paths_below(root) {
        let at = root.join(&path);
        let stat = fs::symlink_metadata(&at).unwrap();
        if !stat.is_file() {
            continue;
        }
        let attached = embedding(&at)
            .map(|bytes| bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect::<Vec<f32>>());
        let held = vectors_of(&at).into_iter().enumerate().map(|(row, vector)| (row as u64, false, vector));
        for (row, attached, vector) in held.chain(attached.map(|vector| (0, true, vector))) {
            if vector.len() == DIMENSION {
                let distance = query.iter().zip(&vector).map(|(a, b)| (a - b) * (a - b)).sum::<f32>().sqrt();
                found.insert((stat.ino(), row, attached), distance);
            }
        }
    }
    found
}

/// What a search below this directory of the mount finds, nearest first and nothing twice, told by the inodes of the
/// plain one.
fn answered(mount: &Path, plain: &Path, query: &[f32]) -> Result<BTreeMap<Point, f32>, TestCaseError> {
    let answer = ask(mount, &json!({ "vector": query, "k": 1000, "exact": true }));
    let Some(hits) = answer["hits"].as_array() else {
        return Err(TestCaseError::fail(format!("no answer: {answer}")));
    };
    let (mut found, mut last) = (BTreeMap::new(), 0.0);
    for hit in hits {
        let path = plain.join(hit["path"].as_str().unwrap());
        let stat = fs::symlink_metadata(&path).map_err(|_| TestCaseError::fail(format!("nothing there: {hit}")))?;
        let point = (stat.ino(), hit["row"].as_u64().unwrap_or(0), hit["attached"] == true);
        let distance = hit["distance"].as_f64().unwrap() as f32;
        prop_assert!(last <= distance, "out of order: {}", answer);
        prop_assert!(found.insert(point, distance).is_none(), "twice: {}", answer);
        last = distance;
    }
    Ok(found)
}

/// A search in each directory finds what its files hold. Not compared are the contents of files that are being written or
/// called as two formats' are, and what is attached to files that had several names: the daemon may know but one. A file of
/// several names is of one collection, which one of them gives: it is not looked for below the others.
fn searches_agree(mount: &Side, plain: &Side, query: &[f32]) -> Result<(), TestCaseError> {
    let mut unclear = ambiguous(&plain.root);
    unclear.extend(plain.held.iter().map(|file| file.metadata().unwrap().ino()));
    let stats: BTreeMap<PathBuf, fs::Metadata> = paths_below(&plain.root)
        .into_iter()
        .map(|path| (path.clone(), fs::symlink_metadata(plain.root.join(path)).unwrap()))
        .collect();
    let mut unclear_below = unclear.clone();
    unclear_below.extend(stats.values().filter(|stat| stat.is_file() && stat.nlink() > 1).map(MetadataExt::ino));
    let dirs = stats.iter().filter(|(_, stat)| stat.is_dir()).map(|(path, _)| (path.clone(), &unclear_below));
    for (dir, unclear) in dirs.chain([(PathBuf::new(), &unclear)]) {
        let clear = |(inode, _, attached): &Point| !(if *attached { &plain.linked } else { unclear }).contains(inode);
        let mut found = answered(&mount.root.join(&dir), &plain.root.join(&dir), query)?;
        let mut expected = expected(&plain.root.join(&dir), query);
        found.retain(|point, _| clear(point));
        expected.retain(|point, _| clear(point));
        let near = |((a, far), (b, how)): ((&Point, &f32), (&Point, &f32))| a == b && (far - how).abs() <= 1e-3;
        let same = found.len() == expected.len() && found.iter().zip(&expected).all(near);
        prop_assert!(same, "in {:?} found {:?}, expected {:?}", dir, found, expected);
    }
    Ok(())
}

fn trees_agree(mount: &Side, plain: &Side) -> Result<(), TestCaseError> {
    prop_assert_eq!(tree(&mount.root), tree(&plain.root));
    Ok(())
}

/// What was tried and what was done of it, over all histories.
#[derive(Default)]
struct Tally {
    operations: AtomicU64,
    succeeded: AtomicU64,
    comparisons: AtomicU64,
}

fn run(options: &[&str], operations: &[Operation], tally: &Tally) -> Result<(), TestCaseError> {
    let v = Volume::new(options).unwrap();
    let side = |root: PathBuf| Side { root, held: Vec::new(), linked: BTreeSet::new() };
    let (mut mount, mut plain) = (side(v.mnt()), side(v.dir.path().join("plain")));
    fs::create_dir(&plain.root).unwrap();
    for root in [&mount.root, &plain.root] {
        fs::create_dir_all(root.join("x/y")).unwrap();
        fs::create_dir(root.join("y")).unwrap();
        fs::write(root.join(".vexfs.toml"), SETTINGS).unwrap();
    }
    let compared = || tally.comparisons.fetch_add(1, Ordering::Relaxed);
    for operation in operations {
        let on_mount = act(&mut mount, operation).map_err(|error| error.raw_os_error());
        let on_plain = act(&mut plain, operation).map_err(|error| error.raw_os_error());
        prop_assert_eq!(on_mount, on_plain, "{:?}", operation);
        tally.operations.fetch_add(1, Ordering::Relaxed);
        tally.succeeded.fetch_add(u64::from(on_plain.is_ok()), Ordering::Relaxed);
        match operation {
            Operation::Search(vector) => searches_agree(&mount, &plain, &floats(vector))?,
            Operation::Compare => trees_agree(&mount, &plain)?,
            Operation::Remount => v.remount(),
            _ => continue,
        }
        compared();
    }
    for query in [[0.0; DIMENSION], [1.0; DIMENSION]] {
        trees_agree(&mount, &plain)?;
        searches_agree(&mount, &plain, &query)?;
        compared();
        act(&mut mount, &Operation::Remount).and_then(|()| act(&mut plain, &Operation::Remount)).unwrap();
        v.remount();
    }
    prop_assert_eq!(&v.stats("")["panics"], 0);
    v.umount();
    let checked = v.command(&["check", v.source().to_str().unwrap()]);
    prop_assert!(checked.status.success(), "check: {}", String::from_utf8_lossy(&checked.stdout));
    Ok(())
}

/// Fewer of the operations that fail too.
fn shrunk(mut operations: Vec<Operation>, fails: impl Fn(&[Operation]) -> bool) -> Vec<Operation> {
    let mut chunk = operations.len().div_ceil(2);
    while chunk > 0 {
        let mut at = 0;
        while at < operations.len() {
            let mut fewer = operations.clone();
            fewer.drain(at..operations.len().min(at + chunk));
            match fails(&fewer) {
                true => operations = fewer,
                false => at += chunk,
            }
        }
        chunk /= 2;
    }
    operations
}

#[test]
fn whatever_is_done_the_mount_is_as_the_source_and_searches_find_what_files_hold() {
    if crate::support::no_fuse() {
        return;
    }
    let asked = std::env::var("VEXFS_MODEL").unwrap_or_else(|_| DEFAULT.to_owned());
    let number = |text: &str| text.parse::<u64>().unwrap();
    let (seeds, most) = asked.split_once('x').unwrap();
    let (first, last) = seeds.split_once('-').unwrap();
    let most = number(most) as usize;
    let tally = Tally::default();
    for seed in number(first)..=number(last) {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&seed.to_le_bytes());
        let random = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
        let mut runner = TestRunner::new_with_rng(Config::default(), random);
        let history = prop::collection::vec(operation(), most / 2..=most).new_tree(&mut runner).unwrap().current();
        let options = MODES[seed as usize % MODES.len()];
        let before = tally.operations.load(Ordering::Relaxed);
        if let Err(failure) = run(options, &history, &tally) {
            let done = (tally.operations.load(Ordering::Relaxed) - before) as usize;
            eprintln!("seed {seed} {options:?} after {done} operations: {failure}");
            let fails = |operations: &[Operation]| run(options, operations, &tally).is_err();
            let few = shrunk(history[..history.len().min(done + 1)].to_vec(), fails);
            panic!("seed {seed} {options:?}: {few:#?}: {:?}", run(options, &few, &tally));
        }
    }
    let Tally { operations, succeeded, comparisons } = tally;
    eprintln!("{asked}: {operations:?} operations, {succeeded:?} of them done, {comparisons:?} comparisons");
}

/// The vectors that the name `a.vec` gave stayed when only `c.npy` was left, as which the file holds none.
#[test]
fn regression_a_name_of_another_format_that_stays_is_read_as_it_says() {
    let gone: [fn(&Volume); 3] = [
        |v| fs::remove_file(v.path("a.vec")).unwrap(),
        |v| fs::rename(v.path("a.vec"), v.path("a.txt")).unwrap(),
        |v| fs::rename(v.path("other"), v.path("a.vec")).unwrap(),
    ];
    for go in gone {
        let Some(v) = Volume::new(&[]) else { return };
        v.write("a.vec", "1,2,3");
        v.write("other", "");
        fs::hard_link(v.path("a.vec"), v.path("c.npy")).unwrap();
        assert_eq!(v.near("", &[1.0, 2.0, 3.0], 9).len(), 1);
        go(&v);
        assert!(v.near("", &[1.0, 2.0, 3.0], 9).is_empty());
        assert!(v.error_of("c.npy").is_some());
    }
}

/// A plain file's second name was not taken for one that says that there are vectors.
#[test]
fn regression_a_link_that_makes_a_vector_file_of_a_plain_one_is_read() {
    let Some(v) = Volume::new(&[]) else { return };
    v.write("p.txt", "1,2,3");
    fs::hard_link(v.path("p.txt"), v.path("b.vec")).unwrap();
    assert_eq!(v.near("", &[1.0, 2.0, 3.0], 9), ["b.vec"]);
}

/// The exchange of a vector file's name and another took what was attached to the first for gone, half-way.
#[test]
fn regression_an_attached_vector_survives_the_exchange_of_a_vector_files_name_and_another() {
    for (one, other) in [("a.vec", "b.jpg"), ("b.jpg", "a.vec")] {
        let Some(v) = Volume::new(&[]) else { return };
        v.write("a.vec", "1,0,0");
        v.write("b.jpg", "");
        for (name, vector) in [("a.vec", [0.0, 1.0, 0.0]), ("b.jpg", [0.0, 0.0, 1.0])] {
            rustix::fs::setxattr(v.path(name), EMBEDDING, &le_bytes(&vector), XattrFlags::empty()).unwrap();
        }
        renameat_with(CWD, v.path(one), CWD, v.path(other), RenameFlags::EXCHANGE).unwrap();
        assert_eq!(v.near("", &[0.0, 1.0, 0.0], 1), ["b.jpg"], "{one}");
        assert_eq!(v.near("", &[0.0, 0.0, 1.0], 1), ["a.vec"], "{one}");
    }
}

/// After a remount the daemon met a vector file by its other name, and took what was written to it for nothing new.
#[test]
fn regression_what_is_written_by_a_plain_name_of_a_vector_file_is_read() {
    let Some(v) = Volume::new(&[]) else { return };
    v.write(".vexfs.toml", SETTINGS);
    v.write("plain", "1,2,3");
    fs::hard_link(v.path("plain"), v.path("a.vec")).unwrap();
    v.remount();
    v.write("plain", "3,2,-9");
    let answer = v.ask("", &json!({ "vector": [3, 2, -9], "k": 1 }));
    assert_eq!(answer["hits"][0]["distance"], 0.0, "{answer}");
}
