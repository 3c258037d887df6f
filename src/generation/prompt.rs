//! From what a client sent to the tokens the model reads.

use serde_json::Value;

use super::{Base, GenerationError};
use crate::adapter::canonical::Adapter;
use crate::config::GenerationConfig;
use crate::prompt::instruction;
use crate::tokenizer::{Specials, Tokenizer};

/// One prompt of a request.
#[derive(Debug, Clone, PartialEq)]
pub enum Prompt {
    /// Already templated by the client: special tokens written in it are special tokens.
    Text(String),
    Tokens(Vec<u32>),
    /// Text around the gap, never read as special tokens.
    FillInMiddle {
        prefix: String,
        suffix: String,
    },
    /// OpenAI chat messages, checked to have a `role` and text `content`.
    Chat(Vec<Value>),
}

/// What a prompt must fit into.
pub(super) struct Limits<'a> {
    /// As the client asked.
    pub max_tokens: Option<usize>,
    pub context_length: usize,
    pub config: &'a GenerationConfig,
}

/// A prompt ready for the engine.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct EncodedPrompt {
    /// Not empty, and with `max_tokens` within the context length.
    pub tokens: Vec<u32>,
    /// How many of the first tokens the client did not write.
    pub num_added_tokens: usize,
    pub max_tokens: usize,
    pub is_fill_in_middle: bool,
}

impl Prompt {
    /// Renders, encodes and checks the prompt; `adapter` is the one it is for.
    pub(super) fn encode(
        &self,
        base: &Base,
        adapter: Option<&Adapter>,
        limits: &Limits<'_>,
    ) -> Result<EncodedPrompt, GenerationError> {
        let (tokens, num_added_tokens) = self.tokens(base, adapter)?;
        let max_tokens = limits
            .max_tokens
            .or(adapter.and_then(|adapter| adapter.manifest.sampling.max_tokens))
            .unwrap_or(match self {
                Prompt::Chat(_) => limits.config.chat_max_tokens,
                _ => limits.config.completion_max_tokens,
            });
        // What stands before the prompt takes its room, though no client sees it.
        let context_length =
            limits.context_length.saturating_sub(adapter.map_or(0, |adapter| adapter.num_virtual_tokens()));
        let max_tokens = fit(tokens.len(), max_tokens, context_length, self.param())?;
        let is_fill_in_middle = matches!(self, Prompt::FillInMiddle { .. });
        Ok(EncodedPrompt { tokens, num_added_tokens, max_tokens, is_fill_in_middle })
    }

    /// The tokens, and how many of the first were added to what the client wrote.
    fn tokens(&self, base: &Base, adapter: Option<&Adapter>) -> Result<(Vec<u32>, usize), GenerationError> {
        let tokenizer = &base.tokenizer;
        let encoded = match self {
            Prompt::Text(text) => return self.encode_after_bos(text, tokenizer),
            Prompt::Tokens(ids) => check_ids(ids, tokenizer.vocab_size())?,
            Prompt::FillInMiddle { prefix, suffix } => {
                let Some(fill_in_middle) = &base.fill_in_middle else {
                    let message = format!(
                        "`suffix` needs a model trained for fill-in-the-middle, which `{}` is not: leave it out",
                        base.id
                    );
                    return Err(GenerationError::InvalidParameter { param: "suffix", message });
                };
                fill_in_middle.render(tokenizer, prefix, suffix).map_err(|error| self.invalid(error))?
            }
            Prompt::Chat(messages) => {
                if let Some(template) = adapter.and_then(|adapter| adapter.manifest.prompt.as_deref()) {
                    // An adapter tuned on its own prompt knows nothing of roles: it gets the last thing the user said.
                    let instruction =
                        last_user_text(messages).ok_or_else(|| self.invalid("no message has the role `user`"))?;
                    let text = instruction::render(template, &instruction).map_err(|error| self.invalid(error))?;
                    return self.encode_after_bos(&text, tokenizer);
                }
                let Some(template) = &base.chat_template else {
                    return Err(self.invalid(format!("`{}` has no chat template: use /v1/completions", base.id)));
                };
                // The template writes every special token itself, the first one included.
                let text = template.render(messages, true, None).map_err(|error| self.invalid(error))?;
                tokenizer.encode(&text, Specials::Parse).map_err(|error| self.invalid(error))?
            }
        };
        if encoded.is_empty() {
            return Err(self.invalid(format!("`{}` has no tokens", self.param())));
        }
        Ok((encoded, 0))
    }

