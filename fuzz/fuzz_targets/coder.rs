#![no_main]
//! Any bytes as the coder of an index whose links are good.

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use vexfs_index::{
    Effort, Element, Index, Metric, Params, Quantization, Request, Scratch, Sealed, Space, build, region_from,
};

const DIM: usize = 3;
/// Where the header says how long the coder is, and what follows it (`header` in `sealed.rs`).
const CODER: usize = 20;
const HEADER: usize = 216;

struct Good {
    space: Space,
    vectors: Vec<u8>,
    codes: Vec<u8>,
    head: Vec<u8>,
    links: Vec<u8>,
}

fn good() -> &'static [Good] {
    static GOOD: OnceLock<Vec<Good>> = OnceLock::new();
    GOOD.get_or_init(|| {
        let mut all = Vec::new();
        for metric in [Metric::L2, Metric::InnerProduct, Metric::Cosine] {
            for quantization in [Quantization::Sq8, Quantization::Sq4, Quantization::Rabitq] {
                let space = Space::new(DIM, metric, Element::F32).expect("a space");
                let mut rows = Vec::new();
                for n in 0..1_000u32 {
                    let point: Vec<f32> = (1..=DIM as u32).map(|d| (n * d * 7_919 % 97) as f32 + 1.0).collect();
                    space.encode(&point, &mut rows).expect("a row");
                }
                let params = Params { m: 3, ef_construction: 8, quantization, ..Params::default() };
                let sections = build(&space, &rows, &params, 1, &|| true).expect("an index");
                let (head, rest) = sections.graph.split_at(HEADER);
                let coder = u32::from_le_bytes([head[CODER], head[CODER + 1], head[CODER + 2], head[CODER + 3]]);
                let (head, links) = (head.to_vec(), rest[coder as usize..].to_vec());
                all.push(Good { space, vectors: sections.vectors, codes: sections.codes, head, links });
            }
        }
        all
    })
}

fuzz_target!(|data: &[u8]| {
    let Some((which, coder)) = data.split_first() else { return };
    let Good { space, vectors, codes, head, links } = &good()[usize::from(*which) % good().len()];
    let mut graph = head.clone();
    graph[CODER..CODER + 4].copy_from_slice(&(coder.len() as u32).to_le_bytes());
    graph.extend_from_slice(coder);
    graph.extend_from_slice(links);
    let opened = Sealed::open(*space, region_from(vectors.clone()), region_from(codes.clone()), region_from(graph));
    let Ok(index) = opened else { return };
    let (mut scratch, mut out) = (Scratch::default(), Vec::new());
    let request = Request { effort: Effort::Ef(32), ..Request::nearest(5) };
    for query in [[1.0, 2.0, 3.0], [-3e18, 1e-30, 0.0]] {
        index.search(&query, &request, &mut scratch, &mut out).expect("nothing limits it");
        assert_eq!(out.len(), 5);
    }
});
