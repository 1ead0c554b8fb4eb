//! `vexfs bench soak`: files and vectors of a mount, changed and looked at for long; whatever isn't as it was left is an
//! error. What the daemon keeps meanwhile is for `tests/suites/soak.sh` to say.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use rustix::fs::XattrFlags;
use vexfs_fs::wire::Request;

use super::Random;
use crate::search::ask;

/// Arguments of `vexfs bench soak`.
#[derive(Args)]
pub struct SoakArgs {
    /// A directory of a mounted volume.
    #[arg(long)]
    mount: PathBuf,
    /// Operations.
    #[arg(long, default_value_t = 1_000_000)]
    operations: u64,
    /// Threads, each in a directory of its own.
    #[arg(long, default_value_t = 2)]
    threads: u64,
    /// Files of each thread, a quarter of them vector files.
    #[arg(long, default_value_t = 1_000)]
    files: usize,
    /// Other operations in another order.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// Numbers of a vector.
const DIMENSION: usize = 16;

/// One file, if it is there: under one of two names.
#[derive(Copy, Clone)]
struct Slot {
    renamed: bool,
    version: u64,
    mode: u32,
}

struct Soak {
    dir: PathBuf,
    slots: Vec<Option<Slot>>,
    random: Random,
    versions: u64,
}

fn failed(path: &Path, what: impl std::fmt::Display) -> String {
    format!("{}: {what}", path.display())
}

impl Soak {
    fn new(args: &SoakArgs, thread: u64) -> Result<Soak, String> {
        let dir = args.mount.join(format!("soak-{}-{thread}", std::process::id()));
        fs::create_dir(&dir).map_err(|error| failed(&dir, error))?;
        let random = Random::new(args.seed * 1_000 + thread);
        Ok(Soak { dir, slots: vec![None; args.files], random, versions: 0 })
    }

    fn path(&self, at: usize, renamed: bool) -> PathBuf {
        let kind = if at.is_multiple_of(4) { "vec" } else { "txt" };
        self.dir.join(format!("{}{at}.{kind}", if renamed { "renamed" } else { "file" }))
    }

    /// What a version of a file holds: no two the same.
    fn content(&self, at: usize, version: u64) -> Vec<u8> {
        let numbers: Vec<String> = self.vector(at, version).iter().map(f32::to_string).collect();
        numbers.join(",").into_bytes()
    }

    fn vector(&self, at: usize, version: u64) -> Vec<f32> {
        let mut random = Random::new((at as u64) << 40 | version);
        (0..DIMENSION).map(|_| random.below(2_000) as f32 / 1_000.0 - 1.0).collect()
    }

    fn operate(&mut self) -> Result<(), String> {
        let at = self.random.below(self.slots.len());
        let choice = self.random.below(1_000);
        let (path, other) = (self.path(at, false), self.path(at, true));
        match (choice, self.slots[at]) {
            (0..120, None) => self.write(at, false, choice.is_multiple_of(2)),
            (0..100, Some(slot)) => self.write(at, slot.renamed, choice.is_multiple_of(2)),
            (0..990, None) => match fs::symlink_metadata(&path) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
                found => Err(failed(&path, format_args!("{found:?}, expected nothing"))),
            },
            (100..990, Some(slot)) => {
                let (path, other) = if slot.renamed { (other, path) } else { (path, other) };
                self.look(at, slot, choice, &path, &other)
            }
            _ => self.list(),
        }
    }

