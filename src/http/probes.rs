//! What machines ask: is the server well, and how is it doing.

use axum::Json;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde_json::json;

use super::AppState;
use super::error::ApiError;

/// Never waits for the engine, however busy that is.
pub async fn health(State(state): State<AppState>) -> Response {
    match check_accepting(&state) {
        Ok(()) => Json(json!({"status": "ok", "device": state.generation.device()})).into_response(),
        Err(error) => error.into_response(),
    }
}

/// # Errors
/// 503 where no request has a chance.
pub fn check_accepting(state: &AppState) -> Result<(), ApiError> {
    if state.generation.is_accepting() {
        return Ok(());
    }
    Err(ApiError::unavailable("the server is shutting down, or its engine has stopped"))
}

pub async fn metrics(State(state): State<AppState>) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], state.metrics.render()).into_response()
}
