//! LoRA (Hu et al. 2021), rsLoRA and DoRA: `y = W x + b + s·B(A x)`, with `lora_bias` also `+ s·bias_B`; on the embedding
//! `E[x] + s·(Aᵀ[x])Bᵀ`; or a head saved whole.
//!
//! A is `[rank, in]`, B is `[out, rank]`, bias_B and the magnitude are `[out]`.

use std::sync::Arc;

use half::f16;
use half::slice::HalfFloatSliceExt;
use kernels::half_matrix::HalfMatrix;
use kernels::low_rank::LowRank;

use super::all_sites;
use super::dora::{self, Pair};
use super::experts::FusedPair;
use crate::adapter::canonical::{Adapter, AdapterWeights, EmbeddingDelta, HeadDelta, Method, SiteDelta};
use crate::adapter::error::AdapterError;
use crate::adapter::peft_config::LoraConfig;
use crate::adapter::sites::{EMBEDDING_PATH, HEAD_PATH, Site, Targets, module_path};
use crate::adapter::tensors::{NamedTensor, Tensors, scaled_f16};
use crate::model::BaseWeights;
use crate::model::spec::ModelSpec;

/// Turns every tensor of the file into the delta of a site.
///
/// # Errors
/// When a tensor finds no place, or the sites of the file are not exactly those of the configuration, or a tensor has
/// the wrong shape, rank or type or a value that is not finite.
pub fn load(config: &LoraConfig, tensors: Tensors<'_>, base: &dyn BaseWeights) -> Result<Adapter, AdapterError> {
    let spec = base.spec();
    let mut expected = config.selector.targets(spec)?;
    // PEFT adapts nothing within what it saves whole, whatever names it.
    expected.head &= !config.replaces_head;
    if config.use_dora && (expected.embedding || expected.head) {
        return Err(AdapterError::field("use_dora", "not supported on the embedding or the head"));
    }
    if config.lora_bias && expected.embedding {
        return Err(AdapterError::field("lora_bias", "not defined on the embedding"));
    }
    let placed = Placed::of(tensors, spec)?;
    if config.replaces_head && placed.head.is_some() {
        let reason =
            "lm_head is to be saved whole, and the file holds a low-rank pair for it too: take one of the two out";
        return Err(AdapterError::field("modules_to_save", reason));
    }
    let mut found = Targets {
        sites: placed.sites.iter().map(|(site, _)| *site).collect(),
        embedding: placed.embedding_a.is_some() || placed.embedding_b.is_some(),
        head: placed.head.is_some(),
    };

    let mut weights = AdapterWeights::default();
    for (site, tensors) in &placed.sites {
        let (layer, module) = *site;
        let path = config.selector.named_path(spec, *site);
        let delta = tensors.delta(config, &path, spec.module_shape(module), Some((*site, base)))?;
        weights.set_site(layer, module.index(), delta);
    }
    for pair in &placed.experts {
        for ((layer, module), delta) in pair.deltas(config, spec)? {
            if !found.sites.insert((layer, module)) {
                return Err(AdapterError::tensor(pair.key(), "belongs where other tensors of the experts do"));
            }
            weights.set_site(layer, module.index(), delta);
        }
    }
    let embedding = found.embedding.then(|| placed.embedding_delta(config, spec)).transpose()?;
    let shape = (spec.hidden_size, spec.vocab_size);
    let head = placed.head.as_ref().map(|tensors| tensors.delta(config, HEAD_PATH, shape, None)).transpose()?;
    expected.check_found(&found)?;
    let head = match (&placed.saved_head, config.replaces_head) {
        (None, false) => head.map(HeadDelta::Delta),
        (Some(saved), true) => {
            saved.check_shape(&[spec.vocab_size, spec.hidden_size])?;
            Some(HeadDelta::Replaced(HalfMatrix::pack(spec.vocab_size, spec.hidden_size, &saved.f16_values()?)))
        }
        (None, true) => return Err(incomplete(HEAD_PATH, "weight (field modules_to_save)")),
        (Some(saved), false) => return Err(AdapterError::tensor(saved.key, "field modules_to_save does not name it")),
    };
    let method = match (config.use_dora, config.use_rslora) {
        (true, _) => Method::Dora,
        (false, true) => Method::RsLora,
        (false, false) => Method::Lora,
    };
    (weights.embedding, weights.head) = (embedding, head);
    Ok(Adapter { method, weights: Arc::new(weights), ..Adapter::default() })
}

/// What the file holds for one linear layer.
struct SiteTensors<'a> {
    lora_a: Option<NamedTensor<'a>>,
    lora_b: Option<NamedTensor<'a>>,
    bias: Option<NamedTensor<'a>>,
    magnitude: Option<NamedTensor<'a>>,
}

