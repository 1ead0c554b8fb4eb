//! A fixed random rotation: afterwards no dimension matters more than another, so one scale, or none, serves all.
//!
//! Rounds of random signs and a fast Walsh–Hadamard transform, by turns over the first and the last 2ⁿ numbers, which
//! together cover all. It keeps lengths and products. The signs come from a constant seed: nothing is stored.

/// Rounds over each end.
const ROUNDS: u64 = 3;

/// Rotates in place; the length is any but 0.
pub fn rotate(values: &mut [f32]) {
    let part = 1 << values.len().ilog2();
    let mut state = 0x7665_7866_7300_0001u64;
    for round in 0..2 * ROUNDS {
        for some in values.chunks_mut(64) {
            // SplitMix64: 64 signs at a time.
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^= z >> 31;
            for (at, value) in some.iter_mut().enumerate() {
                *value = f32::from_bits(value.to_bits() ^ ((z >> at) as u32 & 1) << 31);
            }
        }
        let start = if round % 2 == 0 { 0 } else { values.len() - part };
        transform(&mut values[start..start + part]);
    }
}

/// The Walsh–Hadamard transform of 2ⁿ numbers, scaled to keep lengths.
fn transform(values: &mut [f32]) {
    let mut half = 1;
    while half < values.len() {
        for pair in values.chunks_exact_mut(2 * half) {
            let (low, high) = pair.split_at_mut(half);
            for (a, b) in low.iter_mut().zip(high) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        half *= 2;
    }
    let scale = 1.0 / (values.len() as f32).sqrt();
    values.iter_mut().for_each(|value| *value *= scale);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_and_products_stay_and_no_number_keeps_it_all() {
        for len in [1usize, 2, 3, 64, 100, 128, 192, 384, 1000, 4096] {
            let one: Vec<f32> = (0..len).map(|n| ((n * 37 % 19) as f32) - 9.0).collect();
            let mut axis = vec![0.0; len];
            axis[len / 2] = 5.0;
            let product = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
            let (mut r_one, mut r_axis) = (one.clone(), axis.clone());
            rotate(&mut r_one);
            rotate(&mut r_axis);
            for (a, b, ra, rb) in [(&one, &one, &r_one, &r_one), (&one, &axis, &r_one, &r_axis)] {
                let (before, after) = (product(a, b), product(ra, rb));
                assert!((before - after).abs() <= 1e-4 * product(&one, &one).max(25.0), "{len}: {before} {after}");
            }
            if len >= 64 {
                let most = r_axis.iter().fold(0f32, |most, v| most.max(v.abs()));
                assert!(most < 5.0 * 6.0 / (len as f32).sqrt(), "{len}: {most}");
            }
        }
    }
}
