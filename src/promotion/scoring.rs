//! How likely a model finds what a user wanted, by the way on which it would have answered.

use crate::engine::fairness::{Account, Priority};
use crate::experiments::SPARE_PLACES;
use crate::feedback::HeldOut;
use crate::generation::{
    Access, Generation, GenerationError, GenerationOptions, GenerationRequest, Prompt, Selection, TextStream,
};
use crate::icl::{self, IclError};

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
    /// There is nothing to score, no room for it, or a template that does not take it.
    LeftOut,
}

/// A check must not be why a user is turned away.
pub fn has_room(generation: &Generation) -> bool {
    generation.is_half_free() && generation.num_free_places() > SPARE_PLACES
}

/// Whether another pair may be scored all the same: users send what a template refuses, as two questions in a row.
fn is_of_the_pair(error: &GenerationError) -> bool {
    match error {
        GenerationError::ContextLengthExceeded { .. }
        | GenerationError::PromptTooLarge { .. }
        | GenerationError::InvalidParameter { .. } => true,
        GenerationError::Icl(error) => matches!(**error, IclError::PromptTooLong { .. } | IclError::Count(_)),
        _ => false,
    }
}

impl Scorer<'_> {
    /// # Errors
    /// Of the one or the other request.
    pub async fn score(&self, generation: &Generation, pair: &HeldOut) -> Result<Scored, GenerationError> {
        match self.try_score(generation, pair).await {
            Err(error) if is_of_the_pair(&error) => Ok(Scored::LeftOut),
            scored => scored,
        }
    }

    async fn try_score(&self, generation: &Generation, pair: &HeldOut) -> Result<Scored, GenerationError> {
        let asked = self.request(pair.prompt.clone(), self.icl.clone(), GenerationOptions::default());
        let mut tokens = generation.prompt_tokens(asked, &Access::All).await?;
        let completion = generation.tokenizer().encode_continuation(&pair.completion);
        let completion = completion.map_err(|error| GenerationError::Failed(error.to_string()))?;
        if completion.is_empty() {
            return Ok(Scored::LeftOut);
        }
        tokens.extend(&completion);
        let account = Account { priority: Priority::Batch, ..Account::default() };
        let echoed = GenerationOptions { echo: true, top_logprobs: Some(0), account, ..GenerationOptions::default() };
        // It may have filled up while the prompt was encoded.
        if !has_room(generation) {
            return Err(GenerationError::Overloaded);
        }
        let mut generated = generation.start(self.request(Prompt::Tokens(tokens), None, echoed), &Access::All).await?;
        let Some(sequence) = generated.sequences.pop() else { return Ok(Scored::LeftOut) };
        let completed = TextStream::collect(sequence).await?;
        let records = completed.tokens.iter().rev().take(completion.len());
        // Behind no prompt at all, nothing predicts the first.
        let logprobs: Vec<_> = records.filter_map(|record| record.logprob.as_ref()).collect();
        if logprobs.is_empty() {
            return Ok(Scored::LeftOut);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_with_one_pair_is_no_end_of_a_check() {
        let too_long = IclError::PromptTooLong {
            store: "s".to_owned(),
            k: 1,
            num_prompt_tokens: 9,
            max_prompt_tokens: 8,
            num_fitting: 0,
        };
        let count = IclError::Count("roles must alternate".into());
        let unknown = IclError::UnknownStore { store: "s".to_owned(), known: String::new() };
        let refused = "roles must alternate".to_owned();
        for (error, is_so) in [
            (GenerationError::InvalidParameter { param: "messages", message: refused.clone() }, true),
            (GenerationError::PromptTooLarge { param: "prompt", num_bytes: 9, context_length: 1 }, true),
            (GenerationError::Icl(Box::new(too_long)), true),
            (GenerationError::Icl(Box::new(count)), true),
            (GenerationError::Icl(Box::new(unknown)), false),
            (GenerationError::unknown_model("model", "m"), false),
            (GenerationError::Failed(refused), false),
        ] {
            assert_eq!(is_of_the_pair(&error), is_so, "{error}");
        }
    }
}
