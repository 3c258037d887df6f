//! `/v1/fine_tuning/jobs`: jobs, and what happens to them.

use std::collections::BTreeMap;

use axum::extract::State;
use axum::{Extension, Json};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Value, json};

use super::Allowed;
use super::listing::{ListQuery, Page};
use super::request;
use crate::fine_tuning::{Event, FineTuning, Hyperparameters, Job, Level, Method, Metrics, Status};
use crate::http::AppState;
use crate::http::auth::Caller;
use crate::http::error::ApiError;
use crate::http::fields::{Fields, PathName};

const DEFAULT_LIMIT: usize = 20;
const MAX_LIMIT: usize = 100;
/// Of events: a job has one for each step.
const MAX_EVENTS: usize = 10_000;

#[derive(Debug, JsonSchema, Serialize)]
pub struct JobView {
    id: String,
    object: &'static str,
    /// Unix seconds.
    created_at: u64,
    finished_at: Option<u64>,
    status: Status,
    model: String,
    /// What a request names as its model, once the job has succeeded.
    fine_tuned_model: Option<String>,
    training_file: String,
    validation_file: Option<String>,
    seed: u32,
    method: Value,
    /// What `auto` stands for is said at once.
    hyperparameters: Hyperparameters,
    metadata: Option<BTreeMap<String, String>>,
    trained_tokens: Option<u64>,
    error: Option<JobError>,
    estimated_finish: Option<u64>,
    organization_id: &'static str,
    result_files: [String; 0],
    integrations: [String; 0],
}

#[derive(Debug, JsonSchema, Serialize)]
struct JobError {
    code: &'static str,
    message: String,
    param: Option<String>,
}

#[derive(Debug, JsonSchema, Serialize)]
pub struct JobEventView {
    id: String,
    object: &'static str,
    /// Unix seconds.
    created_at: u64,
    level: Level,
    message: String,
    /// `metrics` for a step or a validation, else `message`.
    #[serde(rename = "type")]
    kind: &'static str,
    data: Option<Metrics>,
}

#[derive(Debug, JsonSchema, Serialize)]
pub struct CheckpointView {
    id: String,
    object: &'static str,
    /// Unix seconds.
    created_at: u64,
    fine_tuning_job_id: String,
    fine_tuned_model_checkpoint: String,
    step_number: u64,
    metrics: CheckpointMetrics,
}

/// Nats a token.
#[derive(Debug, JsonSchema, Serialize)]
struct CheckpointMetrics {
    step: u64,
    train_loss: Option<f64>,
    valid_loss: f64,
}

impl JobView {
    fn new(state: &AppState, job: Job) -> Self {
        let hyperparameters = job.hyperparameters;
        let has_succeeded = job.status == Status::Succeeded;
        Self {
            object: "fine_tuning.job",
            created_at: job.created_at,
            finished_at: job.finished_at,
            status: job.status,
            fine_tuned_model: has_succeeded.then(|| state.generation.model_id(&job.adapter)),
            id: job.id,
            model: job.model,
            training_file: job.training_file,
            validation_file: job.validation_file,
            seed: job.seed,
            method: method(job.method, hyperparameters),
            hyperparameters,
            metadata: job.metadata,
            trained_tokens: job.trained_tokens,
            error: job.error.map(|message| JobError { code: "training_failed", message, param: None }),
            estimated_finish: None,
            organization_id: "",
            result_files: [],
            integrations: [],
        }
    }
}

/// As it can be sent again.
fn method(method: Method, hyperparameters: Hyperparameters) -> Value {
    let (kind, own) = match method {
        Method::Supervised => ("supervised", None),
        Method::Lora { rank } => ("lora", Some(("rank", rank))),
        Method::Ia3 => ("ia3", None),
        Method::Prompt { num_virtual_tokens } => ("prompt", Some(("num_virtual_tokens", num_virtual_tokens))),
        Method::Prefix { num_virtual_tokens } => ("prefix", Some(("num_virtual_tokens", num_virtual_tokens))),
    };
    let mut settings = json!({"hyperparameters": hyperparameters});
    if let Some((name, value)) = own {
        settings[name] = value.into();
    }
    json!({"type": kind, kind: settings})
}

