//! Runs a beam search over the engine: each step asks for one token of every beam, in one batch.
//!
//! The beams need no state in the engine. What they share they find in its prefix cache, to the last token, and copy no
//! more than the block they part in; so a step computes one row for each beam.

use std::sync::Arc;

use futures::future::join_all;
use tokio::sync::{OwnedSemaphorePermit, mpsc};

use super::beam_search::{Beam, BeamSearch, Hypothesis};
use crate::adapter::canonical::Adapter;
use crate::engine::EngineHandle;
use crate::engine::fairness::Account;
use crate::engine::request::{Event, PromptOutput, Request, SamplingParams, TokenLogprob};
use crate::tokenizer::Tokenizer;
use crate::tokenizer::detokenize::{Detokenizer, StopOutcome, StopStrings};

/// One search, from its prompt to the events of its best outputs.
#[derive(Debug)]
pub(super) struct BeamRun {
    pub engine: EngineHandle,
    pub prompt_tokens: Vec<u32>,
    pub num_pinned_tokens: usize,
    pub adapter: Option<Arc<Adapter>>,
    pub account: Account,
    pub tokenizer: Arc<Tokenizer>,
    /// Strings that end an output.
    pub stop: Vec<String>,
    /// `None` where nothing is to be generated.
    pub search: Option<BeamSearch>,
    /// One for each beam.
    pub permits: Vec<Arc<OwnedSemaphorePermit>>,
    /// One for each choice, of which there are no more than beams.
    pub choices: Vec<mpsc::UnboundedSender<Event>>,
}

impl BeamRun {
    /// Until the end, or until nobody waits for any choice.
    pub async fn run(mut self) {
        let found = match self.search.take() {
            None => Ok(vec![Hypothesis::empty(); self.choices.len()]),
            Some(search) => tokio::select! {
                found = self.search(search) => found,
                _ = join_all(self.choices.iter().map(mpsc::UnboundedSender::closed)) => return,
            },
        };
        // Who sees the last event sees the places returned.
        drop(self.permits);
        match found {
            Ok(found) => self.choices.iter().zip(found).for_each(|(choice, found)| tell(choice, found)),
            Err(last) => {
                for choice in self.choices {
                    // A client that has gone needs no answer, here and below.
                    let _ = choice.send(last.clone());
                }
            }
        }
    }

    /// # Errors
    /// The last event of every choice.
    async fn search(&self, mut search: BeamSearch) -> Result<Vec<Hypothesis>, Event> {
        loop {
            let beams = search.running().iter().zip(&self.permits);
            let (requests, answers): (Vec<_>, Vec<_>) =
                beams.map(|(beam, permit)| self.ask(beam, permit, search.num_candidates())).unzip();
            self.engine.submit_together(requests).map_err(|_| Event::Stopped)?;
            let mut next_tokens = Vec::with_capacity(answers.len());
            for answer in answers {
                next_tokens.push(self.next_tokens(answer, search.is_new()).await?);
            }
            if search.advance(&next_tokens, |tokens| self.has_stop_string(tokens)) {
                return Ok(search.finish());
            }
        }
    }

    fn has_stop_string(&self, tokens: &[u32]) -> bool {
        let mut detokenizer = Detokenizer::new(self.tokenizer.clone());
        let mut stops = StopStrings::new(self.stop.iter().cloned());
        !self.stop.is_empty()
            && tokens.iter().any(|&id| matches!(stops.push(&detokenizer.push(id)), StopOutcome::Stopped { .. }))
    }

    /// Asks for the one token behind a beam, and for its rivals.
    fn ask(
        &self,
        beam: &Beam,
        permit: &Arc<OwnedSemaphorePermit>,
        num_candidates: usize,
    ) -> (Request, mpsc::UnboundedReceiver<Event>) {
        let (events, receiver) = mpsc::unbounded_channel();
        let request = Request {
            prompt_tokens: [self.prompt_tokens.as_slice(), &beam.tokens].concat(),
            num_pinned_tokens: self.num_pinned_tokens,
            adapter: self.adapter.clone(),
            account: self.account.clone(),
            sampling: SamplingParams::GREEDY,
            max_tokens: 1,
            stop_tokens: Arc::from([]),
            top_logprobs: Some(num_candidates),
            grammar: None,
            prediction: None,
            prompt_output: PromptOutput::Nothing,
            events,
            permit: permit.clone(),
        };
        (request, receiver)
    }

    /// Waits for the end, by which the engine has given the beam's blocks to the prefix cache.
    async fn next_tokens(
        &self,
        mut events: mpsc::UnboundedReceiver<Event>,
        is_first: bool,
    ) -> Result<Vec<(u32, f32)>, Event> {
        let mut next_tokens = Vec::new();
        while let Some(event) = events.recv().await {
            match event {
                Event::Started { .. } if is_first => {
                    self.choices.iter().for_each(|choice| drop(choice.send(event.clone())));
                }
                Event::Token { logprob: Some(logprob), .. } => next_tokens = logprob.top,
                Event::Finished(_) => return Ok(next_tokens),
                Event::Failed(_) | Event::Stopped => return Err(event),
                _ => {}
            }
        }
        Err(Event::Stopped)
    }
}

fn tell(choice: &mpsc::UnboundedSender<Event>, found: Hypothesis) {
    let tokens = found.tokens.into_iter().zip(found.logprobs).map(|(id, logprob)| {
        let logprob = Some(TokenLogprob { logprob, top: Vec::new() });
        Event::Token { id, logprob }
    });
    // The score first: nothing is read behind the token that completes a stop string.
    for event in [Event::Score(found.score)].into_iter().chain(tokens).chain([Event::Finished(found.reason)]) {
        let _ = choice.send(event);
    }
}
