//! Bad inputs: each is kept as a file, its status says why it isn't indexed, the daemon lives on.
//!
//! The names, errnos and words are those of the table in `docs/semantics.md`.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use rustix::io::Errno;

use crate::support::{Volume, npy_raw};

const F4: &str = "'descr': '<f4', 'fortran_order': False, 'shape': ";

fn floats(n: usize) -> Vec<u8> {
    [0, 0, 0x80, 0x3f].repeat(n)
}

fn array(fields: &str, data: &[u8]) -> Vec<u8> {
    npy_raw(1, fields, data)
}

/// Name, bytes, errno under `--strict`, words of the reason.
fn cases() -> Vec<(&'static str, Vec<u8>, Errno, &'static str)> {
    let text = |text: &str| text.as_bytes().to_vec();
    let f4 = |shape: &str, n: usize| array(&format!("{F4}{shape}"), &floats(n));
    let of = |kind: &str| array(&format!("'descr': '{kind}', 'fortran_order': False, 'shape': (1, 3)"), &[1; 48]);
    let mut huge_header = b"\x93NUMPY\x02\x00".to_vec();
    huge_header.extend((2u32 << 30).to_le_bytes());
    huge_header.extend(b"{'descr'");
    let mut long_v1 = b"\x93NUMPY\x01\x00\xff\xff{".to_vec();
    long_v1.resize(200, b' ');
    let nan = [f32::NAN, 1.0, 1.0].map(f32::to_le_bytes).concat();
    let inf = [1.0, f32::INFINITY, 1.0].map(f32::to_le_bytes).concat();
    let row = |data: &[u8]| array(&format!("{F4}(1, 3)"), data);
    let wide = [1e300f64, 1.0, 1.0].map(f64::to_le_bytes).concat();
    vec![
        ("nan.vec", text("1,nan,3"), Errno::INVAL, "line 1, column 3: \"nan\" is not a finite f32"),
        ("inf.vec", text("1,2,inf"), Errno::INVAL, "\"inf\" is not a finite f32"),
        ("neg-inf.vec", text("-Infinity,2,3"), Errno::INVAL, "\"-Infinity\" is not a finite f32"),
        ("overflow.vec", text("1e39,2,3"), Errno::INVAL, "\"1e39\" is not a finite f32"),
        ("zero.vec", text("0,0,0"), Errno::INVAL, "a zero vector has no cosine"),
        ("negative-zero.vec", text("-0.0 0 0"), Errno::INVAL, "a zero vector has no cosine"),
        ("too-long.vec", text("3e38,3e38,3e38"), Errno::INVAL, "its squared length is past f32"),
        ("ragged.vec", text("1,2,3\n4,5\n"), Errno::INVAL, "line 2: ragged: 2 numbers, where line 1 has 3"),
        ("ragged-later.vec", text("1 2\n3 4\n5\n"), Errno::INVAL, "line 3: ragged"),
        ("empty-field.vec", text("1,,3"), Errno::INVAL, "line 1, column 3: a number is missing before the comma"),
        ("leading-comma.vec", text(",1,2"), Errno::INVAL, "a number is missing before the comma"),
        ("trailing-comma.vec", text("1,2,3,"), Errno::INVAL, "a number is missing after the comma"),
        ("words.vec", text("one two three"), Errno::INVAL, "line 1, column 1: \"one\" is not a number"),
        ("half-word.vec", text("1 2 3x"), Errno::INVAL, "\"3x\" is not a number"),
        ("brackets.vec", text("[1, 2, 3]"), Errno::INVAL, "\"[1\" is not a number"),
        ("semicolons.vec", text("1;2;3"), Errno::INVAL, "\"1;2;3\" is not a number"),
        ("hexadecimal.vec", text("0x1 0x2 0x3"), Errno::INVAL, "is not a number"),
        ("nul.vec", b"1,2\0,3".to_vec(), Errno::INVAL, "is not a number"),
        ("latin1.vec", b"1,2,\xe9".to_vec(), Errno::INVAL, "byte 4 is not text"),
        ("utf16.vec", b"\xff\xfe1\0,\x002\0".to_vec(), Errno::INVAL, "byte 0 is not text"),
        ("long.vec", vec![b'1'; (4 << 20) + 1], Errno::TOOBIG, "bytes of text; a .vec may have 4194304"),
        ("too-many.vec", "1 ".repeat(65_537).into_bytes(), Errno::TOOBIG, "65537 dimensions; at most 65536"),
        ("two.vec", text("1,2"), Errno::MSGSIZE, "row 0: 2 dimensions, 3 are wanted"),
        ("four.vec", text("1,2,3,4"), Errno::MSGSIZE, "row 0: 4 dimensions, 3 are wanted"),
        ("text.npy", text("1,2,3"), Errno::INVAL, "no .npy header"),
        ("magic-only.npy", b"\x93NUMPY".to_vec(), Errno::INVAL, "no .npy header"),
        ("version-9.npy", npy_raw(9, &format!("{F4}(1, 3)"), &floats(3)), Errno::INVAL, ".npy version 9; 1, 2 and 3"),
        ("huge-header.npy", huge_header, Errno::TOOBIG, "a header of 2147483648 bytes; at most 65536"),
        ("cut-header.npy", long_v1, Errno::INVAL, "truncated: the header takes 65535 bytes"),
        ("no-dict.npy", array("", b""), Errno::INVAL, "header: "),
        ("no-shape.npy", array("'descr': '<f4', 'fortran_order': False", &floats(3)), Errno::INVAL, "shape"),
        ("nested.npy", array(&format!("{F4}{}", "(".repeat(2_000)), b""), Errno::INVAL, "nested brackets"),
        (
            "truncated.npy",
            f4("(2, 3)", 5),
            Errno::INVAL,
            "truncated: shape (2, 3) takes 24 bytes after the header, the file has 20",
        ),
        ("no-data.npy", f4("(1000000, 3)", 0), Errno::INVAL, "truncated: shape (1000000, 3)"),
        ("overflowing.npy", f4("(9223372036854775807, 4)", 0), Errno::TOOBIG, "past any file's size"),
        (
            "pickled.npy",
            array("'descr': '|O', 'fortran_order': False, 'shape': (1, 3)", b"\x80\x04N."),
            Errno::INVAL,
            "pickled objects are never read",
        ),
        (
            "record.npy",
            array("'descr': [('x', '<f4')], 'fortran_order': False, 'shape': (3,)", &floats(3)),
            Errno::INVAL,
            "records are no vectors",
        ),
        ("complex.npy", of("<c8"), Errno::INVAL, "f2, f4, f8, i1 and u1 are indexed"),
        ("int64.npy", of("<i8"), Errno::INVAL, "f2, f4, f8, i1 and u1 are indexed"),
        ("bool.npy", of("|b1"), Errno::INVAL, "f2, f4, f8, i1 and u1 are indexed"),
        ("strings.npy", of("<U4"), Errno::INVAL, "f2, f4, f8, i1 and u1 are indexed"),
        ("scalar.npy", f4("()", 1), Errno::INVAL, "an array of 0 dimensions"),
        ("cube.npy", f4("(1, 1, 3)", 3), Errno::INVAL, "an array of 3 dimensions"),
        ("no-columns.npy", f4("(3, 0)", 0), Errno::INVAL, "vectors of 0 dimensions"),
        ("wide-rows.npy", f4("(1, 65537)", 65_537), Errno::TOOBIG, "65537 dimensions"),
        ("wrong-width.npy", f4("(2, 4)", 8), Errno::MSGSIZE, "row 0: 4 dimensions, 3 are wanted"),
        ("nan.npy", row(&nan), Errno::INVAL, "row 0: value 0 is not finite"),
        ("inf.npy", row(&inf), Errno::INVAL, "row 0: value 1 is not finite"),
        (
            "zero-row.npy",
            array(&format!("{F4}(2, 3)"), &[floats(3), vec![0; 12]].concat()),
            Errno::INVAL,
            "row 1: a zero vector has no cosine",
        ),
        (
            "wide-f8.npy",
            array("'descr': '<f8', 'fortran_order': False, 'shape': (1, 3)", &wide),
            Errno::INVAL,
            "value 0 is not finite",
        ),
    ]
}

