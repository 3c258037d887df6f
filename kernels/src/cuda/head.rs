//! What the host needs of the logits to draw from them: `kernels/cuda/head.cuh`.

use super::driver::{Driver, DriverError, KernelArgs, bytes_of};

/// Logits of a row that a summary names.
pub const NUM_CANDIDATES: usize = 64;
/// Logits of a slice.
const SLICE: usize = 4096;
/// Threads of a block that caps logits, and the most blocks: each thread takes several.
const CAP_THREADS: usize = 256;
const MAX_CAP_BLOCKS: usize = 1024;
/// The largest vocabulary that can be summarized.
pub const MAX_VOCAB: usize = 128 * SLICE;

/// What is known of a row of logits.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RowSummary {
    pub ids: [u32; NUM_CANDIDATES],
    /// The greatest in falling order (`f32::total_cmp`), of equal ones the lower id first.
    pub logits: [f32; NUM_CANDIDATES],
    /// The greatest that is a number.
    pub max: f32,
    /// Of `exp(logit - max)` over all that are numbers; 0 where `max` is infinite.
    pub sum: f32,
    /// Of `ids` and `logits` the first so many count: all but in a small vocabulary.
    pub num_candidates: i32,
    pub has_nan: i32,
}

impl RowSummary {
    pub const BYTES: usize = size_of::<Self>();

    /// Ids and logits.
    pub fn candidates(&self) -> impl ExactSizeIterator<Item = (u32, f32)> {
        let num = usize::try_from(self.num_candidates).unwrap_or(0);
        self.ids.iter().copied().zip(self.logits.iter().copied()).take(num)
    }

    /// `ln Σ exp(logit)`: a logit less this is its log-probability.
    pub fn log_sum(&self) -> f64 {
        if self.max.is_infinite() { self.max.into() } else { f64::from(self.max) + f64::from(self.sum).ln() }
    }

    /// From bytes of device memory.
    pub fn from_bytes(bytes: &[u8; Self::BYTES]) -> Self {
        let (words, _) = bytes.as_chunks::<4>();
        let logit = |at: usize| f32::from_le_bytes(words[at]);
        Self {
            ids: std::array::from_fn(|i| u32::from_le_bytes(words[i])),
            logits: std::array::from_fn(|i| logit(NUM_CANDIDATES + i)),
            max: logit(2 * NUM_CANDIDATES),
            sum: logit(2 * NUM_CANDIDATES + 1),
            num_candidates: i32::from_le_bytes(words[2 * NUM_CANDIDATES + 2]),
            has_nan: i32::from_le_bytes(words[2 * NUM_CANDIDATES + 3]),
        }
    }
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct HeadArgs {
    logits: u64,
    slices: u64,
    summaries: u64,
    num_rows: i32,
    vocab: i32,
    num_slices: i32,
    unused: i32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct CapArgs {
    logits: u64,
    count: i64,
    cap: f32,
    unused: i32,
}

const _: () = {
    assert!(size_of::<RowSummary>() == 528 && size_of::<HeadArgs>() == 40);
    assert!(size_of::<CapArgs>() == 24);
};

// SAFETY: no padding; whoever calls `summarize` vouches for the addresses.
unsafe impl KernelArgs for HeadArgs {}
// SAFETY: no padding; whoever calls `cap` vouches for the address.
unsafe impl KernelArgs for CapArgs {}

/// Where the logits of a step lie and what becomes of them.
#[derive(Debug, Clone, Copy)]
pub struct HeadRows {
    /// f32 `[num_rows, vocab]`
    pub logits: u64,
    /// [`scratch_bytes`] that are overwritten.
    pub scratch: u64,
    /// [`RowSummary`] `[num_rows]`
    pub summaries: u64,
    pub num_rows: usize,
    pub vocab: usize,
}

/// Device memory that [`summarize`] needs beside its result.
pub fn scratch_bytes(num_rows: usize, vocab: usize) -> usize {
    num_rows * vocab.div_ceil(SLICE) * RowSummary::BYTES
}

/// Makes each of `count` logits `cap · tanh(logit / cap)`.
///
/// # Errors
/// When the driver fails.
pub fn cap<D: Driver>(driver: &D, logits: u64, count: usize, cap: f32) -> Result<(), DriverError> {
    let args = CapArgs { logits, count: count as i64, cap, unused: 0 };
    let blocks = count.div_ceil(CAP_THREADS).min(MAX_CAP_BLOCKS);
    if blocks == 0 {
        return Ok(());
    }
    // SAFETY: `KernelArgs`; the logits alone are written.
    unsafe { driver.launch("cap_logits", [blocks as u32, 1, 1], bytes_of(&args)) }
}

/// Summarizes each row of logits.
///
/// # Errors
/// When the driver fails.
///
/// # Panics
/// When the vocabulary is empty or larger than [`MAX_VOCAB`].
pub fn summarize<D: Driver>(driver: &D, rows: HeadRows) -> Result<(), DriverError> {
    assert!((1..=MAX_VOCAB).contains(&rows.vocab), "a vocabulary of {}", rows.vocab);
    if rows.num_rows == 0 {
        return Ok(());
    }
    let num_slices = rows.vocab.div_ceil(SLICE);
    let args = HeadArgs {
        logits: rows.logits,
        slices: rows.scratch,
        summaries: rows.summaries,
        num_rows: rows.num_rows as i32,
        vocab: rows.vocab as i32,
        num_slices: num_slices as i32,
        unused: 0,
    };
    // SAFETY: `KernelArgs`; the scratch memory alone is written.
    unsafe { driver.launch("head_slices", [num_slices as u32, rows.num_rows as u32, 1], bytes_of(&args)) }?;
    // SAFETY: `KernelArgs`; the summaries alone are written.
    unsafe { driver.launch("head_merge", [rows.num_rows as u32, 1, 1], bytes_of(&args)) }
}
