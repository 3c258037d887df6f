//! Experiments: a model alias whose traffic is split over arms, what users thought of the results, and a canary that is
//! taken out of traffic when it breaks its bounds.
//!
//! Nothing here makes a request wait: an arm is chosen by hashing, and what is recorded goes through a bounded channel to
//! the one thread that writes. Only a vote waits, for its own commit.

mod assignment;
mod canary;
mod model;
mod outcomes;
mod promoting;
mod promotion;
mod report;
mod settings;
mod statistics;
mod store;
mod under_way;
mod vote;
mod writer;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;

use tokio::sync::{Notify, oneshot, watch};

pub use model::ModelNames;
pub use outcomes::{FileError, JudgedReply, forget, judged_replies};
pub use promoting::{Candidate, PromoteError};
pub use promotion::{Check, Checked, MOST_PAIRS, Promotion, PromotionRule, SPARE_PLACES, Stage, Trained};
pub use report::{ArmReport, CanaryReport, CanaryState, PairReport, Percentiles, Report};
pub use settings::{ArmConfig, Bounds, ExperimentConfig, ExperimentsConfig};
pub use statistics::Rate;
pub use store::{StoreError, Unavailable};
pub use under_way::ArmUnderWay;
pub use vote::{Asked, Outcome, Record, StoredVote, Vote, VoteError, VoteKind, prompt_hash, user_hash};

use crate::metrics::{ArmSeries, Metrics};
use canary::CanaryStatus;
use store::Store;
use under_way::UnderWay;
use writer::{Command, Writer};

/// Called on the writer's thread with the name of an adapter whose canary has broken a bound, and the generation that did,
/// unless none came to be served; must not block.
pub type OnRollBack = Box<dyn Fn(&str, Option<&str>) + Send>;

/// The arm that a request to an alias gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assignment {
    pub experiment: String,
    pub arm: String,
    pub model: String,
    /// To be run beside it, recorded, and not returned.
    pub shadows: Vec<Shadow>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shadow {
    pub arm: String,
    pub model: String,
}

/// Why a canary was not reset.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ResetError {
    #[error("there is no experiment {0:?}: GET /v1/experiments lists them")]
    UnknownExperiment(String),
    #[error("the experiment {0:?} has no canary")]
    NoCanary(String),
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
}

pub struct Experiments {
    experiments: Arc<[Experiment]>,
    names: ModelNames,
    path: PathBuf,
    keep_text: bool,
    metrics: Arc<Metrics>,
    /// A candidate is to be checked.
    unchecked: Arc<Notify>,
    under_way: Arc<UnderWay>,
    // Dropped in this order: without a sender the thread writes what is left and ends.
    commands: SyncSender<Command>,
    _writer: WriterThread,
}

#[derive(Debug)]
struct Experiment {
    config: ExperimentConfig,
    /// Of each arm, in full.
    models: Vec<String>,
    /// Of each arm.
    series: Vec<Arc<ArmSeries>>,
    /// What the canary's status holds for, as one string.
    definition: String,
    /// Changed by the writer only.
    canary: Option<watch::Sender<CanaryStatus>>,
    /// The latest under this definition; changed by the writer only. `None` where candidates are not promoted.
    promotion: Option<watch::Sender<Option<Promotion>>>,
    unchecked: Arc<Notify>,
}

