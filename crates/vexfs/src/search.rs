//! `vexfs search`: the query file, for people.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use clap::Args;
use vexfs_fs::formats::{Format, Source};
use vexfs_fs::wire::{ATTACHED, HitLine, Reply, Request};

use crate::mounts;

/// Arguments of `vexfs search`.
#[derive(Args)]
pub struct SearchArgs {
    /// The directory asked in, with all below.
    #[arg(default_value = ".")]
    dir: PathBuf,
    /// Ask by a vector file of the volume: PATH, or PATH#ROW. The vector asked by is no answer.
    #[arg(long, value_name = "PATH[#ROW]", group = "what")]
    like: Option<PathBuf>,
    /// Ask by these numbers: '[0.1, 0.2]'.
    #[arg(long, value_name = "NUMBERS", group = "what", allow_hyphen_values = true)]
    vector: Option<String>,
    /// Ask by a .vec or .npy file anywhere: FILE, or FILE#ROW.
    #[arg(long, value_name = "FILE[#ROW]", group = "what")]
    vector_file: Option<PathBuf>,
    /// Hits wanted.
    #[arg(short, default_value_t = 10)]
    k: usize,
    /// Candidates kept in the walk.
    #[arg(long, conflicts_with = "recall")]
    ef: Option<usize>,
    /// Recall that the walk should come to, such as 0.99.
    #[arg(long)]
    recall: Option<f32>,
    /// Compare with every vector.
    #[arg(long)]
    exact: bool,
    /// Only hits at most this far.
    #[arg(long)]
    max_distance: Option<f32>,
    /// The answer as JSON, on a line.
    #[arg(long, conflicts_with = "tsv")]
    json: bool,
    /// Rank, score, distance, row and path, separated by tabs.
    #[arg(long)]
    tsv: bool,
}

/// Asks and prints.
pub fn run(args: &SearchArgs) -> Result<(), String> {
    let mut request = Request {
        k: Some(args.k),
        ef: args.ef,
        recall: args.recall,
        exact: args.exact,
        max_distance: args.max_distance,
        ..Request::default()
    };
    if let Some(path) = &args.like {
        request.like = Some(like_in_volume(path)?);
    } else if let Some(text) = &args.vector {
        let numbers = text.trim().trim_start_matches('[').trim_end_matches(']');
        request.vector = Some(
            numbers
                .split([',', ' ', '\n', '\t'])
                .filter(|token| !token.is_empty())
                .map(|token| token.parse().map_err(|_| format!("--vector: \"{token}\" is not a number")))
                .collect::<Result<Vec<f32>, String>>()?,
        );
    } else if let Some(path) = &args.vector_file {
        request.vector = Some(vector_of_file(path)?);
    } else {
        return Err("one of --like, --vector and --vector-file says what to look for".to_owned());
    }

    let mut reply = ask(&args.dir, &request)?;
    if let Some(error) = &reply.error {
        return Err(format!("{}: {}", error.code, error.message));
    }
    for hit in reply.hits.iter_mut().flatten() {
        if args.dir != Path::new(".") {
            hit.path = args.dir.join(&hit.path).to_string_lossy().into_owned();
        }
    }
    print(args, &reply).map_err(|error| format!("standard output: {error}"))
}

/// Sends one request to the query file of a directory.
pub fn ask(dir: &Path, request: &Request) -> Result<Reply, String> {
    let path = dir.join(".vexfs/query");
    let mut file: File = OpenOptions::new().read(true).write(true).open(&path).map_err(|error| {
        let canonical = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
        match mounts::containing(&canonical) {
            Ok(None) => format!("{} is in no mounted VexFS volume", dir.display()),
            _ => format!("{}: {error}", path.display()),
        }
    })?;
    let mut line = serde_json::to_vec(request).map_err(|error| error.to_string())?;
    line.push(b'\n');
    file.write_all(&line).map_err(|error| format!("{}: {error}", path.display()))?;
    let mut answer = Vec::new();
    file.read_to_end(&mut answer).map_err(|error| format!("{}: {error}", path.display()))?;
    serde_json::from_slice(&answer).map_err(|error| format!("{}: an answer that isn't one: {error}", path.display()))
}

