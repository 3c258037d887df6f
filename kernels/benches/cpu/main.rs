//! Every kernel at the shapes of the default model, beside what the machine itself can do.
//!
//! Criterion prints two rates: `Gelem/s` are 10⁹ operations per second (a multiply-add counts as two), `GiB/s` the bytes
//! of weights, keys and values, or rows that a call has to move. Weights, adapters, keys and values take turns, so that
//! they come from memory and not from the cache, as they do in a model; rows stay in the cache, as they do there.

mod attention;
mod elementwise;
mod gemm;
mod linear;
mod peak;

use std::env;
use std::thread;
use std::time::Duration;

use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main, measurement::WallTime};
use kernels::host::peak::SPAN;
use kernels::{Cpu, Isa};

/// How many operands of `bytes` that take turns fill [`SPAN`] together.
fn num_turns(bytes: usize) -> usize {
    SPAN.div_ceil(bytes)
}

/// With the best instruction set of the processor, or the one that the environment's `ISA` names.
fn all_cores() -> Cpu {
    let isa = env::var("ISA").map_or_else(|_| Isa::detect(), |name| name.parse().expect("an instruction set"));
    Cpu::new(isa, thread::available_parallelism().map_or(1, usize::from))
}

/// A group named after the instruction set in use; `name` is the kernel's.
fn group<'a>(criterion: &'a mut Criterion, cpu: &Cpu, name: &str) -> BenchmarkGroup<'a, WallTime> {
    criterion.benchmark_group(format!("{name} {} x{}", cpu.isa(), cpu.pool().num_threads()))
}

/// Operations and bytes of one call.
fn work(operations: usize, bytes: usize) -> Throughput {
    Throughput::ElementsAndBytes { elements: operations as u64, bytes: bytes as u64 }
}

fn short() -> Criterion {
    Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(600))
        .without_plots()
}

criterion_group! {
    name = benches;
    config = short();
    targets = peak::bench, gemm::bench, linear::bench, attention::bench, elementwise::bench
}
criterion_main!(benches);
