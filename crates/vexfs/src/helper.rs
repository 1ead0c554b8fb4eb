//! As `mount.vexfs` or `mount.fuse.vexfs` (links to this program in /sbin): what mount(8) and /etc/fstab call.
//!
//! ```text
//! /data  /mnt/v  fuse.vexfs  allow_other,vexfs.sync=immediate,nofail  0 0
//! ```

use std::ffi::OsString;
use std::path::Path;

/// Options that are mount(8)'s and systemd's own business.
const THEIRS: [&str; 12] = [
    "defaults",
    "auto",
    "noauto",
    "user",
    "nouser",
    "users",
    "owner",
    "group",
    "nofail",
    "_netdev",
    "relatime",
    "norelatime",
];

/// The arguments of `vexfs` that a helper's call comes to; `None` where the program was called by its own name.
pub fn arguments(called: &[OsString]) -> Option<Result<Vec<OsString>, String>> {
    let name = Path::new(called.first()?).file_name()?;
    (name == "mount.vexfs" || name == "mount.fuse.vexfs").then(|| translate(called))
}

/// `mount.vexfs SOURCE MOUNTPOINT [-sfnv] [-N NAMESPACE] [-t TYPE] [-o OPTIONS]`, as mount(8) says.
fn translate(called: &[OsString]) -> Result<Vec<OsString>, String> {
    let mut vexfs: Vec<OsString> = vec!["vexfs".into(), "mount".into()];
    let mut rest = called.iter().skip(1);
    while let Some(argument) = rest.next() {
        match argument.to_str() {
            Some("-o") => {
                let list = rest.next().and_then(|list| list.to_str()).ok_or("-o wants a list of options")?;
                for option in list.split(',').filter(|option| !option.is_empty()) {
                    vexfs.extend(translate_option(option)?);
                }
            }
            Some("-t" | "-N") => {
                rest.next();
            }
            Some(flags) if flags.starts_with('-') => {
                // Sloppy, no mtab, verbose; a fake mount does nothing.
                if flags[1..].contains('f') {
                    return Err("a mount can't be faked".to_owned());
                }
                if !flags[1..].chars().all(|flag| "snv".contains(flag)) {
                    return Err(format!("{flags} is no option of a mount helper"));
                }
            }
            _ => vexfs.push(argument.clone()),
        }
    }
    Ok(vexfs)
}

fn translate_option(option: &str) -> Result<Vec<OsString>, String> {
    let (key, value) = option.split_once('=').map_or((option, None), |(key, value)| (key, Some(value)));
    Ok(match (key, value) {
        ("vexfs.strict", None) => vec!["--strict".into()],
        ("vexfs.sync", Some(mode)) => vec!["--sync".into(), mode.into()],
        ("vexfs.state", Some(dir)) => vec!["--state".into(), dir.into()],
        _ if key.starts_with("vexfs.") => return Err(format!("\"{option}\" is not an option of vexfs")),
        _ if key.starts_with("x-") || key == "comment" || THEIRS.contains(&key) => Vec::new(),
        _ => vec!["-o".into(), option.into()],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn translated(line: &str) -> Option<Result<String, String>> {
        let called: Vec<OsString> = line.split(' ').map(OsString::from).collect();
        let joined = |all: Vec<OsString>| all.join(&OsString::from(" ")).into_string().unwrap();
        arguments(&called).map(|result| result.map(joined))
    }

    #[test]
    fn a_helpers_call_is_a_mount() {
        assert_eq!(translated("/usr/bin/vexfs mount a b"), None);
        let line = "/sbin/mount.fuse.vexfs /data /mnt/v -n -o rw,noauto,allow_other,x-systemd.automount,vexfs.strict,vexfs.sync=immediate";
        let wanted = "vexfs mount /data /mnt/v -o rw -o allow_other --strict --sync immediate";
        assert_eq!(translated(line), Some(Ok(wanted.to_owned())));
        assert!(translated("mount.vexfs a b -o vexfs.colour=red").unwrap().is_err());
        assert!(translated("mount.vexfs a b -q").unwrap().is_err());
        assert!(translated("mount.vexfs a b -f").unwrap().is_err());
    }
}
