//! The engine: one thread that owns model and scheduler. tokio talks to it only through [`EngineHandle`].

mod client;
pub mod fairness;
mod forward;
pub mod kv_blocks;
mod outbox;
mod past_replies;
pub mod prediction;
pub mod prefix_cache;
pub mod prefix_disk;
pub mod request;
pub mod sampler;
pub mod scheduler;
pub mod sequence;
pub mod speculate;
mod step;
pub mod step_cost;

use std::any::Any;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use kernels::attention::BLOCK_SIZE;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use crate::metrics::Metrics;
use crate::model::Model;
use prefix_disk::BlockFiles;
use request::{Event, Request};
use step::Engine;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineConfig {
    /// Rows of one step, prefill chunks and decode rows together.
    pub max_batch_rows: usize,
    /// Sequences running at once; no more than `max_batch_rows` take effect.
    pub max_sequences: usize,
    /// Requests accepted and not ended.
    pub max_queued: usize,
    /// Longest sequence in tokens; no more than the KV store holds takes effect.
    pub context_length: usize,
    /// Most tokens guessed ahead for one sequence in one step; 0 guesses none.
    pub max_draft_tokens: usize,
    /// The most that a stream should wait for its next token because others prefill; `None` is no limit.
    pub max_inter_token: Option<Duration>,
}

/// What the engine holds at this moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EngineState {
    pub running: usize,
    pub waiting: usize,
    /// Blocks held by sequences; those that only the prefix cache knows do not count.
    pub kv_blocks_used: usize,
}

/// As many requests as `max_queued` are already accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{max_queued} requests are already waiting or running; try again later, or raise engine.max_queued")]
pub struct Overloaded {
    pub max_queued: usize,
}

/// The engine thread has ended: it was stopped, or a step failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the engine has stopped; restart the server")]
pub struct EngineStopped;

/// The bridge to the engine thread, which ends with its last handle.
#[derive(Debug, Clone)]
pub struct EngineHandle(Arc<Shared>);

struct Shared {
    commands: mpsc::Sender<Command>,
    permits: Arc<Semaphore>,
    max_queued: usize,
    context_length: usize,
    num_kv_blocks: usize,
    metrics: Arc<Metrics>,
    /// Closed when the engine has ended or is ending.
    life: watch::Receiver<()>,
    thread: Option<JoinHandle<()>>,
}

enum Command {
    Submit(Vec<Request>, Instant),
    Stop,
}

impl EngineHandle {
    /// Starts the engine thread, which owns `model` from now on. `metrics` must belong to this engine alone.
    ///
    /// # Panics
    /// When the system cannot start a thread.
    pub fn start(model: Box<dyn Model>, config: EngineConfig, metrics: Arc<Metrics>) -> Self {
        Self::start_with_files(model, config, None, metrics)
    }

    /// As [`EngineHandle::start`], with a prefix cache that goes on in files. They are of no use where the model's KV store is not
    /// in the host's memory.
    ///
    /// # Panics
    /// When the system cannot start a thread.
    pub fn start_with_files(
        model: Box<dyn Model>,
        config: EngineConfig,
        block_files: Option<BlockFiles>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let (commands, receiver) = mpsc::channel();
        let num_kv_blocks = model.num_kv_blocks();
        let context_length = config.context_length.min(num_kv_blocks * BLOCK_SIZE);
        let (alive, life) = watch::channel(());
        let max_queued = config.max_queued;
        let engine = Engine::new(model, &config, block_files, metrics.clone());
        let thread = thread::Builder::new()
            .name("lorry-engine".to_owned())
            .spawn(move || run(engine, &receiver, alive))
            .expect("the system can start a thread");
        Self(Arc::new(Shared {
            commands,
            permits: Arc::new(Semaphore::new(max_queued)),
            max_queued,
            context_length,
            num_kv_blocks,
            metrics,
            life,
            thread: Some(thread),
        }))
    }

    /// How many requests would be accepted now.
    pub fn num_free_places(&self) -> usize {
        self.0.permits.available_permits()
    }

    /// A place among the accepted requests, without waiting for one.
    pub fn try_permit(&self) -> Result<Arc<OwnedSemaphorePermit>, Overloaded> {
        let permit = self.0.permits.clone().try_acquire_owned();
        permit.map(Arc::new).map_err(|_| Overloaded { max_queued: self.0.max_queued })
    }

