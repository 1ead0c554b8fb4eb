//! What the walker makes of changes beneath, without a mount: others' changes are made by another process, since our
//! own aren't told.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use vexfs_store::disk::{Fault, MemDisk};
use vexfs_store::{Content, FileId, Fingerprint, Options, Query, SyncMode, Volume};

use rustix::process::{Gid, Uid};

use super::*;
use crate::access::Identity;
use crate::events::Known;
use crate::ingest::{Standing, When};
use crate::mount::store_options;
use crate::source::Source;

struct Below {
    dir: tempfile::TempDir,
    volume: Arc<Volume>,
    ingest: Ingest,
    stop: Stop,
}

impl Below {
    fn new() -> Below {
        Below::over(MemDisk::default(), None)
    }

    fn over(disk: MemDisk, memory: Option<u64>) -> Below {
        let dir = tempfile::tempdir().unwrap();
        let source = Arc::new(Source::new(OwnedFd::from(fs::File::open(dir.path()).unwrap())).unwrap());
        let options = Options { memory, ..store_options(&source, SyncMode::Lazy) };
        let (volume, _) = Volume::open(Arc::new(disk), options).unwrap();
        let volume = Arc::new(volume);
        let ingest = Ingest::new(Arc::clone(&volume), source, false, Box::new(|_| false));
        Below { dir, volume, ingest, stop: Stop::new().unwrap() }
    }

    fn walker(&self) -> Walker<'_> {
        let mut walker = Walker::new(&self.ingest, Watch::new(self.ingest.source.root().as_fd()), &self.stop);
        walker.walk();
        walker
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    /// By somebody else, and looked at when it has settled.
    fn beneath(&self, walker: &mut Walker<'_>, script: &str) {
        let done = Command::new("sh").args(["-ec", script]).current_dir(self.dir.path()).status().unwrap();
        assert!(done.success(), "{script}");
        walker.watch.drain();
        std::thread::sleep(Duration::from_millis(600));
        walker.watch.drain();
        walker.look_again();
    }

    fn id(&self, name: &str) -> FileId {
        self.ingest.source.id(&self.ingest.source.stat(name.as_bytes()).unwrap()).unwrap()
    }

    fn nearest(&self, vector: &[f32]) -> Vec<String> {
        let answer = self.volume.search(&Query::nearest(vector.to_vec(), 9), &mut |_, _, _| true).unwrap();
        answer.hits.into_iter().map(|hit| String::from_utf8(hit.path).unwrap()).collect()
    }
}

fn known(file: FileId) -> Known {
    Known { file, is_dir: false, has_attached: false }
}

fn link(name: &str) -> Link {
    Link { parent: FileId::ROOT, name: name.as_bytes().to_vec() }
}

/// As programs save: what had the name before stayed in the index with its rows, one more file at each save.
#[test]
fn of_a_file_that_another_replaced_beneath_nothing_stays() {
    let below = Below::new();
    below.write("a.vec", "1 0");
    let mut walker = below.walker();
    // Held, so that its number isn't given away.
    let _held = fs::File::open(below.path("a.vec")).unwrap();
    below.beneath(&mut walker, "echo '0 1' > saved; mv saved a.vec");
    assert_eq!(below.nearest(&[0.0, 1.0]), ["a.vec"]);
    assert_eq!(below.volume.known_files(), [below.id("a.vec")]);
}

/// The directory that had the name before was kept, and all that had been in it.
#[test]
fn of_a_directory_that_another_replaced_beneath_nothing_stays() {
    let below = Below::new();
    fs::create_dir(below.path("dir")).unwrap();
    below.write("dir/a.vec", "1 0");
    let mut walker = below.walker();
    let mut held = Vec::new();
    for n in 0..3 {
        held.push(fs::File::open(below.path("dir")).unwrap());
        below.beneath(&mut walker, &format!("rm -r dir; mkdir dir; echo '1 {n}' > dir/b.vec"));
        assert_eq!(below.volume.known_files(), [below.id("dir/b.vec")]);
        assert_eq!(walker.watch.watched(), (2, 2));
    }
    below.beneath(&mut walker, "rm -r dir");
    assert_eq!(below.volume.known_files(), []);
    assert_eq!(below.volume.known_dirs(), []);
}

/// While nothing was mounted, say: its row came back at every mount.
#[test]
fn of_a_directory_that_is_gone_a_walk_leaves_nothing() {
    let below = Below::new();
    fs::create_dir_all(below.path("dir/deep")).unwrap();
    below.write("dir/deep/a.vec", "1 0");
    let mut walker = below.walker();
    assert_eq!(below.volume.known_dirs().len(), 2);
    fs::remove_dir_all(below.path("dir")).unwrap();
    walker.walk();
    assert_eq!(below.volume.known_dirs(), []);
}

