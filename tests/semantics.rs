//! A document that lies fails the build: each promise names the test that checks it.

#[test]
fn each_promise_names_a_test_that_exists() {
    let document = include_str!("../docs/semantics.md");
    let sources = [
        include_str!("attached.rs"),
        include_str!("beneath.rs"),
        include_str!("crash.rs"),
        include_str!("disks.rs"),
        include_str!("files.rs"),
        include_str!("inputs.rs"),
        include_str!("model.rs"),
        include_str!("mounting.rs"),
        include_str!("permissions.rs"),
        include_str!("searching.rs"),
        include_str!("upkeep.rs"),
        include_str!("vectors.rs"),
        include_str!("../crates/vexfs-fs/src/walk/tests.rs"),
    ]
    .concat();
    let mut promises = 0;
    for line in document.lines().filter(|line| line.starts_with("* ")) {
        let (_, tests) = line.rsplit_once(" — ").unwrap_or_else(|| panic!("no test is named: {line}"));
        for test in tests.split(", ") {
            let name = test.trim().trim_matches('`');
            assert!(sources.contains(&format!("fn {name}(")), "there is no test {name}: {line}");
            promises += 1;
        }
    }
    assert!(promises >= 20, "{promises} promises were found");
}
