//! What replies look like on the wire.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Serialize, Serializer};

use crate::adapter::canonical::Member;
use crate::engine::request::FinishReason;
use crate::generation::{ResolvedModel, SequenceUsage};
use crate::icl;

/// A whole reply or one chunk of a stream, with its choices.
#[derive(Debug, JsonSchema, Serialize)]
pub struct Reply<'a, C> {
    #[serde(flatten)]
    pub head: &'a ReplyHead,
    pub choices: Vec<C>,
    /// Absent in streams that did not ask for it; `null` in all chunks but the last of those that did, unless they asked for it in
    /// every chunk: there it is that of the chunk's choice so far.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Option<Usage>>,
}

/// The same in every chunk of one reply.
#[derive(Debug, Clone, JsonSchema, Serialize)]
pub struct ReplyHead {
    pub id: String,
    pub object: &'static str,
    /// Unix seconds.
    pub created: u64,
    pub model: String,
    pub system_fingerprint: String,
    /// `null` when the base alone answered.
    pub adapter: Option<AdapterName>,
    /// What `adapter` is made of.
    pub adapters: Vec<Member>,
    /// `null` without in-context examples.
    pub icl: Option<IclReply>,
    pub seed: i64,
}

/// The in-context examples of a reply, enough to ask for the same again.
#[derive(Debug, Clone, PartialEq, JsonSchema, Serialize)]
pub struct IclReply {
    store: String,
    version: String,
    /// Examples in the prompt: with a token budget there may be less than were asked for.
    k: usize,
    select: icl::Select,
    /// `null` where nothing was drawn.
    seed: Option<u64>,
    /// Places in the store, in the order of the prompt.
    examples: Vec<usize>,
    /// Prompt tokens that were not computed again; `null` while the reply is under way.
    cached_tokens: Option<usize>,
}

impl IclReply {
    pub fn of(chosen: &icl::Chosen) -> Self {
        Self {
            store: chosen.store.name().to_owned(),
            version: chosen.store.version().to_owned(),
            k: chosen.ids.len(),
            select: chosen.select,
            seed: chosen.seed,
            examples: chosen.ids.clone(),
            cached_tokens: None,
        }
    }

    /// Fills in what only the end of a sequence tells.
    pub fn saved(icl: &mut Option<Self>, usage: SequenceUsage) {
        if let Some(icl) = icl {
            icl.cached_tokens.get_or_insert(usage.num_cached_tokens);
        }
    }
}

/// What was applied, as one.
#[derive(Debug, Clone, PartialEq, JsonSchema, Serialize)]
pub struct AdapterName {
    /// Of several adapters, their names with `+` in between.
    pub name: String,
    /// Of several adapters, the identity of the composition.
    pub generation: String,
    /// Of several adapters, 1.
    pub scale: f32,
}

impl AdapterName {
    pub fn of(model: &ResolvedModel) -> Option<Self> {
        let composition = model.adapter.as_ref()?;
        Some(match model.applied.as_slice() {
            [Member { name, generation, scale }] => {
                Self { name: name.clone(), generation: generation.clone(), scale: *scale }
            }
            several => Self {
                name: several.iter().map(|adapter| adapter.name.as_str()).collect::<Vec<_>>().join("+"),
                generation: composition.generation.clone(),
                scale: 1.0,
            },
        })
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, JsonSchema, Serialize)]
pub struct Usage {
    pub prompt_tokens: usize,
    pub completion_tokens: usize,
    pub total_tokens: usize,
    pub prompt_tokens_details: PromptTokensDetails,
    /// Of requests with a `prediction`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub completion_tokens_details: Option<CompletionTokensDetails>,
}

/// How much of the `prediction` the outputs have, and how much not.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, JsonSchema, Serialize)]
pub struct CompletionTokensDetails {
    pub accepted_prediction_tokens: usize,
    pub rejected_prediction_tokens: usize,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, JsonSchema, Serialize)]
pub struct PromptTokensDetails {
    pub cached_tokens: usize,
}

impl Usage {
    /// Of one choice alone.
    pub fn of(sequence: SequenceUsage) -> Self {
        let mut usage = Self::default();
        usage.add(sequence, true);
        usage
    }

    /// Adds the sequence of one choice; a prompt counts once, with its first choice.
    pub fn add(&mut self, sequence: SequenceUsage, is_first_choice: bool) {
        if is_first_choice {
            self.prompt_tokens += sequence.num_prompt_tokens;
            self.prompt_tokens_details.cached_tokens += sequence.num_cached_tokens;
        }
        self.completion_tokens += sequence.num_output_tokens;
        if let Some(prediction) = sequence.prediction {
            let details = self.completion_tokens_details.get_or_insert_default();
            details.accepted_prediction_tokens += prediction.num_accepted;
            details.rejected_prediction_tokens += prediction.num_rejected;
        }
        self.total_tokens = self.prompt_tokens + self.completion_tokens;
    }
}

