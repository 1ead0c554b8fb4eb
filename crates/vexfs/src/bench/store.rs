//! `vexfs bench store`: the store alone, without a mount, on a directory of its own.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use serde_json::json;
use vexfs_fs::index::{Element, Metric, Mutable, Params, Scratch, Space, Until, build};
use vexfs_fs::store::disk::DirDisk;
use vexfs_fs::store::{FileId, Fingerprint, Link, Options, Query, SyncMode, Volume};

use super::{Rows, read_base};

/// Arguments of `vexfs bench store`.
#[derive(Args)]
pub struct StoreArgs {
    /// What is measured.
    #[arg(value_enum)]
    what: What,
    /// Where the store is made; must be empty, but for `open`.
    #[arg(long)]
    dir: PathBuf,
    /// The vectors: a row each.
    #[arg(long)]
    base: PathBuf,
    /// l2, ip or cosine.
    #[arg(long, default_value = "l2")]
    metric: Metric,
    /// Only the first rows of the base.
    #[arg(long)]
    rows: Option<usize>,
    /// How often the base is taken, one copy after another: for a store that is larger than the base.
    #[arg(long, default_value_t = 1)]
    copies: usize,
    /// What the rows are stored as, where it isn't the base's own type.
    #[arg(long)]
    element: Option<Element>,
    /// How long `open` loads the store with searches from all cores.
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// As `vexfs mount --memory`.
    #[arg(long, value_name = "BYTES", value_parser = crate::daemon::bytes)]
    memory: Option<u64>,
}

/// What is measured.
#[derive(Clone, Copy, ValueEnum)]
enum What {
    /// One vector a file, linked behind.
    Lazy,
    /// One vector a file, linked at once; beside the bare index.
    Immediate,
    /// All rows as one file, until they are linked; beside the build in process.
    Bulk,
    /// The build in process alone.
    Build,
    /// From opening to the first answer, of a store that `bulk` left; then a load of searches, the most anonymous memory
    /// meanwhile, and the recall.
    Open,
    /// Ten rounds of replacing half of the points, a hundred rows a file.
    Churn,
}

fn options(sync: SyncMode, memory: Option<u64>) -> Options {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    Options { threads, memory, ..Options::new(sync) }
}

fn open(dir: &Path, sync: SyncMode, memory: Option<u64>) -> Result<Volume, String> {
    std::fs::create_dir_all(dir).map_err(|error| format!("{}: {error}", dir.display()))?;
    let fd = std::fs::File::open(dir).map_err(|error| format!("{}: {error}", dir.display()))?;
    let (volume, _) =
        Volume::open(Arc::new(DirDisk::new(fd.into())), options(sync, memory)).map_err(|error| error.to_string())?;
    volume.scan_finished();
    Ok(volume)
}

fn config(volume: &Volume, base: &Rows) {
    let config = vexfs_fs::store::Config { metric: Some(base.space.metric().to_string()), ..Default::default() };
    volume.configure(FileId::ROOT, Some(config));
}

fn put(volume: &Volume, file: u64, rows: &[u8], base: &Rows, time: i128) -> Result<(), String> {
    let file = FileId(1_000 + file);
    volume.link(file, Link { parent: FileId::ROOT, name: format!("{}.npy", file.0).into_bytes() });
    let target = volume.prepare(file, base.space.dim(), base.space.element()).map_err(|error| error.to_string())?;
    let print = Fingerprint { size: rows.len() as u64, mtime: time, ctime: time };
    let mut room = volume.rows(&target, rows.len() / base.space.row_bytes()).map_err(|error| error.to_string())?;
    room.push(rows);
    volume.put(file, print, &target, room).map_err(|error| error.to_string())?;
    Ok(())
}

fn query(base: &Rows, row: usize, k: usize, exact: bool) -> Query<'static> {
    let mut vector = Vec::new();
    base.space.decode(&base.bytes[row * base.space.row_bytes()..][..base.space.row_bytes()], &mut vector);
    Query { exact, ..Query::nearest(vector, k) }
}

fn read_rows(args: &StoreArgs, rows: Option<usize>) -> Result<Rows, String> {
    let base = read_base(&args.base, args.metric, rows)?;
    let Some(element) = args.element.filter(|element| *element != base.space.element()) else { return Ok(base) };
    let space = Space::new(base.space.dim(), args.metric, element).map_err(|error| error.to_string())?;
    let (mut bytes, mut row) = (Vec::new(), Vec::new());
    for from in base.bytes.chunks_exact(base.space.row_bytes()) {
        base.space.decode(from, &mut row);
        space.encode(&row, &mut bytes).map_err(|error| error.to_string())?;
    }
    Ok(Rows { bytes, space })
}

