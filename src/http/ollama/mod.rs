//! Ollama's interface, for the editors and pages that speak no other: NDJSON streams, and errors that are
//! `{"error": "…"}`.

mod generate;
mod models;
mod reply;
mod request;

pub use models::Models;
pub use reply::Reply;
pub use request::OWN_FIELDS;

use axum::extract::OriginalUri;
use axum::middleware::from_fn_with_state;
use axum::routing::{delete, get, head, post};
use axum::{Json, Router};
use schemars::JsonSchema;
use serde::Serialize;

use super::auth::authenticate;
use super::error::ApiError;
use super::{AppState, generating};

/// The interface that is spoken here; clients refuse older ones.
const INTERFACE_VERSION: &str = "0.6.4";

#[derive(Debug, JsonSchema, Serialize)]
#[schemars(rename = "OllamaVersion")]
pub struct Version {
    version: &'static str,
    lorry: &'static str,
}

/// Below `/api`.
pub fn routes(state: &AppState) -> Router<AppState> {
    let generation = Router::new().route("/generate", post(generate::generate)).route("/chat", post(generate::chat));
    let api = Router::new()
        .route("/tags", get(models::tags))
        .route("/show", post(models::show))
        .route("/ps", get(models::resident))
        .route("/pull", post(no_changes))
        .route("/push", post(no_changes))
        .route("/create", post(no_changes))
        .route("/copy", post(no_changes))
        .route("/delete", delete(no_changes))
        .route("/blobs/{digest}", head(no_changes).post(no_changes))
        .route("/embed", post(no_embeddings))
        .route("/embeddings", post(no_embeddings))
        .route_layer(from_fn_with_state(state.clone(), authenticate))
        .merge(generating(generation, state));
    // Clients look whether it is there before they have a key.
    Router::new().route("/version", get(version)).merge(api)
}

async fn version() -> Json<Version> {
    Json(Version { version: INTERFACE_VERSION, lorry: env!("CARGO_PKG_VERSION") })
}

async fn no_changes(OriginalUri(uri): OriginalUri) -> ApiError {
    ApiError::not_served(format!(
        "`{}` is not served: the base is chosen by `lorry serve --model`, and adapters are changed by PUT and DELETE of \
         /v1/adapters/NAME",
        uri.path()
    ))
}

async fn no_embeddings(OriginalUri(uri): OriginalUri) -> ApiError {
    ApiError::not_served(format!("`{}` is not served: this server generates text and makes no embeddings", uri.path()))
}
