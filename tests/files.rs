//! Ordinary files behave as files.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt, symlink};

use rustix::fs::{CWD, FallocateFlags, RenameFlags, XattrFlags, renameat_with};
use rustix::io::Errno;

use crate::support::{Random, Volume, is_root, skip};

#[test]
fn bytes_written_are_bytes_read_and_lie_in_the_source() {
    let Some(v) = Volume::new(&[]) else { return };
    let mut random = Random(1);
    let bytes: Vec<u8> = (0..3_000_000).map(|_| random.next() as u8).collect();
    v.write("big.bin", &bytes);
    assert_eq!(fs::read(v.path("big.bin")).unwrap(), bytes);
    assert_eq!(fs::read(v.source().join("big.bin")).unwrap(), bytes);

    let file = File::options().read(true).write(true).open(v.path("big.bin")).unwrap();
    file.write_all_at(b"middle", 1_000_000).unwrap();
    file.set_len(2_000_000).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 2_000_000);
    let mut six = [0; 6];
    file.read_exact_at(&mut six, 1_000_000).unwrap();
    assert_eq!(&six, b"middle");
    drop(file);

    let mut log = File::options().append(true).open(v.path("big.bin")).unwrap();
    log.write_all(b"end").unwrap();
    drop(log);
    assert_eq!(fs::metadata(v.path("big.bin")).unwrap().len(), 2_000_003);
    v.remount();
    assert!(fs::read(v.path("big.bin")).unwrap().ends_with(b"end"));
}

/// Closing is told asynchronously, and may be answered before the open that it ends is done.
#[test]
fn no_backing_file_is_left_when_all_files_are_closed() {
    let Some(v) = Volume::new(&[]) else { return };
    if skip(!is_root(), "passthrough needs root") {
        return;
    }
    for n in 0..100 {
        v.write(&format!("{n}.bin"), "bytes");
    }
    let held = File::open(v.path("0.bin")).unwrap();
    assert_ne!(v.stats("")["backed"], 0);
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let v = &v;
            scope.spawn(move || {
                for n in 0..2_500 {
                    drop(File::open(v.path(&format!("{}.bin", (n * 7 + thread) % 100))).unwrap());
                }
            });
        }
    });
    drop(held);
    let mut tries = 0..1_000;
    while v.stats("")["backed"] != 0 {
        assert!(tries.next().is_some(), "{}", v.stats("")["backed"]);
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}

#[test]
#[allow(unsafe_code)]
fn a_mapping_is_coherent_with_reads_and_writes() {
    let Some(v) = Volume::new(&[]) else { return };
    v.write("m", vec![7; 8192]);
    let file = File::options().read(true).write(true).open(v.path("m")).unwrap();
    // SAFETY: the test's own file; nobody truncates it.
    let mut map = unsafe { memmap2::MmapMut::map_mut(&file) }.unwrap();
    file.write_all_at(b"written", 10).unwrap();
    assert_eq!(&map[10..17], b"written");
    map[100..106].copy_from_slice(b"mapped");
    let mut read = [0; 6];
    file.read_exact_at(&mut read, 100).unwrap();
    assert_eq!(&read, b"mapped");
}

#[test]
fn names_are_made_moved_exchanged_and_removed() {
    let Some(v) = Volume::new(&[]) else { return };
    fs::create_dir(v.path("d")).unwrap();
    v.write("a", "a");
    v.write("b", "b");
    let rename = |from: &str, to: &str, flags| renameat_with(CWD, v.path(from), CWD, v.path(to), flags);
    assert_eq!(rename("a", "b", RenameFlags::NOREPLACE), Err(Errno::EXIST));
    rename("a", "b", RenameFlags::EXCHANGE).unwrap();
    assert_eq!(fs::read(v.path("a")).unwrap(), b"b");
    rename("a", "d/moved", RenameFlags::NOREPLACE).unwrap();
    fs::rename(v.path("d/moved"), v.path("b")).unwrap();
    assert_eq!(fs::read(v.path("b")).unwrap(), b"b");

    fs::hard_link(v.path("b"), v.path("d/hard")).unwrap();
    assert_eq!(fs::metadata(v.path("b")).unwrap().nlink(), 2);
    assert_eq!(fs::metadata(v.path("b")).unwrap().ino(), fs::metadata(v.path("d/hard")).unwrap().ino());
    symlink("../b", v.path("d/soft")).unwrap();
    assert_eq!(fs::read_link(v.path("d/soft")).unwrap().to_str(), Some("../b"));
    assert_eq!(fs::read(v.path("d/soft")).unwrap(), b"b");
    assert_eq!(fs::remove_dir(v.path("d")).unwrap_err().raw_os_error(), Some(Errno::NOTEMPTY.raw_os_error()));
    fs::rename(v.path("d"), v.path("e")).unwrap();
    let mut names: Vec<_> = fs::read_dir(v.path("e")).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["hard", "soft"]);
    fs::remove_dir_all(v.path("e")).unwrap();
    assert_eq!(fs::metadata(v.path("b")).unwrap().nlink(), 1);
    assert_eq!(fs::metadata(v.path("e")).unwrap_err().kind(), std::io::ErrorKind::NotFound);

    rustix::fs::mknodat(CWD, v.path("fifo"), rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    assert!(fs::metadata(v.path("fifo")).unwrap().file_type().is_fifo());
}

