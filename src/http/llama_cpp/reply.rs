//! Replies as llama.cpp words them.

use std::time::Duration;

use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::engine::request::FinishReason;
use crate::generation::{Completed, GenerationOptions, SequenceUsage, TextDelta, TokenRecord};
use crate::http::error::ApiError;
use crate::http::fields::Fields;

/// No sequence has a place of its own here, which another could be sent to.
const NO_SLOT: i64 = -1;

/// A whole reply, or the last event of a stream.
#[derive(Debug, JsonSchema, Serialize)]
#[schemars(rename = "LlamaCppReply")]
pub struct Reply<'a> {
    index: usize,
    content: String,
    /// Ids, where the request asks for them.
    tokens: Vec<u32>,
    id_slot: i64,
    stop: bool,
    stop_type: &'static str,
    stopping_word: String,
    model: &'a str,
    tokens_predicted: usize,
    tokens_evaluated: usize,
    /// Tokens of the prompt that were not computed again.
    tokens_cached: usize,
    /// As the model read it, special tokens included.
    prompt: String,
    /// In the whole output.
    pub has_new_line: bool,
    /// No text is dropped while generating.
    truncated: bool,
    generation_settings: &'a Value,
    timings: Timings,
}

#[derive(Debug, JsonSchema, Serialize)]
#[schemars(rename = "LlamaCppPart")]
pub struct Part {
    index: usize,
    content: String,
    tokens: Vec<u32>,
    id_slot: i64,
    stop: bool,
    tokens_predicted: usize,
    tokens_evaluated: usize,
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

impl Part {
    /// Of the only choice.
    pub fn new(delta: TextDelta, usage: SequenceUsage) -> Self {
        Self {
            index: 0,
            tokens: token_ids(&delta.tokens),
            content: delta.text,
            id_slot: NO_SLOT,
            stop: false,
            tokens_predicted: usage.num_output_tokens,
            tokens_evaluated: usage.num_prompt_tokens,
        }
    }
}

impl<'a> Reply<'a> {
    pub fn new(
        index: usize,
        completed: Completed,
        prompt: String,
        model: &'a str,
        generation_settings: &'a Value,
    ) -> Self {
        let Completed { text, tokens, reason, stop, usage, timing, .. } = completed;
        let until_first = timing.first_token.unwrap_or(timing.total);
        Self {
            index,
            has_new_line: text.contains('\n'),
            content: text,
            tokens: token_ids(&tokens),
            id_slot: NO_SLOT,
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
            prompt,
            truncated: false,
            generation_settings,
            timings: Timings::of(usage, until_first, timing.total.saturating_sub(until_first)),
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

fn token_ids(tokens: &[TokenRecord]) -> Vec<u32> {
    tokens.iter().map(|token| token.id).collect()
}

/// What was asked for; `null` where that is left to the adapter or the configuration.
pub fn settings(options: &GenerationOptions, seed: i64) -> Value {
    let max_tokens = options.max_tokens.and_then(|most| i64::try_from(most).ok()).unwrap_or(-1);
    json!({
        "n_predict": max_tokens,
        "max_tokens": max_tokens,
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
        "t_max_predict_ms": options.time_limit.map_or(-1, |limit| i64::try_from(limit.as_millis()).unwrap_or(i64::MAX)),
        "logit_bias": options.logit_bias.iter().map(|(token, bias)| json!({"token": token, "bias": bias})).collect::<Value>(),
        // What is not served is off.
        "repeat_last_n": -1,
        "dynatemp_range": 0.0,
        "top_n_sigma": -1.0,
        "typical_p": 1.0,
        "xtc_probability": 0.0,
        "dry_multiplier": 0.0,
        "mirostat": 0,
        "n_keep": 0,
        "n_discard": 0,
        "n_probs": 0,
        "min_keep": 0,
        "samplers": ["penalties", "temperature", "top_k", "top_p", "min_p"],
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
