//! How long a step of so many rows takes, learned from the steps before: `base + rows * per_row`, by least squares over the
//! last few dozen.

use std::time::Duration;

use super::scheduler::StepRows;

/// What a step's weight becomes with each one after it.
const DECAY: f64 = 0.97;
/// Least variance of the rows from which anything can be said of one row, and least steps.
const MIN_VARIANCE: f64 = 4.0;
const MIN_STEPS: f64 = 8.0;
/// Of a step's time, the least that a row is taken to need: on a card it may be less than what can be seen.
const MIN_SHARE_OF_ROW: f64 = 1e-3;
/// A step that took so many times what was expected says something of the machine and nothing of its rows …
const MAX_SURPRISE: f64 = 8.0;
/// … but so many one after the other say that the machine is another one now: what was learned of it is out of date.
const MAX_SURPRISES: usize = 8;

#[derive(Debug, Default)]
pub struct StepCost {
    all: Fit,
    /// Of the steps whose rows all have logits. Rows of prompts have none and see less, so they cost less than those that decode; one
    /// line through both would take the difference for something that every step has.
    decoding: Fit,
}

impl StepCost {
    /// A step of `num_rows` rows, `num_logits_rows` of them with logits.
    pub fn observe(&mut self, num_rows: usize, num_logits_rows: usize, time: Duration) {
        self.all.observe(num_rows, time);
        if num_logits_rows == num_rows {
            self.decoding.observe(num_rows, time);
        }
    }

    /// What steps should hold; `max_inter_token` is the most that a stream is to wait for its next token.
    pub fn step_rows(&self, max_inter_token: Option<Duration>) -> StepRows {
        let unknown = StepRows::default();
        let as_base = self.decoding.line.map_or(unknown.as_base, |line| (line.base / line.per_row) as usize);
        let within = |limit: Duration, line: Line| ((limit.as_secs_f64() - line.base) / line.per_row).max(0.0) as usize;
        let beside_decoding =
            self.all.line.zip(max_inter_token).map_or(unknown.beside_decoding, |(line, limit)| within(limit, line));
        StepRows { as_base, beside_decoding }
    }
}

#[derive(Debug, Default)]
struct Fit {
    steps: f64,
    rows: f64,
    seconds: f64,
    rows_squared: f64,
    rows_seconds: f64,
    /// Steps since the last one that took about what was expected.
    num_surprises: usize,
    /// Of the last steps of different sizes.
    line: Option<Line>,
}

#[derive(Debug, Clone, Copy)]
struct Line {
    base: f64,
    per_row: f64,
}

