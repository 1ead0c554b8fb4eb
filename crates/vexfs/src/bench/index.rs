//! `vexfs bench index`: builds an index in process and measures it against a given truth.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use clap::Args;
use serde_json::json;
use vexfs_fs::index::{
    Effort, Flat, Index, Metric, Params, Quantization, Region, Request, Scratch, Sealed, Space, build, region_from,
};

use super::{Rows, read_base, read_queries};

/// Arguments of `vexfs bench index`.
#[derive(Args)]
pub struct IndexArgs {
    /// What is searched in: a row a vector.
    #[arg(long)]
    base: PathBuf,
    /// What is searched for.
    #[arg(long)]
    queries: PathBuf,
    /// int32: for each query the rows of its nearest neighbours, nearest first; at least k columns [default: found by
    /// an exact scan].
    #[arg(long)]
    truth: Option<PathBuf>,
    /// l2, ip or cosine.
    #[arg(long)]
    metric: Metric,
    /// Neighbours that recall is measured over.
    #[arg(short, default_value_t = 10)]
    k: usize,
    /// Links of a node in the upper layers.
    #[arg(long, default_value_t = 16)]
    m: usize,
    /// Candidates kept while a node is linked.
    #[arg(long, default_value_t = 200)]
    ef_construction: usize,
    /// none, sq8, sq4 or rabitq; under none and sq8, rows of 8-bit integers are walked as they are.
    #[arg(long, default_value = "sq8")]
    quantization: Quantization,
    /// Only the first rows of the base.
    #[arg(long)]
    rows: Option<usize>,
    /// Recall targets instead of ef: the index's own calibration chooses.
    #[arg(long, value_delimiter = ',', conflicts_with = "ef")]
    recall: Vec<f32>,
    /// The index learns from the first so many queries what a recall takes, and is measured with the others.
    #[arg(long, default_value_t = 0, requires = "recall")]
    learn: usize,
    /// How often the queries are run; the median counts.
    #[arg(long, default_value_t = 3)]
    repeat: usize,
    /// Candidates kept in a walk, one measurement each.
    #[arg(long, value_delimiter = ',', default_value = "10,16,24,32,48,64,96,128,192,256,384,512")]
    ef: Vec<usize>,
    /// Threads of the build and of the batch that `qps` is measured with [default: all cores]. Latencies and
    /// `qps_one_thread` are of one query at a time.
    #[arg(long)]
    threads: Option<usize>,
    /// What the built graph is like: nodes, links, components and degrees of each layer, and what can't be reached.
    #[arg(long)]
    graph: bool,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

fn read_truth(path: &Path, k: usize) -> Result<Vec<Vec<i32>>, String> {
    let at = |what: &dyn std::fmt::Display| format!("{}: {what}", path.display());
    let file = File::open(path).map_err(|error| at(&error))?;
    let npy = npyz::NpyFile::new(std::io::BufReader::new(file)).map_err(|error| at(&error))?;
    let columns = match *npy.shape() {
        [_, columns] if columns as usize >= k => columns as usize,
        _ => return Err(at(&format!("a table of at least {k} columns is wanted, it is {:?}", npy.shape()))),
    };
    let all: Vec<i32> = npy.into_vec().map_err(|error| at(&error))?;
    Ok(all.chunks_exact(columns).map(|row| row[..k].to_vec()).collect())
}

/// What `read_truth` would read.
fn find_truth(space: &Space, rows: &Region, queries: &[Vec<f32>], k: usize) -> Result<Vec<Vec<i32>>, String> {
    let flat = Flat::new(*space, rows.clone());
    let (mut scratch, mut out) = (Scratch::default(), Vec::new());
    let find = |query: &Vec<f32>| {
        flat.search(query, &Request::nearest(k), &mut scratch, &mut out).map_err(|error| error.to_string())?;
        Ok(out.iter().map(|hit| hit.slot.0 as i32).collect())
    };
    queries.iter().map(find).collect()
}

/// One thread asks one query after another; latencies in microseconds, and what was found.
struct Single {
    latencies: Vec<f64>,
    right: usize,
    distances: u64,
    seconds: f64,
}

fn single(
    index: &Sealed,
    order: &[u32],
    queries: &[Vec<f32>],
    truth: &[Vec<i32>],
    request: &Request<'_>,
) -> Result<Single, String> {
    let (mut scratch, mut out) = (Scratch::default(), Vec::new());
    let mut result = Single { latencies: Vec::new(), right: 0, distances: 0, seconds: 0.0 };
    // Warm: what a server's thread has in its cache.
    for query in queries.iter().take(50) {
        index.search(query, request, &mut scratch, &mut out).map_err(|error| error.to_string())?;
    }
    for (query, truth) in queries.iter().zip(truth) {
        let began = Instant::now();
        let stats = index.search(query, request, &mut scratch, &mut out).map_err(|error| error.to_string())?;
        let took = began.elapsed().as_secs_f64();
        result.seconds += took;
        result.latencies.push(took * 1e6);
        result.distances += stats.distances;
        result.right += out.iter().filter(|hit| truth.contains(&(order[hit.slot.0 as usize] as i32))).count();
    }
    result.latencies.sort_by(f64::total_cmp);
    Ok(result)
}

/// Queries a second of a batch on several threads.
fn batch(index: &Sealed, queries: &[Vec<f32>], request: &Request<'_>, threads: usize) -> f64 {
    let next = AtomicUsize::new(0);
    let began = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let (mut scratch, mut out) = (Scratch::default(), Vec::new());
                while let Some(query) = queries.get(next.fetch_add(1, Ordering::Relaxed)) {
                    // Without limits a search can't fail; were it otherwise, `single` has said so already.
                    if index.search(query, request, &mut scratch, &mut out).is_err() {
                        return;
                    }
                }
            });
        }
    });
    queries.len() as f64 / began.elapsed().as_secs_f64()
}

