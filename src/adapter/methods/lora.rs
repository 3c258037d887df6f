//! LoRA and rsLoRA: `y = W x + b + s·B(A x)`, with `lora_bias` also `+ s·bias_B`.
//!
//! A is `[rank, in]`, B is `[out, rank]`, bias_B is `[out]`; f16, bf16 or f32 in the file.

use std::collections::{BTreeMap, BTreeSet};

use half::{bf16, f16};
use kernels::low_rank::LowRank;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use crate::adapter::canonical::{Coverage, SiteDelta};
use crate::adapter::error::AdapterError;
use crate::adapter::peft_config::LoraConfig;
use crate::adapter::sites::{Site, module_path};
use crate::model::spec::{ModelSpec, Module};

/// `[num_layers][Module as usize]`
pub type Layers = Vec<[Option<SiteDelta>; Module::ALL.len()]>;

/// A tensor under the name it has in the file.
struct NamedTensor<'a> {
    key: String,
    view: TensorView<'a>,
}

/// What the file holds for one site.
struct SiteTensors<'a> {
    lora_a: Option<NamedTensor<'a>>,
    lora_b: Option<NamedTensor<'a>>,
    bias: Option<NamedTensor<'a>>,
}

/// Turns every tensor of the file into the delta of a site.
///
/// # Errors
/// When a tensor finds no place, or the sites of the file are not exactly those of the configuration, or a tensor has
/// the wrong shape, rank or type or a value that is not finite.
pub fn deltas(
    config: &LoraConfig,
    tensors: &SafeTensors<'_>,
    spec: &ModelSpec,
) -> Result<(Layers, Coverage), AdapterError> {
    if tensors.is_empty() {
        return Err(AdapterError::NoTensors);
    }
    let expected = config.selector.sites(spec)?;
    let placed = place(tensors, spec)?;

    let mut layers: Layers = (0..spec.num_layers).map(|_| Default::default()).collect();
    let mut coverage = Coverage { num_sites: 0, num_expected_sites: expected.len(), max_rank: 0, resident_bytes: 0 };
    for (&(layer, module), site_tensors) in &placed {
        let delta = site_delta(config, site_tensors, (layer, module), spec)?;
        if let Some(low_rank) = &delta.low_rank {
            coverage.max_rank = coverage.max_rank.max(low_rank.rank());
            coverage.resident_bytes += low_rank.bytes();
        }
        coverage.resident_bytes += delta.bias.as_ref().map_or(0, |bias| size_of_val(bias.as_slice()));
        coverage.num_sites += 1;
        layers[layer][module as usize] = Some(delta);
    }
    check_same_sites(&expected, &placed.into_keys().collect())?;
    Ok((layers, coverage))
}

/// Assigns every tensor to a site of the base.
fn place<'a>(tensors: &SafeTensors<'a>, spec: &ModelSpec) -> Result<BTreeMap<Site, SiteTensors<'a>>, AdapterError> {
    let mut by_key: BTreeMap<&str, TensorView<'a>> = tensors.iter().collect();
    let mut placed = BTreeMap::new();
    for layer in 0..spec.num_layers {
        for module in Module::ALL {
            let path = module_path(layer, module);
            let mut take = |suffix: &str| {
                let key = format!("base_model.model.{path}.{suffix}");
                by_key.remove(key.as_str()).map(|view| NamedTensor { key, view })
            };
            let site =
                SiteTensors { lora_a: take("lora_A.weight"), lora_b: take("lora_B.weight"), bias: take("lora_B.bias") };
            if site.lora_a.is_some() || site.lora_b.is_some() || site.bias.is_some() {
                placed.insert((layer, module), site);
            }
        }
    }
    match by_key.keys().next() {
        None => Ok(placed),
        Some(key) => {
            let reason = format!(
                "finds no site in the base, whose sites are the attention and feed-forward projections of {} layers",
                spec.num_layers
            );
            Err(AdapterError::tensor(key, reason))
        }
    }
}

