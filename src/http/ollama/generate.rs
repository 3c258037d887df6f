//! `POST /api/generate` and `POST /api/chat`

use axum::Extension;
use axum::extract::State;
use axum::response::Response;

use super::models::served_name;
use super::reply::{self, Wording};
use super::request::{Asked, read_chat, read_generate, read_model};
use crate::generation::{GenerationRequest, Selection};
use crate::http::AppState;
use crate::http::auth::Caller;
use crate::http::chat::ChatShape;
use crate::http::completions::CompletionShape;
use crate::http::error::ApiError;
use crate::http::fields::Fields;
use crate::http::reply::{ReplyShape, random_id};
use crate::http::run::Run;
use crate::http::sent_as::Translated;
use crate::icl;

pub async fn generate(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    fields: Fields,
) -> Result<Response, ApiError> {
    let model = served_name(&state, read_model(&fields)?.unwrap_or_default());
    let asked = read_generate(&fields, &model, state.generation.base().chat_template.is_ok())?;
    answer(&state, &caller, &fields, &model, asked, Wording::Generate).await
}

pub async fn chat(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    fields: Fields,
) -> Result<Response, ApiError> {
    let model = served_name(&state, read_model(&fields)?.unwrap_or_default());
    let asked = read_chat(&fields, &model)?;
    answer(&state, &caller, &fields, &model, asked, Wording::Chat).await
}

async fn answer(
    state: &AppState,
    caller: &Caller,
    fields: &Fields,
    model: &str,
    asked: Asked,
    wording: Wording,
) -> Result<Response, ApiError> {
    let is_streamed = fields.boolean("stream")?.unwrap_or(true);
    let (read, parse) = translated(&asked);
    let user = read.fields.string("user").map_err(|error| read.sent_as.word(error))?;
    let parse = || parse(&read.fields);
    if let Asked::Residency { is_unload, .. } = &asked {
        parse().map_err(|error| read.sent_as.word(error))?;
        let model = load(state, caller, model).await?;
        return Ok(reply::without_text(&model, wording, if *is_unload { "unload" } else { "load" }));
    }
    let start = async || Run::start(state, caller, user, &random_id("ollama"), parse()?).await;
    let run = start().await.map_err(|error| read.sent_as.word(error))?;
    if is_streamed { Ok(reply::stream(run, wording)) } else { reply::whole(run, wording).await }
}

/// Brings a model into memory and returns its name; which arm of an experiment is wanted is not known before a request.
type Parse = fn(&Fields) -> Result<GenerationRequest, ApiError>;

fn translated(asked: &Asked) -> (&Translated, Parse) {
    match asked {
        Asked::Residency { unsaid, .. } => translated(unsaid),
        Asked::Completion(read) => (read, CompletionShape::parse),
        Asked::Chat(read) => (read, ChatShape::parse),
    }
}

async fn load(state: &AppState, caller: &Caller, name: &str) -> Result<String, ApiError> {
    if state.experiments.is_alias(name) {
        return Ok(name.to_owned());
    }
    let (model, _) = icl::Selection::split_model_name(name)?;
    Ok(state.generation.resolve(&Selection::model(model), &caller.access).await?.id)
}
