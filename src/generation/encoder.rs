//! From what a client sent to the tokens the model reads.

use serde_json::Value;

use super::{Base, GenerationError, Prompt};
use crate::adapter::canonical::Adapter;
use crate::config::GenerationConfig;
use crate::icl::{self, Example, IclError, IclStores, Select, TokenBudget};
use crate::prompt::chat::Ending;
use crate::prompt::fim::ContextFile;
use crate::prompt::fim::foreign::{self, TextAround};
use crate::prompt::formats::{PromptFormat, Reader, Rendered, with_example_turns};
use crate::prompt::instruction;
use crate::prompt::literal::Literal;
use crate::tokenizer::{Specials, Tokenizer};
use crate::tools::Tools;

/// What prompts are made for, made of, and must fit into.
pub(super) struct Encoder<'a> {
    pub base: &'a Base,
    pub adapter: Option<&'a Adapter>,
    pub stores: &'a IclStores,
    pub icl: Option<&'a icl::Selection>,
    /// The one that the request names.
    pub format: Option<&'a PromptFormat>,
    /// What a chat offers the model to call.
    pub tools: Option<&'a Tools>,
    /// As the client asked.
    pub max_tokens: Option<usize>,
    pub context_length: usize,
    /// Whether the reply repeats the prompt, which then must stay as it is.
    pub is_echoed: bool,
    /// What the output begins with, read by the model as if it had written that.
    pub output_prefix: &'a str,
    pub config: &'a GenerationConfig,
}

/// A prompt ready for the engine.
#[derive(Debug, Clone)]
pub(super) struct EncodedPrompt {
    /// Not empty, and with `max_tokens` within the context length.
    pub tokens: Vec<u32>,
    /// How many of the first tokens the client did not write.
    pub num_added_tokens: usize,
    pub max_tokens: usize,
    pub is_fill_in_middle: bool,
    /// How many of the first tokens stand before every question to the same fixed examples.
    pub num_pinned_tokens: usize,
    /// The examples in it.
    pub icl: Option<icl::Chosen>,
}

