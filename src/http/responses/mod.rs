//! OpenAI's Responses: `POST /v1/responses`, and the replies kept for conversations that go on from them.

mod kept;
mod reply;
mod request;
mod tools;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use serde_json::{Value, json};

use super::AppState;
use super::auth::Caller;
use super::chat::ChatShape;
use super::error::ApiError;
use super::fields::{Fields, PathName};
use super::reply::{ReplyShape, random_id};
use super::run::Run;
use super::sent_as::Translated;
pub use kept::KeptResponses;
use kept::{Kept, Turn};
use reply::Writer;
use request::ResponseRequest;

pub async fn create(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    fields: Fields,
) -> Result<Response, ApiError> {
    let previous = match fields.string("previous_response_id")? {
        None => Vec::new(),
        Some(id) => state.responses.get(&caller, id).ok_or_else(|| unknown("previous_response_id", id))?.messages,
    };
    let request = ResponseRequest::parse(&fields, previous)?;
    let Translated { fields: chat, sent_as } = request.chat;
    let id = random_id("resp");
    let start = async || {
        let generation = ChatShape::parse(&chat)?;
        Run::start(&state, &caller, fields.string("user")?, &id, generation).await
    };
    let run = start().await.map_err(|error| sent_as.word(error))?;
    let writer = Writer::new(id, run.model_id(), request.echoed, request.offered);
    let turn = Turn {
        responses: request.is_stored.then(|| state.responses.clone()),
        identity: caller.identity.clone(),
        messages: request.messages,
    };
    if fields.boolean("stream")?.unwrap_or(false) {
        return Ok(reply::stream(&state, run, writer, turn));
    }
    reply::whole(run, writer, turn).await
}

/// `GET /v1/responses/{id}`
pub async fn get(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    PathName(id): PathName,
) -> Result<Json<Value>, ApiError> {
    let Kept { response, .. } = state.responses.get(&caller, &id).ok_or_else(|| unknown("id", &id))?;
    Ok(Json(response))
}

/// `DELETE /v1/responses/{id}`
pub async fn delete(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    PathName(id): PathName,
) -> Result<Response, ApiError> {
    if !state.responses.remove(&caller, &id) {
        return Err(unknown("id", &id));
    }
    Ok(Json(json!({"id": id, "object": "response", "deleted": true})).into_response())
}

fn unknown(param: &str, id: &str) -> ApiError {
    let message = format!(
        "`{param}` is `{id:.80}`, of which nothing is kept: it was sent with `store`: false, deleted, or crowded out; send \
         the whole conversation as `input`"
    );
    ApiError::unknown_response(param, message)
}
