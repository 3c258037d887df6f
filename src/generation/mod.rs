//! The service between HTTP and the engine: finds the model, renders and encodes the prompt, checks that it fits, takes
//! a place in the queue, and turns the engine's tokens into text.

mod error;
mod model_name;
mod prompt;
mod recorder;
mod resolve;
mod selection;
pub mod self_test;
mod text_stream;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLock};
use std::time::Instant;

use tokio::sync::{OwnedSemaphorePermit, mpsc, watch};

pub use error::GenerationError;
pub use prompt::Prompt;
pub use resolve::ResolvedModel;
pub use selection::{Access, AdapterEntry, AdapterField, AdapterRef, Selection};
pub use text_stream::{Completed, SequenceUsage, TextDelta, TextEvent, TextStream, TokenRecord};

use crate::adapter::registry::AdapterRegistry;
use crate::config::Config;
use crate::engine::EngineHandle;
use crate::engine::request::{PromptOutput, Request, SamplingParams};
use crate::metrics::Metrics;
use crate::prompt::chat::ChatTemplate;
use crate::prompt::fim::FillInMiddle;
use crate::tokenizer::Tokenizer;
use prompt::EncodedPrompt;
use recorder::Recorder;
use text_stream::{Echo, TextStreamOptions};

/// The resident base, as far as prompts are concerned.
#[derive(Debug)]
pub struct Base {
    /// What clients call it, e.g. `qwen2.5-coder:0.5b`.
    pub id: String,
    pub tokenizer: Arc<Tokenizer>,
    /// `None` for a base that was not trained to chat.
    pub chat_template: Option<ChatTemplate>,
    /// `None` for a base without fill-in-the-middle tokens.
    pub fill_in_middle: Option<FillInMiddle>,
}

#[derive(Debug)]
pub struct Generation {
    base: Arc<Base>,
    adapters: Arc<AdapterRegistry>,
    /// Names and strengths of the adapters that a request to the base gets when it says nothing of adapters.
    default_scales: RwLock<Vec<(String, f32)>>,
    engine: EngineHandle,
    metrics: Arc<Metrics>,
    config: Arc<Config>,
    shutting_down: AtomicBool,
    /// Every [`TextStream`] holds a receiver: no receiver means drained.
    in_flight: watch::Sender<()>,
}

/// What a request asked for beside its prompts, ranges already checked; `None` takes the default of the adapter, else
/// of the configuration.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationOptions {
    /// Sequences per prompt, at least 1.
    pub num_choices: usize,
    pub max_tokens: Option<usize>,
    pub temperature: Option<f32>,
    pub top_k: Option<usize>,
    pub top_p: Option<f32>,
    pub min_p: Option<f32>,
    pub repetition_penalty: Option<f32>,
    pub presence_penalty: Option<f32>,
    pub frequency_penalty: Option<f32>,
    pub logit_bias: Vec<(u32, f32)>,
    /// Choice `k` of a prompt is drawn with `seed + k`.
    pub seed: Option<i64>,
    pub stop: Vec<String>,
    /// Go on where the model would end.
    pub ignore_eos: bool,
    /// Alternatives per token; `None` is no log-probabilities.
    pub top_logprobs: Option<usize>,
    /// Repeat the prompt before the output.
    pub echo: bool,
}

/// A request under way.
#[derive(Debug)]
pub struct Generated {
    pub model: ResolvedModel,
    /// The client's, else one drawn for it: sent again, it repeats the output.
    pub seed: i64,
    /// `num_choices` for the first prompt, then for the second, and so on.
    pub sequences: Vec<TextStream>,
    pub num_choices: usize,
}

impl Generation {
    pub fn new(
        base: Base,
        adapters: Arc<AdapterRegistry>,
        engine: EngineHandle,
        metrics: Arc<Metrics>,
        config: Arc<Config>,
    ) -> Self {
        let in_flight = watch::Sender::new(());
        let (default_scales, shutting_down) = (RwLock::default(), AtomicBool::new(false));
        Self { base: Arc::new(base), adapters, default_scales, engine, metrics, config, shutting_down, in_flight }
    }

    pub fn base_id(&self) -> &str {
        &self.base.id
    }

