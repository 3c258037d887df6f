//! Matrices of every format, and rows to multiply them with: any numbers, or such that every sum of a product is exact in f32.

#![allow(dead_code, reason = "each test file takes what it needs")]

use emulator::{Emulator, Memory};
use half::f16;
use kernels::activations::QuantizedRows;
use kernels::cuda::activations::{activation_stride, quantize_rows};
use kernels::cuda::args::{Activations, BlockMeta};
use kernels::cuda::driver::DeviceMemory;
use kernels::cuda::gemm::{GemmArgs, GemmKernel, Product};
use kernels::cuda::matrix::CudaMatrix;
use kernels::gemm;
use kernels::quantized::{BlockFormat, PackedMatrix};
use kernels::{Cpu, Isa};

use crate::arrays::{Numbers, bytes, floats, read_floats};

pub const FORMATS: [BlockFormat; 13] = [
    BlockFormat::Q4_0,
    BlockFormat::Q4_1,
    BlockFormat::Q5_0,
    BlockFormat::Q5_1,
    BlockFormat::Q8_0,
    BlockFormat::Q2_K,
    BlockFormat::Q3_K,
    BlockFormat::Q4_K,
    BlockFormat::Q5_K,
    BlockFormat::Q6_K,
    BlockFormat::IQ4_NL,
    BlockFormat::IQ4_XS,
    BlockFormat::MXFP4,
];

/// `blocks` blocks of 32, or as many as the format must have.
pub fn width_of(format: BlockFormat, blocks: usize) -> usize {
    (blocks * 32).next_multiple_of(format.block_len())
}

/// Where a block of the file has f16 numbers.
fn half_places(format: BlockFormat) -> &'static [usize] {
    match format {
        BlockFormat::Q4_0 | BlockFormat::Q5_0 | BlockFormat::Q8_0 | BlockFormat::IQ4_NL | BlockFormat::IQ4_XS => &[0],
        BlockFormat::Q4_1 | BlockFormat::Q5_1 | BlockFormat::Q4_K | BlockFormat::Q5_K => &[0, 2],
        BlockFormat::Q2_K => &[80, 82],
        BlockFormat::Q3_K => &[108],
        BlockFormat::Q6_K => &[208],
        BlockFormat::MXFP4 => &[],
    }
}

fn set_halves(format: BlockFormat, bytes: &mut [u8], mut value: impl FnMut() -> f32) {
    for block in bytes.chunks_exact_mut(format.block_bytes()) {
        for &at in half_places(format) {
            block[at..at + 2].copy_from_slice(&f16::from_f32(value()).to_le_bytes());
        }
        if format == BlockFormat::MXFP4 {
            // An exponent.
            block[0] = 121;
        }
    }
}

/// Random bytes of a matrix, with scales of a size weights have.
pub fn random_weights(numbers: &mut Numbers, format: BlockFormat, out: usize, width: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..format.row_bytes(width).unwrap() * out).map(|_| numbers.below(256) as u8).collect();
    set_halves(format, &mut bytes, || numbers.below(1000) as f32 * 1e-5 + 1e-3);
    bytes
}

/// The same with scales and minima that are powers of two, times small whole numbers.
pub fn exact_weights(numbers: &mut Numbers, format: BlockFormat, out: usize, width: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..format.row_bytes(width).unwrap() * out).map(|_| numbers.below(256) as u8).collect();
    set_halves(format, &mut bytes, || [0.125, -0.125, 0.0625][numbers.below(3)]);
    if format == BlockFormat::Q6_K {
        for block in bytes.chunks_exact_mut(format.block_bytes()) {
            block[192..208].iter_mut().for_each(|scale| *scale = (numbers.below(9) as i8 - 4).cast_unsigned());
        }
    }
    bytes
}

