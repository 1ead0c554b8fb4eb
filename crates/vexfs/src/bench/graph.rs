//! What a graph is like, as `vexfs bench index --graph` tells it.

use serde_json::{Value, json};
use vexfs_fs::index::Connectivity;

/// For `--json`. Degrees are pairs of a degree and how many nodes have it.
pub fn json(graph: &Connectivity) -> Value {
    let layers = graph.layers.iter().map(|layer| {
        json!({
            "nodes": layer.nodes,
            "links": layer.links,
            "broken": layer.broken,
            "components": layer.components,
            "largest": layer.largest,
            "unreachable": layer.unreachable,
            "outgoing": layer.outgoing,
            "incoming": layer.incoming,
        })
    });
    json!({
        "layers": layers.collect::<Vec<_>>(),
        "unreachable": graph.unreachable,
        "examples": graph.examples.iter().map(|slot| slot.0).collect::<Vec<_>>(),
    })
}

/// The degree that so large a share of the nodes has at most.
fn at(histogram: &[(usize, usize)], share: f64) -> usize {
    let all: usize = histogram.iter().map(|(_, nodes)| nodes).sum();
    let mut left = ((all as f64 * share).ceil() as usize).max(1);
    for (degree, nodes) in histogram {
        match left.checked_sub(*nodes) {
            None | Some(0) => return *degree,
            Some(more) => left = more,
        }
    }
    0
}

/// For people.
pub fn print(graph: &Connectivity) {
    let degrees =
        |histogram: &[(usize, usize)]| [0.0, 0.5, 0.99, 1.0].map(|share| at(histogram, share).to_string()).join("/");
    println!(
        "{:>5} {:>9} {:>10} {:>6} {:>10} {:>9} {:>11} {:>17} {:>17}",
        "layer", "nodes", "links", "broken", "components", "largest", "unreachable", "links out", "links in"
    );
    for (n, layer) in graph.layers.iter().enumerate().rev() {
        println!(
            "{n:>5} {:>9} {:>10} {:>6} {:>10} {:>9} {:>11} {:>17} {:>17}",
            layer.nodes,
            layer.links,
            layer.broken,
            layer.components,
            layer.largest,
            layer.unreachable,
            degrees(&layer.outgoing),
            degrees(&layer.incoming)
        );
    }
    println!("links out and in: fewest/median/99%/most; {} points can't be reached by any walk", graph.unreachable);
}
