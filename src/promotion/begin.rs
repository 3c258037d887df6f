//! Whether there is anything to promote, and anything to check it on.

use std::io::BufReader;
use std::sync::Arc;

use tokio::task::spawn_blocking;

use crate::adapter::registry::AcquireError;
use crate::experiments::{Candidate, Experiments, PromoteError, Promotion, PromotionRule, Trained, Unavailable};
use crate::feedback::{HeldOut, count_trained_on, held_out};
use crate::fine_tuning::{FineTuning, Job};
use crate::generation::{Access, Generation, GenerationError};

/// Why no promotion has begun.
#[derive(Debug, thiserror::Error)]
pub enum BeginError {
    #[error(transparent)]
    Promote(#[from] PromoteError),
    #[error(transparent)]
    Adapter(#[from] GenerationError),
    #[error(transparent)]
    NotLoaded(#[from] AcquireError),
    #[error("`adapter` must be an adapter, and {0:?} is the base")]
    Base(String),
    #[error(
        "the experiment {experiment:?} has {found} held-out pairs, and promotion.min_pairs is {min}: wait for more \
         feedback of other users, or raise promotion.test before anything is trained"
    )]
    TooFewPairs { experiment: String, found: usize, min: usize },
    #[error(
        "`adapter` {adapter} was trained on {found} of the {of} held-out pairs, which are in {file}: train on what \
         `lorry feedback export` writes, by user, with `--test` as promotion.test"
    )]
    TrainedOn { adapter: String, file: String, found: usize, of: usize },
    #[error("the held-out feedback could not be read: {0}")]
    Panicked(String),
}

impl From<Unavailable> for BeginError {
    fn from(cause: Unavailable) -> Self {
        Self::Promote(cause.into())
    }
}

/// Begins to promote `adapter` in `experiment`; without one, what the arm of the canary serves.
///
/// # Errors
/// See [`BeginError`]; nothing has begun then.
pub async fn begin(
    generation: &Generation,
    experiments: &Arc<Experiments>,
    fine_tuning: Option<Arc<FineTuning>>,
    experiment: &str,
    adapter: Option<&str>,
) -> Result<Promotion, BeginError> {
    let (rule, of_arm) = experiments.promotes(experiment)?;
    let name = adapter.unwrap_or(of_arm);
    let known = generation.find_model(name, &Access::All)?.ok_or_else(|| BeginError::Base(name.to_owned()))?;
    let adapter = known.name;
    let loaded = generation.adapters().load(&adapter).await?;
    let content = loaded.generation.ok_or_else(|| AcquireError::Unknown(adapter.clone()))?;

    let (of, rule, reader) = (experiment.to_owned(), rule.clone(), experiments.clone());
    let candidate = Candidate { adapter, generation: content, trained: None };
    let found = spawn_blocking(move || {
        let pairs = enough_pairs(&reader, &of, &rule)?;
        let trained = fine_tuning.map(|jobs| trained(&jobs, &candidate, &pairs)).transpose()?.flatten();
        Ok::<_, BeginError>(Candidate { trained, ..candidate })
    });
    let candidate = found.await.map_err(|panic| BeginError::Panicked(panic.to_string()))??;
    Ok(experiments.promote(experiment, candidate).await?)
}

fn enough_pairs(experiments: &Experiments, experiment: &str, rule: &PromotionRule) -> Result<Vec<HeldOut>, BeginError> {
    let pairs = held_out(&experiments.judged_replies(experiment)?, rule);
    if pairs.len() < rule.min_pairs {
        let (found, min) = (pairs.len(), rule.min_pairs);
        return Err(BeginError::TooFewPairs { experiment: experiment.to_owned(), found, min });
    }
    Ok(pairs)
}

/// Of the job that made what is promoted; `None` where no job did. Several that were asked for the same made it: none of them
/// may have seen what is held out.
fn trained(jobs: &FineTuning, candidate: &Candidate, pairs: &[HeldOut]) -> Result<Option<Trained>, BeginError> {
    let Candidate { adapter, generation, .. } = candidate;
    let mut made: Vec<Job> = jobs.jobs().into_iter().filter(|job| job.has_made(adapter, generation)).collect();
    // A name says something only where nobody is known by the content.
    let is_known = made.iter().any(|job| job.generation.is_some());
    made.retain(|job| job.generation.is_some() == is_known);
    made.sort_by_key(|job| job.adapter != *adapter);
    let trained: Result<Vec<_>, _> = made.into_iter().map(|job| check(jobs, job, adapter, pairs)).collect();
    Ok(trained?.into_iter().next())
}

fn check(jobs: &FineTuning, job: Job, adapter: &str, pairs: &[HeldOut]) -> Result<Trained, BeginError> {
    // By its name alone, it may have made something else.
    let mut is_verified = job.generation.is_some();
    for file in [Some(&job.training_file), job.validation_file.as_ref()].into_iter().flatten() {
        let content = jobs.files().open_content(file).ok();
        match content.and_then(|content| count_trained_on(pairs, BufReader::new(content)).ok()) {
            Some(0) => {}
            Some(found) => {
                let (adapter, file) = (adapter.to_owned(), file.clone());
                return Err(BeginError::TrainedOn { adapter, file, found, of: pairs.len() });
            }
            // It was deleted.
            None => is_verified = false,
        }
    }
    Ok(Trained {
        valid_loss: job.checkpoint.map(|checkpoint| checkpoint.valid_loss),
        job: job.id,
        training_file: job.training_file,
        validation_file: job.validation_file,
        is_verified,
    })
}
