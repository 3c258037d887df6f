//! Anthropic's interface: messages made of blocks, streams of named events, and errors of its own form.

mod message;
mod request;
mod stream;

pub use message::Message;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use schemars::JsonSchema;
use serde::Serialize;

use request::read_messages;

use super::AppState;
use super::auth::Caller;
use super::chat::ChatShape;
use super::error::ApiError;
use super::fields::Fields;
use super::reply::ReplyShape;
use super::run::Run;
use super::sent_as::Translated;
use super::tokenize::unrecorded_chat;

#[derive(Debug, JsonSchema, Serialize)]
pub struct TokenCount {
    input_tokens: usize,
}

/// `POST /v1/messages`
pub async fn messages(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    fields: Fields,
) -> Result<Response, ApiError> {
    if fields.count("max_tokens", 1..=u32::MAX)?.is_none() {
        return Err(ApiError::invalid("max_tokens", "`max_tokens` is required"));
    }
    let is_streamed = fields.boolean("stream")?.unwrap_or(false);
    let Translated { fields: chat, sent_as } = read_messages(&fields)?;
    let id = format!("msg_{:032x}", rand::random::<u128>());
    let start = async || {
        let request = ChatShape::parse(&chat)?;
        let stops = request.options.stop.clone();
        Ok((stops, Run::start(&state, &caller, chat.string("user")?, &id, request).await?))
    };
    let (stops, run) = start().await.map_err(|error| sent_as.word(error))?;
    if is_streamed {
        return Ok(stream::respond(&state, id, run, stops));
    }
    Ok(Json(message::whole(id, run, &stops).await?).into_response())
}

/// `POST /v1/messages/count_tokens`
pub async fn count_tokens(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    fields: Fields,
) -> Result<Json<TokenCount>, ApiError> {
    let Translated { fields: chat, sent_as } = read_messages(&fields)?;
    let count = async || {
        let request = unrecorded_chat(&state, &caller, &chat)?;
        Ok(state.generation.count_prompt_tokens(request, &caller.access).await?)
    };
    let input_tokens = count().await.map_err(|error: ApiError| sent_as.word(error))?;
    Ok(Json(TokenCount { input_tokens }))
}
