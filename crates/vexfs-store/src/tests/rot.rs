//! Any byte of the state directory may rot: the volume says so or serves, and never with what is wrong.
//!
//! `cargo test` does 600 damages; `VEXFS_ROT=N` does N.

use std::sync::Arc;

use super::*;

const DIM: usize = 8;

fn vector(n: u32) -> Vec<f32> {
    let mut state = u64::from(n).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut number = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..DIM).map(|_| number()).collect()
}

/// 40 files in two segments, some names and refusals beside: all that a catalog can hold.
fn volume() -> MemDisk {
    let disk = MemDisk::default();
    let (volume, _) = Volume::open_still(Arc::new(disk.clone()), options(SyncMode::Lazy)).unwrap();
    volume.set_dir(FileId(5), link("below"));
    for file in 0..40 {
        if file == 20 {
            seal(&volume);
        }
        let rows: Vec<Vec<f32>> = (0..60).map(|row| vector(file * 60 + row)).collect();
        let rows: Vec<&[f32]> = rows.iter().map(Vec::as_slice).collect();
        put(&volume, 100 + u64::from(file), &format!("{file}.npy"), &rows);
    }
    volume.link(FileId(90), Link { parent: FileId(5), name: b"bad.vec".to_vec() });
    volume.refuse(FileId(90), print(3), 22, "words".to_owned());
    seal(&volume);
    volume.scan_finished();
    volume.close().unwrap();
    disk.crash()
}

fn seal(volume: &Volume) {
    let collections: Vec<_> = volume.inner.collections.read().values().cloned().collect();
    for collection in collections {
        maintain::freeze(&volume.inner, &collection);
        let parts = collection.parts.load_full();
        for part in parts.iter().skip(1).filter(|part| part.as_segment().is_none()) {
            assert!(maintain::rewrite(&volume.inner, &collection, std::slice::from_ref(part), &|_| true).unwrap());
        }
    }
}

/// What each hit says must be so: its distance is that of the vector that was put there.
fn ask(volume: &Volume, n: u32, exact: bool) -> usize {
    let wanted = vector(n);
    let query = Query { exact, ..Query::nearest(wanted.clone(), 5) };
    let Ok(answer) = volume.search(&query, &mut |_, _, _| true) else { return 0 };
    for hit in &answer.hits {
        let path = String::from_utf8(hit.path.clone()).unwrap();
        let file = hit.file.0 as u32 - 100;
        let there = match path.as_str() {
            "new.vec" => vector(7),
            _ => vector(file * 60 + hit.row),
        };
        assert!(path == "new.vec" || path == format!("{file}.npy"));
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        let cosine = dot(&wanted, &there) / (dot(&wanted, &wanted) * dot(&there, &there)).sqrt();
        assert!((hit.score - cosine).abs() < 1e-3, "{path}#{}: {} is not {cosine}", hit.row, hit.score);
    }
    answer.hits.len()
}

#[test]
fn no_damage_to_any_file_panics_hangs_or_gives_a_false_hit() {
    let damages = std::env::var("VEXFS_ROT").map_or(600, |value| value.parse().unwrap());
    let sound = volume();
    let files = sound.files();
    assert_eq!(files.len(), 4, "{files:?}");
    let mut luck = 0x1234_5678_9abc_def1u64;
    let mut below = |n: usize| {
        luck ^= luck << 13;
        luck ^= luck >> 7;
        luck ^= luck << 17;
        (luck >> 20) as usize % n.max(1)
    };
    // redb's assertions are contained; what they say would only fill the output.
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if !panic.location().is_some_and(|at| at.file().contains("redb")) {
            usual(panic);
        }
    }));
    let mut found = 0;
    let (mut refused, mut reported, mut served, mut unseen) = (0, 0, 0, 0);
    for n in 0..damages {
        let disk = sound.crash();
        let name = &files[n % files.len()];
        let len = disk.bytes(name).unwrap().len();
        // Headers are where damage has the most to say.
        let at = if below(4) == 0 { below(len.min(512)) } else { below(len) };
        let (how, bit) = (below(6), below(8));
        disk.corrupt(name, |bytes| match how {
            0 => bytes.truncate(at),
            1 => bytes[at..len.min(at + 4096)].fill(0),
            2 => bytes[at..len.min(at + 512)].fill(0xff),
            _ => bytes[at] ^= 1 << bit,
        });
        let changed = disk.bytes(name) != sound.bytes(name);
        let checked = check(&disk.crash(), false);
        found += usize::from(checked.as_ref().map_or(true, |checked| !checked.findings.is_empty()));
        let repaired = disk.crash();
        let repair = check(&repaired, true).unwrap();
        assert!(repair.repaired == repair.has_errors());
        let (volume, _) = Volume::open_still(Arc::new(repaired.crash()), options(SyncMode::Lazy)).unwrap();
        ask(&volume, below(2400) as u32, true);
        drop(volume);
        assert!(!check(&repaired.crash(), false).unwrap().has_errors(), "{name} at {at}: still after repair");
        let opened = match n % 16 {
            // With the threads, as a mount does; and without, so that nothing but the search finds it.
            0 => Volume::open(Arc::new(disk.clone()), options(SyncMode::Lazy)),
            _ => Volume::open_still(Arc::new(disk.clone()), options(SyncMode::Lazy)),
        };
        match opened {
            Err(_) => refused += 1,
            Ok((volume, _)) => {
                let hits = ask(&volume, below(2400) as u32, n % 2 == 0);
                ask(&volume, below(2400) as u32, n % 2 == 1);
                let report = volume.report(FileId::ROOT);
                match (report.quarantined.is_empty() && report.last_error.is_none(), hits) {
                    (false, _) => reported += 1,
                    (true, 5) => served += 1,
                    (true, _) => unseen += usize::from(changed),
                }
                // It takes what comes, or says that it can't.
                put(&volume, 9_999, "new.vec", &[&vector(7)]);
                if volume.commit().is_ok() {
                    assert!(ask(&volume, 7, true) > 0);
                }
            }
        }
    }
    eprintln!(
        "{damages} damages: {refused} refused at open, {reported} reported, {served} served; check found {found}"
    );
    assert!(found > damages / 2);
    assert_eq!(unseen, 0, "hits are missing and nobody says why");
}
