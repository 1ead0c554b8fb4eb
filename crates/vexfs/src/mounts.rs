//! Which VexFS volumes are mounted, as the kernel tells it.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// A mounted volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountedVolume {
    /// Where.
    pub mountpoint: PathBuf,
    /// What the mount table calls its source.
    pub source: OsString,
    /// The kernel's number of its FUSE connection.
    pub connection: u64,
}

/// The file system type in the mount table.
const TYPE: &[u8] = b"fuse.vexfs";

/// All mounted volumes of this mount namespace, the topmost at a path last.
pub fn volumes() -> Result<Vec<MountedVolume>, String> {
    let table = std::fs::read("/proc/self/mountinfo").map_err(|error| format!("/proc/self/mountinfo: {error}"))?;
    Ok(table.split(|byte| *byte == b'\n').filter_map(parse_line).collect())
}

/// `36 35 98:0 /root /mountpoint opts [optional…] - type source superopts` (proc_pid_mountinfo(5)).
fn parse_line(line: &[u8]) -> Option<MountedVolume> {
    let fields: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
    let dash = fields.iter().position(|field| *field == b"-")?;
    if *fields.get(dash + 1)? != TYPE {
        return None;
    }
    // The connection's number is the device number, which the kernel puts together as minor | major << 20.
    let (major, minor) = std::str::from_utf8(fields.get(2)?).ok()?.split_once(':')?;
    let connection = (major.parse::<u64>().ok()? << 20) | minor.parse::<u64>().ok()?;
    Some(MountedVolume {
        mountpoint: PathBuf::from(unescape(fields.get(4)?)),
        source: unescape(fields.get(dash + 2)?),
        connection,
    })
}

/// The table writes space, tab, newline and backslash as three octal digits.
fn unescape(field: &[u8]) -> OsString {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, after @ ..] = rest {
        let code = match (first, after) {
            (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..]) => {
                Some((a - b'0') * 64 + (b - b'0') * 8 + (c - b'0'))
            }
            _ => None,
        };
        match code {
            Some(byte) => {
                out.push(byte);
                rest = &rest[4..];
            }
            None => {
                out.push(*first);
                rest = after;
            }
        }
    }
    OsString::from_vec(out)
}

/// The volume that a (canonical) path lies in.
pub fn containing(path: &Path) -> Result<Option<MountedVolume>, String> {
    let mut best: Option<MountedVolume> = None;
    for volume in volumes()? {
        let deeper = best.as_ref().is_none_or(|known| {
            known.mountpoint.as_os_str().as_bytes().len() <= volume.mountpoint.as_os_str().as_bytes().len()
        });
        if path.starts_with(&volume.mountpoint) && deeper {
            best = Some(volume);
        }
    }
    Ok(best)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_mount_table_is_read_with_its_escapes() {
        let line = br"41 29 0:37 / /mnt/a\040b rw,nosuid - fuse.vexfs /data\134x rw,user_id=0";
        let volume = parse_line(line).unwrap();
        assert_eq!(volume.mountpoint, PathBuf::from("/mnt/a b"));
        assert_eq!(volume.source, OsString::from("/data\\x"));
        assert_eq!(volume.connection, 37);
        assert_eq!(parse_line(b"41 29 0:37 / /mnt rw - ext4 /dev/vda rw"), None);
        assert_eq!(parse_line(b""), None);
    }
}