impl JobEventView {
    fn new(job: &str, (index, event): (usize, Event)) -> Self {
        Self {
            // Within its job: the list is asked for by the job's.
            id: format!("{}-{index}", job.replacen("ftjob-", "ftevent-", 1)),
            object: "fine_tuning.job.event",
            created_at: event.created_at,
            level: event.level,
            message: event.message,
            kind: if event.metrics.is_some() { "metrics" } else { "message" },
            data: event.metrics,
        }
    }
}

/// Queues a job. Its files are read first: what is wrong in them is said here.
pub async fn create(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    allowed: Allowed,
    fields: Fields,
) -> Result<Json<JobView>, ApiError> {
    let (new, model) = request::read(&fields)?;
    if state.generation.find_model(model, &caller.access)?.is_some() {
        let message =
            format!("`model` must be the base, {}: adapters are not trained further", state.generation.base_id());
        return Err(ApiError::invalid("model", message));
    }
    let job = allowed.blocking(move |fine_tuning| fine_tuning.create(new)).await?;
    Ok(Json(JobView::new(&state, job)))
}

/// The latest first.
pub async fn list(
    State(state): State<AppState>,
    allowed: Allowed,
    query: ListQuery,
) -> Result<Json<Page<JobView>>, ApiError> {
    query.refuse("metadata")?;
    let jobs = allowed.blocking(|fine_tuning| Ok::<_, ApiError>(fine_tuning.jobs())).await?;
    let jobs = jobs.into_iter().rev().map(|job| JobView::new(&state, job)).collect();
    Ok(Json(query.page(jobs, |job| &job.id, DEFAULT_LIMIT, MAX_LIMIT)?))
}

pub async fn get(
    State(state): State<AppState>,
    allowed: Allowed,
    PathName(id): PathName,
) -> Result<Json<JobView>, ApiError> {
    Ok(Json(JobView::new(&state, allowed.job(id).await?)))
}

pub async fn cancel(
    State(state): State<AppState>,
    allowed: Allowed,
    PathName(id): PathName,
) -> Result<Json<JobView>, ApiError> {
    let job = allowed.blocking(move |fine_tuning| fine_tuning.cancel(&id)).await?;
    Ok(Json(JobView::new(&state, job)))
}

/// The latest first.
pub async fn events(
    allowed: Allowed,
    PathName(id): PathName,
    query: ListQuery,
) -> Result<Json<Page<JobEventView>>, ApiError> {
    let job = allowed.job(id).await?.id;
    let of = job.clone();
    let read = move |fine_tuning: &FineTuning| {
        fine_tuning.events(&of).map_err(|e| {
            tracing::error!("the events of a fine-tuning job cannot be read: {e}");
            ApiError::internal()
        })
    };
    let events = allowed.blocking(read).await?;
    let events = events.into_iter().rev().map(|event| JobEventView::new(&job, event)).collect();
    Ok(Json(query.page(events, |event| &event.id, DEFAULT_LIMIT, MAX_EVENTS)?))
}

/// The weights that are kept, once they are served.
pub async fn checkpoints(
    State(state): State<AppState>,
    allowed: Allowed,
    PathName(id): PathName,
    query: ListQuery,
) -> Result<Json<Page<CheckpointView>>, ApiError> {
    let job = allowed.job(id).await?;
    let kept = job.checkpoint.filter(|_| job.status == Status::Succeeded);
    let view = kept.map(|kept| CheckpointView {
        id: format!("{}-{}", job.id.replacen("ftjob-", "ftckpt-", 1), kept.step),
        object: "fine_tuning.job.checkpoint",
        created_at: kept.created_at,
        fine_tuned_model_checkpoint: state.generation.model_id(&job.adapter),
        fine_tuning_job_id: job.id,
        step_number: kept.step,
        metrics: CheckpointMetrics { step: kept.step, train_loss: kept.train_loss, valid_loss: kept.valid_loss },
    });
    Ok(Json(query.page(view.into_iter().collect(), |view| &view.id, DEFAULT_LIMIT, MAX_LIMIT)?))
}