/// What a store is filled with.
fn read_filled(args: &StoreArgs) -> Result<Rows, String> {
    let mut base = read_rows(args, args.rows)?;
    if args.copies > 1 {
        base.bytes = base.bytes.repeat(args.copies);
    }
    Ok(base)
}

/// Measures and prints a line of JSON.
pub fn store(args: &StoreArgs) -> Result<(), String> {
    let line = match args.what {
        What::Open => first_answer(args)?,
        What::Lazy | What::Immediate => filled(args, |volume, base| inserts(volume, base, args.what))?,
        What::Bulk => {
            let mut line = filled(args, bulk)?;
            let alone = build_alone(args)?;
            line["ratio"] = json!(line["linked_s"].as_f64().map(|linked| linked / alone));
            line["build_alone_s"] = json!(alone);
            line
        }
        What::Build => json!({ "build_alone_s": build_alone(args)? }),
        What::Churn => filled(args, |volume, base| churn(volume, base, &args.dir))?,
    };
    println!("{line}");
    Ok(())
}

type Line = serde_json::Value;

/// What `work` tells of a store that it fills from the base, and the most memory that it took.
fn filled(args: &StoreArgs, work: impl FnOnce(&Volume, &Rows) -> Result<Line, String>) -> Result<Line, String> {
    let base = read_filled(args)?;
    let sync = if matches!(args.what, What::Immediate) { SyncMode::Immediate } else { SyncMode::Lazy };
    let volume = open(&args.dir, sync, args.memory)?;
    config(&volume, &base);
    let before = anonymous()?;
    let (line, most) = watched(|| work(&volume, &base))?;
    let mut line = line?;
    // Beside the base that is held here.
    line["most_anonymous_mb"] = json!(most.saturating_sub(before) as f64 * 1024.0 / 1e6);
    volume.close().map_err(|error| error.to_string())?;
    Ok(line)
}

fn inserts(volume: &Volume, base: &Rows, what: What) -> Result<serde_json::Value, String> {
    let size = base.space.row_bytes();
    let count = base.bytes.len() / size;
    let began = Instant::now();
    let mut slowest: f64 = 0.0;
    for (n, row) in base.bytes.chunks_exact(size).enumerate() {
        let one = Instant::now();
        put(volume, n as u64, row, base, 1)?;
        slowest = slowest.max(one.elapsed().as_secs_f64());
    }
    let seconds = began.elapsed().as_secs_f64();
    volume.commit().map_err(|error| error.to_string())?;
    let durable = began.elapsed().as_secs_f64();
    volume.settle(&|| false).map_err(|error| error.to_string())?;
    let rate = count as f64 / seconds;
    let mut line = json!({
        "points": count,
        "inserts_per_second": rate,
        "until_durable_s": durable,
        "until_linked_s": began.elapsed().as_secs_f64(),
        "slowest_ms": slowest * 1e3,
    });
    if matches!(what, What::Immediate) {
        let index = Mutable::new(base.space, Params::default());
        let mut scratch = Scratch::default();
        let began = Instant::now();
        for row in base.bytes.chunks_exact(size) {
            let slot = index.push(row);
            index.link(slot, &mut scratch);
        }
        let bare = count as f64 / began.elapsed().as_secs_f64();
        line["bare_index_per_second"] = json!(bare);
        line["ratio"] = json!(rate / bare);
    }
    Ok(line)
}

fn bulk(volume: &Volume, base: &Rows) -> Result<serde_json::Value, String> {
    let began = Instant::now();
    put(volume, 0, &base.bytes, base, 1)?;
    let visible = began.elapsed().as_secs_f64();
    volume.settle(&|| false).map_err(|error| error.to_string())?;
    let linked = began.elapsed().as_secs_f64();
    let points = base.bytes.len() / base.space.row_bytes();
    Ok(json!({ "points": points, "visible_s": visible, "linked_s": linked }))
}

fn build_alone(args: &StoreArgs) -> Result<f64, String> {
    let base = read_filled(args)?;
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let began = Instant::now();
    let sections = build(&base.space, &base.bytes, &Params::default(), threads, &|| true);
    let seconds = began.elapsed().as_secs_f64();
    sections.map(|_| seconds).ok_or_else(|| "the build was interrupted".to_owned())
}

