//! The service between HTTP and the engine: finds the model, renders and encodes the prompt, checks that it fits, takes
//! a place in the queue, and turns the engine's tokens into text.

mod beam_search;
mod beams;
mod deadline;
mod encoder;
mod error;
pub(crate) mod model_name;
mod prepare;
mod prompt;
mod recorder;
mod report;
mod resolve;
mod selection;
pub mod self_test;
mod text_stream;

use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::sync::watch;

pub use crate::prompt::fim::ContextFile;
pub use beam_search::BeamOptions;
pub use error::GenerationError;
pub use prepare::{Places, Prepared, random_seed};
pub use prompt::Prompt;
pub use recorder::{ReplyFailure, Timing};
pub use report::{RequestReport, SequenceReport};
pub use resolve::ResolvedModel;
pub use selection::{Access, AdapterEntry, AdapterField, AdapterRef, Selection};
pub use text_stream::{Completed, PredictionUsage, SequenceUsage, TextDelta, TextEvent, TextStream, TokenRecord};

use crate::adapter::registry::AdapterRegistry;
use crate::config::Config;
use crate::engine::EngineHandle;
use crate::engine::fairness::Account;
use crate::grammar::{Constraint, GrammarCompiler};
use crate::icl::{self, IclStores};
use crate::metrics::Metrics;
use crate::model::file::ModelFile;
use crate::prompt::PromptError;
use crate::prompt::chat::ChatTemplate;
use crate::prompt::fim::FillInMiddle;
use crate::prompt::formats::PromptFormats;
use crate::rate_limit::RateLimit;
use crate::tokenizer::Tokenizer;
use crate::tools::{CallFormat, CallReader, Tools};

/// The resident base, as far as prompts are concerned.
#[derive(Debug)]
pub struct Base {
    /// What it runs on, for people.
    pub device: String,
    pub file: ModelFile,
    /// What clients call it, e.g. `qwen2.5-coder:0.5b`.
    pub id: String,
    pub tokenizer: Arc<Tokenizer>,
    /// An error where the base cannot chat, which says why.
    pub chat_template: Result<ChatTemplate, PromptError>,
    /// `None` for a base without fill-in-the-middle tokens.
    pub fill_in_middle: Option<FillInMiddle>,
}

#[derive(Debug)]
pub struct Generation {
    base: Arc<Base>,
    adapters: Arc<AdapterRegistry>,
    icl: Arc<IclStores>,
    prompt_formats: PromptFormats,
    grammars: Arc<GrammarCompiler>,
    /// Names and strengths of the adapters that a request to the base gets when it says nothing of adapters.
    default_scales: RwLock<Vec<(String, f32)>>,
    engine: EngineHandle,
    metrics: Arc<Metrics>,
    config: Arc<Config>,
    shutting_down: watch::Sender<bool>,
    /// Every [`TextStream`] holds a receiver: no receiver means drained.
    in_flight: watch::Sender<()>,
}

/// A request as HTTP read it.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerationRequest {
    pub selection: Selection,
    /// Examples before the prompt, of which there is then one.
    pub icl: Option<icl::Selection>,
    /// How instruction and examples are put to the model; `None` takes what the prompt, the adapter and the base suggest.
    pub prompt_format: Option<String>,
    pub prompts: Vec<Prompt>,
    pub options: GenerationOptions,
}

impl GenerationRequest {
    /// Charges it to the key of `caller`, with the priority that it asks for.
    pub fn charge_to(&mut self, caller: &Account) {
        let Account { key, weight, .. } = caller.clone();
        let priority = self.options.account.priority;
        self.options.account = Account { key, weight, priority };
    }

    /// Places in the queue that it takes.
    pub fn num_sequences(&self) -> usize {
        let GenerationOptions { num_choices, beams, .. } = &self.options;
        self.prompts.len() * beams.map_or(*num_choices, |beams| beams.num_beams)
    }

    /// The field that asks for most of them.
    fn multiplied_by(&self) -> &'static str {
        let GenerationOptions { num_choices, beams, .. } = &self.options;
        let (of_each, field) = match beams {
            Some(beams) if beams.num_beams > *num_choices => (beams.num_beams, "best_of"),
            _ => (*num_choices, "n"),
        };
        if self.prompts.len() > of_each { "prompt" } else { field }
    }
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
    /// Beside those of the model.
    pub stop_token_ids: Vec<u32>,
    /// Go on where the model would end.
    pub ignore_eos: bool,
    /// The choices are the best of a beam search, in which nothing is drawn.
    pub beams: Option<BeamOptions>,
    /// Alternatives per token; `None` is no log-probabilities.
    pub top_logprobs: Option<usize>,
    /// With log-probabilities, the stop token that ends an output has a record too.
    pub records_stop_token: bool,
    /// What each output must be.
    pub constraint: Option<Constraint>,
    /// The request's field that asks for it, which an error about it names.
    pub constraint_param: &'static str,
    /// A text that the output is expected to have much of; it makes it faster, never another.
    pub prediction: Option<String>,
    /// Repeat the prompt before the output.
    pub echo: bool,
    /// Whose share of the machine it takes.
    pub account: Account,
    /// What a chat offers the model to call.
    pub tools: Option<Arc<Tools>>,
    /// What every output begins with; not for prompts of tokens.
    pub output_prefix: String,
    /// The client has it, and is told only what comes behind it.
    pub hides_prefix: bool,
    /// A line of the output after its first that is indented less ends it, and is cut; 0 cuts none.
    pub min_indent: usize,
    /// From the first token on: what is over ends at once, if a line has ended.
    pub time_limit: Option<Duration>,
}