impl Experiments {
    /// Starts the writer. A database that cannot be opened is logged and stops nothing: it is tried again at each write.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn start(
        config: &ExperimentsConfig,
        path: PathBuf,
        names: ModelNames,
        metrics: Arc<Metrics>,
        on_roll_back: OnRollBack,
    ) -> std::io::Result<Self> {
        let unchecked = Arc::new(Notify::new());
        let experiment = |config| Experiment::new(config, &names, &metrics, &unchecked);
        let experiments: Arc<[_]> = config.run.iter().map(experiment).collect();
        let (commands, receiver) = sync_channel(config.max_queued);
        let writer = Writer::new(
            path.clone(),
            config.max_mib,
            names.clone(),
            experiments.clone(),
            on_roll_back,
            metrics.clone(),
        );
        let thread =
            std::thread::Builder::new().name("lorry-experiments".to_owned()).spawn(move || writer.run(&receiver))?;
        let (keep_text, _writer) = (config.keep_text, WriterThread(Some(thread)));
        let under_way = Arc::default();
        Ok(Self { experiments, names, path, keep_text, metrics, unchecked, under_way, commands, _writer })
    }

    /// What clients may send as `model`, beside names of models.
    pub fn aliases(&self) -> impl Iterator<Item = &str> {
        self.experiments.iter().map(|experiment| experiment.config.alias.as_str())
    }

    pub fn is_alias(&self, model: &str) -> bool {
        self.aliases().any(|alias| alias == model)
    }

    /// The arm of the experiment on `alias`, among those whose adapter `may_use` allows; `None` if there is no such alias
    /// or arm. The same `sticky_key` gets the same arm for as long as the weights stay: the user where clients name one,
    /// else the key they authenticate with, else something of the request's own.
    pub fn assign(&self, alias: &str, sticky_key: &str, may_use: impl Fn(&str) -> bool) -> Option<Assignment> {
        let experiment = self.experiments.iter().find(|experiment| experiment.config.alias == alias)?;
        let config = &experiment.config;
        let is_hidden = |arm: &ArmConfig| self.names.adapter(&arm.model).is_some_and(|adapter| !may_use(adapter));
        let has_whole = experiment.has_whole() && experiment.canary_arm().is_some_and(|arm| !is_hidden(arm));
        let is_out =
            |arm: &ArmConfig| is_hidden(arm) || if arm.canary { experiment.is_canary_out() } else { has_whole };
        let arm = assignment::choose(&config.name, &config.arms, sticky_key, is_out)?;
        let shadows = config.arms.iter().filter(|arm| arm.shadow);
        Some(Assignment {
            experiment: config.name.clone(),
            arm: arm.name.clone(),
            model: arm.model.clone(),
            shadows: shadows.map(|arm| Shadow { arm: arm.name.clone(), model: arm.model.clone() }).collect(),
        })
    }

    /// Whether an arm is a canary that broke a bound and gets no traffic.
    pub fn is_rolled_back(&self, experiment: &str, arm: &str) -> bool {
        self.find(experiment).is_some_and(|(_, experiment)| {
            experiment.config.arms.iter().any(|known| known.canary && known.name == arm) && experiment.is_rolled_back()
        })
    }

    /// Whether the prompts of an experiment's requests are to be kept.
    pub fn keeps_prompts(&self, experiment: &str) -> bool {
        self.find(experiment).is_some_and(|(_, experiment)| experiment.config.keep_prompts_mib > 0)
    }

    /// An arm of the comparison `id` has begun. It is to be recorded before what this gives is dropped.
    pub fn begin_compared(&self, id: &str, arm: &str) -> ArmUnderWay {
        self.under_way.begin(id, arm)
    }

    /// Queues a finished run for writing. Never waits: when the queue is full the record is dropped and counted.
    pub fn record(&self, mut record: Record) {
        self.count(&record);
        record.model = self.names.full_name(&record.model);
        record.text = record.text.filter(|_| self.keep_text);
        if self.commands.try_send(Command::Record(Box::new(record))).is_err() {
            self.metrics.experiment_writes_total.with_label_values(&["dropped"]).inc();
        }
    }

    fn count(&self, record: &Record) {
        let experiment = record.experiment.as_ref().and_then(|name| self.find(name));
        let Some(series) = experiment.and_then(|(_, experiment)| experiment.series_of(&record.arm)) else { return };
        series.requests_total.with_label_values(&[record.outcome.name()]).inc();
        series.prompt_tokens_total.inc_by(record.prompt_tokens.into());
        series.output_tokens_total.inc_by(record.completion_tokens.into());
        for (histogram, milliseconds) in
            [(&series.time_to_first_token, record.ttft_ms), (&series.time_per_output_token, record.tpot_ms)]
        {
            milliseconds.into_iter().for_each(|milliseconds| histogram.observe(milliseconds / 1e3));
        }
    }

    /// Returns when the vote is on disk. The winner may still be writing.
    ///
    /// # Errors
    /// The database cannot be written, or the winner is no arm of the comparison. Nothing is recorded then.
    pub async fn vote(&self, vote: Vote) -> Result<(), VoteError> {
        // One that ends after this is recorded, and so known, before or behind the vote.
        let under_way = self.under_way.arms_of(&vote.id);
        self.answered(|reply| Command::Vote(vote, under_way, reply)).await
    }

    /// Lets a canary serve again, judged by what happens from now on.
    ///
    /// # Errors
    /// See [`ResetError`]; nothing has changed then.
    pub async fn reset(&self, experiment: &str) -> Result<(), ResetError> {
        let (index, found) =
            self.find(experiment).ok_or_else(|| ResetError::UnknownExperiment(experiment.to_owned()))?;
        if found.canary.is_none() {
            return Err(ResetError::NoCanary(experiment.to_owned()));
        }
        match self.answered(|reply| Command::Reset(index, reply)).await {
            Ok(()) => Ok(()),
            Err(VoteError::Unavailable(cause)) => Err(cause.into()),
            Err(VoteError::UnknownArm { .. }) => Err(Unavailable::Failed.into()),
        }
    }

    async fn answered(
        &self,
        command: impl FnOnce(oneshot::Sender<Result<(), VoteError>>) -> Command,
    ) -> Result<(), VoteError> {
        let (reply, answer) = oneshot::channel();
        self.commands.try_send(command(reply)).map_err(|error| match error {
            TrySendError::Full(_) => Unavailable::Busy,
            TrySendError::Disconnected(_) => Unavailable::Failed,
        })?;
        answer.await.unwrap_or(Err(Unavailable::Failed.into()))
    }

    /// The votes on an id, in order of time; none if it is unknown.
    ///
    /// # Errors
    /// The database cannot be read.
    pub async fn votes(&self, id: &str) -> Result<Vec<StoredVote>, Unavailable> {
        let id = id.to_owned();
        self.read(move |store| store.map_or(Ok(Vec::new()), |store| store.votes(&id))).await
    }

    /// Of one experiment; `None` if there is none of this name.
    ///
    /// # Errors
    /// The database cannot be read.
    pub async fn report(&self, experiment: &str) -> Result<Option<Report>, Unavailable> {
        let Some((index, _)) = self.find(experiment) else { return Ok(None) };
        let experiments = self.experiments.clone();
        self.read(move |store| experiments[index].report(store)).await.map(Some)
    }

    /// Of every experiment, in the order of the configuration.
    ///
    /// # Errors
    /// The database cannot be read.
    pub async fn reports(&self) -> Result<Vec<Report>, Unavailable> {
        let experiments = self.experiments.clone();
        self.read(move |store| experiments.iter().map(|experiment| experiment.report(store)).collect()).await
    }

    /// A report without the arms that stand on an adapter that `may_see` does not allow, and what is said of those.
    #[must_use]
    pub fn visible(&self, mut report: Report, may_see: impl Fn(&str) -> bool) -> Report {
        report.arms.retain(|arm| self.names.adapter(&arm.model).is_none_or(&may_see));
        let is_seen = |name: &str| report.arms.iter().any(|arm| arm.name == name);
        report.pairs.retain(|pair| is_seen(&pair.a) && is_seen(&pair.b));
        report.canary = report.canary.filter(|canary| is_seen(&canary.arm));
        report.promotion =
            report.promotion.filter(|promotion| is_seen(&promotion.arm) && self.shows(promotion, &may_see));
        report
    }

    async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(Option<&Store>) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, Unavailable> {
        let path = self.path.clone();
        let task = tokio::task::spawn_blocking(move || read_file(&path, read));
        task.await.unwrap_or(Err(Unavailable::Failed))
    }

    fn find(&self, name: &str) -> Option<(usize, &Experiment)> {
        self.experiments.iter().enumerate().find(|(_, experiment)| experiment.config.name == name)
    }
}

