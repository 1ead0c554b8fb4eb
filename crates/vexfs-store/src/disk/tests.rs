use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use super::*;

/// What both disks do alike.
fn behaves(disk: &dyn Disk) {
    assert!(read_small(disk, "a").unwrap().is_none());
    write_small(disk, "a", b"one").unwrap();
    write_small(disk, "a", b"two!").unwrap();
    assert_eq!(read_small(disk, "a").unwrap().as_deref(), Some(&b"two!"[..]));
    let file = disk.open("segments/x").unwrap();
    file.write_at(3, b"abc").unwrap();
    assert_eq!(file.len().unwrap(), 6);
    let mut out = [9; 6];
    file.read_at(0, &mut out).unwrap();
    assert_eq!(&out, b"\0\0\0abc");
    assert!(file.read_at(1, &mut out).is_err());
    file.sync().unwrap();
    assert_eq!(disk.map("segments/x").unwrap().bytes(), b"\0\0\0abc");
    file.set_len(0).unwrap();
    assert!(file.is_empty().unwrap());
    assert_eq!(disk.list("segments").unwrap(), ["x"]);
    assert!(disk.list("").unwrap().contains(&"a".to_owned()));
    assert!(disk.list("absent").unwrap().is_empty());
    disk.sync_dir("segments").unwrap();
    disk.remove("segments/x").unwrap();
    disk.remove("segments/x").unwrap();
    let scratches = [disk.scratch(70_000).unwrap(), disk.scratch(70_000).unwrap()].map(std::fs::File::from);
    scratches[0].write_at(b"abc", 69_997).unwrap();
    assert_eq!(scratches[0].metadata().unwrap().len(), 70_000);
    scratches[1].read_exact_at(&mut out[..3], 69_997).unwrap();
    assert_eq!(&out[..3], &[0; 3], "each has bytes of its own");
    assert!(disk.list("segments").unwrap().is_empty(), "a scratch has no name");
    assert!(disk.map("segments/x").is_err());
    assert!(disk.lock().unwrap());
}

#[test]
fn the_disk_in_memory_does_what_a_directory_does() {
    behaves(&MemDisk::default());
    let dir = tempfile::tempdir().unwrap();
    let fd = OwnedFd::from(std::fs::File::open(dir.path()).unwrap());
    let disk = DirDisk::new(fd);
    behaves(&disk);
    assert!(disk.scratch(1 << 62).is_err(), "the bytes are on the disk, and there is no such disk");
    assert!(disk.list("segments").unwrap().is_empty());
    let again = DirDisk::new(OwnedFd::from(std::fs::File::open(dir.path()).unwrap()));
    assert!(!again.lock().unwrap(), "the lock is held");
}

#[test]
fn a_crash_keeps_what_was_synced() {
    let disk = MemDisk::default();
    let file = disk.open("a").unwrap();
    file.write_at(0, b"synced").unwrap();
    file.sync().unwrap();
    assert!(disk.crash().map("a").is_err(), "the name was not synced");
    disk.sync_dir("").unwrap();
    file.write_at(0, b"unsyn!").unwrap();
    assert_eq!(disk.crash().map("a").unwrap().bytes(), b"synced");
    disk.fail_at(disk.calls(), Fault::Torn(5));
    assert!(file.write_at(0, b"torn!!").is_err());
    assert_eq!(disk.crash().map("a").unwrap().bytes(), b"toryn!");
    assert!(file.sync().is_err());
}

#[test]
fn a_crash_may_keep_any_part_of_what_was_not_synced() {
    let disk = MemDisk::default();
    let file = disk.open("segments/a").unwrap();
    file.sync().unwrap();
    disk.sync_dir("segments").unwrap();
    assert!(disk.crash().files().is_empty(), "the folder's own name was not synced");
    disk.sync_dir("").unwrap();
    assert_eq!(disk.crash().files(), ["segments/a"]);
    file.write_at(0, &[1; 3 * 4096]).unwrap();
    assert_eq!(disk.crash_with(Survivors::All).bytes("segments/a").unwrap(), [1; 3 * 4096]);
    let mut lengths = std::collections::BTreeSet::new();
    let mut holes = 0;
    for seed in 0..200 {
        let torn = disk.crash_with(Survivors::Torn(seed)).bytes("segments/a").unwrap();
        assert!(torn.len() % 512 == 0 && torn.iter().all(|byte| *byte == 1));
        lengths.insert(torn.len());
        let some = disk.crash_with(Survivors::Some(seed)).bytes("segments/a").unwrap();
        holes += usize::from(some.contains(&0));
    }
    assert!(lengths.len() > 10 && holes > 10, "{lengths:?} {holes}");
    disk.rename("segments/a", "segments/b").unwrap();
    let names: std::collections::BTreeSet<_> =
        (0..50).map(|seed| disk.crash_with(Survivors::Some(seed)).files()).collect();
    assert_eq!(names.len(), 2, "{names:?}");
}

#[test]
fn each_fault_does_what_it_says() {
    let disk = MemDisk::default();
    let file = disk.open("a").unwrap();
    disk.fail_at(disk.calls(), Fault::Short(28));
    assert_eq!(file.write_at(0, b"four").unwrap_err().raw_os_error(), Some(28));
    assert_eq!(disk.bytes("a").unwrap(), b"fo");
    file.write_at(0, b"four").unwrap();
    disk.fail_at(disk.calls(), Fault::Flip(0));
    file.write_at(0, b"four").unwrap();
    assert_eq!(disk.bytes("a").unwrap(), b"fotr");
    disk.fail_at(disk.calls(), Fault::Slow(std::time::Duration::from_millis(5)));
    let start = std::time::Instant::now();
    file.sync().unwrap();
    assert!(start.elapsed() >= std::time::Duration::from_millis(5));
    disk.heal();
    disk.fail_reads_from(disk.reads(), 5);
    assert_eq!(file.len().unwrap_err().raw_os_error(), Some(5));
    assert!(disk.map("a").is_err() && disk.list("").is_err() && file.read_at(0, &mut [0]).is_err());
    disk.heal();
    assert_eq!(file.len().unwrap(), 4);
}
