//! A candidate's way from its check to all of an alias's traffic, or back: its rule, its record, and which step follows
//! which.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::statistics::sign_test;

/// With fewer pairs the sign test cannot come down to [`MAX_P_VALUE`], whatever the candidate does.
pub const FEWEST_PAIRS: usize = 6;

/// The latest ones that a check takes, so that it has an end.
pub const MOST_PAIRS: usize = 500;

/// Places in the queue that a check leaves free.
pub const SPARE_PLACES: usize = 2;

const MAX_P_VALUE: f64 = 0.05;

/// What a candidate must show before it is promoted.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PromotionRule {
    /// Held-out pairs that its check needs.
    pub min_pairs: usize,
    /// Requests of the canary that users have seen, before it is decided.
    pub min_shown: usize,
    /// Share of the users whose feedback is held out; that of `--test` in the export that is trained on.
    #[serde(default = "default_test")]
    pub test: f64,
    /// Whether edits alone are held out, without the outputs that users accepted as they were.
    #[serde(default)]
    pub only_edited: bool,
}

fn default_test() -> f64 {
    0.1
}

/// Where a promotion has come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, JsonSchema, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Measured on held-out feedback; gets no traffic.
    Checking,
    /// Did not pass, and got no traffic.
    Refused,
    /// Passed, and gets the traffic of its arm.
    Canary,
    /// Gets all traffic of the alias.
    Whole,
    /// Got traffic, and gets none any more.
    Back,
    /// Ended by the administrator; gets none any more.
    Withdrawn,
}

impl Stage {
    /// Whether the candidate gets traffic.
    pub fn is_live(self) -> bool {
        matches!(self, Self::Canary | Self::Whole)
    }

    /// Whether it takes a reset to begin another promotion.
    pub fn is_under_way(self) -> bool {
        self == Self::Checking || self.is_live()
    }
}

/// The record of one candidate: what it is, what it was trained on, its check, and what was decided when.
#[derive(Debug, Clone, PartialEq, JsonSchema, Serialize, Deserialize)]
pub struct Promotion {
    pub id: String,
    pub stage: Stage,
    /// The candidate, under the name that it was trained under.
    pub adapter: String,
    /// The content that is promoted, and nothing else under this name.
    pub generation: String,
    /// The arm that it is promoted in.
    pub arm: String,
    /// Unix milliseconds from which requests of the arm are the candidate's, or of what nobody has checked; `None` until it
    /// gets traffic.
    #[serde(default)]
    pub live_from_ms: Option<i64>,
    /// What the arm served before, if that was an adapter that was there.
    pub replaced_generation: Option<String>,
    /// The arm that it is measured against, and the model of that.
    pub incumbent: String,
    pub incumbent_model: String,
    /// The job that trained this content, where this server did.
    pub trained: Option<Trained>,
    /// `None` until it has ended.
    pub check: Option<Check>,
    /// What happened, in order of time; the first is the beginning.
    pub steps: Vec<Step>,
}

/// What a candidate was trained on.
#[derive(Debug, Clone, PartialEq, JsonSchema, Serialize, Deserialize)]
pub struct Trained {
    pub job: String,
    pub training_file: String,
    pub validation_file: Option<String>,
    /// Nats a token.
    pub valid_loss: Option<f64>,
    /// Whether the job is known to have made this content, and its files were still there to be searched for what is held
    /// out, of which they have nothing.
    pub is_verified: bool,
}

/// One turn of a promotion.
#[derive(Debug, Clone, PartialEq, Eq, JsonSchema, Serialize, Deserialize)]
pub struct Step {
    pub stage: Stage,
    /// Unix seconds.
    pub at: i64,
    /// Why, in words.
    pub cause: Option<String>,
}

/// How the candidate fared against the incumbent on what users wanted, and neither was trained on.
#[derive(Debug, Clone, PartialEq, JsonSchema, Serialize, Deserialize)]
pub struct Check {
    /// Pairs that both were measured on.
    pub pairs: usize,
    /// Pairs that do not fit into the context of one of them, or that its template does not take.
    pub left_out: usize,
    /// Pairs whose completion is likelier to the candidate.
    pub wins: u64,
    pub losses: u64,
    /// Of the exact sign test on the two, two-sided.
    pub p_value: f64,
    /// Mean over the pairs of the log-probability of a completion's token, in nats.
    pub candidate_logprob: f64,
    pub incumbent_logprob: f64,
    pub has_passed: bool,
}

impl Check {
    /// `logprobs` has for each pair the log-probability a token: the candidate's, and the incumbent's.
    pub fn new(logprobs: &[(f64, f64)], left_out: usize) -> Self {
        let count = |is_so: fn(&(f64, f64)) -> bool| logprobs.iter().filter(|pair| is_so(pair)).count() as u64;
        let (wins, losses) = (count(|(candidate, incumbent)| candidate > incumbent), count(|(a, b)| a < b));
        let mean = |of: fn(&(f64, f64)) -> f64| logprobs.iter().map(of).sum::<f64>() / logprobs.len().max(1) as f64;
        let (candidate_logprob, incumbent_logprob) = (mean(|pair| pair.0), mean(|pair| pair.1));
        let p_value = sign_test(wins, losses);
        let has_passed = wins > losses && p_value <= MAX_P_VALUE && candidate_logprob > incumbent_logprob;
        Self {
            pairs: logprobs.len(),
            left_out,
            wins,
            losses,
            p_value,
            candidate_logprob,
            incumbent_logprob,
            has_passed,
        }
    }

