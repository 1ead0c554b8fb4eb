//! fanotify(7) on a whole file system, for which there is no safe binding: which names of which directories changed, the
//! directories by file handle (name_to_handle_at(2)). Needs CAP_SYS_ADMIN and a file system with handles.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::Errno;

/// See the module.
pub struct Fanotify(OwnedFd);

/// A changed name.
pub struct Event<'a> {
    /// Its directory, as [`handle_of`] gives it.
    pub handle: &'a [u8],
    /// The name.
    pub name: &'a [u8],
    /// It is a directory's.
    pub is_dir: bool,
    /// This process changed it.
    pub own: bool,
}

fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

impl Fanotify {
    /// Watches the file system of a directory.
    pub fn new(root: BorrowedFd<'_>) -> Result<Fanotify, Errno> {
        let flags = libc::FAN_CLASS_NOTIF | libc::FAN_CLOEXEC | libc::FAN_NONBLOCK | libc::FAN_REPORT_DFID_NAME;
        // SAFETY: takes numbers only.
        let fd = unsafe { libc::fanotify_init(flags, libc::O_RDONLY as u32) };
        if fd < 0 {
            return Err(last_errno());
        }
        // SAFETY: it was opened just now and is nobody else's.
        let fanotify = Fanotify(unsafe { OwnedFd::from_raw_fd(fd) });
        let wanted = libc::FAN_CREATE
            | libc::FAN_DELETE
            | libc::FAN_MOVED_FROM
            | libc::FAN_MOVED_TO
            | libc::FAN_CLOSE_WRITE
            | libc::FAN_ATTRIB
            | libc::FAN_ONDIR;
        let mark = libc::FAN_MARK_ADD | libc::FAN_MARK_FILESYSTEM;
        // SAFETY: without a path the descriptor is meant, which is open.
        match unsafe { libc::fanotify_mark(fd, mark, wanted, root.as_raw_fd(), std::ptr::null()) } {
            0 => Ok(fanotify),
            _ => Err(last_errno()),
        }
    }

    /// Takes the events that there are, as far as they fit into `space`; no more: EAGAIN. True if some were lost.
    pub fn read(&self, space: &mut [u8], mut each: impl FnMut(Event<'_>)) -> Result<bool, Errno> {
        let got = rustix::io::read(&self.0, &mut *space)?;
        let mut bytes = &space[..got];
        let us = std::process::id() as i32;
        let mut lost = false;
        while let Some(event) = number(bytes, 0).and_then(|len| bytes.get(..len as usize)).filter(|e| e.len() >= EVENT)
        {
            bytes = &bytes[event.len()..];
            let mask = u64::from_ne_bytes(part(event, 8));
            lost |= mask & libc::FAN_Q_OVERFLOW != 0;
            let own = i32::from_ne_bytes(part(event, 20)) == us;
            if let Some((handle, name)) = named(&event[EVENT..]) {
                each(Event { handle, name, is_dir: mask & libc::FAN_ONDIR != 0, own });
            }
        }
        Ok(lost)
    }
}

impl AsFd for Fanotify {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Sizes of `fanotify_event_metadata`, `fanotify_event_info_header` with the file system's id, and `file_handle` without
/// its bytes.
const EVENT: usize = size_of::<libc::fanotify_event_metadata>();
const INFO: usize = 12;
const HANDLE: usize = 8;

fn part<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..at + N).and_then(|part| part.try_into().ok()).unwrap_or([0; N])
}

fn number(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4).map(|_| u32::from_ne_bytes(part(bytes, at)))
}

/// Handle and name of an event's record of a directory and a name in it.
fn named(info: &[u8]) -> Option<(&[u8], &[u8])> {
    let record = info.get(..u16::from_ne_bytes(part(info, 2)) as usize)?;
    if record.first() != Some(&libc::FAN_EVENT_INFO_TYPE_DFID_NAME) {
        return None;
    }
    let handle = record.get(INFO..INFO + HANDLE + number(record, INFO)? as usize)?;
    let name = &record[INFO + handle.len()..];
    let end = name.iter().position(|byte| *byte == 0)?;
    // A directory's own change has no name.
    (&name[..end] != b".").then_some((handle, &name[..end]))
}

/// The handle of an open directory: length, type and bytes, as events have it.
pub fn handle_of(dir: BorrowedFd<'_>) -> Result<Vec<u8>, Errno> {
    const ROOM: usize = libc::MAX_HANDLE_SZ as usize;
    #[repr(C)]
    struct Handle {
        bytes: libc::c_uint,
        kind: libc::c_int,
        handle: [u8; ROOM],
    }
    let mut handle = Handle { bytes: ROOM as u32, kind: 0, handle: [0; ROOM] };
    let mut mount = 0;
    // SAFETY: `handle` is laid out as file_handle with room for as many bytes as it says; the path is empty and ended.
    let done = unsafe {
        libc::name_to_handle_at(
            dir.as_raw_fd(),
            c"".as_ptr(),
            (&raw mut handle).cast(),
            &raw mut mount,
            libc::AT_EMPTY_PATH,
        )
    };
    if done != 0 {
        return Err(last_errno());
    }
    let bytes = handle.handle.get(..handle.bytes as usize).ok_or(Errno::OVERFLOW)?;
    Ok([&handle.bytes.to_ne_bytes(), &handle.kind.to_ne_bytes(), bytes].concat())
}
