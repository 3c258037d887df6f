//! From a generation under way to a reply, whole or streamed; completions and chat differ only in their [`ReplyShape`].

use std::time::{SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::response::{IntoResponse, Response};
use futures::StreamExt;
use futures::future::try_join_all;
use futures::stream::{BoxStream, SelectAll, select_all};
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::AppState;
use super::error::ApiError;
use super::sampling::Delivery;
use super::sse;
use super::types::{AdapterName, Reply, ReplyHead, Usage};
use crate::engine::request::FinishReason;
use crate::generation::{Completed, Generated, GenerationError, ResolvedModel, TextDelta, TextEvent};

/// How one interface words its choices.
pub trait ReplyShape: Send + 'static {
    const ID_PREFIX: &'static str;
    const OBJECT: &'static str;
    const CHUNK_OBJECT: &'static str;
    type Choice: Serialize;
    type ChunkChoice: Serialize;

    fn choice(&self, index: usize, completed: Completed) -> Self::Choice;
    fn delta(&mut self, index: usize, delta: TextDelta) -> Self::ChunkChoice;
    fn finish(&mut self, index: usize, reason: FinishReason) -> Self::ChunkChoice;
}

/// Answers in the way the client asked for. The generation lives in the response: dropping that cancels it.
pub async fn respond<S: ReplyShape>(
    state: &AppState,
    shape: S,
    generated: Generated,
    delivery: Delivery,
) -> Result<Response, ApiError> {
    match delivery {
        Delivery::Plain => plain(state, shape, generated).await,
        Delivery::Stream { include_usage } => Ok(stream(state, shape, generated, include_usage)),
    }
}

async fn plain<S: ReplyShape>(state: &AppState, shape: S, generated: Generated) -> Result<Response, ApiError> {
    let head = reply_head::<S>(state, &generated, S::OBJECT);
    let sequences = generated.sequences.into_iter().map(|sequence| sequence.collect());
    let mut usage = Usage::default();
    let mut choices = Vec::new();
    for (index, completed) in try_join_all(sequences).await?.into_iter().enumerate() {
        usage.add(completed.usage, index.is_multiple_of(generated.num_choices));
        choices.push(shape.choice(index, completed));
    }
    Ok(Json(Reply { head: &head, choices, usage: Some(Some(usage)) }).into_response())
}

fn stream<S: ReplyShape>(state: &AppState, shape: S, generated: Generated, include_usage: bool) -> Response {
    let head = reply_head::<S>(state, &generated, S::CHUNK_OBJECT);
    let events = generated.sequences.into_iter().enumerate();
    let events = select_all(events.map(|(index, sequence)| sequence.map(move |event| (index, event)).boxed()));
    let chunks = Chunks {
        shape,
        head,
        events,
        num_choices: generated.num_choices,
        include_usage,
        usage: Usage::default(),
        state: ChunkState::Choices,
        _model: generated.model,
    };
    sse::respond(futures::stream::unfold(chunks, async |mut chunks| Some((chunks.next().await?, chunks))))
}

fn reply_head<S: ReplyShape>(state: &AppState, generated: &Generated, object: &'static str) -> ReplyHead {
    ReplyHead {
        id: format!("{}-{:032x}", S::ID_PREFIX, rand::random::<u128>()),
        object,
        created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        model: generated.model.id.clone(),
        system_fingerprint: system_fingerprint(state.generation.base_id()),
        adapter: AdapterName::of(&generated.model),
        adapters: generated.model.applied.clone(),
        seed: generated.seed,
    }
}

/// The same for as long as the same base is served.
fn system_fingerprint(base_id: &str) -> String {
    let digest = Sha256::digest(base_id.as_bytes());
    digest.iter().take(5).fold("lorry-".to_owned(), |name, byte| name + &format!("{byte:02x}"))
}

/// The events of one streamed reply, in order: choices, usage if asked for, `[DONE]`; or, after a failure, the error.
struct Chunks<S> {
    shape: S,
    head: ReplyHead,
    events: SelectAll<BoxStream<'static, (usize, Result<TextEvent, GenerationError>)>>,
    num_choices: usize,
    include_usage: bool,
    usage: Usage,
    state: ChunkState,
    /// The weights are held until the reply has ended.
    _model: ResolvedModel,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ChunkState {
    Choices,
    Done,
    Closed,
}

impl<S: ReplyShape> Chunks<S> {
    /// The data of the next event.
    async fn next(&mut self) -> Option<String> {
        match self.state {
            ChunkState::Choices => match self.events.next().await {
                Some((index, Ok(event))) => Some(self.choice(index, event)),
                Some((_, Err(error))) => {
                    self.events.clear();
                    self.state = ChunkState::Closed;
                    Some(sse::json(&ApiError::from(error).into_envelope()))
                }
                None if self.include_usage => {
                    self.state = ChunkState::Done;
                    Some(self.chunk(vec![], Some(self.usage)))
                }
                None => self.done(),
            },
            ChunkState::Done => self.done(),
            ChunkState::Closed => None,
        }
    }

    fn choice(&mut self, index: usize, event: TextEvent) -> String {
        let choice = match event {
            TextEvent::Delta(delta) => self.shape.delta(index, delta),
            TextEvent::Finished { reason, usage } => {
                self.usage.add(usage, index.is_multiple_of(self.num_choices));
                self.shape.finish(index, reason)
            }
        };
        self.chunk(vec![choice], None)
    }

    fn chunk(&self, choices: Vec<S::ChunkChoice>, usage: Option<Usage>) -> String {
        sse::json(&Reply { head: &self.head, choices, usage: self.include_usage.then_some(usage) })
    }

    fn done(&mut self) -> Option<String> {
        self.state = ChunkState::Closed;
        Some(sse::DONE.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fingerprint_depends_on_the_base_alone() {
        assert_eq!(system_fingerprint("a"), system_fingerprint("a"));
        assert_ne!(system_fingerprint("a"), system_fingerprint("b"));
        assert_eq!(system_fingerprint("a").len(), "lorry-".len() + 10);
    }
}
