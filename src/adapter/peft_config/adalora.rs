//! The configuration of AdaLoRA.

use std::collections::BTreeMap;

use super::fields::Fields;
use super::lora;
use crate::adapter::error::AdapterError;
use crate::adapter::sites::{SiteSelector, paths_in_training};

/// PEFT's default for a field a file may leave out.
const DEFAULT_RANK: usize = 12;
/// The name, in `rank_pattern`, of what is masked at a layer.
const MASKED: &str = ".lora_E";
/// What PEFT adds to a rank before it divides by it.
const RANK_OFFSET: f64 = 1e-5;

/// The fields that matter to the choice of ranks in training, and LoRA's that PEFT passes over here.
const WITHOUT_EFFECT: &[&str] = &[
    "beta1",
    "beta2",
    "deltaT",
    "init_lora_weights",
    "orth_reg_weight",
    "r",
    "target_r",
    "tfinal",
    "tinit",
    "total_step",
];

/// Which layers are adapted, and what is left of the rank that all of them began with.
#[derive(Debug)]
pub struct AdaLoraConfig {
    pub selector: SiteSelector,
    initial_rank: usize,
    alpha: f64,
    /// By module path.
    ranks: BTreeMap<String, usize>,
}

impl AdaLoraConfig {
    /// # Errors
    /// When a field is malformed or asks for what this server does not do; names it.
    pub(super) fn read(mut fields: Fields) -> Result<Self, AdapterError> {
        fields.refuse_biases()?;
        let mut config = Self {
            initial_rank: fields.take_rank("init_r", DEFAULT_RANK)?,
            alpha: fields.take_as("lora_alpha")?.unwrap_or(lora::DEFAULT_ALPHA),
            selector: fields.take_selector(Vec::new())?,
            ranks: BTreeMap::new(),
        };
        fields.take_layers(&mut config.selector)?;
        let masks: BTreeMap<String, Vec<bool>> = fields.take_as("rank_pattern")?.unwrap_or_default();
        for (key, mask) in masks {
            let field = format!("rank_pattern[{key}]");
            // Behind it the adapter's name may stand.
            let Some((path, _)) = key.split_once(MASKED) else {
                return Err(AdapterError::field(&field, "not the path of a layer with .lora_E behind it"));
            };
            if mask.len() != config.initial_rank {
                let reason = format!("has {} entries, init_r is {}", mask.len(), config.initial_rank);
                return Err(AdapterError::field(&field, reason));
            }
            config.ranks.insert(path.to_string(), mask.into_iter().filter(|is_kept| *is_kept).count());
        }
        fields.refuse_rest(&[lora::WITHOUT_EFFECT, WITHOUT_EFFECT].concat())?;
        Ok(config)
    }

    /// Rank of the pair at a module path; 0 where training left nothing of it.
    pub fn rank(&self, path: &str) -> usize {
        let found = paths_in_training(path).iter().find_map(|path| self.ranks.get(path).copied());
        found.unwrap_or(self.initial_rank)
    }

    /// What a delta of this rank is multiplied by. It is divided by the rank that it began with, whatever is left.
    ///
    /// # Errors
    /// When it is no finite 32-bit number.
    pub fn scale(&self, rank: usize) -> Result<f32, AdapterError> {
        let alpha = if self.alpha > 0.0 { self.alpha } else { rank as f64 };
        let scale = (alpha / (self.initial_rank as f64 + RANK_OFFSET)) as f32;
        if scale.is_finite() {
            Ok(scale)
        } else {
            Err(AdapterError::field("lora_alpha", format!("{alpha} gives no finite scale")))
        }
    }

    /// # Errors
    /// When `rank_pattern` names a module that is none of `paths`.
    pub fn check_patterns<'a>(&self, paths: impl Iterator<Item = &'a str>) -> Result<(), AdapterError> {
        let mut unknown = self.ranks.clone();
        for path in paths.flat_map(paths_in_training) {
            unknown.remove(&path);
        }
        match unknown.keys().next() {
            Some(path) => Err(AdapterError::field("rank_pattern", format!("{path} is no site of the adapter"))),
            None => Ok(()),
        }
    }
}
