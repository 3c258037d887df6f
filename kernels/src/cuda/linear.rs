//! Linear layers in device memory, and what the adapters of a step do to them.

use crate::Cpu;
use crate::device::{DeviceError, MatrixSource};
use crate::quantized::{ROWS_PER_TILE, WeightType};

use super::activations::{ScaleArgs, scale_quantize};
use super::args::Activations;
use super::buffers::Buffer;
use super::dense::{DenseMatrix, DeviceRows, Element, multiply_adapter_heads};
use super::driver::{DeviceMemory, Driver};
use super::gemm::{GemmArgs, GemmKernel, MAX_PRODUCTS, Product, multiply};
use super::low_rank::{ShrinkArgs, shrink};
use super::matrix::{CudaMatrix, Matrix, UploadError};
use super::{Cuda, StepMemory};

/// The weights and the bias of a linear layer, or the weights of those of all experts.
#[derive(Debug)]
pub struct CudaLinear<D: Driver> {
    weights: Weights<D>,
    /// How many matrices lie one below the other.
    count: usize,
    /// f32 `[out_features]`
    bias: Option<D::Memory>,
}

#[derive(Debug)]
enum Weights<D: Driver> {
    Packed(CudaMatrix<D::Memory>),
    Dense(DenseMatrix<D::Memory>),
}

/// What linear layers read.
#[derive(Debug, Clone, Copy)]
pub(super) struct Input {
    /// f32 `[rows, width]`
    pub exact: u64,
    /// The same as int8.
    pub activations: Activations,
    pub width: usize,
    /// Tables of the rows' adapters, or 0.
    pub adapters: u64,
    /// Where the layers are those of experts.
    pub by_expert: Option<ByExpert>,
}

/// Which row goes to which expert.
#[derive(Debug, Clone, Copy)]
pub(super) struct ByExpert {
    /// i32 `[rows]`
    pub experts: u64,
    /// [`RowGroup`](super::args::RowGroup) `[num_groups]`
    pub groups: u64,
    pub num_groups: usize,
    pub kernel: GemmKernel,
}

impl<D: Driver> CudaLinear<D> {
    pub(super) fn load(
        driver: &D,
        cpu: &Cpu,
        source: &MatrixSource<'_>,
        bias: Option<Vec<f32>>,
    ) -> Result<Self, DeviceError> {
        Self::load_stack(driver, cpu, source, bias, 1)
    }

    /// `count` matrices, one below the other.
    pub(super) fn load_stack(
        driver: &D,
        cpu: &Cpu,
        source: &MatrixSource<'_>,
        bias: Option<Vec<f32>>,
        count: usize,
    ) -> Result<Self, DeviceError> {
        let MatrixSource { weight_type, shape, bytes, row_order } = *source;
        let out_features = shape.0 / count;
        if count > 1 && matches!(weight_type, WeightType::Blocks(_)) && !out_features.is_multiple_of(ROWS_PER_TILE) {
            return Err(DeviceError::Unsupported(format!(
                "the CUDA device takes quantized experts of a multiple of {ROWS_PER_TILE} outputs, not {out_features}"
            )));
        }
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
        Ok(Self { weights, count, bias: bias.map(|bias| driver.upload_floats(&bias)).transpose()? })
    }

    /// Bytes of device memory.
    pub(super) fn bytes(&self) -> usize {
        match &self.weights {
            Weights::Packed(matrix) => matrix.bytes(),
            Weights::Dense(matrix) => matrix.bytes(),
        }
    }

    /// Of each matrix.
    fn out_features(&self) -> usize {
        let all = match &self.weights {
            Weights::Packed(matrix) => matrix.out_features(),
            Weights::Dense(matrix) => matrix.out_features(),
        };
        all / self.count
    }

    /// 0 for none.
    pub(super) fn bias(&self) -> u64 {
        self.bias.as_ref().map_or(0, DeviceMemory::address)
    }
}

impl<D: Driver> Cuda<D> {
    /// What norm, attention or activation left for the next linear layers.
    pub(super) fn input(&self, rows: usize, width: usize, adapters: u64) -> Input {
        let exact = self.step().buffers.address(Buffer::Exact);
        Input { exact, activations: self.activations(rows, width), width, adapters, by_expert: None }
    }

    /// Layers that read the same input, as `(layer, site, out)`; of experts, the site of the first.
    pub(super) fn run_linears(&self, layers: &[(&CudaLinear<D>, usize, u64)], input: Input) -> Result<(), DeviceError> {
        let Input { exact, activations, width, adapters, by_expert } = input;
        let rows = activations.num_rows as usize;
        let StepMemory { buffers, data, .. } = self.step();
        let mut sites = [0; MAX_PRODUCTS];
        for (to, (_, site, _)) in sites.iter_mut().zip(layers) {
            *to = *site as i32;
        }
        let scales_inputs = adapters != 0 && data.needs.scales_inputs;
        let is_dense = layers.iter().any(|(linear, ..)| matches!(linear.weights, Weights::Dense(_)));
        let scaled = if scales_inputs && is_dense { buffers.address(Buffer::ScaledExact) } else { 0 };
        let activations =
            if scales_inputs { self.scale_inputs(layers.len(), sites, input, scaled)? } else { activations };
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
            groups: by_expert.map_or(0, |by_expert| by_expert.groups),
            num_groups: by_expert.map_or(0, |by_expert| by_expert.num_groups as i32),
            ..GemmArgs::default()
        };
        let mut is_needed = adapters != 0;
        for (number, (product, &(linear, site, out))) in args.products.iter_mut().zip(layers).enumerate() {
            let out_features = linear.out_features() as i32;
            let w = match &linear.weights {
                Weights::Packed(matrix) => {
                    is_needed = true;
                    Matrix { out_features, ..matrix.matrix() }
                }
                Weights::Dense(matrix) => {
                    let own = scaled + (number * rows * width * 4) as u64;
                    let address = if scaled == 0 { exact } else { own };
                    let x = DeviceRows { address, num_rows: rows, stride: width };
                    let experts = by_expert.map_or(0, |by_expert| by_expert.experts);
                    matrix.multiply_by_expert(&self.driver, x, (linear.count, experts), linear.bias(), out)?;
                    Matrix { out_features, ..Matrix::default() }
                }
            };
            let offset = if scales_inputs { number * rows } else { 0 };
            *product =
                Product { w, bias: linear.bias(), out, site: site as i32, activations_offset_rows: offset as i32 };
        }
        if !is_needed {
            return Ok(());
        }
        match by_expert {
            None => multiply(&self.driver, &args)?,
            Some(ByExpert { kernel, .. }) => kernel.launch(&self.driver, &args)?,
        }
        Ok(())
    }

    /// The input as each product reads it; also as f32 to `scaled`, unless that is 0.
    fn scale_inputs(
        &self,
        num_products: usize,
        sites: [i32; MAX_PRODUCTS],
        Input { exact: x, activations, width, adapters, .. }: Input,
        scaled: u64,
    ) -> Result<Activations, DeviceError> {
        let buffers = &self.step().buffers;
        let activations = Activations {
            values: buffers.address(Buffer::ScaledValues),
            meta: buffers.address(Buffer::ScaledMeta),
            ..activations
        };
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
