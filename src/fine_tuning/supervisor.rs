//! The thread that trains: it takes the jobs in the order in which they were made, one at a time.
//!
//! The status of a job changes under one lock, which is held while its record is written: what a client was told is on
//! disk.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use futures::executor::block_on;
use prometheus::IntGaugeVec;
use rustix::process::Pid;

use super::files::Files;
use super::ids::next_id;
use super::job::{Checkpoint, EndReason, Event, Job, Level, Metrics, NewJob, Progress, Status};
use super::recipe::{self, TRAINING_FILE, VALIDATION_FILE};
use super::settings::FineTuningConfig;
use super::store::{ID_PREFIX, Store};
use super::trainer::{Trainer, kill};
use super::{CancelError, CreateError};
use crate::adapter::files::AdapterFiles;
use crate::adapter::registry::{AdapterRegistry, Source};
use crate::atomic_file::write_atomically;

const NAME_PREFIX: &str = "ft-";

/// What adapters are trained for.
#[derive(Debug)]
pub struct Base {
    /// The id clients see.
    pub id: String,
    /// In GGUF.
    pub path: PathBuf,
    /// Whether the server puts the BOS token before a text.
    pub begins_with_bos: bool,
}

/// What the supervisor and whoever asks both have.
#[derive(Debug)]
pub struct Shared {
    config: FineTuningConfig,
    lorry: PathBuf,
    base: Base,
    pub store: Store,
    adapters: Arc<AdapterRegistry>,
    /// By status.
    gauge: IntGaugeVec,
    state: Mutex<State>,
    /// There is a job, or no more will be taken.
    wake: Condvar,
}

#[derive(Debug)]
pub struct State {
    /// By id, and so in the order in which they were made.
    pub jobs: BTreeMap<String, Job>,
    current: Option<Current>,
    is_stopping: bool,
}

/// The job that runs.
#[derive(Debug)]
struct Current {
    id: String,
    /// Its trainer's processes, while they may be killed.
    group: Option<Pid>,
    is_cancelled: bool,
    is_installing: bool,
    total_steps: u64,
    last_loss: Option<f64>,
}

/// How the work on a job ended.
enum Outcome {
    Succeeded,
    Failed(String),
    /// It was cancelled, or the server stops.
    Stopped,
}

impl Shared {
    pub fn new(
        config: FineTuningConfig,
        lorry: PathBuf,
        base: Base,
        store: Store,
        jobs: BTreeMap<String, Job>,
        adapters: Arc<AdapterRegistry>,
        gauge: IntGaugeVec,
    ) -> Self {
        let state = Mutex::new(State { jobs, current: None, is_stopping: false });
        let shared = Self { config, lorry, base, store, adapters, gauge, state, wake: Condvar::new() };
        shared.put_off_jobs_of_other_bases();
        shared.count(&shared.lock());
        shared
    }

