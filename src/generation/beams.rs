//! Runs a beam search over the engine: each step asks for one token of every beam, in one batch.
//!
//! The beams need no state in the engine. What they share they find in its prefix cache, to the last token, and copy no
//! more than the block they part in; so a step computes one row for each beam.

use std::sync::Arc;
use std::time::Instant;

use futures::future::join_all;
use tokio::sync::{OwnedSemaphorePermit, mpsc};

use super::beam_search::{Beam, BeamSearch, Hypothesis};
use crate::adapter::canonical::Adapter;
use crate::engine::EngineHandle;
use crate::engine::fairness::Account;
use crate::engine::request::{Event, PromptOutput, Request, SamplingParams, TokenLogprob};
use crate::tokenizer::Tokenizer;
use crate::tokenizer::detokenize::Detokenizer;

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
    /// When the search has to have ended.
    pub deadline: Option<Instant>,
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
            if search.advance(&next_tokens, |tokens| completes_stop_string(&self.tokenizer, &self.stop, tokens)) {
                return Ok(search.finish());
            }
        }
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
            deadline: self.deadline,
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
                Event::OutOfTime | Event::Failed(_) | Event::Stopped => return Err(event),
                _ => {}
            }
        }
        Err(Event::Stopped)
    }
}

/// Whether the last of `tokens` completes a stop string, as none before it has. A search asks for every candidate of every step:
/// only that much of the text is looked at which such a string can be in.
fn completes_stop_string(tokenizer: &Arc<Tokenizer>, stop: &[String], tokens: &[u32]) -> bool {
    let stop = || stop.iter().filter(|stop| !stop.is_empty());
    let (Some(longest), Some((last, before))) = (stop().map(String::len).max(), tokens.split_last()) else {
        return false;
    };
    // In front of the string, the text may begin within a character.
    let mut num_bytes_left = longest + char::MAX_LEN_UTF8;
    let is_near = |id: &&u32| {
        let is_near = num_bytes_left > 0;
        let num_bytes = if tokenizer.is_special(**id) { 0 } else { tokenizer.token_bytes(**id).len() };
        num_bytes_left = num_bytes_left.saturating_sub(num_bytes);
        is_near
    };
    let num_near = before.iter().rev().take_while(is_near).count();
    let mut detokenizer = Detokenizer::new(tokenizer.clone());
    let mut text: String = before[before.len() - num_near..].iter().map(|id| detokenizer.push(*id)).collect();
    let num_bytes_before = text.len();
    text.push_str(&detokenizer.push(*last));
    stop().any(|stop| text.rfind(stop).is_some_and(|start| start + stop.len() > num_bytes_before))
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::tokenizer::detokenize::{StopOutcome, StopStrings};

    const THE: u32 = 257;
    const SPECIAL: u32 = 258;

    /// How many tokens have a stop string first, their text being read from the beginning.
    fn num_tokens_to_stop(tokenizer: &Arc<Tokenizer>, stop: &[String], tokens: &[u32]) -> Option<usize> {
        let mut detokenizer = Detokenizer::new(tokenizer.clone());
        let mut stops = StopStrings::new(stop.to_vec());
        let is_stopped = |id: &u32| matches!(stops.push(&detokenizer.push(*id)), StopOutcome::Stopped { .. });
        tokens.iter().position(is_stopped).map(|last| last + 1)
    }

    proptest! {
        #[test]
        fn an_output_ends_with_the_token_that_completes_a_stop_string(
            // With parts of `é` and of nothing, and with text over several tokens.
            tokens in prop::collection::vec(prop::sample::select(vec![97, 98, 0xc3, 0xa9, 0xff, THE, SPECIAL]), 0..60),
            stop in prop::collection::vec("[abé\u{fffd}]{0,4}|[ab]{0,2}thea?", 0..4),
        ) {
            let tokenizer = Arc::new(Tokenizer::tiny(&["<|end|>"]));
            let found = (1..=tokens.len()).find(|len| completes_stop_string(&tokenizer, &stop, &tokens[..*len]));
            prop_assert_eq!(found, num_tokens_to_stop(&tokenizer, &stop, &tokens));
        }
    }

    #[test]
    fn what_is_further_back_than_a_stop_string_is_not_read() {
        let tokenizer = Arc::new(Tokenizer::tiny(&[]));
        let tokens = [vec![97; 1 << 20], vec![98]].concat();
        let stop = |text: &str| [text.to_owned()];
        let started = std::time::Instant::now();
        for _ in 0..1000 {
            assert!(completes_stop_string(&tokenizer, &stop("aab"), &tokens));
            assert!(!completes_stop_string(&tokenizer, &stop("aa"), &tokens));
        }
        assert!(started.elapsed().as_secs() < 10);
    }
}
