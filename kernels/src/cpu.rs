//! What the machine can do, found out once at start.

use std::fmt;
use std::str::FromStr;

use crate::arena::Arena;
use crate::threads::ThreadPool;

/// The instruction sets the kernels are written for, weakest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Plain Rust, any processor.
    Portable,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// AVX2 with AVX-VNNI, which only the GEMM uses.
    AvxVnni,
    /// AVX-512 (F, BW, VL) with VNNI; everything but the GEMM and attention uses the AVX2 code.
    Avx512Vnni,
}

impl Isa {
    const ALL: [Self; 4] = [Self::Portable, Self::Avx2, Self::AvxVnni, Self::Avx512Vnni];

    /// The best this processor has.
    pub fn detect() -> Self {
        Self::Avx512Vnni.or_less()
    }

    /// Every instruction set this processor can run, for tests and benchmarks.
    pub fn available() -> impl Iterator<Item = Isa> {
        Self::ALL.into_iter().filter(|isa| isa.is_available())
    }

    /// This, or the best below it that the processor has.
    fn or_less(self) -> Self {
        Self::available().filter(|isa| *isa <= self).last().unwrap_or(Self::Portable)
    }

    fn is_available(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = || {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
            };
            let avx512 = || {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vnni")
            };
            match self {
                Self::Portable => true,
                Self::Avx2 => avx2(),
                Self::AvxVnni => avx2() && is_x86_feature_detected!("avxvnni"),
                Self::Avx512Vnni => avx2() && avx512(),
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            self == Self::Portable
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::AvxVnni => "avx-vnni",
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
            "avx-vnni" => Ok(Isa::AvxVnni),
            "avx512-vnni" => Ok(Isa::Avx512Vnni),
            other => Err(format!("unknown instruction set {other:?} (portable, avx2, avx-vnni, avx512-vnni)")),
        }
    }
}

/// Where the kernels run: an instruction set, the threads that share its work, and memory for weights.
#[derive(Debug)]
pub struct Cpu {
    isa: Isa,
    pool: ThreadPool,
    arena: Arena,
}

impl Cpu {
    /// `num_threads` counts the calling thread; at least 1. An instruction set the processor lacks is lowered to the best
    /// it has, so that a [`Cpu`] can always run.
    pub fn new(isa: Isa, num_threads: usize) -> Self {
        Self { isa: isa.or_less(), pool: ThreadPool::new(num_threads), arena: Arena::default() }
    }

    pub fn isa(&self) -> Isa {
        self.isa
    }

    pub fn pool(&self) -> &ThreadPool {
        &self.pool
    }

    /// Where weights lie.
    pub(crate) fn arena(&self) -> &Arena {
        &self.arena
    }
}