/// PATH, or PATH#ROW where no file is called that as a whole.
fn split_row(path: &Path) -> Result<(PathBuf, Option<usize>), String> {
    if path.symlink_metadata().is_ok() {
        return Ok((path.to_owned(), None));
    }
    let bytes = path.as_os_str().as_bytes();
    let Some(hash) = bytes.iter().rposition(|byte| *byte == b'#') else {
        return Err(format!("{}: no such file", path.display()));
    };
    let row = std::str::from_utf8(&bytes[hash + 1..]).ok().and_then(|row| row.parse().ok());
    let row = row.ok_or_else(|| format!("{}: what follows # is not a row number", path.display()))?;
    let file = PathBuf::from(OsStr::from_bytes(&bytes[..hash]));
    match file.symlink_metadata() {
        Ok(_) => Ok((file, Some(row))),
        Err(error) => Err(format!("{}: {error}", file.display())),
    }
}

/// The path from the volume's root, with a leading slash, as the query file wants it.
fn like_in_volume(path: &Path) -> Result<String, String> {
    let (file, row) = match path.as_os_str().as_bytes().strip_suffix(format!("#{ATTACHED}").as_bytes()) {
        Some(file) if path.symlink_metadata().is_err() => {
            (PathBuf::from(OsStr::from_bytes(file)), Some(ATTACHED.to_owned()))
        }
        _ => split_row(path).map(|(file, row)| (file, row.map(|row| row.to_string())))?,
    };
    let canonical = file.canonicalize().map_err(|error| format!("{}: {error}", file.display()))?;
    let volume = mounts::containing(&canonical)?
        .ok_or_else(|| format!("{} is in no mounted VexFS volume; --vector-file takes any file", file.display()))?;
    let inside = canonical.strip_prefix(&volume.mountpoint).map_err(|error| error.to_string())?;
    let inside =
        inside.to_str().ok_or_else(|| format!("{}: the name is not UTF-8, which JSON can't carry", file.display()))?;
    Ok(match row {
        Some(row) => format!("/{inside}#{row}"),
        None => format!("/{inside}"),
    })
}

fn vector_of_file(path: &Path) -> Result<Vec<f32>, String> {
    let (file, row) = split_row(path)?;
    let at = |what: &dyn std::fmt::Display| format!("{}: {what}", file.display());
    let format = file.file_name().and_then(Format::of).ok_or_else(|| at(&"neither .vec nor .npy"))?;
    let opened = File::open(&file).map_err(|error| at(&error))?;
    let source =
        Source::open(format, &opened).map_err(|refusal| at(&refusal.reason))?.ok_or_else(|| at(&"holds no vector"))?;
    let rows = source.shape().rows;
    if row.is_none() && rows > 1 {
        return Err(at(&format!("holds {rows} vectors; say which with #ROW")));
    }
    source.row(row.unwrap_or(0)).map_err(|refusal| at(&refusal.reason))
}

fn print(args: &SearchArgs, reply: &Reply) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    if args.json {
        return out.write_all(&reply.to_line());
    }
    let hits = reply.hits.as_deref().unwrap_or_default();
    if !args.tsv {
        writeln!(out, "{:>4}  {:>8}  {:>10}  PATH", "RANK", "SCORE", "DISTANCE")?;
    }
    for (rank, hit) in hits.iter().enumerate() {
        let rank = rank + 1;
        if args.tsv {
            writeln!(out, "{rank}\t{}\t{}\t{}\t{}", hit.score, hit.distance, hit.row, hit.path)?;
        } else {
            writeln!(out, "{rank:>4}  {:>8.4}  {:>10.4}  {}", hit.score, hit.distance, place(hit))?;
        }
    }
    Ok(())
}

/// The path, with the row where it isn't the first.
fn place(hit: &HitLine) -> String {
    match hit.row {
        0 if hit.attached && Format::of(OsStr::new(&hit.path)).is_some() => format!("{}#{ATTACHED}", hit.path),
        0 => hit.path.clone(),
        row => format!("{}#{row}", hit.path),
    }
}