fn check_same_sites(expected: &BTreeSet<Site>, found: &BTreeSet<Site>) -> Result<(), AdapterError> {
    if let Some(&(layer, module)) = expected.difference(found).next() {
        return Err(AdapterError::Sites(format!(
            "the file holds {} of the {} sites that adapter_config.json names: {} is missing",
            expected.intersection(found).count(),
            expected.len(),
            module_path(layer, module)
        )));
    }
    if let Some(&(layer, module)) = found.difference(expected).next() {
        let path = module_path(layer, module);
        return Err(AdapterError::Sites(format!(
            "the file holds the site {path}, which adapter_config.json does not name"
        )));
    }
    Ok(())
}

fn site_delta(
    config: &LoraConfig,
    tensors: &SiteTensors<'_>,
    (layer, module): Site,
    spec: &ModelSpec,
) -> Result<SiteDelta, AdapterError> {
    let path = module_path(layer, module);
    let missing = |part: &str| AdapterError::Sites(format!("site {path} is incomplete: {part} is missing"));
    let lora_a = tensors.lora_a.as_ref().ok_or_else(|| missing("lora_A.weight"))?;
    let lora_b = tensors.lora_b.as_ref().ok_or_else(|| missing("lora_B.weight"))?;

    let (in_features, out_features) = spec.module_shape(module);
    let rank = config.rank(&path);
    let scale = config.scale(&path)?;
    lora_a.check_rank(0, in_features, rank)?;
    lora_b.check_rank(1, out_features, rank)?;
    let a = lora_a.values()?;
    let b = lora_b.values()?;

    let bias = match (&tensors.bias, config.lora_bias) {
        (None, false) => None,
        (None, true) => return Err(missing("lora_B.bias (field lora_bias is true)")),
        (Some(bias), false) => return Err(AdapterError::tensor(&bias.key, "field lora_bias is not true")),
        (Some(bias), true) => {
            bias.check_shape(&[out_features])?;
            Some(bias.values()?.into_iter().map(|value| scale * value).collect())
        }
    };
    let low_rank = Some(LowRank::pack(rank, in_features, out_features, scale, &a, &b));
    Ok(SiteDelta { low_rank, bias, ..SiteDelta::default() })
}

impl NamedTensor<'_> {
    /// Checks a two-dimensional shape whose dimension `rank_dim` is the rank and whose other is `features`.
    fn check_rank(&self, rank_dim: usize, features: usize, rank: usize) -> Result<(), AdapterError> {
        let shape = self.view.shape();
        if shape.len() == 2 && shape[1 - rank_dim] == features && shape[rank_dim] != rank {
            let reason = format!("has rank {}, adapter_config.json says {rank}", shape[rank_dim]);
            return Err(AdapterError::tensor(&self.key, reason));
        }
        self.check_shape(&if rank_dim == 0 { [rank, features] } else { [features, rank] })
    }

    fn check_shape(&self, expected: &[usize]) -> Result<(), AdapterError> {
        if self.view.shape() == expected {
            return Ok(());
        }
        let reason = format!("has shape {:?}, the base needs {expected:?}", self.view.shape());
        Err(AdapterError::tensor(&self.key, reason))
    }

    /// The elements, row-major, each within the range of f16: that is what the kernels keep.
    fn values(&self) -> Result<Vec<f32>, AdapterError> {
        let bytes = self.view.data();
        let two_bytes = bytes.as_chunks::<2>().0.iter();
        let values: Vec<f32> = match self.view.dtype() {
            Dtype::F32 => bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
            Dtype::F16 => two_bytes.map(|&b| f16::from_le_bytes(b).to_f32()).collect(),
            Dtype::BF16 => two_bytes.map(|&b| bf16::from_le_bytes(b).to_f32()).collect(),
            other => {
                return Err(AdapterError::tensor(&self.key, format!("has type {other}; F16, BF16 and F32 are read")));
            }
        };
        // NaN is in no range and so found here too.
        let Some(value) = values.iter().find(|value| !(-f16::MAX.to_f32()..=f16::MAX.to_f32()).contains(*value)) else {
            return Ok(values);
        };
        let reason = if value.is_finite() { "beyond the range of 16-bit floats" } else { "the weights are damaged" };
        Err(AdapterError::tensor(&self.key, format!("holds {value}: {reason}")))
    }
}
