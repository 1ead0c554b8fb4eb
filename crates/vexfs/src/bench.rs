//! `vexfs bench index`: the index alone, on files that other libraries can be run on as well.

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use clap::Args;
use npyz::{DType, NpyFile};
use vexfs_index::{
    Effort, Element, Index, Metric, Neighbor, Params, Quantization, Request, Scratch, Sealed, Space, build, region_from,
};

/// Build an index of a `.npy` file and search it: recall, speed, memory.
#[derive(Args)]
pub struct IndexArgs {
    /// Rows to index (2-D .npy: f2 f4 f8 i1 u1).
    #[arg(long)]
    base: PathBuf,
    /// Rows to search for.
    #[arg(long)]
    queries: PathBuf,
    /// For each query the row numbers of its true neighbours, nearest first (2-D .npy: i4 i8 u4).
    #[arg(long)]
    truth: PathBuf,
    /// l2, ip or cosine.
    #[arg(long, default_value_t = Metric::L2)]
    metric: Metric,
    /// Neighbours asked for.
    #[arg(short, default_value_t = 10)]
    k: usize,
    /// Only the first rows of the base.
    #[arg(long)]
    rows: Option<usize>,
    /// Links of a node.
    #[arg(long, default_value_t = 16)]
    m: usize,
    /// Candidates while linking.
    #[arg(long, default_value_t = 200)]
    ef_construction: usize,
    /// none or sq8.
    #[arg(long, default_value_t = Quantization::Sq8)]
    quantization: Quantization,
    /// Candidates while searching: one line of output each.
    #[arg(long, value_delimiter = ',')]
    ef: Vec<usize>,
    /// Recall targets instead, turned into ef by the index's own calibration.
    #[arg(long, value_delimiter = ',', conflicts_with = "ef")]
    recall: Vec<f32>,
    /// Of the build and of batch searches.
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// How often the queries are run; the median counts.
    #[arg(long, default_value_t = 5)]
    repeat: usize,
    /// One JSON object instead of a table.
    #[arg(long)]
    json: bool,
}

#[derive(serde::Serialize)]
struct Report {
    points: usize,
    dim: usize,
    element: String,
    metric: String,
    kernels: String,
    threads: usize,
    build_seconds: f64,
    index_bytes_per_vector: f64,
    bytes_per_vector: f64,
    peak_rss_bytes: u64,
    runs: Vec<Run>,
}

#[derive(serde::Serialize)]
struct Run {
    effort: String,
    recall: f64,
    qps: f64,
    p50_us: f64,
    p99_us: f64,
    distances: f64,
}

/// Measures and prints.
pub fn index(args: &IndexArgs) -> Result<(), String> {
    let (base, element) = matrix(&args.base, args.rows)?;
    let (queries, _) = matrix(&args.queries, None)?;
    let truth = integers(&args.truth)?;
    if queries.is_empty() || queries.len() != truth.len() || truth.iter().any(|row| row.len() < args.k) {
        return Err(format!(
            "{} queries, {} rows of truth, at least {} columns wanted",
            queries.len(),
            truth.len(),
            args.k
        ));
    }
    let dim = base.first().map_or(0, Vec::len);
    let space = Space::new(dim, args.metric, element).map_err(|e| e.to_string())?;
    let mut rows = Vec::with_capacity(base.len() * space.row_bytes());
    for (at, row) in base.iter().enumerate() {
        space.encode(row, &mut rows).map_err(|e| format!("row {at}: {e}"))?;
    }
    for (at, query) in queries.iter().enumerate() {
        space.check_query(query).map_err(|e| format!("query {at}: {e}"))?;
    }
    let points = base.len();
    drop(base);

    let params = Params {
        m: args.m,
        ef_construction: args.ef_construction,
        quantization: args.quantization,
        ..Params::default()
    };
    let begun = Instant::now();
    let sections = build(&space, &rows, &params, args.threads, &AtomicBool::new(false)).ok_or("stopped")?;
    let build_seconds = begun.elapsed().as_secs_f64();
    drop(rows);
    let order = sections.order;
    let index =
        Sealed::open(space, region_from(sections.vectors), region_from(sections.codes), region_from(sections.graph))
            .map_err(|e| e.to_string())?;

    let efforts: Vec<Effort> = match (args.ef.as_slice(), args.recall.as_slice()) {
        ([], []) => [10, 14, 20, 28, 40, 56, 80, 112, 160, 224, 320, 448].map(Effort::Ef).to_vec(),
        ([], recalls) => recalls.iter().map(|r| Effort::Recall(*r)).collect(),
        (efs, _) => efs.iter().map(|ef| Effort::Ef(*ef)).collect(),
    };
    let mut runs = Vec::new();
    for effort in efforts {
        runs.push(measure(&index, &order, &queries, &truth, effort, args)?);
    }
    let memory = index.memory();
    let share = |bytes: u64| bytes as f64 / points.max(1) as f64;
    let report = Report {
        points,
        dim,
        element: element.to_string(),
        metric: args.metric.to_string(),
        kernels: space.kernels().to_string(),
        threads: args.threads,
        build_seconds,
        index_bytes_per_vector: share(memory.index),
        bytes_per_vector: share(memory.index + memory.vectors),
        peak_rss_bytes: peak_rss(),
        runs,
    };
    print(&report, args.json)
}