/// What is to be encoded, and who words it.
enum Wording<'a> {
    Tokens(&'a [u32]),
    FillInMiddle {
        files: &'a [ContextFile],
        prefix: &'a str,
        suffix: &'a str,
    },
    /// In the layout of another model.
    Foreign(TextAround),
    /// As the client wrote it.
    Text(&'a str),
    /// By the model's chat template.
    Messages(&'a [Value]),
    /// By the template that the adapter was trained with.
    Adapter {
        template: &'a str,
        instruction: String,
    },
    Format {
        format: &'a PromptFormat,
        instruction: String,
    },
}

impl Encoder<'_> {
    /// Chooses examples, renders, encodes and checks the prompt.
    pub fn encode(&self, prompt: &Prompt) -> Result<EncodedPrompt, GenerationError> {
        match prompt {
            // To a base that fills no gaps, nothing behind the cursor is no gap.
            Prompt::FillInMiddle { prefix, suffix, .. } if suffix.is_empty() && self.base.fill_in_middle.is_none() => {
                self.encode_as(&Prompt::Text(prefix.clone()))
            }
            _ => self.encode_as(prompt),
        }
    }

    fn encode_as(&self, prompt: &Prompt) -> Result<EncodedPrompt, GenerationError> {
        let max_tokens = self
            .max_tokens
            .or(self.adapter.and_then(|adapter| adapter.manifest.sampling.max_tokens))
            .unwrap_or(match prompt {
                Prompt::Chat(_) => self.config.chat_max_tokens,
                _ => self.config.completion_max_tokens,
            });
        // What stands before the prompt takes its room, though no client sees it.
        let context_length =
            self.context_length.saturating_sub(self.adapter.map_or(0, |adapter| adapter.num_virtual_tokens()));
        self.check_size(prompt)?;
        let wording = self.wording(prompt)?;
        let max_prompt_tokens = context_length.saturating_sub(max_tokens.min(1));
        let icl = self.icl.map(|icl| self.choose(icl, prompt, &wording, max_prompt_tokens)).transpose()?;
        let examples = icl.as_ref().map(icl::Chosen::examples).unwrap_or_default();
        let (mut tokens, num_added_tokens) = self.tokens(prompt, &wording, &examples)?;
        let mut is_fill_in_middle = matches!(wording, Wording::FillInMiddle { .. } | Wording::Foreign(_));
        if let Some(fill_in_middle) = &self.base.fill_in_middle {
            is_fill_in_middle |= fill_in_middle.is_in(&tokens);
            if !self.is_echoed {
                let room = context_length - max_tokens.min(context_length / 4);
                tokens = fill_in_middle.fit(&self.base.tokenizer, tokens, room);
            }
        }
        let max_tokens = fit(tokens.len(), max_tokens, context_length, prompt.param())?;
        let is_fixed = icl.as_ref().is_some_and(|icl| icl.select == Select::Fixed);
        let num_pinned_tokens = if is_fixed { self.num_shared_tokens(prompt, &examples, &tokens)? } else { 0 };
        Ok(EncodedPrompt { tokens, num_added_tokens, max_tokens, is_fill_in_middle, num_pinned_tokens, icl })
    }

    /// How many of the first `tokens` another question would leave as they are. Rendered and compared, because no format
    /// says where its examples end and no tokenizer where it cuts.
    fn num_shared_tokens(
        &self,
        prompt: &Prompt,
        examples: &[&Example],
        tokens: &[u32],
    ) -> Result<usize, GenerationError> {
        let other = prompt.with_other_question();
        let (other, _) = self.tokens(&other, &self.wording(&other)?, examples)?;
        Ok(tokens.iter().zip(&other).take_while(|(a, b)| a == b).count())
    }

    /// The format that the request names; else the adapter's own for what is an instruction, and it is one with examples
    /// or in chat; else the chat template.
    fn wording<'a>(&'a self, prompt: &'a Prompt) -> Result<Wording<'a>, GenerationError> {
        let template = self.adapter.and_then(|adapter| adapter.manifest.prompt.as_deref());
        let wording = match (prompt, self.format, template) {
            (Prompt::Tokens(ids), ..) => Wording::Tokens(ids),
            (Prompt::FillInMiddle { files, prefix, suffix }, ..) => Wording::FillInMiddle { files, prefix, suffix },
            (Prompt::Chat(messages), Some(PromptFormat::Chat), _) | (Prompt::Chat(messages), None, None) => {
                Wording::Messages(messages)
            }
            (_, Some(format), _) => Wording::Format { format, instruction: prompt.instruction()? },
            (Prompt::Text(text), None, _) if self.icl.is_none() => match self.read_foreign(text) {
                Some(text) => Wording::Foreign(text),
                None => Wording::Text(text),
            },
            (_, None, Some(template)) => Wording::Adapter { template, instruction: prompt.instruction()? },
            (_, None, None) => Wording::Format { format: &PromptFormat::Chat, instruction: prompt.instruction()? },
        };
        self.check_tools(&wording)?;
        let is_given = [("icl", self.icl.is_some()), ("prompt_format", self.format.is_some())];
        match (&wording, is_given.into_iter().find(|(_, is_given)| *is_given)) {
            (Wording::Tokens(_) | Wording::FillInMiddle { .. }, Some((param, _))) => {
                let message =
                    format!("`{param}` needs an instruction: a `prompt` of text without `suffix`, or `messages`");
                Err(GenerationError::InvalidParameter { param, message })
            }
            _ => Ok(wording),
        }
    }

    fn choose(
        &self,
        icl: &icl::Selection,
        prompt: &Prompt,
        wording: &Wording<'_>,
        max_prompt_tokens: usize,
    ) -> Result<icl::Chosen, GenerationError> {
        let count = |examples: &[&Example]| match self.tokens(prompt, wording, examples) {
            Ok((tokens, _)) => Ok(tokens.len()),
            Err(error) => Err(error.into()),
        };
        let budget = TokenBudget { max_prompt_tokens, count: &count };
        self.stores.select(icl, &prompt.instruction()?, &budget).map_err(|error| match error {
            // What cannot be rendered with examples names its own field.
            IclError::Count(error) => match error.downcast() {
                Ok(error) => *error,
                Err(error) => GenerationError::Icl(Box::new(IclError::Count(error))),
            },
            error => GenerationError::Icl(Box::new(error)),
        })
    }

    /// The tokens with the beginning of the output, and how many of the first were added to what the client wrote.
    fn tokens(
        &self,
        prompt: &Prompt,
        wording: &Wording<'_>,
        examples: &[&Example],
    ) -> Result<(Vec<u32>, usize), GenerationError> {
        match wording {
            // The template words an answer that was begun, too.
            Wording::Messages(_) | Wording::Format { format: PromptFormat::Chat, .. } => {
                self.prompt_tokens(prompt, wording, examples)
            }
            // Words go over the seam.
            Wording::Text(text) if !self.output_prefix.is_empty() => {
                let text = [text, self.output_prefix].concat();
                self.prompt_tokens(prompt, &Wording::Text(&text), examples)
            }
            _ => {
                let (mut tokens, num_added_tokens) = self.prompt_tokens(prompt, wording, examples)?;
                let begun = self.base.tokenizer.encode_continuation(self.output_prefix);
                tokens.extend(begun.map_err(|error| prompt.invalid(error))?);
                Ok((tokens, num_added_tokens))
            }
        }
    }

    fn prompt_tokens(
        &self,
        prompt: &Prompt,
        wording: &Wording<'_>,
        examples: &[&Example],
    ) -> Result<(Vec<u32>, usize), GenerationError> {
        let tokenizer = &self.base.tokenizer;
        let encoded = match wording {
            Wording::Tokens(ids) => check_ids(ids, tokenizer.vocab_size())?,
            Wording::FillInMiddle { files, prefix, suffix } => {
                self.fill_in_middle(prompt, files, prefix, suffix, "suffix")?
            }
            Wording::Foreign(TextAround { prefix, suffix }) => {
                self.fill_in_middle(prompt, &[], prefix, suffix, "prompt")?
            }
            Wording::Text(text) => {
                let encoded = tokenizer.encode(text, Specials::Parse).map_err(|error| prompt.invalid(error))?;
                return self.after_bos(prompt, &encoded);
            }
            Wording::Messages(messages) => {
                let messages = with_example_turns(messages, examples);
                let tools = self.tools.map_or(&[] as &[Value], |tools| &tools.definitions);
                let begun = Value::from(self.output_prefix);
                let literal = Literal::of_values(tokenizer, messages.iter().chain(tools).chain([&begun]));
                let messages: Vec<_> = messages.iter().map(|message| literal.message(message)).collect();
                self.encode_messages(prompt, &messages, literal)?
            }
            Wording::Adapter { template, instruction } => {
                let (literal, instruction, examples) = literal(tokenizer, instruction, examples);
                let render = |instruction: &str| {
                    instruction::render(template, instruction).map_err(|error| prompt.invalid(error))
                };
                let mut text = String::new();
                for Example { instruction, code } in &examples {
                    text.extend([&render(instruction)?, code, "\n\n"]);
                }
                text.push_str(&render(&instruction)?);
                let encoded = literal.encode(&text).map_err(|error| prompt.invalid(error))?;
                return self.after_bos(prompt, &encoded);
            }
            Wording::Format { format, instruction } => {
                let reader = if self.adapter.is_some() { Reader::Adapter } else { Reader::Base };
                let (literal, instruction, examples) = literal(tokenizer, instruction, examples);
                let examples: Vec<_> = examples.iter().collect();
                match format.render(&instruction, &examples, reader).map_err(|error| prompt.invalid(error))? {
                    Rendered::Text(text) => {
                        let encoded = literal.encode(&text).map_err(|error| prompt.invalid(error))?;
                        return self.after_bos(prompt, &encoded);
                    }
                    Rendered::Messages(messages) => self.encode_messages(prompt, &messages, literal)?,
                }
            }
        };
        if encoded.is_empty() {
            return Err(prompt.invalid(format!("`{}` has no tokens", prompt.param())));
        }
        Ok((encoded, 0))
    }

    /// `param` is where the request has the gap.
    fn fill_in_middle(
        &self,
        prompt: &Prompt,
        files: &[ContextFile],
        prefix: &str,
        suffix: &str,
        param: &'static str,
    ) -> Result<Vec<u32>, GenerationError> {
        let Some(fill_in_middle) = &self.base.fill_in_middle else {
            let message = format!(
                "`{param}` asks for fill-in-the-middle, for which `{}` was not trained: send only what is before the gap",
                self.base.id
            );
            return Err(GenerationError::InvalidParameter { param, message });
        };
        // What cannot be in the context is not worth encoding.
        let (prefix, suffix) = (tail(prefix, self.max_prompt_bytes()), head(suffix, self.max_prompt_bytes()));
        let mut room = self.max_prompt_bytes();
        let fits = |file: &&ContextFile| {
            let (left, fits) = (room.checked_sub(file.text.len()), room > 0);
            room = left.unwrap_or(0);
            fits
        };
        let num_files = files.iter().rev().take_while(fits).count();
        let files = &files[files.len() - num_files..];
        fill_in_middle.render(&self.base.tokenizer, files, prefix, suffix).map_err(|error| prompt.invalid(error))
    }

    /// A gap that the client has laid out for another model than this.
    fn read_foreign(&self, text: &str) -> Option<TextAround> {
        let is_own = |sentinel: &str| {
            let own = self.base.fill_in_middle.as_ref();
            own.is_some_and(|own| own.is_own(&self.base.tokenizer, sentinel))
        };
        if self.is_echoed { None } else { foreign::read(text, is_own) }
    }

    /// Text with more bytes than this has more tokens than the context.
    fn max_prompt_bytes(&self) -> usize {
        self.context_length.saturating_mul(self.base.tokenizer.max_token_bytes())
    }

    /// Encoding takes time and memory: not for what is too long by its bytes. Around a gap it is cut.
    fn check_size(&self, prompt: &Prompt) -> Result<(), GenerationError> {
        let of_tools = self.tools.map_or(0, Tools::num_text_bytes);
        let num_bytes = prompt.num_text_bytes() + of_tools + self.output_prefix.len();
        if num_bytes <= self.max_prompt_bytes() {
            return Ok(());
        }
        let context_length = self.context_length;
        Err(GenerationError::PromptTooLarge { param: prompt.param(), num_bytes, context_length })
    }

    /// Tools are offered in the words of the chat template, and nowhere else.
    fn check_tools(&self, wording: &Wording<'_>) -> Result<(), GenerationError> {
        let refused = |message: String| Err(GenerationError::InvalidParameter { param: "tools", message });
        match (self.tools, wording, &self.base.chat_template) {
            (None, ..) | (_, _, Err(_)) => Ok(()),
            (Some(_), Wording::Messages(_), Ok(template)) if template.call_format().is_some() => Ok(()),
            (Some(_), Wording::Messages(_), _) => {
                let id = &self.base.id;
                refused(format!(
                    "the chat template of `{id}` shows no way to call `tools` that is known here: leave them out"
                ))
            }
            _ => refused("`tools` need the chat template: send `prompt_format`: \"chat\"".to_owned()),
        }
    }

    /// `messages` are marked by `literal`.
    fn encode_messages(
        &self,
        prompt: &Prompt,
        messages: &[Value],
        literal: Literal<'_>,
    ) -> Result<Vec<u32>, GenerationError> {
        let template = self.base.chat_template.as_ref().map_err(|cause| {
            let hint = match prompt {
                Prompt::Chat(_) => "use /v1/completions",
                _ => "name another `prompt_format`",
            };
            prompt.invalid(format!("`{}` cannot chat, as {cause}: {hint}", self.base.id))
        })?;
        // The template writes every special token itself, the first one included.
        let tools =
            self.tools.map(|tools| tools.definitions.iter().map(|tool| literal.value(tool)).collect::<Vec<_>>());
        let begun = literal.text(self.output_prefix);
        let ending = if begun.is_empty() { Ending::Prompt } else { Ending::Begun(&begun) };
        let text = template.render(messages, ending, tools.as_deref()).map_err(|error| prompt.invalid(error))?;
        literal.encode(&text).map_err(|error| prompt.invalid(error))
    }

    fn after_bos(&self, prompt: &Prompt, encoded: &[u32]) -> Result<(Vec<u32>, usize), GenerationError> {
        let mut tokens: Vec<u32> = self.base.tokenizer.bos().into_iter().collect();
        let num_added_tokens = tokens.len();
        tokens.extend(encoded);
        if tokens.is_empty() {
            return Err(prompt.invalid(format!("`{}` is empty", prompt.param())));
        }
        Ok((tokens, num_added_tokens))
    }
}

/// An instruction and its examples, to be rendered as literal text.
fn literal<'t>(
    tokenizer: &'t Tokenizer,
    instruction: &str,
    examples: &[&Example],
) -> (Literal<'t>, String, Vec<Example>) {
    let texts = examples.iter().flat_map(|Example { instruction, code }| [instruction.as_str(), code]);
    let texts: Vec<_> = texts.chain([instruction]).collect();
    let literal = Literal::of_texts(tokenizer, &texts);
    let examples = examples.iter().map(|Example { instruction, code }| Example {
        instruction: literal.text(instruction),
        code: literal.text(code),
    });
    (literal, literal.text(instruction), examples.collect())
}

