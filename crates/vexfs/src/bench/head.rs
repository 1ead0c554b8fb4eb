//! `vexfs bench head`: the mutable index: inserts, searches by recall target, churn, searches beside inserts.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use clap::Args;
use serde_json::json;
use vexfs_fs::index::{
    Effort, Flat, Index, Metric, Mutable, Neighbor, Params, Request, Scratch, Slot, Space, region_from,
};

use super::{Random, Rows, read_base, read_queries};

/// Arguments of `vexfs bench head`.
#[derive(Args)]
pub struct HeadArgs {
    /// What is searched in: a row a vector.
    #[arg(long)]
    base: PathBuf,
    /// What is searched for.
    #[arg(long)]
    queries: PathBuf,
    /// l2, ip or cosine.
    #[arg(long)]
    metric: Metric,
    /// Only the first rows of the base: as many as a head holds.
    #[arg(long, default_value_t = 50_000)]
    rows: usize,
    /// Neighbours that recall is measured over.
    #[arg(short, default_value_t = 10)]
    k: usize,
    /// Queries that are run.
    #[arg(long, default_value_t = 1_000)]
    count: usize,
    /// Rounds of churn: each deletes half of the points and inserts as many.
    #[arg(long, default_value_t = 10)]
    rounds: usize,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

/// Searches of one kind.
struct Asked {
    found: Vec<Vec<Neighbor>>,
    /// Microseconds, sorted.
    times: Vec<f64>,
}

impl Asked {
    fn at(&self, share: f64) -> f64 {
        let last = self.times.len().saturating_sub(1);
        self.times.get((last as f64 * share) as usize).copied().unwrap_or(f64::NAN)
    }

    /// Share of the true hits that were found; equally far is equally right.
    fn recall(&self, truth: &Asked) -> f64 {
        let (mut right, mut all) = (0, 0);
        for (truth, found) in truth.found.iter().zip(&self.found) {
            let limit = truth.last().map_or(f32::INFINITY, |hit| hit.distance);
            right += found.iter().filter(|hit| hit.distance <= limit).count().min(truth.len());
            all += truth.len();
        }
        right as f64 / all.max(1) as f64
    }
}

fn ask(index: &dyn Index, queries: &[Vec<f32>], request: &Request<'_>) -> Result<Asked, String> {
    let (mut scratch, mut out) = (Scratch::default(), Vec::new());
    let mut asked = Asked { found: Vec::new(), times: Vec::new() };
    for query in queries.iter().take(50) {
        index.search(query, request, &mut scratch, &mut out).map_err(|error| error.to_string())?;
    }
    for query in queries {
        let began = Instant::now();
        index.search(query, request, &mut scratch, &mut out).map_err(|error| error.to_string())?;
        asked.times.push(began.elapsed().as_secs_f64() * 1e6);
        asked.found.push(out.clone());
    }
    asked.times.sort_by(f64::total_cmp);
    Ok(asked)
}

/// A head of these rows, linked on so many threads, and its points a second.
fn grown(space: Space, rows: &[&[u8]], threads: usize) -> (Mutable, f64) {
    let head = Mutable::new(space, Params::default());
    let next = AtomicUsize::new(0);
    let began = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let mut scratch = Scratch::default();
                while let Some(row) = rows.get(next.fetch_add(1, Ordering::Relaxed)) {
                    head.link(head.push(row), &mut scratch);
                    head.tend(&mut scratch);
                }
            });
        }
    });
    let rate = head.len() as f64 / began.elapsed().as_secs_f64();
    (head, rate)
}

