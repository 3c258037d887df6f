//! `POST /v1/compare`: one prompt, several arms, one batch.

mod arms;
mod reply;

#[cfg(test)]
pub use arms::ALTERNATIVES;
pub use arms::{MAX_ARMS, MAX_NAME_LEN, MIN_ARMS};
pub use reply::{Chunk, CompareReply, End};

use std::collections::VecDeque;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use futures::future::join_all;
use tokio::time::timeout;

use super::AppState;
use super::auth::Caller;
use super::error::ApiError;
use super::fields::Fields;
use super::reply::{header_patience, random_id, unix_seconds};
use super::sse;
use super::trials::{Trial, choose_arm};
use crate::compare::{ArmEvent, Comparison};
use crate::generation::{GenerationRequest, Places, Prepared};
use arms::{ArmRequest, CompareRequest, OnError};
use reply::{ArmHead, ArmReply, ChunkEvent, Failure, Finished, Outcome};

pub async fn compare(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    fields: Fields,
) -> Result<Response, ApiError> {
    let CompareRequest { arms, seed, on_error, is_streamed } = CompareRequest::parse(&fields)?;
    let num_sequences = |arm: &ArmRequest| arm.request.as_ref().map_or(0, GenerationRequest::num_sequences);
    let mut places = state.generation.reserve(arms.iter().map(num_sequences).sum(), "arms")?;
    let (state, caller) = (&state, &caller);
    let prepared = arms.iter().map(|arm| {
        let places = places.take(num_sequences(arm));
        async move { prepare(state, caller, arm, places).await.map_err(|error| arm.placed(error)) }
    });
    let mut prepared = join_all(prepared).await;
    if let (OnError::Fail, Some(refused)) = (on_error, prepared.iter().position(Result::is_err)) {
        prepared.swap_remove(refused)?;
    }
    let split = prepared.into_iter().map(|prepared| match prepared {
        Ok(prepared) => (Some(prepared), None),
        Err(error) => (None, Some(error)),
    });
    let (ready, refused): (Vec<_>, Vec<_>) = split.unzip();
    let (fails_whole, limit) = (on_error == OnError::Fail, caller.token_limit());
    let comparison = Comparison::start(&state.generation, ready, fails_whole, limit, caller.log.report())?;
    comparison.arms().flatten().for_each(|arm| caller.log.answered_by(&arm.model));
    let id = random_id("cmp");
    caller.log.replied_as(&id);
    let heads = comparison.arms().map(|arm| arm.map(ArmHead::of)).collect();
    let trials = comparison.arms().zip(&arms).map(|(started, arm)| match (started, &arm.request) {
        (Some(started), Ok(request)) => {
            let mut trial = Trial::compared(state, &id, &arm.name, request);
            trial.started(&started.model, started.icl.as_ref());
            trial
        }
        _ => Trial::default(),
    });
    let run = Run {
        trials: trials.collect(),
        id,
        created: unix_seconds(),
        seed,
        arms,
        heads,
        comparison,
        on_error,
        written: VecDeque::new(),
        has_ended: false,
    };
    if is_streamed { run.stream(state, refused).await } else { run.collect(refused).await }
}

/// All that an arm needs before it can start.
async fn prepare(state: &AppState, caller: &Caller, arm: &ArmRequest, places: Places) -> Result<Prepared, ApiError> {
    let mut request = arm.request.clone()?;
    // An experiment's arm takes part as the model it is: what is compared here is no traffic of the experiment.
    choose_arm(state, caller, arm.user.as_deref(), &mut request)?;
    request.charge_to(&caller.account);
    caller.log.asked(state, &request.prompts);
    Ok(state.generation.prepare(request, &caller.access, places).await?)
}

/// A comparison under way, as its client knows it.
struct Run {
    id: String,
    /// Unix seconds.
    created: u64,
    seed: i64,
    arms: Vec<ArmRequest>,
    /// `None` for arms that did not start or have ended.
    heads: Vec<Option<ArmHead>>,
    /// Of each arm.
    trials: Vec<Trial>,
    comparison: Comparison,
    on_error: OnError,
    /// Events to be sent before the next one is waited for.
    written: VecDeque<String>,
    has_ended: bool,
}