/// Every tensor of the file at its place.
struct Placed<'a> {
    sites: Vec<(Site, SiteTensors<'a>)>,
    experts: Vec<FusedPair<'a>>,
    head: Option<SiteTensors<'a>>,
    saved_head: Option<NamedTensor<'a>>,
    embedding_a: Option<NamedTensor<'a>>,
    embedding_b: Option<NamedTensor<'a>>,
}

impl<'a> Placed<'a> {
    fn of(mut tensors: Tensors<'a>, spec: &ModelSpec) -> Result<Self, AdapterError> {
        let site = |site: Site| Some((site, SiteTensors::take(&mut tensors, &module_path(site.0, site.1))?));
        let sites = all_sites(spec).filter_map(site).collect();
        let placed = Self {
            sites,
            experts: FusedPair::take_all(&mut tensors, spec)?,
            head: SiteTensors::take(&mut tensors, HEAD_PATH),
            saved_head: tensors.take_of(HEAD_PATH, "weight"),
            embedding_a: tensors.take_of(EMBEDDING_PATH, "lora_embedding_A"),
            embedding_b: tensors.take_of(EMBEDDING_PATH, "lora_embedding_B"),
        };
        tensors.refuse_rest()?;
        Ok(placed)
    }

    fn embedding_delta(&self, config: &LoraConfig, spec: &ModelSpec) -> Result<EmbeddingDelta, AdapterError> {
        let missing = |part| incomplete(EMBEDDING_PATH, part);
        let a = self.embedding_a.as_ref().ok_or_else(|| missing("lora_embedding_A"))?;
        let b = self.embedding_b.as_ref().ok_or_else(|| missing("lora_embedding_B"))?;
        let (rank, scale) = (config.rank(EMBEDDING_PATH)?, config.scale(EMBEDDING_PATH)?);
        a.check_rank(0, spec.vocab_size, rank)?;
        b.check_rank(1, spec.hidden_size, rank)?;
        let HalfPair { a, b, scale } = HalfPair::of(a, b, scale)?;
        let b = b.to_f32_vec();
        Ok(EmbeddingDelta {
            rank,
            a: (0..spec.vocab_size).flat_map(|token| a[token..].iter().step_by(spec.vocab_size)).copied().collect(),
            b: (0..rank).flat_map(|r| b[r..].iter().step_by(rank)).map(|value| scale * value).collect(),
        })
    }
}

impl<'a> SiteTensors<'a> {
    /// `None` if the file holds nothing for the module at this path.
    fn take(tensors: &mut Tensors<'a>, path: &str) -> Option<Self> {
        let mut take = |name| tensors.take_of(path, name);
        let site = Self {
            lora_a: take("lora_A.weight"),
            lora_b: take("lora_B.weight"),
            bias: take("lora_B.bias"),
            magnitude: take("lora_magnitude_vector"),
        };
        let all = [&site.lora_a, &site.lora_b, &site.bias, &site.magnitude];
        all.iter().any(|tensor| tensor.is_some()).then_some(site)
    }

    /// The delta of a layer of `(in, out)` features; `base` is where a magnitude finds the weight that it belongs to.
    fn delta(
        &self,
        config: &LoraConfig,
        path: &str,
        (in_features, out_features): (usize, usize),
        base: Option<(Site, &dyn BaseWeights)>,
    ) -> Result<SiteDelta, AdapterError> {
        let lora_a = self.lora_a.as_ref().ok_or_else(|| incomplete(path, "lora_A.weight"))?;
        let lora_b = self.lora_b.as_ref().ok_or_else(|| incomplete(path, "lora_B.weight"))?;
        let (rank, scale) = (config.rank(path)?, config.scale(path)?);
        lora_a.check_rank(0, in_features, rank)?;
        lora_b.check_rank(1, out_features, rank)?;
        let vector = |tensor: &Option<NamedTensor<'_>>, name: &str, field: &str, is_expected: bool| match tensor {
            None if is_expected => Err(incomplete(path, &format!("{name} (field {field} is true)"))),
            Some(tensor) if !is_expected => Err(AdapterError::tensor(tensor.key, format!("field {field} is not true"))),
            Some(tensor) => {
                tensor.check_shape(&[out_features])?;
                Ok(Some(tensor.f16_values()?.to_f32_vec()))
            }
            None => Ok(None),
        };
        let bias = vector(&self.bias, "lora_B.bias", "lora_bias", config.lora_bias)?;
        let magnitude = vector(&self.magnitude, "lora_magnitude_vector", "use_dora", config.use_dora)?;

        let bias = bias.map(|bias| bias.into_iter().map(|value| scale * value).collect());
        let HalfPair { a, b, scale } = HalfPair::of(lora_a, lora_b, scale)?;
        let low_rank = Some(LowRank::pack(rank, in_features, out_features, scale, &a, &b));
        let (output_scale, bias) = match (magnitude, base) {
            (Some(magnitude), Some((site, base))) => {
                let pair = Pair { rank, scale, a: &a, b: &b };
                let (output_scale, bias) = dora::output_scale_and_bias(&magnitude, &pair, site, base)?;
                (Some(output_scale), bias)
            }
            _ => (None, bias),
        };
        Ok(SiteDelta { low_rank, output_scale, bias, ..SiteDelta::default() })
    }
}

