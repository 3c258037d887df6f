//! What adapters do to the outputs of the quantized GEMM, against the CPU's `linear::run`.

mod arrays;
mod layers;

use emulator::{Emulator, Memory};
use half::f16;
use kernels::activations::QuantizedRows;
use kernels::cuda::args::{AdapterTable, Site};
use kernels::cuda::driver::DeviceMemory;
use kernels::cuda::gemm::{GemmArgs, GemmKernel, Product, multiply};
use kernels::gemm;
use kernels::linear::{self, Deltas, RowDelta, Shrunk};
use kernels::low_rank::LowRank;
use kernels::{Cpu, Isa};
use proptest::prelude::*;

use arrays::{Numbers, adapter, addresses, device, f16_bits, floats, halves, read_floats, same_bits};
use layers::{FORMATS, Rows, Weights, exact_rows, exact_weights};

/// What an adapter does to one layer: every part may be absent.
struct Delta {
    rank: usize,
    a: Vec<f32>,
    b: Vec<f32>,
    output_scale: Option<Vec<f32>>,
    bias: Option<Vec<f32>>,
}

impl Delta {
    fn random(numbers: &mut Numbers, (out, width): (usize, usize)) -> Self {
        let rank = [0, 1, 7, 8, 12][numbers.below(5)];
        let (a, b) = (numbers.eighths(rank * width), numbers.eighths(out * rank));
        let mut some = || (numbers.below(2) == 0).then(|| numbers.eighths(out));
        Self { rank, a, b, output_scale: some(), bias: some() }
    }

    fn low_rank(&self, (out, width): (usize, usize)) -> Option<LowRank> {
        let half = |values: &[f32]| values.iter().map(|v| f16::from_f32(*v)).collect::<Vec<_>>();
        (self.rank > 0).then(|| LowRank::pack(self.rank, width, out, 0.5, &half(&self.a), &half(&self.b)))
    }

    /// `0.5 · A x`
    fn shrink(&self, x: &[f32]) -> Vec<f32> {
        let dot = |a: &[f32]| a.iter().zip(x).map(|(a, x)| f64::from(*a) * f64::from(*x)).sum::<f64>();
        self.a.chunks_exact(x.len()).map(|a| (dot(a) * 0.5) as f32).collect()
    }

