//! Promotions as the rest of the server sees them: begun, checked, and looked back at.

use super::outcomes::{self, FileError, JudgedReply};
use super::promotion::{Checked, Promotion, PromotionRule, Served, Stage, Step, Trained};
use super::settings::ArmConfig;
use super::store::Unavailable;
use super::writer::{Command, now_ms};
use super::{Experiment, Experiments, VoteError};

/// An adapter that may be promoted.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    pub adapter: String,
    pub generation: String,
    pub trained: Option<Trained>,
}

/// Why no promotion has begun.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PromoteError {
    #[error("there is no experiment {0:?}: GET /v1/experiments lists them")]
    UnknownExperiment(String),
    #[error("the experiment {0:?} promotes nothing: set `promotion` in its configuration")]
    NoPromotion(String),
    #[error(
        "the adapter {adapter} is under way in the experiment {experiment:?}: wait for its end, or end it by \
         POST /v1/experiments/{experiment}/reset"
    )]
    UnderWay { experiment: String, adapter: String },
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
}

impl Experiments {
    /// What a candidate must show in an experiment, and the name of the adapter that its arm serves.
    ///
    /// # Errors
    /// There is no such experiment, or it promotes nothing.
    pub fn promotes(&self, experiment: &str) -> Result<(&PromotionRule, &str), PromoteError> {
        let (_, found) = self.find(experiment).ok_or_else(|| PromoteError::UnknownExperiment(experiment.to_owned()))?;
        let adapter = found.canary_arm().and_then(|arm| self.names.adapter(&arm.model));
        let promotes = found.config.promotion.as_ref().zip(adapter);
        promotes.ok_or_else(|| PromoteError::NoPromotion(experiment.to_owned()))
    }

    /// Begins to promote a candidate: it is to be checked.
    ///
    /// # Errors
    /// See [`PromoteError`]; nothing has begun then.
    pub async fn promote(&self, experiment: &str, candidate: Candidate) -> Result<Promotion, PromoteError> {
        self.promotes(experiment)?;
        let unknown = || PromoteError::UnknownExperiment(experiment.to_owned());
        let (index, found) = self.find(experiment).ok_or_else(unknown)?;
        let (Some(arm), Some(incumbent)) = (found.canary_arm(), found.config.incumbent()) else {
            return Err(PromoteError::NoPromotion(experiment.to_owned()));
        };
        let promotion = begin(candidate, arm, incumbent);
        match self.answered(|reply| Command::Promote(index, Box::new(promotion.clone()), reply)).await {
            // The writer has the last word, as several may be begun at once.
            Ok(()) => match found.promotion().filter(|latest| latest.id != promotion.id) {
                Some(Promotion { adapter, .. }) => {
                    Err(PromoteError::UnderWay { experiment: experiment.to_owned(), adapter })
                }
                None => Ok(promotion),
            },
            Err(VoteError::Unavailable(cause)) => Err(cause.into()),
            Err(VoteError::UnknownArm { .. }) => Err(Unavailable::Failed.into()),
        }
    }

    /// The next candidate that is to be checked, with its experiment; the same one until that was done. Waits for one.
    pub async fn next_unchecked(&self) -> (String, Promotion) {
        loop {
            let is_unchecked = |promotion: &Promotion| promotion.stage == Stage::Checking;
            let unchecked = self.experiments.iter().find_map(|experiment| {
                Some((experiment.config.name.clone(), experiment.promotion().filter(is_unchecked)?))
            });
            match unchecked {
                Some(unchecked) => return unchecked,
                None => self.unchecked.notified().await,
            }
        }
    }

    /// Whether the candidate of this promotion is still to be checked.
    pub fn is_checking(&self, experiment: &str, id: &str) -> bool {
        self.find(experiment).is_some_and(|(_, found)| found.promotion().is_some_and(|latest| latest.is_checking(id)))
    }

