//! `vexfs check`, `rebuild`, `optimize`, `sync` and `background`.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use vexfs_fs::upkeep::{self, Found};

use crate::mounts;

/// Arguments of `vexfs check`.
#[derive(Args)]
pub struct CheckArgs {
    /// The source directory of a volume that isn't mounted.
    source: PathBuf,
    /// Where the index is kept [default: SOURCE/.vexfs].
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// Give up what is wrong; its files are read again by the next mount.
    #[arg(long)]
    repair: bool,
}

/// Arguments of `vexfs rebuild`.
#[derive(Args)]
pub struct RebuildArgs {
    /// The source directory of a volume that isn't mounted.
    source: PathBuf,
    /// Where the index is kept [default: SOURCE/.vexfs].
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
}

/// Arguments of `vexfs optimize`.
#[derive(Args)]
pub struct OptimizeArgs {
    /// A directory in a mounted volume.
    path: PathBuf,
    /// Leave no byte of a removed vector in any file of the index.
    #[arg(long)]
    purge: bool,
}

/// Arguments of `vexfs sync`.
#[derive(Args)]
pub struct SyncArgs {
    /// A directory in a mounted volume.
    #[arg(default_value = ".")]
    path: PathBuf,
    /// Wait until every vector is linked into its graph, too.
    #[arg(long)]
    indexed: bool,
    /// Link new vectors so from now on.
    #[arg(long, value_enum)]
    mode: Option<Mode>,
}

/// Arguments of `vexfs background`. What somebody waits for (`sync --indexed`, `optimize`, room for more vectors, an unmount)
/// goes on whatever was said here.
#[derive(Args)]
pub struct BackgroundArgs {
    /// A directory in a mounted volume.
    #[arg(default_value = ".")]
    path: PathBuf,
    /// Hold linking, sealing, merging and verifying back, until they are let go on or the volume is unmounted.
    #[arg(long, conflicts_with = "resume", required_unless_present_any = ["resume", "rate"])]
    pause: bool,
    /// Let them go on.
    #[arg(long)]
    resume: bool,
    /// Bytes a second that sealing, merging and verifying may read and write, such as 20M; 0 for no bound.
    #[arg(long, value_name = "BYTES", value_parser = crate::daemon::bytes)]
    rate: Option<u64>,
}

/// When new vectors are linked.
#[derive(Clone, Copy, ValueEnum)]
enum Mode {
    /// Before close(2) returns.
    Immediate,
    /// Behind.
    Lazy,
}

/// Exit statuses of fsck(8).
const CORRECTED: u8 = 1;
const UNCORRECTED: u8 = 4;
const OPERATIONAL: u8 = 8;

/// Checks and prints. The exit status is fsck's: 0 sound, 1 repaired, 4 errors are left, 8 it can't be looked at.
pub fn check(args: &CheckArgs) -> ExitCode {
    let found = match upkeep::check(&args.source, args.state.as_deref(), args.repair) {
        Ok(found) => found,
        Err(error) => {
            eprintln!("vexfs: {error}");
            return ExitCode::from(OPERATIONAL);
        }
    };
    print(&found);
    match (found.store.has_errors(), found.store.repaired) {
        (false, _) => ExitCode::SUCCESS,
        (true, true) => ExitCode::from(CORRECTED),
        (true, false) => ExitCode::from(UNCORRECTED),
    }
}

fn print(found: &Found) {
    let Found { store, changed } = found;
    for finding in &store.findings {
        let word = match (finding.error, store.repaired) {
            (false, _) => "note",
            (true, false) => "error",
            (true, true) => "repaired",
        };
        println!("{word}: {}: {}", finding.place, finding.problem);
    }
    if *changed > 0 {
        println!("note: {changed} files are not what they were when they were read; the next mount reads them");
    }
    println!("{} segments with {} points are sound, {} files known", store.segments, store.points, store.files.len());
}

/// Makes the index again.
pub fn rebuild(args: &RebuildArgs) -> Result<(), String> {
    let (files, refused) = upkeep::rebuild(&args.source, args.state.as_deref()).map_err(|error| error.to_string())?;
    println!("{files} files were read; {refused} of them can't be indexed");
    Ok(())
}

/// Compacts.
pub fn optimize(args: &OptimizeArgs) -> Result<(), String> {
    command(&args.path, if args.purge { "optimize purge" } else { "optimize" })
}

/// A barrier.
pub fn sync(args: &SyncArgs) -> Result<(), String> {
    match args.mode {
        Some(Mode::Immediate) => command(&args.path, "mode immediate")?,
        Some(Mode::Lazy) => command(&args.path, "mode lazy")?,
        None => {}
    }
    command(&args.path, if args.indexed { "sync indexed" } else { "sync" })
}

/// Holds back, or lets go on.
pub fn background(args: &BackgroundArgs) -> Result<(), String> {
    if let Some(rate) = args.rate {
        command(&args.path, &format!("background rate {rate}"))?;
    }
    match (args.pause, args.resume) {
        (true, _) => command(&args.path, "background pause"),
        (_, true) => command(&args.path, "background resume"),
        _ => Ok(()),
    }
}

/// Writes a command to the control file; returns when it is done.
fn command(path: &Path, command: &str) -> Result<(), String> {
    let canonical = path.canonicalize().map_err(|error| format!("{}: {error}", path.display()))?;
    let dir = if canonical.is_dir() { canonical.as_path() } else { canonical.parent().unwrap_or(&canonical) };
    if mounts::containing(dir)?.is_none() {
        return Err(format!("{} is in no mounted VexFS volume", path.display()));
    }
    let control = dir.join(".vexfs/control");
    let opened = std::fs::File::options().write(true).open(&control);
    opened
        .and_then(|mut file| file.write_all(command.as_bytes()))
        .map_err(|error| format!("{command}: {error} (`vexfs status` tells more)"))
}
