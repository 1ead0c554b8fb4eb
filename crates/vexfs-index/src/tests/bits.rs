//! Bits against a naive model: a loop over numbers 0 and 1.

use super::*;

fn bits(random: &mut Random, dim: usize) -> Vec<f32> {
    (0..dim).map(|_| (random.next() >> 40 & 1) as f32).collect()
}

/// Points that differ from some centre in one bit of eight.
fn near_centres(random: &mut Random, dim: usize, n: usize) -> Vec<Vec<f32>> {
    let centres: Vec<Vec<f32>> = (0..8).map(|_| bits(random, dim)).collect();
    (0..n)
        .map(|_| {
            let centre = &centres[random.next() as usize % centres.len()];
            let flip = |random: &mut Random| f32::from((random.next() >> 20).is_multiple_of(8));
            centre.iter().map(|bit| (bit - flip(random)).abs()).collect()
        })
        .collect()
}

fn naive(one: &[f32], other: &[f32]) -> f32 {
    one.iter().zip(other).filter(|(a, b)| a != b).count() as f32
}

fn space(dim: usize) -> Space {
    Space::new(dim, Metric::Hamming, Element::Bits).unwrap()
}

#[test]
fn rows_of_bits_are_packed_lowest_first_and_compared_exactly() {
    let mut row = Vec::new();
    space(10).encode(&[1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0], &mut row).unwrap();
    assert_eq!(row, [0b1000_0001, 0b10]);
    let mut random = Random(3);
    for dim in (1..=200).chain([255, 256, 257, 511, 513, 1_000, 1_023, 1_024, 1_025, 2_047, 4_095, 4_096, 65_536]) {
        let space = space(dim);
        let (one, other) = (bits(&mut random, dim), bits(&mut random, dim));
        let (mut row, mut back) = (Vec::new(), Vec::new());
        space.encode(&other, &mut row).unwrap();
        assert_eq!(row.len(), dim.div_ceil(8));
        space.decode(&row, &mut back);
        assert_eq!(back, other);
        assert_eq!(space.distance(&one, &row), naive(&one, &other), "{dim}");
    }
}

#[test]
fn bits_go_with_hamming_and_nothing_else_does() {
    for element in [Element::F32, Element::F16, Element::I8, Element::U8] {
        let error = SpaceError::Mismatch { metric: Metric::Hamming, element };
        assert_eq!(Space::new(8, Metric::Hamming, element), Err(error));
    }
    for metric in [Metric::L2, Metric::InnerProduct, Metric::Cosine] {
        let error = Space::new(8, metric, Element::Bits).unwrap_err();
        assert!(error.to_string().contains("hamming goes with bits"), "{error}");
    }
    let mut out = Vec::new();
    let error = VectorError::NotRepresentable { at: 1, value: 0.5, element: Element::Bits };
    assert_eq!(space(2).encode(&[1.0, 0.5], &mut out), Err(error));
    assert!(out.is_empty());
}

#[test]
fn bits_are_searched_in_every_form_with_exact_distances() {
    for dim in [13, 100, 128, 517] {
        let space = space(dim);
        let mut random = Random(dim as u64);
        let points = near_centres(&mut random, dim, 6_000);
        let mut rows = Vec::new();
        points.iter().for_each(|point| space.encode(point, &mut rows).unwrap());
        let sections = build(&space, &rows, &Params::default(), 2, &|| true).unwrap();
        assert!(sections.codes.is_empty(), "rows are their own codes");
        let head = Mutable::new(space, Params::default());
        let mut scratch = Scratch::default();
        for row in rows.chunks_exact(space.row_bytes()) {
            head.link(head.push(row), &mut scratch);
        }
        let queries: Vec<Vec<f32>> = points.iter().step_by(150).cloned().collect();
        for quantization in [Quantization::Sq8, Quantization::None, Quantization::Sq4, Quantization::Rabitq] {
            let sealed = seal(space, &rows, &Params { quantization, ..Params::default() });
            sealed.warm();
            let got = recall(&sealed, &rows, &queries, &Request::nearest(10));
            assert!(got >= 0.95, "sealed {dim} {quantization}: {got}");
        }
        let got = recall(&head, &rows, &queries, &Request::nearest(10));
        assert!(got >= 0.95, "head {dim}: {got}");
        let mut out = Vec::new();
        for index in [&head as &dyn Index, &seal(space, &rows, &Params::default()), &Flat::new(space, region(&rows))] {
            index.search(&queries[3], &Request::nearest(10), &mut scratch, &mut out).unwrap();
            for hit in &out {
                let (mut row, mut held) = (Vec::new(), Vec::new());
                assert!(index.read(hit.slot, &mut row));
                space.decode(&row, &mut held);
                assert_eq!(hit.distance, naive(&queries[3], &held));
            }
        }
    }
}

proptest! {
    #[test]
    fn hamming_is_what_a_loop_counts(dim in 1usize..4_097, seed in any::<u64>()) {
        let mut random = Random(seed | 1);
        let (one, other) = (bits(&mut random, dim), bits(&mut random, dim));
        let mut row = Vec::new();
        space(dim).encode(&other, &mut row).unwrap();
        prop_assert_eq!(space(dim).distance(&one, &row), naive(&one, &other));
    }
}
