//! Vectors follow their files.

use std::fs::{self, File};
use std::io::Write;

use rustix::fs::{CWD, RenameFlags, renameat_with};
use serde_json::json;

use crate::support::{Random, Volume, npy, npy_raw, paths, text};

#[test]
fn closed_means_visible_in_both_sync_modes() {
    for mode in ["lazy", "immediate"] {
        let Some(v) = Volume::new(&["--sync", mode]) else { return };
        let mut random = Random(42);
        for n in 0..1_000 {
            let vector = random.vector(16);
            v.write(&format!("{n}.vec"), text(&vector));
            assert_eq!(v.near("", &vector, 1), [format!("{n}.vec")], "{mode}");
        }
        assert_eq!(v.stats("")["sync"], mode);
    }
}

#[test]
fn overwrite_truncate_append_and_unlink_are_seen_by_the_next_search() {
    let Some(v) = Volume::new(&[]) else { return };
    v.write("a.vec", "1,0,0");
    v.write("b.vec", "0,1,0");
    assert_eq!(v.near("", &[1.0, 0.0, 0.0], 1), ["a.vec"]);
    v.write("a.vec", "0,0,1");
    assert_eq!(v.near("", &[0.0, 0.0, 1.0], 9), ["a.vec", "b.vec"]);
    assert_eq!(v.near("", &[1.0, 0.1, 0.0], 1), ["b.vec"]);
    File::options().write(true).open(v.path("a.vec")).unwrap().set_len(0).unwrap();
    assert_eq!(v.near("", &[0.0, 0.0, 1.0], 9), ["b.vec"]);
    File::options().append(true).open(v.path("a.vec")).unwrap().write_all(b"1 1 0").unwrap();
    assert_eq!(v.near("", &[1.0, 1.0, 0.0], 1), ["a.vec"]);
    File::options().write(true).open(v.path("a.vec")).unwrap().set_len(3).unwrap();
    assert_eq!(v.near("", &[1.0, 1.0, 0.0], 9), ["b.vec"], "\"1 1\" is of another dimension");
    fs::remove_file(v.path("b.vec")).unwrap();
    assert!(v.near("", &[1.0, 1.0, 0.0], 9).is_empty());
}

#[test]
fn old_vectors_stand_while_a_file_is_being_written() {
    let Some(v) = Volume::new(&[]) else { return };
    v.write("a.vec", "1,0");
    let mut file = File::options().write(true).truncate(true).open(v.path("a.vec")).unwrap();
    file.write_all(b"0,").unwrap();
    assert_eq!(v.near("", &[1.0, 0.0], 1), ["a.vec"]);
    file.write_all(b"1").unwrap();
    drop(file);
    let answer = v.ask("", &json!({ "vector": [0.0, 1.0], "k": 1 }));
    assert_eq!(answer["hits"][0]["distance"], 0.0);
}

#[test]
fn names_move_with_renames_links_and_exchanges() {
    let Some(v) = Volume::new(&[]) else { return };
    v.write("a.vec", "1,0,0");
    v.write("b.vec", "0,1,0");
    fs::rename(v.path("a.vec"), v.path("c.vec")).unwrap();
    assert_eq!(v.near("", &[1.0, 0.0, 0.0], 1), ["c.vec"]);
    fs::rename(v.path("c.vec"), v.path("b.vec")).unwrap();
    assert_eq!(v.near("", &[1.0, 0.0, 0.0], 9), ["b.vec"], "what was replaced is gone");
    fs::hard_link(v.path("b.vec"), v.path("also.vec")).unwrap();
    fs::remove_file(v.path("b.vec")).unwrap();
    assert_eq!(v.near("", &[1.0, 0.0, 0.0], 9), ["also.vec"]);
    v.write("x.vec", "0,0,1");
    renameat_with(CWD, v.path("x.vec"), CWD, v.path("also.vec"), RenameFlags::EXCHANGE).unwrap();
    assert_eq!(v.near("", &[0.0, 0.0, 1.0], 2), ["also.vec", "x.vec"]);
    // A name that means nothing to the index takes the vectors out, and one that does brings them back.
    fs::rename(v.path("x.vec"), v.path("x.txt")).unwrap();
    assert_eq!(v.near("", &[1.0, 0.0, 0.0], 9), ["also.vec"]);
    fs::rename(v.path("x.txt"), v.path("back.vec")).unwrap();
    assert_eq!(v.near("", &[1.0, 0.0, 0.0], 1), ["back.vec"]);
    // As editors save: write beside, rename over.
    v.write("tmp", "0,1,1");
    fs::rename(v.path("tmp"), v.path("back.vec")).unwrap();
    assert_eq!(v.near("", &[0.0, 1.0, 1.0], 1), ["back.vec"]);
    v.remount();
    assert_eq!(v.near("", &[0.0, 1.0, 1.0], 2), ["back.vec", "also.vec"]);
}

