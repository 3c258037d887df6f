//! Beam search, without the model: which beams go on, and which are the best in the end.
//!
//! Follows transformers' `GenerationMixin._beam_search` (version 5, without sampling), so that the same log-probabilities
//! give the same beams: the candidates of all beams are ranked by the sum of their log-probabilities; those that end
//! count only among the first `num_beams`, with that sum over `length ^ length_penalty`; the rest fill the beams. An
//! output ends with a stop token, which is not a part of it, or with the token that completes a stop string.

use std::sync::Arc;

use crate::engine::request::FinishReason;

/// What a request asks of a beam search.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BeamOptions {
    /// At least 1, and no less than the choices that are returned.
    pub num_beams: usize,
    /// Above 0 favours long outputs, below 0 short ones.
    pub length_penalty: f32,
    /// Ends as soon as `num_beams` outputs have, whether or not others may become better.
    pub early_stopping: bool,
}

#[derive(Debug)]
pub struct BeamSearch {
    options: BeamOptions,
    /// At least 1.
    max_tokens: usize,
    stop_tokens: Arc<[u32]>,
    /// Best first.
    running: Vec<Beam>,
    /// Best first, at most `num_beams`.
    finished: Vec<Hypothesis>,
    num_tokens: usize,
    can_improve: bool,
}

/// An output under way.
#[derive(Debug, Clone, Default)]
pub struct Beam {
    pub tokens: Vec<u32>,
    logprobs: Vec<f32>,
    /// Sum of `logprobs`.
    sum: f32,
}

/// An output that has ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Hypothesis {
    /// Without the stop token.
    pub tokens: Vec<u32>,
    pub logprobs: Vec<f32>,
    /// The sum of the log-probabilities, that of the stop token included, over `length ^ length_penalty`.
    pub score: f32,
    pub reason: FinishReason,
}

impl Hypothesis {
    /// Of a request that wants no tokens.
    pub fn empty() -> Self {
        Self { tokens: Vec::new(), logprobs: Vec::new(), score: 0.0, reason: FinishReason::Length }
    }
}

struct Candidate {
    beam: usize,
    token: u32,
    logprob: f32,
    sum: f32,
}

impl BeamSearch {
    /// `max_tokens` at least 1.
    pub fn new(options: BeamOptions, max_tokens: usize, stop_tokens: Arc<[u32]>) -> Self {
        Self {
            options,
            max_tokens,
            stop_tokens,
            running: vec![Beam::default()],
            finished: Vec::new(),
            num_tokens: 0,
            can_improve: true,
        }
    }

    /// Whether no token has been chosen yet.
    pub fn is_new(&self) -> bool {
        self.num_tokens == 0
    }

    /// Whose next tokens [`BeamSearch::advance`] wants: one before the first token, then `num_beams`.
    pub fn running(&self) -> &[Beam] {
        &self.running
    }

    /// Most likely next tokens of a beam that can matter: `num_beams` that go on, behind all that could end it.
    pub fn num_candidates(&self) -> usize {
        self.options.num_beams + self.stop_tokens.len()
    }

    /// Takes the most likely next tokens of each running beam, with their log-probabilities. `has_stop_string` says it of
    /// the text of an output. Returns whether the search has ended.
    pub fn advance(&mut self, next_tokens: &[Vec<(u32, f32)>], has_stop_string: impl Fn(&[u32]) -> bool) -> bool {
        let num_beams = self.options.num_beams;
        let candidates = self.running.iter().zip(next_tokens).enumerate().flat_map(|(beam, (running, next_tokens))| {
            let sum = running.sum;
            next_tokens.iter().map(move |&(token, logprob)| Candidate { beam, token, logprob, sum: sum + logprob })
        });
        let mut candidates: Vec<Candidate> = candidates.collect();
        // Stable: equals stay in the order of the beams.
        candidates.sort_by(|a, b| b.sum.total_cmp(&a.sum));
        self.num_tokens += 1;
        let is_last = self.num_tokens >= self.max_tokens;
        let mut running = Vec::with_capacity(num_beams);
        let mut ended = Vec::new();
        for (rank, candidate) in candidates.iter().enumerate() {
            if rank >= num_beams && (is_last || running.len() == num_beams) {
                break;
            }
            let beam = self.beam(candidate);
            let has_stop_token = self.stop_tokens.contains(&candidate.token);
            let stops = has_stop_token || has_stop_string(&beam.tokens);
            if !stops && !is_last {
                running.push(beam);
            } else if rank < num_beams {
                let reason = if stops { FinishReason::Stop } else { FinishReason::Length };
                ended.push(self.hypothesis(beam, has_stop_token, reason));
            }
        }
        self.running = running;
        self.finished.extend(ended);
        self.finished.sort_by(|a, b| b.score.total_cmp(&a.score));
        self.finished.truncate(num_beams);
        self.can_improve = self.may_improve();
        is_last || !self.can_improve || (self.options.early_stopping && self.finished.len() == num_beams)
    }

