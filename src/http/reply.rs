//! From a generation under way to a reply, whole or streamed; completions and chat differ only in their [`ReplyShape`].

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::response::{IntoResponse, Response};
use futures::future::try_join_all;
use futures::stream::{BoxStream, SelectAll, select_all, unfold};
use futures::{Stream, StreamExt};
use serde::Serialize;
use sha2::{Digest, Sha256};
use tokio::time::timeout;

use super::AppState;
use super::auth::Caller;
use super::error::ApiError;
use super::fields::Fields;
use super::sampling::{Delivery, StreamUsage};
use super::sse;
use super::trials::{Trial, choose_arm};
use super::types::{AdapterName, IclReply, Reply, ReplyHead, Usage};
use crate::engine::request::FinishReason;
use crate::generation::{
    Completed, Generated, Generation, GenerationError, GenerationOptions, GenerationRequest, ResolvedModel,
    SequenceUsage, TextDelta, TextEvent, TextStream,
};
use crate::hexadecimal::hexadecimal;

/// Less than the 30 or 60 seconds after which proxies and clients commonly give up a server that says nothing.
const MAX_HEADER_PATIENCE: Duration = Duration::from_secs(20);

/// How one interface reads a request and words its choices.
pub trait ReplyShape: Send + Sized + 'static {
    const ID_PREFIX: &'static str;
    const OBJECT: &'static str;
    const CHUNK_OBJECT: &'static str;
    type Choice: Serialize;
    type ChunkChoice: Serialize;

    /// Everything but the way of the reply.
    fn parse(fields: &Fields) -> Result<GenerationRequest, ApiError>;
    fn new(generation: &Generation, options: &GenerationOptions) -> Self;
    fn choice(&mut self, index: usize, completed: Completed) -> Self::Choice;
    /// `None` where there is nothing to say yet.
    fn delta(&mut self, index: usize, delta: TextDelta) -> Option<Self::ChunkChoice>;
    fn finish(&mut self, index: usize, reason: FinishReason, score: Option<f32>) -> Self::ChunkChoice;
}

/// Answers in the way the client asks for. The generation lives in the response: dropping that cancels it.
pub async fn answer<S: ReplyShape>(state: &AppState, caller: &Caller, fields: &Fields) -> Result<Response, ApiError> {
    let delivery = Delivery::parse(fields)?;
    let request = S::parse(fields)?;
    let id = random_id(S::ID_PREFIX);
    let shape = S::new(&state.generation, &request.options);
    let (generated, trial) = begin(state, caller, fields.string("user")?, &id, request).await?;
    let head = |object| reply_head(state, id, object, &generated);
    match delivery {
        Delivery::Plain => plain(shape, head(S::OBJECT), generated, trial).await,
        Delivery::Stream(usage) => Ok(stream(state, shape, head(S::CHUNK_OBJECT), generated, trial, usage)),
    }
}

/// Starts a request, at the arm of its experiment if it names one, and waits for its first event: until then a failure has
/// a status, and a router may send the request elsewhere when this server is gone. `user` is who it says it is for, `id`
/// that of its reply.
///
/// # Errors
/// Those of any request, and what ended it before its first event.
pub async fn begin(
    state: &AppState,
    caller: &Caller,
    user: Option<&str>,
    id: &str,
    mut request: GenerationRequest,
) -> Result<(Generated, Trial), ApiError> {
    let mut trial = match choose_arm(state, caller, user, &mut request)? {
        Some(assignment) => Trial::assigned(state, caller, user, id, assignment, &request)?,
        None => Trial::default(),
    };
    request.charge_to(&caller.account);
    caller.log.asked(state, &request.prompts);
    match state.generation.start(request, &caller.access).await {
        Ok(mut generated) => {
            if let Some(tokens) = caller.token_limit() {
                generated.charge_to(tokens);
            }
            generated.report_to(caller.log.report());
            caller.log.replied_as(id);
            caller.log.answered_by(&generated.model);
            trial.started(&generated.model, generated.icl.as_ref());
            if let Ok(Err(error)) = timeout(header_patience(state), generated.begun()).await {
                trial.failed();
                return Err(error.into());
            }
            Ok((generated, trial))
        }
        Err(error) => {
            trial.refused(&error);
            Err(error.into())
        }
    }
}

/// How long a reply that has nothing to say yet is without a header.
pub fn header_patience(state: &AppState) -> Duration {
    match state.config.server.sse_keep_alive_seconds {
        0 => MAX_HEADER_PATIENCE,
        seconds => Duration::from_secs(seconds).min(MAX_HEADER_PATIENCE),
    }
}

async fn plain<S: ReplyShape>(
    mut shape: S,
    mut head: ReplyHead,
    generated: Generated,
    mut trial: Trial,
) -> Result<Response, ApiError> {
    let mut usage = Usage::default();
    let mut choices = Vec::new();
    for (index, completed) in complete(generated.sequences, &mut trial).await?.into_iter().enumerate() {
        IclReply::saved(&mut head.icl, completed.usage);
        usage.add(completed.usage, index.is_multiple_of(generated.num_choices));
        choices.push(shape.choice(index, completed));
    }
    Ok(Json(Reply { head: &head, choices, usage: Some(Some(usage)) }).into_response())
}

