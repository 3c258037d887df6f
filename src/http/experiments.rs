//! What the running experiments show, and the canary's second chance.

use axum::extract::State;
use axum::{Extension, Json};
use serde_json::{Value, json};

use super::AppState;
use super::auth::{Admin, Caller};
use super::error::ApiError;
use super::fields::PathName;
use crate::experiments::{Report, ResetError, Unavailable};

/// What the caller may see of each.
pub async fn list(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
) -> Result<Json<Value>, ApiError> {
    let reports = state.experiments.reports().await?.into_iter();
    let visible = |report| state.experiments.visible(report, |adapter| caller.access.allows(adapter));
    Ok(Json(json!({"object": "list", "data": reports.map(visible).collect::<Vec<_>>()})))
}

pub async fn get(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    PathName(name): PathName,
) -> Result<Json<Report>, ApiError> {
    match state.experiments.report(&name).await? {
        Some(report) => Ok(Json(state.experiments.visible(report, |adapter| caller.access.allows(adapter)))),
        None => Err(ResetError::UnknownExperiment(name).into()),
    }
}

/// For the administrator: puts a canary that was rolled back into traffic again.
pub async fn reset(
    State(state): State<AppState>,
    _: Admin,
    caller: Extension<Caller>,
    PathName(name): PathName,
) -> Result<Json<Report>, ApiError> {
    state.experiments.reset(&name).await?;
    get(State(state), caller, PathName(name)).await
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
