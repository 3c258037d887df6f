//! The names under which vLLM's clients load and unload adapters. Loading is installing, unloading is taking out.

use axum::extract::State;

use super::AppState;
use super::adapters::{folder_source, hub_source};
use super::auth::Admin;
use super::error::ApiError;
use super::fields::Fields;
use crate::adapter::registry::ChangeError;

/// `POST /v1/load_lora_adapter`
pub async fn load_lora_adapter(State(state): State<AppState>, _: Admin, fields: Fields) -> Result<String, ApiError> {
    let (name, path) = (required(&fields, "lora_name")?, required(&fields, "lora_path")?);
    let source = match path.strip_prefix("hf:") {
        Some(_) => hub_source("lora_path", path)?,
        None => folder_source("lora_path", path)?,
    };
    // Without it, only the same content may be there already.
    let expected = if fields.boolean("load_inplace")?.unwrap_or(false) { None } else { Some("") };
    match state.generation.adapters().install(name, source, expected).await {
        Ok(_) => Ok(format!("Success: LoRA adapter '{name}' added successfully.")),
        Err(ChangeError::Conflict { .. }) => {
            let message =
                format!("The lora adapter '{name}' has already been loaded. Set `load_inplace` to replace it.");
            Err(ApiError::invalid("lora_name", message))
        }
        Err(ChangeError::InvalidName(message)) => Err(ApiError::invalid("lora_name", message)),
        Err(ChangeError::Source(message)) => Err(ApiError::invalid("lora_path", message)),
        Err(error @ ChangeError::Refused(_)) => Err(ApiError::invalid("lora_path", error.to_string())),
        Err(other) => Err(other.into()),
    }
}

/// `POST /v1/unload_lora_adapter`; the `lora_int_id` that some send is vLLM's own number for the name.
pub async fn unload_lora_adapter(State(state): State<AppState>, _: Admin, fields: Fields) -> Result<String, ApiError> {
    let name = required(&fields, "lora_name")?;
    match state.generation.adapters().remove(name, None).await {
        Ok(()) => Ok(format!("Success: LoRA adapter '{name}' removed successfully.")),
        Err(error) => Err(error.into()),
    }
}

fn required<'a>(fields: &'a Fields, name: &str) -> Result<&'a str, ApiError> {
    fields.string(name)?.ok_or_else(|| ApiError::invalid(name, format!("`{name}` is required")))
}