/// The queries one at a time on one thread, or shared out among the threads.
fn measure(
    index: &Sealed,
    order: &[u32],
    queries: &[Vec<f32>],
    truth: &[Vec<i64>],
    effort: Effort,
    args: &IndexArgs,
) -> Result<Run, String> {
    let request = Request { effort, ..Request::nearest(args.k) };
    let mut seconds = Vec::new();
    let mut latencies = Vec::new();
    let (mut right, mut distances) = (0, 0);
    for round in 0..args.repeat.max(1) {
        let next = AtomicUsize::new(0);
        let work = || -> Result<(Vec<f64>, usize, u64), String> {
            let (mut scratch, mut out, mut taken) = (Scratch::default(), Vec::<Neighbor>::new(), Vec::new());
            let (mut right, mut distances) = (0, 0);
            loop {
                let at = next.fetch_add(1, Ordering::Relaxed);
                let (Some(query), Some(truth)) = (queries.get(at), truth.get(at)) else {
                    break;
                };
                let asked = Instant::now();
                let stats = index.search(query, &request, &mut scratch, &mut out).map_err(|e| e.to_string())?;
                taken.push(asked.elapsed().as_secs_f64() * 1e6);
                distances += stats.distances;
                if round == 0 {
                    let found = |row: &&i64| out.iter().any(|hit| i64::from(order[hit.slot.0 as usize]) == **row);
                    right += truth.iter().take(args.k).filter(found).count();
                }
            }
            Ok((taken, right, distances))
        };
        let begun = Instant::now();
        let parts: Vec<_> = std::thread::scope(|scope| {
            let others: Vec<_> = (1..args.threads.max(1)).map(|_| scope.spawn(work)).collect();
            let mut parts = vec![work()];
            parts.extend(others.into_iter().map(|t| t.join().unwrap_or_else(|_| Err("a thread failed".into()))));
            parts
        });
        seconds.push(begun.elapsed().as_secs_f64());
        for part in parts {
            let (taken, found, computed) = part?;
            latencies.extend(taken);
            if round == 0 {
                right += found;
                distances += computed;
            }
        }
    }
    // The first round also counted recall: it is warm-up.
    if seconds.len() > 1 {
        seconds.remove(0);
    }
    seconds.sort_by(f64::total_cmp);
    latencies.sort_by(f64::total_cmp);
    let at = |share: f64| latencies[((latencies.len() - 1) as f64 * share) as usize];
    let label = match effort {
        Effort::Ef(ef) => format!("ef {ef}"),
        Effort::Recall(recall) => format!("recall {recall}"),
    };
    Ok(Run {
        effort: label,
        recall: right as f64 / (queries.len() * args.k) as f64,
        qps: queries.len() as f64 / seconds[seconds.len() / 2],
        p50_us: at(0.5),
        p99_us: at(0.99),
        distances: distances as f64 / queries.len() as f64,
    })
}

