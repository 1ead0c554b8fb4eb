use super::*;
use crate::graph::Graph;
use crate::raw::Place;
use crate::{Element, Metric, Params, Space, build, region, region_from};

fn rows(space: &Space, n: usize) -> Vec<u8> {
    let mut state = 11u64;
    let mut rows = Vec::new();
    for _ in 0..n {
        let point: Vec<f32> = (0..space.dim())
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 40) as f32 / (1u64 << 24) as f32
            })
            .collect();
        space.encode(&point, &mut rows).unwrap();
    }
    rows
}

fn sealed(n: usize) -> Sealed {
    let space = Space::new(5, Metric::L2, Element::F32).unwrap();
    let sections = build(&space, &rows(&space, n), &Params::default(), 1, &|| true).unwrap();
    Sealed::open(space, region(&sections.vectors), region(&sections.codes), region(&sections.graph)).unwrap()
}

fn head(n: usize, linked: usize) -> Mutable {
    let space = Space::new(5, Metric::L2, Element::F32).unwrap();
    let head = Mutable::new(space, Params::default());
    let mut scratch = Scratch::default();
    for (at, row) in rows(&space, n).chunks_exact(space.row_bytes()).enumerate() {
        let slot = head.push(row);
        if at < linked {
            head.link(slot, &mut scratch);
        }
    }
    head
}

/// What holds of every report.
fn check(explorer: &Explorer<'_>) -> Connectivity {
    let report = explorer.connectivity();
    assert_eq!(report.layers.iter().map(|layer| layer.nodes).collect::<Vec<_>>(), explorer.layers());
    for layer in &report.layers {
        for histogram in [&layer.outgoing, &layer.incoming] {
            assert!(histogram.is_sorted());
            assert_eq!(histogram.iter().map(|(_, nodes)| nodes).sum::<usize>(), layer.nodes);
            assert_eq!(histogram.iter().map(|(degree, nodes)| degree * nodes).sum::<usize>(), layer.links);
        }
        assert!(layer.components >= 1 && layer.largest <= layer.nodes);
        assert_eq!(layer.components == 1, layer.largest == layer.nodes);
    }
    report
}

#[test]
fn a_whole_graph_is_reported_whole() {
    let (sealed, head) = (sealed(2_000), head(2_000, 2_000));
    for explorer in [sealed.explore(), head.explore()] {
        let report = check(&explorer);
        assert_eq!(report.layers[0].nodes, 2_000);
        assert_eq!((report.layers[0].components, report.unreachable, report.layers[0].broken), (1, 0, 0));
        let (entry, top) = explorer.entry().unwrap();
        assert_eq!(report.layers.len(), top + 1);
        assert_eq!(explorer.top(entry), Some(top));
        // Breadth first: hops never fall, all are met once, and the limit is kept.
        let around = explorer.around(entry, 0, usize::MAX);
        assert_eq!(around.len(), 2_000 - report.layers[0].unreachable);
        assert!(around.is_sorted_by_key(|(_, hops)| *hops));
        assert_eq!(around.iter().map(|(slot, _)| slot).collect::<std::collections::HashSet<_>>().len(), around.len());
        assert_eq!(explorer.around(entry, 0, 7), around[..7]);
        assert!(explorer.around(entry, top + 1, 7).is_empty());
        assert!(explorer.around(Slot(2_000), 0, 7).is_empty());
        let near = explorer.neighbours(entry, 0);
        assert!(!near.is_empty() && near.is_sorted_by(|a, b| a.distance <= b.distance));
        let ones: Vec<Slot> = around.iter().filter(|(_, hops)| *hops == 1).map(|(slot, _)| *slot).collect();
        assert!(near.iter().all(|near| ones.contains(&near.slot)) && near.len() == ones.len());
        assert!(explorer.neighbours(Slot(u32::MAX), 0).is_empty() && explorer.neighbours(entry, 99).is_empty());
    }
}

#[test]
fn what_is_not_linked_is_in_no_layer() {
    let head = head(300, 100);
    let explorer = head.explore();
    assert_eq!(check(&explorer).layers[0].nodes, 100);
    assert_eq!(explorer.top(Slot(100)), None);
    assert!(explorer.neighbours(Slot(100), 0).is_empty());
    let small = sealed(10);
    assert_eq!(small.explore().entry(), None);
    assert_eq!(small.explore().connectivity(), Connectivity::default());
    let empty = Mutable::new(*small.space(), Params::default());
    assert_eq!(empty.explore().connectivity(), Connectivity::default());
}

#[test]
fn a_point_that_lost_its_links_is_named() {
    let mut whole = sealed(1_500);
    let graph = whole.graph.as_ref().unwrap();
    let counts = &graph.counts;
    // A graph of the same layers with what leads to node 1,400 taken away, and one link to nowhere.
    let damaged = Graph::new(counts.clone(), graph.m, Place::Memory).unwrap();
    for (layer, count) in counts.iter().enumerate() {
        for node in 0..*count as u32 {
            let kept = graph.links(layer, node).filter(|other| *other != 1_400);
            for (word, other) in damaged.list(layer, node).iter().zip(kept) {
                word.store(other + 1, std::sync::atomic::Ordering::Relaxed);
            }
        }
    }
    damaged.list(0, 1_400)[0].store(1_000_000, std::sync::atomic::Ordering::Relaxed);
    whole.graph = Some(damaged);
    let report = check(&whole.explore());
    assert_eq!((report.unreachable, &report.examples[..]), (1, &[Slot(1_400)][..]));
    assert_eq!(report.layers[0].broken, 1);
    assert_eq!(report.layers[0].incoming[0], (0, 1));
}

#[test]
fn any_bytes_of_links_are_looked_at_without_a_panic() {
    let space = Space::new(2, Metric::L2, Element::F32).unwrap();
    let sections = build(&space, &rows(&space, 1_100), &Params::default(), 1, &|| true).unwrap();
    let mut state = 5u64;
    for _ in 0..40 {
        let mut graph = sections.graph.clone();
        for _ in 0..200 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let at = crate::sealed::header::SIZE + (state >> 33) as usize % (graph.len() - crate::sealed::header::SIZE);
            graph[at] = (state >> 24) as u8;
        }
        let opened = Sealed::open(space, region(&sections.vectors), region(&sections.codes), region_from(graph));
        let Ok(index) = opened else { continue };
        let explorer = index.explore();
        explorer.connectivity();
        explorer.around(Slot(0), 0, usize::MAX);
        (0..1_100).for_each(|slot| _ = explorer.neighbours(Slot(slot), 0));
    }
}

#[test]
fn a_path_begins_where_a_walk_does_and_holds_what_it_found() {
    let sealed = sealed(2_000);
    let (mut scratch, mut out) = (Scratch::default(), Vec::new());
    let request = Request::nearest(5);
    let path = sealed.path(&[0.5; 5], &request, &mut scratch).unwrap();
    sealed.search(&[0.5; 5], &request, &mut scratch, &mut out).unwrap();
    assert!(out.iter().all(|hit| path.contains(&hit.slot)));
    assert!(path.len() < 2_000);
    let mut once = path.clone();
    once.sort_unstable();
    once.dedup();
    assert_eq!(once.len(), path.len());
    let exact = Request { exact: true, ..request };
    assert!(sealed.path(&[0.5; 5], &exact, &mut scratch).unwrap().is_empty());
}