    /// Where adapters are registered, loaded and changed.
    pub fn adapters(&self) -> &Arc<AdapterRegistry> {
        &self.adapters
    }

    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.base.tokenizer
    }

    /// Most tokens of a prompt and its output together.
    pub fn context_length(&self) -> usize {
        self.engine.context_length()
    }

    /// Starts every choice of every prompt; they run side by side in the engine. Dropping the result cancels them.
    ///
    /// # Errors
    /// Any but [`GenerationError::Failed`]; then nothing was started.
    pub async fn start(
        &self,
        selection: &Selection,
        access: &Access,
        prompts: Vec<Prompt>,
        options: GenerationOptions,
    ) -> Result<Generated, GenerationError> {
        let accepted = Instant::now();
        // A request that waits for its adapter is under way.
        let in_flight = self.in_flight.subscribe();
        if self.shutting_down.load(Ordering::Relaxed) {
            return Err(GenerationError::ShuttingDown);
        }
        let model = self.resolve(selection, access).await?;
        let permits = self.take_permits(prompts.len(), options.num_choices)?;
        let prompts = self.encode(&model, prompts, options.max_tokens).await?;
        self.check_logit_bias(&options)?;
        let seed = options.seed.unwrap_or_else(random_seed);
        let choices = prompts.iter().flat_map(|prompt| (0..options.num_choices).map(move |choice| (prompt, choice)));
        let sequences = choices
            .zip(permits)
            .map(|((prompt, choice), permit)| {
                let sampling = self.sampling(&model, prompt, &options, seed.wrapping_add_unsigned(choice as u64));
                self.submit(&model, prompt, &options, sampling, permit, accepted)
            })
            .collect::<Result<_, _>>()?;
        drop(in_flight);
        Ok(Generated { model, seed, sequences, num_choices: options.num_choices })
    }

    /// Before any prompt is encoded, so that a full server says so at once.
    fn take_permits(
        &self,
        num_prompts: usize,
        num_choices: usize,
    ) -> Result<Vec<OwnedSemaphorePermit>, GenerationError> {
        let (num_sequences, max_queued) = (num_prompts * num_choices, self.config.engine.max_queued);
        if num_sequences > max_queued {
            let message = format!(
                "{num_prompts} prompts with `n` = {num_choices} are more than the {max_queued} places in the queue: send \
                 fewer at once"
            );
            return Err(GenerationError::InvalidParameter { param: "n", message });
        }
        (0..num_sequences).map(|_| self.engine.try_permit().map_err(|_| GenerationError::Overloaded)).collect()
    }

    /// Rendering and encoding a long prompt takes milliseconds: not on a thread that serves connections.
    async fn encode(
        &self,
        model: &ResolvedModel,
        prompts: Vec<Prompt>,
        max_tokens: Option<usize>,
    ) -> Result<Vec<EncodedPrompt>, GenerationError> {
        let (base, adapter) = (self.base.clone(), model.adapter.clone());
        let (config, context_length) = (self.config.clone(), self.context_length());
        let encode = move || {
            let limits = prompt::Limits { max_tokens, context_length, config: &config.generation };
            prompts.iter().map(|prompt| prompt.encode(&base, adapter.as_deref(), &limits)).collect()
        };
        match tokio::task::spawn_blocking(encode).await {
            Ok(encoded) => encoded,
            Err(panic) => Err(GenerationError::Failed(format!("the prompt could not be encoded: {panic}"))),
        }
    }

    fn check_logit_bias(&self, options: &GenerationOptions) -> Result<(), GenerationError> {
        let vocab_size = self.base.tokenizer.vocab_size();
        match options.logit_bias.iter().find(|(id, _)| *id as usize >= vocab_size) {
            None => Ok(()),
            Some((id, _)) => Err(GenerationError::InvalidParameter {
                param: "logit_bias",
                message: format!("`logit_bias` names the token {id}, but the vocabulary has {vocab_size}"),
            }),
        }
    }

    fn sampling(
        &self,
        model: &ResolvedModel,
        prompt: &EncodedPrompt,
        options: &GenerationOptions,
        seed: i64,
    ) -> SamplingParams {
        let manifest = model.adapter.as_ref().map(|adapter| &adapter.manifest.sampling);
        let default_temperature = if prompt.is_fill_in_middle { self.config.generation.fim_temperature } else { 1.0 };
        SamplingParams {
            temperature: options
                .temperature
                .or(manifest.and_then(|sampling| sampling.temperature))
                .unwrap_or(default_temperature),
            top_k: options.top_k.unwrap_or(0),
            top_p: options.top_p.or(manifest.and_then(|sampling| sampling.top_p)).unwrap_or(1.0),
            min_p: options.min_p.unwrap_or(0.0),
            repetition_penalty: options.repetition_penalty.unwrap_or(1.0),
            presence_penalty: options.presence_penalty.unwrap_or(0.0),
            frequency_penalty: options.frequency_penalty.unwrap_or(0.0),
            logit_bias: options.logit_bias.clone(),
            seed: seed.cast_unsigned(),
        }
    }

    fn submit(
        &self,
        model: &ResolvedModel,
        prompt: &EncodedPrompt,
        options: &GenerationOptions,
        sampling: SamplingParams,
        permit: OwnedSemaphorePermit,
        accepted: Instant,
    ) -> Result<TextStream, GenerationError> {
        let mut stop = options.stop.clone();
        stop.extend(model.adapter.iter().flat_map(|adapter| adapter.manifest.stop.iter().cloned()));
        let stream_options = TextStreamOptions {
            tokenizer: self.base.tokenizer.clone(),
            num_prompt_tokens: prompt.tokens.len(),
            stop,
            logprobs: options.top_logprobs.is_some(),
            echo: options
                .echo
                .then(|| Echo { prompt_tokens: prompt.tokens.clone(), num_added_tokens: prompt.num_added_tokens }),
        };
        let (events, receiver) = mpsc::unbounded_channel();
        let request = Request {
            prompt_tokens: prompt.tokens.clone(),
            adapter: model.adapter.clone(),
            sampling,
            max_tokens: prompt.max_tokens,
            stop_tokens: if options.ignore_eos { Arc::from([]) } else { self.base.tokenizer.stop_tokens() },
            top_logprobs: options.top_logprobs,
            prompt_output: if options.echo && options.top_logprobs.is_some() {
                PromptOutput::Logprobs
            } else {
                PromptOutput::Nothing
            },
            events,
            permit,
        };
        self.engine.submit(request).map_err(|_| GenerationError::EngineStopped)?;
        let recorder = Recorder::new(self.metrics.clone(), model.metric_label(), accepted);
        Ok(TextStream::new(receiver, stream_options, recorder, self.in_flight.subscribe()))
    }

    /// Whether new requests have a chance.
    pub fn is_accepting(&self) -> bool {
        !self.shutting_down.load(Ordering::Relaxed) && self.engine.is_alive()
    }

    /// Refuses new requests from now on, and returns when those under way have ended.
    pub async fn drain(&self) {
        self.shutting_down.store(true, Ordering::Relaxed);
        self.in_flight.closed().await;
    }
}

/// Below 2^53, which every JSON client reads back exactly.
fn random_seed() -> i64 {
    (rand::random::<u64>() >> 11).cast_signed()
}