/// A choice of a completion, whole or a chunk of it.
#[derive(Debug, JsonSchema, Serialize)]
pub struct CompletionChoice {
    pub index: usize,
    pub text: String,
    pub logprobs: Option<CompletionLogprobs>,
    #[serde(serialize_with = "finish_reason")]
    #[schemars(with = "Option<String>", extend("enum" = ["stop", "length", null]))]
    pub finish_reason: Option<FinishReason>,
    /// Of beam search: higher is better.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub score: Option<f32>,
}

/// One entry per token in each list.
#[derive(Debug, PartialEq, JsonSchema, Serialize)]
pub struct CompletionLogprobs {
    pub tokens: Vec<String>,
    pub token_logprobs: Vec<Option<f32>>,
    pub top_logprobs: Vec<Option<BTreeMap<String, f32>>>,
    pub text_offset: Vec<usize>,
}

#[derive(Debug, JsonSchema, Serialize)]
pub struct ChatChoice {
    pub index: usize,
    pub message: ChatMessage,
    pub logprobs: Option<ChatLogprobs>,
    pub finish_reason: Option<&'static str>,
    /// Of beam search: higher is better.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub score: Option<f32>,
}

#[derive(Debug, JsonSchema, Serialize)]
pub struct ChatMessage {
    pub role: &'static str,
    /// `null` where the model only called tools.
    pub content: Option<String>,
    /// Always `null`: strict clients want the key.
    pub refusal: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
}

/// A call of a tool, whole or a piece of it.
#[derive(Debug, PartialEq, JsonSchema, Serialize)]
pub struct ToolCall {
    /// Which call of the reply a piece belongs to; whole ones are in order.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub index: Option<usize>,
    /// With the first piece.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<&'static str>,
    pub function: FunctionCall,
}

#[derive(Debug, PartialEq, JsonSchema, Serialize)]
pub struct FunctionCall {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// JSON, as the model wrote it.
    pub arguments: String,
}

#[derive(Debug, JsonSchema, Serialize)]
pub struct ChatChunkChoice {
    pub index: usize,
    pub delta: ChatDelta,
    pub logprobs: Option<ChatLogprobs>,
    pub finish_reason: Option<&'static str>,
    /// Of beam search: higher is better.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub score: Option<f32>,
}

#[derive(Debug, Default, PartialEq, JsonSchema, Serialize)]
pub struct ChatDelta {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
}

#[derive(Debug, PartialEq, JsonSchema, Serialize)]
pub struct ChatLogprobs {
    pub content: Vec<ChatTokenLogprob>,
}

#[derive(Debug, PartialEq, JsonSchema, Serialize)]
pub struct ChatTokenLogprob {
    #[serde(flatten)]
    pub chosen: TokenAlternative,
    pub top_logprobs: Vec<TokenAlternative>,
}

#[derive(Debug, PartialEq, JsonSchema, Serialize)]
pub struct TokenAlternative {
    pub token: String,
    pub logprob: f32,
    pub bytes: Vec<u8>,
}

pub fn finish_reason<S: Serializer>(reason: &Option<FinishReason>, serializer: S) -> Result<S::Ok, S::Error> {
    reason.map(reason_name).serialize(serializer)
}

pub fn reason_name(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_counts_once_whatever_its_choices() {
        let sequence =
            SequenceUsage { num_prompt_tokens: 10, num_cached_tokens: 4, num_output_tokens: 3, prediction: None };
        let mut usage = Usage::default();
        (0..4).for_each(|index| usage.add(sequence, index % 2 == 0));
        let details = PromptTokensDetails { cached_tokens: 8 };
        let expected = Usage {
            prompt_tokens: 20,
            completion_tokens: 12,
            total_tokens: 32,
            prompt_tokens_details: details,
            ..Usage::default()
        };
        assert_eq!(usage, expected);
    }

    #[test]
    fn usage_is_absent_null_or_there() {
        let head = ReplyHead {
            id: "cmpl-1".to_owned(),
            object: "text_completion",
            created: 1,
            model: "m".to_owned(),
            system_fingerprint: "f".to_owned(),
            adapter: None,
            adapters: Vec::new(),
            icl: None,
            seed: 7,
        };
        let reply = |usage| serde_json::to_value(Reply::<()> { head: &head, choices: vec![], usage }).unwrap();
        assert!(reply(None).get("usage").is_none());
        assert!(reply(Some(None))["usage"].is_null());
        assert_eq!(reply(Some(Some(Usage::default())))["usage"]["total_tokens"], 0);
        assert_eq!(reply(None)["seed"], 7);
    }
}
