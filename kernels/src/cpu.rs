//! What the machine can do, found out once at start.

use std::fmt;
use std::str::FromStr;

use crate::threads::ThreadPool;

/// The instruction sets the kernels are written for, weakest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Plain Rust, any processor.
    Portable,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// AVX-512 (F, BW, VL) with VNNI; everything but the GEMM and attention uses the AVX2 code.
    Avx512Vnni,
}

impl Isa {
    /// The best this processor has.
    pub fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 =
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512vnni");
            if avx2 && avx512 {
                return Isa::Avx512Vnni;
            }
            if avx2 {
                return Isa::Avx2;
            }
        }
        Isa::Portable
    }

    /// Every instruction set this processor can run, for tests and benchmarks.
    pub fn available() -> impl Iterator<Item = Isa> {
        let best = Self::detect();
        [Isa::Portable, Isa::Avx2, Isa::Avx512Vnni].into_iter().filter(move |isa| *isa <= best)
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::Avx512Vnni => "avx512-vnni",
        })
    }
}

impl FromStr for Isa {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        match s {
            "portable" => Ok(Isa::Portable),
            "avx2" => Ok(Isa::Avx2),
            "avx512-vnni" => Ok(Isa::Avx512Vnni),
            other => Err(format!("unknown instruction set {other:?} (portable, avx2, avx512-vnni)")),
        }
    }
}

/// Where the kernels run: an instruction set and the threads that share its work.
#[derive(Debug)]
pub struct Cpu {
    isa: Isa,
    pool: ThreadPool,
}

impl Cpu {
    /// `num_threads` counts the calling thread; at least 1. An instruction set the processor lacks is lowered to the best
    /// it has, so that a [`Cpu`] can always run.
    pub fn new(isa: Isa, num_threads: usize) -> Self {
        Self { isa: isa.min(Isa::detect()), pool: ThreadPool::new(num_threads) }
    }

    pub fn isa(&self) -> Isa {
        self.isa
    }

    pub fn pool(&self) -> &ThreadPool {
        &self.pool
    }
}
