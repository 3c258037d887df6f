//! A linear layer of the resident base with room for any row's adapter.

use std::ops::Range;
use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use kernels::Cpu;
use kernels::activations::QuantizedRows;
use kernels::elementwise::scale_quantize;
use kernels::gemm::Product;
use kernels::linear::{Deltas, RowDelta, Shrunk};
use kernels::quantized::PackedMatrix;
use mistralrs_quant::{GgufMatMul, QuantMethod, QuantMethodConfig};

use super::gguf::{GgufError, RawTensor};
use crate::adapter::canonical::SiteDelta;

/// `y = W x + b`, and for the rows of an adapter what its [`SiteDelta`] makes of it.
#[derive(Debug)]
pub struct AdaptedLinear {
    weights: Weights,
    out_features: usize,
    /// `[out_features]`
    bias: Option<Vec<f32>>,
}

#[derive(Debug)]
enum Weights {
    /// The packed GEMM: every quantized type of GGUF.
    Packed(PackedMatrix),
    /// What the packed GEMM does not know (F16, BF16, F32).
    Method(Arc<dyn QuantMethod>),
}

/// The activations of a call, as they are and as the packed GEMM wants them.
#[derive(Debug, Default)]
pub struct Activations {
    /// `[rows, width]`; may be longer.
    pub exact: Vec<f32>,
    pub quantized: QuantizedRows,
}

impl AdaptedLinear {
    /// Takes over a matrix `[out_features, in_features]`; `row_order` as in [`PackedMatrix::pack`].
    pub fn load(
        cpu: &Cpu,
        tensor: &RawTensor<'_>,
        row_order: Option<&[usize]>,
        bias: Option<Vec<f32>>,
    ) -> Result<Self, GgufError> {
        let (out_features, in_features) = (tensor.shape[0], tensor.shape[1]);
        let weights = match tensor.block_format() {
            Some(format) => PackedMatrix::pack(cpu, format, (out_features, in_features), tensor.bytes, row_order)
                .map(Weights::Packed)
                .map_err(|e| GgufError::Unsupported(e.to_string()))?,
            None => Weights::Method(quant_method(tensor, row_order)?),
        };
        let bias = match (bias, row_order) {
            (Some(bias), Some(order)) => Some(order.iter().map(|&row| bias[row]).collect()),
            (bias, _) => bias,
        };
        Ok(Self { weights, out_features, bias })
    }

    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// Bytes of the packed weights; 0 for a layer that `QuantMethod` holds.
    pub fn packed_bytes(&self) -> usize {
        match &self.weights {
            Weights::Packed(matrix) => matrix.bytes(),
            Weights::Method(_) => 0,
        }
    }

    /// Says what the packed GEMM has to do for `product`, and does at once what it cannot.
    fn fill<'a>(&'a self, input: &Activations, product: &mut Product<'a>) -> Result<(), candle_core::Error> {
        match &self.weights {
            Weights::Packed(matrix) => {
                product.weights = Some(matrix);
                product.bias = self.bias.as_deref();
            }
            Weights::Method(method) => {
                // Row by row: a library's GEMM may sum in another order for another number of rows, and a row must have
                // the same bits in any batch.
                let width = input.quantized.width();
                let rows = input.exact.chunks_exact(width).zip(product.out.chunks_exact_mut(self.out_features));
                for (x, out) in rows {
                    let y = method.forward(&Tensor::from_slice(x, (1, width), &Device::Cpu)?)?.flatten_all()?;
                    out.copy_from_slice(&y.to_vec1::<f32>()?);
                    for (y, b) in out.iter_mut().zip(self.bias.iter().flatten()) {
                        *y += b;
                    }
                }
            }
        }
        Ok(())
    }
}

/// The library's layer for an unquantized matrix, held in f32.
fn quant_method(tensor: &RawTensor<'_>, row_order: Option<&[usize]>) -> Result<Arc<dyn QuantMethod>, GgufError> {
    let (out_features, in_features) = (tensor.shape[0], tensor.shape[1]);
    let mut rows = vec![0.0; out_features * in_features];
    for (i, row) in rows.chunks_exact_mut(in_features).enumerate() {
        tensor.dequantize_row(row_order.map_or(i, |order| order[i]), row);
    }
    let build = || -> candle_core::Result<GgufMatMul> {
        let rows = Tensor::from_vec(rows, (out_features, in_features), &Device::Cpu)?;
        let q_weight = Arc::new(QTensor::quantize(&rows, GgmlDType::F32)?);
        GgufMatMul::new(QuantMethodConfig::Gguf { q_weight, b: None })
    };
    Ok(Arc::new(build().map_err(|e| GgufError::Unsupported(e.to_string()))?))
}

