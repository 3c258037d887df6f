//! Activations between the matrix products: `kernels/cuda/activations.cuh`.

use super::args::{Activations, SUPER};
use super::driver::{Driver, DriverError, KernelArgs, bytes_of};

/// Inputs of a row that a block takes.
const SLICE: usize = 1024;

/// Bytes of a row of int8 activations of `width` inputs.
pub fn activation_stride(width: usize) -> usize {
    width.next_multiple_of(SUPER)
}

/// `hidden += delta` (where given), then `normed = norm(hidden)`, also as int8. All rows are `[width]`.
///
/// With a row list, row `i` of the outputs is made of row `row_list[i]` of `hidden` and `delta`, and `hidden` stays as it is.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct NormArgs {
    pub hidden: u64,
    pub delta: u64,
    pub weight: u64,
    pub normed: u64,
    pub row_list: u64,
    pub activations: Activations,
    pub width: i32,
    pub eps: f32,
}

/// `activated = silu(gate) ∘ up`, also as int8. All are `[rows][width]`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct SwigluArgs {
    pub gate: u64,
    pub up: u64,
    pub activated: u64,
    pub activations: Activations,
    pub width: i32,
    pub unused: i32,
}

/// `input_scale ∘ x` as int8, for each product with what the row's adapter has at the product's site, and `x` itself where
/// it has nothing. `activations` has the rows of all products, `[products][rows]`; its `num_rows` is of one.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ScaleArgs {
    pub x: u64,
    /// The same in f32, `[products][rows][width]`, or 0: for matrices that are not quantized.
    pub scaled: u64,
    pub adapters: u64,
    pub activations: Activations,
    pub sites: [i32; 3],
    pub width: i32,
}

const _: () = {
    assert!(size_of::<NormArgs>() == 72);
    assert!(size_of::<SwigluArgs>() == 56);
    assert!(size_of::<ScaleArgs>() == 64);
};

// SAFETY: 8-byte fields, then 4-byte ones in pairs: no padding. That the addresses are valid is promised by who fills them in.
unsafe impl KernelArgs for NormArgs {}
// SAFETY: as above.
unsafe impl KernelArgs for SwigluArgs {}
// SAFETY: as above.
unsafe impl KernelArgs for ScaleArgs {}

/// Rows: `activations.num_rows`, those of the row list where there is one.
///
/// # Errors
/// When the device refuses the launch.
pub fn add_norm_quantize<D: Driver>(driver: &D, args: &NormArgs) -> Result<(), DriverError> {
    launch(driver, "add_norm_quantize", [args.activations.num_rows as u32, 1, 1], args)
}

/// # Errors
/// When the device refuses the launch.
pub fn swiglu_quantize<D: Driver>(driver: &D, args: &SwigluArgs) -> Result<(), DriverError> {
    launch(driver, "swiglu_quantize", slices(&args.activations, 1), args)
}

/// `num_products` of `args.sites` count.
///
/// # Errors
/// When the device refuses the launch.
pub fn scale_quantize<D: Driver>(driver: &D, args: &ScaleArgs, num_products: usize) -> Result<(), DriverError> {
    launch(driver, "scale_quantize", slices(&args.activations, num_products), args)
}

/// `x` `[activations.num_rows][width]` as int8.
///
/// # Errors
/// When the device refuses the launch.
pub fn quantize_rows<D: Driver>(driver: &D, x: u64, width: usize, activations: Activations) -> Result<(), DriverError> {
    let args = ScaleArgs { x, scaled: 0, adapters: 0, activations, sites: [0; 3], width: width as i32 };
    scale_quantize(driver, &args, 1)
}

fn slices(activations: &Activations, num_products: usize) -> [u32; 3] {
    let num_slices = (activations.stride as u32).div_ceil(SLICE as u32);
    [num_slices, activations.num_rows as u32, num_products as u32]
}

fn launch<D: Driver, A: KernelArgs>(
    driver: &D,
    kernel: &'static str,
    grid: [u32; 3],
    args: &A,
) -> Result<(), DriverError> {
    if grid.contains(&0) {
        return Ok(());
    }
    // SAFETY: the arguments are this kernel's, and the promise of `KernelArgs` covers the addresses; the grid covers the rows
    // they were made for and no more.
    unsafe { driver.launch(kernel, grid, bytes_of(args)) }
}
