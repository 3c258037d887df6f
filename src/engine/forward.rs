//! What the engine does while the model is at work: the clients are told what came before, and tokens are drawn.

use std::collections::HashMap;

use kernels::device::{Caller, DeviceError, Logits};

use super::client::{Client, Drawn, log_probability};
use super::outbox::Outbox;
use super::request::{Event, PromptOutput};
use super::sampler::{SamplingError, Scratch};
use super::scheduler::Scheduler;
use super::sequence::{LogitsUse, SequenceId};
use super::step::publish;
use crate::metrics::Metrics;

/// A drawn token, or why there is none.
pub(super) struct Sampled {
    pub id: SequenceId,
    /// The token before it was guessed, and the guess came true.
    pub is_after_guess: bool,
    pub drawn: Result<Drawn, SamplingError>,
}

/// The engine during a step: all but the model.
pub(super) struct UnderWay<'a> {
    pub scheduler: &'a Scheduler,
    pub num_arriving: usize,
    /// Whether the prefix cache is on disk too.
    pub has_disk: bool,
    pub clients: &'a mut HashMap<SequenceId, Client>,
    pub outbox: &'a mut Outbox,
    pub metrics: &'a Metrics,
    pub sampled: &'a mut Vec<Sampled>,
    pub sampling: &'a mut Scratch,
    pub raw_logits: &'a mut Vec<f32>,
}

impl UnderWay<'_> {
    /// Tells the clients whose first rows are in the plan.
    fn announce(&mut self) {
        for planned in &self.scheduler.plan().sequences {
            let Some(client) = self.clients.get_mut(&planned.id).filter(|client| !client.is_started) else { continue };
            client.is_started = true;
            let queue = client.accepted.elapsed();
            let sequence = self.scheduler.sequence(planned);
            let cached_tokens = planned.first_position.saturating_sub(sequence.num_virtual_tokens());
            let prompt_tokens = sequence.num_prompt_tokens() as u64;
            let vllm = &self.metrics.vllm;
            vllm.prompt_tokens_total.inc_by(prompt_tokens);
            // One whose every logit is wanted does not ask the cache.
            if client.prompt_output != PromptOutput::Logprobs {
                let from_disk = sequence.num_restored_tokens().min(cached_tokens) as u64;
                let from_memory = cached_tokens as u64 - from_disk;
                vllm.prefix_cache_queries_total.inc_by(prompt_tokens);
                vllm.prefix_cache_hits_total.inc_by(from_memory);
                if self.has_disk {
                    vllm.external_prefix_cache_queries_total.inc_by(prompt_tokens - from_memory);
                    vllm.external_prefix_cache_hits_total.inc_by(from_disk);
                }
            }
            self.outbox.push(planned.id, Event::Started { queue, cached_tokens });
            if client.prompt_output == PromptOutput::Logprobs {
                self.outbox.push(planned.id, Event::PromptToken(None));
            }
        }
    }

    /// Where the next token of a grammar is drawn, what it may be follows from the tokens before. After a guess it does not.
    fn prepare_grammars(&mut self) {
        for (id, _) in self.scheduler.plan().logits.iter().filter(|(_, logits_use)| *logits_use == LogitsUse::Sample) {
            if let Some(grammar) = self.clients.get_mut(id).and_then(|client| client.grammar.as_mut()) {
                grammar.prepare();
            }
        }
    }
}

impl Caller for UnderWay<'_> {
    fn meanwhile(&mut self) {
        self.announce();
        publish(self.metrics, self.scheduler, self.num_arriving);
        self.outbox.deliver(self.clients);
        self.prepare_grammars();
    }

    /// What is found out waits in the outbox, a drawn token for the end of the step.
    fn on_logits(&mut self, index: usize, logits: &mut dyn Logits) -> Result<(), DeviceError> {
        let Self { clients, sampled, sampling, raw_logits, outbox, .. } = self;
        let (id, logits_use) = self.scheduler.plan().logits[index];
        let Some(client) = clients.get_mut(&id) else { return Ok(()) };
        match logits_use {
            LogitsUse::Sample => {
                let drawn = client.sample(logits, sampling, raw_logits)?;
                sampled.push(Sampled { id, is_after_guess: false, drawn });
            }
            LogitsUse::Verify { index, guess } => {
                // As many tokens drawn as guesses before this one: none of them was wrong.
                let num_drawn = sampled.iter().rev().take_while(|sampled| sampled.id == id).count();
                let is_right = sampled
                    .last()
                    .is_some_and(|last| matches!(last.drawn, Ok(Drawn { token, ends: None, .. }) if token == guess));
                if num_drawn == index + 1 && is_right {
                    let drawn = client.sample(logits, sampling, raw_logits)?;
                    sampled.push(Sampled { id, is_after_guess: true, drawn });
                }
            }
            LogitsUse::Report => outbox.push(id, Event::PromptLogits(logits.all()?.to_vec())),
            LogitsUse::Score(token) => {
                match log_probability(logits, token, client.top_logprobs.unwrap_or(0), sampling)? {
                    Ok(logprob) => outbox.push(id, Event::PromptToken(Some(logprob))),
                    Err(error) => sampled.push(Sampled { id, is_after_guess: false, drawn: Err(error) }),
                }
            }
        }
        Ok(())
    }
}