#[test]
fn an_unlinked_open_file_lives_until_it_is_closed() {
    let Some(v) = Volume::new(&[]) else { return };
    let mut file = File::options().read(true).write(true).create_new(true).open(v.path("x")).unwrap();
    file.write_all(b"still").unwrap();
    fs::remove_file(v.path("x")).unwrap();
    file.write_all(b" here").unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "still here");
    assert_eq!(file.metadata().unwrap().nlink(), 0);
}

#[test]
fn attributes_are_kept() {
    let Some(v) = Volume::new(&[]) else { return };
    v.write("f", "x");
    let path = v.path("f");
    fs::set_permissions(&path, PermissionsExt::from_mode(0o640)).unwrap();
    let time = std::time::UNIX_EPOCH + std::time::Duration::new(1_234_567_890, 123_456_789);
    File::options().write(true).open(&path).unwrap().set_modified(time).unwrap();
    let below = fs::metadata(v.source().join("f")).unwrap();
    let above = fs::metadata(&path).unwrap();
    assert_eq!((above.mode(), above.ino(), above.mtime_nsec()), (below.mode(), below.ino(), below.mtime_nsec()));
    assert_eq!(above.mode() & 0o7777, 0o640);
    assert_eq!(above.modified().unwrap(), time);

    rustix::fs::setxattr(&path, "user.note", b"kept", XattrFlags::CREATE).unwrap();
    assert_eq!(rustix::fs::setxattr(&path, "user.note", b"", XattrFlags::CREATE), Err(Errno::EXIST));
    let mut value = Vec::with_capacity(64);
    rustix::fs::getxattr(&path, "user.note", rustix::buffer::spare_capacity(&mut value)).unwrap();
    assert_eq!(value, b"kept");
    let mut names = Vec::with_capacity(256);
    rustix::fs::listxattr(&path, rustix::buffer::spare_capacity(&mut names)).unwrap();
    assert_eq!(names, b"user.note\0");
    rustix::fs::removexattr(&path, "user.note").unwrap();
    assert_eq!(rustix::fs::getxattr_query(&path, "user.note"), Err(Errno::NODATA));

    // A symlink has its own, whatever it leads to; a user may give it none.
    symlink("nowhere", v.path("link")).unwrap();
    assert_eq!(rustix::fs::llistxattr(v.path("link"), &mut [0u8; 64][..]), Ok(0));
    assert_eq!(rustix::fs::lsetxattr(v.path("link"), "user.note", b"", XattrFlags::empty()), Err(Errno::PERM));
    if !skip(!is_root(), "trusted attributes need root") {
        rustix::fs::lsetxattr(v.path("link"), "trusted.note", b"kept", XattrFlags::empty()).unwrap();
        assert_eq!(rustix::fs::lgetxattr(v.source().join("link"), "trusted.note", &mut [0u8; 64][..]), Ok(4));
    }

    if !skip(!is_root(), "chown needs root") {
        std::os::unix::fs::chown(&path, Some(12), Some(34)).unwrap();
        assert_eq!(fs::metadata(&path).map(|m| (m.uid(), m.gid())).unwrap(), (12, 34));
    }
}

