//! From a request to sequences in the engine, in three steps that several requests can take together: places in the
//! queue for all, everything that can fail or take time, and the start of all in one batch.

use std::sync::Arc;
use std::time::Instant;

use opentelemetry::Context;
use tokio::sync::{OwnedSemaphorePermit, mpsc, watch};

use super::beam_search::{BeamOptions, BeamSearch};
use super::beams::BeamRun;
use super::deadline::Deadline;
use super::encoder::{EncodedPrompt, Encoder};
use super::recorder::{Recorder, ReplyFailure};
use super::text_stream::{Echo, TextStream, TextStreamOptions};
use super::{Access, Generated, Generation, GenerationError, GenerationOptions, GenerationRequest, ResolvedModel};
use crate::engine::prediction::Prediction;
use crate::engine::request::{Event, PromptOutput, Request, SamplingParams};
use crate::grammar::{Constraint, Matcher};
use crate::tokenizer::{Specials, Tokenizer};
use crate::tools::{CallFormat, ToolChoice};

/// Places in the queue, one a sequence or beam. Dropping gives them back.
#[derive(Debug)]
pub struct Places {
    permits: Vec<Arc<OwnedSemaphorePermit>>,
    accepted: Instant,
    /// A request that waits for its adapter is under way.
    in_flight: watch::Receiver<()>,
}

impl Places {
    /// Takes up to `num_places` of them out, for one of several requests.
    #[must_use]
    pub fn take(&mut self, num_places: usize) -> Self {
        let rest = self.permits.len().saturating_sub(num_places);
        Self { permits: self.permits.split_off(rest), accepted: self.accepted, in_flight: self.in_flight.clone() }
    }
}

/// A request that can start at once: its weights are in memory, its prompts encoded and checked, its grammar compiled.
#[derive(Debug)]
pub struct Prepared {
    model: ResolvedModel,
    prompts: Vec<EncodedPrompt>,
    /// At the beginning of every output.
    grammar: Option<Matcher>,
    prediction: Option<Prediction>,
    options: GenerationOptions,
    seed: i64,
    places: Places,
    deadline: Option<Deadline>,
}

impl Generation {
    /// Places for `num_sequences`, all or none, and before anything expensive, so that a full server says so at once.
    /// `param` is the field of the request that asks for so many.
    ///
    /// # Errors
    /// The server is full or stopping, or never has so many places.
    pub fn reserve(&self, num_sequences: usize, param: &'static str) -> Result<Places, GenerationError> {
        let (accepted, in_flight) = (Instant::now(), self.in_flight.subscribe());
        if *self.shutting_down.borrow() {
            return Err(GenerationError::ShuttingDown);
        }
        let max_queued = self.config.engine.max_queued;
        if num_sequences > max_queued {
            let message = format!(
                "`{param}` asks for {num_sequences} sequences at once, more than the {max_queued} places in the queue: \
                 send fewer"
            );
            return Err(GenerationError::InvalidParameter { param, message });
        }
        let permits = (0..num_sequences).map(|_| self.engine.try_permit().map_err(|_| GenerationError::Overloaded));
        Ok(Places { permits: permits.collect::<Result<_, _>>()?, accepted, in_flight })
    }

    /// Finds and loads the weights, encodes the prompts and checks that they fit. `places` has one for each choice of
    /// each prompt.
    ///
    /// # Errors
    /// What is wrong with the request, or that it took too long; its places are given back.
    pub async fn prepare(
        &self,
        request: GenerationRequest,
        access: &Access,
        places: Places,
    ) -> Result<Prepared, GenerationError> {
        let deadline = Deadline::new(places.accepted, self.config.server.max_request_seconds);
        let of_deadline = deadline.clone();
        let prepared = async {
            let model = self.resolve(&request.selection, access).await?;
            let options = request.options.clone();
            self.check_token_ids(&options)?;
            let (prompts, grammar, prediction) = self.encode(&model, request).await?;
            let seed = options.seed.unwrap_or_else(random_seed);
            Ok(Prepared { model, prompts, grammar, prediction, options, seed, places, deadline })
        };
        match of_deadline {
            Some(deadline) => deadline.limit(prepared).await,
            None => prepared.await,
        }
    }

    /// The tokens of the first prompt, as the model reads them.
    ///
    /// # Errors
    /// What is wrong with the request, such as a prompt that is too long.
    pub async fn prompt_tokens(
        &self,
        mut request: GenerationRequest,
        access: &Access,
    ) -> Result<Vec<u32>, GenerationError> {
        let model = self.resolve(&request.selection, access).await?;
        request.options.max_tokens = Some(0);
        let (prompts, ..) = self.encode(&model, request).await?;
        Ok(prompts.into_iter().next().map_or_else(Vec::new, |prompt| prompt.tokens))
    }