    /// As kernels read it, with the memory it lies in.
    fn site(&self, device: &Emulator, out: usize) -> (Site, Vec<Memory>) {
        let b_stride = self.rank.next_multiple_of(8);
        let mut b = vec![0.0; out * b_stride];
        if self.rank > 0 {
            let rows = b.chunks_exact_mut(b_stride).zip(self.b.chunks_exact(self.rank));
            rows.for_each(|(to, from)| to[..self.rank].copy_from_slice(from));
        }
        let b = halves(device, &f16_bits(&b));
        let floats_of = |values: &Option<Vec<f32>>| values.as_ref().map(|values| floats(device, values));
        let (scale, bias) = (floats_of(&self.output_scale), floats_of(&self.bias));
        let address = |memory: &Option<Memory>| memory.as_ref().map_or(0, DeviceMemory::address);
        let site = Site {
            b: if self.rank > 0 { b.address() } else { 0 },
            output_scale: address(&scale),
            bias: address(&bias),
            rank: self.rank as i32,
            b_stride: b_stride as i32,
            ..Site::default()
        };
        (site, [Some(b), scale, bias].into_iter().flatten().collect())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    /// Three products of one step, of other formats and sizes; the second has activations of its own, and the third was
    /// multiplied before.
    #[test]
    fn adapters_change_their_rows_as_on_the_cpu(
        outs in prop::array::uniform3(1usize..100), num_rows in 1usize..90, formats in prop::array::uniform3(0usize..10), seed: u64,
    ) {
        let (device, cpu, width, mut numbers) = (device(), Cpu::new(Isa::Portable, 1), 256, Numbers::new(seed));
        let x = [exact_rows(&mut numbers, num_rows, width), exact_rows(&mut numbers, num_rows, width)].concat();
        let rows = Rows::new(&device, 2 * num_rows, width, &x);
        let weights: Vec<Weights> = outs
            .iter()
            .zip(formats)
            .map(|(out, format)| Weights::new(&device, FORMATS[format], (*out, width), &exact_weights(&mut numbers, FORMATS[format], *out, width)))
            .collect();
        let biases: Vec<Vec<f32>> = outs.iter().map(|out| numbers.eighths(*out)).collect();
        let sites = [1, 0, 2];
        let adapters: Vec<[Delta; 3]> = (0..2).map(|_| outs.map(|out| Delta::random(&mut numbers, (out, width)))).collect();
        // Of each row; 2 is none. Neighbours differ.
        let chosen: Vec<usize> = (0..num_rows).map(|_| numbers.below(3)).collect();
        let stride = 16 + 4;
        let mut shrunk = vec![f32::NAN; 3 * num_rows * stride];
        for (row, adapter) in chosen.iter().enumerate().filter(|(_, adapter)| **adapter < 2) {
            for product in 0..3 {
                let t = adapters[*adapter][product].shrink(&x[row * width..][..width]);
                shrunk[(product * num_rows + row) * stride..][..t.len()].copy_from_slice(&t);
            }
        }

        // The CPU, row by row.
        let mut expected: Vec<Vec<f32>> = outs.iter().map(|out| vec![0.0; num_rows * out]).collect();
        for (product, out) in outs.into_iter().enumerate() {
            let low_ranks: Vec<_> = adapters.iter().map(|deltas| deltas[product].low_rank((out, width))).collect();
            for (row, adapter) in chosen.iter().enumerate() {
                let at = |i: usize| &x[i * width..][..width];
                let mut quantized = QuantizedRows::default();
                quantized.quantize(&cpu, 1, width, &mut at(row + if product == 1 { num_rows } else { 0 }).to_vec());
                let delta = adapters.get(*adapter).map(|deltas| RowDelta {
                    product: 0,
                    rows: 0..1,
                    low_rank: low_ranks[*adapter].as_ref(),
                    output_scale: deltas[product].output_scale.as_deref(),
                    bias: deltas[product].bias.as_deref(),
                });
                let target = &mut expected[product][row * out..][..out];
                let products = &mut [gemm::Product { weights: Some((&weights[product].cpu).into()), bias: Some(&biases[product]), out: target }];
                let get = |_| delta.clone();
                linear::run(&cpu, &quantized, at(row), products, &Deltas { count: 1, get: &get }, &mut Shrunk::default());
            }
        }

        let (tables, _parts): (Vec<_>, Vec<_>) = adapters
            .iter()
            .map(|deltas| {
                let (of_products, parts): (Vec<Site>, Vec<_>) = deltas.iter().zip(outs).map(|(delta, out)| delta.site(&device, out)).unzip();
                let mut by_site = [Site::default(); 3];
                sites.iter().zip(of_products).for_each(|(at, site)| by_site[*at as usize] = site);
                (adapter(&device, &AdapterTable::default(), &by_site), parts)
            })
            .unzip();
        let of_rows: Vec<u64> = chosen.iter().map(|i| tables.get(*i).map_or(0, DeviceMemory::address)).collect();
        let (of_rows, shrunk) = (addresses(&device, &of_rows), floats(&device, &shrunk));
        let third = weights[2].on_cpu(Some(&biases[2]), num_rows, &x[..num_rows * width]);
        let mut kernels = vec![None, Some(GemmKernel::Prefill)];
        kernels.extend((num_rows <= 64).then_some(Some(GemmKernel::Decode8)));
        for kernel in kernels {
            let out: Vec<_> = outs.iter().map(|out| vec![f32::NAN; num_rows * out]).collect();
            let out = [floats(&device, &out[0]), floats(&device, &out[1]), floats(&device, &third)];
            let bias: Vec<_> = biases.iter().map(|bias| floats(&device, bias)).collect();
            let mut args = GemmArgs {
                activations: rows.activations(num_rows),
                adapters: of_rows.address(),
                shrunk: shrunk.address(),
                shrunk_stride: stride as i32,
                num_products: 3,
                ..GemmArgs::default()
            };
            for (i, product) in args.products.iter_mut().enumerate() {
                *product = Product {
                    w: weights[i].cuda.matrix(),
                    bias: bias[i].address(),
                    out: out[i].address(),
                    site: sites[i],
                    activations_offset_rows: if i == 1 { num_rows as i32 } else { 0 },
                };
            }
            args.products[2].w.records = 0;
            match kernel {
                Some(kernel) => kernel.launch(&device, &args).unwrap(),
                None => multiply(&device, &args).unwrap(),
            }
            for (product, expected) in expected.iter().enumerate() {
                prop_assert!(same_bits(&read_floats(&device, &out[product]), expected), "{kernel:?} product {product}");
            }
        }
    }
}
