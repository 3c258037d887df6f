//! How likely a model finds what a user wanted, by the way on which it would have answered.

use crate::engine::fairness::{Account, Priority};
use crate::feedback::HeldOut;
use crate::generation::{
    Access, Generation, GenerationError, GenerationOptions, GenerationRequest, Prompt, Selection, TextStream,
};
use crate::icl;

/// One side of a check.
#[derive(Debug)]
pub struct Scorer<'a> {
    pub model: &'a str,
    pub icl: Option<icl::Selection>,
    /// That of its adapter, if it has one; `None` until that is known.
    pub generation: Option<Option<String>>,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Scored {
    Logprob {
        /// Of a token of the completion, in nats.
        mean: f64,
        generation: Option<String>,
    },
    /// There is nothing to score, or no room for it.
    NoRoom,
}

impl Scorer<'_> {
    /// # Errors
    /// Of the one or the other request.
    pub async fn score(&self, generation: &Generation, pair: &HeldOut) -> Result<Scored, GenerationError> {
        match self.try_score(generation, pair).await {
            Err(GenerationError::ContextLengthExceeded { .. } | GenerationError::PromptTooLarge { .. }) => {
                Ok(Scored::NoRoom)
            }
            scored => scored,
        }
    }

    async fn try_score(&self, generation: &Generation, pair: &HeldOut) -> Result<Scored, GenerationError> {
        let asked = self.request(pair.prompt.clone(), self.icl.clone(), GenerationOptions::default());
        let mut tokens = generation.prompt_tokens(asked, &Access::All).await?;
        let completion = generation.tokenizer().encode_continuation(&pair.completion);
        let completion = completion.map_err(|error| GenerationError::Failed(error.to_string()))?;
        if completion.is_empty() {
            return Ok(Scored::NoRoom);
        }
        tokens.extend(&completion);
        let account = Account { priority: Priority::Batch, ..Account::default() };
        let echoed = GenerationOptions { echo: true, top_logprobs: Some(0), account, ..GenerationOptions::default() };
        let mut generated = generation.start(self.request(Prompt::Tokens(tokens), None, echoed), &Access::All).await?;
        let Some(sequence) = generated.sequences.pop() else { return Ok(Scored::NoRoom) };
        let completed = TextStream::collect(sequence).await?;
        let records = completed.tokens.iter().rev().take(completion.len());
        // Behind no prompt at all, nothing predicts the first.
        let logprobs: Vec<_> = records.filter_map(|record| record.logprob.as_ref()).collect();
        if logprobs.is_empty() {
            return Ok(Scored::NoRoom);
        }
        let sum: f64 = logprobs.iter().map(|logprob| f64::from(logprob.logprob)).sum();
        let mean = sum / logprobs.len() as f64;
        Ok(Scored::Logprob { mean, generation: generated.model.adapter.map(|adapter| adapter.generation.clone()) })
    }

    fn request(&self, prompt: Prompt, icl: Option<icl::Selection>, options: GenerationOptions) -> GenerationRequest {
        let options = GenerationOptions { num_choices: 1, max_tokens: Some(0), ..options };
        let selection = Selection::model(self.model);
        GenerationRequest { selection, icl, prompt_format: None, prompts: vec![prompt], options }
    }

    /// Pairs that were scored by different weights say nothing together.
    ///
    /// # Errors
    /// In words: other weights than before.
    pub fn keep_to(&mut self, generation: Option<String>) -> Result<(), String> {
        match &self.generation {
            Some(known) if *known != generation => {
                Err(format!("{} was replaced while it was checked: ask again", self.model))
            }
            Some(_) => Ok(()),
            None => {
                self.generation = Some(generation);
                Ok(())
            }
        }
    }
}
