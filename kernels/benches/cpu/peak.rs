//! What the machine can do at best: memory read in one stream by all cores, and int8 multiply-adds in registers.

use criterion::{Criterion, Throughput};
use kernels::host::peak::{self, SPAN};

use crate::{all_cores, group};

pub fn bench(criterion: &mut Criterion) {
    let cpu = all_cores();
    let mut group = group(criterion, &cpu, "peak");

    let words = peak::words();
    group.throughput(Throughput::Bytes(SPAN as u64));
    group.bench_function("read memory", |bencher| bencher.iter(|| peak::read_memory(&cpu, &words)));

    if let Some(operations) = peak::multiply(&cpu) {
        group.throughput(Throughput::Elements(operations as u64));
        group.bench_function("int8 multiply-add", |bencher| bencher.iter(|| peak::multiply(&cpu)));
    }
    group.finish();
}