fn write_and_sync(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

#[test]
fn each_bad_input_is_kept_explained_and_survived() {
    let Some(v) = Volume::new(&[]) else { return };
    v.write("good.vec", "1,2,3");
    let cases = cases();
    assert!(cases.len() >= 40, "{}", cases.len());
    let table = include_str!("../docs/semantics.md");
    for (name, bytes, errno, reason) in &cases {
        v.write(name, bytes);
        let (number, told) = v.error_of(name).unwrap_or_else(|| panic!("{name} was taken"));
        assert!(told.contains(reason), "{name}: {told}");
        assert_eq!(number, i64::from(errno.raw_os_error()), "{name}: {told}");
        assert_eq!(&fs::read(v.path(name)).unwrap(), bytes, "{name}");
        assert_eq!(v.near("", &[1.0, 2.0, 3.0], 9), ["good.vec"], "{name}");
        let mut status = Vec::with_capacity(4096);
        rustix::fs::getxattr(v.path(name), "user.vexfs.status", rustix::buffer::spare_capacity(&mut status)).unwrap();
        assert!(String::from_utf8(status).unwrap().ends_with(&told), "{name}");
        assert!(table.contains(&format!("`{name}`")), "docs/semantics.md doesn't list {name}");
    }
    v.remount();
    assert_eq!(v.stats("")["files"]["refused"], cases.len());
    assert_eq!(v.near("", &[1.0, 2.0, 3.0], 9), ["good.vec"]);
    // A bad file that is mended is taken.
    v.write("nan.vec", "3,2,1");
    assert_eq!(v.near("", &[3.0, 2.0, 1.0], 1), ["nan.vec"]);
}

#[test]
fn strict_makes_fsync_and_close_say_so() {
    let Some(v) = Volume::new(&["--strict"]) else { return };
    v.write("good.vec", "1,2,3");
    for (name, bytes, errno, _) in cases() {
        let error = write_and_sync(&v.path(name), &bytes).expect_err(name);
        assert_eq!(error.raw_os_error(), Some(errno.raw_os_error()), "{name}: {error}");
        assert_eq!(fs::read(v.path(name)).unwrap(), bytes, "{name}");
    }
    // close(2) itself, without fsync; `File` swallows what it answers, dd doesn't.
    let output = std::process::Command::new("dd")
        .args(["status=none", &format!("of={}", v.path("dd.vec").display())])
        .stdin(File::open(v.path("nan.vec")).unwrap())
        .output()
        .unwrap();
    assert!(!output.status.success(), "dd saw no error at close");
}

#[test]
fn empty_files_and_arrays_are_no_error() {
    let Some(v) = Volume::new(&["--strict"]) else { return };
    v.write("empty.vec", "");
    v.write("blank.vec", " \n\t\n");
    v.write("empty.npy", "");
    v.write("no-rows.npy", array(&format!("{F4}(0, 3)"), b""));
    assert_eq!(v.stats("")["files"]["empty"], 4);
}

#[test]
fn values_must_fit_the_collections_element() {
    let Some(v) = Volume::new(&[]) else { return };
    v.write(".vexfs.toml", "metric = \"l2\"\nelement = \"u8\"\n");
    v.write("fits.vec", "1,2,255");
    v.write("fraction.vec", "1,2,2.5");
    v.write("large.vec", "1,2,256");
    assert_eq!(v.near("", &[1.0, 2.0, 2.5], 9), ["fits.vec"]);
    let (_, told) = v.error_of("fraction.vec").unwrap();
    assert!(told.contains("value 2 (2.5) is not representable as u8"), "{told}");
    assert!(v.error_of("large.vec").is_some());
}

#[test]
fn bad_settings_are_explained_and_the_old_ones_stand() {
    let Some(v) = Volume::new(&[]) else { return };
    v.write(".vexfs.toml", "metric = \"l2\"\n");
    v.write("a.vec", "3,4");
    for (text, reason) in [
        ("metric = \"manhattan\"", "metric: \"manhattan\" is none of"),
        ("dimension = 0", "dimension: 0 dimensions; 1 to 65536"),
        ("dimension = -1", "line 1"),
        ("colour = 1", "unknown field `colour`"),
        ("metric = ", "line 1"),
        ("\n\nm = 1", "m: 1 is not between 2 and 128"),
        ("ef_construction = 1", "ef_construction: 1 is not between"),
        ("quantization = \"pq\"", "quantization: \"pq\" is none of"),
        ("element = \"f64\"", "element: \"f64\" is none of"),
    ] {
        v.write(".vexfs.toml", text);
        let (_, told) = v.error_of(".vexfs.toml").unwrap_or_else(|| panic!("{text} was taken"));
        assert!(told.contains(reason), "{text}: {told}");
        let answer = v.ask("", &serde_json::json!({ "vector": [0.0, 0.0] }));
        assert_eq!(answer["hits"][0]["distance"], 5.0, "{text}: {answer}");
    }
    v.write(".vexfs.toml", "metric = \"l2\"\ndimension = 3\n");
    assert!(v.error_of(".vexfs.toml").is_none());
    assert!(v.error_of("a.vec").unwrap().1.contains("2 dimensions, 3 are wanted"));
}

/// Files are read one at a time by the lowest bits of their inode numbers. Settings held theirs while the files that they
/// concern were read: where a file had the same ones, close(2) of the settings never returned.
#[test]
fn settings_may_share_the_low_bits_of_a_vector_files_inode_number() {
    use std::os::unix::fs::MetadataExt;
    let Some(v) = Volume::new(&[]) else { return };
    v.write(".vexfs.toml", "metric = \"l2\"\n");
    let inode = |name: &str| std::fs::metadata(v.path(name)).unwrap().ino();
    let settings = inode(".vexfs.toml");
    // Which numbers files get is up to the file system and to who else makes files there.
    let met = (0..20_000).any(|n| {
        let name = format!("{n}.vec");
        v.write(&name, "0, 5");
        inode(&name) % 64 == settings % 64
    });
    assert!(met, "no file's number was like that of the settings");
    v.write(".vexfs.toml", "metric = \"ip\"\n");
    let answer = v.ask("", &serde_json::json!({ "vector": [0.0, 1.0], "k": 1 }));
    assert_eq!(answer["hits"][0]["distance"], -5.0, "{answer}");
}
