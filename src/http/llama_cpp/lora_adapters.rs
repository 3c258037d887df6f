//! llama.cpp's list of adapters by number, with the strengths that a request to the base gets when it names none.

use axum::extract::State;
use axum::{Extension, Json};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Value, json};

use crate::http::AppState;
use crate::http::auth::{Admin, Caller};
use crate::http::error::ApiError;
use crate::http::fields::JsonBody;
use crate::http::selection::parse_entries;

#[derive(Debug, JsonSchema, Serialize)]
pub struct LoraAdapter {
    id: usize,
    name: String,
    scale: f32,
    /// Clients want the key; where files lie is nobody's business.
    path: &'static str,
}

/// `GET /lora-adapters`
pub async fn list(State(state): State<AppState>, Extension(caller): Extension<Caller>) -> Json<Vec<LoraAdapter>> {
    let scales = state.generation.default_scales();
    let scale = |name: &str| scales.iter().find(|(scaled, _)| scaled == name).map_or(0.0, |(_, scale)| *scale);
    let servable = state.generation.servable_adapters(&caller.access);
    let mut list: Vec<_> = servable
        .map(|adapter| LoraAdapter { id: adapter.id, scale: scale(&adapter.name), name: adapter.name, path: "" })
        .collect();
    list.sort_by_key(|adapter| adapter.id);
    Json(list)
}

/// `POST /lora-adapters`: those that are not in the list get strength 0.
pub async fn set(State(state): State<AppState>, _: Admin, body: JsonBody) -> Result<Json<Value>, ApiError> {
    let Value::Array(items) = &body.json else {
        return Err(ApiError::malformed("the request body must be an array of `{\"id\", \"scale\"}`"));
    };
    state.generation.set_default_scales(parse_entries("", items)?).await?;
    Ok(Json(json!({"success": true})))
}
