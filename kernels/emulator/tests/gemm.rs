//! The quantized GEMM against the CPU's: bit for bit where the numbers are exact, within rounding where they are not.

mod arrays;
mod layers;

use half::f16;
use kernels::cuda::gemm::GemmKernel;
use kernels::cuda::matrix::pack;
use kernels::quantized::BlockFormat;
use kernels::{Cpu, Isa};
use proptest::prelude::*;

use arrays::{Numbers, device, same_bits};
use layers::{FORMATS, Weights, exact_rows, exact_weights, random_weights, width_of};

const KERNELS: [GemmKernel; 5] =
    [GemmKernel::Decode1, GemmKernel::Decode2, GemmKernel::Decode4, GemmKernel::Decode8, GemmKernel::Prefill];

proptest! {
    #![proptest_config(ProptestConfig { cases: 10, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn exact_numbers_give_the_cpus_bits(out in 1usize..150, width in 1usize..29, num_rows in 1usize..131, has_bias: bool, seed: u64) {
        for format in FORMATS {
            let (device, width, mut numbers) = (device(), width_of(format, width), Numbers::new(seed));
            let weights = Weights::new(&device, format, (out, width), &exact_weights(&mut numbers, format, out, width));
            let (x, bias) = (exact_rows(&mut numbers, num_rows, width), numbers.eighths(out));
            let bias = has_bias.then_some(bias.as_slice());
            let got = weights.on_device(&device, GemmKernel::for_rows(num_rows), bias, num_rows, &x);
            prop_assert!(same_bits(&got, &weights.on_cpu(bias, num_rows, &x)), "{format:?}");
        }
    }

    #[test]
    fn any_numbers_give_the_cpus_within_rounding(out in 1usize..80, width in 1usize..29, num_rows in 1usize..131, seed: u64) {
        for format in FORMATS {
            let (device, width, mut numbers) = (device(), width_of(format, width), Numbers::new(seed));
            let weights = Weights::new(&device, format, (out, width), &random_weights(&mut numbers, format, out, width));
            let x = numbers.any(num_rows * width);
            let got = weights.on_device(&device, GemmKernel::for_rows(num_rows), None, num_rows, &x);
            let expected = weights.on_cpu(None, num_rows, &x);
            let size = expected.iter().fold(1.0f32, |size, y| size.max(y.abs()));
            for (got, expected) in got.iter().zip(&expected) {
                prop_assert!((got - expected).abs() <= size * 1e-5, "{format:?}: {got}, expected {expected}");
            }
        }
    }

    #[test]
    fn a_row_has_the_same_bits_alone_and_in_any_batch_of_any_kernel(out in 1usize..150, width in 1usize..29, num_rows in 2usize..131, seed: u64) {
        for format in FORMATS {
            let (device, width, mut numbers) = (device(), width_of(format, width), Numbers::new(seed));
            let weights = Weights::new(&device, format, (out, width), &random_weights(&mut numbers, format, out, width));
            let x = numbers.any(num_rows * width);
            let together = weights.on_device(&device, GemmKernel::for_rows(num_rows), None, num_rows, &x);
            for kernel in KERNELS {
                // Some consecutive rows, as many as the kernel takes.
                let most = num_rows.min(match kernel {
                    GemmKernel::Decode1 => 8,
                    GemmKernel::Decode2 => 16,
                    GemmKernel::Decode4 => 32,
                    _ => 64,
                });
                let count = numbers.below(most) + 1;
                let first = numbers.below(num_rows - count + 1);
                let part = weights.on_device(&device, kernel, None, count, &x[first * width..][..count * width]);
                prop_assert!(same_bits(&part, &together[first * out..][..count * out]), "{format:?} {kernel:?}");
            }
        }
    }

    #[test]
    fn rows_may_be_taken_in_another_order(out in 1usize..40, width in 1usize..9, seed: u64) {
        let (cpu, mut numbers) = (Cpu::new(Isa::Portable, 2), Numbers::new(seed));
        for format in FORMATS {
            let width = width_of(format, width);
            let bytes = random_weights(&mut numbers, format, out, width);
            let order: Vec<usize> = (0..out).map(|_| numbers.below(out)).collect();
            let ordered: Vec<u8> = order.iter().flat_map(|row| bytes.chunks_exact(bytes.len() / out).nth(*row).unwrap()).copied().collect();
            let packed = pack(&cpu, format, (out, width), &bytes, Some(&order)).unwrap();
            prop_assert_eq!(packed, pack(&cpu, format, (out, width), &ordered, None).unwrap());
        }
    }
}