    fn encode_after_bos(&self, text: &str, tokenizer: &Tokenizer) -> Result<(Vec<u32>, usize), GenerationError> {
        let mut tokens: Vec<u32> = tokenizer.bos().into_iter().collect();
        let num_added_tokens = tokens.len();
        tokens.extend(tokenizer.encode(text, Specials::Parse).map_err(|error| self.invalid(error))?);
        if tokens.is_empty() {
            return Err(self.invalid(format!("`{}` is empty", self.param())));
        }
        Ok((tokens, num_added_tokens))
    }

    fn param(&self) -> &'static str {
        if matches!(self, Prompt::Chat(_)) { "messages" } else { "prompt" }
    }

    fn invalid(&self, cause: impl ToString) -> GenerationError {
        GenerationError::InvalidParameter { param: self.param(), message: cause.to_string() }
    }
}

/// `max_tokens`, cut to what the context leaves; only a prompt that leaves nothing is an error.
fn fit(
    num_prompt_tokens: usize,
    max_tokens: usize,
    context_length: usize,
    param: &'static str,
) -> Result<usize, GenerationError> {
    match context_length.checked_sub(num_prompt_tokens) {
        Some(room) if room > 0 || max_tokens == 0 => Ok(max_tokens.min(room)),
        _ => Err(GenerationError::ContextLengthExceeded { param, num_prompt_tokens, context_length }),
    }
}

fn check_ids(ids: &[u32], vocab_size: usize) -> Result<Vec<u32>, GenerationError> {
    match ids.iter().find(|&&id| id as usize >= vocab_size) {
        None => Ok(ids.to_vec()),
        Some(id) => Err(GenerationError::InvalidParameter {
            param: "prompt",
            message: format!("`prompt` names the token {id}, but the vocabulary has {vocab_size}"),
        }),
    }
}

fn last_user_text(messages: &[Value]) -> Option<String> {
    let message = messages.iter().rfind(|message| message["role"] == "user")?;
    match &message["content"] {
        Value::Array(parts) => Some(parts.iter().filter_map(|part| part["text"].as_str()).collect()),
        content => content.as_str().map(str::to_owned),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn max_tokens_is_cut_to_the_room_that_is_left() {
        assert_eq!(fit(90, 100, 100, "prompt"), Ok(10));
        assert_eq!(fit(90, 5, 100, "prompt"), Ok(5));
    }

    #[test]
    fn a_prompt_without_room_for_a_token_is_too_long_unless_none_is_wanted() {
        let too_long = |num_prompt_tokens| {
            Err(GenerationError::ContextLengthExceeded { param: "prompt", num_prompt_tokens, context_length: 100 })
        };
        assert_eq!(fit(100, 1, 100, "prompt"), too_long(100));
        assert_eq!(fit(100, 0, 100, "prompt"), Ok(0));
        assert_eq!(fit(101, 0, 100, "prompt"), too_long(101));
    }

    #[test]
    fn a_token_id_beyond_the_vocabulary_is_named() {
        assert_eq!(check_ids(&[0, 9], 10), Ok(vec![0, 9]));
        assert!(check_ids(&[10], 10).unwrap_err().to_string().contains("token 10"));
    }

    #[test]
    fn the_last_user_text_is_found_among_other_roles_and_in_parts() {
        let messages = vec![
            json!({"role": "user", "content": "first"}),
            json!({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}),
            json!({"role": "assistant", "content": "c"}),
        ];
        assert_eq!(last_user_text(&messages).as_deref(), Some("ab"));
        assert_eq!(last_user_text(&messages[2..]), None);
    }
}
