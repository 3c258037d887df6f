//! Serves a trace of requests by the server's own scheduler, fairness and memory for adapters, with a cost model in the place of the
//! model and a clock that jumps: latency and fairness of any number of replicas, in seconds. See docs/simulator.md.

mod cost;
mod fleet;
mod machine;
mod replay;
mod replica;
mod report;
mod trace;

use std::fs::File;
use std::io::{BufReader, Write, stdout};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use lorry::bench;
use lorry::config::{Config, Overrides};
use lorry::engine::EngineConfig;

use cost::{Cost, TERMS};
use fleet::{Router, Run};
use replica::Hardware;
use report::Report;
use trace::{Arrival, Traffic};

/// Rows of a step where the configuration leaves them to the device, as on the CPU.
const DEFAULT_BATCH_ROWS: usize = 128;
/// `lorry bench` of qwen2.5-coder:0.5b on two cores: what docs/simulator.md rests on.
const DEFAULT_BENCH: &str = include_str!("bench.jsonl");

/// Serves a trace without a model, and says what that was like.
#[derive(Debug, Parser)]
struct Cli {
    /// Lines that `lorry bench` has printed, which the cost model is fitted to; absent, those of qwen2.5-coder:0.5b on two cores
    #[arg(long, value_name = "FILE")]
    bench: Option<PathBuf>,
    /// Configuration of the servers, of which [engine] and [adapters] count
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[arg(long, default_value_t = 1)]
    replicas: usize,
    #[arg(long, value_enum, default_value_t = Router::Hash)]
    router: Router,
    /// Tokens that the keys and values of one replica have room for
    #[arg(long, default_value_t = 65_536)]
    kv_tokens: usize,
    /// What an adapter takes in memory, in MiB
    #[arg(long, default_value_t = 16.8)]
    adapter_mib: f64,
    /// What it takes to load one, in milliseconds
    #[arg(long, default_value_t = 35.0)]
    load_ms: f64,
    /// A trace, one JSON object a line: `at` (seconds), `prompt_tokens`, `max_tokens`, and if need be `shared_tokens`, `adapter`, `key`,
    /// `weight`, `priority`. Absent, it is made up by the options below
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    #[command(flatten)]
    traffic: Traffic,
    /// Instead of simulating, send the trace to the server at this URL, whose adapters have the trace's names
    #[arg(long, value_name = "URL")]
    replay: Option<String>,
    /// Print the figures as JSON
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<(), String> {
    let arrivals = match &cli.trace {
        Some(path) => {
            trace::read(BufReader::new(open(path)?)).map_err(|error| format!("{}: {error}", path.display()))?
        }
        None => {
            cli.traffic.check()?;
            cli.traffic.arrivals()
        }
    };
    if cli.replicas == 0 || arrivals.is_empty() {
        return Err("there is nothing to simulate: --replicas and the trace must not be empty".to_owned());
    }
    let run = match &cli.replay {
        Some(url) => {
            let runtime = tokio::runtime::Runtime::new().map_err(|error| error.to_string())?;
            runtime.block_on(replay::run(&arrivals, url))?
        }
        None => simulate(cli, &arrivals)?,
    };
    let report = Report::new(&arrivals, &run);
    let text = if cli.json { serde_json::json!(report).to_string() } else { report.to_string() };
    writeln!(stdout(), "{text}").map_err(|error| error.to_string())
}

fn simulate(cli: &Cli, arrivals: &[Arrival]) -> Result<Run, String> {
    let hardware = hardware(cli)?;
    let begin = Instant::now();
    let run = fleet::run(arrivals, &hardware, cli.replicas, cli.router);
    if !run.is_clean {
        return Err(
            "the requests have ended and still hold blocks, leases or places: a mistake of the scheduler".to_owned()
        );
    }
    let totals = run.totals.unwrap_or_default();
    let planning = totals.planning.as_secs_f64() / totals.num_steps.max(1) as f64;
    eprintln!(
        "simulated in {:.1} s: {} steps, {:.1} µs each for the scheduler",
        begin.elapsed().as_secs_f64(),
        totals.num_steps,
        1e6 * planning
    );
    Ok(run)
}

fn open(path: &Path) -> Result<File, String> {
    File::open(path).map_err(|error| format!("{} cannot be read: {error}", path.display()))
}

fn hardware(cli: &Cli) -> Result<Hardware, String> {
    let config = Config::load(cli.config.as_deref(), &Overrides::default()).map_err(|error| error.to_string())?;
    let adapters = config.adapters.limits();
    let config = config.engine;
    let num_blocks = cli.kv_tokens / kernels::attention::BLOCK_SIZE;
    let context_length = if config.context_length == 0 { usize::MAX } else { config.context_length };
    let engine = EngineConfig {
        max_batch_rows: if config.max_batch_rows == 0 { DEFAULT_BATCH_ROWS } else { config.max_batch_rows },
        max_sequences: config.max_sequences,
        max_queued: config.max_queued,
        context_length: context_length.min(num_blocks * kernels::attention::BLOCK_SIZE),
        max_draft_tokens: 0,
        max_inter_token: (config.max_inter_token_ms > 0).then(|| Duration::from_millis(config.max_inter_token_ms)),
    };
    let lines = match &cli.bench {
        Some(path) => {
            std::fs::read_to_string(path).map_err(|error| format!("{} cannot be read: {error}", path.display()))?
        }
        None => DEFAULT_BENCH.to_owned(),
    };
    // What is no run is about the device.
    let reports: Vec<bench::Report> = lines.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let (cost, miss) = Cost::fit(&reports, &engine)?;
    let costs: Vec<_> = TERMS.iter().zip(cost.0).map(|(term, cost)| format!("{term} {:.4}", 1e3 * cost)).collect();
    eprintln!("ms for each: {}; {:.0} % off at most in {} runs", costs.join(", "), 100.0 * miss, reports.len());
    Ok(Hardware {
        engine,
        cost,
        num_blocks,
        adapter_bytes: (cli.adapter_mib.max(0.0) * f64::from(1 << 20)) as u64,
        adapters_budget_bytes: adapters.host_budget_bytes,
        min_residency: adapters.min_residency,
        max_wait: adapters.max_wait,
        load_seconds: cli.load_ms.max(0.0) / 1e3,
    })
}

/// The same number for the same one, and nothing to be seen of its order.
fn hash(number: u64) -> u64 {
    let mixed = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

fn hash_of(name: &str) -> usize {
    name.bytes().fold(0, |sum, byte| hash(sum ^ u64::from(byte))) as usize >> 40
}

#[cfg(test)]
mod tests;
