//! The daemon is killed at any moment; what was synced is there, what was removed is not.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::support::{Random, Volume, is_root, npy, skip, text};

/// What must hold after the kill, kept by the writer.
#[derive(Default)]
struct Promised {
    synced: BTreeMap<String, (Vec<f32>, Vec<u8>)>,
    removed: Vec<(String, Vec<f32>)>,
}

/// Writes, syncs, overwrites, renames and removes until the mount goes away under it.
fn load(v: &Volume, round: u64, stop: &AtomicBool, promised: &mut Promised) {
    let mut random = Random(round * 7_919 + 1);
    for n in 0.. {
        if stop.load(Ordering::Acquire) {
            return;
        }
        let vector = random.vector(24);
        let name = format!("r{round}-{n}.vec");
        let bytes = text(&vector).into_bytes();
        let written = (|| -> std::io::Result<()> {
            let mut file = File::create(v.path(&name))?;
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
                let gone = fs::remove_file(v.path(&old));
                if gone.is_ok() {
                    promised.removed.push((old, vector));
                }
                gone
            }
            (7, Some(old)) => {
                let kept = promised.synced.remove(&old).unwrap();
                let new = format!("n{round}-{n}.vec");
                let moved = fs::rename(v.path(&old), v.path(&new));
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

#[test]
fn twenty_kills_lose_nothing_synced_and_bring_nothing_removed_back() {
    if skip(!is_root(), "clearing a dead mount away needs root") {
        return;
    }
    for mode in ["lazy", "immediate"] {
        let Some(v) = Volume::new(&["--sync", mode]) else { return };
        let mut random = Random(0xdead_beef);
        let rows: Vec<Vec<f32>> = (0..9_000).map(|_| random.vector(24)).collect();
        v.write("bulk.npy", npy(&rows));
        File::open(v.path("bulk.npy")).unwrap().sync_all().unwrap();
        let mut promised = Promised::default();
        for round in 0..10 {
            let stop = AtomicBool::new(false);
            std::thread::scope(|scope| {
                let writer = scope.spawn(|| load(&v, round, &stop, &mut promised));
                std::thread::sleep(std::time::Duration::from_millis(20 + random.next() % 400));
                v.kill();
                stop.store(true, Ordering::Release);
                writer.join().unwrap();
            });
            v.mount();
            for (name, (vector, bytes)) in &promised.synced {
                assert_eq!(&fs::read(v.path(name)).unwrap(), bytes, "{mode} {round} {name}");
                assert_eq!(v.near("", vector, 1), [name.as_str()], "{mode} {round}");
            }
            for (name, vector) in &promised.removed {
                assert!(!v.near("", vector, 3).contains(name), "{mode} {round} {name}");
            }
            let row = random.below(rows.len());
            assert_eq!(v.near("", &rows[row], 1), ["bulk.npy"], "{mode} {round} row {row}");
            assert_eq!(v.stats("")["last_error"], serde_json::Value::Null);
        }
        assert!(promised.synced.len() > 10, "the load did something: {}", promised.synced.len());
    }
}
