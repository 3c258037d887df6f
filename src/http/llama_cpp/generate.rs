//! `POST /infill` and `POST /completion`

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use futures::StreamExt;
use futures::future::try_join_all;
use futures::stream::unfold;
use serde_json::Value;

use super::reply::{Part, Reply, Selected, settings, token_ids};
use super::request::{read_completion, read_infill};
use crate::generation::{Completed, GenerationError, GenerationRequest, ResolvedModel, TextEvent, TextStream};
use crate::http::AppState;
use crate::http::auth::Caller;
use crate::http::error::ApiError;
use crate::http::fields::Fields;
use crate::http::reply::{begin, random_id};
use crate::http::sse;
use crate::http::trials::Trial;

pub async fn infill(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    fields: Fields,
) -> Result<Response, ApiError> {
    let base = state.generation.base();
    if base.fill_in_middle.is_none() {
        let message = format!("`{}` was not trained to fill in the middle: use /completion", base.id);
        return Err(ApiError::not_supported(message));
    }
    answer(&state, &caller, &fields, read_infill(&fields)?).await
}

pub async fn completion(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    fields: Fields,
) -> Result<Response, ApiError> {
    answer(&state, &caller, &fields, read_completion(&fields)?).await
}

async fn answer(
    state: &AppState,
    caller: &Caller,
    fields: &Fields,
    request: GenerationRequest,
) -> Result<Response, ApiError> {
    let selected = Selected::parse(fields)?;
    let (user, id) = (fields.string("user")?, random_id("cmpl"));
    if fields.boolean("stream")?.unwrap_or(false) {
        if request.prompts.len() != 1 {
            return Err(ApiError::invalid("prompt", "`prompt` must be one prompt where `stream` is true"));
        }
        if request.options.num_choices != 1 {
            return Err(ApiError::invalid("n_cmpl", "`n_cmpl` must be 1 where `stream` is true"));
        }
        let options = request.options.clone();
        let (mut generated, trial) = begin(state, caller, user, &id, request).await?;
        let sequence = generated.sequences.pop().ok_or(GenerationError::EngineStopped)?;
        let settings = settings(&options, generated.seed);
        return Ok(stream(Events { sequence, trial, model: generated.model, settings, selected }));
    }
    whole(state, caller, user, &id, request, &selected).await
}

/// One object, or for several choices or prompts an array of them.
async fn whole(
    state: &AppState,
    caller: &Caller,
    user: Option<&str>,
    id: &str,
    request: GenerationRequest,
    selected: &Selected,
) -> Result<Response, ApiError> {
    let options = request.options.clone();
    let (generated, mut trial) = begin(state, caller, user, id, request).await?;
    let (model, settings) = (generated.model, settings(&options, generated.seed));
    let sequences = generated.sequences.into_iter().map(|sequence| sequence.collect());
    let completed = try_join_all(sequences).await.inspect_err(|_| trial.failed())?;
    let mut replies = Vec::with_capacity(completed.len());
    for (index, completed) in completed.into_iter().enumerate() {
        trial.choice(index, &completed);
        replies.push(selected.of(json(&Reply::new(index, completed, &model.id, &settings))?));
    }
    trial.completed();
    let reply = if replies.len() == 1 { replies.remove(0) } else { Value::Array(replies) };
    Ok(Json(reply).into_response())
}

/// One choice under way. Dropping it cancels the generation.
struct Events {
    sequence: TextStream,
    trial: Trial,
    /// The weights are held until the reply has ended.
    model: ResolvedModel,
    settings: Value,
    selected: Selected,
}

impl Events {
    /// The data of the next event. The last one is the whole reply without the text.
    async fn next(&mut self) -> Option<String> {
        Some(match self.sequence.next().await? {
            Ok(TextEvent::Delta(delta)) => {
                self.trial.push(0, &delta.text);
                sse::json(&Part { index: 0, tokens: token_ids(&delta.tokens), content: delta.text, stop: false })
            }
            Ok(TextEvent::Finished { reason, stop, usage, timing, score }) => {
                self.trial.ended(0, usage, timing);
                self.trial.completed();
                let completed =
                    Completed { text: String::new(), tokens: Vec::new(), reason, stop, usage, timing, score };
                match json(&Reply::new(0, completed, &self.model.id, &self.settings)) {
                    Ok(reply) => sse::json(&self.selected.of(reply)),
                    Err(error) => sse::json(&error.into_envelope()),
                }
            }
            Err(error) => {
                self.trial.failed();
                sse::json(&ApiError::from(error).into_envelope())
            }
        })
    }
}

/// Nothing comes after the last event.
fn stream(events: Events) -> Response {
    sse::respond(unfold(events, async |mut events| Some((events.next().await?, events))))
}

fn json(reply: &Reply<'_>) -> Result<Value, ApiError> {
    serde_json::to_value(reply).map_err(|error| {
        tracing::error!(%error, "a reply could not be written as JSON");
        ApiError::internal()
    })
}
