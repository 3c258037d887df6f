//! What machines ask: is the server well, and how is it doing.

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, header};
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
    Err(ApiError::unavailable("stopping", "the server is shutting down, or its engine has stopped"))
}

/// Of the adapters, those that the key opens; who sends none where clients need one gets the metrics that name no adapter.
///
/// # Errors
/// 401 for a key that is none.
pub async fn metrics(State(state): State<AppState>, headers: HeaderMap) -> Result<Response, ApiError> {
    let access = state.keys.scraper_access(&headers)?;
    let text = state.metrics.render(|adapter| access.allows(adapter));
    Ok(([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response())
}
