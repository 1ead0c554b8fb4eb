//! `vexfs bench filter`: filtered searches beside the unfiltered one and beside an exact scan of what is allowed.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use vexfs_fs::index::{
    Bits, Effort, Filter, Index, Metric, Params, Request, Scratch, Sealed, Slot, build, region_from,
};

use super::{Rows, median, read_base, read_queries};

/// Arguments of `vexfs bench filter`.
#[derive(Args)]
pub struct FilterArgs {
    /// What is searched in: a row a vector.
    #[arg(long)]
    base: PathBuf,
    /// What is searched for.
    #[arg(long)]
    queries: PathBuf,
    /// l2, ip or cosine.
    #[arg(long)]
    metric: Metric,
    /// Only the first rows of the base.
    #[arg(long)]
    rows: Option<usize>,
    /// Neighbours asked for.
    #[arg(short, default_value_t = 10)]
    k: usize,
    /// Recall that all searches ask for.
    #[arg(long, default_value_t = 0.95)]
    recall: f32,
    /// Filters: independent of the query, the rows near it or far from it, or regions (64 cells).
    #[arg(long, value_delimiter = ',', value_parser = FILTERS, default_values = FILTERS)]
    filter: Vec<String>,
    /// Parts of the rows that they allow.
    #[arg(long, value_delimiter = ',', default_values_t = [0.5, 0.1, 0.01, 0.001])]
    share: Vec<f64>,
    /// Queries that are run.
    #[arg(long, default_value_t = 200)]
    count: usize,
}

const FILTERS: [&str; 5] = ["independent", "near", "far", "near regions", "far regions"];
/// Regions that the rows are told apart by.
const PIVOTS: usize = 64;

#[derive(Copy, Clone, PartialEq)]
enum Run {
    Plain,
    Filtered,
    Exact,
}