/// Measures and prints.
pub fn head(args: &HeadArgs) -> Result<(), String> {
    let Rows { bytes, space } = read_base(&args.base, args.metric, None)?;
    let all: Vec<&[u8]> = bytes.chunks_exact(space.row_bytes()).collect();
    let n = args.rows.min(all.len());
    let (rows, others) = all.split_at(n);
    let queries: Vec<_> = read_queries(&args.queries, &space)?.into_iter().take(args.count).collect();
    let flat = |rows: &mut dyn Iterator<Item = &[u8]>| Flat::new(space, region_from(rows.flatten().copied().collect()));
    let request = |effort: Effort| Request { effort, ..Request::nearest(args.k) };

    let pushing = Instant::now();
    let pushed = Mutable::new(space, Params::default());
    rows.iter().for_each(|row| _ = pushed.push(row));
    let push = n as f64 / pushing.elapsed().as_secs_f64();
    drop(pushed);
    let (head, one) = grown(space, rows, 1);
    let two = grown(space, rows, 2).1;
    let memory = head.memory();

    // The base's next rows are questions from where the points are from, as the calibration's are.
    let mut held = Vec::new();
    for row in others.iter().take(args.count) {
        let mut numbers = Vec::new();
        space.decode(row, &mut numbers);
        held.push(numbers);
    }
    let exact = flat(&mut rows.iter().copied());
    let truth = ask(&exact, &queries, &Request::nearest(args.k))?;
    let held_truth = ask(&exact, &held, &Request::nearest(args.k))?;
    drop(exact);
    let mut searches = Vec::new();
    let efforts = [0.9, 0.95, 0.99].map(Effort::Recall).into_iter().chain([10, 16, 32, 64, 128].map(Effort::Ef));
    for effort in efforts {
        let asked = ask(&head, &queries, &request(effort))?;
        let (kind, value) = match effort {
            Effort::Ef(ef) => ("ef", ef as f64),
            Effort::Recall(recall) => ("recall", f64::from(recall)),
        };
        searches.push(json!({
            "effort": kind,
            "value": value,
            "recall": asked.recall(&truth),
            "recall_on_next_rows": ask(&head, &held, &request(effort))?.recall(&held_truth),
            "qps": asked.times.len() as f64 / asked.times.iter().sum::<f64>() * 1e6,
        }));
    }

    // Searches alone, and beside one thread that inserts.
    let effort = request(Effort::Recall(0.95));
    let idle = ask(&head, &queries, &effort)?;
    let (stop, inserted) = (AtomicBool::new(false), AtomicUsize::new(0));
    let first = head.len();
    let beside = std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut scratch = Scratch::default();
            for row in others.iter().chain(rows).take_while(|_| !stop.load(Ordering::Relaxed)) {
                head.link(head.push(row), &mut scratch);
                head.tend(&mut scratch);
                inserted.fetch_add(1, Ordering::Relaxed);
            }
        });
        // Until there are enough inserts, and latencies for a 99th percentile.
        let began = Instant::now();
        let mut beside = ask(&head, &queries, &effort)?;
        while began.elapsed().as_secs_f64() < 3.0 {
            let more = ask(&head, &queries, &effort)?;
            beside.times.extend(more.times);
            beside.found = more.found;
        }
        stop.store(true, Ordering::Relaxed);
        beside.times.sort_by(f64::total_cmp);
        Ok::<_, String>(beside)
    });
    stop.store(true, Ordering::Relaxed);
    let beside = beside?;
    let beside_recall = beside.recall(&truth);
    let inserted = inserted.into_inner();

    // Churn: half of what is there goes, as many rows come that are not there.
    let mut scratch = Scratch::default();
    (first..head.len()).for_each(|slot| _ = head.delete(Slot(slot as u32)));
    let mut present: Vec<(Slot, usize)> = (0..n).map(|row| (Slot(row as u32), row)).collect();
    let mut absent: Vec<usize> = (n..all.len()).collect();
    let mut random = Random::new(0x5eed);
    let (mut deleted_found, mut inserting) = (0, 0.0);
    for _ in 0..args.rounds {
        for _ in 0..n / 2 {
            let (slot, row) = present.swap_remove(random.below(present.len()));
            head.delete(slot);
            head.tend(&mut scratch);
            absent.push(row);
        }
        let began = Instant::now();
        for _ in 0..n / 2 {
            let row = absent.swap_remove(random.below(absent.len()));
            let slot = head.push(all[row]);
            head.link(slot, &mut scratch);
            head.tend(&mut scratch);
            present.push((slot, row));
        }
        inserting += began.elapsed().as_secs_f64();
        let live: std::collections::HashSet<Slot> = present.iter().map(|(slot, _)| *slot).collect();
        let asked = ask(&head, &queries, &request(Effort::Recall(0.95)))?;
        deleted_found += asked.found.iter().flatten().filter(|hit| !live.contains(&hit.slot)).count();
    }
    head.tidy(&mut scratch);
    let reach = head.reach();
    let left: Vec<&[u8]> = present.iter().map(|(_, row)| all[*row]).collect();
    let truth = ask(&flat(&mut left.iter().copied()), &queries, &Request::nearest(args.k))?;
    let (fresh, _) = grown(space, &left, 1);
    let mut churned = Vec::new();
    for ef in [16, 32, 64] {
        let effort = request(Effort::Ef(ef));
        let (now, anew) = (ask(&head, &queries, &effort)?, ask(&fresh, &queries, &effort)?);
        churned.push(json!({"ef": ef, "recall": now.recall(&truth), "fresh": anew.recall(&truth)}));
    }
    let churned_memory = head.memory();
    let report = json!({
        "points": n,
        "dimension": space.dim(),
        "metric": space.metric().to_string(),
        "element": space.element().to_string(),
        "kernels": space.kernels(),
        "k": args.k,
        "pushes_per_second": push,
        "inserts_per_second_1_thread": one,
        "inserts_per_second_2_threads": two,
        "bytes_per_point": (memory.index + memory.vectors) as f64 / n as f64,
        "searches": searches,
        "idle": { "p50_us": idle.at(0.5), "p99_us": idle.at(0.99) },
        "beside_inserts": {
            "p50_us": beside.at(0.5),
            "p99_us": beside.at(0.99),
            "recall": beside_recall,
            "inserted": inserted,
        },
        "churn": {
            "rounds": args.rounds,
            "inserts_per_second": (args.rounds * (n / 2)) as f64 / inserting,
            "deleted_returned": deleted_found,
            "points": reach.points,
            "unreachable": reach.unreachable,
            "stale_links": reach.stale,
            "bytes_per_point": (churned_memory.index + churned_memory.vectors) as f64 / n as f64,
            "recall": churned,
        },
    });
    if args.json {
        println!("{report}");
        return Ok(());
    }
    let figure = |row: &serde_json::Value, key: &str| row[key].as_f64().unwrap_or(f64::NAN);
    println!(
        "{n} x {} {} {} ({}): pushed {push:.0}/s; inserted {one:.0}/s on 1 thread, {two:.0}/s on 2; {:.0} bytes a point",
        space.dim(),
        space.element(),
        space.metric(),
        space.kernels(),
        (memory.index + memory.vectors) as f64 / n as f64
    );
    println!("{:>6} {:>7} {:>9} {:>10} {:>9}", "effort", "", "recall", "next rows", "qps");
    for row in &searches {
        println!(
            "{:>6} {:>7} {:>9.4} {:>10.4} {:>9.0}",
            row["effort"].as_str().unwrap_or_default(),
            (figure(row, "value") * 100.0).round() / 100.0,
            figure(row, "recall"),
            figure(row, "recall_on_next_rows"),
            figure(row, "qps")
        );
    }
    println!("idle: p50 {:.1} us, p99 {:.1} us", idle.at(0.5), idle.at(0.99));
    println!(
        "beside inserts: p50 {:.1} us, p99 {:.1} us ({:.2} of idle), recall {beside_recall:.4}, {inserted} inserted",
        beside.at(0.5),
        beside.at(0.99),
        beside.at(0.99) / idle.at(0.99)
    );
    println!(
        "{} rounds of churn: {:.0} inserts/s, {deleted_found} deleted returned, {} of {} unreachable, {} stale links, {:.0} bytes a point",
        args.rounds,
        (args.rounds * (n / 2)) as f64 / inserting,
        reach.unreachable,
        reach.points,
        reach.stale,
        (churned_memory.index + churned_memory.vectors) as f64 / n as f64
    );
    for row in &churned {
        println!("  ef {}: recall {:.4}, built anew {:.4}", row["ef"], figure(row, "recall"), figure(row, "fresh"));
    }
    Ok(())
}
