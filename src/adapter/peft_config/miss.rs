//! The configuration of MiSS.

use super::fields::{Fields, INSTEAD};
use crate::adapter::error::AdapterError;
use crate::adapter::sites::SiteSelector;

/// PEFT's defaults for fields a file may leave out.
const DEFAULT_RANK: usize = 64;
const DEFAULT_MINI_RANK: usize = 1;

/// Which layers are adapted, and the rank of all of them.
#[derive(Debug)]
pub struct MissConfig {
    pub selector: SiteSelector,
    pub rank: usize,
    /// So many columns stand in the file, and are those of all outputs in turn. `None`: all of them.
    pub num_columns: Option<usize>,
}

impl MissConfig {
    /// # Errors
    /// When a field is malformed or asks for what this server does not do; names it.
    pub(super) fn read(mut fields: Fields) -> Result<Self, AdapterError> {
        fields.refuse_biases()?;
        let variant = fields.take("init_weights");
        let mini_rank = fields.take_rank("mini_r", DEFAULT_MINI_RANK)?;
        let num_columns = match variant.as_str() {
            None => None,
            Some("mini") => Some(mini_rank),
            Some(_) => {
                let reason = format!("{variant} multiplies the base's weights by the adapter's: {INSTEAD}");
                return Err(AdapterError::field("init_weights", reason));
            }
        };
        let mut config = Self {
            rank: fields.take_rank("r", DEFAULT_RANK)?,
            num_columns,
            selector: fields.take_selector(Vec::new())?,
        };
        fields.take_layers(&mut config.selector)?;
        fields.refuse_rest(&["miss_dropout"])?;
        Ok(config)
    }
}
