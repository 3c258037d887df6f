//! The thread that writes: it alone changes the file, watches the canaries, and answers a vote when that is on disk.

use std::collections::BTreeSet;
use std::iter;
use std::mem;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{SystemTime, UNIX_EPOCH};

use rusqlite::Transaction;
use tokio::sync::oneshot;

use super::canary::{CanaryStatus, Monitor, RollBack, Verdict, WINDOW};
use super::promotion::{Checked, Promotion, Served, Stage};
use super::store::{self, PastRequest, Store, StoreError, Unavailable};
use super::vote::{Record, Vote, VoteError};
use super::{Experiment, ModelNames, OnRollBack};
use crate::metrics::Metrics;

/// Commands that share a commit, and so a sync of the disk.
const MAX_BATCH: usize = 256;

#[derive(Debug)]
pub enum Command {
    Record(Box<Record>),
    /// With the arms that were still to be recorded when it was given.
    Vote(Vote, Vec<String>, oneshot::Sender<Result<(), VoteError>>),
    /// Lets the canary of an experiment, by index, begin anew.
    Reset(usize, oneshot::Sender<Result<(), VoteError>>),
    /// Begins the promotion in the experiment, by index, unless one is under way there.
    Promote(usize, Box<Promotion>, oneshot::Sender<Result<(), VoteError>>),
    /// What the check of the promotion with this id gave.
    Checked(usize, String, Checked),
    /// Answered when all before it has been taken up.
    Settle(oneshot::Sender<Result<(), VoteError>>),
}

impl Command {
    /// Whether what it does depends on where a canary or a promotion is, to which all before it must have led.
    fn is_a_turn(&self) -> bool {
        matches!(self, Self::Reset(..) | Self::Promote(..) | Self::Checked(..))
    }
}

pub struct Writer {
    path: PathBuf,
    max_mib: u32,
    names: ModelNames,
    experiments: Arc<[Experiment]>,
    /// One per experiment that has a canary.
    monitors: Vec<Option<Monitor>>,
    on_roll_back: OnRollBack,
    metrics: Arc<Metrics>,
    /// `None` while the file cannot be opened, or before it is needed.
    store: Option<Store>,
    /// Whether what the file says of canaries has been read.
    restored: bool,
    /// Experiments whose canary has a status that is not in the file yet.
    unsaved: BTreeSet<usize>,
    /// Experiments with more prompts than before, or from before the server was started.
    untrimmed: BTreeSet<usize>,
    /// Why the last write failed.
    failing: Option<Unavailable>,
}

impl Writer {
    pub fn new(
        path: PathBuf,
        max_mib: u32,
        names: ModelNames,
        experiments: Arc<[Experiment]>,
        on_roll_back: OnRollBack,
        metrics: Arc<Metrics>,
    ) -> Self {
        let monitors =
            experiments.iter().map(|experiment| experiment.config.bounds.clone().map(Monitor::new)).collect();
        let mut writer = Self {
            path,
            max_mib,
            names,
            untrimmed: (0..experiments.len()).collect(),
            experiments,
            monitors,
            on_roll_back,
            metrics,
            store: None,
            restored: false,
            unsaved: BTreeSet::new(),
            failing: None,
        };
        // Before the first request: a canary that was rolled back gets none. Without experiments there may never be a file.
        if !writer.experiments.is_empty() {
            // Has been logged, and is tried again.
            let _ = writer.write(&[]);
        }
        writer
    }

    /// Until every sender is gone.
    pub fn run(mut self, commands: &Receiver<Command>) {
        while let Ok(first) = commands.recv() {
            let mut batch = Vec::new();
            for command in iter::once(first).chain(commands.try_iter()).take(MAX_BATCH) {
                if command.is_a_turn() {
                    self.handle(mem::take(&mut batch));
                    self.handle(vec![command]);
                } else {
                    batch.push(command);
                }
            }
            self.handle(batch);
        }
    }

