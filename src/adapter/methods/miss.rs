//! MiSS (Kang & Yin 2024, first called Bone): `y = W x + b + Dᵀ S x`, where S adds up every `rank`-th input.
//!
//! D is `[rank, out]`, or `[rank, mini_r]`, repeated over all outputs. S is not in the file: 1 at `[k mod rank, k]`.

use std::sync::Arc;

use half::f16;
use kernels::low_rank::LowRank;

use super::{all_sites, refuse_ends};
use crate::adapter::canonical::{Adapter, AdapterWeights, Method, SiteDelta};
use crate::adapter::error::AdapterError;
use crate::adapter::peft_config::MissConfig;
use crate::adapter::sites::{Site, Targets, module_path};
use crate::adapter::tensors::{NamedTensor, Tensors};
use crate::model::spec::ModelSpec;

/// # Errors
/// When a tensor finds no place, or the sites of the file are not exactly those of the configuration, or a tensor has
/// the wrong shape, rank or type or a value that is not finite.
pub fn load(config: &MissConfig, mut tensors: Tensors<'_>, spec: &ModelSpec) -> Result<Adapter, AdapterError> {
    let expected = config.selector.targets(spec)?;
    refuse_ends(&expected, "MiSS")?;
    let mut weights = AdapterWeights::default();
    let mut found = Targets::default();
    for site in all_sites(spec) {
        let (layer, module) = site;
        let Some(block) = tensors.take_of(&module_path(layer, module), "miss_block") else { continue };
        let low_rank = Some(pair(config, &block, site, spec)?);
        weights.set_site(layer, module.index(), SiteDelta { low_rank, ..SiteDelta::default() });
        found.sites.insert(site);
    }
    if found.sites.is_empty() {
        let reason = "MISS, and the file holds miss_block, as MiSS saves it, of no site of the base";
        return Err(AdapterError::field("peft_type", reason));
    }
    tensors.refuse_rest()?;
    expected.check_found(&found)?;
    Ok(Adapter { method: Method::Miss, weights: Arc::new(weights), ..Adapter::default() })
}

fn pair(
    config: &MissConfig,
    block: &NamedTensor<'_>,
    (_, module): Site,
    spec: &ModelSpec,
) -> Result<LowRank, AdapterError> {
    let (rank, (in_features, out_features)) = (config.rank, spec.module_shape(module));
    // Of the layer as the file has it, which may hold several modules.
    let rows = spec.file_rows(module);
    let num_columns = config.num_columns.unwrap_or(rows.num_rows);
    if !rows.num_rows.is_multiple_of(num_columns) {
        let reason = format!("{num_columns} does not divide the {} outputs of the base's layer", rows.num_rows);
        return Err(AdapterError::field("mini_r", reason));
    }
    block.check_rank(0, num_columns, rank)?;
    let (block, scale) = block.scaled_f16_values()?;
    let first_row = rows.first_row_of_matrix();
    let a: Vec<f16> = (0..rank)
        .flat_map(|r| (0..in_features).map(move |input| if input % rank == r { f16::ONE } else { f16::ZERO }))
        .collect();
    let columns = (first_row..first_row + out_features).map(|row| row % num_columns);
    let b: Vec<f16> = columns.flat_map(|column| block[column..].iter().step_by(num_columns)).copied().collect();
    Ok(LowRank::pack(rank, in_features, out_features, scale, &a, &b))
}
