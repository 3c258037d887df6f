//! A linear layer of the resident base with room for any row's adapter.

use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use kernels::Cpu;
use kernels::activations::QuantizedRows;
use kernels::gemm::Product;
use kernels::linear::{Deltas, RowDelta, Shrunk};
use kernels::quantized::PackedMatrix;
use mistralrs_quant::{GgufMatMul, QuantMethod, QuantMethodConfig};

use super::AdapterGroup;
use super::gguf::{GgufError, RawTensor};
use super::spec::Module;

/// `y = W x + b`, and for the rows of an adapter what its [`SiteDelta`](crate::adapter::canonical::SiteDelta) adds.
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

    /// Fills `out` where the packed GEMM cannot, and says what is left to do.
    fn product<'a>(&'a self, input: &Activations, out: &'a mut [f32]) -> Result<Product<'a>, candle_core::Error> {
        match &self.weights {
            Weights::Packed(matrix) => Ok(Product { weights: Some(matrix), bias: self.bias.as_deref(), out }),
            Weights::Method(method) => {
                // Row by row: a library's GEMM may sum in another order for another number of rows, and a row must have
                // the same bits in any batch.
                let width = input.quantized.width();
                for (x, out) in input.exact.chunks_exact(width).zip(out.chunks_exact_mut(self.out_features)) {
                    let y = method.forward(&Tensor::from_slice(x, (1, width), &Device::Cpu)?)?.flatten_all()?;
                    out.copy_from_slice(&y.to_vec1::<f32>()?);
                    for (y, b) in out.iter_mut().zip(self.bias.iter().flatten()) {
                        *y += b;
                    }
                }
                Ok(Product { weights: None, bias: None, out })
            }
        }
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

/// The layers that read the same activations, run for all rows of a step: at most four.
pub struct LinearCall<'a> {
    pub layer: usize,
    pub groups: &'a [AdapterGroup],
    pub cpu: &'a Cpu,
}

impl LinearCall<'_> {
    /// Writes `[rows, out_features]` of each layer to its `outs`.
    pub fn run<const N: usize>(
        &self,
        layers: [(&AdaptedLinear, Module); N],
        input: &Activations,
        outs: [&mut [f32]; N],
        shrunk: &mut Shrunk,
    ) -> Result<(), candle_core::Error> {
        let num_rows = input.quantized.num_rows();
        let modules = layers.map(|(_, module)| module);
        let mut outs = outs.into_iter();
        let mut failure = None;
        let mut products = layers.map(|(linear, _)| {
            let out = outs.next().unwrap_or_default();
            let out = &mut out[..num_rows * linear.out_features];
            linear.product(input, out).unwrap_or_else(|e| {
                failure = Some(e);
                Product { weights: None, bias: None, out: &mut [] }
            })
        });
        if let Some(e) = failure {
            return Err(e);
        }
        let Self { layer, groups, cpu } = *self;
        let get = |i: usize| {
            let (product, group) = (i % N, &groups[i / N]);
            let delta = group.adapter.site(layer, modules[product])?;
            Some(RowDelta {
                product,
                rows: group.rows.clone(),
                low_rank: delta.low_rank.as_ref(),
                bias: delta.bias.as_deref(),
            })
        };
        let deltas = Deltas { count: groups.len() * N, get: &get };
        kernels::linear::run(cpu, &input.quantized, &input.exact, &mut products, &deltas, shrunk);
        Ok(())
    }
}
