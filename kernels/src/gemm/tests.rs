use proptest::prelude::*;

use super::*;
use crate::quantized::BlockFormat;

const FORMATS: [BlockFormat; 13] = [
    BlockFormat::Q4_0,
    BlockFormat::Q4_1,
    BlockFormat::Q5_0,
    BlockFormat::Q5_1,
    BlockFormat::Q8_0,
    BlockFormat::Q2_K,
    BlockFormat::Q3_K,
    BlockFormat::Q4_K,
    BlockFormat::Q5_K,
    BlockFormat::Q6_K,
    BlockFormat::IQ4_NL,
    BlockFormat::IQ4_XS,
    BlockFormat::MXFP4,
];

/// Random bytes of a format's rows, with scales of a size weights have.
fn random_weights(format: BlockFormat, out: usize, width: usize, mut seed: u64) -> Vec<u8> {
    let mut next = move || {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (seed >> 33) as u32
    };
    let mut bytes: Vec<u8> = (0..format.row_bytes(width).unwrap() * out).map(|_| next() as u8).collect();
    let half_at: &[usize] = match format {
        BlockFormat::Q4_0 | BlockFormat::Q5_0 | BlockFormat::Q8_0 | BlockFormat::IQ4_NL | BlockFormat::IQ4_XS => &[0],
        BlockFormat::Q4_1 | BlockFormat::Q5_1 | BlockFormat::Q4_K | BlockFormat::Q5_K => &[0, 2],
        BlockFormat::Q2_K => &[80, 82],
        BlockFormat::Q3_K => &[108],
        BlockFormat::Q6_K => &[208],
        BlockFormat::MXFP4 => &[],
    };
    for block in bytes.chunks_exact_mut(format.block_bytes()) {
        for &at in half_at {
            let scale = half::f16::from_f32((next() % 1000) as f32 * 1e-5 + 1e-3);
            block[at..at + 2].copy_from_slice(&scale.to_le_bytes());
        }
        if format == BlockFormat::MXFP4 {
            block[0] = 120 + block[0] % 4;
        }
    }
    bytes
}

fn random_rows(rows: usize, width: usize, mut seed: u64) -> Vec<f32> {
    (0..rows * width)
        .map(|_| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1);
            ((seed >> 40) as f32 / (1 << 24) as f32 - 0.5) * 4.0
        })
        .collect()
}

fn multiply(cpu: &Cpu, weights: &PackedMatrix, bias: Option<&[f32]>, rows: usize, x: &[f32]) -> Vec<f32> {
    let mut x = x.to_vec();
    let mut activations = QuantizedRows::default();
    activations.quantize(cpu, rows, weights.in_features(), &mut x);
    let mut out = vec![f32::NAN; rows * weights.out_features()];
    run(cpu, &activations, &mut [Product { weights: Some(weights.into()), bias, out: &mut out }], 0, &|_| {});
    out
}

#[derive(Debug)]
struct Groups(Vec<(Range<usize>, PackedMatrix)>);

impl RowGroups for Groups {
    fn count(&self) -> usize {
        self.0.len()
    }