#[test]
fn a_renamed_directory_takes_its_vectors_along() {
    let Some(v) = Volume::new(&[]) else { return };
    fs::create_dir_all(v.path("d/e")).unwrap();
    let mut random = Random(5);
    let vectors: Vec<Vec<f32>> = (0..300).map(|_| random.vector(8)).collect();
    for (n, vector) in vectors.iter().enumerate() {
        v.write(&format!("d/e/{n}.vec"), text(vector));
    }
    fs::rename(v.path("d"), v.path("f")).unwrap();
    assert_eq!(v.near("", &vectors[7], 1), ["f/e/7.vec"]);
    assert_eq!(v.near("f", &vectors[8], 1), ["e/8.vec"]);
    fs::create_dir(v.path("d")).unwrap();
    assert!(v.near("d", &vectors[8], 1).is_empty());
    fs::rename(v.path("f/e"), v.path("d/e")).unwrap();
    assert_eq!(v.near("d", &vectors[9], 1), ["e/9.vec"]);
    v.remount();
    assert_eq!(v.near("d", &vectors[9], 1), ["e/9.vec"]);
}

#[test]
fn a_directory_is_a_scope() {
    let Some(v) = Volume::new(&[]) else { return };
    v.write("top.vec", "1,0");
    for dir in ["a", "a/b", "c"] {
        fs::create_dir(v.path(dir)).unwrap();
        v.write(&format!("{dir}/x.vec"), "1,1");
    }
    let mut all = v.near("", &[1.0, 0.0], 9);
    assert_eq!(all.remove(0), "top.vec");
    all.sort();
    assert_eq!(all, ["a/b/x.vec", "a/x.vec", "c/x.vec"]);
    assert_eq!(v.near("a", &[1.0, 0.0], 9).len(), 2);
    assert_eq!(v.near("a/b", &[1.0, 0.0], 9), ["x.vec"]);
    fs::create_dir(v.path("empty")).unwrap();
    assert!(v.near("empty", &[1.0, 0.0], 9).is_empty());
}

#[test]
fn every_element_type_order_and_version_of_npy_is_read() {
    let Some(v) = Volume::new(&[]) else { return };
    let rows = [[1.0f32, 2.0, 3.0], [4.0, 5.0, 6.0]];
    let flat: Vec<f32> = rows.concat();
    let columns = [1.0f32, 4.0, 2.0, 5.0, 3.0, 6.0];
    let bytes = |values: &[f32], kind: &str| -> Vec<u8> {
        let each = |value: &f32| match kind {
            "<f2" => vec![
                0x00,
                match *value as u8 {
                    1 => 0x3c,
                    2 => 0x40,
                    3 => 0x42,
                    4 => 0x44,
                    5 => 0x45,
                    _ => 0x46,
                },
            ],
            "<f4" => value.to_le_bytes().to_vec(),
            ">f4" => value.to_be_bytes().to_vec(),
            "<f8" => f64::from(*value).to_le_bytes().to_vec(),
            ">f8" => f64::from(*value).to_be_bytes().to_vec(),
            _ => vec![*value as u8],
        };
        values.iter().flat_map(each).collect()
    };
    for (n, kind) in ["<f2", "<f4", ">f4", "<f8", ">f8", "|i1", "|u1"].into_iter().enumerate() {
        for version in [1, 2, 3] {
            for fortran in [false, true] {
                let dir = format!("{n}-{version}-{fortran}");
                fs::create_dir(v.path(&dir)).unwrap();
                v.write(&format!("{dir}/.vexfs.toml"), "metric = \"l2\"\n");
                let order = if fortran { "True" } else { "False" };
                let fields = format!("'descr': '{kind}', 'fortran_order': {order}, 'shape': (2, 3)");
                let data = bytes(if fortran { &columns } else { &flat }, kind);
                v.write(&format!("{dir}/m.npy"), npy_raw(version, &fields, &data));
                for (row, vector) in rows.iter().enumerate() {
                    let answer = v.ask(&dir, &json!({ "vector": vector, "k": 1 }));
                    assert_eq!(answer["hits"][0]["row"], row, "{kind} {version} {fortran}: {answer}");
                    assert_eq!(answer["hits"][0]["distance"], 0.0);
                }
                // One dimension is one vector.
                let fields = format!("'descr': '{kind}', 'fortran_order': {order}, 'shape': (3,)");
                v.write(&format!("{dir}/m.npy"), npy_raw(version, &fields, &bytes(&flat[3..], kind)));
                let answer = v.ask(&dir, &json!({ "vector": [4, 5, 6], "k": 5 }));
                assert_eq!(answer["hits"].as_array().unwrap().len(), 1, "{kind} {version} {fortran}: {answer}");
            }
        }
    }
}

