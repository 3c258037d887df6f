//! `POST /infill` and `POST /completion`

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use futures::stream::unfold;
use serde_json::Value;

use super::reply::{Part, Reply, Selected, settings};
use super::request::{read_completion, read_infill};
use crate::generation::{Completed, Generated, GenerationRequest, TextEvent};
use crate::http::AppState;
use crate::http::auth::Caller;
use crate::http::error::ApiError;
use crate::http::fields::Fields;
use crate::http::reply::{begin, complete, random_id};
use crate::http::run::Sequence;
use crate::http::sse;
use crate::http::tokenize::text_of;

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
    let (request, sent_as) = read_infill(&fields)?;
    answer(&state, &caller, &fields, request).await.map_err(|error| sent_as.word(error))
}

pub async fn completion(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    fields: Fields,
) -> Result<Response, ApiError> {
    let (request, sent_as) = read_completion(&fields)?;
    answer(&state, &caller, &fields, request).await.map_err(|error| sent_as.word(error))
}

async fn answer(
    state: &AppState,
    caller: &Caller,
    fields: &Fields,
    request: GenerationRequest,
) -> Result<Response, ApiError> {
    let selected = Selected::parse(fields)?;
    let (user, id) = (fields.string("user")?, random_id("cmpl"));
    let options = request.options.clone();
    if fields.boolean("stream")?.unwrap_or(false) {
        if request.prompts.len() != 1 {
            return Err(ApiError::invalid("prompt", "`prompt` must be one prompt where `stream` is true"));
        }
        if options.num_choices != 1 {
            return Err(ApiError::invalid("n_cmpl", "`n_cmpl` must be 1 where `stream` is true"));
        }
        let sequence = Sequence::start(state, caller, user, &id, request).await?;
        let settings = settings(&options, sequence.seed);
        let prompt = text_of(state, &sequence.prompt_tokens);
        return Ok(stream(state, Events { sequence, prompt, settings, selected, has_new_line: false }));
    }
    let (generated, mut trial) = begin(state, caller, user, &id, request).await?;
    let Generated { model, prompts, sequences, seed, num_choices, .. } = generated;
    let settings = settings(&options, seed);
    let completed = complete(sequences, &mut trial).await?;
    let reply = |(index, completed): (usize, Completed)| {
        let prompt = prompts.get(index / num_choices).map_or_else(String::new, |tokens| text_of(state, tokens));
        Ok(selected.of(json(&Reply::new(index, completed, prompt, &model.id, &settings))?))
    };
    // One object, or for several choices or prompts an array of them.
    let mut replies = completed.into_iter().enumerate().map(reply).collect::<Result<Vec<_>, ApiError>>()?;
    let reply = if replies.len() == 1 { replies.remove(0) } else { Value::Array(replies) };
    Ok(Json(reply).into_response())
}

/// One choice under way.
struct Events {
    sequence: Sequence,
    prompt: String,
    settings: Value,
    selected: Selected,
    /// In the output so far.
    has_new_line: bool,
}

impl Events {
    /// The data of the next event. The last one is the whole reply without the text.
    async fn next(&mut self) -> Option<String> {
        Some(match self.sequence.next().await? {
            Ok(TextEvent::Delta(delta)) => {
                self.has_new_line |= delta.text.contains('\n');
                let usage = self.sequence.usage();
                sse::json(&Part::new(delta, usage))
            }
            Ok(TextEvent::Finished { reason, stop, usage, timing, score }) => {
                let completed =
                    Completed { text: String::new(), tokens: Vec::new(), reason, stop, usage, timing, score };
                let prompt = std::mem::take(&mut self.prompt);
                let mut reply = Reply::new(0, completed, prompt, &self.sequence.model.id, &self.settings);
                reply.has_new_line = self.has_new_line;
                match json(&reply) {
                    Ok(reply) => sse::json(&self.selected.of(reply)),
                    Err(error) => sse::json(&error.into_envelope()),
                }
            }
            Err(error) => sse::json(&error.into_envelope()),
        })
    }
}

/// Nothing comes after the last event.
fn stream(state: &AppState, events: Events) -> Response {
    sse::respond(state, unfold(events, async |mut events| Some((events.next().await?, events))))
}

fn json(reply: &Reply<'_>) -> Result<Value, ApiError> {
    serde_json::to_value(reply).map_err(|error| {
        tracing::error!(%error, "a reply could not be written as JSON");
        ApiError::internal()
    })
}