    /// Returns when it is not any more.
    pub async fn until_not_checking(&self, experiment: &str, id: &str) {
        let Some(promotion) = self.find(experiment).and_then(|(_, found)| found.promotion.as_ref()) else { return };
        let mut latest = promotion.subscribe();
        // An error means that the experiments are gone.
        drop(latest.wait_for(|latest| !latest.as_ref().is_some_and(|latest| latest.is_checking(id))).await);
    }

    /// Takes the candidate on to where its check leads. One that is withdrawn stays so.
    pub async fn checked(&self, experiment: &str, id: &str, checked: Checked) {
        let Some((index, _)) = self.find(experiment) else { return };
        // The queue is bounded, and what was found out must not be lost.
        let mut command = Command::Checked(index, id.to_owned(), checked);
        while let Err(std::sync::mpsc::TrySendError::Full(full)) = self.commands.try_send(command) {
            command = full;
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        self.settled().await;
    }

    /// Returns when all that was queued before has been taken up.
    async fn settled(&self) {
        while let Err(VoteError::Unavailable(Unavailable::Busy)) = self.answered(Command::Settle).await {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    }

    /// Every promotion of an experiment, the latest first, of adapters that `may_see` allows; `None` if there is no such
    /// experiment.
    ///
    /// # Errors
    /// The database cannot be read.
    pub async fn promotions(
        &self,
        experiment: &str,
        may_see: impl Fn(&str) -> bool,
    ) -> Result<Option<Vec<Promotion>>, Unavailable> {
        let Some((_, found)) = self.find(experiment) else { return Ok(None) };
        let name = found.config.name.clone();
        let promotions = self.read(move |store| store.map_or(Ok(Vec::new()), |store| store.promotions(&name))).await?;
        let hides = |arm: &ArmConfig| self.names.adapter(&arm.model).is_some_and(|adapter| !may_see(adapter));
        let is_hidden = found.canary_arm().is_some_and(hides);
        let visible = promotions.into_iter().filter(|promotion| !is_hidden && self.shows(promotion, &may_see));
        Ok(Some(visible.collect()))
    }

    /// Whether `may_see` allows both of the adapters that a promotion names, in its causes too.
    pub(super) fn shows(&self, promotion: &Promotion, may_see: impl Fn(&str) -> bool) -> bool {
        may_see(&promotion.adapter) && self.names.adapter(&promotion.incumbent_model).is_none_or(may_see)
    }

    /// The judged replies of an experiment, in order of time. Blocks.
    ///
    /// # Errors
    /// The database cannot be read.
    pub fn judged_replies(&self, experiment: &str) -> Result<Vec<JudgedReply>, Unavailable> {
        match outcomes::judged_replies(&self.path, experiment) {
            Ok(replies) => Ok(replies),
            // Nothing is recorded yet.
            Err(FileError::Missing(_) | FileError::UnknownExperiment { .. }) => Ok(Vec::new()),
            Err(FileError::Store { path, cause }) => {
                tracing::error!("the experiments database {} cannot be read: {cause}", path.display());
                Err(Unavailable::from(&cause))
            }
        }
    }
}

fn begin(candidate: Candidate, arm: &ArmConfig, incumbent: &ArmConfig) -> Promotion {
    let Candidate { adapter, generation, trained } = candidate;
    let (now_ms, stage) = (now_ms(), Stage::Checking);
    Promotion {
        id: format!("promo-{now_ms:x}-{:08x}", rand::random::<u32>()),
        stage,
        adapter,
        generation,
        arm: arm.name.clone(),
        live_from_ms: None,
        replaced_generation: None,
        incumbent: incumbent.name.clone(),
        incumbent_model: incumbent.model.clone(),
        trained,
        check: None,
        steps: vec![Step { stage, at: now_ms / 1000, cause: None }],
    }
}

impl Experiment {
    /// Whether its canary has traffic by a promotion alone.
    pub(super) fn promotes(&self) -> bool {
        self.promotion.is_some()
    }

    pub(super) fn promotion(&self) -> Option<Promotion> {
        self.promotion.as_ref().and_then(|promotion| promotion.borrow().clone())
    }

    pub(super) fn set_promotion(&self, now: Promotion) {
        if let Some(promotion) = &self.promotion {
            promotion.send_replace(Some(now));
            self.unchecked.notify_one();
        }
    }

    fn stage(&self) -> Option<Stage> {
        self.promotion.as_ref().and_then(|promotion| promotion.borrow().as_ref().map(|promotion| promotion.stage))
    }

    /// Whether nothing else can be promoted.
    pub(super) fn is_under_way(&self) -> bool {
        self.stage().is_some_and(Stage::is_under_way)
    }

    /// Whether the canary gets no traffic.
    pub(super) fn is_canary_out(&self) -> bool {
        self.is_rolled_back() || (self.promotes() && !self.stage().is_some_and(Stage::is_live))
    }

    /// Whether the canary gets all of it.
    pub(super) fn has_whole(&self) -> bool {
        self.stage() == Some(Stage::Whole)
    }

    /// How much must have been shown of the canary for it to be decided; `None` where nothing is to be.
    pub(super) fn min_shown(&self) -> Option<usize> {
        let rule = self.config.promotion.as_ref().filter(|_| self.stage() == Some(Stage::Canary));
        rule.map(|rule| rule.min_shown)
    }

    /// Whose a reply of the canary's arm is. All are the canary's where candidates are not promoted.
    pub(super) fn whose(&self, generation: Option<&str>, started_ms: i64) -> Served {
        match self.promotion() {
            Some(promotion) if promotion.is_live() => promotion.whose(generation, started_ms),
            _ if self.promotes() => Served::Before,
            _ => Served::Candidate,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};
    use std::path::Path;
    use std::sync::Arc;

    use super::*;
    use crate::experiments::{Check, ExperimentsConfig, ModelNames, Outcome, Record, Vote, VoteKind};
    use crate::metrics::Metrics;

    const CONFIG: &str = "path = ''\nmax_mib = 64\nmax_queued = 1024\nkeep_text = true
        [[run]]\nname = 'e'\nalias = 'coder'\nkeep_prompts_mib = 1
        arms = [{name = 'base', model = 'm', weight = 1}, {name = 'tuned', model = 'x', weight = 1, canary = true}]
        bounds = {max_error_rate = 0.5, min_samples = 4}\npromotion = {min_pairs = 6, min_shown = 8}";

    /// The adapters that went back to their generation before are of no interest here.
    fn open(folder: &Path) -> Experiments {
        open_with(folder, CONFIG)
    }

    fn open_with(folder: &Path, config: &str) -> Experiments {
        let config: ExperimentsConfig = toml::from_str(config).unwrap();
        config.validate("m", &BTreeMap::new()).unwrap();
        let (names, metrics) = (ModelNames::new("m", &BTreeMap::new(), |_| false), Arc::new(Metrics::new("m")));
        Experiments::start(&config, folder.join("experiments.db"), names, metrics, Box::new(|_, _| {})).unwrap()
    }

    fn candidate() -> Candidate {
        Candidate { adapter: "ft-1".to_owned(), generation: "new".to_owned(), trained: None }
    }

    /// So many wins of eight.
    fn checked(wins: usize) -> Checked {
        let pair = |index| if index < wins { (-1.0, -2.0) } else { (-2.0, -1.0) };
        let check = Check::new(&(0..8).map(pair).collect::<Vec<_>>(), 0);
        Checked::Measured { check, replaced_generation: Some("old".to_owned()) }
    }

    fn served(experiments: &Experiments) -> BTreeSet<String> {
        served_to(experiments, true)
    }

    fn served_to(experiments: &Experiments, may_use: bool) -> BTreeSet<String> {
        (0..100).map(|user| experiments.assign("coder", &user.to_string(), |_| may_use).unwrap().arm).collect()
    }

    fn arms(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    /// Shows a reply of each arm, and has the user accept it or not.
    async fn show(experiments: &Experiments, id: usize, generation: &str, accepts_tuned: bool) {
        for (arm, model, generation, accepts) in
            [("base", "m", None, true), ("tuned", "m-x", Some(generation.to_owned()), accepts_tuned)]
        {
            let (id, experiment) = (format!("{arm}-{id}"), Some("e".to_owned()));
            let outcome = Outcome::Completed;
            let model = model.to_owned();
            experiments.record(Record { experiment, model, generation, outcome, ..Record::begin(&id, arm) });
            let kind = if accepts { VoteKind::Accepted } else { VoteKind::Rejected };
            experiments.vote(Vote { id, user: String::new(), kind, arm: None, text: None }).await.unwrap();
        }
    }

    async fn latest(experiments: &Experiments) -> Promotion {
        experiments.report("e").await.unwrap().unwrap().promotion.unwrap()
    }

    fn stages(promotion: &Promotion) -> Vec<Stage> {
        promotion.steps.iter().map(|step| step.stage).collect()
    }

    #[tokio::test]
    async fn a_candidate_has_no_traffic_until_it_is_checked_then_that_of_its_arm_then_all() {
        let folder = tempfile::tempdir().unwrap();
        let experiments = open(folder.path());
        assert_eq!(served(&experiments), arms(&["base"]));
        assert!(experiments.report("e").await.unwrap().unwrap().canary.is_none());
        let begun = experiments.promote("e", candidate()).await.unwrap();
        assert_eq!((begun.stage, served(&experiments)), (Stage::Checking, arms(&["base"])));
        let again = experiments.promote("e", candidate()).await.unwrap_err();
        assert!(matches!(again, PromoteError::UnderWay { .. }) && again.to_string().contains("ft-1"), "{again}");

        experiments.checked("e", &begun.id, checked(8)).await;
        assert_eq!(served(&experiments), arms(&["base", "tuned"]));
        for id in 0..7 {
            show(&experiments, id, "new", true).await;
        }
        assert_eq!(served(&experiments), arms(&["base", "tuned"]), "seven are too few");
        show(&experiments, 7, "new", true).await;
        assert_eq!(served(&experiments), arms(&["tuned"]));
        assert_eq!(served_to(&experiments, false), arms(&["base"]), "who may not use it is served as before");
        drop(experiments);

        let experiments = open(folder.path());
        assert_eq!(served(&experiments), arms(&["tuned"]), "also after a restart");
        let promotion = latest(&experiments).await;
        assert_eq!(stages(&promotion), [Stage::Checking, Stage::Canary, Stage::Whole]);
        assert!(promotion.steps[2].cause.as_ref().unwrap().contains("8 of 8 were accepted"), "{promotion:?}");
        assert_eq!(experiments.promotions("e", |_| true).await.unwrap().unwrap(), [promotion]);
        assert!(experiments.promotions("e", |name| name != "ft-1").await.unwrap().unwrap().is_empty());
        assert_eq!(experiments.promotions("f", |_| true).await.unwrap(), None);

        experiments.reset("e").await.unwrap();
        assert_eq!(served(&experiments), arms(&["base"]));
        drop(experiments);
        let experiments = open(folder.path());
        assert_eq!((served(&experiments), latest(&experiments).await.stage), (arms(&["base"]), Stage::Withdrawn));
    }

    #[tokio::test]
    async fn a_check_that_was_cut_off_is_made_again_and_one_that_fails_is_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let experiments = open(folder.path());
        let begun = experiments.promote("e", candidate()).await.unwrap();
        drop(experiments);
        let experiments = open(folder.path());
        assert_eq!(experiments.next_unchecked().await, ("e".to_owned(), begun.clone()));
        experiments.checked("e", &begun.id, checked(7)).await;
        let refused = latest(&experiments).await;
        assert_eq!((refused.stage, refused.check.as_ref().unwrap().wins), (Stage::Refused, 7));
        assert!(refused.steps[1].cause.as_ref().unwrap().contains("7 of 8 held-out completions"), "{refused:?}");
        assert_eq!(served(&experiments), arms(&["base"]));

        // What comes too late changes nothing.
        experiments.checked("e", &begun.id, checked(8)).await;
        assert_eq!(latest(&experiments).await, refused);
        let second = experiments.promote("e", candidate()).await.unwrap();
        experiments.reset("e").await.unwrap();
        experiments.checked("e", &second.id, checked(8)).await;
        assert_eq!((latest(&experiments).await.stage, served(&experiments)), (Stage::Withdrawn, arms(&["base"])));
    }

    #[tokio::test]
    async fn a_canary_that_users_like_less_or_that_fails_goes_back() {
        let folder = tempfile::tempdir().unwrap();
        let experiments = open(folder.path());
        let begun = experiments.promote("e", candidate()).await.unwrap();
        experiments.checked("e", &begun.id, checked(8)).await;
        for id in 0..8 {
            show(&experiments, id, "new", false).await;
        }
        let back = latest(&experiments).await;
        assert_eq!((back.stage, served(&experiments)), (Stage::Back, arms(&["base"])));
        assert!(back.steps[2].cause.as_ref().unwrap().contains("0 of 8 were accepted, against 8 of 8"), "{back:?}");

        // Another one has its own chance, and may lose it when it has all the traffic.
        let begun = experiments.promote("e", candidate()).await.unwrap();
        experiments.checked("e", &begun.id, checked(8)).await;
        for id in 10..18 {
            show(&experiments, id, "new", true).await;
        }
        assert_eq!(served(&experiments), arms(&["tuned"]));
        for id in 0..4 {
            let id = format!("failed-{id}");
            let (experiment, model, outcome) = (Some("e".to_owned()), "m-x".to_owned(), Outcome::Failed);
            experiments.record(Record { experiment, model, outcome, ..Record::begin(&id, "tuned") });
        }
        experiments.settled().await;
        let back = latest(&experiments).await;
        assert_eq!(stages(&back), [Stage::Checking, Stage::Canary, Stage::Whole, Stage::Back]);
        assert_eq!(served(&experiments), arms(&["base"]));
        drop(experiments);
        assert_eq!(served(&open(folder.path())), arms(&["base"]));
    }

    #[tokio::test]
    async fn replies_of_before_do_not_count_and_weights_that_nobody_checked_end_it() {
        let folder = tempfile::tempdir().unwrap();
        let experiments = open(folder.path());
        let begun = experiments.promote("e", candidate()).await.unwrap();
        experiments.checked("e", &begun.id, checked(8)).await;
        let live_from_ms = latest(&experiments).await.live_from_ms.unwrap();
        let serve = |id: usize, generation: &str, started_ms: i64| {
            let (experiment, model, outcome) = (Some("e".to_owned()), "m-x".to_owned(), Outcome::Failed);
            let generation = Some(generation.to_owned());
            let begun = Record::begin(&format!("serve-{id}"), "tuned");
            experiments.record(Record { experiment, model, generation, outcome, started_ms, ..begun });
        };
        // Of a candidate before it, too.
        (0..9).for_each(|id| serve(id, if id < 5 { "old" } else { "older" }, live_from_ms - 1));
        experiments.settled().await;
        assert_eq!(latest(&experiments).await.stage, Stage::Canary);
        (10..13).for_each(|id| serve(id, "new", live_from_ms - 1));
        experiments.settled().await;
        assert_eq!(latest(&experiments).await.stage, Stage::Canary, "three of it are too few for a bound");
        // As when somebody rolls its arm's adapter back.
        serve(13, "old", live_from_ms);
        experiments.settled().await;
        let back = latest(&experiments).await;
        assert_eq!((back.stage, served(&experiments)), (Stage::Back, arms(&["base"])));
        assert!(back.steps[2].cause.as_ref().unwrap().contains("the generation old"), "{back:?}");
    }

    #[tokio::test]
    async fn one_of_several_that_are_begun_at_once_is_under_way_and_no_step_is_lost() {
        let folder = tempfile::tempdir().unwrap();
        let experiments = open(folder.path());
        let begun = futures::future::join_all((0..5).map(|_| experiments.promote("e", candidate()))).await;
        let (begun, refused): (Vec<_>, Vec<_>) = begun.into_iter().partition(Result::is_ok);
        assert!(refused.iter().all(|refused| matches!(refused, Err(PromoteError::UnderWay { .. }))), "{refused:?}");
        let [Ok(begun)] = &begun[..] else { panic!("{begun:?}") };
        assert_eq!(experiments.promotions("e", |_| true).await.unwrap().unwrap(), std::slice::from_ref(begun));

        // In one batch of the writer, as far as it has not begun with them.
        let checked = experiments.checked("e", &begun.id, checked(8));
        let strange = async {
            let (experiment, generation) = (Some("e".to_owned()), Some("strange".to_owned()));
            let started_ms = i64::MAX;
            let begun = Record::begin("strange", "tuned");
            experiments.record(Record { experiment, model: "m-x".to_owned(), generation, started_ms, ..begun });
        };
        let ((), (), reset) = futures::join!(checked, strange, experiments.reset("e"));
        reset.unwrap();
        let back = latest(&experiments).await;
        assert_eq!(stages(&back), [Stage::Checking, Stage::Canary, Stage::Back]);
        assert_eq!(experiments.promotions("e", |_| true).await.unwrap().unwrap(), std::slice::from_ref(&back));
        drop(experiments);
        assert_eq!(latest(&open(folder.path())).await, back, "as the file has it");
    }

    #[tokio::test]
    async fn a_promotion_is_hidden_from_whom_the_candidate_the_arm_or_the_incumbent_is() {
        let folder = tempfile::tempdir().unwrap();
        let experiments = open_with(folder.path(), &CONFIG.replace("model = 'm'", "model = 'y'"));
        let begun = experiments.promote("e", candidate()).await.unwrap();
        let report = experiments.report("e").await.unwrap().unwrap();
        for (hidden, seen) in [("none", vec![begun]), ("ft-1", vec![]), ("x", vec![]), ("y", vec![])] {
            let may_see = |name: &str| name != hidden;
            let visible = experiments.visible(report.clone(), may_see);
            assert_eq!(visible.promotion.into_iter().collect::<Vec<_>>(), seen, "{hidden}");
            assert_eq!(experiments.promotions("e", may_see).await.unwrap().unwrap(), seen, "{hidden}");
        }
    }

    #[tokio::test]
    async fn what_cannot_begin_is_refused_and_another_configuration_begins_anew() {
        let folder = tempfile::tempdir().unwrap();
        let experiments = open(folder.path());
        assert_eq!(experiments.promote("f", candidate()).await, Err(PromoteError::UnknownExperiment("f".to_owned())));
        experiments.promote("e", candidate()).await.unwrap();
        drop(experiments);
        let without = CONFIG.split("\npromotion").next().unwrap();
        let experiments = open_with(folder.path(), without);
        assert_eq!(experiments.promote("e", candidate()).await, Err(PromoteError::NoPromotion("e".to_owned())));
        assert_eq!(served(&experiments), arms(&["base", "tuned"]), "a canary as ever");
        drop(experiments);
        let other = CONFIG.replace("weight = 1, canary", "weight = 2, canary");
        let experiments = open_with(folder.path(), &other);
        assert!(experiments.report("e").await.unwrap().unwrap().promotion.is_none());
        experiments.promote("e", candidate()).await.unwrap();
        assert_eq!(experiments.promotions("e", |_| true).await.unwrap().unwrap().len(), 2);
        drop(experiments);

        let nowhere = open_with(Path::new("/dev/null"), CONFIG);
        let refused = nowhere.promote("e", candidate()).await;
        assert!(matches!(refused, Err(PromoteError::Unavailable(_))), "{refused:?}");
        assert_eq!(served(&nowhere), arms(&["base"]));
    }
}
