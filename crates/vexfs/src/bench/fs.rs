//! `vexfs bench fs`: operations on small files, on the file system below, on a mount and on a peer in turn.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;

use super::median;

/// Arguments of `vexfs bench fs`.
#[derive(Args)]
pub struct FsArgs {
    /// A directory of a mounted volume.
    #[arg(long)]
    mount: PathBuf,
    /// A directory of the file system below.
    #[arg(long)]
    native: PathBuf,
    /// A directory of another mount (bindfs, for one) over the same file system.
    #[arg(long)]
    peer: Option<PathBuf>,
    /// Files.
    #[arg(long, default_value_t = 2_000)]
    files: usize,
    /// Files in each directory.
    #[arg(long, default_value_t = 100)]
    fan: usize,
    /// Rounds; the table has their medians.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
}

/// Longer than a kernel keeps attributes unasked.
const STALE: Duration = Duration::from_millis(1_100);
/// Bytes of a small file.
const SMALL: usize = 1_024;
/// How often each file is asked for in the step that asks nothing of a daemon, and so is over soon.
const PASSES: usize = 20;
/// Numbers of a vector file.
const DIMENSION: usize = 128;

type Step = (&'static str, fn(&Tree) -> std::io::Result<usize>);

/// In this order: each finds what the one before left.
const STEPS: [Step; 6] = [
    ("create-write-close", Tree::create),
    ("walk and lstat", Tree::walk),
    ("hot stat", Tree::stat),
    ("open-read-close", Tree::read),
    ("rename", Tree::rename),
    ("unlink", Tree::unlink),
];

struct Tree {
    top: PathBuf,
    files: Vec<(PathBuf, PathBuf)>,
    content: Vec<u8>,
}

impl Tree {
    fn new(place: &Path, args: &FsArgs, suffix: &str, content: Vec<u8>) -> std::io::Result<Tree> {
        let top = place.join(format!("bench-{}", std::process::id()));
        let mut files = Vec::new();
        for n in 0..args.files {
            let dir = top.join(format!("d{}", n / args.fan));
            if n % args.fan == 0 {
                fs::create_dir_all(&dir)?;
            }
            files.push((dir.join(format!("f{n}{suffix}")), dir.join(format!("g{n}{suffix}"))));
        }
        Ok(Tree { top, files, content })
    }

    fn create(&self) -> std::io::Result<usize> {
        for (path, _) in &self.files {
            fs::File::options().write(true).create_new(true).open(path)?.write_all(&self.content)?;
        }
        Ok(self.files.len())
    }

    fn walk(&self) -> std::io::Result<usize> {
        let (mut dirs, mut met) = (vec![self.top.clone()], 0);
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(dir)? {
                let path = entry?.path();
                if fs::symlink_metadata(&path)?.is_dir() {
                    dirs.push(path);
                }
                met += 1;
            }
        }
        Ok(met)
    }

    fn stat(&self) -> std::io::Result<usize> {
        let mut bytes = 0;
        for (path, _) in (0..PASSES).flat_map(|_| &self.files) {
            bytes += fs::metadata(path)?.size();
        }
        let asked = PASSES * self.files.len();
        match bytes as usize == asked * self.content.len() {
            true => Ok(asked),
            false => Err(std::io::Error::other("sizes are wrong")),
        }
    }

    fn read(&self) -> std::io::Result<usize> {
        let mut buffer = Vec::new();
        for (path, _) in &self.files {
            buffer.clear();
            // Not `fs::read`, which asks for the size first.
            fs::File::open(path)?.take(1 << 20).read_to_end(&mut buffer)?;
            if buffer != self.content {
                return Err(std::io::Error::other(format!("{}: other bytes", path.display())));
            }
        }
        Ok(self.files.len())
    }

    fn rename(&self) -> std::io::Result<usize> {
        for (path, other) in &self.files {
            fs::rename(path, other)?;
        }
        Ok(self.files.len())
    }

    fn unlink(&self) -> std::io::Result<usize> {
        for (_, path) in &self.files {
            fs::remove_file(path)?;
        }
        Ok(self.files.len())
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.top) {
            eprintln!("{}: {error}", self.top.display());
        }
    }
}

fn rate(step: Step, tree: &Tree) -> Result<f64, String> {
    let began = Instant::now();
    let done = step.1(tree).map_err(|error| format!("{}: {error}", step.0))?;
    Ok(done as f64 / began.elapsed().as_secs_f64())
}

/// Measures and prints.
pub fn run(args: &FsArgs) -> Result<(), String> {
    let small: Vec<u8> = (0..SMALL).map(|n| n as u8).collect();
    let vector: Vec<String> = (0..DIMENSION).map(|n| format!("0.{n:05}")).collect();
    let vector = (vector.join(",") + "\n").into_bytes();
    let new = |place: &Path, suffix: &str, content: &[u8]| {
        Tree::new(place, args, suffix, content.to_vec()).map_err(|error| format!("{}: {error}", place.display()))
    };
    let places = [Some(&args.native), Some(&args.mount), args.peer.as_ref()];
    let mut rates = vec![[const { Vec::new() }; 3]; STEPS.len()];
    let mut stored = [const { Vec::new() }; 2];
    for round in 0..args.rounds {
        let trees =
            places.iter().flatten().map(|place| new(place, "", &small)).collect::<Result<Vec<Tree>, String>>()?;
        for (step, rates) in STEPS.iter().zip(&mut rates) {
            if step.0 == "walk and lstat" {
                std::thread::sleep(STALE);
            }
            // Each in turn begins, so that none has the better place.
            for n in 0..trees.len() {
                let at = (n + round) % trees.len();
                if step.0 == "hot stat" {
                    // What the kernel was told just now it keeps.
                    trees[at].stat().map_err(|error| error.to_string())?;
                }
                rates[at].push(rate(*step, &trees[at])?);
            }
        }
        drop(trees);
        for (suffix, rates) in [".txt", ".vec"].into_iter().zip(&mut stored) {
            rates.push(rate(STEPS[0], &new(&args.mount, suffix, &vector)?)?);
        }
    }
    println!(
        "{} files of {SMALL} bytes, {} in a directory; medians of {} rounds, operations/s",
        args.files, args.fan, args.rounds
    );
    println!("{:<20}{:>12}{:>12}{:>12}{:>10}{:>10}", "", "native", "mount", "peer", "/native", "/peer");
    for ((name, _), [native, mount, peer]) in STEPS.iter().zip(rates) {
        let over = |other: &[f64]| median(mount.iter().zip(other).map(|(mount, other)| mount / other).collect());
        let (by_native, by_peer) = (over(&native), over(&peer));
        println!(
            "{name:<20}{:>12.0}{:>12.0}{:>12.0}{by_native:>10.2}{by_peer:>10.2}",
            median(native),
            median(mount),
            median(peer)
        );
    }
    let [plain, vec] = stored;
    let ratio = median(vec.iter().zip(&plain).map(|(vec, plain)| vec / plain).collect());
    println!(
        "{:<20}{:>12.0} plain {:>8.0} .vec of {DIMENSION} dimensions, ratio {ratio:.2}",
        "store on the mount",
        median(plain),
        median(vec)
    );
    Ok(())
}
