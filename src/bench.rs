//! `lorry bench`: the engine measured in-process, without HTTP and tokenizer.

use std::io::{self, Write, stdout};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future;
use kernels::device::{DeviceError, Peaks};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::adapter::canonical::Adapter;
use crate::config::EngineConfig;
use crate::engine::fairness::Account;
use crate::engine::request::{Event, PromptOutput, Request, SamplingParams};
use crate::engine::{EngineHandle, EngineStopped, Overloaded};
use crate::metrics::Metrics;
use crate::model::random::{self, Shape};
use crate::model::resident::{self, Resident, ResidentError, Source};

/// Prints what the device can do at most, where that can be measured, and one JSON line for each run.
#[derive(Debug, Clone, clap::Args)]
pub struct BenchArgs {
    /// Model id or path of a GGUF file; the configured model when absent.
    #[arg(long)]
    pub model: Option<String>,
    /// Instead of a model, random weights in the shape of Qwen2.5-Coder 0.5b, 7b or 32b, or of Qwen3-Coder 30b-a3b, at 4 bits, and
    /// random rank-16 adapters on every linear layer.
    #[arg(long, value_name = "SHAPE", conflicts_with_all = ["model", "adapters"])]
    pub random_weights: Option<Shape>,
    /// Folder of adapters; the configured one when absent.
    #[arg(long, value_name = "DIR")]
    pub adapters: Option<PathBuf>,
    /// Length of each prompt, in tokens.
    #[arg(long, default_value_t = 512)]
    pub prompt_tokens: usize,
    /// Tokens to generate for each prompt.
    #[arg(long, default_value_t = 64)]
    pub max_tokens: usize,
    /// Requests at once; several, with commas between them, are measured one after the other.
    #[arg(long, default_value = "1", value_delimiter = ',')]
    pub batch: Vec<usize>,
    /// Different adapters among the requests, in turn; 0 is the base alone. Several as for the batch.
    #[arg(long, default_value = "0", value_delimiter = ',')]
    pub num_adapters: Vec<usize>,
    /// Guess tokens ahead as the configuration says. Off otherwise: random prompts make for repetitive output.
    #[arg(long)]
    pub speculate: bool,
    /// Where the base runs: auto, cpu, cuda or cuda:N; the configured one when absent.
    #[arg(long)]
    pub device: Option<String>,
    /// Number of runs.
    #[arg(long, default_value_t = 3)]
    pub repeat: usize,
}