#[test]
fn a_bulk_file_is_found_at_once_sealed_behind_and_served_after_a_remount() {
    let Some(v) = Volume::new(&[]) else { return };
    let mut random = Random(77);
    let rows: Vec<Vec<f32>> = (0..9_000).map(|_| random.vector(8)).collect();
    v.write("bulk.npy", npy(&rows));
    let find = |row: usize| {
        let answer = v.ask("", &json!({ "vector": rows[row], "k": 1, "exact": true }));
        assert_eq!(answer["hits"][0]["row"], row, "{answer}");
    };
    find(8_999);
    while v.stats("")["pending"] != 0 {
        find(random.below(9_000));
    }
    assert_eq!(v.stats("")["collections"][0]["segments"], 1);
    (0..50).for_each(|_| find(random.below(9_000)));
    v.remount();
    (0..50).for_each(|_| find(random.below(9_000)));
    assert_eq!(v.stats("")["collections"][0]["segments"], 1);
    // Overwritten by few: none of the old ones is left, and their segment goes.
    v.write("bulk.npy", npy(&rows[..3]));
    let answer = v.ask("", &json!({ "vector": rows[5], "k": 10 }));
    assert_eq!(answer["hits"].as_array().unwrap().len(), 3);
    while v.stats("")["collections"][0]["segments"] != 0 {
        std::thread::yield_now();
    }
    while fs::read_dir(v.source().join(".vexfs/segments")).unwrap().count() > 0 {
        std::thread::yield_now();
    }
}

#[test]
fn collections_are_declared_by_directory_and_follow_their_settings() {
    let Some(v) = Volume::new(&[]) else { return };
    fs::create_dir(v.path("l2")).unwrap();
    v.write("far.vec", "10,10");
    v.write("l2/near.vec", "1,0");
    // One collection so far, cosine: length counts for nothing.
    assert_eq!(v.near("", &[1.0, 1.0], 1), ["far.vec"]);
    v.write("l2/.vexfs.toml", "metric = \"l2\"\n");
    let answer = v.ask("l2", &json!({ "vector": [4.0, 4.0], "k": 9 }));
    assert_eq!(paths(&answer), ["near.vec"]);
    assert_eq!(answer["hits"][0]["distance"], 5.0);
    // Together their distances can't be compared, and the error names both.
    let both = v.ask("", &json!({ "vector": [1.0, 1.0] }));
    assert_eq!(both["error"]["code"], "EINVAL");
    assert!(both["error"]["message"].as_str().unwrap().contains("/l2 (l2)"), "{both}");
    fs::rename(v.path("far.vec"), v.path("l2/far.vec")).unwrap();
    assert_eq!(v.near("l2", &[9.0, 9.0], 2), ["far.vec", "near.vec"]);
    fs::remove_file(v.path("l2/.vexfs.toml")).unwrap();
    let answer = v.ask("l2", &json!({ "vector": [4.0, 4.0], "k": 1 }));
    assert_eq!(paths(&answer), ["far.vec"], "cosine again");
    // Another dimension in a directory of its own is a collection of its own.
    fs::create_dir(v.path("three")).unwrap();
    v.write("three/.vexfs.toml", "");
    v.write("three/x.vec", "1,2,3");
    assert_eq!(v.near("", &[1.0, 2.0, 3.0], 9), ["three/x.vec"]);
    assert_eq!(v.ask("", &json!({ "vector": [1.0] }))["error"]["code"], "EMSGSIZE");
}

