//! `vexfs status`: what the volumes tell of themselves.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Value, json};

use crate::mounts;

/// Arguments of `vexfs status`.
#[derive(Args)]
pub struct StatusArgs {
    /// A directory in a volume; all volumes where none is named.
    path: Option<PathBuf>,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

/// Asks and prints.
pub fn run(args: &StatusArgs) -> Result<(), String> {
    let volumes: Vec<Value> = match &args.path {
        Some(path) => vec![of_path(path)?],
        None => mounts::volumes()?.iter().map(|volume| of_mount(&volume.mountpoint)).collect(),
    };
    if args.json {
        let text = serde_json::to_string_pretty(&json!({ "volumes": volumes })).map_err(|error| error.to_string())?;
        println!("{text}");
        return Ok(());
    }
    if volumes.is_empty() {
        println!("no VexFS volume is mounted");
    }
    for volume in &volumes {
        print(volume);
    }
    Ok(())
}

fn of_path(path: &Path) -> Result<Value, String> {
    let canonical = path.canonicalize().map_err(|error| format!("{}: {error}", path.display()))?;
    let dir = if canonical.is_dir() { canonical.as_path() } else { canonical.parent().unwrap_or(&canonical) };
    if mounts::containing(dir)?.is_none() {
        return Err(format!("{} is in no mounted VexFS volume", path.display()));
    }
    read(dir)
}

/// A volume that doesn't answer is still told of.
fn of_mount(mountpoint: &Path) -> Value {
    read(mountpoint).unwrap_or_else(|error| json!({ "mountpoint": mountpoint.to_string_lossy(), "error": error }))
}

fn read(dir: &Path) -> Result<Value, String> {
    let path = dir.join(".vexfs/stats.json");
    let bytes = std::fs::read(&path).map_err(|error| {
        let dead = error.raw_os_error() == Some(rustix::io::Errno::NOTCONN.raw_os_error());
        let hint = if dead { " (its daemon has died; `vexfs umount --force` clears the mount)" } else { "" };
        format!("{}: {error}{hint}", path.display())
    })?;
    serde_json::from_slice(&bytes).map_err(|error| format!("{}: {error}", path.display()))
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value.get(key).and_then(Value::as_str).unwrap_or("-")
}

fn number(value: &Value, key: &str) -> u64 {
    value.get(key).and_then(Value::as_u64).unwrap_or(0)
}

fn print(volume: &Value) {
    println!("{}", text(volume, "mountpoint"));
    if let Some(error) = volume.get("error").and_then(Value::as_str) {
        println!("  {error}");
        return;
    }
    println!("  source     {}", text(volume, "source"));
    println!("  mode       {}, sync {}", text(volume, "io"), text(volume, "sync"));
    let files = &volume["files"];
    println!(
        "  files      {} indexed, {} empty, {} unread, {} refused",
        number(files, "indexed"),
        number(files, "empty"),
        number(files, "unread"),
        number(files, "refused")
    );
    match volume.get("oldest_pending_ms").and_then(Value::as_u64) {
        Some(age) => println!("  pending    {}, the oldest for {age} ms", number(volume, "pending")),
        None => println!("  pending    {}", number(volume, "pending")),
    }
    let background = &volume["background"];
    let work = &background["work"];
    let mut said = Vec::new();
    if background["paused"] == true {
        said.push("paused".to_owned());
    }
    if let Some(rate) = background["rate"].as_u64() {
        said.push(format!("at most {rate} bytes a second"));
    }
    if work.is_object() {
        said.push(format!(
            "{} of /{}: {} of {} points linked in {} ms",
            text(work, "kind"),
            text(work, "directory"),
            number(work, "linked"),
            number(work, "points"),
            number(work, "elapsed_ms")
        ));
    }
    let memory = &volume["memory"];
    if memory.is_object() {
        let held = ["heads", "unsealed", "copies", "names", "scratches", "queries"];
        let all: Vec<String> = held.iter().map(|key| format!("{key} {}", number(memory, key))).collect();
        println!("  memory     {} bytes", all.join(", "));
    }
    if !said.is_empty() {
        println!("  background {}", said.join(", "));
    }
    for collection in volume["collections"].as_array().into_iter().flatten() {
        println!(
            "  collection /{}: {} points of {} x {}, {}, {} segments",
            text(collection, "directory"),
            number(collection, "points"),
            number(collection, "dimension"),
            text(collection, "element"),
            text(collection, "metric"),
            number(collection, "segments")
        );
    }
    for error in volume["errors"].as_array().into_iter().flatten() {
        println!("  refused    {}: {}", text(error, "path"), text(error, "error"));
    }
    for segment in volume["quarantined"].as_array().into_iter().flatten() {
        println!("  given up   {}: {}", text(segment, "segment"), text(segment, "error"));
    }
    if let Some(error) = volume.get("last_error").and_then(Value::as_str) {
        println!("  last error {error}");
    }
}