    /// They wait until their base is served again.
    fn put_off_jobs_of_other_bases(&self) {
        let mut state = self.lock();
        let waiting = state.jobs.values_mut().filter(|job| !job.status.is_final() && job.model != self.base.id);
        for job in waiting {
            let message = format!("The job waits for the base {}: {} is served now", job.model, self.base.id);
            self.tell(&job.id, Level::Warn, message);
            if job.status == Status::Running {
                job.status = Status::Queued;
                // Has been logged; it waits all the same.
                let _ = self.save(job);
            }
        }
    }

    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `found` says what is in its files, of which `max_validation` examples at most are validated on.
    ///
    /// # Errors
    /// A file was deleted meanwhile, the disk is full, or no adapter could be installed: there is no job then.
    pub fn create(&self, new: NewJob, found: &str, max_validation: usize, files: &Files) -> Result<Job, CreateError> {
        // Better known now than when it is trained.
        self.adapters.check_writable()?;
        let mut state = self.lock();
        let id = next_id(ID_PREFIX, state.jobs.keys().next_back().map(String::as_str));
        let number = &id[ID_PREFIX.len()..];
        let adapter = match &new.suffix {
            Some(suffix) => format!("{NAME_PREFIX}{suffix}-{number}"),
            None => format!("{NAME_PREFIX}{number}"),
        };
        let job = Job {
            created_at: now(),
            finished_at: None,
            status: Status::Queued,
            model: self.base.id.clone(),
            adapter,
            generation: None,
            training_file: new.training_file,
            validation_file: new.validation_file,
            max_validation: Some(max_validation),
            seed: new.seed,
            method: new.method,
            hyperparameters: new.hyperparameters,
            metadata: new.metadata,
            trained_tokens: None,
            error: None,
            checkpoint: None,
            id,
        };
        let folder = self.store.folder(&job.id);
        fs::create_dir_all(&folder)?;
        let kept = || {
            let keep = |field, id: &str, name| {
                files.keep_at(id, &folder.join(name)).map_err(|source| CreateError::File { field, source })
            };
            keep("training_file", &job.training_file, TRAINING_FILE)?;
            if let Some(id) = &job.validation_file {
                keep("validation_file", id, VALIDATION_FILE)?;
            }
            // With its record it is there.
            self.store.save(&job).map_err(CreateError::from)
        };
        if let Err(error) = kept() {
            // Without a record it is no job, whatever is left of it.
            let _ = fs::remove_dir_all(&folder);
            return Err(error);
        }
        self.tell(&job.id, Level::Info, format!("The job was made, and its files are valid: {found}"));
        state.jobs.insert(job.id.clone(), job.clone());
        self.count(&state);
        self.wake.notify_one();
        Ok(job)
    }

    /// # Errors
    /// There is no such job, nothing of it to cancel, or the disk is full: the job goes on then.
    pub fn cancel(&self, id: &str) -> Result<Job, CancelError> {
        let mut state = self.lock();
        let State { jobs, current, .. } = &mut *state;
        let job = jobs.get_mut(id).ok_or_else(|| CancelError::Unknown(id.to_owned()))?;
        if job.status.is_final() {
            return Err(CancelError::Ended { id: id.to_owned(), status: job.status });
        }
        let current = current.as_mut().filter(|current| current.id == id);
        if current.as_ref().is_some_and(|current| current.is_installing) {
            return Err(CancelError::Installing(id.to_owned()));
        }
        let cancelled = ended(job, Status::Cancelled, None);
        self.save(&cancelled)?;
        *job = cancelled;
        self.tell_end(job);
        match current {
            Some(current) => {
                current.is_cancelled = true;
                current.group.into_iter().for_each(kill);
            }
            None => self.store.clear(id),
        }
        let job = job.clone();
        self.count(&state);
        Ok(job)
    }

    /// Ends the trainer and lets [`Shared::run`] return; the job that runs stays undone.
    pub fn stop(&self) {
        let mut state = self.lock();
        state.is_stopping = true;
        state.current.iter().filter_map(|current| current.group).for_each(kill);
        self.wake.notify_one();
    }

    /// Until [`Shared::stop`].
    pub fn run(&self) {
        while let Some(job) = self.next_job() {
            let outcome = self.work_on(&job);
            self.finish(&job, outcome);
        }
    }