fn first_answer(args: &StoreArgs) -> Result<serde_json::Value, String> {
    // What is asked with is all that is kept of the base: memory is measured.
    let queries = {
        let base = read_rows(args, args.rows)?;
        from_all_over(&base, base.bytes.len() / base.space.row_bytes(), QUERIES)
    };
    let began = Instant::now();
    let volume = open(&args.dir, SyncMode::Lazy, args.memory)?;
    let opened = began.elapsed().as_secs_f64();
    let answer = volume.search(&queries[0], &mut |_, _, _| true).map_err(|error| error.to_string())?;
    let answered = began.elapsed().as_secs_f64();
    let (searches, most) = load(&volume, &queries, Duration::from_secs_f64(args.seconds))?;
    let recall = recall(&volume, &queries)?;
    let (gave_up, late) = deadlines(&volume, &queries);
    let line = json!({
        "gave_up": gave_up,
        "past_deadline_ms": late * 1e3,
        "recall": recall,
        "searches_per_second": searches,
        "most_anonymous_mb": most as f64 * 1024.0 / 1e6,
        "points": volume.report(FileId::ROOT).collections.iter().map(|collection| collection.points).sum::<u64>(),
        "hits": answer.hits.len(),
        "open_ms": opened * 1e3,
        "first_answer_ms": answered * 1e3,
    });
    volume.close().map_err(|error| error.to_string())?;
    Ok(line)
}

