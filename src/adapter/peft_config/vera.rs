//! The configuration of VeRA.

use serde_json::Value;

use super::fields::Fields;
use crate::adapter::error::AdapterError;
use crate::adapter::sites::SiteSelector;

/// PEFT's default for a field a file may leave out.
const DEFAULT_RANK: usize = 256;

const WITHOUT_EFFECT: &[&str] = &["d_initial", "init_weights", "projection_prng_key", "vera_dropout"];

/// Which layers are adapted, and the rank that all of them share.
#[derive(Debug)]
pub struct VeraConfig {
    pub selector: SiteSelector,
    pub rank: usize,
}

impl VeraConfig {
    /// # Errors
    /// When a field is malformed or asks for what this server does not do; names it.
    pub(super) fn read(mut fields: Fields) -> Result<Self, AdapterError> {
        fields.refuse_biases()?;
        if let value @ Value::Bool(false) = fields.take("save_projection") {
            let reason = format!(
                "{value}: the matrices are not in the file and would have to be drawn as torch does: save the adapter \
                 again with save_projection=True"
            );
            return Err(AdapterError::field("save_projection", reason));
        }
        let mut config =
            Self { rank: fields.take_rank("r", DEFAULT_RANK)?, selector: fields.take_selector(Vec::new())? };
        fields.take_layers(&mut config.selector)?;
        fields.refuse_rest(WITHOUT_EFFECT)?;
        Ok(config)
    }
}