    /// Waits for one that is to be trained; first those that were cut off.
    fn next_job(&self) -> Option<Job> {
        let mut state = self.lock();
        loop {
            if state.is_stopping {
                return None;
            }
            let is_ready = |job: &&Job, status| job.status == status && job.model == self.base.id;
            let with = |status| state.jobs.values().find(|job| is_ready(job, status)).map(|job| job.id.clone());
            if let Some(id) = with(Status::Running).or_else(|| with(Status::Queued)) {
                let job = state.jobs.get_mut(&id)?;
                if job.status == Status::Running {
                    let message = "The server was started again in mid-training: the job runs again, from its last \
                                   checkpoint or, where there is none, from the beginning";
                    self.tell(&id, Level::Warn, message.to_owned());
                }
                job.status = Status::Running;
                // Has been logged: after a restart it is queued once more, and runs.
                let _ = self.save(job);
                let job = job.clone();
                state.current = Some(Current {
                    id,
                    group: None,
                    is_cancelled: false,
                    is_installing: false,
                    total_steps: 0,
                    last_loss: None,
                });
                self.count(&state);
                return Some(job);
            }
            state = self.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn work_on(&self, job: &Job) -> Outcome {
        let trained = self.train(job);
        {
            let mut state = self.lock();
            if state.is_stopping || state.current.as_ref().is_none_or(|current| current.is_cancelled) {
                return Outcome::Stopped;
            }
            if let Err(cause) = trained {
                return Outcome::Failed(cause);
            }
            state.current.iter_mut().for_each(|current| current.is_installing = true);
        }
        let files = match AdapterFiles::read(&self.store.adapter(&job.id)) {
            Ok(files) => files,
            Err(cause) if cause.may_pass() => return Outcome::Failed(self.keep_adapter(job, &cause)),
            Err(cause) => return Outcome::Failed(format!("what the trainer left cannot be served: {cause}")),
        };
        let generation = Some(files.generation());
        if let Some(job) = self.lock().jobs.get_mut(&job.id) {
            job.generation = generation;
        }
        match block_on(self.adapters.install(&job.adapter, Source::Files(files), None)) {
            Ok(_) => Outcome::Succeeded,
            // Tried again after the next start.
            Err(_) if self.lock().is_stopping => Outcome::Stopped,
            Err(cause) => Outcome::Failed(self.keep_adapter(job, &cause)),
        }
    }

    /// Training has taken its time, and the cause may be mended. Returns what is said of it.
    fn keep_adapter(&self, job: &Job, cause: &dyn Error) -> String {
        let cause = format!("what the trainer left cannot be served: {cause}");
        match self.store.keep_adapter(&job.id) {
            Ok(kept) => format!("{cause}; it is kept in {}: install it from there, or delete it", kept.display()),
            Err(e) => format!("{cause}; nor can it be kept: {e}"),
        }
    }

    /// Returns when the trainer has ended.
    fn train(&self, job: &Job) -> Result<(), String> {
        let path = self.put_recipe(job)?;
        let trainer = Trainer::start(&self.lorry, &self.config, &path, &self.store.adapter(&job.id))
            .map_err(|e| format!("the trainer cannot be started: {e}"))?;
        {
            let mut state = self.lock();
            let is_stopping = state.is_stopping;
            if let Some(current) = &mut state.current {
                current.group = Some(trainer.group());
                if current.is_cancelled || is_stopping {
                    kill(trainer.group());
                }
            }
        }
        let ended = || self.lock().current.iter_mut().for_each(|current| current.group = None);
        trainer.wait(|progress| self.take_up(&job.id, progress), ended)
    }

    /// Returns its file. What was begun with another recipe is begun anew: no trainer goes on with it.
    fn put_recipe(&self, job: &Job) -> Result<PathBuf, String> {
        let recipe = recipe::recipe(job, &self.base).map_err(|e| format!("no recipe can be made: {e}"))?;
        let path = self.store.recipe(&job.id);
        match fs::read(&path) {
            Ok(stored) if stored == recipe.as_bytes() => return Ok(path),
            Ok(_) => match fs::remove_dir_all(self.store.adapter(&job.id)) {
                Ok(()) => {
                    let message = "The recipe is not the one that training began with, as after an update or a move of \
                                   the base's file: training begins anew";
                    self.tell(&job.id, Level::Warn, message.to_owned());
                }
                Err(e) if e.kind() == ErrorKind::NotFound => {}
                Err(e) => return Err(format!("what was trained with another recipe cannot be removed: {e}")),
            },
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => return Err(format!("the recipe cannot be read: {e}")),
        }
        write_atomically(&self.store.folder(&job.id), recipe::FILE, recipe.as_bytes())
            .map_err(|e| format!("the recipe cannot be written: {e}"))?;
        Ok(path)
    }

    fn take_up(&self, id: &str, progress: Progress) {
        let mut state = self.lock();
        let State { jobs, current: Some(current), .. } = &mut *state else { return };
        let Some(job) = jobs.get_mut(id).filter(|job| job.status == Status::Running) else { return };
        let total_steps = current.total_steps;
        let metrics = |step, train_loss, valid_loss| Some(Metrics { step, total_steps, train_loss, valid_loss });
        let (message, metrics) = match progress {
            Progress::Begin { step, steps, examples, validation_examples, left_out } => {
                current.total_steps = steps;
                if step == 0 {
                    job.checkpoint = None;
                }
                let from = if step == 0 { String::new() } else { format!(" from step {step}") };
                let long =
                    if left_out == 0 { String::new() } else { format!("; {left_out} are too long and left out") };
                let on = format!("on {examples} examples, with {validation_examples} for validation{long}");
                (format!("Training goes{from} to step {steps}, {on}"), None)
            }
            Progress::Step { step, loss, tokens } => {
                current.last_loss = Some(loss);
                job.trained_tokens = Some(tokens);
                (format!("Step {step}/{total_steps}: training loss={loss:.4}"), metrics(step, Some(loss), None))
            }
            Progress::Validation { step, loss } => {
                if step > 0 && job.checkpoint.as_ref().is_none_or(|best| loss < best.valid_loss) {
                    let train_loss = current.last_loss;
                    job.checkpoint = Some(Checkpoint { created_at: now(), step, train_loss, valid_loss: loss });
                    // Has been logged, and hinders no training.
                    let _ = self.save(job);
                }
                let of = if step == 0 { "the base" } else { "the adapter" };
                let message = format!("Step {step}/{total_steps}: validation loss={loss:.4} of {of}");
                (message, metrics(step, None, Some(loss)))
            }
            Progress::End { step, reason } => {
                let why = match reason {
                    EndReason::LastStep => "all steps are done",
                    EndReason::EarlyStopping => "the validation loss falls no more",
                };
                let message = format!("Training ended at step {step}/{total_steps}: {why}");
                tracing::info!("fine-tuning job {id}: {message}");
                (message, None)
            }
        };
        self.append(id, Event { created_at: now(), level: Level::Info, message, metrics });
    }

    fn finish(&self, job: &Job, outcome: Outcome) {
        let mut state = self.lock();
        state.current = None;
        if state.is_stopping {
            return;
        }
        if let Some(job) = state.jobs.get_mut(&job.id) {
            let over = match outcome {
                Outcome::Succeeded => {
                    let message = format!("The adapter {} is installed and served", job.adapter);
                    self.tell(&job.id, Level::Info, message);
                    Some(ended(job, Status::Succeeded, None))
                }
                Outcome::Failed(cause) => Some(ended(job, Status::Failed, Some(cause))),
                // Has been saved and told.
                Outcome::Stopped => None,
            };
            let saved = over.as_ref().map_or(Ok(()), |over| self.save(over));
            if let Some(over) = over {
                *job = over;
                self.tell_end(job);
            }
            // By its record it runs again after the next start, and then needs them.
            if saved.is_ok() {
                self.store.clear(&job.id);
            }
        }
        self.count(&state);
    }

    fn tell_end(&self, job: &Job) {
        let (level, message) = match &job.error {
            Some(cause) => (Level::Error, format!("The job has failed: {cause}")),
            None if job.status == Status::Cancelled => (Level::Info, "The job was cancelled".to_owned()),
            None => (Level::Info, "The job has succeeded".to_owned()),
        };
        match level {
            Level::Error => tracing::error!("fine-tuning job {}: {message}", job.id),
            _ => tracing::info!("fine-tuning job {}: {message}", job.id),
        }
        self.tell(&job.id, level, message);
    }

    /// An error is logged here.
    fn save(&self, job: &Job) -> io::Result<()> {
        self.store.save(job).inspect_err(|e| {
            tracing::error!("fine-tuning job {}: its record cannot be written: {e}", job.id);
        })
    }

    fn tell(&self, id: &str, level: Level, message: String) {
        self.append(id, Event { created_at: now(), level, message, metrics: None });
    }

    fn append(&self, id: &str, event: Event) {
        if let Err(e) = self.store.append(id, &event) {
            tracing::error!("fine-tuning job {id}: an event cannot be written: {e}");
        }
    }

    fn count(&self, state: &State) {
        for status in Status::ALL {
            let num_jobs = state.jobs.values().filter(|job| job.status == status).count();
            self.gauge.with_label_values(&[status.name()]).set(num_jobs as i64);
        }
    }
}

/// The job as it is when it is over.
fn ended(job: &Job, status: Status, error: Option<String>) -> Job {
    Job { status, error, finished_at: Some(now()), ..job.clone() }
}

/// Unix seconds.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