/// What lies between the regions of a call; reused from call to call.
#[derive(Debug, Default)]
pub struct LinearBuffers {
    shrunk: Shrunk,
    /// The activations of a layer whose input an adapter scales.
    scaled: Activations,
}

/// What the adapters of a batch do to the layers of a call: `get(group, layer)` gives the rows and the delta of adapter
/// group `group` in `0..num_groups` at the call's layer number `layer`, if it changes that one.
pub struct SiteDeltas<'a> {
    pub num_groups: usize,
    pub get: &'a (dyn Fn(usize, usize) -> Option<(Range<usize>, &'a SiteDelta)> + Sync),
}

impl std::fmt::Debug for SiteDeltas<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SiteDeltas").field("num_groups", &self.num_groups).finish_non_exhaustive()
    }
}

/// Runs layers that read the same activations, at most four, for all rows of a step: writes `[rows, out_features]` of each
/// to its `outs`.
///
/// A layer whose input an adapter scales in this batch has activations of its own, and so is a region of its own.
pub fn run<const N: usize>(
    cpu: &Cpu,
    layers: [&AdaptedLinear; N],
    deltas: &SiteDeltas<'_>,
    input: &Activations,
    outs: [&mut [f32]; N],
    buffers: &mut LinearBuffers,
) -> Result<(), candle_core::Error> {
    let num_rows = input.quantized.num_rows();
    let LinearBuffers { shrunk, scaled } = buffers;
    let row_delta = |group: usize, layer: usize, product: usize| {
        let (rows, SiteDelta { low_rank, output_scale, bias, .. }) = (deltas.get)(group, layer)?;
        let (low_rank, output_scale, bias) = (low_rank.as_ref(), output_scale.as_deref(), bias.as_deref());
        let changes = low_rank.is_some() || output_scale.is_some() || bias.is_some();
        changes.then_some(RowDelta { product, rows, low_rank, output_scale, bias })
    };
    let mut is_done = [false; N];
    let mut products: [Product<'_>; N] = outs.map(|out| Product { weights: None, bias: None, out });
    for (i, (layer, product)) in layers.into_iter().zip(&mut products).enumerate() {
        let out = std::mem::take(&mut product.out);
        product.out = &mut out[..num_rows * layer.out_features];
        is_done[i] = deltas.scale_input(cpu, i, input, scaled);
        layer.fill(if is_done[i] { scaled } else { input }, product)?;
        if is_done[i] {
            let deltas = Deltas { count: deltas.num_groups, get: &|group| row_delta(group, i, 0) };
            let own = Product { out: &mut *product.out, ..*product };
            kernels::linear::run(cpu, &scaled.quantized, &input.exact, &mut [own], &deltas, shrunk);
            product.weights = None;
        }
    }
    let get = |i: usize| if is_done[i % N] { None } else { row_delta(i / N, i % N, i % N) };
    let deltas = Deltas { count: deltas.num_groups * N, get: &get };
    kernels::linear::run(cpu, &input.quantized, &input.exact, &mut products, &deltas, shrunk);
    Ok(())
}

impl SiteDeltas<'_> {
    /// Fills `scaled` with the activations of layer `layer` and says so, if any adapter scales its input.
    fn scale_input(&self, cpu: &Cpu, layer: usize, input: &Activations, scaled: &mut Activations) -> bool {
        let scale = |group: usize| {
            let (rows, delta) = (self.get)(group, layer)?;
            Some((rows, delta.input_scale.as_deref()?))
        };
        if !(0..self.num_groups).any(|group| scale(group).is_some()) {
            return false;
        }
        let shape = (input.quantized.num_rows(), input.quantized.width());
        scaled.exact.resize(scaled.exact.len().max(shape.0 * shape.1), 0.0);
        let scale_of = |row: usize| (0..self.num_groups).filter_map(scale).find(|(rows, _)| rows.contains(&row));
        let scale_of = |row: usize| scale_of(row).map(|(_, scale)| scale);
        scale_quantize(cpu, shape, &input.exact, &scale_of, &mut scaled.exact, &mut scaled.quantized);
        true
    }
}
