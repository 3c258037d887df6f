//! (IA)³ (Liu et al. 2022): one vector `l` per layer. Feed-forward: `y = W (l ∘ x) + b`; else `y = l ∘ (W x + b)`.

use std::sync::Arc;

use super::{all_sites, refuse_ends};
use crate::adapter::canonical::{Adapter, AdapterWeights, Method, SiteDelta};
use crate::adapter::error::AdapterError;
use crate::adapter::peft_config::Ia3Config;
use crate::adapter::sites::{Targets, module_path};
use crate::adapter::tensors::Tensors;
use crate::model::spec::ModelSpec;

/// # Errors
/// When a tensor finds no place, or the sites of the file are not exactly those of the configuration, or a vector has the
/// wrong shape or type or a value that is not finite.
pub fn load(config: &Ia3Config, mut tensors: Tensors<'_>, spec: &ModelSpec) -> Result<Adapter, AdapterError> {
    let expected = config.selector.targets(spec)?;
    refuse_ends(&expected, "(IA)³")?;
    let mut placed = Vec::new();
    for (layer, module) in all_sites(spec) {
        let path = module_path(layer, module);
        let vector = tensors.take_of(&path, "ia3_l");
        placed.extend(vector.map(|vector| (layer, module, spec.module_path(layer, module), vector)));
    }
    tensors.refuse_rest()?;

    let mut weights = AdapterWeights::default();
    let mut found = Targets::default();
    for (layer, module, path, vector) in placed {
        let (in_features, out_features) = spec.module_shape(module);
        let delta = if config.is_feedforward(&path)? {
            vector.check_shape(&[1, in_features])?;
            SiteDelta { input_scale: Some(vector.f32_values()?), ..SiteDelta::default() }
        } else {
            vector.check_shape(&[out_features, 1])?;
            SiteDelta { output_scale: Some(vector.f32_values()?), ..SiteDelta::default() }
        };
        weights.set_site(layer, module.index(), delta);
        found.sites.insert((layer, module));
    }
    expected.check_found(&found)?;
    Ok(Adapter { method: Method::Ia3, weights: Arc::new(weights), ..Adapter::default() })
}
