//! Random operations on a mount and on a plain directory beside it: whatever the file system below does, the mount does,
//! and a search finds what the files of the plain directory hold.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CString;
use std::fs;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRunner};
use rustix::fs::{CWD, RenameFlags, XattrFlags, renameat_with};
use serde_json::json;

use crate::support::{Volume, le_bytes, npy, text};

/// Histories that are tried, and operations of each; `VEXFS_MODEL` says how many histories instead.
const HISTORIES: u32 = 16;
const OPERATIONS: usize = 60;
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
    Search(Vector),
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
        6 => vector().prop_map(Search),
        1 => Just(Remount),
    ]
}

/// Does it below a directory.
fn act(root: &Path, operation: &Operation) -> io::Result<()> {
    use Operation::*;
    let at = |path: &PathBuf| root.join(path);
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
        Link(from, to) => fs::hard_link(at(from), at(to)),
        Symlink(to, path) => std::os::unix::fs::symlink(to, at(path)),
        Unlink(path) => fs::remove_file(at(path)),
        Mkdir(path) => fs::create_dir(at(path)),
        Rmdir(path) => fs::remove_dir(at(path)),
        Chmod(path, mode) => fs::set_permissions(at(path), fs::Permissions::from_mode(*mode)),
        Attach(path, vector) => {
            Ok(rustix::fs::lsetxattr(at(path), EMBEDDING, &le_bytes(&floats(vector)), XattrFlags::empty())?)
        }
        Detach(path) => Ok(rustix::fs::lremovexattr(at(path), EMBEDDING)?),
        Search(_) | Remount => Ok(()),
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

/// A hit: distance, inode, row, whether it is the vector attached.
type Found = (f32, u64, u64, bool);

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

fn sorted(mut found: Vec<Found>) -> Vec<Found> {
    found.sort_by(|a, b| a.partial_cmp(b).unwrap());
    found
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

/// What a search below the plain directory would find.
fn expected(root: &Path, query: &[f32]) -> Vec<Found> {
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
    sorted(found.into_iter().map(|((inode, row, attached), distance)| (distance, inode, row, attached)).collect())
}

/// What a search of the mount finds, told by the inodes of the plain directory.
fn answered(v: &Volume, plain: &Path, query: &[f32]) -> Result<Vec<Found>, TestCaseError> {
    let answer = v.ask("", &json!({ "vector": query, "k": 1000, "exact": true }));
    let Some(hits) = answer["hits"].as_array() else {
        return Err(TestCaseError::fail(format!("no answer: {answer}")));
    };
    let found = hits.iter().map(|hit| {
        let path = plain.join(hit["path"].as_str().unwrap());
        let stat = fs::symlink_metadata(&path).map_err(|_| TestCaseError::fail(format!("nothing there: {hit}")))?;
        let row = hit["row"].as_u64().unwrap_or(0);
        Ok((hit["distance"].as_f64().unwrap() as f32, stat.ino(), row, hit["attached"] == true))
    });
    Ok(sorted(found.collect::<Result<_, TestCaseError>>()?))
}

fn same(v: &Volume, plain: &Path, query: &[f32]) -> Result<(), TestCaseError> {
    let (mut found, mut expected) = (answered(v, plain, query)?, expected(plain, query));
    let ambiguous = ambiguous(plain);
    for list in [&mut found, &mut expected] {
        list.retain(|hit| hit.3 || !ambiguous.contains(&hit.1));
    }
    let near = |(a, b): (&Found, &Found)| (a.0 - b.0).abs() <= 1e-3 && (a.1, a.2, a.3) == (b.1, b.2, b.3);
    // Equal distances come in any order.
    let by_row = |list: &[Found]| {
        let mut list = list.to_vec();
        list.sort_by_key(|hit| (hit.1, hit.2, hit.3));
        list
    };
    let (a, b) = (by_row(&found), by_row(&expected));
    prop_assert!(a.len() == b.len() && a.iter().zip(&b).all(near), "found {found:?}, expected {expected:?}");
    prop_assert!(found.is_sorted_by(|a, b| a.0 <= b.0));
    Ok(())
}

fn run(operations: &[Operation]) -> Result<(), TestCaseError> {
    let v = Volume::new(&[]).unwrap();
    let plain = v.dir.path().join("plain");
    fs::create_dir(&plain).unwrap();
    for root in [v.mnt(), plain.clone()] {
        fs::write(root.join(".vexfs.toml"), SETTINGS).unwrap();
    }
    for operation in operations {
        let on_mount = act(&v.mnt(), operation).map_err(|error| error.raw_os_error());
        let on_plain = act(&plain, operation).map_err(|error| error.raw_os_error());
        prop_assert_eq!(on_mount, on_plain, "{:?}", operation);
        match operation {
            Operation::Search(vector) => same(&v, &plain, &floats(vector))?,
            Operation::Remount => v.remount(),
            _ => {}
        }
    }
    prop_assert_eq!(tree(&v.mnt()), tree(&plain));
    same(&v, &plain, &[0.0; DIMENSION])?;
    v.remount();
    prop_assert_eq!(tree(&v.mnt()), tree(&plain));
    same(&v, &plain, &[1.0; DIMENSION])
}

#[test]
fn whatever_is_done_the_mount_is_as_the_source_and_searches_find_what_files_hold() {
    if crate::support::no_fuse() {
        return;
    }
    let asked = std::env::var("VEXFS_MODEL").ok().map(|cases| cases.parse().unwrap());
    let cases = asked.unwrap_or(HISTORIES);
    let mut runner =
        TestRunner::new(Config { cases, failure_persistence: None, max_shrink_iters: 2_000, ..Config::default() });
    let histories = prop::collection::vec(operation(), OPERATIONS / 2..OPERATIONS);
    runner.run(&histories, |operations| run(&operations)).unwrap_or_else(|failure| panic!("{failure}"));
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