/// The product of a row of Q8_0 or Q4_1 in the order that `gemm.cuh` gives.
fn in_order(format: BlockFormat, weights: &[u8], x: &[f32]) -> f32 {
    let half = |bytes: &[u8], at: usize| f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32();
    let num_super = x.len().div_ceil(128);
    let blocks: Vec<_> = weights.chunks_exact(format.block_bytes()).zip(x.chunks_exact(32)).collect();
    let mut total = 0.0;
    for range in 0..8 {
        let superblocks = range * num_super / 8..(range + 1) * num_super / 8;
        let mut acc = 0.0f32;
        for (w, x) in &blocks[(superblocks.start * 4).min(blocks.len())..(superblocks.end * 4).min(blocks.len())] {
            let largest = x.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
            let (scale_x, inverse) = (largest / 127.0, 127.0 / largest);
            let q = |i: usize| (x[i] * inverse).round_ties_even() as i32;
            let weight = |i: usize| match format {
                BlockFormat::Q8_0 => i32::from(w[2 + i].cast_signed()),
                _ => i32::from(w[4 + i % 16] >> (i / 16 * 4) & 15),
            };
            let dot: i32 = (0..32).map(|i| weight(i) * q(i)).sum();
            acc = (dot as f32).mul_add(half(w, 0) * scale_x, acc);
            if format == BlockFormat::Q4_1 {
                let sum: i32 = (0..32).map(q).sum();
                acc = half(w, 2).mul_add(sum as f32 * scale_x, acc);
            }
        }
        total += acc;
    }
    total
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn sums_are_in_the_order_that_is_promised(out in 1usize..40, blocks in 1usize..100, num_rows in 1usize..70, seed: u64) {
        for format in [BlockFormat::Q8_0, BlockFormat::Q4_1] {
            let (device, width, mut numbers) = (device(), blocks * 32, Numbers::new(seed));
            let bytes = random_weights(&mut numbers, format, out, width);
            let x = numbers.any(num_rows * width);
            let rows = x.chunks_exact(width);
            let expected: Vec<f32> =
                rows.flat_map(|x| bytes.chunks_exact(bytes.len() / out).map(move |w| in_order(format, w, x))).collect();
            let weights = Weights::new(&device, format, (out, width), &bytes);
            let got = weights.on_device(&device, GemmKernel::for_rows(num_rows), None, num_rows, &x);
            prop_assert!(same_bits(&got, &expected), "{format:?}");
        }
    }
}

/// The largest integer sums, of both signs: they are exact however they begin.
#[test]
fn the_largest_sums_are_exact() {
    let (device, width) = (device(), 256);
    for format in FORMATS {
        let mut bytes = exact_weights(&mut Numbers::new(1), format, 16, width);
        for (sign, filling) in [1.0, -1.0].into_iter().flat_map(|sign| [0xff, 0, 0x80, 0x7f].map(|byte| (sign, byte))) {
            layers::fill_weights(format, &mut bytes, filling);
            let weights = Weights::new(&device, format, (16, width), &bytes);
            let x = vec![sign * 127.0 / 128.0; width * 65];
            for num_rows in [1, 65] {
                let x = &x[..num_rows * width];
                let got = weights.on_device(&device, GemmKernel::for_rows(num_rows), None, num_rows, x);
                assert!(same_bits(&got, &weights.on_cpu(None, num_rows, x)), "{format:?} {sign} {filling}");
            }
        }
    }
}

#[test]
fn what_is_not_a_number_stays_in_its_row() {
    let (device, width, mut numbers) = (device(), 320, Numbers::new(3));
    let format = BlockFormat::Q8_0;
    let weights = Weights::new(&device, format, (40, width), &random_weights(&mut numbers, format, 40, width));
    for num_rows in [3, 70] {
        let mut x = numbers.any(num_rows * width);
        let kernel = GemmKernel::for_rows(num_rows);
        let whole = weights.on_device(&device, kernel, None, num_rows, &x);
        x[width + 7] = f32::NAN;
        let spoilt = weights.on_device(&device, kernel, None, num_rows, &x);
        assert!(spoilt[40..80].iter().all(|y| y.is_nan()));
        assert!(same_bits(&spoilt[..40], &whole[..40]) && same_bits(&spoilt[80..], &whole[80..]));
    }
}