    /// How many tokens the first prompt has, be it too long or not.
    ///
    /// # Errors
    /// What is wrong with the request.
    pub async fn count_prompt_tokens(
        &self,
        request: GenerationRequest,
        access: &Access,
    ) -> Result<usize, GenerationError> {
        match self.prompt_tokens(request, access).await {
            Ok(tokens) => Ok(tokens.len()),
            Err(GenerationError::ContextLengthExceeded { num_prompt_tokens, .. }) => Ok(num_prompt_tokens),
            Err(error) => Err(error),
        }
    }

    /// Starts every sequence. Dropping the result cancels them.
    ///
    /// # Errors
    /// The engine has stopped.
    pub fn launch(&self, prepared: Prepared) -> Result<Generated, GenerationError> {
        let (mut generated, requests) = self.sequences(prepared);
        self.submit(requests).inspect_err(|_| generated.fail())?;
        Ok(generated)
    }

    /// As [`Generation::launch`] of each, in one batch as far as there is room.
    ///
    /// # Errors
    /// The engine has stopped.
    pub fn launch_together(&self, prepared: Vec<Prepared>) -> Result<Vec<Generated>, GenerationError> {
        let (mut generated, requests): (Vec<Generated>, Vec<_>) =
            prepared.into_iter().map(|one| self.sequences(one)).unzip();
        let submitted = self.submit(requests.into_iter().flatten().collect());
        submitted.inspect_err(|_| generated.iter_mut().for_each(Generated::fail))?;
        Ok(generated)
    }

    fn submit(&self, requests: Vec<Request>) -> Result<(), GenerationError> {
        self.engine.submit_together(requests).map_err(|_| GenerationError::EngineStopped)
    }

    /// Choosing examples, rendering and encoding a long prompt takes milliseconds, and so does compiling a grammar: not on
    /// a thread that serves connections.
    async fn encode(
        &self,
        model: &ResolvedModel,
        request: GenerationRequest,
    ) -> Result<(Vec<EncodedPrompt>, Option<Matcher>, Option<Prediction>), GenerationError> {
        let GenerationRequest { icl, prompt_format, prompts, options, .. } = request;
        if icl.is_some() && prompts.len() != 1 {
            let message = format!("`icl` takes one prompt at a time, not {}", prompts.len());
            return Err(GenerationError::InvalidParameter { param: "icl", message });
        }
        let format = prompt_format.map(|name| self.prompt_formats.get(&name)).transpose().map_err(|error| {
            GenerationError::InvalidParameter { param: "prompt_format", message: error.to_string() }
        })?;
        let (base, adapter, stores) = (self.base.clone(), model.adapter.clone(), self.icl.clone());
        let (config, context_length) = (self.config.clone(), self.context_length());
        let (grammars, constraint) = (self.grammars.clone(), self.constraint(&options)?);
        let trace = Context::current();
        let encode = move || {
            let _trace = trace.attach();
            let encoder = Encoder {
                base: &base,
                adapter: adapter.as_deref(),
                stores: &stores,
                icl: icl.as_ref(),
                format: format.as_ref(),
                tools: options.tools.as_deref(),
                max_tokens: options.max_tokens,
                context_length,
                is_echoed: options.echo,
                output_prefix: &options.output_prefix,
                config: &config.generation,
            };
            let encoded = prompts.iter().map(|prompt| encoder.encode(prompt)).collect::<Result<_, _>>()?;
            // Whoever leaves now gives its adapter back at once, however long the grammar takes.
            drop(adapter);
            let compile = |(constraint, param)| {
                grammars.compile(&constraint).map_err(|error| GenerationError::InvalidParameter {
                    param,
                    message: format!("the output cannot be constrained as `{param}` asks: {error}"),
                })
            };
            let prediction = options.prediction.as_deref().map(|text| predict(&base.tokenizer, text, context_length));
            Ok((encoded, constraint.map(compile).transpose()?, prediction.transpose()?))
        };
        match tokio::task::spawn_blocking(encode).await {
            Ok(encoded) => encoded,
            Err(panic) => Err(GenerationError::Failed(format!("the prompt could not be encoded: {panic}"))),
        }
    }

