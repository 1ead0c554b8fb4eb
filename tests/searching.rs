//! The three surfaces, and who may see what.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use serde_json::{Value, json};

use crate::support::{Random, Volume, is_root, npy, paths, skip, text};

fn example() -> Option<Volume> {
    let v = Volume::new(&[])?;
    for (name, text) in [("a.vec", "1,0,0"), ("b.vec", "1,0.1,0"), ("c.vec", "1,1,0"), ("d.vec", "0,0,1")] {
        v.write(name, text);
    }
    fs::create_dir(v.path("sub")).unwrap();
    v.write("sub/e.vec", "1,0.5,0");
    Some(v)
}

#[test]
fn similar_is_a_directory_of_ranked_links() {
    let Some(v) = example() else { return };
    let list = |name: &str| -> Vec<String> {
        let entries = fs::read_dir(v.path(".vexfs/similar").join(name)).unwrap();
        let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    };
    assert_eq!(list("a.vec"), ["01-0.9950-b.vec", "02-0.8944-e.vec", "03-0.7071-c.vec", "04-0.0000-d.vec"]);
    assert_eq!(list("a.vec?k=2"), ["01-0.9950-b.vec", "02-0.8944-e.vec"]);
    assert_eq!(list("a.vec#0?k=1&exact=1"), ["01-0.9950-b.vec"]);
    let link = v.path(".vexfs/similar/a.vec/02-0.8944-e.vec");
    assert_eq!(fs::read_link(&link).unwrap().to_str(), Some("../../../sub/e.vec"));
    assert_eq!(fs::read_to_string(&link).unwrap(), "1,0.5,0", "the link leads to the file");
    for absent in ["absent.vec", "a.vec#1", "a.vec?colour=1", "sub"] {
        assert!(fs::read_dir(v.path(".vexfs/similar").join(absent)).is_err(), "{absent}");
    }
    fs::rename(v.path("b.vec"), v.path("z.vec")).unwrap();
    fs::remove_file(v.path("sub/e.vec")).unwrap();
    assert_eq!(list("a.vec"), ["01-0.9950-z.vec", "02-0.7071-c.vec", "03-0.0000-d.vec"]);
}

#[test]
fn neighbors_are_the_links_that_the_asker_could_open() {
    let others: &[&str] = if is_root() { &["-o", "allow_other"] } else { &[] };
    let Some(v) = Volume::new(&[&["--sync", "immediate"], others].concat()) else { return };
    // Each in a direction of its own, leaning towards a.vec the less the later: none crowds another out of its links.
    let point = |n: usize, lean: f32| -> Vec<f32> {
        let mut point = vec![0.0; 6];
        (point[n], point[5]) = (1.0, lean);
        point
    };
    v.write("a.vec", text(&point(0, 0.5)));
    v.write("b.vec", text(&point(1, 0.4)));
    v.write("c.vec", text(&point(2, 0.3)));
    fs::create_dir(v.path("sub")).unwrap();
    v.write("sub/rows.npy", npy(&[point(3, 0.2), point(4, 0.1)]));
    v.write("other.vec", "1,2,3");
    let list = |dir: &str, name: &str| -> Vec<String> {
        let entries = fs::read_dir(v.path(dir).join(".vexfs").join(name)).unwrap();
        let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    };
    let all = ["01-0.1661-b.vec", "02-0.1285-c.vec", "03-0.0877-rows.npy", "04-0.0445-rows.npy#1"];
    assert_eq!(list("", "neighbors/a.vec"), all);
    let link = v.path(".vexfs/neighbors/a.vec").join(all[3]);
    assert_eq!(fs::read_link(&link).unwrap().to_str(), Some("../../../sub/rows.npy"));
    assert_eq!(list("sub", "neighbors/rows.npy"), ["01-0.0195-rows.npy#1"], "a directory is a scope");
    fs::hard_link(v.path("a.vec"), v.path("sub/same.vec")).unwrap();
    assert_eq!(list("sub", "neighbors/rows.npy"), ["01-0.0877-same.vec", "02-0.0195-rows.npy#1"]);
    assert_eq!(list("sub", "neighbors/same.vec"), ["01-0.0877-rows.npy", "02-0.0445-rows.npy#1"]);
    for absent in ["absent.vec", "a.vec#1", "a.vec?k=1", "sub"] {
        assert!(fs::read_dir(v.path(".vexfs/neighbors").join(absent)).is_err(), "{absent}");
    }
    if !skip(!is_root(), "other users need root") {
        let mode = |mode| fs::set_permissions(v.path("b.vec"), PermissionsExt::from_mode(mode)).unwrap();
        let seen = || {
            let script = ["--reuid=65534", "--regid=65534", "--clear-groups", "ls", ".vexfs/neighbors/a.vec"];
            let output = Command::new("setpriv").args(script).current_dir(v.mnt()).output().unwrap();
            String::from_utf8(output.stdout).unwrap()
        };
        assert_eq!(seen(), all.map(|name| format!("{name}\n")).concat());
        mode(0o600);
        assert_eq!(seen(), "01-0.1285-c.vec\n02-0.0877-rows.npy\n03-0.0445-rows.npy#1\n");
    }
    fs::remove_file(v.path("c.vec")).unwrap();
    assert_eq!(list("", "neighbors/a.vec"), ["01-0.1661-b.vec", "02-0.0877-rows.npy", "03-0.0445-rows.npy#1"]);
}

