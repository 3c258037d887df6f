//! What the running experiments show, and the canary's second chance.

use axum::Json;
use axum::extract::{Path, State};
use serde_json::{Value, json};

use super::AppState;
use super::auth::Admin;
use super::error::ApiError;
use crate::experiments::{Report, ResetError, Unavailable};

pub async fn list(State(state): State<AppState>) -> Result<Json<Value>, ApiError> {
    let reports = state.experiments.reports().await?;
    Ok(Json(json!({"object": "list", "data": reports})))
}

pub async fn get(State(state): State<AppState>, Path(name): Path<String>) -> Result<Json<Report>, ApiError> {
    match state.experiments.report(&name).await? {
        Some(report) => Ok(Json(report)),
        None => Err(ResetError::UnknownExperiment(name).into()),
    }
}

/// For the administrator: puts a canary that was rolled back into traffic again.
pub async fn reset(
    State(state): State<AppState>,
    _: Admin,
    Path(name): Path<String>,
) -> Result<Json<Report>, ApiError> {
    state.experiments.reset(&name).await?;
    get(State(state), Path(name)).await
}

impl From<ResetError> for ApiError {
    fn from(error: ResetError) -> Self {
        match error {
            ResetError::UnknownExperiment(_) => Self::unknown_experiment(error.to_string()),
            ResetError::NoCanary(_) => Self::invalid("name", error.to_string()),
            ResetError::Unavailable(cause) => cause.into(),
        }
    }
}

impl From<Unavailable> for ApiError {
    fn from(cause: Unavailable) -> Self {
        Self::storage_unavailable(cause.to_string())
    }
}