    /// What the output must be, as the request says or as its tools do, and which field asks for it.
    fn constraint(&self, options: &GenerationOptions) -> Result<Option<(Constraint, &'static str)>, GenerationError> {
        let (Some(tools), Some(format)) = (&options.tools, self.call_format()) else {
            return Ok(options.constraint.clone().map(|asked| (asked, options.constraint_param)));
        };
        let (param, effect) = match tools.choice {
            ToolChoice::Auto => ("tools", "has a tool that is `strict`"),
            _ => ("tool_choice", "forces a call"),
        };
        let invalid = |message: String| GenerationError::InvalidParameter { param, message };
        let of_tools = tools.constraint(format, |text| self.base.tokenizer.special_id(text));
        let of_tools = of_tools.map_err(|cause| invalid(format!("`{param}` is not served: {cause}")))?;
        match (of_tools, &options.constraint) {
            (Some(_), Some(_)) => {
                let other = options.constraint_param;
                Err(invalid(format!("`{param}` {effect}, which does not go with `{other}`: leave one out")))
            }
            (Some(of_tools), None) => Ok(Some((of_tools, param))),
            (None, asked) => Ok(asked.clone().map(|asked| (asked, options.constraint_param))),
        }
    }

    fn check_token_ids(&self, options: &GenerationOptions) -> Result<(), GenerationError> {
        let vocab_size = self.base.tokenizer.vocab_size();
        let biased = options.logit_bias.iter().map(|(id, _)| ("logit_bias", id));
        let mut named = biased.chain(options.stop_token_ids.iter().map(|id| ("stop_token_ids", id)));
        match named.find(|(_, id)| **id as usize >= vocab_size) {
            None => Ok(()),
            Some((param, id)) => Err(GenerationError::InvalidParameter {
                param,
                message: format!("`{param}` names the token {id}, but the vocabulary has {vocab_size}"),
            }),
        }
    }

