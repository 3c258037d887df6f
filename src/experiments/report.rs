//! What an experiment has shown so far, from everything that is stored.

use std::collections::{BTreeMap, HashMap};

use rusqlite::params;
use schemars::JsonSchema;
use serde::Serialize;

use super::promotion::Promotion;
use super::settings::{ArmConfig, Bounds, ExperimentConfig};
use super::statistics::{Rate, percentile, sign_test, wilson};
use super::store::{Store, StoreError};
use super::vote::{Outcome, VoteKind};

#[derive(Debug, Clone, PartialEq, JsonSchema, Serialize)]
pub struct Report {
    pub name: String,
    pub alias: String,
    /// In the order of the configuration.
    pub arms: Vec<ArmReport>,
    /// Every two arms once.
    pub pairs: Vec<PairReport>,
    pub canary: Option<CanaryReport>,
    /// The latest.
    pub promotion: Option<Promotion>,
}

#[derive(Debug, Clone, PartialEq, JsonSchema, Serialize)]
pub struct ArmReport {
    pub name: String,
    pub model: String,
    pub weight: f64,
    pub shadow: bool,
    pub requests: u64,
    /// Requests that a user is known to have seen; the next three are parts of it.
    pub shown: u64,
    pub accepted: u64,
    pub rejected: u64,
    pub edited: u64,
    /// `accepted` of `shown`.
    pub acceptance: Rate,
    pub wins: u64,
    /// Votes on comparisons with this and another arm of the experiment, ties among them.
    pub comparisons: u64,
    /// `wins` of `comparisons`.
    pub win_rate: Rate,
    pub ttft_ms: Percentiles,
    pub tpot_ms: Percentiles,
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
    pub errors: u64,
    /// Of the latest request that came to have its weights.
    pub generation: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, JsonSchema, Serialize)]
pub struct Percentiles {
    pub p50: Option<f64>,
    pub p95: Option<f64>,
}

/// How two arms fared on prompts that both saw.
#[derive(Debug, Clone, PartialEq, JsonSchema, Serialize)]
pub struct PairReport {
    pub a: String,
    pub b: String,
    pub a_wins: u64,
    pub b_wins: u64,
    pub ties: u64,
    /// Of the exact sign test on the wins, two-sided.
    pub p_value: f64,
}

