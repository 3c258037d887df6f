//! What a client's generation asks of the engine, and what the engine says back.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, mpsc};

use super::fairness::Account;
use super::prediction::Prediction;
use crate::adapter::canonical::Adapter;
use crate::grammar::Matcher;

/// One sequence to generate. Dropping the receiver of `events` cancels it: that is the only way, and it is enough.
#[derive(Debug)]
pub struct Request {
    /// Not empty, and with `max_tokens` within the engine's context length.
    pub prompt_tokens: Vec<u32>,
    /// The first tokens of the prompt, as far as many prompts will begin so: the last to leave the prefix cache.
    pub num_pinned_tokens: usize,
    /// The adapter generation this request holds until it ends; `None` is the base.
    pub adapter: Option<Arc<Adapter>>,
    /// Whose share of the machine it takes.
    pub account: Account,
    pub sampling: SamplingParams,
    /// What the output must follow, at its beginning.
    pub grammar: Option<Matcher>,
    /// What the client expects of the output, at its beginning: it makes it faster, never another.
    pub prediction: Option<Prediction>,
    /// Most tokens to generate; 0 only scores the prompt.
    pub max_tokens: usize,
    /// Tokens that end the sequence; they are not reported as output.
    pub stop_tokens: Arc<[u32]>,
    /// Alternatives reported per token; `None` reports no log-probabilities at all.
    pub top_logprobs: Option<usize>,
    pub prompt_output: PromptOutput,
    /// When it has to have ended, whether or not somebody reads its events.
    pub deadline: Option<Instant>,
    pub events: mpsc::UnboundedSender<Event>,
    /// The place in the bounded queue, given back when the request ends in any way.
    /// Requests that share one have it until the last of them ends.
    pub permit: Arc<OwnedSemaphorePermit>,
}

/// What is reported of the prompt itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum PromptOutput {
    #[default]
    Nothing,
    /// Every prompt token's log-probability.
    Logprobs,
    /// The logits after its last token, with `max_tokens` 0.
    Logits,
}

/// How the next token is drawn from the logits. The order is: logit bias, penalties, temperature, top-k, top-p, min-p.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy.
    pub temperature: f32,
    /// 0 is off.
    pub top_k: usize,
    /// 1.0 is off.
    pub top_p: f32,
    /// 0.0 is off.
    pub min_p: f32,
    /// 1.0 is off; as in Hugging Face, over prompt and output.
    pub repetition_penalty: f32,
    /// 0.0 is off; as in OpenAI, over the output.
    pub presence_penalty: f32,
    pub frequency_penalty: f32,
    pub logit_bias: Vec<(u32, f32)>,
    /// The same seed, prompt and parameters give the same output, in any batch.
    pub seed: u64,
}

impl SamplingParams {
    /// Always the most likely token, everything else off: what others differ from.
    pub const GREEDY: Self = Self {
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        logit_bias: Vec::new(),
        seed: 0,
    };
}

/// A token with its log-probability under the unmodified distribution of the model.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprob {
    pub logprob: f32,
    /// The most likely tokens in falling order, as many as `top_logprobs` asked for.
    pub top: Vec<(u32, f32)>,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The first rows of the request have been planned.
    Started {
        queue: Duration,
        cached_tokens: usize,
    },
    /// One for each prompt token, in order, with [`PromptOutput::Logprobs`]; `None` for the first, which nothing predicts.
    PromptToken(Option<TokenLogprob>),
    /// `[vocab_size]`, with [`PromptOutput::Logits`].
    PromptLogits(Vec<f32>),
    Token {
        id: u32,
        logprob: Option<TokenLogprob>,
    },
    /// The stop token that ended the sequence, where log-probabilities are reported; it is no output.
    StopToken {
        id: u32,
        logprob: TokenLogprob,
    },
    /// What a beam search gives its output, before the end.
    Score(f32),
    Finished(FinishReason),
    /// Its deadline has passed.
    OutOfTime,
    /// The engine could not go on with this request (an internal error, named).
    Failed(String),
    /// The engine has ended, for which this request is not the cause: another server can take it.
    Stopped,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token.
    Stop,
    /// `max_tokens`, or the end of the context.
    Length,
}