    /// Hands a request to the engine. Its events end with [`Event::Finished`], [`Event::OutOfTime`], [`Event::Failed`] or
    /// [`Event::Stopped`], except that the channel closes without any of them when the engine stops at this very moment.
    pub fn submit(&self, request: Request) -> Result<(), EngineStopped> {
        self.submit_together(vec![request])
    }

    /// As [`EngineHandle::submit`], for requests that are to be in one batch: no step is made between them.
    pub fn submit_together(&self, requests: Vec<Request>) -> Result<(), EngineStopped> {
        if !self.is_alive() {
            return Err(EngineStopped);
        }
        self.0.commands.send(Command::Submit(requests, Instant::now())).map_err(|_| EngineStopped)
    }

    /// Longest sequence, prompt and output together, in tokens.
    pub fn context_length(&self) -> usize {
        self.0.context_length
    }

    /// Fails every request after the step under way and ends the engine thread.
    pub fn stop(&self) {
        // No receiver means that it has already ended.
        let _ = self.0.commands.send(Command::Stop);
    }

    /// False once the engine thread has ended or is ending.
    pub fn is_alive(&self) -> bool {
        self.0.life.has_changed().is_ok()
    }

    /// Waits until the engine thread has ended or is ending.
    pub async fn ended(&self) {
        // Nothing is ever sent but the end.
        let _ = self.0.life.clone().changed().await;
    }

    pub fn state(&self) -> EngineState {
        let count = |gauge: &prometheus::IntGauge| usize::try_from(gauge.get()).unwrap_or(0);
        let vllm = &self.0.metrics.vllm;
        EngineState {
            running: count(&vllm.num_requests_running),
            waiting: count(&vllm.num_requests_waiting),
            kv_blocks_used: (vllm.kv_cache_usage.get() * self.0.num_kv_blocks as f64).round() as usize,
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let _ = self.commands.send(Command::Stop);
        if let Some(thread) = self.thread.take() {
            // A panic on it has been reported where it happened.
            let _ = thread.join();
        }
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine")
            .field("max_queued", &self.max_queued)
            .field("context_length", &self.context_length)
            .field("is_alive", &self.life.has_changed().is_ok())
            .finish_non_exhaustive()
    }
}

/// The life of the engine thread: sleeps while there is nothing to do, steps while there is.
fn run(mut engine: Engine, commands: &mpsc::Receiver<Command>, alive: watch::Sender<()>) {
    let last = loop {
        match next_command(&engine, commands) {
            Some(Command::Submit(requests, accepted)) => {
                requests.into_iter().for_each(|request| engine.enqueue(request, accepted));
            }
            Some(Command::Stop) => break Event::Stopped,
            // A panic must not leave clients waiting for ever; the engine is not used after one.
            None => match catch_unwind(AssertUnwindSafe(|| engine.step())) {
                Ok(Ok(())) => {}
                Ok(Err(error)) => break report_failure(&error.to_string()),
                Err(panic) => break report_failure(panic_message(&*panic)),
            },
        }
    };
    drop(alive);
    engine.abort(&last);
    for command in commands.try_iter() {
        let Command::Submit(requests, _) = command else { continue };
        for request in requests {
            drop(request.permit);
            let _ = request.events.send(Event::Stopped);
        }
    }
    // Nobody waits for this any more.
    if matches!(last, Event::Stopped) {
        engine.save_all();
    }
}

/// How often an engine with nothing to compute has blocks written, so many that a new request does not notice.
const SAVE_POLL: Duration = Duration::from_millis(20);

/// The next command; `None` when there is none and a step to do.
fn next_command(engine: &Engine, commands: &mpsc::Receiver<Command>) -> Option<Command> {
    if !engine.is_idle() {
        commands.try_recv().ok()
    } else if engine.has_unsaved() {
        match commands.recv_timeout(SAVE_POLL) {
            Err(mpsc::RecvTimeoutError::Timeout) => None,
            command => Some(command.unwrap_or(Command::Stop)),
        }
    } else {
        Some(commands.recv().unwrap_or(Command::Stop))
    }
}

/// Logs why a step failed; the result says it to the clients that had a part in it.
fn report_failure(cause: &str) -> Event {
    tracing::error!(cause, "the engine stops after a failed step");
    Event::Failed(format!("the engine stopped after an internal error: {cause}"))
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

#[cfg(test)]
mod guess_tests;