    fn get(&self, group: usize) -> (Range<usize>, &PackedMatrix) {
        (self.0[group].0.clone(), &self.0[group].1)
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Every path against the plain sum over dequantized weights, for all formats, with row tails and column tails.
    #[test]
    fn every_path_agrees_with_dequantized_weights(out in 1usize..70, blocks in 1usize..4, rows in 1usize..80, seed: u64) {
        for format in FORMATS {
            let width = blocks * format.block_len().max(64);
            let bytes = random_weights(format, out, width, seed);
            let x = random_rows(rows, width, seed ^ 7);
            let mut exact = vec![0.0f64; rows * out];
            let mut norm = vec![0.0f64; rows * out];
            for n in 0..out {
                let mut w = vec![0.0; width];
                format.dequantize_row(&bytes[n * format.row_bytes(width).unwrap()..][..format.row_bytes(width).unwrap()], &mut w);
                for m in 0..rows {
                    for k in 0..width {
                        exact[m * out + n] += f64::from(w[k]) * f64::from(x[m * width + k]);
                        norm[m * out + n] += (f64::from(w[k]) * f64::from(x[m * width + k])).abs();
                    }
                }
            }
            for isa in Isa::available() {
                let cpu = Cpu::new(isa, 2);
                let weights = PackedMatrix::pack(&cpu, format, (out, width), &bytes, None).unwrap();
                let got = multiply(&cpu, &weights, None, rows, &x);
                for i in 0..got.len() {
                    // int8 activations: at most half a step of 2/127 each, on average far less.
                    let bound = norm[i] * 0.012 + 0.05;
                    prop_assert!((f64::from(got[i]) - exact[i]).abs() <= bound, "{isa} {format:?} {i}: {} {}", got[i], exact[i]);
                }
            }
        }
    }

    /// A vector path differs from the portable one by rounding only: their integer sums are the same.
    #[test]
    fn vector_paths_agree_with_the_portable_one(out in 1usize..40, rows in 1usize..20, seed: u64) {
        for format in FORMATS {
            let bytes = random_weights(format, out, 256, seed);
            let x = random_rows(rows, 256, seed ^ 3);
            let portable = Cpu::new(Isa::Portable, 1);
            let weights = PackedMatrix::pack(&portable, format, (out, 256), &bytes, None).unwrap();
            let expected = multiply(&portable, &weights, None, rows, &x);
            let size = expected.iter().fold(1.0f32, |a, v| a.max(v.abs()));
            for isa in Isa::available() {
                let got = multiply(&Cpu::new(isa, 2), &weights, None, rows, &x);
                for (a, b) in got.iter().zip(&expected) {
                    prop_assert!((a - b).abs() <= size * 1e-4, "{isa} {format:?}: {a} {b}");
                }
            }
        }
    }

    /// And neither do rows that go to other matrices.
    #[test]
    fn a_row_in_a_group_has_the_bits_it_has_alone_with_its_matrix(
        out in 1usize..100, sizes in prop::collection::vec(0usize..20, 1..6), seed: u64,
    ) {
        let rows = sizes.iter().sum::<usize>();
        let x = random_rows(rows, 256, seed);
        for (isa, format) in Isa::available().flat_map(|isa| FORMATS.map(|format| (isa, format))) {
            let cpu = Cpu::new(isa, 3);
            let mut groups = Groups(Vec::new());
            for (&size, seed) in sizes.iter().zip(seed..=u64::MAX) {
                let bytes = random_weights(format, out, 256, seed);
                let start = groups.0.last().map_or(0, |(rows, _)| rows.end);
                let matrix = PackedMatrix::pack(&cpu, format, (out, 256), &bytes, None).unwrap();
                groups.0.push((start..start + size, matrix));
            }
            let mut activations = QuantizedRows::default();
            activations.quantize(&cpu, rows, 256, &mut x.clone());
            let mut together = vec![f32::NAN; rows * out];
            let weights = Some(Weights::ByGroup(&groups));
            run(&cpu, &activations, &mut [Product { weights, bias: None, out: &mut together }], 0, &|_| {});
            for (of_group, matrix) in &groups.0 {
                for row in of_group.clone() {
                    let alone = multiply(&cpu, matrix, None, 1, &x[row * 256..][..256]);
                    let same = alone.iter().zip(&together[row * out..]).all(|(a, b)| a.to_bits() == b.to_bits());
                    prop_assert!(same, "{isa} {format:?} row {row}");
                }
            }
        }
    }

    /// Promise 1 of the design: neither neighbours nor threads change a row's bits.
    #[test]
    fn a_row_alone_has_the_bits_it_has_in_a_batch(out in 1usize..100, rows in 2usize..100, seed: u64) {
        for format in FORMATS {
            let bytes = random_weights(format, out, 256, seed);
            let x = random_rows(rows, 256, seed);
            for isa in Isa::available() {
                let cpu = Cpu::new(isa, 3);
                let weights = PackedMatrix::pack(&cpu, format, (out, 256), &bytes, None).unwrap();
                let bias: Vec<f32> = (0..out).map(|i| i as f32 * 0.1).collect();
                let together = multiply(&cpu, &weights, Some(&bias), rows, &x);
                let alone_cpu = Cpu::new(isa, 1);
                for m in [0, rows / 2, rows - 1] {
                    let alone = multiply(&alone_cpu, &weights, Some(&bias), 1, &x[m * 256..][..256]);
                    let same = alone.iter().zip(&together[m * out..]).all(|(a, b)| a.to_bits() == b.to_bits());
                    prop_assert!(same, "{isa} {format:?} row {m}");
                }
            }
        }
    }
}

#[test]
fn largest_values_do_not_overflow_the_short_sums() {
    for format in FORMATS {
        let mut bytes = vec![0xff; format.row_bytes(256).unwrap() * 16];
        for (i, block) in bytes.chunks_exact_mut(format.block_bytes()).enumerate() {
            // -128 and +127 in turn for Q8_0, all-ones elsewhere; finite scales.
            let one = half::f16::from_f32(1.0).to_le_bytes();
            let at: &[usize] = match format {
                BlockFormat::Q2_K => &[80, 82],
                BlockFormat::Q3_K => &[108],
                BlockFormat::Q6_K => &[208],
                BlockFormat::Q4_1 | BlockFormat::Q5_1 | BlockFormat::Q4_K | BlockFormat::Q5_K => &[0, 2],
                BlockFormat::MXFP4 => &[],
                _ => &[0],
            };
            if format == BlockFormat::MXFP4 {
                block[0] = 128;
            }
            if format == BlockFormat::Q8_0 {
                block[2..].fill(if i % 2 == 0 { 0x80 } else { 0x7f });
            }
            for &at in at {
                block[at..at + 2].copy_from_slice(&one);
            }
        }
        for sign in [1.0, -1.0] {
            let x = vec![sign; 256 * 9];
            let portable = Cpu::new(Isa::Portable, 1);
            let weights = PackedMatrix::pack(&portable, format, (16, 256), &bytes, None).unwrap();
            let expected = multiply(&portable, &weights, None, 9, &x);
            for isa in Isa::available() {
                let got = multiply(&Cpu::new(isa, 1), &weights, None, 9, &x);
                for (a, b) in got.iter().zip(&expected) {
                    assert!((a - b).abs() <= b.abs() * 1e-5, "{isa} {format:?}: {a} {b}");
                }
            }
        }
    }
}
