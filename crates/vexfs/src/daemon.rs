//! `vexfs mount` and `vexfs umount`.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::{Args, ValueEnum};
use rustix::event::{PollFd, PollFlags};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use sd_notify::NotifyState;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use vexfs_fs::SyncMode;
use vexfs_fs::mount::{MountOptions, Mounted, unmount};

use crate::{mounts, systemd};

/// Arguments of `vexfs mount`.
#[derive(Args)]
pub struct MountArgs {
    /// The directory whose files are served; what is in it is adopted.
    source: PathBuf,
    /// Where.
    mountpoint: PathBuf,
    /// Stay in the foreground, with the log on standard error.
    #[arg(long)]
    foreground: bool,
    /// Link new vectors into the graph before close(2) returns, or behind. They are found at once both ways.
    #[arg(long, value_enum, default_value_t = Sync::Lazy)]
    sync: Sync,
    /// Where the index is kept [default: SOURCE/.vexfs].
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// Memory that the index may take, such as 64M or 2G: heads, what waits to be sealed, the catalog's pages, copies for
    /// faster searches, builds. What a build needs more it keeps in a file of the state directory. Names, some 200 bytes a
    /// file, take the place of copies, and are kept also where they are more [default: what is useful].
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    memory: Option<u64>,
    /// Bytes a second that sealing, merging and verifying may read and write behind, such as 20M [default: no bound].
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    background_rate: Option<u64>,
    /// I promise that the source is changed through this mount alone: the kernel keeps names and directories' attributes
    /// for as long as it likes, and the source isn't watched. A change beneath may stay unseen.
    #[arg(long)]
    exclusive: bool,
    /// close(2) and fsync(2) of a file that can't be indexed fail.
    #[arg(long)]
    strict: bool,
    /// Mount options: ro, allow_other, noexec, suid, dev, noatime, …
    #[arg(short, value_name = "OPTS", value_delimiter = ',')]
    options: Vec<String>,
    /// For the background process: tell the parent on standard output.
    #[arg(long, hide = true)]
    background_child: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Sync {
    Immediate,
    Lazy,
}

/// A number of bytes, with K, M, G or T for powers of 1,024.
pub fn bytes(text: &str) -> Result<u64, String> {
    let (digits, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let power = match unit {
        "" => 0,
        "K" => 1,
        "M" => 2,
        "G" => 3,
        "T" => 4,
        _ => return Err(format!("\"{unit}\" is none of K, M, G, T")),
    };
    let number: u64 = digits.parse().map_err(|_| "a number of bytes is wanted, such as 64M".to_owned())?;
    number.checked_mul(1 << (10 * power)).ok_or_else(|| "that is too much".to_owned())
}

/// Mounts. In the background this returns when the mount answers.
pub fn mount(args: MountArgs, called: &[OsString]) -> Result<(), String> {
    if !args.foreground && !args.background_child {
        return spawn(called);
    }
    if args.foreground && std::env::var_os(ALLOCATOR.0).is_none() {
        // Read when a program starts: this one starts again in its own place.
        let failed = again(called)?.exec();
        return Err(format!("starting again: {failed}"));
    }
    let options = MountOptions {
        source: args.source,
        mountpoint: args.mountpoint,
        state: args.state,
        sync: match args.sync {
            Sync::Immediate => SyncMode::Immediate,
            Sync::Lazy => SyncMode::Lazy,
        },
        memory: args.memory,
        background_rate: args.background_rate,
        exclusive: args.exclusive,
        strict: args.strict,
        options: args.options,
    };
    crate::log::start();
    // Before anything starts, so that no signal is lost.
    let mut signals =
        signal_hook::iterator::Signals::new([SIGTERM, SIGINT, SIGHUP]).map_err(|error| format!("signals: {error}"))?;
    let mounted = match vexfs_fs::mount::mount(&options) {
        Ok(mounted) => mounted,
        Err(error) if args.background_child => {
            println!("{error}");
            return Err(error.to_string());
        }
        Err(error) => return Err(error.to_string()),
    };
    if args.background_child {
        // Nobody reads standard error any more.
        rustix::stdio::dup2_stderr(mounted.log()).map_err(|error| format!("the log: {error}"))?;
        detach()?;
    }
    static ENDING: AtomicBool = AtomicBool::new(false);
    static OVER: AtomicBool = AtomicBool::new(false);
    let handle = signals.handle();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in &mut signals {
                if !ENDING.swap(true, Ordering::AcqRel) {
                    end(&mounted);
                }
            }
        });
        let watchdog = args.foreground.then(|| scope.spawn(|| systemd::keep_watchdog(&mounted, &OVER)));
        if args.foreground {
            systemd::tell(NotifyState::Ready);
        }
        while !mounted.is_over() {
            std::thread::sleep(Duration::from_millis(20));
        }
        handle.close();
        OVER.store(true, Ordering::Release);
        if let Some(watchdog) = watchdog {
            watchdog.thread().unpark();
            // Sealing what is left may take its time.
            systemd::tell(NotifyState::Stopping);
        }
    });
    mounted.wait().map_err(|error| error.to_string())
}

