//! Candidates that are promoted in an experiment: asked for by the administrator, and looked back at.

use axum::extract::State;
use axum::{Extension, Json};
use serde_json::{Map, Value, json};

use super::AppState;
use super::auth::{Admin, Caller};
use super::error::ApiError;
use super::fields::{Fields, PathName};
use crate::experiments::{PromoteError, Promotion};
use crate::promotion::{self, BeginError};

/// What was promoted, or was to be, the latest first.
pub async fn list(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    PathName(name): PathName,
) -> Result<Json<Value>, ApiError> {
    let promotions = state.experiments.promotions(&name, |adapter| caller.access.allows(adapter)).await?;
    let promotions = promotions.ok_or(PromoteError::UnknownExperiment(name))?;
    Ok(Json(json!({"object": "list", "data": promotions})))
}

/// For the administrator: begins with a candidate, which is to be checked.
pub async fn begin(
    State(state): State<AppState>,
    _: Admin,
    PathName(name): PathName,
    fields: Option<Fields>,
) -> Result<Json<Promotion>, ApiError> {
    let fields = fields.unwrap_or_else(|| Map::new().into());
    fields.refuse_others(&["adapter"])?;
    let adapter = fields.string("adapter")?;
    let AppState { generation, experiments, fine_tuning, .. } = &state;
    Ok(Json(promotion::begin(generation, experiments, fine_tuning.clone(), &name, adapter).await?))
}

impl From<PromoteError> for ApiError {
    fn from(error: PromoteError) -> Self {
        let message = error.to_string();
        match error {
            PromoteError::UnknownExperiment(_) => Self::unknown_experiment(message),
            PromoteError::NoPromotion(_) => Self::invalid("name", message),
            PromoteError::UnderWay { .. } => Self::promotion_under_way(message),
            PromoteError::Unavailable(cause) => cause.into(),
        }
    }
}

impl From<BeginError> for ApiError {
    fn from(error: BeginError) -> Self {
        let message = error.to_string();
        match error {
            BeginError::Promote(error) => error.into(),
            BeginError::Adapter(error) => Self::from(error).renamed("adapter"),
            BeginError::NotLoaded(error) => Self::from(error).renamed("adapter"),
            BeginError::Base(_) | BeginError::TrainedOn { .. } => Self::invalid("adapter", message),
            BeginError::TooFewPairs { .. } => Self::invalid("name", message),
            BeginError::Panicked(_) => {
                tracing::error!("{message}");
                Self::internal()
            }
        }
    }
}