fn read_file<T>(path: &Path, read: impl FnOnce(Option<&Store>) -> Result<T, StoreError>) -> Result<T, Unavailable> {
    let result = Store::open_for_reading(path).and_then(|store| read(store.as_ref()));
    result.map_err(|error| {
        tracing::error!("the experiments database {} cannot be read: {error}", path.display());
        Unavailable::from(&error)
    })
}

impl fmt::Debug for Experiments {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Experiments").field("path", &self.path).field("experiments", &self.experiments).finish()
    }
}

impl Experiment {
    fn new(config: &ExperimentConfig, names: &ModelNames, metrics: &Metrics, unchecked: &Arc<Notify>) -> Self {
        let series = |arm: &ArmConfig| metrics.new_arm(&config.name, &arm.name, names.adapter(&arm.model));
        Self {
            series: config.arms.iter().map(series).collect(),
            models: config.arms.iter().map(|arm| names.full_name(&arm.model)).collect(),
            definition: definition(config, names.base_id()),
            canary: config.bounds.is_some().then(|| watch::Sender::new(CanaryStatus::begin(writer::now_ms()))),
            promotion: config.promotion.is_some().then(|| watch::Sender::new(None)),
            unchecked: unchecked.clone(),
            config: config.clone(),
        }
    }

    fn is_rolled_back(&self) -> bool {
        self.canary.as_ref().is_some_and(|canary| canary.borrow().rolled_back.is_some())
    }

