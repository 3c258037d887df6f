//! The `lorry` command.

#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use std::error::Error;
use std::io::{self, Write, stdout};
use std::path::PathBuf;
use std::pin::pin;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use futures::stream::unfold;
use futures::{Stream, StreamExt};
use kernels::heap::give_back_large_blocks;
use lorry::adapter::check;
use lorry::adapter::import::{self, ImportError};
use lorry::app::App;
use lorry::bench::{self, BenchArgs, BenchError, Limits, Subject};
use lorry::config::{self, Config, LogFormat, Overrides};
use lorry::experiments;
use lorry::feedback::{self, ExportArgs};
use lorry::fine_tuning::launch::{self, LaunchArgs};
use lorry::http;
use lorry::loadgen::{self, LoadgenArgs};
use lorry::log;
use lorry::model::base_file::BaseFile;
use lorry::model::base_weights::GgufWeights;
use lorry::model::{listing, resident};
use lorry::service;
use lorry::terminal::TerminalError;
use lorry::terminal::chat::{self, ChatArgs};
use lorry::terminal::compare::{self, CompareArgs};
use lorry::terminal::generate::{self, GenerateArgs};
use lorry::traces;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};
use tracing::info;

/// Inference server for code generation: one quantized base, many adapters, one batch.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve the OpenAI-compatible API.
    Serve {
        /// Configuration file (TOML); every key is in config/default.toml.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        #[command(flatten)]
        overrides: Overrides,
    },
    /// Download a model into the cache folder and verify it.
    Pull {
        /// Catalogue id, hf:owner/repo/file.gguf or hf:owner/repo.
        model: String,
    },
    /// List the models known by id: what each is served with, and whether it fits into this machine's memory.
    Models {
        /// Configuration file (TOML), for the size of the KV store.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// Let a running server go on with a prompt, and print what it writes as it comes.
    Generate(GenerateArgs),
    /// Talk with a running server: each line is a message. Ctrl-C ends a reply, Ctrl-D the conversation.
    Chat(ChatArgs),
    /// Put one prompt to several arms of a running server and show the outcome as a table.
    Compare(CompareArgs),
    /// Look at adapters without serving them.
    Adapters {
        #[command(subcommand)]
        command: AdaptersCommand,
    },
    /// What users made of an experiment's replies: files to train with, or nothing left of it.
    Feedback {
        #[command(subcommand)]
        command: FeedbackCommand,
    },
    /// Measure prefill, decode and time to first token in-process; the limits of the device and one JSON line per run.
    Bench {
        /// Configuration file (TOML).
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        #[command(flatten)]
        args: Box<BenchArgs>,
    },
    /// Put load on a running server, open loop: at rates, or as a trace tells. One JSON line for each.
    Loadgen(Box<LoadgenArgs>),
    /// What a server starts as its trainer.
    #[command(hide = true)]
    Trainer(LaunchArgs),
}

#[derive(Debug, Subcommand)]
enum AdaptersCommand {
    /// Load one adapter against a base and say what it changes, or why it is refused.
    Check {
        /// Folder of the adapter, as PEFT's save_pretrained writes it.
        dir: PathBuf,
        /// Base model: catalogue id, path of a GGUF file or of a checkpoint, or a name on the hub; the configured one when absent.
        #[arg(long, value_name = "ID|PATH")]
        model: Option<String>,
    },
    /// Turn an adapter in GGUF, as llama.cpp and Ollama have it, into PEFT's form in the folder of adapters.
    Import {
        /// The adapter's file.
        file: PathBuf,
        /// What requests will name it; the file's name without its ending when absent.
        #[arg(long)]
        name: Option<String>,
        /// Folder of adapters; the configured one when absent.
        #[arg(long, value_name = "DIR")]
        adapters: Option<String>,
        /// The base that it was trained on: catalogue id, path of a GGUF file or of a checkpoint, or a name on the hub; the configured one when absent.
        #[arg(long, value_name = "ID|PATH")]
        model: Option<String>,
    },
}