/// A name that was looked at, and renamed through the mount before the index was told of it, was told after it was gone:
/// with its other name the file was removed, and its vectors were kept.
#[test]
fn a_name_that_goes_while_it_is_looked_at_is_not_told() {
    let below = Below::new();
    below.write("a.vec", "1 0");
    let mut walker = below.walker();
    let file = below.id("a.vec");
    let mut names = Names::default();
    let folder = Folder::new(Vec::new());
    let fd = below.ingest.source.open_dir(b"").unwrap();
    walker.look(fd.as_fd(), &folder, b"a.vec", FileType::RegularFile, &mut names).unwrap();
    fs::rename(below.path("a.vec"), below.path("b.vec")).unwrap();
    below.ingest.renamed(known(file), &link("a.vec"), &link("b.vec"), None);
    walker.read(&folder, &mut names, &mut HashSet::new());
    assert_eq!(below.volume.links(file), [link("b.vec")]);
    fs::remove_file(below.path("b.vec")).unwrap();
    below.ingest.unlinked(FileId::ROOT, OsStr::new("b.vec"), file);
    assert_eq!(below.volume.known_files(), []);
}

/// A look at the old name between rename(2) and its telling took the file away, and the telling gave it no name.
#[test]
fn a_file_whose_old_name_is_looked_at_during_its_rename_has_the_new_one() {
    let below = Below::new();
    below.write("a.vec", "1 0");
    below.walker();
    let file = below.id("a.vec");
    fs::rename(below.path("a.vec"), below.path("b.vec")).unwrap();
    below.ingest.drop_stale(file, &link("a.vec"));
    below.ingest.renamed(known(file), &link("a.vec"), &link("b.vec"), None);
    assert_eq!(below.nearest(&[1.0, 0.0]), ["b.vec"]);
}

/// What is about to be read again is found as it was until then.
#[test]
fn a_file_that_is_to_be_read_again_is_found_meanwhile() {
    let below = Below::new();
    below.write("a.vec", "1 0");
    below.walker();
    let file = below.id("a.vec");
    let stat = below.ingest.source.stat(b"a.vec").unwrap();
    below.volume.forget_fingerprint(file);
    let Some((known, Content::Indexed { .. })) = below.volume.content(file) else { panic!("not indexed") };
    assert_eq!(known, Fingerprint::default());
    assert_eq!(below.ingest.standing(file, &stat, &known), Standing::Current);
}

/// A file that an error of the disk kept out stayed out until somebody wrote it.
#[test]
fn what_the_disk_refused_is_read_again_when_it_does_not() {
    let disk = MemDisk::default();
    let below = Below::over(disk.clone(), Some(1 << 20));
    let header = format!("{:117}\n", "{'descr': '|i1', 'fortran_order': False, 'shape': (9000, 16), }");
    let mut bytes = b"\x93NUMPY\x01\x00\x76\x00".to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend((0..9_000 * 16).map(|n| 1 + (n % 97) as u8));
    fs::write(below.path("large.npy"), bytes).unwrap();
    disk.fail_at(disk.calls(), Fault::Always(5));
    below.walker();
    let refused = below.volume.content(below.id("large.npy")).unwrap();
    assert!(matches!(refused.1, Content::Refused { errno: 5, .. }), "{refused:?}");
    assert!(below.ingest.retry(), "it is refused again");
    disk.heal();
    assert!(!below.ingest.retry());
    let found = below.volume.content(below.id("large.npy")).unwrap();
    assert!(matches!(found.1, Content::Indexed { .. }), "{found:?}");
}

/// So did one that couldn't be opened for a moment.
#[test]
fn what_could_not_be_opened_is_read_again_when_it_can() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: to be somebody else needs root");
        return;
    }
    let below = Below::new();
    below.write("a.vec", "1 0");
    below.walker();
    let file = below.id("a.vec");
    below.write("a.vec", "0 1");
    fs::set_permissions(below.dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    let nobody = Identity::Other { uid: Uid::from_raw(65_534), gid: Gid::from_raw(65_534), groups: Vec::new() };
    nobody.act(|| below.ingest.read_known(file, When::Now)).unwrap();
    let refused = below.volume.content(file).unwrap();
    assert!(matches!(refused.1, Content::Refused { errno: 13, .. }), "{refused:?}");
    assert!(!below.ingest.retry());
    assert_eq!(below.nearest(&[0.0, 1.0]), ["a.vec"]);
}

/// A mount in immediate mode once linked all that a crash had left unread before it answered: seconds for 15,000 files.
#[test]
fn in_immediate_mode_what_nobody_closed_is_linked_behind() {
    let below = Below::new();
    below.volume.set_sync_mode(SyncMode::Immediate);
    below.volume.pause(true);
    let pending = || below.volume.report(FileId::ROOT).pending;
    below.write("a.vec", "1 0");
    below.walker();
    assert_eq!((pending(), below.nearest(&[1.0, 0.0])), (1, vec!["a.vec".to_owned()]));
    below.write("a.vec", "1 1");
    below.ingest.read_known(below.id("a.vec"), When::Now);
    below.volume.settle(&|| false).unwrap();
    below.write("a.vec", "0 1");
    below.ingest.read_known(below.id("a.vec"), When::Now);
    assert_eq!(pending(), 0, "somebody waits for that");
}