#[derive(Debug, Clone, PartialEq, JsonSchema, Serialize)]
pub struct CanaryReport {
    pub arm: String,
    pub state: CanaryState,
    pub bounds: Bounds,
    /// Unix seconds from which its requests count.
    pub since: i64,
    /// Unix seconds.
    pub rolled_back_at: Option<i64>,
    /// The bound that was broken.
    pub cause: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, JsonSchema, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CanaryState {
    Watching,
    RolledBack,
}

/// Users' answers on one arm's requests.
#[derive(Debug, Clone, Copy, Default)]
struct Judged {
    shown: u64,
    accepted: u64,
    rejected: u64,
    edited: u64,
}

/// Each pair of arms, by index with the smaller first: wins of the first, wins of the second, ties.
type Pairs = BTreeMap<(usize, usize), [u64; 3]>;

/// `models` has the full name of each arm's model, as records have it. Without a store nothing was recorded yet.
pub fn report(
    experiment: &ExperimentConfig,
    models: &[String],
    store: Option<&Store>,
    canary: Option<CanaryReport>,
    promotion: Option<Promotion>,
) -> Result<Report, StoreError> {
    let arms = &experiment.arms;
    let mut pairs: Pairs = (0..arms.len()).flat_map(|a| (a + 1..arms.len()).map(move |b| ((a, b), [0; 3]))).collect();
    let mut judged = vec![Judged::default(); arms.len()];
    let mut contests = vec![(0, 0); arms.len()];
    if let Some(store) = store {
        judge(store, experiment, models, &mut judged, &mut pairs)?;
        contests = compare(store, models, &mut pairs)?;
    }
    let mut reports = Vec::with_capacity(arms.len());
    for (index, arm) in arms.iter().enumerate() {
        let run = match store {
            Some(store) => Run::read(store, &experiment.name, &arm.name, &models[index])?,
            None => Run::default(),
        };
        reports.push(run.into_report(arm, judged[index], contests[index]));
    }
    let pair = |((a, b), [a_wins, b_wins, ties]): ((usize, usize), [u64; 3])| PairReport {
        a: arms[a].name.clone(),
        b: arms[b].name.clone(),
        a_wins,
        b_wins,
        ties,
        p_value: sign_test(a_wins, b_wins),
    };
    let pairs = pairs.into_iter().map(pair).collect();
    let (name, alias) = (experiment.name.clone(), experiment.alias.clone());
    Ok(Report { name, alias, arms: reports, pairs, canary, promotion })
}

/// What one arm's requests cost.
#[derive(Debug, Default)]
struct Run {
    requests: u64,
    errors: u64,
    prompt_tokens: u64,
    completion_tokens: u64,
    ttft_ms: Vec<f64>,
    tpot_ms: Vec<f64>,
    generation: Option<String>,
}

impl Run {
    fn read(store: &Store, experiment: &str, arm: &str, model: &str) -> Result<Self, StoreError> {
        let mut statement = store.connection().prepare(
            "SELECT outcome, prompt_tokens, completion_tokens, ttft_ms, tpot_ms, generation
             FROM requests WHERE experiment = ?1 AND arm = ?2 AND model = ?3 ORDER BY created_ms",
        )?;
        let mut rows = statement.query(params![experiment, arm, model])?;
        let mut run = Self::default();
        while let Some(row) = rows.next()? {
            run.requests += 1;
            run.errors += u64::from(row.get::<_, Outcome>(0)? == Outcome::Failed);
            run.prompt_tokens += u64::from(row.get::<_, u32>(1)?);
            run.completion_tokens += u64::from(row.get::<_, u32>(2)?);
            run.ttft_ms.extend(row.get::<_, Option<f64>>(3)?);
            run.tpot_ms.extend(row.get::<_, Option<f64>>(4)?);
            run.generation = row.get::<_, Option<String>>(5)?.or(run.generation);
        }
        Ok(run)
    }