fn print(report: &Report, json: bool) -> Result<(), String> {
    if json {
        println!("{}", serde_json::to_string_pretty(report).map_err(|e| e.to_string())?);
        return Ok(());
    }
    println!(
        "{} x {} {}, {}, {} on {} thread(s): built in {:.2} s, {:.0} bytes a vector of index, {:.0} with the vectors, peak RSS {:.0} MiB",
        report.points,
        report.dim,
        report.element,
        report.metric,
        report.kernels,
        report.threads,
        report.build_seconds,
        report.index_bytes_per_vector,
        report.bytes_per_vector,
        report.peak_rss_bytes as f64 / f64::from(1 << 20),
    );
    println!("{:>14} {:>8} {:>9} {:>8} {:>8} {:>10}", "effort", "recall", "QPS", "p50 µs", "p99 µs", "distances");
    for run in &report.runs {
        println!(
            "{:>14} {:>8.4} {:>9.0} {:>8.1} {:>8.1} {:>10.0}",
            run.effort, run.recall, run.qps, run.p50_us, run.p99_us, run.distances
        );
    }
    Ok(())
}

fn open(path: &Path) -> Result<NpyFile<BufReader<File>>, String> {
    let say = |e: std::io::Error| format!("{}: {e}", path.display());
    let file = NpyFile::new(BufReader::new(File::open(path).map_err(say)?)).map_err(say)?;
    match file.shape() {
        [_, _] if file.order() == npyz::Order::C => Ok(file),
        _ => Err(format!("{}: not a 2-D array in C order", path.display())),
    }
}

/// numpy's name of a type without its byte order, such as `f4`.
fn code(file: &NpyFile<BufReader<File>>) -> String {
    match file.dtype() {
        DType::Plain(name) => name.to_string().trim_matches(['\'', '<', '|', '=']).to_string(),
        _ => String::new(),
    }
}

fn matrix(path: &Path, rows: Option<usize>) -> Result<(Vec<Vec<f32>>, Element), String> {
    let file = open(path)?;
    let dim = file.shape()[1].max(1) as usize;
    let wanted = rows.unwrap_or(usize::MAX).saturating_mul(dim);
    let say = |e: std::io::Error| format!("{}: {e}", path.display());
    macro_rules! read {
        ($type:ty, $to:expr) => {{
            let numbers = file.data::<$type>().map_err(|e| format!("{}: {e}", path.display()))?;
            numbers.take(wanted).map(|n| n.map($to)).collect::<Result<Vec<f32>, _>>().map_err(say)?
        }};
    }
    let (numbers, element) = match code(&file).as_str() {
        "f2" => (read!(npyz::half::f16, |v| v.to_f32()), Element::F16),
        "f4" => (read!(f32, |v| v), Element::F32),
        "f8" => (read!(f64, |v| v as f32), Element::F32),
        "i1" => (read!(i8, f32::from), Element::I8),
        "u1" => (read!(u8, f32::from), Element::U8),
        other => return Err(format!("{}: numbers of type {other}", path.display())),
    };
    Ok((numbers.chunks_exact(dim).map(<[f32]>::to_vec).collect(), element))
}

fn integers(path: &Path) -> Result<Vec<Vec<i64>>, String> {
    let file = open(path)?;
    let columns = file.shape()[1].max(1) as usize;
    macro_rules! read {
        ($type:ty) => {{
            let numbers = file.data::<$type>().map_err(|e| format!("{}: {e}", path.display()))?;
            let wide = numbers.map(|n| n.map(i64::from)).collect::<Result<Vec<i64>, _>>();
            wide.map_err(|e| format!("{}: {e}", path.display()))?
        }};
    }
    let numbers = match code(&file).as_str() {
        "i4" => read!(i32),
        "u4" => read!(u32),
        "i8" => read!(i64),
        other => return Err(format!("{}: numbers of type {other}", path.display())),
    };
    Ok(numbers.chunks_exact(columns).map(<[i64]>::to_vec).collect())
}

/// The most memory that this process has had, from the kernel's own account.
fn peak_rss() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}
