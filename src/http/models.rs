//! `GET /v1/models`: the base and every adapter.

use axum::Json;
use axum::extract::{Path, State};
use serde::Serialize;

use super::AppState;
use super::error::ApiError;
use crate::generation::ResolvedModel;

#[derive(Debug, Serialize)]
pub struct ModelList {
    object: &'static str,
    data: Vec<ModelCard>,
}

#[derive(Debug, Serialize)]
pub struct ModelCard {
    id: String,
    object: &'static str,
    /// Unix seconds at which the server started.
    created: u64,
    owned_by: &'static str,
    /// The base, and what an adapter stands on: the base again.
    root: String,
    parent: Option<String>,
    /// The same number under the names that clients look for.
    max_model_len: usize,
    context_length: usize,
    adapter: Option<AdapterCard>,
}

#[derive(Debug, Serialize)]
struct AdapterCard {
    name: String,
    generation: String,
    task: Option<String>,
    description: Option<String>,
    num_sites: usize,
    max_rank: usize,
    resident_bytes: usize,
}

pub async fn list(State(state): State<AppState>) -> Json<ModelList> {
    let data = state.generation.models().map(|model| card(&state, model)).collect();
    Json(ModelList { object: "list", data })
}

/// Ids may contain `/`, and every name that a request accepts finds its model.
pub async fn get(State(state): State<AppState>, Path(id): Path<String>) -> Result<Json<ModelCard>, ApiError> {
    let model = state.generation.resolve(Some(&id))?;
    Ok(Json(card(&state, model)))
}

fn card(state: &AppState, model: ResolvedModel) -> ModelCard {
    let base_id = state.generation.base_id().to_owned();
    let context_length = state.generation.context_length();
    ModelCard {
        id: model.id,
        object: "model",
        created: state.started,
        owned_by: "lorry",
        parent: model.adapter.is_some().then(|| base_id.clone()),
        root: base_id,
        max_model_len: context_length,
        context_length,
        adapter: model.adapter.map(|adapter| AdapterCard {
            name: adapter.name.clone(),
            generation: adapter.generation.clone(),
            task: adapter.manifest.task.clone(),
            description: adapter.manifest.description.clone(),
            num_sites: adapter.coverage.num_sites,
            max_rank: adapter.coverage.max_rank,
            resident_bytes: adapter.coverage.resident_bytes,
        }),
    }
}