/// Measures and prints.
pub fn filter(args: &FilterArgs) -> Result<(), String> {
    let Rows { bytes, space } = read_base(&args.base, args.metric, args.rows)?;
    let n = bytes.len() / space.row_bytes();
    let queries: Vec<_> = read_queries(&args.queries, &space)?.into_iter().take(args.count).collect();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let sections = build(&space, &bytes, &Params::default(), threads, &|| true).ok_or("the build was stopped")?;
    drop(bytes);
    let index =
        Sealed::open(space, region_from(sections.vectors), region_from(sections.codes), region_from(sections.graph))
            .map_err(|error| error.to_string())?;
    index.warm();

    let (mut scratch, mut out, mut numbers) = (Scratch::default(), Vec::new(), Vec::new());
    // Each row belongs to the pivot nearest to it: regions as subjects, owners or languages make them.
    let mut pivots = Vec::new();
    for pivot in 0..PIVOTS.min(n) {
        space.decode(index.row(Slot((pivot * n / PIVOTS) as u32)), &mut numbers);
        pivots.push(numbers.clone());
    }
    let mut region = vec![0; n];
    for (slot, region) in region.iter_mut().enumerate() {
        space.decode(index.row(Slot(slot as u32)), &mut numbers);
        let mut row = Vec::new();
        space.encode(&numbers, &mut row).map_err(|error| error.to_string())?;
        let near = |pivot: &Vec<f32>| space.distance(pivot, &row);
        *region = (0..pivots.len()).min_by(|a, b| near(&pivots[*a]).total_cmp(&near(&pivots[*b]))).unwrap_or(0);
    }
    println!("{n} x {} {} {}, recall asked {}", space.dim(), space.element(), space.metric(), args.recall);
    println!(
        "{:<14} {:>7} {:>7} {:>9} {:>10} {:>9} {:>9} {:>9} {:>10} {:>10}",
        "filter", "share", "recall", "us", "plain us", "ratio", "exact us", "ratio", "distances", "plain"
    );
    for kind in &args.filter {
        for share in args.share.iter().copied() {
            let wanted = (n as f64 * share) as usize;
            let mut filters = Vec::new();
            for (number, query) in queries.iter().enumerate() {
                let by_region = |nearest: bool| {
                    let mut order: Vec<usize> = (0..pivots.len()).collect();
                    let mut row = Vec::new();
                    let far: Vec<f32> = pivots
                        .iter()
                        .map(|pivot| {
                            row.clear();
                            space.encode(pivot, &mut row).map_or(f32::INFINITY, |()| space.distance(query, &row))
                        })
                        .collect();
                    order.sort_by(|a, b| far[*a].total_cmp(&far[*b]));
                    if !nearest {
                        order.reverse();
                    }
                    let mut rank = vec![0; pivots.len()];
                    order.iter().enumerate().for_each(|(at, pivot)| rank[*pivot] = at);
                    let mut slots: Vec<usize> = (0..n).collect();
                    slots.sort_by_key(|slot| (rank[region[*slot]], slot.wrapping_mul(0x9e37_79b9) % 1_000_003));
                    slots.truncate(wanted);
                    Bits::of(n, slots)
                };
                let allowed = match kind.as_str() {
                    "independent" => Bits::of(
                        n,
                        (0..n).filter(|slot| {
                            let mixed = (slot + number * n).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                            ((mixed >> 20) % 1_000_000) as f64 / 1e6 < share
                        }),
                    ),
                    "near regions" => by_region(true),
                    "far regions" => by_region(false),
                    kind => {
                        let far = |slot: usize| (space.distance(query, index.row(Slot(slot as u32))), slot);
                        let mut distances: Vec<(f32, usize)> = (0..n).map(far).collect();
                        distances.sort_by(|a, b| a.0.total_cmp(&b.0));
                        let some = if kind == "near" { &distances[..wanted] } else { &distances[n - wanted..] };
                        Bits::of(n, some.iter().map(|(_, slot)| *slot))
                    }
                };
                filters.push(allowed);
            }
            let request = Request { effort: Effort::Recall(args.recall), ..Request::nearest(args.k) };
            let mut run = |kind: Run| {
                let (mut times, mut found, mut distances) = (Vec::new(), Vec::new(), 0);
                for (query, allowed) in queries.iter().zip(&filters) {
                    let filter = (kind != Run::Plain).then_some(allowed as &dyn Filter);
                    let request = Request { filter, exact: kind == Run::Exact, ..request.clone() };
                    let began = Instant::now();
                    let stats = index.search(query, &request, &mut scratch, &mut out);
                    distances += stats.map_err(|error| error.to_string())?.distances;
                    times.push(began.elapsed().as_secs_f64() * 1e6);
                    found.push(out.clone());
                }
                Ok::<_, String>((median(times), found, distances / queries.len().max(1) as u64))
            };
            let (exact, truth, _) = run(Run::Exact)?;
            // Once to fill the caches, then in turns.
            let (_, _, plain_distances) = run(Run::Plain)?;
            let (mut plains, mut filtereds, mut found, mut distances) = (Vec::new(), Vec::new(), Vec::new(), 0);
            for _ in 0..3 {
                plains.push(run(Run::Plain)?.0);
                let time;
                (time, found, distances) = run(Run::Filtered)?;
                filtereds.push(time);
            }
            let (mut right, mut all, mut short) = (0, 0, 0);
            for (truth, found) in truth.iter().zip(&found) {
                let limit = truth.last().map_or(f32::INFINITY, |hit| hit.distance);
                right += found.iter().filter(|hit| hit.distance <= limit).count();
                all += truth.len();
                short += usize::from(found.len() < truth.len());
            }
            let (filtered, plain) = (median(filtereds), median(plains));
            println!(
                "{kind:<14} {share:>7} {:>7.4} {filtered:>9.1} {plain:>10.1} {:>9.2} {exact:>9.1} {:>9.2} {distances:>10} {plain_distances:>10}{}",
                right as f64 / all.max(1) as f64,
                filtered / plain,
                filtered / exact,
                if short > 0 { format!(" ({short} with too few hits)") } else { String::new() }
            );
        }
    }
    Ok(())
}
