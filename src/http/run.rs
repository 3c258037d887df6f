//! One choice of one prompt under way, for interfaces that know no more.

use futures::StreamExt;

use super::AppState;
use super::auth::Caller;
use super::error::ApiError;
use super::reply::begin;
use super::trials::Trial;
use crate::generation::{GenerationError, GenerationRequest, ResolvedModel, TextEvent, TextStream};

/// Dropping it cancels the generation.
pub struct Run {
    sequence: TextStream,
    trial: Trial,
    /// The weights are held until the reply has ended.
    model: ResolvedModel,
}

impl Run {
    /// `user` is who the request says it is for, `id` that of its reply.
    ///
    /// # Errors
    /// As those of any request, and 400 when it asks for several choices.
    pub async fn start(
        state: &AppState,
        caller: &Caller,
        user: Option<&str>,
        id: &str,
        request: GenerationRequest,
    ) -> Result<Self, ApiError> {
        if request.options.num_choices != 1 {
            return Err(ApiError::invalid("n", "`n` must be 1: this interface has one answer"));
        }
        let (mut generated, trial) = begin(state, caller, user, id, request).await?;
        let sequence = generated.sequences.pop().ok_or(GenerationError::EngineStopped)?;
        Ok(Self { sequence, trial, model: generated.model })
    }

    /// The model that answers.
    pub fn model_id(&self) -> &str {
        &self.model.id
    }

    /// The next event; the last one is [`TextEvent::Finished`] or an error.
    pub async fn next(&mut self) -> Option<Result<TextEvent, ApiError>> {
        let event = self.sequence.next().await?;
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