#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    #[error("--{flag} must be at least 1")]
    Zero { flag: &'static str },
    #[error("--num-adapters is {wanted}, but only {loaded} are loaded; name a folder with more in --adapters")]
    TooFewAdapters { wanted: usize, loaded: usize },
    #[error("--prompt-tokens and --max-tokens add up to {num_tokens}, the context holds {context_length}")]
    TooLong { num_tokens: usize, context_length: usize },
    #[error("--batch is too large: {0}")]
    Overloaded(#[from] Overloaded),
    #[error(transparent)]
    Resident(#[from] ResidentError),
    #[error("the device: {0}")]
    Device(#[from] DeviceError),
    #[error(transparent)]
    Stopped(#[from] EngineStopped),
    #[error("a request failed: {0}")]
    Failed(String),
    #[error("the report cannot be written: {0}")]
    Output(#[from] io::Error),
}

/// One run. Rates are in tokens per second, over all requests together.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    pub model: String,
    /// What it ran on.
    pub device: String,
    pub prompt_tokens: usize,
    pub max_tokens: usize,
    pub batch: usize,
    pub num_adapters: usize,
    /// All prompt tokens over the time to the last request's first token.
    pub prefill_tok_s: f64,
    /// Tokens that came after the last request's first token, over the time they took.
    pub decode_tok_s: f64,
    pub ttft_ms: Ttft,
    /// What decode reads of weights, over the most that the device reads. Not of experts: which they are, the rows say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth_share: Option<f64>,
    /// What prefill multiplies by weights, over the most that the device multiplies.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub int8_share: Option<f64>,
    /// What decode multiplies by weights, over the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decode_int8_share: Option<f64>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ttft {
    pub p50: f64,
    pub max: f64,
}

/// What is measured.
#[derive(Debug, Clone, Copy)]
pub struct Subject<'a> {
    pub model_id: &'a str,
    pub device: &'a str,
    /// Bounds the random token ids of the prompts.
    pub vocab_size: usize,
    pub limits: Option<Limits>,
}

/// What a step has to do, and what the device can do at most.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    peaks: Peaks,
    /// That every step reads; `None` where that depends on its rows.
    weight_bytes: Option<usize>,
    /// That a row is multiplied by.
    num_weights: usize,
}

impl Limits {
    /// Measures what the device can do at most; `None` where it has nothing to measure with.
    ///
    /// # Errors
    /// When it does not answer, or has no memory left to measure with.
    pub fn measure(resident: &Resident) -> Result<Option<Self>, DeviceError> {
        let (model, spec) = (&resident.model, resident.model.spec());
        let limits = |peaks| Self {
            peaks,
            weight_bytes: spec.features.experts.is_none().then(|| model.weight_bytes()),
            num_weights: spec.num_weights_of_row(),
        };
        Ok(model.measure_peaks()?.map(limits))
    }

    /// Over the most that the device reads, where every step reads all.
    fn bandwidth_share(&self, steps_per_second: f64) -> Option<f64> {
        Some(steps_per_second * self.weight_bytes? as f64 / self.peaks.bytes_per_second)
    }

    /// Over the most that the device multiplies.
    fn int8_share(&self, rows_per_second: f64) -> f64 {
        rows_per_second * 2.0 * self.num_weights as f64 / self.peaks.int8_operations_per_second
    }
}

/// One of the combinations that are measured.
#[derive(Debug, Clone, Copy)]
struct Case {
    batch: usize,
    num_adapters: usize,
}

/// Runs on random weights of a shape.
///
/// # Errors
/// When the device does not hold them, and as [`run`].
pub async fn run_random(shape: &Shape, config: &EngineConfig, args: &BenchArgs) -> Result<(), BenchError> {
    let resident = resident::load(Source::Random(shape), config)?;
    let spec = resident.model.spec().clone();
    let device = resident.device.clone();
    let limits = Limits::measure(&resident)?;
    let engine = resident.start(config, None, Arc::new(Metrics::new("bench")));
    let most = args.num_adapters.iter().copied().max().unwrap_or(0);
    let adapters: Vec<_> = (0..most as u64).map(|seed| random::lora(&spec, RANDOM_RANK, seed)).collect();
    let model_id = format!("random:{}", shape.name);
    let subject = Subject { model_id: &model_id, device: &device, vocab_size: spec.vocab_size, limits };
    run(&engine, &adapters, args, subject).await
}

/// Of random adapters.
const RANDOM_RANK: usize = 16;

/// Prints what the device can do at most, runs `args.repeat` times on an engine that does nothing else, and prints each
/// report. The prompts differ in every request, so that the prefix cache has nothing to give.
pub async fn run(
    handle: &EngineHandle,
    adapters: &[Arc<Adapter>],
    args: &BenchArgs,
    subject: Subject<'_>,
) -> Result<(), BenchError> {
    check(handle, adapters, args)?;
    if let Some(Limits { peaks: Peaks { bytes_per_second, int8_operations_per_second }, weight_bytes, .. }) =
        subject.limits
    {
        let peaks = serde_json::json!({"device": subject.device, "weight_bytes": weight_bytes,
            "peak_bytes_per_s": bytes_per_second, "peak_int8_operations_per_s": int8_operations_per_second});
        writeln!(stdout(), "{peaks}")?;
    }
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    for &num_adapters in &args.num_adapters {
        for &batch in &args.batch {
            let case = Case { batch, num_adapters };
            for _ in 0..args.repeat {
                let prompts: Vec<Vec<u32>> = (0..batch)
                    .map(|_| (0..args.prompt_tokens).map(|_| rng.random_range(0..subject.vocab_size as u32)).collect())
                    .collect();
                let report = run_once(handle, &adapters[..num_adapters], args, case, subject, prompts).await?;
                writeln!(stdout(), "{}", serde_json::json!(report))?;
            }
        }
    }
    Ok(())
}

fn check(handle: &EngineHandle, adapters: &[Arc<Adapter>], args: &BenchArgs) -> Result<(), BenchError> {
    let smallest = args.batch.iter().copied().min().unwrap_or(0);
    let counts = [("prompt-tokens", args.prompt_tokens), ("max-tokens", args.max_tokens), ("batch", smallest)];
    if let Some((flag, _)) = counts.into_iter().find(|(_, count)| *count == 0) {
        return Err(BenchError::Zero { flag });
    }
    let wanted = args.num_adapters.iter().copied().max().unwrap_or(0);
    if wanted > adapters.len() {
        return Err(BenchError::TooFewAdapters { wanted, loaded: adapters.len() });
    }
    let (num_tokens, context_length) = (args.prompt_tokens.saturating_add(args.max_tokens), handle.context_length());
    if num_tokens > context_length {
        return Err(BenchError::TooLong { num_tokens, context_length });
    }
    Ok(())
}

async fn run_once(
    handle: &EngineHandle,
    adapters: &[Arc<Adapter>],
    args: &BenchArgs,
    case: Case,
    subject: Subject<'_>,
    prompts: Vec<Vec<u32>>,
) -> Result<Report, BenchError> {
    let start = Instant::now();
    let mut receivers = Vec::with_capacity(prompts.len());
    for (index, prompt_tokens) in prompts.into_iter().enumerate() {
        let (events, receiver) = mpsc::unbounded_channel();
        let adapter = adapters.get(index % adapters.len().max(1)).cloned();
        let max_tokens = args.max_tokens;
        handle.submit(Request {
            prompt_tokens,
            num_pinned_tokens: 0,
            adapter,
            account: Account::default(),
            sampling: SamplingParams::GREEDY,
            max_tokens,
            stop_tokens: Arc::new([]),
            top_logprobs: None,
            grammar: None,
            prediction: None,
            prompt_output: PromptOutput::Nothing,
            deadline: None,
            events,
            permit: handle.try_permit()?,
        })?;
        receivers.push(receiver);
    }
    let arrivals = future::try_join_all(receivers.into_iter().map(|receiver| token_times(receiver, start))).await?;
    Ok(report(args, case, subject, &arrivals))
}

/// When each token of one request came, counted from `start`; at least one.
async fn token_times(mut events: mpsc::UnboundedReceiver<Event>, start: Instant) -> Result<Vec<Duration>, BenchError> {
    let mut times = Vec::new();
    while let Some(event) = events.recv().await {
        match event {
            Event::Token { .. } => times.push(start.elapsed()),
            Event::Finished(_) if !times.is_empty() => return Ok(times),
            Event::Failed(reason) => return Err(BenchError::Failed(reason)),
            Event::Stopped => return Err(EngineStopped.into()),
            Event::Started { .. }
            | Event::PromptToken(_)
            | Event::PromptLogits(_)
            | Event::StopToken { .. }
            | Event::Score(_)
            | Event::OutOfTime
            | Event::Finished(_) => {}
        }
    }
    Err(BenchError::Failed("it ended without a token".to_owned()))
}

/// `arrivals` holds each request's token times in order, none of them empty.
fn report(args: &BenchArgs, case: Case, subject: Subject<'_>, arrivals: &[Vec<Duration>]) -> Report {
    let mut first_tokens: Vec<Duration> = arrivals.iter().map(|times| times[0]).collect();
    first_tokens.sort_unstable();
    let last_first = first_tokens.last().copied().unwrap_or_default();
    let end = arrivals.iter().flatten().copied().max().unwrap_or_default();
    let num_decoded = arrivals.iter().flatten().filter(|&&time| time > last_first).count();
    let rate = |num_tokens: usize, time: Duration| {
        if time.is_zero() { 0.0 } else { num_tokens as f64 / time.as_secs_f64() }
    };
    let millis = |time: Duration| time.as_secs_f64() * 1e3;
    let prefill_tok_s = rate(args.prompt_tokens * arrivals.len(), last_first);
    let decode_tok_s = rate(num_decoded, end - last_first);
    let limits = subject.limits;
    Report {
        model: subject.model_id.to_owned(),
        device: subject.device.to_owned(),
        prompt_tokens: args.prompt_tokens,
        max_tokens: args.max_tokens,
        batch: case.batch,
        num_adapters: case.num_adapters,
        prefill_tok_s,
        decode_tok_s,
        ttft_ms: Ttft { p50: millis(first_tokens[first_tokens.len() / 2]), max: millis(last_first) },
        bandwidth_share: limits.and_then(|limits| limits.bandwidth_share(decode_tok_s / case.batch as f64)),
        int8_share: limits.map(|limits| limits.int8_share(prefill_tok_s)),
        decode_int8_share: limits.map(|limits| limits.int8_share(decode_tok_s)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_split_at_the_last_first_token() {
        let args = BenchArgs {
            model: None,
            random_weights: None,
            adapters: None,
            prompt_tokens: 100,
            max_tokens: 3,
            batch: vec![2],
            num_adapters: vec![0],
            speculate: false,
            device: None,
            repeat: 1,
        };
        let subject = Subject { model_id: "m", device: "d", vocab_size: 1, limits: None };
        let case = Case { batch: 2, num_adapters: 0 };
        let times = |millis: [u64; 3]| millis.map(Duration::from_millis).to_vec();
        let report = report(&args, case, subject, &[times([100, 200, 300]), times([200, 300, 400])]);
        assert_eq!(report.prefill_tok_s, 1000.0);
        assert_eq!(report.decode_tok_s, 15.0);
        assert_eq!(report.ttft_ms, Ttft { p50: 200.0, max: 200.0 });
    }
}
