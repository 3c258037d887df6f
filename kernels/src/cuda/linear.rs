//! Linear layers in device memory, and what the adapters of a step do to them.

use crate::Cpu;
use crate::device::{DeviceError, MatrixSource};
use crate::quantized::WeightType;

use super::activations::{ScaleArgs, activation_stride, scale_quantize};
use super::args::Activations;
use super::buffers::Buffer;
use super::dense::{DenseMatrix, DeviceRows, Element, multiply_adapter_heads};
use super::driver::{DeviceMemory, Driver};
use super::gemm::{GemmArgs, MAX_PRODUCTS, Product, multiply};
use super::low_rank::{ShrinkArgs, shrink};
use super::matrix::{CudaMatrix, Matrix, UploadError};
use super::{Cuda, StepMemory};

/// The weights and the bias of a linear layer.
#[derive(Debug)]
pub struct CudaLinear<D: Driver> {
    weights: Weights<D>,
    /// f32 `[out_features]`
    bias: Option<D::Memory>,
}

#[derive(Debug)]
enum Weights<D: Driver> {
    Packed(CudaMatrix<D::Memory>),
    Dense(DenseMatrix<D::Memory>),
}

impl<D: Driver> CudaLinear<D> {
    pub(super) fn load(
        driver: &D,
        cpu: &Cpu,
        source: &MatrixSource<'_>,
        bias: Option<Vec<f32>>,
    ) -> Result<Self, DeviceError> {
        let MatrixSource { weight_type, shape, bytes, row_order } = *source;
        let dense = |element| DenseMatrix::upload(driver, element, shape, bytes, row_order).map(Weights::Dense);
        let weights = match weight_type {
            WeightType::Blocks(format) => CudaMatrix::upload(driver, cpu, format, shape, bytes, row_order)
                .map(Weights::Packed)
                .map_err(|error| match error {
                    UploadError::Pack(error) => DeviceError::Unsupported(error.to_string()),
                    UploadError::Driver(error) => error.into(),
                })?,
            WeightType::F16 => dense(Element::F16)?,
            WeightType::BF16 => dense(Element::Bf16)?,
            WeightType::F32 => dense(Element::F32)?,
        };
        Ok(Self { weights, bias: bias.map(|bias| driver.upload_floats(&bias)).transpose()? })
    }

    /// Bytes of device memory.
    pub(super) fn bytes(&self) -> usize {
        match &self.weights {
            Weights::Packed(matrix) => matrix.bytes(),
            Weights::Dense(matrix) => matrix.bytes(),
        }
    }

    fn out_features(&self) -> usize {
        match &self.weights {
            Weights::Packed(matrix) => matrix.out_features(),
            Weights::Dense(matrix) => matrix.out_features(),
        }
    }

    /// 0 for none.
    pub(super) fn bias(&self) -> u64 {
        self.bias.as_ref().map_or(0, DeviceMemory::address)
    }
}

impl<D: Driver> Cuda<D> {
    /// Layers that read the `rows` rows of the input, `width` wide, as `(layer, site, out)`; `adapters` are those of the rows,
    /// or 0.
    pub(super) fn run_linears(
        &self,
        layers: &[(&CudaLinear<D>, usize, u64)],
        rows: usize,
        width: usize,
        adapters: u64,
    ) -> Result<(), DeviceError> {
        let StepMemory { buffers, data, .. } = self.step();
        let mut sites = [0; MAX_PRODUCTS];
        for (to, (_, site, _)) in sites.iter_mut().zip(layers) {
            *to = *site as i32;
        }
        let exact = buffers.address(Buffer::Exact);
        let scales_inputs = adapters != 0 && data.needs.scales_inputs;
        let is_dense = layers.iter().any(|(linear, ..)| matches!(linear.weights, Weights::Dense(_)));
        let scaled = if scales_inputs && is_dense { buffers.address(Buffer::ScaledExact) } else { 0 };
        let activations = if scales_inputs {
            self.scale_inputs(layers.len(), sites, (rows, width), adapters, scaled)?
        } else {
            self.activations(rows, width)
        };
        if adapters != 0 {
            let args = ShrinkArgs {
                x: exact,
                adapters,
                t: buffers.address(Buffer::Shrunk),
                x_stride: width as i32,
                num_rows: rows as i32,
                in_features: width as i32,
                t_stride: buffers.rank_stride as i32,
                sites,
                ..ShrinkArgs::default()
            };
            shrink(&self.driver, args, layers.len())?;
        }
        let mut args = GemmArgs {
            activations,
            adapters,
            shrunk: buffers.address(Buffer::Shrunk),
            shrunk_stride: buffers.rank_stride as i32,
            num_products: layers.len() as i32,
            ..GemmArgs::default()
        };
        let mut is_needed = adapters != 0;
        for (number, (product, &(linear, site, out))) in args.products.iter_mut().zip(layers).enumerate() {
            let w = match &linear.weights {
                Weights::Packed(matrix) => {
                    is_needed = true;
                    matrix.matrix()
                }
                Weights::Dense(matrix) => {
                    let own = scaled + (number * rows * width * 4) as u64;
                    let address = if scaled == 0 { exact } else { own };
                    let x = DeviceRows { address, num_rows: rows, stride: width };
                    matrix.multiply(&self.driver, x, linear.bias(), out)?;
                    Matrix { out_features: linear.out_features() as i32, ..Matrix::default() }
                }
            };
            let offset = if scales_inputs { number * rows } else { 0 };
            *product =
                Product { w, bias: linear.bias(), out, site: site as i32, activations_offset_rows: offset as i32 };
        }
        if is_needed { Ok(multiply(&self.driver, &args)?) } else { Ok(()) }
    }

    /// The input `(rows, width)` as each product reads it; also as f32 to `scaled`, unless that is 0.
    fn scale_inputs(
        &self,
        num_products: usize,
        sites: [i32; MAX_PRODUCTS],
        (rows, width): (usize, usize),
        adapters: u64,
        scaled: u64,
    ) -> Result<Activations, DeviceError> {
        let buffers = &self.step().buffers;
        let activations = Activations {
            values: buffers.address(Buffer::ScaledValues),
            meta: buffers.address(Buffer::ScaledMeta),
            stride: activation_stride(width) as i32,
            num_rows: rows as i32,
        };
        let x = buffers.address(Buffer::Exact);
        let args = ScaleArgs { x, scaled, adapters, activations, sites, width: width as i32 };
        scale_quantize(&self.driver, &args, num_products)?;
        Ok(activations)
    }

    /// The logits of rows whose adapter has a head of its own.
    pub(super) fn replace_heads(&self, rows: usize, adapters: u64) -> Result<(), DeviceError> {
        let shape = self.shape();
        let buffers = &self.step().buffers;
        let x = DeviceRows { address: buffers.address(Buffer::Exact), num_rows: rows, stride: shape.hidden_size };
        let logits = buffers.address(Buffer::Logits);
        Ok(multiply_adapter_heads(&self.driver, x, adapters, (shape.vocab_size, shape.hidden_size), logits)?)
    }
}