    fn look(&mut self, at: usize, slot: Slot, choice: usize, path: &Path, other: &Path) -> Result<(), String> {
        let wrong = |error: std::io::Error| failed(path, error);
        match choice {
            100..240 => {
                let found = fs::read(path).map_err(wrong)?;
                match found == self.content(at, slot.version) {
                    true => Ok(()),
                    false => Err(failed(path, format_args!("other bytes than version {}", slot.version))),
                }
            }
            240..300 => {
                self.slots[at] = Some(Slot { renamed: !slot.renamed, ..slot });
                fs::rename(path, other).map_err(wrong)
            }
            300..350 => {
                self.slots[at] = None;
                fs::remove_file(path).map_err(wrong)
            }
            350..390 => {
                let mode = if slot.mode == 0o644 { 0o600 } else { 0o644 };
                self.slots[at] = Some(Slot { mode, ..slot });
                fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(wrong)
            }
            390..400 => {
                let bytes: Vec<u8> = self.vector(at, 0).iter().flat_map(|number| number.to_le_bytes()).collect();
                rustix::fs::setxattr(path, "user.vexfs.embedding.f32", &bytes, XattrFlags::empty())
                    .map_err(|errno| wrong(errno.into()))
            }
            400..410 if at.is_multiple_of(4) => self.search(at, slot, path),
            _ => {
                let found = fs::symlink_metadata(path).map_err(wrong)?;
                let expected = (self.content(at, slot.version).len() as u64, 0o100_000 | slot.mode);
                match (found.size(), found.mode()) == expected {
                    true => Ok(()),
                    false => Err(failed(path, format_args!("{found:?}, expected {expected:?}"))),
                }
            }
        }
    }

    /// In place, or beside and renamed over as editors save.
    fn write(&mut self, at: usize, renamed: bool, beside: bool) -> Result<(), String> {
        self.versions += 1;
        let (path, content) = (self.path(at, renamed), self.content(at, self.versions));
        let mode = match self.slots[at] {
            Some(slot) if !beside => slot.mode,
            _ => 0o644,
        };
        self.slots[at] = Some(Slot { renamed, version: self.versions, mode });
        let written = if beside {
            let draft = self.dir.join("draft");
            fs::write(&draft, content).and_then(|()| fs::rename(&draft, &path))
        } else {
            fs::write(&path, content)
        };
        written.map_err(|error| failed(&path, error))
    }

    /// A closed vector file is found by what it holds.
    fn search(&self, at: usize, slot: Slot, path: &Path) -> Result<(), String> {
        let vector = Some(self.vector(at, slot.version));
        let reply = ask(&self.dir, &Request { vector, k: Some(1), exact: true, ..Request::default() })?;
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
        match reply.hits.as_deref() {
            Some([hit]) if Some(&hit.path) == name.as_ref() && !hit.attached => Ok(()),
            _ => Err(failed(path, format_args!("a search for version {} answers {reply:?}", slot.version))),
        }
    }

    fn list(&self) -> Result<(), String> {
        let entries = fs::read_dir(&self.dir).map_err(|error| failed(&self.dir, error))?;
        let (found, expected) = (entries.count(), self.slots.iter().flatten().count());
        match found == expected {
            true => Ok(()),
            false => Err(failed(&self.dir, format_args!("{found} names, expected {expected}"))),
        }
    }

    /// The first error ends it.
    fn run(mut self, operations: u64) -> Result<(), String> {
        for _ in 0..operations {
            self.operate()?;
        }
        fs::remove_dir_all(&self.dir).map_err(|error| failed(&self.dir, error))
    }
}

/// Runs, and prints the rate.
pub fn run(args: &SoakArgs) -> Result<(), String> {
    let soaks = (0..args.threads).map(|thread| Soak::new(args, thread)).collect::<Result<Vec<Soak>, String>>()?;
    let each = args.operations / args.threads.max(1);
    let began = Instant::now();
    std::thread::scope(|scope| {
        let threads: Vec<_> = soaks.into_iter().map(|soak| scope.spawn(move || soak.run(each))).collect();
        threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| "a thread panicked".to_owned())?)
    })?;
    let seconds = began.elapsed().as_secs_f64();
    let done = each * args.threads;
    println!("{done} operations, 0 errors, {:.0}/s", done as f64 / seconds);
    Ok(())
}
