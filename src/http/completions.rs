//! `POST /v1/completions`, which Tabby asks with `segments`.

use std::sync::Arc;

use axum::Extension;
use axum::extract::State;
use axum::response::Response;
use serde_json::Value;

use super::AppState;
use super::auth::Caller;
use super::error::ApiError;
use super::fields::{Fields, wrong_type};
use super::logprobs::completion_logprobs;
use super::priority::parse_priority;
use super::reply::{ReplyShape, answer};
use super::sampling::parse_options;
use super::selection::parse_selection;
use super::tabby;
use super::types::CompletionChoice;
use super::unsupported::{Route, refuse_unsupported};
use crate::engine::fairness::Priority;
use crate::engine::request::FinishReason;
use crate::generation::{Completed, Generation, GenerationOptions, GenerationRequest, Prompt, TextDelta, TokenRecord};
use crate::tokenizer::Tokenizer;

/// Alternatives per token; OpenAI's own interface ends at 5.
pub const MAX_LOGPROBS: u32 = 20;

pub async fn completions(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    fields: Fields,
) -> Result<Response, ApiError> {
    if fields.get("segments").is_some_and(|segments| segments.as_object().is_some_and(|segments| !segments.is_empty()))
    {
        return tabby::completions(&state, &caller, &fields).await;
    }
    answer::<CompletionShape>(&state, &caller, &fields).await
}

fn options(fields: &Fields) -> Result<GenerationOptions, ApiError> {
    Ok(GenerationOptions {
        top_logprobs: top_logprobs(fields)?,
        // As in vLLM; clients that score a prompt cut off the one token behind it, whatever that is.
        records_stop_token: true,
        echo: fields.boolean("echo")?.unwrap_or(false),
        account: parse_priority(fields, Priority::Completion)?,
        output_prefix: fields.string("prefix")?.unwrap_or_default().to_owned(),
        ..parse_options(fields)?
    })
}

/// `logprobs` counts the alternatives; `false` is none, as where it only switches them.
fn top_logprobs(fields: &Fields) -> Result<Option<usize>, ApiError> {
    if fields.count("top_logprobs", 0..=MAX_LOGPROBS)?.is_some_and(|count| count > 0) {
        return Err(ApiError::invalid("top_logprobs", "`top_logprobs` is for chat: send the count as `logprobs`"));
    }
    match fields.get("logprobs") {
        Some(Value::Bool(false)) => Ok(None),
        _ => fields.count("logprobs", 0..=MAX_LOGPROBS),
    }
}

/// `prompt` is a string, strings, token ids, or arrays of token ids; `suffix` makes every string the text before a gap.
fn prompts(fields: &Fields, echo: bool) -> Result<Vec<Prompt>, ApiError> {
    // With nothing behind the gap there is nothing to keep an echo from.
    let suffix = fields.string("suffix")?.filter(|suffix| !(suffix.is_empty() && echo));
    if suffix.is_some() && echo {
        return Err(ApiError::invalid("echo", "`echo` cannot be combined with `suffix`"));
    }
    let text = |text: &str| match suffix {
        Some(suffix) => Prompt::FillInMiddle { files: Vec::new(), prefix: text.to_owned(), suffix: suffix.to_owned() },
        None => Prompt::Text(text.to_owned()),
    };
    let expected = "a string, an array of strings, an array of token ids, or an array of such arrays";
    let prompts = match fields.get("prompt") {
        None => return Err(ApiError::invalid("prompt", "`prompt` is required")),
        Some(Value::String(prompt)) => vec![text(prompt)],
        Some(Value::Array(items)) if items.is_empty() => {
            return Err(ApiError::invalid("prompt", "`prompt` is an empty array"));
        }
        Some(Value::Array(items)) if items[0].is_number() => vec![Prompt::Tokens(token_ids("prompt", items)?)],
        Some(Value::Array(items)) => items
            .iter()
            .enumerate()
            .map(|(index, item)| match item {
                Value::String(prompt) => Ok(text(prompt)),
                Value::Array(ids) => Ok(Prompt::Tokens(token_ids(&format!("prompt[{index}]"), ids)?)),
                other => Err(wrong_type("prompt", expected, other)),
            })
            .collect::<Result<_, _>>()?,
        Some(other) => return Err(wrong_type("prompt", expected, other)),
    };
    if suffix.is_some_and(|suffix| !suffix.is_empty())
        && prompts.iter().any(|prompt| matches!(prompt, Prompt::Tokens(_)))
    {
        return Err(ApiError::invalid("suffix", "`suffix` needs a `prompt` of text, not of token ids"));
    }
    Ok(prompts)
}

fn token_ids(name: &str, items: &[Value]) -> Result<Vec<u32>, ApiError> {
    let id = |item: &Value| item.as_u64().and_then(|id| u32::try_from(id).ok());
    items
        .iter()
        .map(|item| {
            id(item).ok_or_else(|| ApiError::invalid("prompt", format!("`{name}` has `{item}`, which is no token id")))
        })
        .collect()
}

pub struct CompletionShape {
    tokenizer: Arc<Tokenizer>,
    logprobs: bool,
}

