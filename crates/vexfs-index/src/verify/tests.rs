use crate::sealed::header;
use crate::{Element, Metric, Params, Sealed, Space, build, region, region_from};

/// By inner product some points have no link to them; a check that called that damage would have given up sound segments.
#[test]
fn an_inner_product_graph_that_was_just_built_is_sound() {
    let space = Space::new(4, Metric::InnerProduct, Element::F32).unwrap();
    let mut rows = Vec::new();
    for n in 0..3_000u32 {
        let row: Vec<f32> = (0..4).map(|at| ((n * 7919 + at * 104_729) % 1_000) as f32 / 500.0 - 1.0).collect();
        space.encode(&row, &mut rows).unwrap();
    }
    let built = build(&space, &rows, &Params::default(), 1, &|| true).unwrap();
    let index = Sealed::open(space, region(&built.vectors), region(&built.codes), region(&built.graph)).unwrap();
    assert!(index.explore().connectivity().unreachable > 0, "this is what the test is about");
    assert_eq!(index.verify(), Ok(()));
}

#[test]
fn a_link_to_nowhere_and_a_node_without_links_to_it_are_found() {
    let space = Space::new(4, Metric::L2, Element::F32).unwrap();
    let mut state = 7u64;
    let mut rows = Vec::new();
    for _ in 0..6_000 {
        let row: Vec<f32> = (0..4)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state >> 40) as f32
            })
            .collect();
        space.encode(&row, &mut rows).unwrap();
    }
    let built = build(&space, &rows, &Params::default(), 1, &|| true).unwrap();
    let (vectors, codes) = (region(&built.vectors), region(&built.codes));
    let open = |graph: Vec<u8>| Sealed::open(space, vectors.clone(), codes.clone(), region_from(graph)).unwrap();
    assert_eq!(open(built.graph.clone()).verify(), Ok(()));
    let coder = u32::from_le_bytes(built.graph[header::CODER..][..4].try_into().unwrap()) as usize;
    let first = header::SIZE + coder;
    let mut wrong = built.graph.clone();
    wrong[first..first + 4].copy_from_slice(&6_001u32.to_le_bytes());
    assert!(open(wrong).verify().unwrap_err().to_string().contains("isn't there"));
    // Nobody leads to anybody.
    let mut wrong = built.graph;
    wrong[first..].fill(0);
    assert!(open(wrong).verify().unwrap_err().to_string().contains("no walk reaches"));
}