/// A pair as f16 holds it best, and the scale that belongs to it then.
pub(super) struct HalfPair {
    pub a: Vec<f16>,
    pub b: Vec<f16>,
    pub scale: f32,
}

impl HalfPair {
    /// # Errors
    /// When a value is not finite, or the product of scale and weights is beyond the range of 32-bit floats.
    pub fn of(a: &NamedTensor<'_>, b: &NamedTensor<'_>, scale: f32) -> Result<Self, AdapterError> {
        Self::of_scaled(a.scaled_f16_values()?, b.scaled_f16_values()?, scale)
            .ok_or_else(|| AdapterError::tensor(b.key, "times its scale is beyond the range of 32-bit floats"))
    }

    /// Of values that are no tensors of a file; `None` where one is not finite.
    pub fn of_values(a: Vec<f32>, b: Vec<f32>) -> Option<Self> {
        let are_finite = |values: &[f32]| values.iter().all(|value| value.is_finite());
        if are_finite(&a) && are_finite(&b) { Self::of_scaled(scaled_f16(a), scaled_f16(b), 1.0) } else { None }
    }

    /// For a layer of `(in, out)` features, with a factor for each rank beside the scale.
    ///
    /// # Errors
    /// When a factor is not finite, or is not when it is multiplied by the scale.
    pub fn pack(
        &self,
        of_ranks: &NamedTensor<'_>,
        (in_features, out_features): (usize, usize),
    ) -> Result<LowRank, AdapterError> {
        let scales: Vec<f32> = of_ranks.f32_values()?.into_iter().map(|factor| self.scale * factor).collect();
        if !scales.iter().all(|scale| scale.is_finite()) {
            return Err(AdapterError::tensor(of_ranks.key, "times its scale is beyond the range of 32-bit floats"));
        }
        Ok(LowRank::pack_scaled(&scales, in_features, out_features, &self.a, &self.b))
    }

    /// `None` when the product of scales and weights is beyond the range of 32-bit floats.
    fn of_scaled((a, scale_of_a): (Vec<f16>, f32), (b, scale_of_b): (Vec<f16>, f32), scale: f32) -> Option<Self> {
        // Of both at once: one alone may be beyond the range.
        let scale = (f64::from(scale) * f64::from(scale_of_a) * f64::from(scale_of_b)) as f32;
        scale.is_finite().then_some(Self { a, b, scale })
    }
}

pub(super) fn incomplete(path: &str, part: &str) -> AdapterError {
    AdapterError::Sites(format!("site {path} is incomplete: {part} is missing"))
}

#[cfg(test)]
mod tests {
    use safetensors::SafeTensors;
    use safetensors::tensor::{Dtype, TensorView, serialize};

    use super::*;

    #[test]
    fn a_pair_times_its_scale_is_the_same_however_small_or_large_its_weights_are() {
        for (a, b, scale) in [
            (0.5, 0.25, 2.0),
            (0.5, 2e-8, 1e6),
            (0.5, -1e-40, 1e30),
            (1e-12, 3e-7, 1e10),
            (9e4, 7e4, 1e-6),
            (1e30, 1e-30, 1.0),
            (1e30, 1e30, 1e-30),
            (0.0, 1.0, 1.0),
        ] {
            let bytes = |value: f32| [value, value / 3.0].map(f32::to_le_bytes).concat();
            let (of_a, of_b) = (bytes(a), bytes(b));
            let view = |bytes| TensorView::new(Dtype::F32, vec![1, 2], bytes).unwrap();
            let file = serialize([("a", view(&of_a)), ("b", view(&of_b))], None).unwrap();
            let file = SafeTensors::deserialize(&file).unwrap();
            let mut tensors = Tensors::of(&file, false).unwrap();
            let [a_tensor, b_tensor] = ["a", "b"].map(|key| tensors.take(key).unwrap());
            let pair = HalfPair::of(&a_tensor, &b_tensor, scale).unwrap();
            for (i, divisor) in [1.0, 3.0].into_iter().enumerate() {
                let product = f64::from(pair.a[i]) * f64::from(pair.b[i]) * f64::from(pair.scale);
                let expected = f64::from(a) / divisor * f64::from(b) / divisor * f64::from(scale);
                assert!((product - expected).abs() <= 2e-3 * expected.abs(), "{a} {b} {scale}: {product}");
            }
            // What f16 holds well is kept as it is.
            assert!(scale != 2.0 || pair.scale == scale && pair.b[0].to_f32() == b);
        }
    }
}
