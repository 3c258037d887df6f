//! What stands between the matrix products. Rates are bytes of f32 read and written; operations are not counted.

use criterion::{BenchmarkId, Criterion, Throughput};
use kernels::activations::QuantizedRows;
use kernels::elementwise::{RmsNorm, add_norm_quantize, swiglu_quantize};

use crate::gemm::values;
use crate::{all_cores, group};

const HIDDEN_SIZE: usize = 896;
const INTERMEDIATE_SIZE: usize = 4864;

pub fn bench(criterion: &mut Criterion) {
    let cpu = all_cores();
    let mut group = group(criterion, &cpu, "elementwise");
    for rows in [1, 16, 128] {
        let len = rows * HIDDEN_SIZE;
        // Read: hidden and delta; written: hidden and normed.
        group.throughput(Throughput::Bytes((4 * len * 4) as u64));
        group.bench_function(BenchmarkId::new("add, norm, quantize", format!("{rows} rows")), |bencher| {
            // The delta is zero, or hidden would grow without end.
            let (mut hidden, delta, weight) = (values(len), vec![0.0; len], values(HIDDEN_SIZE));
            let (mut normed, mut quantized) = (vec![0.0; len], QuantizedRows::default());
            let norm = RmsNorm { weight: &weight, eps: 1e-6 };
            bencher.iter(|| add_norm_quantize(&cpu, &mut hidden, Some(&delta), norm, &mut normed, &mut quantized));
        });
        let len = rows * INTERMEDIATE_SIZE;
        group.throughput(Throughput::Bytes((3 * len * 4) as u64));
        group.bench_function(BenchmarkId::new("swiglu, quantize", format!("{rows} rows")), |bencher| {
            let (gate, up) = (values(len), values(len));
            let (mut activated, mut quantized) = (vec![0.0; len], QuantizedRows::default());
            bencher.iter(|| swiglu_quantize(&cpu, rows, &gate, &up, &mut activated, &mut quantized));
        });
    }
    group.finish();
}
