//! The other end of a sequence.

use std::sync::Arc;
use std::time::Instant;

use kernels::device::{DeviceError, Lease, Logits};
use tokio::sync::{OwnedSemaphorePermit, mpsc};

use super::request::{Event, PromptOutput, TokenLogprob};
use super::sampler::{Sampler, SamplingError, Scratch, log_softmax, log_softmax_of_likeliest};
use crate::grammar::Matcher;

/// Who waits for a sequence, and how its tokens are drawn.
pub(super) struct Client {
    pub events: mpsc::UnboundedSender<Event>,
    pub permit: Arc<OwnedSemaphorePermit>,
    /// Keeps the adapter on the device.
    pub _lease: Lease,
    pub accepted: Instant,
    pub deadline: Option<Instant>,
    pub is_started: bool,
    pub sampler: Sampler,
    pub grammar: Option<Matcher>,
    pub stop_tokens: Arc<[u32]>,
    pub top_logprobs: Option<usize>,
    pub prompt_output: PromptOutput,
}

/// A token of a sequence.
#[derive(Debug)]
pub(super) struct Drawn {
    pub token: u32,
    pub logprob: Option<TokenLogprob>,
    /// Whether it is the last one.
    pub ends: Option<End>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// The token ends the output and is none of it.
    StopToken,
    /// With the token, nothing may follow in the grammar.
    Complete,
}

impl Client {
    /// The next token, or why there is none.
    ///
    /// # Errors
    /// When the device does not give its logits.
    pub fn sample(
        &mut self,
        logits: &mut dyn Logits,
        scratch: &mut Scratch,
        raw_logits: &mut Vec<f32>,
    ) -> Result<Result<Drawn, SamplingError>, DeviceError> {
        let drawn = self.draw(logits, scratch, raw_logits)?;
        Ok(drawn.and_then(|(token, logprob)| Ok(Drawn { token, logprob, ends: self.follow(token)? })))
    }

    fn draw(
        &mut self,
        logits: &mut dyn Logits,
        scratch: &mut Scratch,
        raw_logits: &mut Vec<f32>,
    ) -> Result<Result<(u32, Option<TokenLogprob>), SamplingError>, DeviceError> {
        // The likeliest tokens of all need not have one that the grammar allows.
        let summary = logits.summary().filter(|_| self.grammar.is_none());
        if let Some(token) = summary.and_then(|summary| self.sampler.sample_likeliest(&summary, scratch)) {
            return match (token, self.top_logprobs) {
                (Ok(token), Some(num_top)) => {
                    let logprob = log_probability(logits, token, num_top, scratch)?;
                    Ok(logprob.map(|logprob| (token, Some(logprob))))
                }
                (token, _) => Ok(token.map(|token| (token, None))),
            };
        }
        let logits = logits.all()?;
        let Some(num_top) = self.top_logprobs else {
            return Ok(self.draw_from_all(logits, scratch).map(|token| (token, None)));
        };
        // Drawing uses the logits up; the log-probability is that of the unmodified ones.
        raw_logits.clear();
        raw_logits.extend_from_slice(logits);
        let token = self.draw_from_all(logits, scratch);
        Ok(token.and_then(|token| Ok((token, Some(log_softmax(raw_logits, token, num_top, scratch)?)))))
    }

    fn draw_from_all(&mut self, logits: &mut [f32], scratch: &mut Scratch) -> Result<u32, SamplingError> {
        if let Some(grammar) = &mut self.grammar {
            grammar.mask(logits, &self.stop_tokens)?;
        }
        self.sampler.sample(logits, scratch)
    }

    /// Goes on with `token` in the grammar.
    fn follow(&mut self, token: u32) -> Result<Option<End>, SamplingError> {
        if self.stop_tokens.contains(&token) {
            return Ok(Some(End::StopToken));
        }
        let Some(grammar) = &mut self.grammar else { return Ok(None) };
        grammar.consume(token)?;
        Ok(grammar.is_complete().then_some(End::Complete))
    }
}

/// The log-probability of `token`, from what the device knows of the logits where that is enough.
pub(super) fn log_probability(
    logits: &mut dyn Logits,
    token: u32,
    num_top: usize,
    scratch: &mut Scratch,
) -> Result<Result<TokenLogprob, SamplingError>, DeviceError> {
    match logits.summary().and_then(|summary| log_softmax_of_likeliest(&summary, token, num_top)) {
        Some(known) => Ok(Ok(known)),
        None => Ok(log_softmax(logits.all()?, token, num_top, scratch)),
    }
}