    fn in_words(&self) -> String {
        let Self { pairs, wins, p_value, candidate_logprob, incumbent_logprob, .. } = self;
        format!(
            "{wins} of {pairs} held-out completions are likelier to it than to the incumbent (p = {p_value:.4}), \
             {candidate_logprob:.4} against {incumbent_logprob:.4} nats a token"
        )
    }
}

/// How a check ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Checked {
    Measured {
        check: Check,
        replaced_generation: Option<String>,
    },
    /// It could not be measured, or not be served; in words.
    Failed {
        check: Option<Check>,
        cause: String,
    },
}

/// Whose a reply of the promoted arm is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Served {
    Candidate,
    /// Begun before the candidate took the arm over.
    Before,
    /// What nobody has checked.
    Stranger,
}

impl Promotion {
    pub fn is_live(&self) -> bool {
        self.stage.is_live()
    }

    /// Whether it is the one with this id, and waits for the end of its check.
    pub(super) fn is_checking(&self, id: &str) -> bool {
        self.id == id && self.stage == Stage::Checking
    }

    /// Takes the next step, at Unix milliseconds.
    pub(super) fn step(&mut self, stage: Stage, now_ms: i64, cause: Option<String>) {
        let why = cause.as_ref().map(|cause| format!(": {cause}")).unwrap_or_default();
        tracing::info!("promotion {} of the adapter {} in {}: {stage:?}{why}", self.id, self.adapter, self.arm);
        self.stage = stage;
        self.steps.push(Step { stage, at: now_ms / 1000, cause });
    }

    /// What follows from its check.
    pub(super) fn take_up(&mut self, checked: Checked, now_ms: i64) {
        match checked {
            Checked::Measured { check, replaced_generation } => {
                let (stage, cause) = (if check.has_passed { Stage::Canary } else { Stage::Refused }, check.in_words());
                self.live_from_ms = check.has_passed.then_some(now_ms);
                (self.check, self.replaced_generation) = (Some(check), replaced_generation);
                self.step(stage, now_ms, Some(cause));
            }
            Checked::Failed { check, cause } => {
                self.check = check;
                self.step(Stage::Refused, now_ms, Some(cause));
            }
        }
    }

    /// `generation` is that of a reply, which has none where it failed before it had weights. What else began before the
    /// candidate had traffic may be of any that came before it, and end at any time.
    pub(super) fn whose(&self, generation: Option<&str>, started_ms: i64) -> Served {
        match generation {
            Some(generation) if generation != self.generation => match self.live_from_ms {
                Some(from) if started_ms >= from => Served::Stranger,
                _ => Served::Before,
            },
            _ => Served::Candidate,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// So many pairs of which the candidate wins, loses and ties, by one nat.
    fn logprobs(wins: usize, losses: usize, ties: usize) -> Vec<(f64, f64)> {
        let repeat = |pair, count| std::iter::repeat_n(pair, count);
        repeat((-1.0, -2.0), wins).chain(repeat((-2.0, -1.0), losses)).chain(repeat((-1.0, -1.0), ties)).collect()
    }

    #[test]
    fn a_check_is_passed_by_more_wins_than_chance_gives() {
        for (wins, losses, ties, has_passed) in [
            (6, 0, 0, true),
            (5, 0, 20, false),
            (15, 5, 0, true),
            (14, 6, 0, false),
            (0, 20, 0, false),
            (0, 0, 9, false),
        ] {
            let check = Check::new(&logprobs(wins, losses, ties), 1);
            assert_eq!(check.has_passed, has_passed, "{check:?}");
            assert_eq!((check.pairs, check.wins, check.losses), (wins + losses + ties, wins as u64, losses as u64));
        }
        assert!(!Check::new(&[], 3).has_passed);
    }

    #[test]
    fn few_great_losses_outweigh_many_small_wins() {
        let mut pairs = vec![(-1.0, -1.01); 20];
        pairs.push((-9.0, -1.0));
        let check = Check::new(&pairs, 0);
        assert!(check.p_value < 0.001 && !check.has_passed, "{check:?}");
        assert!((check.incumbent_logprob - (-20.0 * 1.01 - 1.0) / 21.0).abs() < 1e-12, "{check:?}");
    }

    #[test]
    fn the_fewest_pairs_are_those_that_can_pass() {
        assert!(Check::new(&logprobs(FEWEST_PAIRS, 0, 0), 0).has_passed);
        assert!(!Check::new(&logprobs(FEWEST_PAIRS - 1, 0, 0), 0).has_passed);
    }

    #[test]
    fn a_check_that_is_not_a_number_is_not_passed() {
        assert!(!Check::new(&[(f64::NAN, -1.0); 9], 0).has_passed);
        let mut pairs = logprobs(20, 0, 0);
        pairs.push((f64::NEG_INFINITY, -1.0));
        assert!(!Check::new(&pairs, 0).has_passed);
    }
}
