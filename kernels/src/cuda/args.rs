//! The structures of `kernels/cuda/args.cuh`, which see for what they mean. Addresses are of device memory, 0 for none.

/// Inputs of a superblock of packed weights.
pub const SUPER: usize = 128;

#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct BlockMeta {
    pub scale: f32,
    pub sums: [i16; 2],
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Activations {
    pub values: u64,
    pub meta: u64,
    pub stride: i32,
    pub num_rows: i32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Site {
    pub a: u64,
    pub b: u64,
    pub scales: u64,
    pub input_scale: u64,
    pub output_scale: u64,
    pub bias: u64,
    pub rank: i32,
    pub a_stride: i32,
    pub b_stride: i32,
    pub unused: i32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct AdapterTable {
    pub embedding_a: u64,
    pub embedding_b: u64,
    pub prelude_rows: u64,
    pub prelude_keys: u64,
    pub prelude_values: u64,
    pub head: u64,
    pub embedding_rank: i32,
    pub num_virtual: i32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct AttendTile {
    pub first_row: i32,
    pub num_rows: i32,
    pub first_position: i32,
    pub block_table: i32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct RowGroup {
    pub expert: i32,
    pub first: i32,
    pub count: i32,
    pub unused: i32,
}

const _: () = {
    assert!(size_of::<RowGroup>() == 16);
    assert!(size_of::<BlockMeta>() == 8);
    assert!(size_of::<Activations>() == 24);
    assert!(size_of::<Site>() == 64);
    assert!(size_of::<AdapterTable>() == 56);
    assert!(size_of::<AttendTile>() == 16);
};

/// Where input `k` of a row of activations stands among its bytes.
pub fn activation_place(k: usize) -> usize {
    let (pair, block, half, quad) = (k / 64, k / 32 % 2, k / 16 % 2, k / 4 % 4);
    pair * 64 + quad * 16 + block * 8 + half * 4 + k % 4
}

/// Where unit `unit` of a context begins.
pub fn unit_start(unit: usize) -> usize {
    match unit {
        0..16 => unit * 64,
        16..32 => 1024 + (unit - 16) * 256,
        _ => 5120 + (unit - 32) * 1024,
    }
}

/// Units that hold `positions` positions.
pub fn num_units(positions: usize) -> usize {
    match positions {
        ..=1024 => positions.div_ceil(64),
        1025..=5120 => 16 + (positions - 1024).div_ceil(256),
        _ => 32 + (positions - 5120).div_ceil(1024),
    }
}