#[test]
fn the_query_file_takes_lines_and_gives_lines() {
    let Some(v) = example() else { return };
    let mut file = fs::File::options().read(true).write(true).open(v.path(".vexfs/query")).unwrap();
    // Two requests, the second in two writes and without its line end.
    file.write_all(b"{\"like\": \"a.vec\", \"k\": 1}\n\n{\"vector\": [0,0").unwrap();
    file.write_all(b",1], \"k\": 2, \"exact\": true}").unwrap();
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    let answers: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(answers.len(), 2);
    assert_eq!(paths(&answers[0]), ["b.vec"]);
    assert_eq!(paths(&answers[1])[0], "d.vec");
    // The same open file answers again.
    file.write_all(b"{\"like\": \"sub/e.vec#0\", \"k\": 1}\n").unwrap();
    text.clear();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(paths(&serde_json::from_str(&text).unwrap()), ["c.vec"]);

    for (request, code) in [
        (json!({}), "EINVAL"),
        (json!({ "vector": [1, 0, 0], "like": "a.vec" }), "EINVAL"),
        (json!({ "vector": [1, 0, 0], "k": 0 }), "EINVAL"),
        (json!({ "vector": [1, 0, 0], "k": 1_000_000 }), "EINVAL"),
        (json!({ "vector": [1, 0, 0], "ef": 9, "recall": 0.9 }), "EINVAL"),
        (json!({ "vector": [1, 0, 0], "recall": 1.5 }), "EINVAL"),
        (json!({ "vector": [0, 0, 0] }), "EINVAL"),
        (json!({ "vector": [1, 0] }), "EMSGSIZE"),
        (json!({ "vector": [1, 0, 1e39] }), "EINVAL"),
        (json!({ "vektor": [1, 0, 0] }), "EINVAL"),
        (json!([1]), "EINVAL"),
        (json!({ "like": "absent.vec" }), "ENOENT"),
        (json!({ "like": "a.vec#7" }), "ENODATA"),
        (json!({ "like": "a.vec#x" }), "EINVAL"),
        (json!({ "like": "sub" }), "ENODATA"),
        (json!({ "like": "../mnt/a.vec" }), "ENOENT"),
        (json!({ "like": ".vexfs/catalog" }), "ENOENT"),
        (json!({ "vector": [1, 0, 0], "timeout_ms": 0 }), "ETIMEDOUT"),
    ] {
        let answer = v.ask("", &request);
        assert_eq!(answer["error"]["code"], code, "{request}: {answer}");
        assert!(!answer["error"]["message"].as_str().unwrap().is_empty());
    }
    assert_eq!(paths(&v.ask("sub", &json!({ "like": "/a.vec" }))), ["e.vec"]);
    assert_eq!(v.ask("", &json!({ "vector": [1, 0, 0], "max_distance": 0.01 }))["hits"].as_array().unwrap().len(), 2);
}