/// A request under way.
#[derive(Debug)]
pub struct Generated {
    pub model: ResolvedModel,
    pub icl: Option<icl::Chosen>,
    /// The client's, else one drawn for it: sent again, it repeats the output.
    pub seed: i64,
    /// The tokens of each prompt, as the model reads them.
    pub prompts: Vec<Vec<u32>>,
    /// `num_choices` for the first prompt, then for the second, and so on.
    pub sequences: Vec<TextStream>,
    pub num_choices: usize,
}

impl Generated {
    /// Waits for the first event of any sequence, which is still to be had.
    ///
    /// # Errors
    /// It was the end of a sequence that failed.
    pub async fn begun(&mut self) -> Result<(), GenerationError> {
        let mut begun: FuturesUnordered<_> = self.sequences.iter_mut().map(TextStream::begun).collect();
        begun.next().await.unwrap_or(Ok(()))
    }

    /// Where it fails, all of `reply` does, and the other way round.
    pub fn part_of(&mut self, reply: &ReplyFailure) {
        self.sequences.iter_mut().for_each(|sequence| sequence.part_of(reply));
    }

    /// The engine has taken none of it: that is no client who has left.
    fn fail(&mut self) {
        self.sequences.iter_mut().for_each(|sequence| sequence.fail(GenerationError::EngineStopped));
    }

    /// `limit` pays for the prompts, once each, and for the outputs as they come.
    pub fn charge_to(&mut self, limit: &Arc<RateLimit>) {
        let prompts = self.sequences.iter().step_by(self.num_choices);
        limit.spend(prompts.map(|sequence| sequence.usage().num_prompt_tokens).sum(), Instant::now());
        self.sequences.iter_mut().for_each(|sequence| sequence.charge_to(limit));
    }

    /// Each sequence says in `report` what came of it.
    pub fn report_to(&mut self, report: &Arc<RequestReport>) {
        for (index, sequence) in self.sequences.iter_mut().enumerate() {
            sequence.report_to(report, index.is_multiple_of(self.num_choices));
        }
    }
}

impl Generation {
    pub fn new(
        base: Base,
        adapters: Arc<AdapterRegistry>,
        icl: Arc<IclStores>,
        prompt_formats: PromptFormats,
        engine: EngineHandle,
        metrics: Arc<Metrics>,
        config: Arc<Config>,
    ) -> Self {
        let in_flight = watch::Sender::new(());
        Self {
            grammars: Arc::new(GrammarCompiler::new(base.tokenizer.clone(), metrics.grammars_compiled_total.clone())),
            base: Arc::new(base),
            adapters,
            icl,
            prompt_formats,
            default_scales: RwLock::default(),
            engine,
            metrics,
            config,
            shutting_down: watch::Sender::new(false),
            in_flight,
        }
    }

    pub fn base_id(&self) -> &str {
        &self.base.id
    }

    /// What the base runs on, for people.
    pub fn device(&self) -> &str {
        &self.base.device
    }

    /// What of the base clients may want to know.
    pub fn base(&self) -> &Base {
        &self.base
    }

    /// Where adapters are registered, loaded and changed.
    pub fn adapters(&self) -> &Arc<AdapterRegistry> {
        &self.adapters
    }

    /// Where in-context examples are kept and changed.
    pub fn icl(&self) -> &Arc<IclStores> {
        &self.icl
    }

    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.base.tokenizer
    }

    /// How the base words calls of tools; `None` for one that was not taught to.
    pub fn call_format(&self) -> Option<CallFormat> {
        self.base.chat_template.as_ref().ok()?.call_format()
    }

    /// Reads the calls of one choice; `None` where nothing may be called.
    pub fn call_reader(&self, options: &GenerationOptions) -> Option<CallReader> {
        Some(CallReader::new(self.call_format()?, options.tools.clone()?))
    }

    /// Most tokens of a prompt and its output together.
    pub fn context_length(&self) -> usize {
        self.engine.context_length()
    }

    /// Starts every choice of every prompt; they run side by side in the engine. Dropping the result cancels them.
    ///
    /// # Errors
    /// Any but [`GenerationError::Failed`]; then nothing was started.
    pub async fn start(&self, request: GenerationRequest, access: &Access) -> Result<Generated, GenerationError> {
        let places = self.reserve(request.num_sequences(), request.multiplied_by())?;
        let prepared = self.prepare(request, access, places).await?;
        self.launch(prepared)
    }

    /// Places in the queue that nobody has.
    pub fn num_free_places(&self) -> usize {
        self.engine.num_free_places()
    }

    /// Whether at least half of the places in the queue are free.
    pub fn is_half_free(&self) -> bool {
        2 * self.engine.num_free_places() >= self.config.engine.max_queued
    }

    /// Whether new requests have a chance.
    pub fn is_accepting(&self) -> bool {
        !*self.shutting_down.borrow() && self.engine.is_alive()
    }

    /// Resolves when no new requests are taken any more.
    pub fn shutting_down(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut shutting_down = self.shutting_down.subscribe();
        // An error means that the service is gone.
        async move { drop(shutting_down.wait_for(|shutting_down| *shutting_down).await) }
    }

    /// Refuses new requests from now on, and returns when those under way have ended.
    pub async fn drain(&self) {
        self.shutting_down.send_replace(true);
        self.in_flight.closed().await;
    }
}