    /// The best first.
    pub fn finish(self) -> Vec<Hypothesis> {
        self.finished
    }

    /// Whether the best running beam, if it ended here, would be among the best.
    fn may_improve(&self) -> bool {
        let Some(best) = self.running.first() else { return false };
        let worst = self.finished.get(self.options.num_beams - 1);
        worst.is_none_or(|worst| self.score(best.sum, self.num_tokens) > worst.score)
    }

    fn score(&self, sum: f32, num_tokens: usize) -> f32 {
        sum / (num_tokens as f32).powf(self.options.length_penalty)
    }

    fn beam(&self, &Candidate { beam, token, logprob, sum }: &Candidate) -> Beam {
        let Beam { tokens, logprobs, .. } = &self.running[beam];
        let (tokens, logprobs) = ([tokens, [token].as_slice()].concat(), [logprobs, [logprob].as_slice()].concat());
        Beam { tokens, logprobs, sum }
    }

    fn hypothesis(&self, beam: Beam, has_stop_token: bool, reason: FinishReason) -> Hypothesis {
        let Beam { mut tokens, mut logprobs, sum } = beam;
        let score = self.score(sum, tokens.len());
        if has_stop_token {
            tokens.pop();
            logprobs.pop();
        }
        Hypothesis { tokens, logprobs, score, reason }
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    const END: u32 = 0;

    fn search(num_beams: usize, max_tokens: usize, length_penalty: f32) -> BeamSearch {
        let options = BeamOptions { num_beams, length_penalty, early_stopping: false };
        BeamSearch::new(options, max_tokens, Arc::new([END]))
    }

    /// Runs to the end over a made-up model: the most likely next tokens after some tokens.
    fn run(search: BeamSearch, model: impl Fn(&[u32]) -> Vec<(u32, f32)>) -> Vec<(Vec<u32>, f32)> {
        run_to_stop_string(search, model, |_| false)
    }

    fn run_to_stop_string(
        mut search: BeamSearch,
        model: impl Fn(&[u32]) -> Vec<(u32, f32)>,
        has_stop_string: impl Fn(&[u32]) -> bool,
    ) -> Vec<(Vec<u32>, f32)> {
        loop {
            let next: Vec<_> = search.running().iter().map(|beam| model(&beam.tokens)).collect();
            if search.advance(&next, &has_stop_string) {
                return search.finish().into_iter().map(|found| (found.tokens, found.score)).collect();
            }
        }
    }

    /// The log-probability of `p`.
    fn ln(p: f32) -> f32 {
        p.ln()
    }

    /// What transformers makes of the made-up models of tests/beams: see reference.py there.
    #[derive(Deserialize)]
    struct Reference {
        first_token: u32,
        stop_tokens: Vec<u32>,
        tables: Vec<Table>,
    }

    #[derive(Deserialize)]
    struct Table {
        /// Of the next token, by the last one.
        logits: Vec<Vec<f32>>,
        cases: Vec<Case>,
    }

    #[derive(Deserialize)]
    struct Case {
        num_beams: usize,
        max_tokens: usize,
        length_penalty: f32,
        early_stopping: bool,
        /// Tokens that end an output and stay, as one does that completes a stop string.
        last_tokens: Vec<u32>,
        /// Without the stop token.
        tokens: Vec<Vec<u32>>,
        scores: Vec<f32>,
    }

    /// The `num_candidates` most likely tokens, the best first.
    fn most_likely(logits: &[f32], num_candidates: usize) -> Vec<(u32, f32)> {
        let log_sum = logits.iter().map(|logit| logit.exp()).sum::<f32>().ln();
        let mut tokens: Vec<_> = (0..).zip(logits).map(|(token, logit)| (token, logit - log_sum)).collect();
        tokens.sort_by(|(_, a), (_, b)| b.total_cmp(a));
        tokens.truncate(num_candidates);
        tokens
    }

    #[test]
    fn the_beams_are_those_of_transformers() {
        let reference: Reference = serde_json::from_str(include_str!("../../tests/beams/reference.json")).unwrap();
        for Table { logits, cases } in &reference.tables {
            for case in cases {
                let &Case { num_beams, max_tokens, length_penalty, early_stopping, .. } = case;
                let options = BeamOptions { num_beams, length_penalty, early_stopping };
                let search = BeamSearch::new(options, max_tokens, reference.stop_tokens.clone().into());
                let num_candidates = search.num_candidates();
                let model = |tokens: &[u32]| {
                    let last = *tokens.last().unwrap_or(&reference.first_token);
                    most_likely(&logits[last as usize], num_candidates)
                };
                let has_stop_string =
                    |tokens: &[u32]| tokens.last().is_some_and(|token| case.last_tokens.contains(token));
                let found = run_to_stop_string(search, model, has_stop_string);
                let (tokens, scores): (Vec<_>, Vec<_>) = found.into_iter().unzip();
                assert_eq!(tokens, case.tokens, "{options:?}");
                for (got, expected) in scores.iter().zip(&case.scores) {
                    assert!((got - expected).abs() < 1e-4 * expected.abs().max(1.0), "{options:?}: {got} {expected}");
                }
            }
        }
    }

    #[test]
    fn one_beam_is_greedy() {
        let model = |tokens: &[u32]| match tokens {
            [] => vec![(1, ln(0.6)), (2, ln(0.4))],
            [1] => vec![(END, ln(0.9)), (3, ln(0.1))],
            _ => vec![(3, ln(0.9)), (END, ln(0.1))],
        };
        let found = run(search(1, 8, 1.0), model);
        assert_eq!(found, [(vec![1], (ln(0.6) + ln(0.9)) / 2.0)]);
    }

    #[test]
    fn a_worse_beginning_with_a_better_end_is_found() {
        let model = |tokens: &[u32]| match tokens {
            [] => vec![(1, ln(0.6)), (2, ln(0.4))],
            [1] => vec![(3, ln(0.5)), (4, ln(0.5))],
            [2] => vec![(5, ln(0.99)), (6, ln(0.01))],
            _ => vec![(END, ln(0.99)), (9, ln(0.01))],
        };
        let found = run(search(2, 8, 1.0), model);
        assert_eq!(found.iter().map(|(tokens, _)| tokens.as_slice()).collect::<Vec<_>>(), [[2, 5], [1, 3]]);
    }

    #[test]
    fn an_end_that_is_not_among_the_first_beams_does_not_count() {
        // Twice the end is third of all: with two beams it is never taken, and both go on to the last token.
        let model = |_: &[u32]| vec![(1, ln(0.5)), (2, ln(0.3)), (END, ln(0.2))];
        let found = run(search(2, 2, 1.0), model);
        assert_eq!(found[0].0, [1, 1]);
        assert!(found.iter().all(|(tokens, _)| tokens.len() == 2));
    }

    #[test]
    fn the_length_penalty_decides_between_short_and_long() {
        let model = |tokens: &[u32]| match tokens {
            [] => vec![(END, ln(0.5)), (1, ln(0.5))],
            [1] | [1, 1] => vec![(1, ln(0.8)), (2, ln(0.2))],
            _ => vec![(END, ln(0.8)), (3, ln(0.2))],
        };
        assert_eq!(run(search(2, 8, 0.0), model)[0].0, [] as [u32; 0]);
        assert_eq!(run(search(2, 8, 1.0), model)[0].0, [1, 1, 1]);
    }

    #[test]
    fn the_search_ends_when_nothing_can_become_better() {
        let mut search = search(1, 100, 1.0);
        assert!(!search.advance(&[vec![(1, ln(0.9)), (END, ln(0.1))]], |_| false));
        assert!(search.advance(&[vec![(END, ln(0.9)), (1, ln(0.05))]], |_| false));
        assert_eq!(search.finish().len(), 1);
    }
}
