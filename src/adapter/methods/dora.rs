//! DoRA (Liu et al. 2024): `y = g ∘ ((W + s·BA) x) + b` with `g = m / ‖W + s·BA‖` per row, constant once trained.

use half::f16;
use half::slice::HalfFloatSliceExt;
use kernels::Isa;
use kernels::merged_norm::merged_norm;

use crate::adapter::error::AdapterError;
use crate::adapter::sites::{Site, module_path};
use crate::model::BaseWeights;

/// A site's low-rank pair as trained: `a` `[rank, in]`, `b` `[out, rank]`.
pub(super) struct Pair<'a> {
    pub rank: usize,
    pub scale: f32,
    pub a: &'a [f16],
    pub b: &'a [f16],
}

/// What the outputs are multiplied by, and what is added afterwards so that the base's bias stays as it is: `[out]` each.
///
/// # Errors
/// When a row of the merged weight has no direction, or the base cannot be read.
pub(super) fn output_scale_and_bias(
    magnitude: &[f32],
    pair: &Pair<'_>,
    (layer, module): Site,
    base: &dyn BaseWeights,
) -> Result<(Vec<f32>, Option<Vec<f32>>), AdapterError> {
    let (in_features, _) = base.spec().module_shape(module);
    let isa = Isa::detect();
    let a = pair.a.to_f32_vec();
    let mut row = vec![0.0; in_features];
    let mut scaled_b = vec![0.0; pair.rank];
    let mut scale = Vec::with_capacity(magnitude.len());
    for (index, (magnitude, b)) in magnitude.iter().zip(pair.b.chunks_exact(pair.rank)).enumerate() {
        base.dequantize_row(layer, module, index, &mut row)?;
        b.convert_to_f32_slice(&mut scaled_b);
        scaled_b.iter_mut().for_each(|b| *b *= pair.scale);
        let factor = magnitude / merged_norm(isa, &row, &a, &scaled_b);
        if !factor.is_finite() {
            let path = module_path(layer, module);
            return Err(AdapterError::Sites(format!("row {index} of the weight at {path} with its delta has no norm")));
        }
        scale.push(factor);
    }
    let bias = base.bias(layer, module)?;
    let bias = bias.map(|bias| bias.iter().zip(&scale).map(|(b, g)| (1.0 - g) * b).collect());
    Ok((scale, bias))
}
