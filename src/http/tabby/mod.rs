//! Tabby's interface, for its IDE plugins: completions of an editor's segments on `/v1/completions`, and what the plugins
//! ask before. Their votes come to `/v1/events`.

mod segments;

pub use segments::SNIPPETS;

use axum::extract::State;
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Extension, Json, Router};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Value, json};

use super::AppState;
use super::auth::{Caller, authenticate};
use super::error::ApiError;
use super::fields::Fields;
use super::probes::check_accepting;
use super::reply::random_id;
use super::run::{Run, RunEvent};

/// The interface that is spoken here; plugins leave things out with older ones.
const INTERFACE_VERSION: &str = "v0.30.0";

#[derive(Debug, JsonSchema, Serialize)]
#[schemars(rename = "TabbyCompletion")]
pub struct Completion {
    id: String,
    choices: [Choice; 1],
    mode: &'static str,
}

#[derive(Debug, JsonSchema, Serialize)]
#[schemars(rename = "TabbyChoice")]
struct Choice {
    index: usize,
    text: String,
}

#[derive(Debug, JsonSchema, Serialize)]
#[schemars(rename = "TabbyHealth")]
pub struct Health {
    model: String,
    /// `null` where the model cannot chat.
    chat_model: Option<String>,
    chat_device: String,
    device: String,
    arch: &'static str,
    cpu_info: String,
    cpu_count: usize,
    cuda_devices: [&'static str; 0],
    version: Version,
}

#[derive(Debug, JsonSchema, Serialize)]
#[schemars(rename = "TabbyVersion")]
struct Version {
    build_date: &'static str,
    build_timestamp: &'static str,
    git_sha: &'static str,
    git_describe: &'static str,
}

/// Plugins know whether their key is right by how their first question is answered.
pub fn routes(state: &AppState) -> Router<AppState> {
    Router::new()
        .route("/v1/health", get(health).post(health))
        .route("/v1beta/server_setting", get(server_setting))
        .route("/v1beta/models", get(models))
        .route_layer(from_fn_with_state(state.clone(), authenticate))
}

/// `POST /v1/completions` with `segments`.
pub async fn completions(state: &AppState, caller: &Caller, fields: &Fields) -> Result<Response, ApiError> {
    let base = state.generation.base();
    if base.fill_in_middle.is_none() {
        let message = format!("`{}` was not trained to fill in the middle, which `segments` asks for", base.id);
        return Err(ApiError::not_supported(message));
    }
    let ((request, sent_as), id) = (segments::read(fields)?, random_id("cmpl"));
    let run = Run::start(state, caller, fields.string("user")?, &id, request).await;
    let mut run = run.map_err(|error| sent_as.word(error))?;
    let mut text = String::new();
    while let Some(event) = run.next().await {
        if let RunEvent::Text(part) = event? {
            text.push_str(&part);
        }
    }
    Ok(Json(Completion { id, choices: [Choice { index: 0, text }], mode: "standard" }).into_response())
}

async fn health(State(state): State<AppState>) -> Result<Json<Health>, ApiError> {
    check_accepting(&state)?;
    let (base, device) = (state.generation.base(), state.generation.device().to_owned());
    Ok(Json(Health {
        model: base.id.clone(),
        chat_model: base.chat_template.is_ok().then(|| base.id.clone()),
        chat_device: device.clone(),
        cpu_info: device.clone(),
        device,
        arch: std::env::consts::ARCH,
        cpu_count: std::thread::available_parallelism().map_or(1, usize::from),
        cuda_devices: [],
        version: Version { build_date: "", build_timestamp: "", git_sha: "", git_describe: INTERFACE_VERSION },
    }))
}

async fn server_setting() -> Json<Value> {
    Json(json!({"disable_client_side_telemetry": true}))
}

async fn models(State(state): State<AppState>, Extension(caller): Extension<Caller>) -> Json<Value> {
    let generation = &state.generation;
    let adapters = generation.servable_adapters(&caller.access).map(|adapter| generation.model_id(&adapter.name));
    let all: Vec<String> = std::iter::once(generation.base_id().to_owned()).chain(adapters).collect();
    let chat = generation.base().chat_template.is_ok().then(|| all.clone());
    Json(json!({"completion": all, "chat": chat, "embedding": null}))
}