#[derive(Debug, Subcommand)]
enum FeedbackCommand {
    /// Write what was accepted, or edited to, as pairs for training, split by user; says what was left out, and why.
    Export {
        /// Configuration file (TOML) of the server, for where experiments are recorded.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        #[command(flatten)]
        args: ExportArgs,
    },
    /// Delete every request, text and vote of an experiment from where they are recorded.
    Forget {
        /// Configuration file (TOML) of the server, for where experiments are recorded.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// The experiment.
        name: String,
    },
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) if is_closed_output(&*e) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("lorry: {e}");
            ExitCode::FAILURE
        }
    }
}

/// Whoever read the output has enough of it, such as `head`.
fn is_closed_output(error: &(dyn Error + 'static)) -> bool {
    let cause = match error.downcast_ref() {
        Some(TerminalError::Output(cause)) => Some(cause),
        _ => error.downcast_ref::<io::Error>(),
    };
    cause.is_some_and(|cause| cause.kind() == io::ErrorKind::BrokenPipe)
}

fn run(command: Command) -> Result<(), Box<dyn Error>> {
    let command = match command {
        Command::Serve { config, overrides } => {
            let config = Config::load(config.as_deref(), &overrides)?;
            log::start(config.log.format)?;
            return serve(config);
        }
        command => command,
    };
    log::start(LogFormat::Text)?;
    match command {
        Command::Serve { .. } => Ok(()),
        Command::Pull { model } => {
            let config = Config::load(None, &Overrides { model: Some(model), ..Overrides::default() })?;
            let BaseFile { path, .. } = BaseFile::of(&config.model, &config::lorry_home()?)?;
            writeln!(stdout(), "{}", path.display())?;
            Ok(())
        }
        Command::Models { config } => {
            let config = Config::load(config.as_deref(), &Overrides::default())?;
            write!(stdout(), "{}", listing::table(&config::lorry_home()?, &config.engine))?;
            Ok(())
        }
        Command::Generate(args) => Ok(generate::run(&args)?),
        Command::Chat(args) => Ok(chat::run(&args)?),
        Command::Compare(args) => Ok(compare::run(&args)?),
        Command::Adapters { command: AdaptersCommand::Check { dir, model } } => {
            let base = base_weights(&Config::load(None, &Overrides { model, ..Overrides::default() })?)?;
            let report = check::check(&dir, &base).map_err(|cause| format!("adapter {}: {cause}", dir.display()))?;
            writeln!(stdout(), "{report}")?;
            Ok(())
        }
        Command::Adapters { command: AdaptersCommand::Import { file, name, adapters, model } } => {
            let config = Config::load(None, &Overrides { model, adapters, ..Overrides::default() })?;
            let name = name.unwrap_or_else(|| file.file_stem().unwrap_or_default().to_string_lossy().into_owned());
            let base = base_weights(&config)?;
            let refused = |cause: ImportError| format!("{}: {cause}", file.display());
            let dir = config.adapters.dir().ok_or("there is no folder of adapters: say one with --adapters")?;
            let report = import::install(&file, &name, dir, &base).map_err(refused)?;
            writeln!(stdout(), "{name} is an adapter now\n{report}")?;
            Ok(())
        }
        Command::Feedback { command: FeedbackCommand::Export { config, args } } => {
            write!(stdout(), "{}", feedback::export(&experiments_file(config)?, &args)?)?;
            Ok(())
        }
        Command::Feedback { command: FeedbackCommand::Forget { config, name } } => {
            let num_requests = experiments::forget(&experiments_file(config)?, &name)?;
            writeln!(stdout(), "{num_requests} requests of {name} are forgotten, with their texts and votes")?;
            Ok(())
        }
        Command::Loadgen(args) => Ok(loadgen::run(&args)?),
        Command::Trainer(args) => Ok(launch::launch(&args)?),
        Command::Bench { config, args } => {
            let adapters = args.adapters.as_ref().map(|dir| dir.display().to_string());
            let (model, device) = (args.model.clone(), args.device.clone());
            let overrides = Overrides { model, adapters, device, ..Overrides::default() };
            let mut config = Config::load(config.as_deref(), &overrides)?;
            if !args.speculate {
                config.engine.max_draft_tokens = 0;
            }
            if let Some(shape) = &args.random_weights {
                let run = bench::run_random(shape, &config.engine, &args);
                return Ok(Runtime::new()?.block_on(run)?);
            }
            let mut limits = Ok(None);
            let app = App::load_with(config, |source, engine| {
                let resident = resident::load(source, engine)?;
                limits = Limits::measure(&resident);
                Ok(resident)
            })?;
            let limits = limits.map_err(BenchError::from)?;
            let adapters = app.adapters.resident();
            let (generation, vocab_size) = (&app.state.generation, app.spec.vocab_size);
            let (model_id, device) = (generation.base_id(), generation.device());
            let subject = Subject { model_id, device, vocab_size, limits };
            let run = bench::run(&app.engine, &adapters, &args, subject);
            Ok(Runtime::new()?.block_on(run)?)
        }
    }
}

/// Where a server with this configuration records its experiments.
fn experiments_file(config: Option<PathBuf>) -> Result<PathBuf, Box<dyn Error>> {
    let config = Config::load(config.as_deref(), &Overrides::default())?;
    Ok(config.experiments.path(&config::lorry_home()?))
}

/// The configured base, to look at adapters with.
fn base_weights(config: &Config) -> Result<GgufWeights, Box<dyn Error>> {
    let BaseFile { path, .. } = BaseFile::of(&config.model, &config::lorry_home()?)?;
    Ok(GgufWeights::open(&path).map_err(|e| format!("model {}: {e}", path.display()))?)
}

fn serve(config: Config) -> Result<(), Box<dyn Error>> {
    // Dropped at the end, which sends the last.
    let _traces = traces::start(&config.traces).map_err(|e| format!("traces.url {:?}: {e}", config.traces.url))?;
    // Request bodies may be large, and few are.
    give_back_large_blocks();
    // Before the model, so that a taken port is known at once.
    let address = (config.server.host.clone(), config.server.port);
    let listener = std::net::TcpListener::bind(&address)
        .map_err(|e| format!("cannot listen on {}:{} (server.host, server.port): {e}", address.0, address.1))?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    let runtime = Runtime::new()?;
    let (server, signals) = runtime.block_on(async {
        // The first process of a container gets no signal that it does not wait for.
        let signals = stop_signals()?;
        let listener = TcpListener::from_std(listener)?;
        Ok::<_, Box<dyn Error>>((http::Server::start(listener, &config.server)?, signals))
    })?;
    let mut signals = pin!(signals);
    let loading = runtime.spawn_blocking(|| App::load(config));
    let loaded = runtime.block_on(async {
        tokio::select! {
            loaded = loading => Some(loaded),
            _ = signals.next() => None,
        }
    });
    let Some(loaded) = loaded else {
        info!("told to stop before the model is loaded");
        runtime.shutdown_background();
        return Ok(());
    };
    let app = loaded??;
    runtime.block_on(async {
        let serving = format!("serving {} on {}://{address}", app.state.generation.base_id(), server.scheme);
        let service = service::run(server, app.state, app.engine, signals);
        info!("{serving}");
        Ok(service.await?)
    })
}

/// Ctrl-C and SIGTERM, each time that one comes.
///
/// # Errors
/// The system does not let them be waited for.
fn stop_signals() -> io::Result<impl Stream<Item = ()>> {
    let signals = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    Ok(unfold(signals, async |(mut interrupt, mut terminate)| {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        Some(((), (interrupt, terminate)))
    }))
}
