//! `GET /v1/models`: the base and every adapter that can be asked for, in memory or not, and the aliases of
//! experiments.

use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use chrono::{DateTime, SecondsFormat, Utc};
use schemars::JsonSchema;
use serde::Serialize;

use super::AppState;
use super::auth::Caller;
use super::dialect::Dialect;
use super::error::ApiError;
use super::fields::{Fields, PathName};
use crate::adapter::registry::AdapterStatus;
use crate::icl;

#[derive(Debug, JsonSchema, Serialize)]
pub struct ModelList {
    object: &'static str,
    data: Vec<ModelCard>,
}

#[derive(Debug, JsonSchema, Serialize)]
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
    meta: ModelMeta,
    adapter: Option<AdapterCard>,
}

/// Of the base, in llama.cpp's words: clients that see it ask `/props` for the rest.
#[derive(Debug, JsonSchema, Serialize)]
struct ModelMeta {
    n_vocab: usize,
    n_ctx: usize,
    n_ctx_train: usize,
    n_embd: usize,
    n_params: u64,
    /// Bytes of the file.
    size: u64,
}

/// What is not known before the adapter has been read is `null`.
#[derive(Debug, JsonSchema, Serialize)]
struct AdapterCard {
    name: String,
    generation: Option<String>,
    task: Option<String>,
    description: Option<String>,
    num_sites: Option<usize>,
    max_rank: Option<usize>,
    resident_bytes: Option<usize>,
}

/// As Anthropic lists models.
#[derive(Debug, JsonSchema, Serialize)]
pub struct AnthropicModelList {
    data: Vec<AnthropicModelCard>,
    first_id: Option<String>,
    last_id: Option<String>,
    has_more: bool,
}

#[derive(Debug, JsonSchema, Serialize)]
pub struct AnthropicModelCard {
    #[serde(rename = "type")]
    kind: &'static str,
    id: String,
    display_name: String,
    /// RFC 3339.
    created_at: String,
}

impl From<ModelCard> for AnthropicModelCard {
    fn from(card: ModelCard) -> Self {
        let created = i64::try_from(card.created).ok().and_then(|seconds| DateTime::<Utc>::from_timestamp(seconds, 0));
        let created_at = created.unwrap_or_default().to_rfc3339_opts(SecondsFormat::Secs, true);
        Self { kind: "model", display_name: card.id.clone(), id: card.id, created_at }
    }
}

impl From<Vec<ModelCard>> for AnthropicModelList {
    fn from(cards: Vec<ModelCard>) -> Self {
        let data: Vec<AnthropicModelCard> = cards.into_iter().map(Into::into).collect();
        let id = |card: Option<&AnthropicModelCard>| card.map(|card| card.id.clone());
        Self { first_id: id(data.first()), last_id: id(data.last()), has_more: false, data }
    }
}

pub async fn list(State(state): State<AppState>, Extension(caller): Extension<Caller>, headers: HeaderMap) -> Response {
    let models = served(&state, &caller);
    if Dialect::is_anthropic(&headers) {
        return Json(AnthropicModelList::from(models)).into_response();
    }
    Json(ModelList { object: "list", data: models }).into_response()
}

fn served(state: &AppState, caller: &Caller) -> Vec<ModelCard> {
    let servable = state.generation.servable_adapters(&caller.access);
    let models = std::iter::once(None).chain(servable.map(Some)).map(|adapter| card(state, adapter));
    let aliases = state.generation.visible_aliases(&caller.access);
    let aliases = aliases.map(|(alias, adapter)| ModelCard { id: alias.to_owned(), ..card(state, adapter) });
    let experiments = state.experiments.aliases().map(|alias| alias_card(state, alias));
    models.chain(aliases).chain(experiments).collect()
}

/// Ids may contain `/`, and every name that a request accepts finds its model.
pub async fn get(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    PathName(id): PathName,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let card = find(&state, &caller, &id)?;
    if Dialect::is_anthropic(&headers) {
        return Ok(Json(AnthropicModelCard::from(card)).into_response());
    }
    Ok(Json(card).into_response())
}

/// # Errors
/// 404 where the field `model` names none that the caller may use.
pub fn check_name(state: &AppState, caller: &Caller, fields: &Fields) -> Result<(), ApiError> {
    fields.string("model")?.map_or(Ok(()), |name| find(state, caller, name).map(drop))
}

fn find(state: &AppState, caller: &Caller, name: &str) -> Result<ModelCard, ApiError> {
    if state.experiments.is_alias(name) {
        return Ok(alias_card(state, name));
    }
    let (model, _) = icl::Selection::split_model_name(name)?;
    Ok(card(state, state.generation.find_model(model, &caller.access)?))
}

/// Of an experiment, of which a client sees no more than that it can be asked.
fn alias_card(state: &AppState, alias: &str) -> ModelCard {
    ModelCard { id: alias.to_owned(), ..card(state, None) }
}

fn card(state: &AppState, adapter: Option<AdapterStatus>) -> ModelCard {
    let base_id = state.generation.base_id().to_owned();
    let context_length = state.generation.context_length();
    let file = &state.generation.base().file;
    ModelCard {
        id: adapter.as_ref().map_or(base_id.clone(), |adapter| state.generation.model_id(&adapter.name)),
        object: "model",
        created: state.started,
        owned_by: "lorry",
        parent: adapter.is_some().then(|| base_id.clone()),
        root: base_id,
        max_model_len: context_length,
        context_length,
        meta: ModelMeta {
            n_vocab: state.generation.tokenizer().vocab_size(),
            n_ctx: context_length,
            n_ctx_train: file.trained_context_length,
            n_embd: file.hidden_size,
            n_params: file.num_parameters,
            size: file.size_bytes,
        },
        adapter: adapter.map(|adapter| AdapterCard {
            name: adapter.name,
            generation: adapter.generation,
            task: adapter.manifest.task.clone(),
            description: adapter.manifest.description.clone(),
            num_sites: adapter.coverage.as_ref().map(|coverage| coverage.num_sites),
            max_rank: adapter.coverage.as_ref().map(|coverage| coverage.max_rank),
            resident_bytes: adapter.coverage.as_ref().map(|coverage| coverage.resident_bytes),
        }),
    }
}