impl CompletionShape {
    fn words(
        &self,
        index: usize,
        text: String,
        tokens: &[TokenRecord],
        reason: Option<FinishReason>,
        score: Option<f32>,
    ) -> CompletionChoice {
        let logprobs = self.logprobs.then(|| completion_logprobs(&self.tokenizer, tokens));
        CompletionChoice { index, text, logprobs, finish_reason: reason, score }
    }
}

impl ReplyShape for CompletionShape {
    const ID_PREFIX: &'static str = "cmpl";
    const OBJECT: &'static str = "text_completion";
    const CHUNK_OBJECT: &'static str = "text_completion";
    type Choice = CompletionChoice;
    type ChunkChoice = CompletionChoice;

    fn parse(fields: &Fields) -> Result<GenerationRequest, ApiError> {
        refuse_unsupported(fields, Route::Completions)?;
        let options = options(fields)?;
        let (selection, icl) = parse_selection(fields)?;
        let prompt_format = fields.string("prompt_format")?.map(str::to_owned);
        let prompts = prompts(fields, options.echo)?;
        if !options.output_prefix.is_empty() && prompts.iter().any(|prompt| matches!(prompt, Prompt::Tokens(_))) {
            return Err(ApiError::invalid(
                "prefix",
                "`prefix` needs a `prompt` of text: add its tokens to the token ids",
            ));
        }
        Ok(GenerationRequest { selection, icl, prompt_format, prompts, options })
    }

    fn new(generation: &Generation, options: &GenerationOptions) -> Self {
        Self { tokenizer: generation.tokenizer().clone(), logprobs: options.top_logprobs.is_some() }
    }

    fn choice(&mut self, index: usize, completed: Completed) -> CompletionChoice {
        self.words(index, completed.text, &completed.tokens, Some(completed.reason), completed.score)
    }

    fn delta(&mut self, index: usize, delta: TextDelta) -> Option<CompletionChoice> {
        Some(self.words(index, delta.text, &delta.tokens, None, None))
    }

    fn finish(&mut self, index: usize, reason: FinishReason, score: Option<f32>) -> CompletionChoice {
        CompletionChoice { index, text: String::new(), logprobs: None, finish_reason: Some(reason), score }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<Vec<Prompt>, ApiError> {
        prompts(&Fields::parse(json.as_bytes())?, false)
    }

    fn text(text: &str) -> Prompt {
        Prompt::Text(text.to_owned())
    }

    #[test]
    fn a_prompt_comes_in_four_forms() {
        assert_eq!(parse(r#"{"prompt": "a"}"#), Ok(vec![text("a")]));
        assert_eq!(parse(r#"{"prompt": ["a", "b"]}"#), Ok(vec![text("a"), text("b")]));
        assert_eq!(parse(r#"{"prompt": [1, 2]}"#), Ok(vec![Prompt::Tokens(vec![1, 2])]));
        assert_eq!(parse(r#"{"prompt": [[1], [2]]}"#), Ok(vec![Prompt::Tokens(vec![1]), Prompt::Tokens(vec![2])]));
    }

    #[test]
    fn anything_else_is_refused() {
        for body in [
            "{}",
            r#"{"prompt": null}"#,
            r#"{"prompt": 1}"#,
            r#"{"prompt": []}"#,
            r#"{"prompt": [1, "a"]}"#,
            r#"{"prompt": ["a", 1]}"#,
            r#"{"prompt": [-1]}"#,
            r#"{"prompt": [1.5]}"#,
            r#"{"prompt": [4294967296]}"#,
        ] {
            assert!(parse(body).is_err(), "{body}");
        }
    }

    #[test]
    fn a_suffix_even_an_empty_one_makes_a_gap_to_fill() {
        let gap = |suffix: &str| {
            vec![Prompt::FillInMiddle { files: Vec::new(), prefix: "a".to_owned(), suffix: suffix.to_owned() }]
        };
        assert_eq!(parse(r#"{"prompt": "a", "suffix": "b"}"#), Ok(gap("b")));
        assert_eq!(parse(r#"{"prompt": "a", "suffix": ""}"#), Ok(gap("")));
        assert_eq!(parse(r#"{"prompt": "a", "suffix": null}"#), Ok(vec![text("a")]));
        assert!(parse(r#"{"prompt": [1], "suffix": "b"}"#).is_err());
        assert_eq!(parse(r#"{"prompt": [1], "suffix": ""}"#), Ok(vec![Prompt::Tokens(vec![1])]));
    }

    #[test]
    fn an_echo_goes_with_an_empty_suffix_alone() {
        let echoed = |json: &str| prompts(&Fields::parse(json.as_bytes()).unwrap(), true);
        assert_eq!(echoed(r#"{"prompt": "a", "suffix": ""}"#), Ok(vec![text("a")]));
        assert!(echoed(r#"{"prompt": "a", "suffix": "b"}"#).is_err());
    }

    #[test]
    fn log_probabilities_may_be_counted_or_switched_off() {
        let top = |json: &str| top_logprobs(&Fields::parse(json.as_bytes()).unwrap());
        assert_eq!(top(r#"{"logprobs": 3}"#), Ok(Some(3)));
        assert_eq!(top(r#"{"logprobs": false, "top_logprobs": 0}"#), Ok(None));
        assert!(top(r#"{"logprobs": true}"#).is_err() && top(r#"{"top_logprobs": 2}"#).is_err());
    }
}
