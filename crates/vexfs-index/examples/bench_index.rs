//! `vexfs bench index` without the rest of the command: builds in seconds while the index is being tuned.

use clap::Parser;

#[path = "../../vexfs/src/bench.rs"]
mod bench;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    bench: bench::IndexArgs,
}

fn main() {
    if let Err(message) = bench::index(&Cli::parse().bench) {
        eprintln!("{message}");
        std::process::exit(1);
    }
}
