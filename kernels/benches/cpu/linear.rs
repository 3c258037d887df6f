//! Adapted layers: the low-rank deltas by themselves, and a layer with and without them.

use std::cell::LazyCell;

use criterion::{BenchmarkId, Criterion};
use half::f16;
use kernels::Cpu;
use kernels::activations::QuantizedRows;
use kernels::gemm::Product;
use kernels::linear::{self, Deltas, RowDelta, Shrunk};
use kernels::low_rank::LowRank;
use kernels::quantized::{BlockFormat, PackedMatrix};

use crate::gemm::{activations, matrices, matrix, values};
use crate::{all_cores, group, num_turns, work};

const RANK: usize = 16;
const FORMAT: BlockFormat = BlockFormat::Q5_0;
const OUT_FEATURES: usize = 4864;
const IN_FEATURES: usize = 896;
const DELTA_BYTES: usize = RANK * (OUT_FEATURES + IN_FEATURES) * 2;

/// Rows, and adapters that share them equally.
const BATCHES: [(usize, usize); 4] = [(1, 1), (16, 8), (128, 8), (128, 1)];

pub fn bench(criterion: &mut Criterion) {
    let cpu = all_cores();
    let weights_bytes = matrix(&cpu, FORMAT, (OUT_FEATURES, IN_FEATURES)).bytes();
    let weights = LazyCell::new(|| matrices(&cpu, FORMAT, (OUT_FEATURES, IN_FEATURES)));
    let adapters = LazyCell::new(|| (0..num_turns(DELTA_BYTES)).map(|_| adapter()).collect::<Vec<_>>());
    let mut group = group(criterion, &cpu, "linear");
    for (rows, num_adapters) in BATCHES {
        let base = 2 * rows * OUT_FEATURES * IN_FEATURES;
        let delta = 2 * rows * RANK * (OUT_FEATURES + IN_FEATURES);
        let batch = format!("{rows} rows {num_adapters} adapters");

        group.throughput(work(delta, num_adapters * DELTA_BYTES));
        group.bench_function(BenchmarkId::new("deltas", &batch), |bencher| {
            let mut layer = Layer::new(&cpu, rows);
            let mut first = 0;
            bencher.iter(|| {
                first = (first + num_adapters) % (adapters.len() - num_adapters);
                layer.run(None, &adapters[first..first + num_adapters]);
            });
        });

        group.throughput(work(base + delta, weights_bytes + num_adapters * DELTA_BYTES));
        group.bench_function(BenchmarkId::new("Q5_0 and deltas", &batch), |bencher| {
            let mut layer = Layer::new(&cpu, rows);
            let (mut first, mut turns) = (0, weights.iter().cycle());
            bencher.iter(|| {
                first = (first + num_adapters) % (adapters.len() - num_adapters);
                layer.run(turns.next(), &adapters[first..first + num_adapters]);
            });
        });
    }
    group.finish();
}

fn adapter() -> LowRank {
    let halves = |n| values(n).into_iter().map(f16::from_f32).collect::<Vec<_>>();
    LowRank::pack(RANK, IN_FEATURES, OUT_FEATURES, 2.0, &halves(RANK * IN_FEATURES), &halves(OUT_FEATURES * RANK))
}

/// One layer's buffers.
struct Layer<'a> {
    cpu: &'a Cpu,
    rows: usize,
    x: Vec<f32>,
    activations: QuantizedRows,
    out: Vec<f32>,
    shrunk: Shrunk,
}

impl<'a> Layer<'a> {
    fn new(cpu: &'a Cpu, rows: usize) -> Self {
        Self {
            cpu,
            rows,
            x: values(rows * IN_FEATURES),
            activations: activations(cpu, rows, IN_FEATURES),
            out: vec![0.0; rows * OUT_FEATURES],
            shrunk: Shrunk::default(),
        }
    }

    /// Each adapter takes an equal share of the rows.
    fn run(&mut self, weights: Option<&PackedMatrix>, adapters: &[LowRank]) {
        let share = self.rows / adapters.len();
        let get = |i: usize| {
            let rows = i * share..(i + 1) * share;
            Some(RowDelta { product: 0, rows, low_rank: Some(&adapters[i]), output_scale: None, bias: None })
        };
        let deltas = Deltas { count: adapters.len(), get: &get };
        let product = Product { weights: weights.map(Into::into), bias: None, out: &mut self.out };
        linear::run(self.cpu, &self.activations, &self.x, &mut [product], &deltas, &mut self.shrunk);
    }
}
