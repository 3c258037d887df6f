//! A linear layer of the resident base with room for any row's adapter.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use super::Activations;
use super::experts::PartOfExperts;
use crate::Cpu;
use crate::canonical::SiteDelta;
use crate::device::{DeviceError, MatrixSource};
use crate::elementwise::scale_quantize;
use crate::gemm::{Product, RowGroups, Weights as Matrices};
use crate::linear::{Deltas, RowDelta, Shrunk};
use crate::quantized::{PackedMatrix, WeightType};

/// A matrix that somebody else multiplies with.
pub trait RowProduct: fmt::Debug + Send + Sync {
    /// `y = W x` for one row: `x` is `[in_features]`, `y` `[out_features]`.
    ///
    /// # Errors
    /// When it cannot be computed, in words.
    fn multiply_row(&self, x: &[f32], y: &mut [f32]) -> Result<(), String>;
}

/// Takes over a matrix that the packed GEMM does not know (F16, BF16, F32).
pub type Unquantized = fn(&MatrixSource<'_>) -> Result<Arc<dyn RowProduct>, String>;

/// `y = W x + b`, and for the rows of an adapter what its [`SiteDelta`] makes of it.
#[derive(Debug)]
pub struct HostLinear {
    weights: Weights,
    out_features: usize,
    /// `[out_features]`
    bias: Option<Vec<f32>>,
    /// Of the weights in memory.
    bytes: usize,
}

#[derive(Debug)]
enum Weights {
    /// The packed GEMM: every quantized type of GGUF.
    Packed(PackedMatrix),
    Unquantized(Arc<dyn RowProduct>),
}

impl HostLinear {
    pub(super) fn bias(&self) -> Option<&[f32]> {
        self.bias.as_deref()
    }

    /// The bias is in the order of the rows as they become.
    pub(super) fn load(
        cpu: &Cpu,
        unquantized: Unquantized,
        source: &MatrixSource<'_>,
        bias: Option<Vec<f32>>,
    ) -> Result<Self, DeviceError> {
        let weights = match source.weight_type {
            WeightType::Blocks(format) => PackedMatrix::pack(cpu, format, source.shape, source.bytes, source.row_order)
                .map(Weights::Packed)
                .map_err(|e| DeviceError::Unsupported(e.to_string()))?,
            _ => Weights::Unquantized(unquantized(source).map_err(DeviceError::Unsupported)?),
        };
        let bytes = super::weight_bytes(source.weight_type, source.shape);
        Ok(Self { weights, out_features: source.shape.0, bias, bytes })
    }

    /// Of the weights in memory.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The weights, if the packed GEMM multiplies by them.
    fn packed(&self) -> Option<&PackedMatrix> {
        match &self.weights {
            Weights::Packed(matrix) => Some(matrix),
            Weights::Unquantized(_) => None,
        }
    }

    /// Multiplies `rows` of the input by weights that somebody else holds, if it has such.
    ///
    /// Row by row: a library's GEMM may sum in another order for another number of rows, and a row must have the same bits in
    /// any batch.
    fn multiply_unquantized(
        &self,
        input: &Activations,
        rows: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), DeviceError> {
        let Weights::Unquantized(matrix) = &self.weights else { return Ok(()) };
        let (width, out_features) = (input.quantized.width(), self.out_features);
        for row in rows {
            let out = &mut out[row * out_features..][..out_features];
            matrix.multiply_row(&input.exact[row * width..][..width], out).map_err(DeviceError::BaseLayer)?;
            out.iter_mut().zip(self.bias.iter().flatten()).for_each(|(y, b)| *y += b);
        }
        Ok(())
    }
}

/// What the rows of a call go through.
#[derive(Debug, Clone, Copy)]
pub(super) enum Layer<'a> {
    /// All through one.
    One(&'a HostLinear),
    /// Each through that of its expert.
    ByExpert(&'a PartOfExperts<'a>),
}

impl RowGroups for PartOfExperts<'_> {
    fn count(&self) -> usize {
        self.num_active()
    }

    fn get(&self, group: usize) -> (Range<usize>, &PackedMatrix) {
        let (rows, linear) = self.active(group);
        (rows, linear.packed().expect("the experts of a block are of one type"))
    }
}

impl<'a> Layer<'a> {
    fn first(self) -> &'a HostLinear {
        match self {
            Self::One(linear) => linear,
            Self::ByExpert(experts) => experts.active(0).1,
        }
    }

    /// Says what the packed GEMM has to do for `product`, and does at once what it cannot.
    fn fill(self, input: &Activations, product: &mut Product<'a>) -> Result<(), DeviceError> {
        match self {
            Self::One(linear) => {
                product.weights = linear.packed().map(Matrices::One);
                product.bias = linear.bias.as_deref();
                linear.multiply_unquantized(input, 0..input.quantized.num_rows(), product.out)
            }
            Self::ByExpert(experts) => {
                product.weights = self.first().packed().map(|_| Matrices::ByGroup(experts));
                (0..experts.num_active()).try_for_each(|number| {
                    let (rows, linear) = experts.active(number);
                    linear.multiply_unquantized(input, rows, product.out)
                })
            }
        }
    }
}

/// What lies between the regions of a call; reused from call to call.
#[derive(Debug, Default)]
pub(super) struct LinearBuffers {
    shrunk: Shrunk,
    /// The activations of a layer whose input an adapter scales.
    scaled: Activations,
}

/// What the adapters of a batch do to the layers of a call: `get(group, layer)` gives the rows and the delta of adapter
/// group `group` in `0..num_groups` at the call's layer number `layer`, if it changes that one.
pub(super) struct SiteDeltas<'a> {
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
pub(super) fn run<const N: usize>(
    cpu: &Cpu,
    layers: [Layer<'_>; N],
    deltas: &SiteDeltas<'_>,
    input: &Activations,
    outs: [&mut [f32]; N],
    buffers: &mut LinearBuffers,
) -> Result<(), DeviceError> {
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
    for (i, (layer, product)) in layers.iter().zip(&mut products).enumerate() {
        let out = std::mem::take(&mut product.out);
        product.out = &mut out[..num_rows * layer.first().out_features];
        is_done[i] = deltas.scale_input(cpu, i, input, scaled);
        layer.fill(if is_done[i] { scaled } else { input }, product)?;
        if is_done[i] {
            let deltas = Deltas { count: deltas.num_groups, get: &|group| row_delta(group, i, 0) };
            let own = Product { out: &mut *product.out, ..*product };
            crate::linear::run(cpu, &scaled.quantized, &input.exact, &mut [own], &deltas, shrunk);
            product.weights = None;
        }
    }
    let get = |i: usize| if is_done[i % N] { None } else { row_delta(i / N, i % N, i % N) };
    let deltas = Deltas { count: deltas.num_groups * N, get: &get };
    crate::linear::run(cpu, &input.quantized, &input.exact, &mut products, &deltas, shrunk);
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