    fn handle(&mut self, batch: Vec<Command>) {
        if batch.is_empty() {
            return;
        }
        let answers = match self.write(&batch) {
            Ok(answers) => answers,
            Err(cause) => vec![Err(VoteError::Unavailable(cause)); batch.len()],
        };
        let mut replies = Vec::new();
        for (command, answer) in batch.into_iter().zip(answers) {
            let result = match &answer {
                Ok(()) => "written",
                Err(VoteError::UnknownArm { .. }) => "refused",
                Err(VoteError::Unavailable(_)) => "failed",
            };
            self.metrics.experiment_writes_total.with_label_values(&[result]).inc();
            match command {
                Command::Record(record) => {
                    let id = record.id.clone();
                    self.observe(*record);
                    self.take_up_opinion(&id);
                }
                Command::Vote(vote, _, reply) => {
                    if answer.is_ok() {
                        self.take_up_opinion(&vote.id);
                    }
                    replies.push((reply, answer));
                }
                Command::Reset(index, reply) => {
                    if answer.is_ok() {
                        self.begin(index, CanaryStatus::begin(now_ms()));
                        self.withdraw(index);
                    }
                    replies.push((reply, answer));
                }
                Command::Promote(index, promotion, reply) => {
                    if answer.is_ok() && !self.experiments[index].is_under_way() {
                        self.experiments[index].set_promotion(*promotion);
                    }
                    replies.push((reply, answer));
                }
                Command::Checked(index, id, checked) => self.take_up(index, &id, checked),
                Command::Settle(reply) => replies.push((reply, answer)),
            }
        }
        self.check_canaries();
        // Whoever has an answer sees all that followed from the vote. A client that has gone away needs none.
        replies.into_iter().for_each(|(reply, answer)| drop(reply.send(answer)));
    }

    /// The whole batch in one commit, or nothing of it.
    fn write(&mut self, batch: &[Command]) -> Result<Vec<Result<(), VoteError>>, Unavailable> {
        match self.try_write(batch) {
            Ok(answers) => {
                if self.failing.take().is_some() {
                    tracing::info!("the experiments database is written again");
                }
                Ok(answers)
            }
            Err(error) => {
                let cause = Unavailable::from(&error);
                if self.failing.replace(cause) != Some(cause) {
                    tracing::error!("votes and requests are not recorded: {cause} ({}: {error})", self.path.display());
                }
                Err(cause)
            }
        }
    }

    fn try_write(&mut self, batch: &[Command]) -> Result<Vec<Result<(), VoteError>>, StoreError> {
        // Taken out, so that a connection that fails is not used again. Nor is one to a file that was moved away: what
        // goes there would be lost.
        let mut store = match self.store.take().filter(|_| self.path.exists()) {
            Some(store) => store,
            None => Store::open(&self.path, self.max_mib)?,
        };
        self.restore(&store)?;
        let now_ms = now_ms();
        let with_prompts = batch.iter().filter_map(|command| match command {
            Command::Record(record) if record.asked.is_some() => self.index_of(record),
            _ => None,
        });
        let untrimmed: BTreeSet<usize> = self.untrimmed.iter().copied().chain(with_prompts).collect();
        let answers = store.transaction(|transaction| {
            for &index in &self.unsaved {
                self.save(transaction, index)?;
            }
            let answers = batch.iter().map(|command| self.apply(transaction, command, now_ms)).collect();
            for &index in &untrimmed {
                let config = &self.experiments[index].config;
                store::trim_prompts(transaction, &config.name, config.max_prompt_bytes())?;
            }
            answers
        })?;
        self.unsaved.clear();
        self.untrimmed.clear();
        self.store = Some(store);
        Ok(answers)
    }

    fn apply(
        &self,
        transaction: &Transaction<'_>,
        command: &Command,
        now_ms: i64,
    ) -> rusqlite::Result<Result<(), VoteError>> {
        match command {
            Command::Record(record) => store::insert_record(transaction, record, now_ms)?,
            Command::Vote(vote, under_way, _) => {
                if let Some(arm) = &vote.arm {
                    let mut arms = store::arms_of(transaction, &vote.id)?;
                    arms.extend(under_way.iter().filter(|arm| !arms.contains(arm)).cloned().collect::<Vec<_>>());
                    // Of an id that was never recorded, nothing is known.
                    if !arms.is_empty() && !arms.contains(arm) {
                        return Ok(Err(VoteError::UnknownArm { arm: arm.clone(), arms }));
                    }
                }
                store::insert_vote(transaction, vote, now_ms)?;
            }
            Command::Reset(index, _) => {
                let experiment = &self.experiments[*index];
                let status = CanaryStatus::begin(now_ms);
                store::save_canary(transaction, &experiment.config.name, &experiment.definition, &status)?;
                if let Some(promotion) = experiment.promotion().and_then(|promotion| withdrawn(promotion, now_ms)) {
                    self.save_promotion(transaction, *index, &promotion)?;
                }
            }
            Command::Promote(index, promotion, _) => {
                if !self.experiments[*index].is_under_way() {
                    self.save_promotion(transaction, *index, promotion)?;
                }
            }
            // Holds at once, and is saved behind this.
            Command::Checked(..) | Command::Settle(_) => {}
        }
        Ok(Ok(()))
    }