/// Sets all of a matrix but its f16 numbers to one byte.
pub fn fill_weights(format: BlockFormat, bytes: &mut [u8], byte: u8) {
    for block in bytes.chunks_exact_mut(format.block_bytes()) {
        let halves = half_places(format);
        let is_half = |at: usize| halves.iter().any(|half| (*half..half + 2).contains(&at));
        block.iter_mut().enumerate().filter(|(at, _)| !is_half(*at)).for_each(|(_, b)| *b = byte);
    }
}

/// Rows that are rounded without loss: in each block one value of 127 or -127 eighths (or sixteenths), the others small.
pub fn exact_rows(numbers: &mut Numbers, num_rows: usize, width: usize) -> Vec<f32> {
    let mut x = vec![0.0; num_rows * width];
    for block in x.chunks_exact_mut(32) {
        let unit = [0.125, 0.0625][numbers.below(2)];
        block.iter_mut().for_each(|x| *x = (numbers.below(3) as f32 - 1.0) * unit);
        block[numbers.below(32)] = [127.0, -127.0][numbers.below(2)] * unit;
    }
    x
}

/// Int8 rows in device memory.
pub struct Rows {
    values: Memory,
    meta: Memory,
    stride: usize,
}

impl Rows {
    pub fn new(device: &Emulator, num_rows: usize, width: usize, x: &[f32]) -> Self {
        let stride = activation_stride(width);
        let rows = Self {
            values: bytes(device, &vec![0; num_rows * stride]),
            meta: bytes(device, &vec![0; num_rows * stride / 32 * size_of::<BlockMeta>()]),
            stride,
        };
        let x = floats(device, x);
        quantize_rows(device, x.address(), width, rows.activations(num_rows)).unwrap();
        rows
    }

    /// For products of `num_rows` of them.
    pub fn activations(&self, num_rows: usize) -> Activations {
        let (stride, num_rows) = (self.stride as i32, num_rows as i32);
        Activations { values: self.values.address(), meta: self.meta.address(), stride, num_rows }
    }
}

/// A matrix on both sides.
pub struct Weights {
    pub cpu: PackedMatrix,
    pub cuda: CudaMatrix<Memory>,
}

impl Weights {
    pub fn new(device: &Emulator, format: BlockFormat, shape: (usize, usize), bytes: &[u8]) -> Self {
        let cpu = Cpu::new(Isa::Portable, 1);
        Self {
            cpu: PackedMatrix::pack(&cpu, format, shape, bytes, None).unwrap(),
            cuda: CudaMatrix::upload(device, &cpu, format, shape, bytes, None).unwrap(),
        }
    }

    pub fn on_cpu(&self, bias: Option<&[f32]>, num_rows: usize, x: &[f32]) -> Vec<f32> {
        let cpu = Cpu::new(Isa::Portable, 1);
        let mut activations = QuantizedRows::default();
        activations.quantize(&cpu, num_rows, self.cpu.in_features(), &mut x.to_vec());
        let mut out = vec![f32::NAN; num_rows * self.cpu.out_features()];
        let product = gemm::Product { weights: Some((&self.cpu).into()), bias, out: &mut out };
        gemm::run(&cpu, &activations, &mut [product], 0, &|_| {});
        out
    }

    pub fn on_device(
        &self,
        device: &Emulator,
        kernel: GemmKernel,
        bias: Option<&[f32]>,
        num_rows: usize,
        x: &[f32],
    ) -> Vec<f32> {
        let rows = Rows::new(device, num_rows, self.cuda.in_features(), x);
        let out = floats(device, &vec![f32::NAN; num_rows * self.cuda.out_features()]);
        let bias = bias.map(|bias| floats(device, bias));
        let mut args = GemmArgs { activations: rows.activations(num_rows), num_products: 1, ..GemmArgs::default() };
        args.products[0] = Product {
            w: self.cuda.matrix(),
            bias: bias.as_ref().map_or(0, DeviceMemory::address),
            out: out.address(),
            ..Product::default()
        };
        kernel.launch(device, &args).unwrap();
        read_floats(device, &out)
    }
}
