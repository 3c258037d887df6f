//! Where one sequence is in its grammar.

use std::fmt::Display;

use toktrie::{SimpleVob, TokenId};

use super::GrammarError;
use super::compiler::worded;

/// Says which tokens may follow those it has consumed.
pub struct Matcher {
    parser: llguidance::Matcher,
    /// Stands for the end of the output in masks; behind the vocabulary.
    end: TokenId,
    /// What may come next, where it was asked for before it is needed.
    prepared: Option<SimpleVob>,
}

impl std::fmt::Debug for Matcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Matcher")
    }
}

/// A clone shares nothing with its origin.
impl Clone for Matcher {
    fn clone(&self) -> Self {
        Self { parser: self.parser.deep_clone(), end: self.end, prepared: self.prepared.clone() }
    }
}

impl Matcher {
    /// At the beginning of an output, with what may come first prepared for all that begin there.
    ///
    /// # Errors
    /// When no text, or none but the empty one, can be an output.
    pub(super) fn new(parser: llguidance::TokenParser, end: TokenId) -> Result<Self, GrammarError> {
        let mut parser = llguidance::Matcher::new(Ok(parser));
        let first = parser
            .compute_mask_or_eos()
            .map_err(|error| GrammarError::Invalid(format!("no output can begin as it says ({})", worded(&error))))?;
        if first.num_set() == usize::from(first.is_allowed(end)) {
            return Err(GrammarError::Invalid("it allows no output but an empty one".to_owned()));
        }
        Ok(Self { parser, end, prepared: Some(first) })
    }

    /// Computes what may come next before it is needed.
    pub fn prepare(&mut self) {
        if self.prepared.is_none() {
            // A parser that has failed fails again when it is needed.
            self.prepared = self.parser.compute_mask_or_eos().ok();
        }
    }

    /// Makes the logits of what must not follow −∞. The `stop_tokens` may follow an output that is complete, whatever their
    /// text is.
    ///
    /// # Errors
    /// When the parser reaches a limit; then nothing more can be asked of it.
    pub fn mask(&mut self, logits: &mut [f32], stop_tokens: &[u32]) -> Result<(), GrammarError> {
        let mut mask = match self.prepared.take() {
            Some(prepared) => prepared,
            None => self.parser.compute_mask_or_eos().map_err(lost)?,
        };
        // The mask has the end also where it would only end a part (`stop=""`), or be any token (`<[*]>`).
        let may_end = self.parser.is_accepting().map_err(lost)?;
        mask.disallow_token(self.end);
        for &token in stop_tokens.iter().filter(|token| **token < self.end) {
            mask.set(token as usize, may_end);
        }
        let mut words = mask.as_slice().iter().copied();
        for logits in logits.chunks_mut(u32::BITS as usize) {
            match words.next().unwrap_or(0) {
                u32::MAX => {}
                0 => logits.fill(f32::NEG_INFINITY),
                word => {
                    let forbidden = logits.iter_mut().enumerate().filter(|(bit, _)| word & (1 << bit) == 0);
                    forbidden.for_each(|(_, logit)| *logit = f32::NEG_INFINITY);
                }
            }
        }
        Ok(())
    }

    /// `token`, which the mask allowed and which is no stop token, has come next.
    ///
    /// # Errors
    /// When it must not, or the parser reaches a limit; then nothing more can be asked of it.
    pub fn consume(&mut self, token: u32) -> Result<(), GrammarError> {
        self.prepared = None;
        self.parser.consume_token(token).map_err(lost)
    }

    /// Whether nothing but the end may follow.
    pub fn is_complete(&self) -> bool {
        self.parser.is_stopped()
    }
}

fn lost(error: impl Display) -> GrammarError {
    GrammarError::Lost(worded(&error))
}