/// The end of `text`, of at most `max_bytes`.
fn tail(text: &str, max_bytes: usize) -> &str {
    &text[text.ceil_char_boundary(text.len().saturating_sub(max_bytes))..]
}

/// The beginning of `text`, of at most `max_bytes`.
fn head(text: &str, max_bytes: usize) -> &str {
    &text[..text.floor_char_boundary(max_bytes)]
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn max_tokens_is_cut_to_the_room_that_is_left() {
        assert_eq!(fit(90, 100, 100, "prompt").unwrap(), 10);
        assert_eq!(fit(90, 5, 100, "prompt").unwrap(), 5);
    }

    #[test]
    fn a_prompt_without_room_for_a_token_is_too_long_unless_none_is_wanted() {
        let refusal = |num_prompt_tokens, max_tokens| fit(num_prompt_tokens, max_tokens, 100, "prompt").unwrap_err();
        assert!(refusal(100, 1).to_string().contains("has 100 tokens and the context ends at 100"));
        assert_eq!(fit(100, 0, 100, "prompt").unwrap(), 0);
        assert!(refusal(101, 0).to_string().contains("101 tokens"));
    }

    #[test]
    fn text_is_cut_between_characters() {
        assert_eq!((tail("aéb", 2), head("aéb", 2)), ("b", "a"));
        assert_eq!((tail("aéb", 3), head("aéb", 3)), ("éb", "aé"));
        assert_eq!((tail("aéb", 9), head("aéb", 9)), ("aéb", "aéb"));
    }

    #[test]
    fn a_token_id_beyond_the_vocabulary_is_named() {
        assert_eq!(check_ids(&[0, 9], 10).unwrap(), [0, 9]);
        assert!(check_ids(&[10], 10).unwrap_err().to_string().contains("token 10"));
    }
}
