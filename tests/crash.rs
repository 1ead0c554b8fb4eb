//! The daemon is killed at any moment; what was synced is there, what was removed is not. `VEXFS_KILLS=N` kills it N
//! times.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::support::{Random, Volume, is_root, npy, paths, skip, text};

/// What must hold after the kill, kept by the writer.
#[derive(Default)]
struct Promised {
    synced: BTreeMap<String, (Vec<f32>, Vec<u8>)>,
    removed: Vec<(String, Vec<f32>)>,
}

/// Writes, syncs, overwrites, renames and removes until the mount goes away under it.
fn load(v: &Volume, round: u64, stop: &AtomicBool, promised: &mut Promised) {
    let mut random = Random(round * 7_919 + 1);
    // By descriptor: once the mount is gone, its path leads to the bare directory below.
    let root = File::open(v.mnt()).unwrap();
    let base = std::path::PathBuf::from(format!("/proc/self/fd/{}", root.as_raw_fd()));
    let path = |name: &str| base.join(name);
    for n in 0.. {
        if stop.load(Ordering::Acquire) {
            return;
        }
        let vector = random.vector(24);
        let name = format!("r{round}-{n}.vec");
        let bytes = text(&vector).into_bytes();
        let written = (|| -> std::io::Result<()> {
            let mut file = File::create(path(&name))?;
            file.write_all(&bytes)?;
            if n % 3 == 0 {
                file.sync_all()?;
                promised.synced.insert(name.clone(), (vector.clone(), bytes.clone()));
            }
            Ok(())
        })();
        let known: Option<String> = promised.synced.keys().nth(random.below(promised.synced.len().max(1))).cloned();
        let changed = match (n % 10, known) {
            (4, Some(old)) => {
                let (vector, _) = promised.synced.remove(&old).unwrap();
                let gone = fs::remove_file(path(&old));
                if gone.is_ok() {
                    promised.removed.push((old, vector));
                }
                gone
            }
            (7, Some(old)) => {
                let kept = promised.synced.remove(&old).unwrap();
                let new = format!("n{round}-{n}.vec");
                let moved = fs::rename(path(&old), path(&new));
                if moved.is_ok() {
                    promised.synced.insert(new, kept);
                }
                moved
            }
            _ => Ok(()),
        };
        if written.is_err() || changed.is_err() {
            return;
        }
    }
}

/// What is there is asked, not how well a walk finds it.
fn exactly(v: &Volume, vector: &[f32], k: usize) -> Vec<String> {
    paths(&v.ask("", &serde_json::json!({ "vector": vector, "k": k, "exact": true })))
}

#[test]
fn twenty_kills_lose_nothing_synced_and_bring_nothing_removed_back() {
    if skip(!is_root(), "clearing a dead mount away needs root") {
        return;
    }
    let kills: u64 = std::env::var("VEXFS_KILLS").map_or(20, |value| value.parse().unwrap());
    let mut slowest = std::time::Duration::ZERO;
    for mode in ["lazy", "immediate"] {
        let Some(v) = Volume::new(&["--sync", mode]) else { return };
        let mut random = Random(0xdead_beef);
        let rows: Vec<Vec<f32>> = (0..9_000).map(|_| random.vector(24)).collect();
        v.write("bulk.npy", npy(&rows));
        File::open(v.path("bulk.npy")).unwrap().sync_all().unwrap();
        let mut promised = Promised::default();
        for round in 0..kills / 2 {
            let stop = AtomicBool::new(false);
            std::thread::scope(|scope| {
                let writer = scope.spawn(|| load(&v, round, &stop, &mut promised));
                std::thread::sleep(std::time::Duration::from_millis(20 + random.next() % 400));
                v.kill();
                stop.store(true, Ordering::Release);
                writer.join().unwrap();
            });
            let start = std::time::Instant::now();
            v.mount();
            let answer = v.ask("", &serde_json::json!({ "vector": rows[0], "k": 1 }));
            assert_eq!(answer["hits"][0]["path"], "bulk.npy", "{mode} {round}: {answer}");
            slowest = slowest.max(start.elapsed());
            // All of a short run; of a long one what is new, some of the rest, and all at the end.
            let newest = [format!("r{round}-"), format!("n{round}-")];
            let mut looks = |name: &str, of: usize| {
                let new = newest.iter().any(|prefix| name.starts_with(prefix));
                new || round + 1 == kills / 2 || random.below(of.max(1)) < 400
            };
            for (name, (vector, bytes)) in &promised.synced {
                if !looks(name, promised.synced.len()) {
                    continue;
                }
                assert_eq!(&fs::read(v.path(name)).unwrap(), bytes, "{mode} {round} {name}");
                assert_eq!(exactly(&v, vector, 1), [name.as_str()], "{mode} {round}, {} synced", promised.synced.len());
            }
            for (name, vector) in &promised.removed {
                if !looks(name, promised.removed.len()) {
                    continue;
                }
                assert!(!exactly(&v, vector, 3).contains(name), "{mode} {round} {name}");
            }
            let row = random.below(rows.len());
            let answer = v.ask("", &serde_json::json!({ "vector": rows[row], "k": 1, "exact": true }));
            assert_eq!(answer["hits"][0]["path"], "bulk.npy", "{mode} {round} row {row}");
            assert_eq!(answer["hits"][0]["row"], row, "{mode} {round}");
            assert_eq!(v.stats("")["last_error"], serde_json::Value::Null);
        }
        eprintln!("{mode}: {} synced, {} removed", promised.synced.len(), promised.removed.len());
        assert!(promised.synced.len() > 10, "the load did something: {}", promised.synced.len());
    }
    eprintln!("{kills} kills; from mount to the first answer at most {slowest:.2?}");
}