impl Fit {
    fn observe(&mut self, num_rows: usize, time: Duration) {
        let (rows, seconds) = (num_rows as f64, time.as_secs_f64());
        if self.line.is_some_and(|line| seconds > MAX_SURPRISE * (line.base + rows * line.per_row)) {
            self.num_surprises += 1;
            if self.num_surprises < MAX_SURPRISES {
                return;
            }
            *self = Self::default();
        }
        self.num_surprises = 0;
        for (sum, value) in [
            (&mut self.steps, 1.0),
            (&mut self.rows, rows),
            (&mut self.seconds, seconds),
            (&mut self.rows_squared, rows * rows),
            (&mut self.rows_seconds, rows * seconds),
        ] {
            *sum = *sum * DECAY + value;
        }
        let mean = |sum: f64| sum / self.steps;
        let (mean_rows, mean_seconds) = (mean(self.rows), mean(self.seconds));
        let variance = mean(self.rows_squared) - mean_rows * mean_rows;
        let per_row = (mean(self.rows_seconds) - mean_rows * mean_seconds) / variance;
        if self.steps >= MIN_STEPS && variance >= MIN_VARIANCE {
            let per_row = per_row.max(MIN_SHARE_OF_ROW * mean_seconds);
            self.line = Some(Line { base: (mean_seconds - mean_rows * per_row).max(0.0), per_row });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Option<Duration> = Some(Duration::from_millis(200));

    fn observe(cost: &mut StepCost, rows: impl IntoIterator<Item = usize>, base: f64, per_row: f64) {
        for num_rows in rows {
            cost.observe(num_rows, num_rows, Duration::from_secs_f64(base + per_row * num_rows as f64));
        }
    }

    #[test]
    fn rows_are_known_once_steps_of_different_sizes_were_seen() {
        let mut cost = StepCost::default();
        assert_eq!(cost.step_rows(LIMIT), StepRows::default());
        observe(&mut cost, [4; 100], 0.014, 0.0034);
        assert_eq!(cost.step_rows(LIMIT), StepRows::default(), "all alike");
        observe(&mut cost, (0..20).map(|step| 4 + step % 13), 0.014, 0.0034);
        assert_eq!(cost.step_rows(LIMIT), StepRows { as_base: 4, beside_decoding: 54 });
        assert_eq!(cost.step_rows(None).beside_decoding, usize::MAX);
    }

    #[test]
    fn what_a_step_takes_is_that_of_late() {
        let mut cost = StepCost::default();
        observe(&mut cost, (0..50).map(|step| step % 9), 0.014, 0.0034);
        observe(&mut cost, (0..500).map(|step| step % 9), 0.028, 0.0068);
        let StepRows { as_base, beside_decoding } = cost.step_rows(LIMIT);
        assert!((3..=4).contains(&as_base) && (24..=26).contains(&beside_decoding), "{beside_decoding}");
    }

    #[test]
    fn rows_that_cost_nothing_are_taken_to_cost_little() {
        let mut cost = StepCost::default();
        observe(&mut cost, (0..50).map(|step| 1 + step % 9), 0.003, 0.0);
        assert!(cost.step_rows(LIMIT).as_base > 900, "{:?}", cost.step_rows(LIMIT));
    }

    #[test]
    fn a_machine_that_stood_still_says_nothing_of_rows() {
        let mut cost = StepCost::default();
        observe(&mut cost, (0..50).map(|step| step % 9), 0.014, 0.0034);
        let before = cost.step_rows(LIMIT);
        cost.observe(3, 3, Duration::from_secs(5));
        assert_eq!(cost.step_rows(LIMIT), before);
    }

    #[test]
    fn a_machine_that_has_become_slow_for_good_is_learned_anew() {
        let mut cost = StepCost::default();
        observe(&mut cost, (0..50).map(|step| step % 9), 0.014, 0.0034);
        let before = cost.step_rows(LIMIT);
        // Now and then it says nothing, however often.
        for _ in 0..20 {
            observe(&mut cost, [3; MAX_SURPRISES - 1], 5.0, 0.0);
            observe(&mut cost, [3], 0.014, 0.0034);
        }
        assert_eq!(cost.step_rows(LIMIT), before);
        observe(&mut cost, (0..50).map(|step| step % 9), 0.28, 0.034);
        let seconds = Some(Duration::from_secs(1));
        assert_eq!(cost.step_rows(seconds), StepRows { as_base: 8, beside_decoding: 21 });
    }

    #[test]
    fn a_step_that_takes_longer_than_a_stream_may_wait_leaves_no_rows() {
        let mut cost = StepCost::default();
        observe(&mut cost, (0..50).map(|step| step % 9), 0.5, 0.1);
        assert_eq!(cost.step_rows(LIMIT).beside_decoding, 0);
    }

    #[test]
    fn cheap_rows_of_prompts_say_nothing_of_those_that_decode() {
        let mut cost = StepCost::default();
        let time = |num_decoding: usize, num_prefilling: usize| {
            Duration::from_secs_f64(0.014 + 0.0034 * num_decoding as f64 + 0.001 * num_prefilling as f64)
        };
        for step in 0..200 {
            let num_decoding = 4 + step % 13;
            cost.observe(num_decoding + 64, num_decoding + 1, time(num_decoding, 64));
            cost.observe(num_decoding, num_decoding, time(num_decoding, 0));
        }
        assert_eq!(cost.step_rows(LIMIT).as_base, 4);
    }
}
