//! `/v1/files` and `/v1/fine_tuning/jobs`, as OpenAI has them, for who has the admin key.

mod files;
mod jobs;
mod listing;
mod request;

use std::sync::Arc;

use axum::Router;
use axum::extract::{DefaultBodyLimit, FromRequestParts};
use axum::http::request::Parts;
use axum::routing::{get, post};
use tokio::task::spawn_blocking;

pub use files::{DeletedFile, FileView, PURPOSE};
pub use jobs::{CheckpointView, JobEventView, JobView};
pub use listing::Page;
pub use request::{
    MAX_BATCH_SIZE, MAX_EPOCHS, MAX_MULTIPLIER, MAX_RANK, MAX_SEED, MAX_SUFFIX_LEN, MAX_VIRTUAL_TOKENS, METHODS,
    MIN_MULTIPLIER,
};

use super::AppState;
use super::auth::Admin;
use super::error::ApiError;
use crate::fine_tuning::{CancelError, CreateError, FilesError, FineTuning, Job};

pub fn routes() -> Router<AppState> {
    Router::new()
        // Its own limits are kept while the file is written.
        .route("/files", post(files::upload).layer(DefaultBodyLimit::disable()).get(files::list))
        .route("/files/{id}", get(files::get).delete(files::delete))
        .route("/files/{id}/content", get(files::content))
        .route("/fine_tuning/jobs", post(jobs::create).get(jobs::list))
        .route("/fine_tuning/jobs/{id}", get(jobs::get))
        .route("/fine_tuning/jobs/{id}/cancel", post(jobs::cancel))
        .route("/fine_tuning/jobs/{id}/events", get(jobs::events))
        .route("/fine_tuning/jobs/{id}/checkpoints", get(jobs::checkpoints))
}

/// An argument of every handler here: fine-tuning is on, and the caller has the admin key. Training takes the machine, and
/// its data are the owner's.
#[derive(Debug)]
pub struct Allowed(Arc<FineTuning>);

impl FromRequestParts<AppState> for Allowed {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &AppState) -> Result<Self, ApiError> {
        Admin::from_request_parts(parts, state).await?;
        let off = "fine-tuning is off on this server: set fine_tuning.enabled to allow it";
        state.fine_tuning.clone().map(Self).ok_or_else(|| ApiError::forbidden("fine_tuning_off", off))
    }
}

impl Allowed {
    /// Waits for the disk off the connection threads.
    async fn blocking<T: Send + 'static, E: Send + 'static>(
        self,
        work: impl FnOnce(&FineTuning) -> Result<T, E> + Send + 'static,
    ) -> Result<T, ApiError>
    where
        ApiError: From<E>,
    {
        let done = spawn_blocking(move || work(&self.0)).await.map_err(|_| ApiError::internal())?;
        Ok(done?)
    }

    /// The job, or 404.
    async fn job(&self, id: String) -> Result<Job, ApiError> {
        let this = Self(self.0.clone());
        this.blocking(move |fine_tuning| fine_tuning.job(&id).ok_or(CancelError::Unknown(id))).await
    }
}

impl From<FilesError> for ApiError {
    fn from(error: FilesError) -> Self {
        let message = error.to_string();
        match error {
            FilesError::Unknown(_) => Self::unknown_file(message),
            FilesError::Full { .. } | FilesError::Disk(_) => Self::not_writable(message),
        }
    }
}

impl From<CreateError> for ApiError {
    fn from(error: CreateError) -> Self {
        let message = error.to_string();
        match error {
            CreateError::File { field, source: FilesError::Unknown(_) } => Self::invalid(field, message),
            CreateError::Examples { field, .. } => Self::invalid(field, message),
            CreateError::File { .. } | CreateError::Disk(_) | CreateError::Adapters(_) => Self::not_writable(message),
        }
    }
}

impl From<CancelError> for ApiError {
    fn from(error: CancelError) -> Self {
        let message = error.to_string();
        match error {
            CancelError::Unknown(_) => Self::unknown_job(message),
            CancelError::Ended { .. } | CancelError::Installing(_) => Self::malformed(message),
            CancelError::Disk(_) => Self::not_writable(message),
        }
    }
}
