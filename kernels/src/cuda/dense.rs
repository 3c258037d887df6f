//! Products with matrices that are not quantized: `kernels/cuda/dense.cuh`.

use super::driver::{DeviceMemory, Driver, DriverError, KernelArgs, bytes_of};
use super::low_rank::row_stride;

const TILE_ROWS: usize = 8;
const WARPS: usize = 4;
const OUTS_AT_ONCE: usize = 4;
/// Warps up to which a single row has one for each output; beyond, they would only wait for each other.
const MANY_WARPS: usize = 8192;
/// Blocks of a tile of rows whose adapters may have heads; more would be much to start for tiles that have none.
const HEAD_BLOCKS: usize = 512;
/// Bytes of a matrix made ready for the device at a time.
const PIECE_BYTES: usize = 16 << 20;

/// What a matrix holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Element {
    F16,
    Bf16,
    F32,
}

impl Element {
    pub fn size(self) -> usize {
        match self {
            Self::F16 | Self::Bf16 => 2,
            Self::F32 => 4,
        }
    }

    fn kernel(self) -> &'static str {
        match self {
            Self::F16 => "dense_f16",
            Self::Bf16 => "dense_bf16",
            Self::F32 => "dense_f32",
        }
    }
}

/// A matrix `[out_features, in_features]` in device memory, its rows `stride` elements apart.
#[derive(Debug)]
pub struct DenseMatrix<M> {
    weights: M,
    element: Element,
    out_features: usize,
    in_features: usize,
    stride: usize,
}

/// Rows of f32 in device memory, `stride` floats apart.
#[derive(Debug, Clone, Copy)]
pub struct DeviceRows {
    pub address: u64,
    pub num_rows: usize,
    /// A multiple of 4.
    pub stride: usize,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct DenseArgs {
    pub weights: u64,
    pub bias: u64,
    pub x: u64,
    pub y: u64,
    pub adapters: u64,
    pub experts: u64,
    pub x_stride: i32,
    pub stride: i32,
    pub num_rows: i32,
    pub in_features: i32,
    pub out_features: i32,
    pub unused: i32,
}

const _: () = assert!(size_of::<DenseArgs>() == 72);

// SAFETY: no padding; whoever fills it in vouches for the addresses.
unsafe impl KernelArgs for DenseArgs {}

impl<M: DeviceMemory> DenseMatrix<M> {
    /// Copies `bytes`, elements of a matrix of shape `(out_features, in_features)` row by row, to the device. `row_order[i]`
    /// says which row of `bytes` becomes row `i`; `None` keeps the order.
    ///
    /// # Errors
    /// When the device has no room.
    ///
    /// # Panics
    /// When there are not so many bytes, `in_features` is not a multiple of 4, or `row_order` is not an order of the rows.
    pub fn upload<D: Driver<Memory = M>>(
        driver: &D,
        element: Element,
        (out_features, in_features): (usize, usize),
        bytes: &[u8],
        row_order: Option<&[usize]>,
    ) -> Result<Self, DriverError> {
        let (row_bytes, stride) = (in_features * element.size(), row_stride(in_features));
        assert!(in_features > 0 && in_features.is_multiple_of(4), "{in_features} inputs of a matrix");
        assert_eq!(bytes.len(), out_features * row_bytes, "bytes of a matrix");
        assert!(row_order.is_none_or(|order| order.len() == out_features), "rows of a matrix");
        let stride_bytes = stride * element.size();
        let weights = driver.allocate(out_features * stride_bytes)?;
        let rows_per_piece = (PIECE_BYTES / stride_bytes).max(1);
        let mut piece = Vec::with_capacity(rows_per_piece.min(out_features) * stride_bytes);
        for first in (0..out_features).step_by(rows_per_piece) {
            piece.clear();
            for row in first..(first + rows_per_piece).min(out_features) {
                let source = row_order.map_or(row, |order| order[row]);
                piece.extend_from_slice(&bytes[source * row_bytes..][..row_bytes]);
                piece.resize((row + 1 - first) * stride_bytes, 0);
            }
            driver.write(&weights, first * stride_bytes, &piece)?;
        }
        Ok(Self { weights, element, out_features, in_features, stride })
    }

