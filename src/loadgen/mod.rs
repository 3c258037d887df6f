//! `lorry loadgen`: an open-loop load generator for any server of OpenAI's streamed completions and chats.
//!
//! Requests arrive when the load says, whether or not earlier ones have been answered, and their times count from when they
//! were to arrive: a server that falls behind is not spared, and neither is its report.

mod arrivals;
mod attack;
mod client;
mod report;
mod requests;
mod workload;

use std::fs::File;
use std::io::{self, BufWriter, Write, stderr, stdout};
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgGroup, Args};
use tokio::runtime::Runtime;

use crate::terminal::ServerArgs;
use arrivals::{Spread, arrivals};
use attack::{Attack, Wave};
use client::Client;
use report::{Knee, Load, Objective, Report};
use workload::{Destination, MAX_PROMPT_TOKENS};

/// Where nothing else is said, how long requests arrive.
const DURATION: Duration = Duration::from_secs(30);
/// Far beyond what anyone waits for, and well within what clocks count.
const MAX_DURATION: Duration = Duration::from_secs(1_000_000_000);

/// Prints one JSON line for each rate or trace, the knee of several rates, and a table of all on standard error.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("load").required(true))]
pub struct LoadgenArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// Requests per second; several, with commas between them, one after the other.
    #[arg(long, group = "load", value_delimiter = ',', value_parser = positive)]
    rates: Vec<f64>,
    /// Replay the requests of a file at its times: JSON lines with `at`, or a CSV of Azure's traces.
    #[arg(long, group = "load", value_name = "FILE", conflicts_with_all = ["mix", "arrivals", "prompt_tokens", "max_tokens"])]
    trace: Option<PathBuf>,
    /// How much faster than its times a trace is replayed.
    #[arg(long, default_value_t = 1.0, value_parser = positive, conflicts_with = "rates")]
    speed: f64,
    /// How arrivals at a rate are spread.
    #[arg(long, value_enum, default_value = "poisson")]
    arrivals: Spread,
    /// In which requests arrive, at each rate, or of a trace from its start; 30 where there is no trace.
    #[arg(long, value_name = "S", value_parser = positive)]
    duration_s: Option<f64>,
    /// Requests of a file, JSON lines, sent in turn; made-up completions when absent.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prompt_tokens", "max_tokens"])]
    mix: Option<PathBuf>,
    /// Models that requests name in turn where they name none themselves, with commas between them.
    #[arg(long, value_delimiter = ',')]
    models: Vec<String>,
    /// Length of a made-up prompt, in words of about a token.
    #[arg(long, default_value_t = 128, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(..=MAX_PROMPT_TOKENS as u64))]
    prompt_tokens: usize,
    /// Length of the reply to a made-up prompt, in tokens.
    #[arg(long, default_value_t = 64)]
    max_tokens: usize,
    #[command(flatten)]
    objective: Objective,
    /// Most requests under way at once; what arrives beyond is not sent, and counted as dropped.
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    max_in_flight: u32,
    /// From the planned arrival to the end of the reply, at most.
    #[arg(long, value_name = "S", default_value_t = 300.0, value_parser = positive)]
    timeout_s: f64,
    /// Of Poisson arrivals and made-up prompts: the same seed gives the same.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Write a JSON line for each request too, as they end.
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
}

#[derive(Debug, thiserror::Error)]
pub enum LoadgenError {
    #[error("--url: {0}")]
    Url(String),
    #[error("--api-key holds what no header can")]
    Key,
    #[error("TLS cannot be set up: {0}")]
    Tls(tokio_rustls::rustls::Error),
    #[error("{file} cannot be read: {source}")]
    File { file: String, source: io::Error },
    #[error("{file}, line {number}: {cause}")]
    Line { file: String, number: usize, cause: String },
    #[error("{file} holds no request")]
    Empty { file: String },
    #[error("the file of --log cannot be written: {0}")]
    Log(io::Error),
    #[error("the report cannot be written: {0}")]
    Output(#[from] io::Error),
}

/// Asks the server and prints.
///
/// # Errors
/// A server address, a file of requests or a log that is none; nobody who reads the reports. What the server does is in the
/// reports.
pub fn run(args: &LoadgenArgs) -> Result<(), LoadgenError> {
    let reports = Runtime::new()?.block_on(measure(args, &mut stdout()))?;
    stderr().write_all(report::summary(&reports).as_bytes())?;
    Ok(())
}

/// Writes what [`run`] prints on standard output.
///
/// # Errors
/// As of [`run`].
pub async fn measure(args: &LoadgenArgs, out: &mut impl Write) -> Result<Vec<Report>, LoadgenError> {
    let destination = Destination::new(&args.server, &args.models)?;
    let (times, asks) = match (&args.trace, &args.mix) {
        (Some(trace), _) => requests::read_trace(trace, &destination)?.into_iter().unzip(),
        (None, Some(mix)) => (Vec::new(), requests::read_mix(mix, &destination)?),
        (None, None) => (Vec::new(), destination.sized(args.prompt_tokens, args.max_tokens)),
    };
    let mut log: Box<dyn Write> = match &args.log {
        Some(file) => Box::new(BufWriter::new(File::create(file).map_err(LoadgenError::Log)?)),
        None => Box::new(io::sink()),
    };
    let mut attack = Attack {
        client: Client::new(destination.headers.clone(), Duration::from_secs_f64(args.timeout_s))?,
        destination,
        asks,
        objective: args.objective,
        max_in_flight: args.max_in_flight,
        seed: args.seed,
        num_waves: 0,
        num_arrived: 0,
    };
    let mut reports = Vec::new();
    for wave in args.waves(times) {
        let report = attack.run(wave, &mut log).await.and_then(|report| log.flush().map(|()| report));
        let report = report.map_err(LoadgenError::Log)?;
        writeln!(out, "{}", serde_json::json!(report))?;
        reports.push(report);
    }
    if let Some(knee) = Knee::of(&reports) {
        writeln!(out, "{}", serde_json::json!(knee))?;
    }
    Ok(reports)
}

impl LoadgenArgs {
    /// `times` are those of the trace, in order.
    fn waves(&self, times: Vec<Duration>) -> Vec<Wave> {
        let duration = self.duration_s.map(Duration::from_secs_f64);
        if let Some(trace) = &self.trace {
            let times = times.into_iter().map(|at| at.as_secs_f64() / self.speed);
            let times: Vec<_> = times.map_while(|at| Duration::try_from_secs_f64(at).ok()).collect();
            let duration = duration.unwrap_or(MAX_DURATION).min(times.last().copied().unwrap_or_default());
            let load = Load::Trace { trace: trace.display().to_string(), speed: self.speed };
            return vec![Wave {
                load,
                duration,
                times: Box::new(times.into_iter().take_while(move |&at| at <= duration)),
            }];
        }
        let duration = duration.unwrap_or(DURATION);
        let wave = |&rate: &f64| Wave {
            load: Load::Rate { rate, arrivals: self.arrivals, seed: self.seed },
            duration,
            times: Box::new(arrivals(self.arrivals, rate, duration, self.seed)),
        };
        self.rates.iter().map(wave).collect()
    }
}

/// A number that can be a rate, and a time in seconds.
fn positive(text: &str) -> Result<f64, String> {
    let number: f64 = text.parse().map_err(|_| "must be a number")?;
    let (least, most) = (1e-6, MAX_DURATION.as_secs_f64());
    if (least..=most).contains(&number) { Ok(number) } else { Err(format!("must be from {least} to {most}")) }
}
