//! One choice of one prompt under way: its events, for interfaces that know no more, as text and calls.

use std::collections::VecDeque;

use futures::StreamExt;
use serde_json::{Map, Value};

use super::AppState;
use super::auth::Caller;
use super::error::ApiError;
use super::reply::begin;
use super::trials::Trial;
use crate::engine::request::FinishReason;
use crate::generation::{
    GenerationError, GenerationRequest, ResolvedModel, SequenceUsage, TextEvent, TextStream, Timing,
};
use crate::tools::{CallReader, ChatPart};

/// One sequence, whose trial is told of all that happens. Dropping it cancels the generation.
pub struct Sequence {
    stream: TextStream,
    trial: Trial,
    /// The weights are held until the reply has ended.
    pub model: ResolvedModel,
    pub seed: i64,
    pub prompt_tokens: Vec<u32>,
}

impl Sequence {
    /// `request` has one prompt and asks for one choice; `user` is who it says it is for, `id` that of its reply.
    ///
    /// # Errors
    /// As those of any request.
    pub async fn start(
        state: &AppState,
        caller: &Caller,
        user: Option<&str>,
        id: &str,
        request: GenerationRequest,
    ) -> Result<Self, ApiError> {
        let (mut generated, trial) = begin(state, caller, user, id, request).await?;
        let stream = generated.sequences.pop().ok_or(GenerationError::EngineStopped)?;
        let prompt_tokens = generated.prompts.pop().unwrap_or_default();
        Ok(Self { stream, trial, model: generated.model, seed: generated.seed, prompt_tokens })
    }

    /// What is known so far; all of the prompt from the first event on.
    pub fn usage(&self) -> SequenceUsage {
        self.stream.usage()
    }

    /// The next event; an error is the last one.
    pub async fn next(&mut self) -> Option<Result<TextEvent, ApiError>> {
        let event = self.stream.next().await?;
        match &event {
            Ok(TextEvent::Delta(delta)) => self.trial.push(0, &delta.text),
            Ok(TextEvent::Finished { usage, timing, .. }) => {
                self.trial.ended(0, *usage, *timing);
                self.trial.completed();
            }
            Err(_) => self.trial.failed(),
        }
        Some(event.map_err(ApiError::from))
    }
}

/// Dropping it cancels the generation.
pub struct Run {
    sequence: Sequence,
    /// `None` where nothing may be called.
    reader: Option<CallReader>,
    /// The call under way: its name, and its arguments so far.
    call: Option<(String, String)>,
    ready: VecDeque<RunEvent>,
}

#[derive(Debug)]
pub enum RunEvent {
    /// Never empty.
    Text(String),
    /// A call of a tool begins.
    CallStarted { name: String },
    /// More of the JSON that its arguments are.
    Arguments(String),
    /// It is complete. Arguments that the end of the output has cut off are none.
    CallEnded { name: String, arguments: Map<String, Value> },
    /// The last event.
    Finished(Ending),
}

#[derive(Debug)]
pub struct Ending {
    pub reason: FinishReason,
    pub has_calls: bool,
    /// The stop string that ended it, of the request or of its adapter.
    pub stop: Option<String>,
    pub usage: SequenceUsage,
    pub timing: Timing,
}

impl Run {
    /// As [`Sequence::start`].
    ///
    /// # Errors
    /// As those of any request, and 400 when it asks for what has no place in the reply.
    pub async fn start(
        state: &AppState,
        caller: &Caller,
        user: Option<&str>,
        id: &str,
        request: GenerationRequest,
    ) -> Result<Self, ApiError> {
        let refused =
            |name: &str, advice: &str| ApiError::invalid(name, format!("`{name}` is not served here: {advice}"));
        if request.options.num_choices != 1 {
            return Err(refused("n", "this interface has one answer"));
        }
        if request.options.top_logprobs.is_some() {
            return Err(refused("logprobs", "/v1/completions and /v1/chat/completions have them"));
        }
        let reader = state.generation.call_reader(&request.options);
        let sequence = Sequence::start(state, caller, user, id, request).await?;
        Ok(Self { sequence, reader, call: None, ready: VecDeque::new() })
    }

    /// The model that answers.
    pub fn model_id(&self) -> &str {
        &self.sequence.model.id
    }

    /// What is known so far; all of the prompt from the first event on.
    pub fn usage(&self) -> SequenceUsage {
        self.sequence.usage()
    }

    /// The next event; an error is the last one.
    pub async fn next(&mut self) -> Option<Result<RunEvent, ApiError>> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(Ok(event));
            }
            match self.sequence.next().await? {
                Ok(event) => self.on_event(event),
                Err(error) => return Some(Err(error)),
            }
        }
    }

    fn on_event(&mut self, event: TextEvent) {
        match event {
            TextEvent::Delta(delta) => match &mut self.reader {
                None => self.ready.push_back(RunEvent::Text(delta.text)),
                Some(reader) => {
                    let parts = reader.push(&delta.text);
                    parts.into_iter().for_each(|part| self.on_part(part));
                }
            },
            TextEvent::Finished { reason, stop, usage, timing, .. } => {
                let parts = self.reader.as_mut().map(CallReader::finish).unwrap_or_default();
                parts.into_iter().for_each(|part| self.on_part(part));
                self.end_call();
                let has_calls = self.reader.as_ref().is_some_and(CallReader::has_calls);
                self.ready.push_back(RunEvent::Finished(Ending { reason, has_calls, stop, usage, timing }));
            }
        }
    }

    fn on_part(&mut self, part: ChatPart) {
        match part {
            ChatPart::Text(text) => {
                self.end_call();
                self.ready.push_back(RunEvent::Text(text));
            }
            ChatPart::CallStarted { name, .. } => {
                self.end_call();
                self.call = Some((name.clone(), String::new()));
                self.ready.push_back(RunEvent::CallStarted { name });
            }
            ChatPart::Arguments { fragment, .. } => {
                if let Some((_, arguments)) = &mut self.call {
                    arguments.push_str(&fragment);
                }
                self.ready.push_back(RunEvent::Arguments(fragment));
            }
        }
    }

    fn end_call(&mut self) {
        if let Some((name, arguments)) = self.call.take() {
            let arguments = serde_json::from_str(&arguments).unwrap_or_default();
            self.ready.push_back(RunEvent::CallEnded { name, arguments });
        }
    }
}