#[test]
fn bits_are_searched_by_how_many_differ() {
    let Some(v) = Volume::new(&[]) else { return };
    v.write(".vexfs.toml", "element = \"bits\"\n");
    // Rows that end inside a byte, enough of them for a segment; and a vector of its own in the head.
    let mut random = Random(5);
    let mut bits = || (0..130).map(|_| (random.next() >> 40 & 1) as u8).collect::<Vec<u8>>();
    let rows: Vec<Vec<u8>> = (0..9_000).map(|_| bits()).collect();
    let wanted: Vec<f32> = bits().into_iter().map(f32::from).collect();
    v.write("rows.npy", npy_raw(1, "'descr': '|u1', 'fortran_order': False, 'shape': (9000, 130)", &rows.concat()));
    let synced = v.command(&["sync", "--indexed", v.mnt().to_str().unwrap()]);
    assert!(synced.status.success(), "{}", String::from_utf8_lossy(&synced.stderr));
    let mut beside = wanted.clone();
    beside[129] = 1.0 - beside[129];
    v.write("beside.vec", text(&beside));
    let differ = |row: &[u8]| row.iter().zip(&wanted).filter(|(a, b)| f32::from(**a) != **b).count();
    let mut nearest: Vec<usize> = rows.iter().map(|row| differ(row)).chain([1]).collect();
    nearest.sort();
    assert_eq!(v.stats("")["collections"][0]["segments"], 1);
    for exact in [true, false] {
        let answer = v.ask("", &json!({ "vector": wanted, "k": 10, "exact": exact }));
        assert_eq!(paths(&answer)[0], "beside.vec");
        for (n, hit) in answer["hits"].as_array().unwrap().iter().enumerate() {
            let distance = hit["distance"].as_f64().unwrap() as usize;
            assert!(distance == nearest[n] || !exact && distance > nearest[n], "hit {n} of {answer}");
            if n > 0 {
                assert_eq!(distance, differ(&rows[hit["row"].as_u64().unwrap() as usize]), "{hit}");
            }
        }
    }
    v.write("half.vec", text(&[0.5; 130]));
    assert!(v.error_of("half.vec").is_some(), "0.5 is no bit");
}

#[test]
fn what_was_inferred_binds_nobody_once_its_vectors_are_gone() {
    let Some(v) = Volume::new(&[]) else { return };
    v.write("a.vec", "1,2,3");
    v.write("b.vec", "1,2");
    assert!(v.error_of("b.vec").is_some());
    v.write("a.vec", "4,5");
    assert_eq!(v.near("", &[4.0, 5.0], 1), ["a.vec"]);
    v.write("b.vec", "1,2");
    assert_eq!(v.near("", &[1.0, 2.0], 9).len(), 2);
}

#[test]
fn a_directory_is_adopted_with_what_it_holds() {
    let Some(v) = Volume::unmounted(&[]) else { return };
    fs::create_dir_all(v.source().join("deep/er")).unwrap();
    for n in 1..200 {
        fs::write(v.source().join(format!("deep/er/{n}.vec")), format!("{n},100")).unwrap();
    }
    v.mount();
    assert_eq!(v.near("", &[200.0, 100.0], 1), ["deep/er/199.vec"], "a search waits for the first scan");
    assert_eq!(v.near("", &[200.0, 100.0], 1_000).len(), 199);
}

#[test]
fn what_changed_while_unmounted_is_found_out() {
    let Some(v) = Volume::new(&[]) else { return };
    for n in 1..50 {
        v.write(&format!("{n}.vec"), format!("{n},1"));
    }
    v.umount();
    fs::remove_file(v.source().join("49.vec")).unwrap();
    fs::write(v.source().join("48.vec"), "1,1000").unwrap();
    fs::write(v.source().join("new.vec"), "1,-1").unwrap();
    fs::rename(v.source().join("47.vec"), v.source().join("moved.vec")).unwrap();
    v.mount();
    // What is gone or changed is never answered; what is new comes with the walk behind.
    assert!(!v.near("", &[49.0, 1.0], 99).iter().any(|path| path == "49.vec" || path == "47.vec"));
    while v.near("", &[1.0, -1.0], 1) != ["new.vec"] || v.near("", &[1.0, 1000.0], 1) != ["48.vec"] {
        std::thread::yield_now();
    }
    assert_eq!(v.near("", &[47.0, 1.0], 99).len(), 49);
    assert_eq!(v.stats("")["files"]["indexed"], 49);
}

#[test]
fn what_is_no_regular_file_is_renamed_without_a_trace_and_files_make_room_for_it() {
    let Some(v) = Volume::new(&[]) else { return };
    let files = |what: &str| v.stats("")["files"][what].as_u64().unwrap();
    std::os::unix::fs::symlink("nowhere", v.path("plain")).unwrap();
    fs::rename(v.path("plain"), v.path("s.vec")).unwrap();
    v.write("b.vec", "1,2");
    assert_eq!((files("indexed"), files("unread")), (1, 0));
    renameat_with(CWD, v.path("s.vec"), CWD, v.path("b.vec"), RenameFlags::EXCHANGE).unwrap();
    assert_eq!(v.near("", &[1.0, 2.0], 1), ["s.vec"]);
    fs::rename(v.path("b.vec"), v.path("s.vec")).unwrap();
    assert!(v.near("", &[1.0, 2.0], 1).is_empty());
    assert_eq!((files("indexed"), files("unread")), (0, 0));
}
