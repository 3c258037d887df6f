//! Replies as llama.cpp words them.

use std::time::Duration;

use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::engine::request::FinishReason;
use crate::generation::{Completed, GenerationOptions, SequenceUsage, TokenRecord};
use crate::http::error::ApiError;
use crate::http::fields::Fields;

/// A whole reply, or the last event of a stream.
#[derive(Debug, JsonSchema, Serialize)]
#[schemars(rename = "LlamaCppReply")]
pub struct Reply<'a> {
    index: usize,
    content: String,
    /// Ids, where the request asks for them.
    tokens: Vec<u32>,
    stop: bool,
    stop_type: &'static str,
    stopping_word: String,
    model: &'a str,
    tokens_predicted: usize,
    tokens_evaluated: usize,
    /// Tokens of the prompt that were not computed again.
    tokens_cached: usize,
    /// No text is dropped while generating.
    truncated: bool,
    generation_settings: &'a Value,
    timings: Timings,
}

#[derive(Debug, JsonSchema, Serialize)]
#[schemars(rename = "LlamaCppPart")]
pub struct Part {
    pub index: usize,
    pub content: String,
    pub tokens: Vec<u32>,
    pub stop: bool,
}

#[derive(Debug, JsonSchema, Serialize)]
#[schemars(rename = "LlamaCppTimings")]
struct Timings {
    cache_n: usize,
    prompt_n: usize,
    prompt_ms: f64,
    prompt_per_token_ms: f64,
    prompt_per_second: f64,
    predicted_n: usize,
    predicted_ms: f64,
    predicted_per_token_ms: f64,
    predicted_per_second: f64,
}

impl<'a> Reply<'a> {
    pub fn new(index: usize, completed: Completed, model: &'a str, generation_settings: &'a Value) -> Self {
        let Completed { text, tokens, reason, stop, usage, timing, .. } = completed;
        let prompt = timing.first_token.unwrap_or(timing.total);
        Self {
            index,
            content: text,
            tokens: token_ids(&tokens),
            stop: true,
            stop_type: match (reason, &stop) {
                (FinishReason::Length, _) => "limit",
                (FinishReason::Stop, None) => "eos",
                (FinishReason::Stop, Some(_)) => "word",
            },
            stopping_word: stop.unwrap_or_default(),
            model,
            tokens_predicted: usage.num_output_tokens,
            tokens_evaluated: usage.num_prompt_tokens,
            tokens_cached: usage.num_cached_tokens,
            truncated: false,
            generation_settings,
            timings: Timings::of(usage, prompt, timing.total.saturating_sub(prompt)),
        }
    }
}

impl Timings {
    fn of(usage: SequenceUsage, prompt: Duration, predicted: Duration) -> Self {
        let num_computed = usage.num_prompt_tokens - usage.num_cached_tokens;
        let (prompt_ms, predicted_ms) = (prompt.as_secs_f64() * 1e3, predicted.as_secs_f64() * 1e3);
        // JSON has no number for what no token took.
        let ratio = |of: f64, by: f64| if by > 0.0 { of / by } else { 0.0 };
        let (num_prompt, num_predicted) = (num_computed as f64, usage.num_output_tokens as f64);
        Self {
            cache_n: usage.num_cached_tokens,
            prompt_n: num_computed,
            prompt_ms,
            prompt_per_token_ms: ratio(prompt_ms, num_prompt),
            prompt_per_second: ratio(num_prompt * 1e3, prompt_ms),
            predicted_n: usage.num_output_tokens,
            predicted_ms,
            predicted_per_token_ms: ratio(predicted_ms, num_predicted),
            predicted_per_second: ratio(num_predicted * 1e3, predicted_ms),
        }
    }
}

pub fn token_ids(tokens: &[TokenRecord]) -> Vec<u32> {
    tokens.iter().map(|token| token.id).collect()
}

/// What was asked for; `null` where that is left to the adapter or the configuration.
pub fn settings(options: &GenerationOptions, seed: i64) -> Value {
    json!({
        "n_predict": options.max_tokens.and_then(|most| i64::try_from(most).ok()).unwrap_or(-1),
        "seed": seed,
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "min_p": options.min_p,
        "repeat_penalty": options.repetition_penalty,
        "presence_penalty": options.presence_penalty,
        "frequency_penalty": options.frequency_penalty,
        "stop": options.stop,
        "ignore_eos": options.ignore_eos,
        "n_indent": options.min_indent,
    })
}

/// `response_fields`: the paths (`timings/prompt_n`) of what the reply has, which come back as the names of its fields.
#[derive(Debug)]
pub struct Selected(Option<Vec<String>>);

impl Selected {
    pub fn parse(fields: &Fields) -> Result<Self, ApiError> {
        fields.array("response_fields")?;
        let paths = fields.strings("response_fields")?;
        Ok(Self((!paths.is_empty()).then_some(paths)))
    }

    /// Paths to nothing are left out.
    pub fn of(&self, reply: Value) -> Value {
        let Some(paths) = &self.0 else { return reply };
        let found = paths.iter().filter_map(|path| {
            let value = path.split('/').try_fold(&reply, |value, name| value.get(name))?;
            Some((path.clone(), value.clone()))
        });
        Value::Object(found.collect::<Map<_, _>>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_the_name_of_what_it_leads_to() {
        let select = |paths: Value| {
            let fields = Fields::parse(json!({"response_fields": paths}).to_string().as_bytes()).unwrap();
            Selected::parse(&fields).unwrap().of(json!({"content": "a", "timings": {"prompt_n": 3}}))
        };
        assert_eq!(select(json!(["content", "timings/prompt_n"])), json!({"content": "a", "timings/prompt_n": 3}));
        assert_eq!(select(json!([""])), json!({}));
        assert_eq!(select(json!(["content/x", "other"])), json!({}));
        assert_eq!(select(json!([]))["content"], "a");
    }
}
