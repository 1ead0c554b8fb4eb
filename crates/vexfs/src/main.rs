//! The command: arguments, output, nothing else.

mod bench;
mod daemon;
mod helper;
mod log;
mod mounts;
mod search;
mod status;
mod systemd;
mod upkeep;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

/// A file system whose vectors are indexed.
#[derive(Parser)]
#[command(name = "vexfs", version, about, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Mount a directory; its files stay what they are, its vectors can be searched.
    Mount(daemon::MountArgs),
    /// Unmount, and wait until all is on disk.
    Umount {
        /// Where it is mounted.
        mountpoint: PathBuf,
        /// Also where files are open or the daemon is dead or hangs: cuts the kernel's connection to it. What wasn't
        /// closed yet may not be indexed before the next mount's walk.
        #[arg(long)]
        force: bool,
    },
    /// Find what is near a vector.
    Search(search::SearchArgs),
    /// Tell what is mounted, indexed, pending and refused.
    Status(status::StatusArgs),
    /// Check every checksum and invariant of a volume that isn't mounted.
    Check(upkeep::CheckArgs),
    /// Make the whole index of a volume that isn't mounted again from its files.
    Rebuild(upkeep::RebuildArgs),
    /// Compact the index.
    Optimize(upkeep::OptimizeArgs),
    /// Wait until all that happened is durable, and if asked linked.
    Sync(upkeep::SyncArgs),
    /// Hold the work behind back, let it go on, or bound what it reads and writes.
    Background(upkeep::BackgroundArgs),
    /// Measure.
    Bench(BenchArgs),
}

#[derive(Args)]
struct BenchArgs {
    #[command(subcommand)]
    what: BenchCommand,
}

#[derive(Subcommand)]
enum BenchCommand {
    /// An index, built in process: recall, rates, latencies, sizes.
    Index(bench::index::IndexArgs),
    /// Small files on a mount, on the file system below it and on a peer, in turn.
    Fs(bench::fs::FsArgs),
    /// Filtered searches beside the unfiltered one and an exact scan of what is allowed.
    Filter(bench::filter::FilterArgs),
    /// The store without a mount: inserts, bulk, opening, replacing.
    Store(bench::store::StoreArgs),
    /// The mutable index: inserts, searches by recall target, churn, searches beside inserts.
    Head(bench::head::HeadArgs),
    /// Files and vectors of a mount changed and looked at for long, each answer checked.
    Soak(bench::soak::SoakArgs),
}

fn main() -> ExitCode {
    let called: Vec<std::ffi::OsString> = std::env::args_os().collect();
    let called = match helper::arguments(&called) {
        None => called,
        Some(Ok(translated)) => translated,
        Some(Err(message)) => {
            eprintln!("mount.vexfs: {message}");
            return ExitCode::FAILURE;
        }
    };
    let result = match Cli::parse_from(&called).command {
        Command::Mount(args) => daemon::mount(args, &called),
        Command::Umount { mountpoint, force: true } => daemon::force(&mountpoint),
        Command::Umount { mountpoint, force: false } => daemon::umount(&mountpoint),
        Command::Search(args) => search::run(&args),
        Command::Status(args) => status::run(&args),
        Command::Check(args) => return upkeep::check(&args),
        Command::Rebuild(args) => upkeep::rebuild(&args),
        Command::Optimize(args) => upkeep::optimize(&args),
        Command::Sync(args) => upkeep::sync(&args),
        Command::Background(args) => upkeep::background(&args),
        Command::Bench(BenchArgs { what: BenchCommand::Index(args) }) => bench::index::index(&args),
        Command::Bench(BenchArgs { what: BenchCommand::Fs(args) }) => bench::fs::run(&args),
        Command::Bench(BenchArgs { what: BenchCommand::Filter(args) }) => bench::filter::filter(&args),
        Command::Bench(BenchArgs { what: BenchCommand::Store(args) }) => bench::store::store(&args),
        Command::Bench(BenchArgs { what: BenchCommand::Head(args) }) => bench::head::head(&args),
        Command::Bench(BenchArgs { what: BenchCommand::Soak(args) }) => bench::soak::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("vexfs: {message}");
            ExitCode::FAILURE
        }
    }
}