/// Searches with too little time, exact and not: how many gave up, and how long after the deadline the latest answered.
fn deadlines(volume: &Volume, queries: &[Query<'_>]) -> (usize, f64) {
    let (mut gave_up, mut latest) = (0, 0f64);
    for (n, query) in queries.iter().enumerate() {
        let deadline = Instant::now() + Duration::from_micros(20 * n as u64);
        let hasty = Query {
            until: Until { deadline: Some(deadline), ..Until::default() },
            exact: n % 2 == 0,
            k: 1 + n,
            ..query.clone()
        };
        gave_up += usize::from(volume.search(&hasty, &mut |_, _, _| true).is_err());
        latest = latest.max(Instant::now().saturating_duration_since(deadline).as_secs_f64());
    }
    (gave_up, latest)
}

/// Queries that `open` asks, from all over the base.
const QUERIES: usize = 500;

/// Searches from all cores; how many a second, and the most anonymous memory that the process had, KiB.
fn load(volume: &Volume, queries: &[Query<'_>], time: Duration) -> Result<(f64, u64), String> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let done = AtomicU64::new(0);
    let began = Instant::now();
    let work = &|first: usize| {
        for query in queries.iter().cycle().skip(first * queries.len() / threads) {
            if began.elapsed() >= time {
                return Ok(());
            }
            volume.search(query, &mut |_, _, _| true).map_err(|error| error.to_string())?;
            done.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    };
    let (results, most) = watched(|| {
        std::thread::scope(|scope| {
            let searching: Vec<_> = (0..threads).map(|first| scope.spawn(move || work(first))).collect();
            searching.into_iter().map(joined).collect::<Result<Vec<()>, String>>()
        })
    })?;
    results?;
    Ok((done.into_inner() as f64 / began.elapsed().as_secs_f64(), most))
}

/// The most anonymous memory that the process had during `work`, KiB, beside what that gives.
fn watched<T>(work: impl FnOnce() -> T) -> Result<(T, u64), String> {
    let (most, ended) = (AtomicU64::new(anonymous()?), AtomicBool::new(false));
    let result = std::thread::scope(|scope| {
        let watch = scope.spawn(|| {
            while !ended.load(Ordering::Acquire) {
                most.fetch_max(anonymous()?, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(2));
            }
            Ok(())
        });
        let result = work();
        ended.store(true, Ordering::Release);
        joined(watch).map(|()| result)
    })?;
    Ok((result, most.into_inner()))
}

fn joined<T>(thread: std::thread::ScopedJoinHandle<'_, Result<T, String>>) -> Result<T, String> {
    thread.join().unwrap_or_else(|_| Err("a thread panicked".to_owned()))
}

/// Files and rows.
type Points = Vec<(FileId, u32)>;

/// What a query finds, and what an exact one does.
fn asked(volume: &Volume, query: &Query<'_>) -> Result<(Points, Points), String> {
    let ask = |exact| {
        let answer = volume.search(&Query { exact, ..query.clone() }, &mut |_, _, _| true);
        let hits = answer.map_err(|error| error.to_string())?.hits;
        Ok::<_, String>(hits.into_iter().map(|hit| (hit.file, hit.row)).collect())
    };
    Ok((ask(false)?, ask(true)?))
}

/// This process's anonymous memory, KiB.
fn anonymous() -> Result<u64, String> {
    let status = std::fs::read_to_string("/proc/self/status").map_err(|error| error.to_string())?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    number.ok_or_else(|| "no RssAnon in /proc/self/status".to_owned())
}

const FILE_ROWS: usize = 100;

/// So many queries, rows spread over the first `count`.
fn from_all_over(base: &Rows, count: usize, queries: usize) -> Vec<Query<'static>> {
    (0..queries).map(|n| query(base, n * count / queries, 10, false)).collect()
}

fn recall(volume: &Volume, queries: &[Query<'_>]) -> Result<f64, String> {
    let (mut right, mut all) = (0, 0);
    for query in queries {
        let (found, truth) = asked(volume, query)?;
        right += found.iter().filter(|hit| truth.contains(hit)).count();
        all += truth.len();
    }
    Ok(right as f64 / all as f64)
}

fn space(dir: &Path) -> Result<u64, String> {
    let entries = std::fs::read_dir(dir.join("segments")).map_err(|error| error.to_string())?;
    entries
        .map(|entry| entry.and_then(|entry| entry.metadata()).map(|meta| meta.len()))
        .sum::<Result<u64, _>>()
        .map_err(|error| error.to_string())
}

/// Queries that `churn` asks in each round.
const CHURN_QUERIES: usize = 1_000;

/// The recall of a store that was filled with these files and compacted, nothing else.
fn fresh_recall(dir: &Path, base: &Rows, files: &[&[u8]], queries: &[Query<'_>]) -> Result<f64, String> {
    let volume = open(dir, SyncMode::Lazy, None)?;
    config(&volume, base);
    for (n, rows) in files.iter().enumerate() {
        put(&volume, n as u64, rows, base, 0)?;
    }
    volume.optimize(false, &|| false).map_err(|error| error.to_string())?;
    let recall = recall(&volume, queries)?;
    drop(volume);
    std::fs::remove_dir_all(dir).map_err(|error| format!("{}: {error}", dir.display()))?;
    Ok(recall)
}

fn churn(volume: &Volume, base: &Rows, dir: &Path) -> Result<serde_json::Value, String> {
    let step = base.space.row_bytes() * FILE_ROWS;
    // Half of the base is there at first; each round half of the files get the other half's rows, and back.
    let all: Vec<&[u8]> = base.bytes.chunks_exact(step).collect();
    let half = all.len() / 2;
    let mut files = all[..half].to_vec();
    for (n, rows) in files.iter().enumerate() {
        put(volume, n as u64, rows, base, 0)?;
    }
    volume.optimize(false, &|| false).map_err(|error| error.to_string())?;
    let queries = from_all_over(base, all.len() * FILE_ROWS, CHURN_QUERIES);
    let live = space(dir)?;
    let (mut recalls, mut fresh, mut spaces, mut segments) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for round in 0..10 {
        for n in (0..half).filter(|n| (n + round) % 2 == 0) {
            files[n] = all[if round % 4 < 2 { half + n } else { n }];
            put(volume, n as u64, files[n], base, round as i128 + 1)?;
        }
        volume.settle(&|| false).map_err(|error| error.to_string())?;
        // Until merges have settled.
        let mut before = 0;
        while before != space(dir)? {
            before = space(dir)?;
            std::thread::sleep(std::time::Duration::from_millis(1_500));
        }
        recalls.push(recall(volume, &queries)?);
        // Rows that were replaced are asked for too, and are harder than rows that are there: so beside a store of the
        // same rows, not beside the first.
        fresh.push(fresh_recall(&dir.join("fresh"), base, &files, &queries)?);
        spaces.push(space(dir)? as f64 / live as f64);
        segments.push(volume.report(FileId::ROOT).collections.iter().map(|one| one.segments).sum::<u64>());
    }
    let worst = recalls.iter().zip(&fresh).map(|(churned, fresh)| fresh - churned).fold(f64::MIN, f64::max);
    Ok(json!({
        "points": half * FILE_ROWS,
        "recall": recalls,
        "recall_fresh": fresh,
        "most_below_fresh": worst,
        "space_by_live": spaces,
        "segments": segments,
    }))
}