    fn save(&self, transaction: &Transaction<'_>, index: usize) -> rusqlite::Result<()> {
        let experiment = &self.experiments[index];
        let Some(canary) = &experiment.canary else { return Ok(()) };
        if let Some(promotion) = experiment.promotion() {
            self.save_promotion(transaction, index, &promotion)?;
        }
        store::save_canary(transaction, &experiment.config.name, &experiment.definition, &canary.borrow())
    }

    fn save_promotion(
        &self,
        transaction: &Transaction<'_>,
        index: usize,
        promotion: &Promotion,
    ) -> rusqlite::Result<()> {
        let experiment = &self.experiments[index];
        store::save_promotion(transaction, &experiment.config.name, &experiment.definition, promotion)
    }

    /// Once: what became of the canaries before the server was started.
    fn restore(&mut self, store: &Store) -> Result<(), StoreError> {
        if self.restored {
            return Ok(());
        }
        for (index, (experiment, monitor)) in self.experiments.iter().zip(&mut self.monitors).enumerate() {
            let (Some(canary), Some(monitor)) = (&experiment.canary, monitor) else { continue };
            let promotion = store.promotion(&experiment.config.name, &experiment.definition)?;
            if let Some(promotion) = promotion.filter(|_| experiment.promotes() && experiment.promotion().is_none()) {
                experiment.set_promotion(promotion);
            }
            let Some(status) = store.canary(&experiment.config.name, &experiment.definition)? else {
                self.unsaved.insert(index);
                continue;
            };
            let Some(arm) = experiment.canary_arm() else { continue };
            let past =
                |of_others| store.past_requests(&experiment.config.name, &arm.name, of_others, status.since_ms, WINDOW);
            let of_canary = past(false)?.into_iter();
            // Whatever else the arm served since is not the candidate's, whenever it began.
            let is_canarys =
                |past: &PastRequest| experiment.whose(past.generation.as_deref(), i64::MAX) == Served::Candidate;
            let of_canary = of_canary.filter(is_canarys);
            of_canary.for_each(|request| monitor.observe_canary(request));
            past(true)?.into_iter().for_each(|request| monitor.observe_other(request));
            // Not if it broke a bound while the file could not be read.
            if !experiment.is_rolled_back() {
                canary.send_replace(status);
            }
        }
        self.restored = true;
        Ok(())
    }

    fn observe(&mut self, record: Record) {
        let Some(index) = self.index_of(&record) else { return };
        let experiments = self.experiments.clone();
        let Some(arm) = experiments[index].arm(&record.arm, &record.model) else { return };
        let Record { id, started_ms, generation, outcome, ttft_ms, .. } = record;
        let whose = experiments[index].whose(generation.as_deref(), started_ms);
        if let (true, Served::Stranger, Some(generation)) = (arm.canary, whose, &generation) {
            let cause = format!("the generation {generation} was served, which nobody has checked");
            self.take_out(index, cause);
            return;
        }
        let Some(monitor) = &mut self.monitors[index] else { return };
        let request = PastRequest { id, generation, outcome, ttft_ms, shown: false, accepted: false };
        match (arm.canary, arm.shadow) {
            (true, _) if whose == Served::Candidate => monitor.observe_canary(request),
            (false, false) => monitor.observe_other(request),
            _ => {}
        }
    }

    /// As a restart would find it: whatever came first, votes or the request that they are on.
    fn take_up_opinion(&mut self, id: &str) {
        let Some(store) = self.store.as_ref().filter(|_| self.monitors.iter().any(Option::is_some)) else { return };
        match store.opinion(id) {
            Ok(opinion) => {
                let monitors = self.monitors.iter_mut().flatten();
                if let Some(kind) = opinion {
                    monitors.for_each(|monitor| monitor.observe_vote(id, kind));
                }
            }
            Err(e) => tracing::error!("votes on a request of a canary cannot be read: {e}"),
        }
    }