/// On a signal: unmount; with files still open, take the mount out of the tree and let them end.
fn end(mounted: &Mounted) {
    log::info!("ending on a signal");
    if let Err(busy) = mounted.unmount(false)
        && let Err(error) = mounted.unmount(true)
    {
        log::error!("can't unmount: {busy}; nor lazily: {error}");
    }
}

/// For glibc's allocator: one heap, and nothing of it kept for each thread, so that a daemon's memory doesn't grow with the
/// requests that it has answered. Who sets it otherwise is heeded.
const ALLOCATOR: (&str, &str) = ("GLIBC_TUNABLES", "glibc.malloc.arena_max=1:glibc.malloc.tcache_count=0");

/// This program, called as it was.
fn again(called: &[OsString]) -> Result<Command, String> {
    let mut program = Command::new(std::env::current_exe().map_err(|error| format!("own program: {error}"))?);
    program.args(called.iter().skip(1));
    if std::env::var_os(ALLOCATOR.0).is_none() {
        program.env(ALLOCATOR.0, ALLOCATOR.1);
    }
    Ok(program)
}

/// Starts this program again in the background and waits for its word.
fn spawn(called: &[OsString]) -> Result<(), String> {
    let mut child = again(called)?
        .arg("--background-child")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| format!("starting in the background: {error}"))?;
    let mut word = String::new();
    if let Some(stdout) = child.stdout.take() {
        BufReader::new(stdout)
            .take(4096)
            .read_line(&mut word)
            .map_err(|error| format!("the background process: {error}"))?;
    }
    match word.trim() {
        READY => Ok(()),
        "" => {
            let status = child.wait().map_err(|error| error.to_string())?;
            Err(format!("the background process ended before the mount answered ({status})"))
        }
        error => {
            // It ends by itself; its status says no more than its word.
            child.wait().map_err(|error| error.to_string())?;
            Err(error.to_owned())
        }
    }
}

const READY: &str = "ready";

/// The mount answers: leave the terminal, tell the parent, let go of its pipe.
fn detach() -> Result<(), String> {
    rustix::process::setsid().map_err(|error| format!("setsid: {error}"))?;
    std::env::set_current_dir("/").map_err(|error| format!("/: {error}"))?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "{READY}").and_then(|()| out.flush()).map_err(|error| format!("telling the parent: {error}"))?;
    let null = std::fs::File::options().write(true).open("/dev/null").map_err(|error| format!("/dev/null: {error}"))?;
    rustix::stdio::dup2_stdout(&null).map_err(|error| format!("standard output: {error}"))
}

/// Unmounts and waits until the daemon has closed the volume.
pub fn umount(mountpoint: &Path) -> Result<(), String> {
    // Not `canonicalize` alone: where the daemon has died, its root can't be asked.
    let canonical = mountpoint
        .canonicalize()
        .or_else(|error| match error.raw_os_error() == Some(rustix::io::Errno::NOTCONN.raw_os_error()) {
            true => std::path::absolute(mountpoint),
            false => Err(error),
        })
        .map_err(|error| format!("{}: {error}", mountpoint.display()))?;
    if !mounts::volumes()?.iter().any(|volume| volume.mountpoint == canonical) {
        return Err(format!("{}: no VexFS volume is mounted there", mountpoint.display()));
    }
    let daemon = daemon_of(&canonical);
    unmount(&canonical, None, false).map_err(|error| {
        let busy = error.raw_os_error() == Some(rustix::io::Errno::BUSY.raw_os_error());
        let hint = if busy { " (files are open, or a shell stands in it)" } else { "" };
        format!("{}: {error}{hint}", mountpoint.display())
    })?;
    if let Some(daemon) = daemon {
        let mut fds = [PollFd::new(&daemon, PollFlags::IN)];
        // Sealing what is in the head may take its time; the data is safe meanwhile.
        rustix::event::poll(&mut fds, None).map_err(|error| format!("waiting for the daemon: {error}"))?;
    }
    Ok(())
}

/// Takes the mount out of the tree whatever holds it, and ends the daemon's connection.
pub fn force(mountpoint: &Path) -> Result<(), String> {
    // Nothing here may ask the daemon.
    let path = std::path::absolute(mountpoint).map_err(|error| format!("{}: {error}", mountpoint.display()))?;
    let volumes = mounts::volumes()?;
    let Some(volume) = volumes.iter().rev().find(|volume| volume.mountpoint == path) else {
        return Err(format!("{}: no VexFS volume is mounted there", mountpoint.display()));
    };
    let abort = format!("/sys/fs/fuse/connections/{}/abort", volume.connection);
    if let Err(error) = std::fs::write(&abort, "1") {
        eprintln!("vexfs: {abort}: {error}; a daemon that hangs may go on hanging");
    }
    unmount(&path, None, true).map_err(|error| format!("{}: {error}", mountpoint.display()))
}

/// The daemon's process, if it still answers.
fn daemon_of(mountpoint: &Path) -> Option<rustix::fd::OwnedFd> {
    let bytes = std::fs::read(mountpoint.join(".vexfs/stats.json")).ok()?;
    let stats: serde_json::Value = serde_json::from_slice(&bytes).ok()?;
    let pid = Pid::from_raw(i32::try_from(stats.get("pid")?.as_i64()?).ok()?)?;
    pidfd_open(pid, PidfdFlags::empty()).ok()
}