    /// The arm with this name and this model, in full: one whose model was changed begins anew.
    fn arm(&self, name: &str, model: &str) -> Option<&ArmConfig> {
        let mut arms = self.config.arms.iter().zip(&self.models);
        arms.find(|(arm, full)| arm.name == name && *full == model).map(|(arm, _)| arm)
    }

    fn series_of(&self, arm: &str) -> Option<&ArmSeries> {
        let mut arms = self.config.arms.iter().zip(&self.series);
        arms.find(|(known, _)| known.name == arm).map(|(_, series)| series.as_ref())
    }

    fn canary_arm(&self) -> Option<&ArmConfig> {
        self.config.arms.iter().find(|arm| arm.canary)
    }

    fn report(&self, store: Option<&Store>) -> Result<Report, StoreError> {
        report::report(&self.config, &self.models, store, self.canary_report(), self.promotion())
    }

    fn canary_report(&self) -> Option<CanaryReport> {
        let (arm, bounds) = (self.canary_arm()?, self.config.bounds.clone()?);
        let CanaryStatus { since_ms, rolled_back } = self.canary.as_ref()?.borrow().clone();
        // One that waits for a candidate is not watched.
        if rolled_back.is_none() && self.is_canary_out() {
            return None;
        }
        Some(CanaryReport {
            arm: arm.name.clone(),
            state: if rolled_back.is_some() { CanaryState::RolledBack } else { CanaryState::Watching },
            bounds,
            since: since_ms / 1000,
            rolled_back_at: rolled_back.as_ref().map(|rolled_back| rolled_back.at_ms / 1000),
            cause: rolled_back.map(|rolled_back| rolled_back.cause),
        })
    }
}

/// Compared with what files from before have: another form would put canaries that were rolled back into traffic again.
fn definition(config: &ExperimentConfig, base_id: &str) -> String {
    let ExperimentConfig { name, alias, arms, bounds, keep_prompts_mib: _, promotion: _ } = config;
    format!("{base_id} ExperimentConfig {{ name: {name:?}, alias: {alias:?}, arms: {arms:?}, bounds: {bounds:?} }}")
}

/// Ends with the last sender; what was queued is written first.
struct WriterThread(Option<JoinHandle<()>>);

impl Drop for WriterThread {
    fn drop(&mut self) {
        // A panic has been printed by its thread.
        self.0.take().map(JoinHandle::join);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_definition_is_what_it_was_when_canaries_were_first_kept() {
        let config = |more: &str| -> ExperimentConfig {
            let arms = "arms = [{name = 'a', model = 'm', weight = 1}, {name = 'b', model = 'n', weight = 0.5, canary = true}]";
            toml::from_str(&format!("name = 'e'\nalias = 'coder'\n{arms}\nbounds = {{min_samples = 9}}\n{more}"))
                .unwrap()
        };
        let released = "base ExperimentConfig { name: \"e\", alias: \"coder\", arms: [\
            ArmConfig { name: \"a\", model: \"m\", weight: 1.0, shadow: false, canary: false }, \
            ArmConfig { name: \"b\", model: \"n\", weight: 0.5, shadow: false, canary: true }], \
            bounds: Some(Bounds { max_error_rate: None, min_acceptance: None, max_ttft_p95_ratio: None, min_samples: 9 }) }";
        for more in ["", "keep_prompts_mib = 1"] {
            assert_eq!(definition(&config(more), "base"), released);
        }
    }
}