#[test]
fn the_command_asks_and_prints_three_ways() {
    let Some(v) = example() else { return };
    let mnt = v.mnt().display().to_string();
    let run = |args: &[&str]| {
        let output = v.command(args);
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let like = format!("{mnt}/a.vec");
    let line = run(&["search", &mnt, "--like", &like, "-k", "1", "--tsv"]);
    let fields: Vec<&str> = line.trim_end().split('\t').collect();
    assert_eq!(fields[0], "1");
    assert!((fields[1].parse::<f32>().unwrap() + fields[2].parse::<f32>().unwrap() - 1.0).abs() < 1e-6, "{line}");
    assert_eq!(fields[3..], ["0", &format!("{mnt}/b.vec")]);
    let answer: Value =
        serde_json::from_str(&run(&["search", &mnt, "--vector", "[0, 0, 1]", "-k", "1", "--json"])).unwrap();
    assert_eq!(answer["hits"][0]["path"], format!("{mnt}/d.vec"));
    let file = v.dir.path().join("q.npy");
    fs::write(&file, npy(&[vec![1.0, 0.0, 0.0], vec![0.0, 0.0, 1.0]])).unwrap();
    let second = format!("{}#1", file.display());
    assert!(run(&["search", &mnt, "--vector-file", &second, "-k", "1", "--exact"]).contains("d.vec"));
    assert!(run(&["search", &format!("{mnt}/sub"), "--like", &like, "--recall", "0.99"]).contains("sub/e.vec"));
    assert!(run(&["status", &mnt]).contains("5 indexed"));
    let status: Value = serde_json::from_str(&run(&["status", "--json"])).unwrap();
    let volumes = status["volumes"].as_array().unwrap();
    assert!(volumes.iter().any(|volume| volume["mountpoint"] == mnt.as_str()));

    let refuse = |args: &[&str]| {
        let output = v.command(args);
        assert!(!output.status.success(), "{args:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(refuse(&["search", &mnt]).contains("--like"));
    assert!(refuse(&["search", &mnt, "--vector", "[1, x]"]).contains("\"x\" is not a number"));
    assert!(refuse(&["search", &mnt, "--vector", "[1]"]).contains("EMSGSIZE"));
    assert!(refuse(&["search", &mnt, "--vector-file", file.to_str().unwrap()]).contains("holds 2 vectors"));
    assert!(refuse(&["search", "/", "--vector", "[1]"]).contains("in no mounted VexFS volume"));
    assert!(refuse(&["status", "/"]).contains("in no mounted VexFS volume"));
}

/// 12,000 rows around 40 centres.
fn clusters(random: &mut Random, spread: f32) -> Vec<Vec<f32>> {
    let centres: Vec<Vec<f32>> = (0..40).map(|_| random.vector(32)).collect();
    let near = |_| {
        let centre = centres[random.below(centres.len())].clone();
        centre.iter().zip(random.vector(32)).map(|(c, noise)| c + spread * noise).collect()
    };
    (0..12_000).map(near).collect()
}

/// Of the ten nearest rows.
fn recall(v: &Volume, queries: &[Vec<f32>]) -> f64 {
    let rows_of = |asked: Value| -> Vec<u64> {
        let answer = v.ask("", &asked);
        answer["hits"].as_array().unwrap().iter().map(|hit| hit["row"].as_u64().unwrap()).collect()
    };
    let (mut right, mut all) = (0, 0);
    for query in queries {
        let exact = rows_of(json!({ "vector": query, "exact": true }));
        right += rows_of(json!({ "vector": query })).iter().filter(|row| exact.contains(row)).count();
        all += exact.len();
    }
    right as f64 / all as f64
}

#[test]
fn default_recall_through_the_mount_is_what_was_promised() {
    let Some(v) = Volume::new(&[]) else { return };
    let mut rows = clusters(&mut Random(3), 0.4);
    let queries = rows.split_off(11_800);
    v.write("rows.npy", npy(&rows));
    while v.stats("")["pending"] != 0 {
        std::thread::yield_now();
    }
    let recall = recall(&v, &queries);
    assert!(recall >= 0.95, "{recall}");
}

#[test]
fn queries_that_are_not_like_rows_are_learned_from() {
    let Some(v) = Volume::new(&[]) else { return };
    let mut random = Random(3);
    let rows = clusters(&mut random, 0.15);
    v.write("rows.npy", npy(&rows));
    while v.stats("")["pending"] != 0 {
        std::thread::yield_now();
    }
    // In no cluster.
    let mut midpoint = || -> Vec<f32> {
        let (one, other) = (&rows[random.below(rows.len())], &rows[random.below(rows.len())]);
        one.iter().zip(other).map(|(one, other)| (one + other) / 2.0).collect()
    };
    let some: Vec<Vec<f32>> = (0..100).map(|_| midpoint()).collect();
    let before = recall(&v, &some);
    assert!(before < 0.92, "{before}, so that there is something to learn");
    let learned = || v.stats("")["collections"][0]["learned"].as_u64().unwrap();
    assert_eq!(learned(), 0, "from so few");
    while learned() == 0 {
        v.ask("", &json!({ "vector": midpoint() }));
    }
    let fresh: Vec<Vec<f32>> = (0..300).map(|_| midpoint()).collect();
    let after = recall(&v, &fresh);
    assert!(after >= 0.93, "{before}, then {after}");
}

#[test]
fn a_hit_is_only_what_the_asker_could_open() {
    if skip(!is_root(), "other users need root") {
        return;
    }
    let Some(v) = Volume::new(&["-o", "allow_other"]) else { return };
    let mode = |name: &str, mode| fs::set_permissions(v.path(name), PermissionsExt::from_mode(mode)).unwrap();
    fs::create_dir(v.path("closed")).unwrap();
    fs::create_dir(v.path("group")).unwrap();
    for (n, name) in ["open.vec", "secret.vec", "closed/x.vec", "group/y.vec", "far.vec"].into_iter().enumerate() {
        v.write(name, text(&[1.0, n as f32 / 10.0]));
    }
    v.write("secret-bad.vec", "nan");
    mode("secret.vec", 0o600);
    mode("secret-bad.vec", 0o600);
    mode("closed", 0o700);
    std::os::unix::fs::chown(v.path("group"), None, Some(4_242)).unwrap();
    mode("group", 0o750);
    let as_user = |groups: &str, script: &str| {
        let output = Command::new("setpriv")
            .args(["--reuid=65534", "--regid=65534", groups, "sh", "-ec", script])
            .current_dir(v.mnt())
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let ask = r#"exec 3<>.vexfs/query; echo '{"vector": [1, 0], "k": 2}' >&3; cat <&3"#;
    let seen = |groups: &str| paths(&serde_json::from_str(&as_user(groups, ask)).unwrap());
    assert_eq!(seen("--clear-groups"), ["open.vec", "far.vec"]);
    assert_eq!(seen("--groups=4242"), ["open.vec", "group/y.vec"]);
    assert_eq!(v.near("", &[1.0, 0.0], 3), ["open.vec", "secret.vec", "closed/x.vec"], "root sees all");
    mode("secret.vec", 0o644);
    assert_eq!(seen("--clear-groups"), ["open.vec", "secret.vec"], "chmod is seen by the next search");
    let like = r#"exec 3<>.vexfs/query; echo '{"like": "closed/x.vec"}' >&3; cat <&3"#;
    let absent = r#"exec 3<>.vexfs/query; echo '{"like": "closed/nothing.vec"}' >&3; cat <&3"#;
    let code = |text: String| serde_json::from_str::<Value>(&text).unwrap()["error"]["code"].clone();
    assert_eq!(code(as_user("--clear-groups", like)), code(as_user("--clear-groups", absent)));
    assert!(!as_user("--clear-groups", "cat .vexfs/stats.json").contains("secret-bad"));
    // What a user makes is theirs.
    fs::create_dir(v.path("public")).unwrap();
    mode("public", 0o777);
    as_user("--groups=4242", "cd public; umask 027; echo 1,2 > mine.vec; mkdir dir; ln -s mine.vec link");
    for (name, mode) in [("mine.vec", 0o640), ("dir", 0o750)] {
        let made = fs::metadata(v.path("public").join(name)).unwrap();
        use std::os::unix::fs::MetadataExt;
        assert_eq!((made.uid(), made.gid(), made.mode() & 0o777), (65_534, 65_534, mode), "{name}");
    }
}
