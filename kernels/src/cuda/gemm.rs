//! The quantized GEMM, with what adapters do to its outputs: `kernels/cuda/gemm.cuh`.

use super::args::Activations;
use super::driver::{Driver, DriverError, KernelArgs, bytes_of};
use super::matrix::Matrix;
use crate::quantized::ROWS_PER_TILE;

/// Products of one launch.
pub const MAX_PRODUCTS: usize = 3;

/// One product: `out = W x + bias`, and for rows with an adapter what it does at `site`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Product {
    /// Without records: `out` holds the product already, bias included; `out_features` counts all the same.
    pub w: Matrix,
    /// `[out_features]` or 0.
    pub bias: u64,
    /// `[rows][out_features]`
    pub out: u64,
    pub site: i32,
    /// Where the rows of this product begin among those of the activations: a product may have its own.
    pub activations_offset_rows: i32,
}

/// Products of the same rows. `activations.num_rows` counts the rows of one product.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct GemmArgs {
    pub products: [Product; MAX_PRODUCTS],
    pub activations: Activations,
    /// `RowAdapters`: `[rows]` addresses of adapter tables, or 0.
    pub adapters: u64,
    /// `[products][rows][shrunk_stride]`
    pub shrunk: u64,
    pub shrunk_stride: i32,
    pub num_products: i32,
    /// [`RowGroup`](super::args::RowGroup) `[num_groups]`, none of more than [`GemmKernel::group_rows`], that have all rows; or 0
    /// where all are multiplied by one matrix.
    pub groups: u64,
    pub num_groups: i32,
    pub unused: i32,
}

const _: () = {
    assert!(size_of::<Product>() == 56);
    assert!(size_of::<GemmArgs>() == 232);
};

// SAFETY: structures whose 4-byte fields come in pairs: no padding. That the addresses are valid is promised by who fills them
// in.
unsafe impl KernelArgs for GemmArgs {}

/// The kernels. A row has the same bits from each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GemmKernel {
    /// For up to 8 rows.
    Decode1,
    /// For up to 16.
    Decode2,
    /// For up to 32.
    Decode4,
    /// For up to 64.
    Decode8,
    /// For any number of rows.
    Prefill,
}

impl GemmKernel {
    /// The fastest for so many rows.
    pub fn for_rows(num_rows: usize) -> Self {
        match num_rows {
            0..=8 => Self::Decode1,
            9..=16 => Self::Decode2,
            17..=32 => Self::Decode4,
            33..=64 => Self::Decode8,
            _ => Self::Prefill,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Decode1 => "gemm_decode_1",
            Self::Decode2 => "gemm_decode_2",
            Self::Decode4 => "gemm_decode_4",
            Self::Decode8 => "gemm_decode_8",
            Self::Prefill => "gemm_prefill",
        }
    }

    /// Rows that a block takes at most.
    pub fn group_rows(self) -> usize {
        match self {
            Self::Decode1 => 8,
            Self::Decode2 => 16,
            Self::Decode4 => 32,
            Self::Decode8 | Self::Prefill => 64,
        }
    }

    /// Tiles of 16 outputs that a block takes.
    fn tiles_per_block(self) -> usize {
        match self {
            Self::Decode1 | Self::Decode2 => 1,
            Self::Decode4 | Self::Decode8 => 2,
            Self::Prefill => 8,
        }
    }

    /// Computes all products of `args`.
    ///
    /// # Errors
    /// When the device refuses the launch.
    ///
    /// # Panics
    /// When there are more rows than the kernel takes.
    pub fn launch<D: Driver>(self, driver: &D, args: &GemmArgs) -> Result<(), DriverError> {
        let num_rows = args.activations.num_rows as usize;
        let num_groups = if args.groups == 0 { num_rows.div_ceil(self.group_rows()) } else { args.num_groups as usize };
        assert!(args.groups != 0 || num_groups <= 1 || self == Self::Prefill, "{num_rows} rows for {}", self.name());
        let outputs = ROWS_PER_TILE * self.tiles_per_block();
        let products = &args.products[..args.num_products as usize];
        let num_blocks: usize = products.iter().map(|p| (p.w.out_features as usize).div_ceil(outputs)).sum();
        if num_rows == 0 || num_blocks == 0 {
            return Ok(());
        }
        let grid = match self {
            Self::Prefill => [num_groups as u32, num_blocks as u32, 1],
            _ => [num_blocks as u32, num_groups as u32, 1],
        };
        // SAFETY: the arguments are this kernel's, the promise of `KernelArgs` covers the addresses, and the blocks are those of
        // the products.
        unsafe { driver.launch(self.name(), grid, bytes_of(args)) }
    }
}

/// Computes all products of `args` with the kernel that is fastest for their rows.
///
/// # Errors
/// When the device refuses the launch.
pub fn multiply<D: Driver>(driver: &D, args: &GemmArgs) -> Result<(), DriverError> {
    GemmKernel::for_rows(args.activations.num_rows as usize).launch(driver, args)
}