/// Waits for the end of all of them, which `trial` is told of.
pub async fn complete(sequences: Vec<TextStream>, trial: &mut Trial) -> Result<Vec<Completed>, ApiError> {
    let sequences = sequences.into_iter().map(|sequence| sequence.collect());
    let completed = try_join_all(sequences).await.inspect_err(|_| trial.failed())?;
    completed.iter().enumerate().for_each(|(index, completed)| trial.choice(index, completed));
    trial.completed();
    Ok(completed)
}

fn stream<S: ReplyShape>(
    state: &AppState,
    shape: S,
    head: ReplyHead,
    generated: Generated,
    trial: Trial,
    told_usage: StreamUsage,
) -> Response {
    let events = generated.sequences.into_iter().enumerate();
    let events = select_all(events.map(|(index, sequence)| told(index, sequence).boxed()));
    let chunks = Chunks {
        shape,
        head,
        events,
        num_choices: generated.num_choices,
        told_usage,
        usage: Usage::default(),
        trial,
        state: ChunkState::Choices,
        _model: generated.model,
    };
    sse::respond(state, unfold(chunks, async |mut chunks| Some((chunks.next().await?, chunks))))
}

/// An event of one choice.
struct Told {
    index: usize,
    event: Result<TextEvent, GenerationError>,
    /// As far as this event.
    usage: SequenceUsage,
}

fn told(index: usize, sequence: TextStream) -> impl Stream<Item = Told> {
    unfold((index, sequence), async |(index, mut sequence)| {
        let event = sequence.next().await?;
        let usage = sequence.usage();
        Some((Told { index, event, usage }, (index, sequence)))
    })
}

fn reply_head(state: &AppState, id: String, object: &'static str, generated: &Generated) -> ReplyHead {
    ReplyHead {
        id,
        object,
        created: unix_seconds(),
        model: generated.model.id.clone(),
        system_fingerprint: system_fingerprint(state.generation.base_id()),
        adapter: AdapterName::of(&generated.model),
        adapters: generated.model.applied.clone(),
        icl: generated.icl.as_ref().map(IclReply::of),
        seed: generated.seed,
    }
}

/// What a reply is called from now on, such as in feedback.
pub fn random_id(prefix: &str) -> String {
    format!("{prefix}-{:032x}", rand::random::<u128>())
}

pub fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// The same for as long as the same base is served.
fn system_fingerprint(base_id: &str) -> String {
    format!("lorry-{}", &hexadecimal(Sha256::new_with_prefix(base_id))[..10])
}

/// The events of one streamed reply, in order: choices, usage if asked for, `[DONE]`; or, after a failure, the error.
struct Chunks<S> {
    shape: S,
    head: ReplyHead,
    events: SelectAll<BoxStream<'static, Told>>,
    num_choices: usize,
    told_usage: StreamUsage,
    usage: Usage,
    trial: Trial,
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
            ChunkState::Choices => self.next_choice().await,
            ChunkState::Done => self.done(),
            ChunkState::Closed => None,
        }
    }

    async fn next_choice(&mut self) -> Option<String> {
        loop {
            match self.events.next().await {
                Some(Told { index, event: Ok(event), usage }) => match self.choice(index, event) {
                    Some(choice) => {
                        let usage = (self.told_usage == StreamUsage::Every).then(|| Usage::of(usage));
                        return Some(self.chunk(vec![choice], usage));
                    }
                    None => continue,
                },
                Some(Told { event: Err(error), .. }) => {
                    self.events.clear();
                    self.trial.failed();
                    self.state = ChunkState::Closed;
                    return Some(sse::json(&ApiError::from(error).into_envelope()));
                }
                None => {
                    self.trial.completed();
                    if self.told_usage == StreamUsage::None {
                        return self.done();
                    }
                    self.state = ChunkState::Done;
                    return Some(self.chunk(vec![], Some(self.usage)));
                }
            }
        }
    }

    fn choice(&mut self, index: usize, event: TextEvent) -> Option<S::ChunkChoice> {
        match event {
            TextEvent::Delta(delta) => {
                self.trial.push(index, &delta.text);
                self.shape.delta(index, delta)
            }
            TextEvent::Finished { reason, usage, timing, score, .. } => {
                self.trial.ended(index, usage, timing);
                IclReply::saved(&mut self.head.icl, usage);
                self.usage.add(usage, index.is_multiple_of(self.num_choices));
                Some(self.shape.finish(index, reason, score))
            }
        }
    }

    fn chunk(&self, choices: Vec<S::ChunkChoice>, usage: Option<Usage>) -> String {
        let usage = (self.told_usage != StreamUsage::None).then_some(usage);
        sse::json(&Reply { head: &self.head, choices, usage })
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