    fn into_report(mut self, arm: &ArmConfig, judged: Judged, (wins, comparisons): (u64, u64)) -> ArmReport {
        ArmReport {
            name: arm.name.clone(),
            model: arm.model.clone(),
            weight: arm.weight,
            shadow: arm.shadow,
            requests: self.requests,
            shown: judged.shown,
            accepted: judged.accepted,
            rejected: judged.rejected,
            edited: judged.edited,
            acceptance: wilson(judged.accepted, judged.shown),
            wins,
            comparisons,
            win_rate: wilson(wins, comparisons),
            ttft_ms: Percentiles::of(&mut self.ttft_ms),
            tpot_ms: Percentiles::of(&mut self.tpot_ms),
            prompt_tokens: self.prompt_tokens,
            completion_tokens: self.completion_tokens,
            errors: self.errors,
            generation: self.generation,
        }
    }
}

impl Percentiles {
    fn of(values: &mut [f64]) -> Self {
        Self { p50: percentile(values, 50.0), p95: percentile(values, 95.0) }
    }
}

/// Counts how the served requests of each arm were judged. Two arms that were judged on the same prompt are a pair, by the
/// latest judgement of each: the one that was accepted wins.
fn judge(
    store: &Store,
    experiment: &ExperimentConfig,
    models: &[String],
    judged: &mut [Judged],
    pairs: &mut Pairs,
) -> Result<(), StoreError> {
    // A later vote of another user on the same request replaces an earlier one; a view replaces none.
    let mut statement = store.connection().prepare(
        "SELECT r.id, r.arm, r.model, r.prompt_hash, v.kind
         FROM requests r JOIN votes v ON v.id = r.id AND v.sort <> 'winner'
         WHERE r.experiment = ?1 AND NOT r.shadow ORDER BY v.created_ms, v.user",
    )?;
    let mut rows = statement.query([&experiment.name])?;
    let mut requests: HashMap<String, (usize, Option<i64>, VoteKind)> = HashMap::new();
    let mut by_prompt: BTreeMap<i64, BTreeMap<usize, bool>> = BTreeMap::new();
    while let Some(row) = rows.next()? {
        let (id, arm, model): (String, String, String) = (row.get(0)?, row.get(1)?, row.get(2)?);
        let (prompt_hash, kind): (Option<i64>, VoteKind) = (row.get(3)?, row.get(4)?);
        let known = experiment.arms.iter().zip(models).position(|(known, full)| known.name == arm && *full == model);
        let Some(index) = known else { continue };
        let latest = requests.entry(id).or_insert((index, prompt_hash, kind));
        if kind != VoteKind::View {
            latest.2 = kind;
            if let Some(prompt_hash) = prompt_hash {
                by_prompt.entry(prompt_hash).or_default().insert(index, kind == VoteKind::Accepted);
            }
        }
    }
    for (index, _, kind) in requests.into_values() {
        let counts = &mut judged[index];
        counts.shown += 1;
        match kind {
            VoteKind::Accepted => counts.accepted += 1,
            VoteKind::Rejected => counts.rejected += 1,
            VoteKind::Edited => counts.edited += 1,
            VoteKind::View | VoteKind::Winner => {}
        }
    }
    for judgements in by_prompt.values() {
        for (&a, &a_accepted) in judgements {
            for (&b, &b_accepted) in judgements.range(a + 1..) {
                let ended = if a_accepted == b_accepted { 2 } else { usize::from(b_accepted) };
                pairs.entry((a, b)).or_default()[ended] += 1;
            }
        }
    }
    Ok(())
}

/// One user's vote on one comparison: the winner's name, whether an arm of this name is known, and which arms of the
/// experiment were there, under which name.
struct Contest {
    winner: Option<String>,
    has_winner: bool,
    present: BTreeMap<usize, String>,
}

/// Counts the winners of comparisons in which at least two models of the experiment took part. Result, by arm: wins,
/// comparisons.
fn compare(store: &Store, models: &[String], pairs: &mut Pairs) -> Result<Vec<(u64, u64)>, StoreError> {
    let mut statement = store.connection().prepare(
        "SELECT v.id, v.user, v.arm, r.arm, r.model
         FROM votes v JOIN requests r ON r.id = v.id AND r.experiment IS NULL
         WHERE v.sort = 'winner' ORDER BY v.id, v.user",
    )?;
    let mut rows = statement.query([])?;
    // By comparison and user.
    let mut contests: BTreeMap<(String, String), Contest> = BTreeMap::new();
    while let Some(row) = rows.next()? {
        let (winner, arm, model): (Option<String>, String, String) = (row.get(2)?, row.get(3)?, row.get(4)?);
        let contest = contests.entry((row.get(0)?, row.get(1)?));
        let begun = Contest { winner, has_winner: false, present: BTreeMap::new() };
        let Contest { winner, has_winner, present } = contest.or_insert(begun);
        *has_winner |= winner.as_ref() == Some(&arm);
        if let Some(index) = models.iter().position(|known| *known == model) {
            // A model that took part twice, and won, is there as the winner.
            if winner.as_ref() == Some(&arm) || !present.contains_key(&index) {
                present.insert(index, arm);
            }
        }
    }
    let mut counts = vec![(0, 0); models.len()];
    // A vote may come before its comparison has ended, and name an arm that this turns out not to have.
    let counts_for = |contest: &Contest| contest.present.len() > 1 && (contest.has_winner || contest.winner.is_none());
    for Contest { winner, present, .. } in contests.into_values().filter(counts_for) {
        let won = |index: usize| winner.is_some() && present.get(&index) == winner.as_ref();
        for &a in present.keys() {
            counts[a].0 += u64::from(won(a));
            counts[a].1 += 1;
            for (&b, _) in present.range(a + 1..) {
                let pair = pairs.entry((a, b)).or_default();
                match (won(a), won(b)) {
                    (true, _) => pair[0] += 1,
                    (_, true) => pair[1] += 1,
                    // Both lost to a third: nothing is known of these two.
                    _ if winner.is_some() => {}
                    _ => pair[2] += 1,
                }
            }
        }
    }
    Ok(counts)
}
