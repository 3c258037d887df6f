//! The packed GEMM: bound by memory with one row, by the multipliers with many.

use std::cell::LazyCell;

use criterion::{BenchmarkId, Criterion};
use kernels::Cpu;
use kernels::activations::QuantizedRows;
use kernels::gemm::{self, Product};
use kernels::quantized::{BlockFormat, PackedMatrix};

use crate::{all_cores, group, num_turns, work};

const FORMATS: [BlockFormat; 7] = [
    BlockFormat::Q4_0,
    BlockFormat::Q4_1,
    BlockFormat::Q5_0,
    BlockFormat::Q8_0,
    BlockFormat::Q4_K,
    BlockFormat::Q5_K,
    BlockFormat::Q6_K,
];

/// `[out_features, in_features]` of gate and up, and of down.
const LAYERS: [(usize, usize); 2] = [(4864, 896), (896, 4864)];
const HEAD: (usize, usize) = (151_936, 896);

pub fn bench(criterion: &mut Criterion) {
    let cpu = all_cores();
    for format in FORMATS {
        for shape in LAYERS {
            if format.row_bytes(shape.1).is_some() {
                bench_shape(criterion, &cpu, format, shape, &[1, 4, 16, 64, 128]);
            }
        }
    }
    bench_shape(criterion, &cpu, BlockFormat::Q8_0, HEAD, &[1, 4, 16]);
}

fn bench_shape(criterion: &mut Criterion, cpu: &Cpu, format: BlockFormat, shape: (usize, usize), rows: &[usize]) {
    let (out_features, in_features) = shape;
    let mut group = group(criterion, cpu, "gemm");
    let first = matrix(cpu, format, shape);
    let weights = LazyCell::new(|| matrices(cpu, format, shape));
    for &rows in rows {
        group.throughput(work(2 * rows * out_features * in_features, first.bytes()));
        let name = format!("{format:?} {out_features}x{in_features}");
        group.bench_function(BenchmarkId::new(name, format!("{rows} rows")), |bencher| {
            let (activations, mut out) = (activations(cpu, rows, in_features), vec![0.0; rows * out_features]);
            let mut turns = weights.iter().cycle();
            bencher.iter(|| {
                let product = Product { weights: turns.next().map(Into::into), bias: None, out: &mut out };
                gemm::run(cpu, &activations, &mut [product], 0, &|_| {});
            });
        });
    }
    group.finish();
}

pub fn matrix(cpu: &Cpu, format: BlockFormat, (out_features, in_features): (usize, usize)) -> PackedMatrix {
    let row_bytes = format.row_bytes(in_features).expect("a width that divides into blocks");
    // As scales these bytes are small normal numbers.
    let bytes = vec![0x11; row_bytes * out_features];
    PackedMatrix::pack(cpu, format, (out_features, in_features), &bytes, None).expect("whole blocks")
}

/// As many equal matrices as have to take turns.
pub fn matrices(cpu: &Cpu, format: BlockFormat, shape: (usize, usize)) -> Vec<PackedMatrix> {
    let first = matrix(cpu, format, shape);
    let num_more = num_turns(first.bytes()) - 1;
    std::iter::once(first).chain((0..num_more).map(|_| matrix(cpu, format, shape))).collect()
}

pub fn activations(cpu: &Cpu, rows: usize, width: usize) -> QuantizedRows {
    let mut quantized = QuantizedRows::default();
    quantized.quantize(cpu, rows, width, &mut values(rows * width));
    quantized
}

/// Values in -1..1.
pub fn values(len: usize) -> Vec<f32> {
    (0..len).map(|i| (i * 37 % 101) as f32 / 50.5 - 1.0).collect()
}
