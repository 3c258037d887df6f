//! `adapter_config.json`, read against an allow-list for each method.
//!
//! A field is honoured, known to be without effect at inference, or must have its default value: an adapter whose
//! configuration says more than this server does would be served with the wrong arithmetic.

mod adalora;
mod fields;
mod ia3;
mod lora;
mod miss;
mod prelude;
mod vera;

pub use adalora::AdaLoraConfig;
pub use ia3::Ia3Config;
pub use lora::LoraConfig;
pub use miss::MissConfig;
pub use prelude::{PreludeConfig, PreludeKind};
pub use vera::VeraConfig;

use super::error::AdapterError;
use fields::Fields;

pub const FILE: &str = "adapter_config.json";
pub const MAX_FILE_BYTES: u64 = 1 << 20;

/// An adapter's configuration, by its method.
#[derive(Debug)]
pub enum PeftConfig {
    Lora(LoraConfig),
    AdaLora(AdaLoraConfig),
    Vera(VeraConfig),
    Miss(MissConfig),
    Ia3(Ia3Config),
    Prelude(PreludeConfig),
}

impl PeftConfig {
    /// # Errors
    /// When the text is not a JSON object, or a field is malformed or asks for what this server does not do; names it.
    pub fn parse(text: &[u8]) -> Result<Self, AdapterError> {
        let mut fields = Fields::parse(text)?;
        // MLX names its own kind of adapter where PEFT names its method.
        if fields.is_null("peft_type") && !(fields.is_null("fine_tune_type") && fields.is_null("lora_parameters")) {
            return Err(AdapterError::field(
                "peft_type",
                "missing: this is MLX's form of an adapter, which is not read",
            ));
        }
        const METHODS: &[&str] =
            &["LORA", "ADALORA", "VERA", "MISS", "IA3", "PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"];
        let method = fields.take_text("peft_type", METHODS)?;
        if !fields.is_null("task_type") {
            fields.take_text("task_type", &["CAUSAL_LM"])?;
        }
        let config = match method {
            "LORA" => LoraConfig::read(fields).map(Self::Lora),
            "ADALORA" => AdaLoraConfig::read(fields).map(Self::AdaLora),
            "VERA" => VeraConfig::read(fields).map(Self::Vera),
            "MISS" => MissConfig::read(fields).map(Self::Miss),
            "IA3" => Ia3Config::read(fields).map(Self::Ia3),
            "PROMPT_TUNING" => PreludeConfig::read(fields, PreludeKind::PromptTuning).map(Self::Prelude),
            "P_TUNING" => PreludeConfig::read(fields, PreludeKind::PTuning).map(Self::Prelude),
            _ => PreludeConfig::read(fields, PreludeKind::PrefixTuning).map(Self::Prelude),
        };
        config.map_err(|error| match error {
            // The same field may be right for another method.
            AdapterError::Field { field, reason } if method != "LORA" => {
                AdapterError::Field { field, reason: format!("{reason} (peft_type {method})") }
            }
            other => other,
        })
    }
}

#[cfg(test)]
mod tests;
