//! Fine-tuning: files of examples in, adapters out. A job is trained by a process of its own (`trainer`), one at a time, on
//! a thread that watches it (`supervisor`); what it leaves is checked and installed as any adapter is.
//!
//! All that is known is on disk (`files`, `store`): a job that was cut off by the end of the server runs again.

mod examples;
mod files;
mod ids;
mod job;
pub mod launch;
mod recipe;
mod settings;
mod store;
mod supervisor;
mod trainer;

use std::fs::{self, OpenOptions, TryLockError};
use std::io::{self, BufReader};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

pub use examples::{BadLine, ExampleCount, ExamplesError, check as check_examples};
pub use files::{File, Files, FilesError};
pub use job::{Checkpoint, Event, Hyperparameters, Job, Level, Method, Metrics, NewJob, Status};
pub use recipe::{DEFAULT_RANK, DEFAULT_VIRTUAL_TOKENS};
pub use settings::FineTuningConfig;
pub use supervisor::Base;

use crate::adapter::registry::{AdapterRegistry, ChangeError};
use store::Store;
use supervisor::Shared;

/// As OpenAI asks for.
const MIN_EXAMPLES: usize = 10;
/// Held for as long as a server has the folder.
const LOCK: &str = ".lock";

#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("the folder of fine-tuning {dir} cannot be used: {source}")]
    Io { dir: PathBuf, source: io::Error },
    #[error(
        "the folder of fine-tuning {0} is used by another server: give each one of its own (fine_tuning.dir), or end \
         that one first"
    )]
    Taken(PathBuf),
}

/// Why there is no job of what was asked for.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// `field` is the one that names the file.
    #[error("`{field}`: {source}")]
    File { field: &'static str, source: FilesError },
    #[error("`{field}` {file}: {source}")]
    Examples { field: &'static str, file: String, source: ExamplesError },
    #[error("the job cannot be written: {0}")]
    Disk(#[from] io::Error),
    /// What is trained could not be served.
    #[error(transparent)]
    Adapters(#[from] ChangeError),
}

#[derive(Debug, thiserror::Error)]
pub enum CancelError {
    #[error("there is no fine-tuning job {0:?}: GET /v1/fine_tuning/jobs lists them")]
    Unknown(String),
    #[error("the fine-tuning job {id} has ended already: {}", status.name())]
    Ended { id: String, status: Status },
    #[error("the fine-tuning job {0} is trained, and its adapter is being installed")]
    Installing(String),
    #[error("the job goes on, as its end cannot be written: {0}")]
    Disk(#[from] io::Error),
}

/// Dropping it ends the trainer that runs; its job runs again after the next start.
#[derive(Debug)]
pub struct FineTuning {
    files: Files,
    max_file_bytes: u64,
    shared: Arc<Shared>,
    supervisor: Option<JoinHandle<()>>,
    _lock: fs::File,
}

impl FineTuning {
    /// Opens `dir`, or makes it, and goes on with what was left undone there.
    ///
    /// # Errors
    /// The folder cannot be used, or another server has it.
    pub fn start(
        config: &FineTuningConfig,
        dir: PathBuf,
        base: Base,
        adapters: Arc<AdapterRegistry>,
        metrics: &crate::metrics::Metrics,
    ) -> Result<Self, OpenError> {
        let lock = lock(&dir)?;
        let open = |dir: &Path| {
            let files = Files::open(dir.join("files"), config.max_files_bytes())?;
            let (store, jobs) = Store::open(dir.join("jobs"))?;
            let lorry = trainer::this_program()?;
            let gauge = metrics.fine_tuning_jobs.clone();
            let shared = Arc::new(Shared::new(config.clone(), lorry, base, store, jobs, adapters, gauge));
            let supervised = shared.clone();
            let supervisor = thread::Builder::new().name("lorry-fine-tuning".to_owned());
            let supervisor = Some(supervisor.spawn(move || supervised.run())?);
            Ok(Self { files, max_file_bytes: config.max_file_bytes(), shared, supervisor, _lock: lock })
        };
        open(&dir).map_err(|source| OpenError::Io { dir, source })
    }

    pub fn files(&self) -> &Files {
        &self.files
    }

    /// Of one file.
    pub fn max_file_bytes(&self) -> u64 {
        self.max_file_bytes
    }

    /// Queues a job. Reads its files, which may take a while.
    ///
    /// # Errors
    /// A file is not there or is not what it must be, the disk is full, or no adapter can be installed.
    pub fn create(&self, new: NewJob) -> Result<Job, CreateError> {
        let training = self.check("training_file", &new.training_file, MIN_EXAMPLES)?;
        let validation = new.validation_file.as_deref().map(|file| self.check("validation_file", file, 1));
        let (found, max_validation) = match validation.transpose()? {
            Some(validation) => {
                let found = format!("{} training and {} validation examples", training.lines, validation.lines);
                (found, validation.answers)
            }
            None => {
                let found = format!("{} examples, of which every tenth is kept for validation", training.lines);
                (found, training.answers)
            }
        };
        self.shared.create(new, &found, max_validation, &self.files)
    }

    fn check(&self, field: &'static str, id: &str, min: usize) -> Result<ExampleCount, CreateError> {
        let content = self.files.open_content(id).map_err(|source| CreateError::File { field, source })?;
        examples::check(BufReader::new(content), min).map_err(|source| CreateError::Examples {
            field,
            file: id.to_owned(),
            source,
        })
    }

    /// In the order in which they were made.
    pub fn jobs(&self) -> Vec<Job> {
        self.shared.lock().jobs.values().cloned().collect()
    }

    pub fn job(&self, id: &str) -> Option<Job> {
        self.shared.lock().jobs.get(id).cloned()
    }

    /// What happened to a job, in order of time, each with its place; nothing where there is no such job.
    pub fn events(&self, id: &str) -> io::Result<Vec<(usize, Event)>> {
        // Only what is known becomes a path.
        match self.job(id) {
            Some(job) => self.shared.store.events(&job.id),
            None => Ok(Vec::new()),
        }
    }

    /// Ends a job that has not ended; its trainer, if it runs, is killed. The job is as it is right after.
    ///
    /// # Errors
    /// There is no such job, nothing of it to cancel, or the disk is full: the job goes on then.
    pub fn cancel(&self, id: &str) -> Result<Job, CancelError> {
        self.shared.cancel(id)
    }
}

/// Two servers would train one job at once, and take each other's unfinished files for leftovers.
fn lock(dir: &Path) -> Result<fs::File, OpenError> {
    let failed = |source| OpenError::Io { dir: dir.to_owned(), source };
    fs::create_dir_all(dir).map_err(failed)?;
    let file = OpenOptions::new().write(true).create(true).truncate(false).open(dir.join(LOCK)).map_err(failed)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(OpenError::Taken(dir.to_owned())),
        Err(TryLockError::Error(source)) => Err(failed(source)),
    }
}

impl Drop for FineTuning {
    fn drop(&mut self) {
        self.shared.stop();
        if self.supervisor.take().is_some_and(|supervisor| supervisor.join().is_err()) {
            tracing::error!("the thread of fine-tuning panicked");
        }
    }
}
