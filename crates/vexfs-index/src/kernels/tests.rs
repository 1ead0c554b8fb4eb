use super::*;

/// In f64, from the rows' own bytes: what every kernel must come to.
fn reference(space: &Space, query: &[f32], row: &[u8]) -> f64 {
    let mut numbers = Vec::new();
    space.decode(row, &mut numbers);
    let pairs = || query.iter().zip(&numbers).map(|(x, y)| (f64::from(*x), f64::from(*y)));
    let dot: f64 = pairs().map(|(x, y)| x * y).sum();
    match space.metric() {
        Metric::L2 | Metric::Hamming => pairs().map(|(x, y)| (x - y) * (x - y)).sum(),
        Metric::InnerProduct => -dot,
        Metric::Cosine => {
            let length = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
            let stored = match space.element() {
                // Rows are normalised when they are stored; the stored numbers are what is compared.
                Element::F32 | Element::F16 => 1.0,
                _ => length(&mut pairs().map(|p| p.1)),
            };
            1.0 - dot / length(&mut pairs().map(|p| p.0)) / stored
        }
    }
}

fn numbers(seed: u64, n: usize, integers: bool) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..n)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let byte = (state >> 33) as u8 as f32;
            if integers { (byte / 2.0).floor() } else { byte / 128.0 - 1.0 }
        })
        .collect()
}

#[test]
fn every_kernel_of_this_machine_agrees_with_f64() {
    let dims = (1..=70).chain([96, 100, 127, 128, 129, 255, 256, 384, 768, 1000, 1536, 4095, 4096]);
    for dim in dims {
        for element in [Element::F32, Element::F16, Element::I8, Element::U8] {
            for metric in [Metric::L2, Metric::InnerProduct, Metric::Cosine] {
                let space = Space::new(dim, metric, element).unwrap();
                let integers = matches!(element, Element::I8 | Element::U8);
                let mut base = numbers(dim as u64, dim, integers);
                base[0] = 1.0;
                let mut query = numbers(dim as u64 + 7, dim, integers);
                query[dim - 1] = 1.0;
                let mut row = Vec::new();
                space.encode(&base, &mut row).unwrap();
                let wanted = reference(&space, &query, &row);
                for kernels in available() {
                    let got = f64::from(Prepared::with(kernels, None, &space, &query).distance(&row));
                    let size = wanted.abs() + query.iter().map(|x| f64::from(x * x)).sum::<f64>() * 0.1;
                    assert!(
                        (got - wanted).abs() <= 1e-5 * size.max(1.0),
                        "{} {metric} {element} {dim}: {got} for {wanted}",
                        kernels.name
                    );
                }
            }
        }
    }
}

#[test]
fn a_fractional_query_meets_integer_rows() {
    for metric in [Metric::L2, Metric::InnerProduct, Metric::Cosine] {
        let space = Space::new(3, metric, Element::U8).unwrap();
        let query = [0.5, 200.25, 3.0];
        let got = f64::from(space.distance(&query, &[1, 200, 255]));
        let wanted = reference(&space, &query, &[1, 200, 255]);
        assert!((got - wanted).abs() < 1e-3 * wanted.abs().max(1.0), "{metric}: {got} for {wanted}");
    }
}

#[test]
fn the_longest_rows_of_the_farthest_bytes_have_their_sums() {
    let dim = crate::MAX_DIM;
    for (element, low, high) in [(Element::U8, 0.0, 255.0), (Element::I8, -128.0, 127.0)] {
        for (query, number) in [(low, high), (high, low), (high, high), (low, low)] {
            for metric in [Metric::L2, Metric::InnerProduct] {
                let space = Space::new(dim, metric, element).unwrap();
                let (query, mut row) = (vec![query; dim], Vec::new());
                space.encode(&vec![number; dim], &mut row).unwrap();
                let wanted = reference(&space, &query, &row) as f32;
                for kernels in available() {
                    let got = Prepared::with(kernels, None, &space, &query).distance(&row);
                    assert_eq!(got, wanted, "{} {metric} {element}: {} and {number}", kernels.name, query[0]);
                }
            }
        }
    }
}
