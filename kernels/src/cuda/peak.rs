//! What a card can do at most: `kernels/cuda/peak.cuh`, timed.

use std::time::{Duration, Instant};

use super::driver::{DeviceMemory, Driver, DriverError, KernelArgs, bytes_of};
use crate::device::Peaks;

/// Of a block.
pub const THREADS: usize = 256;
const WARPS: usize = THREADS / 32;
/// Blocks that keep every multiprocessor of a large card busy.
const BLOCKS: usize = 132 * 16;
/// Operations of one product in registers: a multiply and an add count as two.
const PRODUCT_OPERATIONS: usize = 2 * 16 * 8 * 32;
/// Independent products of a round.
const PRODUCTS: usize = 8;

/// What is timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernel {
    /// Mixes all words of the memory.
    ReadMemory,
    /// Multiplies what lies in registers.
    MultiplyRegisters,
}

#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct PeakArgs {
    /// Of 16 bytes each, `[num_words]`.
    pub memory: u64,
    /// u32 `[blocks · 256]`, written.
    pub out: u64,
    pub num_words: i64,
    pub rounds: i32,
    pub unused: i32,
}

const _: () = assert!(size_of::<PeakArgs>() == 32);

// SAFETY: no padding; whoever fills it in vouches for the addresses.
unsafe impl KernelArgs for PeakArgs {}

/// Measures with `bytes` of memory, more than the caches hold, and `rounds` rounds of products.
///
/// # Errors
/// When there is not so much memory, or the driver fails.
pub fn measure<D: Driver>(driver: &D, bytes: usize, rounds: usize) -> Result<Peaks, DriverError> {
    let memory = driver.allocate(bytes)?;
    let out = driver.allocate(BLOCKS * THREADS * 4)?;
    let args = PeakArgs {
        memory: memory.address(),
        out: out.address(),
        num_words: (bytes / 16) as i64,
        rounds: rounds as i32,
        unused: 0,
    };
    let read = shortest(driver, Kernel::ReadMemory, &args)?;
    let multiply = shortest(driver, Kernel::MultiplyRegisters, &args)?;
    let operations = (BLOCKS * WARPS * PRODUCTS * PRODUCT_OPERATIONS) as f64 * rounds as f64;
    Ok(Peaks {
        bytes_per_second: bytes as f64 / read.as_secs_f64(),
        int8_operations_per_second: operations / multiply.as_secs_f64(),
    })
}

/// Starts `blocks` blocks of a kernel.
///
/// # Errors
/// When the driver fails.
pub fn launch<D: Driver>(driver: &D, kernel: Kernel, blocks: usize, args: &PeakArgs) -> Result<(), DriverError> {
    let name = match kernel {
        Kernel::ReadMemory => "read_memory",
        Kernel::MultiplyRegisters => "multiply_registers",
    };
    // SAFETY: `KernelArgs`; of `out` as much is written as it is long.
    unsafe { driver.launch(name, [blocks as u32, 1, 1], bytes_of(args)) }
}

/// Of a few launches, the first of which only warms up.
fn shortest<D: Driver>(driver: &D, kernel: Kernel, args: &PeakArgs) -> Result<Duration, DriverError> {
    let mut shortest = Duration::MAX;
    for _ in 0..4 {
        driver.synchronize()?;
        let started = Instant::now();
        launch(driver, kernel, BLOCKS, args)?;
        driver.synchronize()?;
        shortest = shortest.min(started.elapsed());
    }
    Ok(shortest)
}