impl Run {
    /// Waits for the end of every arm.
    async fn collect(mut self, refused: Vec<Option<ApiError>>) -> Result<Response, ApiError> {
        let mut outcomes: Vec<Option<Outcome>> =
            refused.into_iter().map(|error| error.map(|error| Outcome::Failed(Failure::of(error)))).collect();
        while let Some((index, event)) = self.comparison.next().await {
            self.observe(index, &event);
            outcomes[index] = match event {
                ArmEvent::Delta(_) => continue,
                ArmEvent::Finished(result) => {
                    self.heads[index].take().map(|head| Outcome::Finished(Box::new(Finished::of(head, result))))
                }
                ArmEvent::Failed(error) => {
                    let error = self.arms[index].placed(error.into());
                    if self.on_error == OnError::Fail {
                        return Err(error);
                    }
                    Some(Outcome::Failed(Failure::of(error)))
                }
            };
        }
        let arms = self.arms.iter().zip(outcomes).map(|(arm, outcome)| ArmReply { name: &arm.name, outcome });
        let arms = arms.collect();
        let reply = CompareReply { id: &self.id, object: "comparison", created: self.created, seed: self.seed, arms };
        Ok(Json(reply).into_response())
    }

    /// As every stream, it has its header with the first event of an arm.
    async fn stream(mut self, state: &AppState, refused: Vec<Option<ApiError>>) -> Result<Response, ApiError> {
        for (index, error) in refused.into_iter().enumerate() {
            match (self.heads[index].clone(), error) {
                (Some(head), _) => self.write(index, ChunkEvent::Start(head)),
                (None, Some(error)) => self.write(index, ChunkEvent::Error(Failure::of(error))),
                (None, None) => {}
            }
        }
        match timeout(header_patience(state), self.comparison.next()).await {
            Ok(Some((index, ArmEvent::Failed(error)))) if self.on_error == OnError::Fail => {
                self.trials[index].failed();
                return Err(self.arms[index].placed(error.into()));
            }
            Ok(Some((index, event))) => self.tell(index, event),
            Ok(None) | Err(_) => {}
        }
        Ok(sse::respond(state, futures::stream::unfold(self, async |mut run| Some((run.next().await?, run)))))
    }

    /// The data of the next event.
    async fn next(&mut self) -> Option<String> {
        if self.written.is_empty() && !self.has_ended {
            match self.comparison.next().await {
                Some((index, event)) => self.tell(index, event),
                None => {
                    self.has_ended = true;
                    self.written.push_back(sse::json(&End { id: &self.id, event: "done" }));
                    self.written.push_back(sse::DONE.to_owned());
                }
            }
        }
        self.written.pop_front()
    }

    fn observe(&mut self, index: usize, event: &ArmEvent) {
        let trial = &mut self.trials[index];
        match event {
            ArmEvent::Delta(_) => {}
            ArmEvent::Finished(result) => {
                trial.push(0, &result.text);
                trial.ended(0, result.usage, result.timing);
                trial.completed();
            }
            ArmEvent::Failed(_) => trial.failed(),
        }
    }

    fn tell(&mut self, index: usize, event: ArmEvent) {
        self.observe(index, &event);
        let event = match event {
            ArmEvent::Delta(text) => ChunkEvent::Delta { text },
            ArmEvent::Finished(result) => match self.heads[index].take() {
                Some(head) => ChunkEvent::Finish(Finished::of(head, result)),
                None => return,
            },
            ArmEvent::Failed(error) => {
                // The others are cancelled with the end of the reply.
                self.has_ended = self.on_error == OnError::Fail;
                ChunkEvent::Error(Failure::of(self.arms[index].placed(error.into())))
            }
        };
        self.write(index, event);
    }

    fn write(&mut self, arm: usize, event: ChunkEvent) {
        let chunk = Chunk { id: &self.id, arm, name: &self.arms[arm].name, event };
        self.written.push_back(sse::json(&chunk));
    }
}
