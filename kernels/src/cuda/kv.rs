//! What goes into the KV store: `kernels/cuda/kv.cuh`.
//!
//! The store is two allocations of zeros, keys and values, `[layer][block][kv_head]` of what `kernels/cuda/args.cuh` says of
//! each [`KvType`]. Its values are finite: [`rotate_and_store`] alone may write them.

use super::driver::{Driver, DriverError, KernelArgs, bytes_of};
use crate::attention::KvType;

#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct RotateArgs {
    /// f32 `[rows, num_heads, head_dim]`, not changed.
    pub q: u64,
    /// f32 `[rows, num_kv_heads, head_dim]`, not changed.
    pub k: u64,
    /// As `k`.
    pub v: u64,
    /// f32 `[position, turned_pairs]`, see [`RotaryTable`](crate::attention::RotaryTable).
    pub cos: u64,
    /// As `cos`.
    pub sin: u64,
    /// i32 `[rows]`, positions within the sequence.
    pub positions: u64,
    /// i32 `[rows]`: block · 16 + position within the block. Negative: the row is not stored.
    pub slots: u64,
    /// u32 `[rows]`
    pub tokens: u64,
    /// Addresses of [`AdapterTable`](super::args::AdapterTable)s or 0, `[rows]`; or none.
    pub adapters: u64,
    /// f32 `[num_kv_heads, head_dim]`, which was added to all keys, or 0: [`KvType::Q8_0`] goes without what hardly turns of it.
    pub common: u64,
    /// f32 `[head_dim]`: 1 for dimensions that hardly turn, or else 0.
    pub stays: u64,
    /// Of the layer.
    pub keys: u64,
    /// Of the layer.
    pub values: u64,
    /// f16 `[rows, num_heads, head_dim]`, written: the queries, rotated, and spread where keys are.
    pub q_half: u64,
    pub num_heads: i32,
    pub num_kv_heads: i32,
    pub head_dim: i32,
    pub layer: i32,
    /// Dimensions `i` and `i + turned_pairs` turn together; those beyond twice as many stay as they are.
    pub turned_pairs: i32,
    pub kv_type: KvType,
}

const _: () = assert!(size_of::<RotateArgs>() == 136);

// SAFETY: no padding; whoever fills it in vouches for the addresses.
unsafe impl KernelArgs for RotateArgs {}

/// Writes queries turned as f16, and keys turned and values to the KV store, rounded as it keeps them; of virtual rows, the keys and values that their
/// adapter has in the place of computed ones. Slots of one call differ, those below 0 apart.
///
/// # Errors
/// When the driver fails.
pub fn rotate_and_store<D: Driver>(driver: &D, num_rows: usize, args: RotateArgs) -> Result<(), DriverError> {
    let heads = (args.num_heads + args.num_kv_heads) as u32;
    let grid = [num_rows as u32, heads.div_ceil(8), 1];
    // SAFETY: `KernelArgs`; written are q_half and the slots, as `RotateArgs` says.
    unsafe { driver.launch("rotate_and_store", grid, bytes_of(&args)) }
}

#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct CopyArgs {
    /// Of the first layer.
    pub keys: u64,
    /// Of the first layer.
    pub values: u64,
    /// i32 `[num_copies, 2]`: from which block to which.
    pub copies: u64,
    /// i32 in device memory, so that a graph may be replayed with other copies.
    pub num_copies: u64,
    /// Of a layer in keys or in values, in 16 bytes.
    pub layer_words: i64,
    /// Of a block, the same.
    pub block_words: i32,
    pub unused: i32,
}

const _: () = assert!(size_of::<CopyArgs>() == 48);

// SAFETY: no padding; whoever fills it in vouches for the addresses.
unsafe impl KernelArgs for CopyArgs {}

/// Bytes of one block of one layer in keys, and in values.
pub fn block_bytes(kv_type: KvType, num_kv_heads: usize, head_dim: usize) -> usize {
    num_kv_heads * kv_type.head_bytes(head_dim)
}

/// Replaces blocks by others in every layer, one copy after the other.
///
/// # Errors
/// When the driver fails.
pub fn copy_blocks<D: Driver>(driver: &D, num_layers: usize, args: CopyArgs) -> Result<(), DriverError> {
    let grid = [num_layers as u32, 2, (args.block_words as u32).div_ceil(256)];
    // SAFETY: `KernelArgs`; the store alone is written.
    unsafe { driver.launch("copy_blocks", grid, bytes_of(&args)) }
}
