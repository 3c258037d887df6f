//! What the processor can do at most: memory read in one stream by all cores, and int8 multiply-adds in registers.

use std::hint::black_box;
use std::time::{Duration, Instant};

use crate::device::Peaks;
use crate::{Cpu, Isa};

/// Bytes of memory to read: several times a last-level cache.
pub const SPAN: usize = 128 << 20;
/// Of which the fastest counts: another process may have a core in the others.
const NUM_TIMED: usize = 12;

const WORDS_PER_TASK: usize = 128 << 10;
const TASKS_PER_THREAD: usize = 16;
/// Instructions in flight: more than their latency times the number of multipliers.
const CHAINS: usize = 12;
const ROUNDS: usize = 4096;

/// In about half a second. `None` for an instruction set whose GEMM has no instruction of its own to multiply with.
pub fn measure(cpu: &Cpu) -> Option<Peaks> {
    let operations = multiply(cpu)?;
    let words = words();
    let read = fastest(|| read_memory(cpu, &words));
    let multiplied = fastest(|| _ = multiply(cpu));
    Some(Peaks { bytes_per_second: SPAN as f64 / read, int8_operations_per_second: operations as f64 / multiplied })
}

/// In seconds.
fn fastest(work: impl Fn()) -> f64 {
    let timed = (0..NUM_TIMED).map(|_| {
        let start = Instant::now();
        work();
        start.elapsed()
    });
    timed.min().unwrap_or(Duration::MAX).as_secs_f64()
}

/// To be read, [`SPAN`] bytes.
pub fn words() -> Vec<u64> {
    (0..SPAN / 8).map(|i| i as u64).collect()
}

/// Reads all `words` once, on all threads.
pub fn read_memory(cpu: &Cpu, words: &[u64]) {
    cpu.pool().run(words.len().div_ceil(WORDS_PER_TASK), &|task| {
        let words = words.chunks(WORDS_PER_TASK).nth(task).unwrap_or_default();
        black_box(words.iter().fold(0, |sum: u64, word| sum.wrapping_add(*word)));
    });
}

/// Multiplies what lies in registers, on all threads, and says how many operations that was; a multiply and an add are two.
pub fn multiply(cpu: &Cpu) -> Option<usize> {
    let (multiply, operations) = multiplier(cpu.isa())?;
    let num_tasks = cpu.pool().num_threads() * TASKS_PER_THREAD;
    cpu.pool().run(num_tasks, &|_| multiply());
    Some(num_tasks * ROUNDS * CHAINS * operations)
}

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
