//! VeRA (Kopiczko et al. 2024): two vectors for each layer around a pair that all share, `y = W x + b + d_b ∘ B(d ∘ A x)`.
//!
//! A is `[rank, most inputs]` and B `[most outputs, rank]` of the adapted layers, of which each takes the first columns and
//! rows; d is `[rank]` and d_b `[out]`.

use std::sync::Arc;

use kernels::low_rank::LowRank;

use super::lora::{HalfPair, incomplete};
use super::{all_sites, refuse_ends};
use crate::adapter::canonical::{Adapter, AdapterWeights, Method, SiteDelta};
use crate::adapter::error::AdapterError;
use crate::adapter::peft_config::VeraConfig;
use crate::adapter::sites::{Site, Targets, module_path};
use crate::adapter::tensors::{NamedTensor, Tensors, VERA_A, VERA_B};
use crate::model::spec::ModelSpec;

/// # Errors
/// When a tensor finds no place, or the sites of the file are not exactly those of the configuration, or a tensor has
/// the wrong shape, rank or type or a value that is not finite.
pub fn load(config: &VeraConfig, mut tensors: Tensors<'_>, spec: &ModelSpec) -> Result<Adapter, AdapterError> {
    let expected = config.selector.targets(spec)?;
    refuse_ends(&expected, "VeRA")?;
    let shared = Shared::take(config, &mut tensors, &expected, spec)?;
    let mut weights = AdapterWeights::default();
    let mut found = Targets::default();
    for site in all_sites(spec) {
        let (layer, module) = site;
        let path = module_path(layer, module);
        let vectors = ["vera_lambda_d", "vera_lambda_b"].map(|name| tensors.take_of(&path, name));
        let (of_ranks, of_outputs) = match vectors {
            [None, None] => continue,
            [Some(of_ranks), Some(of_outputs)] => (of_ranks, of_outputs),
            [None, _] => return Err(incomplete(&path, "vera_lambda_d (peft_type VERA)")),
            [_, None] => return Err(incomplete(&path, "vera_lambda_b (peft_type VERA)")),
        };
        let low_rank = Some(shared.pair(config.rank, &of_ranks, &of_outputs, site, spec)?);
        weights.set_site(layer, module.index(), SiteDelta { low_rank, ..SiteDelta::default() });
        found.sites.insert(site);
    }
    tensors.refuse_rest()?;
    expected.check_found(&found)?;
    Ok(Adapter { method: Method::Vera, weights: Arc::new(weights), ..Adapter::default() })
}

/// The pair of all layers.
struct Shared {
    /// `[rank, num_inputs]`
    a: Vec<f32>,
    num_inputs: usize,
    /// `[most outputs, rank]`
    b: Vec<f32>,
}

impl Shared {
    fn take(
        config: &VeraConfig,
        tensors: &mut Tensors<'_>,
        expected: &Targets,
        spec: &ModelSpec,
    ) -> Result<Self, AdapterError> {
        let missing = |name| AdapterError::Sites(format!("{name} is missing (peft_type VERA)"));
        let a = tensors.take(VERA_A).ok_or_else(|| missing(VERA_A))?;
        let b = tensors.take(VERA_B).ok_or_else(|| missing(VERA_B))?;
        let modules = || expected.sites.iter().map(|(_, module)| *module);
        let num_inputs = modules().map(|module| spec.module_shape(module).0).max().unwrap_or(0);
        let num_outputs = modules().map(|module| spec.file_rows(module).num_rows).max().unwrap_or(0);
        a.check_rank(0, num_inputs, config.rank)?;
        b.check_rank(1, num_outputs, config.rank)?;
        Ok(Self { a: a.f32_values()?, num_inputs, b: b.f32_values()? })
    }

    /// What a site has of it, with its own vectors. That of the ranks is applied to them; that of the outputs is part of B.
    fn pair(
        &self,
        rank: usize,
        of_ranks: &NamedTensor<'_>,
        of_outputs: &NamedTensor<'_>,
        (_, module): Site,
        spec: &ModelSpec,
    ) -> Result<LowRank, AdapterError> {
        let (in_features, out_features) = spec.module_shape(module);
        of_ranks.check_shape(&[rank])?;
        of_outputs.check_shape(&[out_features])?;
        // Of a layer that holds several modules.
        let first_row = spec.file_rows(module).first_row_of_matrix();
        let a = self.a.chunks_exact(self.num_inputs).flat_map(|row| &row[..in_features]).copied().collect();
        let of_b = self.b[first_row * rank..].chunks_exact(rank).zip(of_outputs.f32_values()?);
        let b = of_b.flat_map(|(row, factor)| row.iter().map(move |value| factor * value)).collect();
        let pair = HalfPair::of_values(a, b).ok_or_else(|| {
            let reason = "times the matrix of all layers is beyond the range of 32-bit floats";
            AdapterError::tensor(of_outputs.key, reason)
        })?;
        pair.pack(of_ranks, (in_features, out_features))
    }
}