    fn index_of(&self, record: &Record) -> Option<usize> {
        let named = |experiment: &Experiment| Some(&experiment.config.name) == record.experiment.as_ref();
        self.experiments.iter().position(named)
    }

    fn check_canaries(&mut self) {
        for (index, experiment) in self.experiments.clone().iter().enumerate() {
            let (Some(arm), Some(monitor)) = (experiment.canary_arm(), &self.monitors[index]) else { continue };
            if experiment.is_canary_out() {
                continue;
            }
            let verdict = experiment.min_shown().and_then(|min_shown| monitor.verdict(min_shown));
            let cause = match (monitor.broken_bound(), verdict) {
                (Some(cause), _) | (None, Some(Verdict::Worse(cause))) => cause,
                (None, Some(Verdict::Kept(cause))) => {
                    self.promote(index, cause);
                    continue;
                }
                (None, None) => continue,
            };
            let generation = experiment.promotion().map(|promotion| promotion.generation);
            let generation = generation.or_else(|| monitor.generation().map(str::to_owned));
            self.take_out(index, cause);
            if let Some(adapter) = self.names.adapter(&arm.model) {
                (self.on_roll_back)(adapter, generation.as_deref());
            }
        }
        if !self.unsaved.is_empty() {
            // Has been logged, and is tried again with the next batch.
            let _ = self.write(&[]);
        }
    }

    /// Gives the canary no more traffic.
    fn take_out(&mut self, index: usize, cause: String) {
        let (experiment, now_ms) = (&self.experiments[index], now_ms());
        let (Some(canary), Some(arm)) = (&experiment.canary, experiment.canary_arm()) else { return };
        let name = &experiment.config.name;
        tracing::error!("experiment {name}: the canary {} is rolled back: {cause}", arm.name);
        self.metrics.canary_rollbacks_total.with_label_values(&[name]).inc();
        if let Some(mut promotion) = experiment.promotion() {
            promotion.step(Stage::Back, now_ms, Some(cause.clone()));
            experiment.set_promotion(promotion);
        }
        canary.send_modify(|status| status.rolled_back = Some(RollBack { at_ms: now_ms, cause }));
        self.unsaved.insert(index);
    }

    /// Gives the canary all traffic. It is watched from now on anew: the arms that it was measured against have none.
    fn promote(&mut self, index: usize, cause: String) {
        let now_ms = now_ms();
        let Some(mut promotion) = self.experiments[index].promotion() else { return };
        promotion.step(Stage::Whole, now_ms, Some(cause));
        self.experiments[index].set_promotion(promotion);
        self.begin(index, CanaryStatus::begin(now_ms));
        self.unsaved.insert(index);
    }

    /// A check that was withdrawn meanwhile changes nothing.
    fn take_up(&mut self, index: usize, id: &str, checked: Checked) {
        let promotion = self.experiments[index].promotion();
        let Some(mut promotion) = promotion.filter(|now| now.is_checking(id)) else { return };
        let now_ms = now_ms();
        promotion.take_up(checked, now_ms);
        // Before it has traffic.
        self.begin(index, CanaryStatus::begin(now_ms));
        self.experiments[index].set_promotion(promotion);
        self.unsaved.insert(index);
    }

    fn withdraw(&mut self, index: usize) {
        let experiment = &self.experiments[index];
        if let Some(promotion) = experiment.promotion().and_then(|promotion| withdrawn(promotion, now_ms())) {
            experiment.set_promotion(promotion);
            // What it was may have changed since it was saved.
            self.unsaved.insert(index);
        }
    }

    fn begin(&mut self, index: usize, status: CanaryStatus) {
        if let Some(canary) = &self.experiments[index].canary {
            canary.send_replace(status);
        }
        self.monitors[index] = self.experiments[index].config.bounds.clone().map(Monitor::new);
        self.unsaved.remove(&index);
    }
}

/// `None` for one that has ended.
fn withdrawn(mut promotion: Promotion, now_ms: i64) -> Option<Promotion> {
    let is_under_way = promotion.stage.is_under_way();
    is_under_way.then(|| {
        promotion.step(Stage::Withdrawn, now_ms, None);
        promotion
    })
}

/// Unix milliseconds.
pub fn now_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    since.as_millis().try_into().unwrap_or(i64::MAX)
}
