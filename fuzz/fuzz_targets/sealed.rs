#![no_main]
//! Damage to a good index: a few bytes here and there, or a cut. Whatever is left opens and answers, or is refused.

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use vexfs_index::{
    Effort, Element, Index, Metric, Params, Quantization, Request, Scratch, Sealed, Sections, Slot, Space, build,
    region_from,
};

const DIM: usize = 5;

/// One good index for each space and code.
fn good() -> &'static [(Space, Sections)] {
    static GOOD: OnceLock<Vec<(Space, Sections)>> = OnceLock::new();
    GOOD.get_or_init(|| {
        let mut all = Vec::new();
        for (metric, element) in [
            (Metric::L2, Element::F32),
            (Metric::InnerProduct, Element::F16),
            (Metric::Cosine, Element::F32),
            (Metric::L2, Element::U8),
            (Metric::L2, Element::I8),
            (Metric::Hamming, Element::Bits),
        ] {
            for quantization in [Quantization::None, Quantization::Sq8, Quantization::Sq4, Quantization::Rabitq] {
                let space = Space::new(DIM, metric, element).expect("a space");
                let mut rows = Vec::new();
                for n in 0..1_000u32 {
                    let point: Vec<f32> = (1..=DIM as u32).map(|d| (n * d * 7_919 % 97 + 1) as f32).collect();
                    let point: Vec<f32> = match element {
                        Element::Bits => point.iter().map(|value| value % 2.0).collect(),
                        _ => point,
                    };
                    space.encode(&point, &mut rows).expect("a row");
                }
                let params = Params { m: 3, ef_construction: 8, quantization, ..Params::default() };
                let sections = build(&space, &rows, &params, 1, &|| true).expect("an index");
                all.push((space, sections));
            }
        }
        all
    })
}

fuzz_target!(|data: &[u8]| {
    let Some(([which, cut], edits)) = data.split_at_checked(2).map(|(a, b)| ([a[0], a[1]], b)) else { return };
    let (space, sections) = &good()[usize::from(which) % good().len()];
    let mut parts = [sections.vectors.clone(), sections.codes.clone(), sections.graph.clone()];
    for edit in edits.chunks_exact(8) {
        // Part, place, four bytes; the graph's head more often than the rest.
        let part = usize::from(edit[0]);
        let bytes = &mut parts[if part < 128 { 2 } else { part % 3 }];
        let place = usize::from(edit[1]) << 16 | usize::from(edit[2]) << 8 | usize::from(edit[3]);
        let place = if part < 96 { place % 400 } else { place };
        if let Some(four) = bytes.get_mut(place..place.saturating_add(4)) {
            four.copy_from_slice(&edit[4..]);
        }
    }
    if cut < 16 {
        let bytes = &mut parts[usize::from(cut) % 3];
        bytes.truncate(bytes.len().saturating_sub(usize::from(cut) + 1));
    }
    let [vectors, codes, graph] = parts;
    let opened = Sealed::open(*space, region_from(vectors), region_from(codes), region_from(graph));
    let Ok(index) = opened else { return };
    let (mut scratch, mut out) = (Scratch::default(), Vec::new());
    for request in [
        Request { effort: Effort::Ef(32), ..Request::nearest(5) },
        Request { exact: true, ..Request::nearest(3) },
        Request::within(50.0, 20),
    ] {
        // Damaged rows may be anything, NaN too; k are found whatever they are.
        let query = if index.space().element() == Element::Bits { [1.0, 0.0, 1.0, 1.0, 0.0] } else { [1.0, 2.0, 3.0, 4.0, 5.0] };
        let _ = index.search(&query, &request, &mut scratch, &mut out);
    }
    let graph = index.explore();
    let _ = graph.around(Slot(0), 0, 64);
    let _ = graph.neighbours(Slot(999), 0);
    if which < 8 {
        let _ = graph.connectivity();
    }
});