#[test]
fn space_is_reserved_punched_and_copied() {
    let Some(v) = Volume::new(&[]) else { return };
    let file = File::options().read(true).write(true).create_new(true).open(v.path("sparse")).unwrap();
    rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, 1 << 20).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 1 << 20);
    file.write_all_at(&[1; 4096], 0).unwrap();
    file.write_all_at(&[2; 4096], 512 << 10).unwrap();
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&file, punch, 0, 256 << 10).unwrap();
    let mut first = [9; 4096];
    file.read_exact_at(&mut first, 0).unwrap();
    assert_eq!(first, [0; 4096]);
    assert_eq!(rustix::fs::seek(&file, rustix::fs::SeekFrom::Hole(0)).unwrap(), 0);
    assert!(rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(0)).unwrap() > 0);

    let copy = File::options().read(true).write(true).create_new(true).open(v.path("copy")).unwrap();
    let (mut from, mut to) = (512 << 10, 100);
    let n = rustix::fs::copy_file_range(&file, Some(&mut from), &copy, Some(&mut to), 4096).unwrap();
    assert_eq!(n, 4096);
    let mut copied = [0; 4096];
    copy.read_exact_at(&mut copied, 100).unwrap();
    assert_eq!(copied, [2; 4096]);
    copy.sync_all().unwrap();
    File::open(v.mnt()).unwrap().sync_all().unwrap();
    assert!(rustix::fs::statvfs(v.mnt()).unwrap().f_blocks > 0);
}

#[test]
fn a_large_directory_is_listed_once_each() {
    let Some(v) = Volume::new(&[]) else { return };
    fs::create_dir(v.path("many")).unwrap();
    for n in 0..3_000 {
        v.write(&format!("many/{n}"), "");
    }
    let mut seen = std::collections::BTreeSet::new();
    for (n, entry) in fs::read_dir(v.path("many")).unwrap().enumerate() {
        let entry = entry.unwrap();
        assert!(seen.insert(entry.file_name()));
        // Names that vanish behind the reader disturb nothing.
        if n % 7 == 0 {
            fs::remove_file(entry.path()).unwrap();
        }
    }
    assert_eq!(seen.len(), 3_000);
}

#[test]
fn the_state_directory_is_out_of_reach_and_its_name_reserved() {
    let Some(v) = Volume::new(&[]) else { return };
    assert!(v.source().join(".vexfs/catalog").exists());
    assert!(fs::metadata(v.path(".vexfs/catalog")).is_err());
    assert!(fs::read_dir(v.mnt()).unwrap().all(|entry| entry.unwrap().file_name() != ".vexfs"));
    fs::create_dir(v.path("d")).unwrap();
    assert!(fs::create_dir(v.path("d/.vexfs")).is_err());
    assert!(fs::rename(v.path("d"), v.path(".vexfs")).is_err());
    assert!(fs::remove_dir(v.path(".vexfs")).is_err());
    assert!(fs::write(v.path(".vexfs/x"), "").is_err());
    assert!(v.source().join(".vexfs/catalog").exists());
}

#[test]
fn names_and_sizes_go_as_far_as_the_sources() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let Some(v) = Volume::new(&[]) else { return };
    let name: Vec<u8> = (0..255u32).map(|n| 0x80 + (n % 0x7f) as u8).collect();
    let path = v.mnt().join(OsStr::from_bytes(&name));
    let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    let far = (5u64 << 30) + 7;
    file.write_all_at(b"far", far).unwrap();
    assert_eq!(file.metadata().unwrap().len(), far + 3);
    drop(file);
    v.remount();
    let listed: Vec<_> = fs::read_dir(v.mnt()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(listed, [OsStr::from_bytes(&name)]);
    let mut three = [0; 3];
    File::open(&path).unwrap().read_exact_at(&mut three, far).unwrap();
    assert_eq!(&three, b"far");
    let longer = v.mnt().join(OsStr::from_bytes(&[name, b"x".to_vec()].concat()));
    assert_eq!(File::create(longer).unwrap_err().raw_os_error(), Some(Errno::NAMETOOLONG.raw_os_error()));
}

#[test]
fn files_without_a_name_are_refused_as_the_fuse_crate_cant_make_them() {
    let Some(v) = Volume::new(&[]) else { return };
    let made = rustix::fs::open(v.mnt(), rustix::fs::OFlags::TMPFILE | rustix::fs::OFlags::RDWR, 0o600.into());
    assert_eq!(made.unwrap_err(), Errno::OPNOTSUPP);
}
