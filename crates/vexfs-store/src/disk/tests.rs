use std::os::fd::OwnedFd;

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
    assert!(disk.list("absent").unwrap().is_empty());
    disk.sync_dir("segments").unwrap();
    disk.remove("segments/x").unwrap();
    disk.remove("segments/x").unwrap();
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
