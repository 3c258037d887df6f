//! Activations between the matrix products: `kernels/cuda/activations.cuh`.

use super::args::{Activations, SUPER};
use super::driver::{Driver, DriverError, KernelArgs, bytes_of};
use crate::shape::Activation;

/// Inputs of a row that a block takes.
const SLICE: usize = 1024;

/// Bytes of a row of int8 activations of `width` inputs.
pub fn activation_stride(width: usize) -> usize {
    width.next_multiple_of(SUPER)
}

/// `hidden += delta` (where given), then `normed = norm(hidden)`, also as int8. All rows are `[width]`. With a bias, the norm
/// centers its input (LayerNorm).
///
/// With a row list, row `i` of the outputs is made of row `row_list[i]` of `hidden` and `delta`, and `hidden` stays as it is.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct NormArgs {
    pub hidden: u64,
    pub delta: u64,
    pub weight: u64,
    /// Or 0.
    pub bias: u64,
    pub normed: u64,
    pub row_list: u64,
    pub activations: Activations,
    pub width: i32,
    pub eps: f32,
}

/// `x = norm(x) · scale` in place, of `[num_vectors][width]`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct InPlaceArgs {
    pub x: u64,
    /// Or 0, for no norm; not in [`norm_heads`].
    pub weight: u64,
    pub num_vectors: i32,
    pub width: i32,
    pub eps: f32,
    /// Of [`norm_rows`] alone.
    pub scale: f32,
}

/// [`Activation`] by number.
#[repr(i32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ActivationCode {
    GatedSilu = 0,
    GatedGelu = 1,
    Gelu = 2,
}

impl From<Activation> for ActivationCode {
    fn from(activation: Activation) -> Self {
        match activation {
            Activation::GatedSilu => Self::GatedSilu,
            Activation::GatedGelu => Self::GatedGelu,
            Activation::Gelu => Self::Gelu,
        }
    }
}

/// `activated` = what the activation makes of `gate` and `up`, also as int8. All are `[rows][width]`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ActivateArgs {
    /// Not read where there is no gate.
    pub gate: u64,
    pub up: u64,
    pub activated: u64,
    pub activations: Activations,
    pub width: i32,
    pub activation: ActivationCode,
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
    assert!(size_of::<NormArgs>() == 80);
    assert!(size_of::<InPlaceArgs>() == 32);
    assert!(size_of::<ActivateArgs>() == 56);
    assert!(size_of::<ScaleArgs>() == 64);
};

// SAFETY: 8-byte fields, then 4-byte ones in pairs: no padding. That the addresses are valid is promised by who fills them in.
unsafe impl KernelArgs for NormArgs {}
// SAFETY: as above.
unsafe impl KernelArgs for InPlaceArgs {}
// SAFETY: as above.
unsafe impl KernelArgs for ActivateArgs {}
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
pub fn norm_rows<D: Driver>(driver: &D, args: &InPlaceArgs) -> Result<(), DriverError> {
    launch(driver, "norm_rows", [args.num_vectors as u32, 1, 1], args)
}

/// For short vectors, the heads of a row.
///
/// # Errors
/// When the device refuses the launch.
pub fn norm_heads<D: Driver>(driver: &D, args: &InPlaceArgs) -> Result<(), DriverError> {
    launch(driver, "norm_heads", [(args.num_vectors as u32).div_ceil(8), 1, 1], args)
}

/// # Errors
/// When the device refuses the launch.
pub fn activate_quantize<D: Driver>(driver: &D, args: &ActivateArgs) -> Result<(), DriverError> {
    launch(driver, "activate_quantize", slices(&args.activations, 1), args)
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
