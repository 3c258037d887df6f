//! What the machine can do at best: memory read in one stream by all cores, and int8 multiply-adds in registers.

use std::hint::black_box;

use criterion::{Criterion, Throughput};
use kernels::{Cpu, Isa};

use crate::{SPAN, all_cores, group};

pub fn bench(criterion: &mut Criterion) {
    let cpu = all_cores();
    let mut group = group(criterion, &cpu, "peak");

    let words: Vec<u64> = (0..SPAN / 8).map(|i| i as u64).collect();
    group.throughput(Throughput::Bytes(SPAN as u64));
    group.bench_function("read memory", |bencher| bencher.iter(|| read(&cpu, &words)));

    if let Some((multiply, operations)) = multiplier(cpu.isa()) {
        let num_tasks = cpu.pool().num_threads() * 16;
        group.throughput(Throughput::Elements((num_tasks * ROUNDS * CHAINS * operations) as u64));
        group
            .bench_function("int8 multiply-add", |bencher| bencher.iter(|| cpu.pool().run(num_tasks, &|_| multiply())));
    }
    group.finish();
}

/// Reads all `words` once.
fn read(cpu: &Cpu, words: &[u64]) {
    const WORDS_PER_TASK: usize = 128 << 10;
    cpu.pool().run(words.len().div_ceil(WORDS_PER_TASK), &|task| {
        let words = words.chunks(WORDS_PER_TASK).nth(task).unwrap_or_default();
        black_box(words.iter().fold(0, |sum: u64, word| sum.wrapping_add(*word)));
    });
}

/// Instructions in flight: more than their latency times the number of multipliers.
const CHAINS: usize = 12;
const ROUNDS: usize = 4096;

/// A loop of [`ROUNDS`] times [`CHAINS`] of the multiplications the GEMM of `isa` is made of, and the int8 operations of
/// one of them.
fn multiplier(isa: Isa) -> Option<(fn(), usize)> {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `Cpu` lowers its instruction set to what the processor has.
        Isa::Avx512Vnni => Some((|| unsafe { x86::multiply_avx512() }, 128)),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::AvxVnni => Some((|| unsafe { x86::multiply_avx_vnni() }, 64)),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 => Some((|| unsafe { x86::multiply_avx2() }, 64)),
        _ => None,
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    use super::{CHAINS, ROUNDS};

    /// Every product feeds the next of its chain, so that none can be left out.
    #[target_feature(enable = "avx2")]
    pub fn multiply_avx2() {
        let weights = black_box(_mm256_set1_epi8(3));
        let mut chains: [__m256i; CHAINS] = black_box([_mm256_set1_epi8(5); CHAINS]);
        for _ in 0..ROUNDS {
            for chain in &mut chains {
                *chain = _mm256_maddubs_epi16(*chain, weights);
            }
        }
        black_box(chains);
    }

    #[target_feature(enable = "avx2,avxvnni")]
    pub fn multiply_avx_vnni() {
        let (weights, activations) = (black_box(_mm256_set1_epi8(3)), black_box(_mm256_set1_epi8(5)));
        let mut chains: [__m256i; CHAINS] = black_box([_mm256_setzero_si256(); CHAINS]);
        for _ in 0..ROUNDS {
            for chain in &mut chains {
                *chain = _mm256_dpbusd_avx_epi32(*chain, weights, activations);
            }
        }
        black_box(chains);
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub fn multiply_avx512() {
        let (weights, activations) = (black_box(_mm512_set1_epi8(3)), black_box(_mm512_set1_epi8(5)));
        let mut chains: [__m512i; CHAINS] = black_box([_mm512_setzero_si512(); CHAINS]);
        for _ in 0..ROUNDS {
            for chain in &mut chains {
                *chain = _mm512_dpbusd_epi32(*chain, weights, activations);
            }
        }
        black_box(chains);
    }
}