    /// What is sent to the engine, and what comes back from it.
    fn sequences(&self, prepared: Prepared) -> (Generated, Vec<Request>) {
        let Prepared { model, prompts, grammar, prediction, options, seed, places, deadline } = prepared;
        let Places { permits, accepted, in_flight: _in_flight } = places;
        let ends_at = deadline.as_ref().map(Deadline::at);
        let (sequences, requests): (Vec<TextStream>, _) = match options.beams {
            Some(beams) => {
                let mut choices = Vec::new();
                for (prompt, permits) in prompts.iter().zip(permits.chunks(beams.num_beams)) {
                    let (found, search) = self.beam_search(&model, prompt, &options, beams, permits, accepted);
                    // Of its own accord: dropping all of its choices ends it.
                    tokio::spawn(BeamRun { deadline: ends_at, ..search }.run());
                    choices.extend(found);
                }
                (choices, Vec::new())
            }
            None => {
                let choices =
                    prompts.iter().flat_map(|prompt| (0..options.num_choices).map(move |choice| (prompt, choice)));
                let sequence = |((prompt, choice), permit)| {
                    let sampling = self.sampling(&model, prompt, &options, seed.wrapping_add_unsigned(choice as u64));
                    let (stream, request) = self.sequence(&model, prompt, &options, sampling, permit, accepted);
                    let stream = stream.with_prediction(prediction.clone());
                    let (grammar, prediction) = (grammar.clone(), prediction.clone());
                    (stream, Request { grammar, prediction, deadline: ends_at, ..request })
                };
                choices.zip(permits).map(sequence).unzip()
            }
        };
        let sequences = sequences.into_iter().map(|sequence| sequence.with_deadline(deadline.clone())).collect();
        let num_choices = options.num_choices;
        let (prompts, mut icl): (_, Vec<_>) = prompts.into_iter().map(|prompt| (prompt.tokens, prompt.icl)).unzip();
        let icl = icl.iter_mut().find_map(Option::take);
        let mut generated = Generated { model, icl, seed, prompts, sequences, num_choices };
        generated.part_of(&ReplyFailure::default());
        (generated, requests)
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

    fn sequence(
        &self,
        model: &ResolvedModel,
        prompt: &EncodedPrompt,
        options: &GenerationOptions,
        sampling: SamplingParams,
        permit: Arc<OwnedSemaphorePermit>,
        accepted: Instant,
    ) -> (TextStream, Request) {
        let (stream, events) = self.stream(model, prompt, options, accepted);
        let request = Request {
            prompt_tokens: prompt.tokens.clone(),
            num_pinned_tokens: prompt.num_pinned_tokens,
            adapter: model.adapter.clone(),
            account: options.account.clone(),
            sampling,
            max_tokens: prompt.max_tokens,
            stop_tokens: self.stop_tokens(options),
            top_logprobs: options.top_logprobs,
            grammar: None,
            prediction: None,
            prompt_output: if options.echo && options.top_logprobs.is_some() {
                PromptOutput::Logprobs
            } else {
                PromptOutput::Nothing
            },
            deadline: None,
            events,
            permit,
        };
        (stream, request)
    }

    /// The choices of a search, and the search itself.
    fn beam_search(
        &self,
        model: &ResolvedModel,
        prompt: &EncodedPrompt,
        options: &GenerationOptions,
        beams: BeamOptions,
        permits: &[Arc<OwnedSemaphorePermit>],
        accepted: Instant,
    ) -> (Vec<TextStream>, BeamRun) {
        let streams = (0..options.num_choices).map(|_| self.stream(model, prompt, options, accepted));
        let (streams, choices): (Vec<TextStream>, _) = streams.unzip();
        let stop_tokens = self.stop_tokens(options);
        let run = BeamRun {
            engine: self.engine.clone(),
            prompt_tokens: prompt.tokens.clone(),
            num_pinned_tokens: prompt.num_pinned_tokens,
            adapter: model.adapter.clone(),
            account: options.account.clone(),
            tokenizer: self.base.tokenizer.clone(),
            stop: stop_strings(model, options),
            search: (prompt.max_tokens > 0).then(|| BeamSearch::new(beams, prompt.max_tokens, stop_tokens)),
            deadline: None,
            permits: permits.to_vec(),
            choices,
        };
        (streams, run)
    }

    /// Control tokens that open or close a call of a tool.
    fn call_markers(&self) -> Vec<u32> {
        let markers = self.call_format().map(CallFormat::markers).into_iter().flatten();
        markers.filter_map(|marker| self.base.tokenizer.special_id(marker)).collect()
    }

    fn stop_tokens(&self, options: &GenerationOptions) -> Arc<[u32]> {
        match (options.ignore_eos, options.stop_token_ids.as_slice()) {
            (true, ids) => Arc::from(ids),
            (false, []) => self.base.tokenizer.stop_tokens(),
            (false, ids) => self.base.tokenizer.stop_tokens().iter().chain(ids).copied().collect(),
        }
    }

    /// The text of one choice, and where its events go.
    fn stream(
        &self,
        model: &ResolvedModel,
        prompt: &EncodedPrompt,
        options: &GenerationOptions,
        accepted: Instant,
    ) -> (TextStream, mpsc::UnboundedSender<Event>) {
        let stream_options = TextStreamOptions {
            tokenizer: self.base.tokenizer.clone(),
            num_prompt_tokens: prompt.tokens.len(),
            stop: stop_strings(model, options),
            logprobs: options.top_logprobs.is_some(),
            records_stop_token: options.records_stop_token,
            shown_tokens: options.tools.as_ref().map_or_else(Vec::new, |_| self.call_markers()),
            min_indent: options.min_indent,
            time_limit: options.time_limit,
            // An echoed prompt ends in it.
            output_prefix: match options.echo || options.hides_prefix {
                true => String::new(),
                false => options.output_prefix.clone(),
            },
            echo: options
                .echo
                .then(|| Echo { prompt_tokens: prompt.tokens.clone(), num_added_tokens: prompt.num_added_tokens }),
        };
        let (events, receiver) = mpsc::unbounded_channel();
        let recorder = Recorder::new(self.metrics.clone(), model.metric_label(), accepted);
        (TextStream::new(receiver, stream_options, recorder, self.in_flight.subscribe()), events)
    }
}

/// Those of the request and those of its adapter.
fn stop_strings(model: &ResolvedModel, options: &GenerationOptions) -> Vec<String> {
    let of_adapter = model.adapter.iter().flat_map(|adapter| &adapter.manifest.stop);
    options.stop.iter().chain(of_adapter).cloned().collect()
}

/// Below 2^53, which every JSON client reads back exactly.
pub fn random_seed() -> i64 {
    (rand::random::<u64>() >> 11).cast_signed()
}

/// The tokens that a client expects. An output cannot be longer than the context, so that a longer prediction is a mistake, and
/// one that cannot fit is refused before it is tokenized.
fn predict(tokenizer: &Tokenizer, text: &str, context_length: usize) -> Result<Prediction, GenerationError> {
    let invalid = |message| GenerationError::InvalidParameter { param: "prediction", message };
    let too_long =
        || invalid(format!("`prediction` is longer than the {context_length} tokens of the context: shorten it"));
    if text.len() > context_length.saturating_mul(tokenizer.max_token_bytes()) {
        return Err(too_long());
    }
    let tokens = tokenizer.encode(text, Specials::AsText);
    let tokens = tokens.map_err(|error| invalid(format!("`prediction` could not be encoded: {error}")))?;
    if tokens.len() > context_length { Err(too_long()) } else { Ok(Prediction::new(tokens)) }
}
