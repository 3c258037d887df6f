//! AdaLoRA (Zhang et al. 2023): `y = W x + b + s·B(E ∘ A x)`, whose rank training chose for each layer.
//!
//! A is `[rank, in]`, B is `[out, rank]`, E is `[rank, 1]`; of a layer of rank 0 all three are empty.

use std::sync::Arc;

use super::lora::{HalfPair, incomplete};
use super::{all_sites, refuse_ends};
use crate::adapter::canonical::{Adapter, AdapterWeights, Method, SiteDelta};
use crate::adapter::error::AdapterError;
use crate::adapter::peft_config::AdaLoraConfig;
use crate::adapter::sites::{Targets, module_path};
use crate::adapter::tensors::Tensors;
use crate::model::spec::ModelSpec;

/// # Errors
/// When a tensor finds no place, or the sites of the file are not exactly those of the configuration, or a tensor has
/// the wrong shape, rank or type or a value that is not finite.
pub fn load(config: &AdaLoraConfig, mut tensors: Tensors<'_>, spec: &ModelSpec) -> Result<Adapter, AdapterError> {
    let expected = config.selector.targets(spec)?;
    refuse_ends(&expected, "AdaLoRA")?;
    let mut weights = AdapterWeights::default();
    let mut found = Targets::default();
    let mut paths = Vec::new();
    for (layer, module) in all_sites(spec) {
        let (own_path, path) = (module_path(layer, module), spec.module_path(layer, module));
        let [a, b, e] = ["lora_A", "lora_B", "lora_E"].map(|name| tensors.take_of(&own_path, name));
        let (a, b, e) = match (a, b, e) {
            (None, None, None) => continue,
            (Some(a), Some(b), Some(e)) => (a, b, e),
            (None, ..) => return Err(incomplete(&path, "lora_A (peft_type ADALORA)")),
            (_, None, _) => return Err(incomplete(&path, "lora_B (peft_type ADALORA)")),
            (.., None) => return Err(incomplete(&path, "lora_E (peft_type ADALORA)")),
        };
        found.sites.insert((layer, module));
        let (rank, (in_features, out_features)) = (config.rank(&path), spec.module_shape(module));
        paths.push(path);
        a.check_rank(0, in_features, rank)?;
        b.check_rank(1, out_features, rank)?;
        e.check_shape(&[rank, 1])?;
        if rank == 0 {
            continue;
        }
        let pair = HalfPair::of(&a, &b, config.scale(rank)?)?;
        let low_rank = Some(pair.pack(&e, (in_features, out_features))?);
        weights.set_site(layer, module.index(), SiteDelta { low_rank, ..SiteDelta::default() });
    }
    if found.sites.is_empty() {
        let reason =
            "ADALORA, and the file holds lora_A, lora_B and lora_E, as AdaLoRA saves them, of no site of the base";
        return Err(AdapterError::field("peft_type", reason));
    }
    tensors.refuse_rest()?;
    expected.check_found(&found)?;
    config.check_patterns(paths.iter().map(String::as_str))?;
    Ok(Adapter { method: Method::AdaLora, weights: Arc::new(weights), ..Adapter::default() })
}