fn peak_rss() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib * 1024)
}

/// Measures and prints.
pub fn index(args: &IndexArgs) -> Result<(), String> {
    let threads = args.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from)).max(1);
    let Rows { bytes, space } = read_base(&args.base, args.metric, args.rows)?;
    let points = bytes.len() / space.row_bytes();
    let queries = read_queries(&args.queries, &space)?;
    let rows = region_from(bytes);
    let truth = match &args.truth {
        Some(path) => read_truth(path, args.k)?,
        None => find_truth(&space, &rows, &queries, args.k)?,
    };
    if queries.len() != truth.len() {
        return Err(format!("{} queries, truth for {}", queries.len(), truth.len()));
    }
    if let Some(id) = truth.iter().flatten().find(|id| usize::try_from(**id).map_or(true, |id| id >= points)) {
        return Err(format!("the truth names row {id}; the base has {points}"));
    }

    let params = Params {
        m: args.m,
        ef_construction: args.ef_construction,
        quantization: args.quantization,
        ..Params::default()
    };
    let began = Instant::now();
    let sections = build(&space, rows.bytes(), &params, threads, &|| true).ok_or("the build was stopped")?;
    let build_seconds = began.elapsed().as_secs_f64();
    drop(rows);
    let order = sections.order;
    let index =
        Sealed::open(space, region_from(sections.vectors), region_from(sections.codes), region_from(sections.graph))
            .map_err(|error| error.to_string())?;
    index.warm();
    let memory = index.memory();
    let began = Instant::now();
    let (asked, queries) =
        queries.split_at_checked(args.learn).ok_or("there are fewer queries than are to be learned from")?;
    if args.learn > 0 {
        index.learn(asked, &|| true);
        eprintln!("learned from {} queries in {:.2} s", asked.len(), began.elapsed().as_secs_f64());
    }
    let truth = &truth[args.learn..];

    let mut results = Vec::new();
    let efforts: Vec<Effort> = match args.recall.is_empty() {
        true => args.ef.iter().map(|ef| Effort::Ef(*ef)).collect(),
        false => args.recall.iter().map(|recall| Effort::Recall(*recall)).collect(),
    };
    for effort in efforts {
        let request = Request { effort, ..Request::nearest(args.k) };
        let n = queries.len() as f64;
        let mut runs = Vec::new();
        let mut batches = Vec::new();
        for _ in 0..args.repeat.max(1) {
            runs.push(single(&index, &order, queries, truth, &request)?);
            if threads > 1 {
                batches.push(batch(&index, queries, &request, threads));
            }
        }
        runs.sort_by(|a, b| a.seconds.total_cmp(&b.seconds));
        batches.sort_by(f64::total_cmp);
        let one = &runs[runs.len() / 2];
        let at = |share: f64| one.latencies[((one.latencies.len() - 1) as f64 * share) as usize];
        let alone = n / one.seconds;
        let (kind, asked) = match effort {
            Effort::Ef(ef) => ("ef", json!(ef)),
            Effort::Recall(recall) => ("target", json!((f64::from(recall) * 1e6).round() / 1e6)),
        };
        results.push(json!({
            kind: asked,
            "recall": one.right as f64 / (n * args.k as f64),
            "qps": batches.get(batches.len() / 2).copied().unwrap_or(alone),
            "qps_one_thread": alone,
            "p50_us": at(0.5),
            "p99_us": at(0.99),
            "distances": one.distances as f64 / n,
        }));
    }
    let graph = args.graph.then(|| index.explore().connectivity());
    let report = json!({
        "points": points,
        "dimension": space.dim(),
        "metric": space.metric().to_string(),
        "element": space.element().to_string(),
        "quantization": args.quantization.to_string(),
        "kernels": space.kernels(),
        "k": args.k,
        "m": args.m,
        "ef_construction": args.ef_construction,
        "threads": threads,
        "build_seconds": build_seconds,
        "bytes_per_vector_index": memory.index as f64 / points as f64,
        "bytes_per_vector_full": (memory.index + memory.vectors) as f64 / points as f64,
        "peak_rss_bytes": peak_rss(),
        "results": results,
        "graph": graph.as_ref().map(super::graph::json),
    });
    if args.json {
        println!("{report}");
        return Ok(());
    }
    println!(
        "{points} x {} {} {}, {} ({}): built in {build_seconds:.2} s on {threads} threads; {:.0} bytes a vector in the index, {:.0} in all; peak RSS {} MiB",
        space.dim(),
        space.element(),
        space.metric(),
        args.quantization,
        space.kernels(),
        memory.index as f64 / points as f64,
        (memory.index + memory.vectors) as f64 / points as f64,
        peak_rss().unwrap_or(0) >> 20
    );
    println!(
        "{:>6} {:>9} {:>10} {:>10} {:>9} {:>9} {:>10}",
        "effort", "recall", "qps", "one thread", "p50 us", "p99 us", "distances"
    );
    let figure = |row: &serde_json::Value, key: &str| row[key].as_f64().unwrap_or(f64::NAN);
    for row in &results {
        println!(
            "{:>6} {:>9.4} {:>10.0} {:>10.0} {:>9.1} {:>9.1} {:>10.0}",
            row["ef"].as_f64().or(row["target"].as_f64()).unwrap_or(f64::NAN),
            figure(row, "recall"),
            figure(row, "qps"),
            figure(row, "qps_one_thread"),
            figure(row, "p50_us"),
            figure(row, "p99_us"),
            figure(row, "distances")
        );
    }
    if let Some(graph) = &graph {
        super::graph::print(graph);
    }
    Ok(())
}