    pub fn out_features(&self) -> usize {
        self.out_features
    }

    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// Bytes of device memory.
    pub fn bytes(&self) -> usize {
        self.weights.len()
    }

    /// `y = W x + bias` for all rows of `x`; `bias` f32 `[out_features]` or 0, `y` f32 `[rows, out_features]`.
    ///
    /// # Errors
    /// When the driver fails.
    pub fn multiply<D: Driver<Memory = M>>(
        &self,
        driver: &D,
        x: DeviceRows,
        bias: u64,
        y: u64,
    ) -> Result<(), DriverError> {
        self.multiply_by_expert(driver, x, (1, 0), bias, y)
    }

    /// The same where the matrix is those of `count` experts, one below the other, of which each row takes one: `experts` i32
    /// `[rows]`, or 0 for the first.
    ///
    /// # Errors
    /// When the driver fails.
    pub fn multiply_by_expert<D: Driver<Memory = M>>(
        &self,
        driver: &D,
        x: DeviceRows,
        (count, experts): (usize, u64),
        bias: u64,
        y: u64,
    ) -> Result<(), DriverError> {
        let out_features = self.out_features / count;
        let warps = out_features.div_ceil(OUTS_AT_ONCE);
        let warps = if x.num_rows == 1 && out_features <= MANY_WARPS { out_features } else { warps };
        let args = DenseArgs {
            weights: self.weights.address(),
            bias,
            experts,
            stride: self.stride as i32,
            ..arguments(x, (out_features, self.in_features), y)
        };
        launch(driver, self.element.kernel(), warps.div_ceil(WARPS), &args)
    }
}

/// The logits of the rows of `x` whose adapter has a head of its own, of shape `(vocab, hidden)`; `y` f32 `[rows, vocab]`
/// stays as it is elsewhere. `adapters`: as in [`ShrinkArgs`](super::low_rank::ShrinkArgs).
///
/// # Errors
/// When the driver fails.
pub fn multiply_adapter_heads<D: Driver>(
    driver: &D,
    x: DeviceRows,
    adapters: u64,
    shape: (usize, usize),
    y: u64,
) -> Result<(), DriverError> {
    let args = DenseArgs { adapters, stride: row_stride(shape.1) as i32, ..arguments(x, shape, y) };
    let num_blocks = shape.0.div_ceil(OUTS_AT_ONCE * WARPS).min(HEAD_BLOCKS);
    if adapters == 0 { Ok(()) } else { launch(driver, "adapter_heads", num_blocks, &args) }
}

/// All but weights and adapters.
fn arguments(x: DeviceRows, (out_features, in_features): (usize, usize), y: u64) -> DenseArgs {
    assert!(
        in_features.is_multiple_of(4) && x.stride.is_multiple_of(4),
        "rows of {in_features} inputs, {} apart",
        x.stride
    );
    DenseArgs {
        x: x.address,
        y,
        x_stride: x.stride as i32,
        num_rows: x.num_rows as i32,
        in_features: in_features as i32,
        out_features: out_features as i32,
        ..DenseArgs::default()
    }
}

/// `num_blocks` blocks for each tile of rows.
fn launch<D: Driver>(driver: &D, kernel: &'static str, num_blocks: usize, args: &DenseArgs) -> Result<(), DriverError> {
    // Grids are no wider than 65535 in y; blocks go on where there are fewer than outputs.
    let grid = [(args.num_rows as usize).div_ceil(TILE_ROWS) as u32, num_blocks.min(65535) as u32, 1];
    if args.num_rows == 0 {
        return Ok(());
    }
    // SAFETY: `KernelArgs`; y alone is written.
    unsafe { driver.launch(kernel, grid, bytes_of(args)) }
}
