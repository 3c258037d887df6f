//! Draws the next token from the logits, and reads log-probabilities from them.

use std::cmp::Ordering;
use std::collections::HashMap;

use kernels::device::Summary;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::request::{SamplingParams, TokenLogprob};
use crate::grammar::GrammarError;

/// One sequence's sampling state: its parameters, its generator and the tokens it has seen.
#[derive(Debug)]
pub struct Sampler {
    params: SamplingParams,
    rng: ChaCha8Rng,
    /// How often each token of the sequence is in the output, 0 for the prompt alone. Empty unless a penalty is on.
    seen: HashMap<u32, u32>,
}

/// A token and its logit or weight.
type Candidate = (u32, f32);

/// Memory reused by every draw.
#[derive(Debug, Default)]
pub struct Scratch {
    candidates: Vec<Candidate>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SamplingError {
    #[error("the model's logits hold a value that is not a number; check the model and adapter files")]
    NotANumber,
    #[error("no token has a finite logit; check logit_bias, the grammar, and the model and adapter files")]
    NoCandidate,
    #[error(transparent)]
    Grammar(#[from] GrammarError),
}

impl Sampler {
    pub fn new(params: SamplingParams, prompt_tokens: &[u32]) -> Self {
        let rng = ChaCha8Rng::seed_from_u64(params.seed);
        let mut sampler = Self { params, rng, seen: HashMap::new() };
        if sampler.penalizes() {
            sampler.seen.extend(prompt_tokens.iter().map(|&token| (token, 0)));
        }
        sampler
    }

    /// The next token of the sequence, from `logits` `[vocab_size]`, which are used up.
    ///
    /// # Errors
    /// When a logit is NaN, or none is finite.
    pub fn sample(&mut self, logits: &mut [f32], scratch: &mut Scratch) -> Result<u32, SamplingError> {
        self.add_bias(logits);
        self.penalize(logits);
        let max = max_logit(logits)?;
        let token = if self.params.temperature <= 0.0 {
            likeliest(logits, max).ok_or(SamplingError::NoCandidate)? as u32
        } else {
            self.draw(logits, max, &mut scratch.candidates)
        };
        if self.penalizes() {
            *self.seen.entry(token).or_default() += 1;
        }
        Ok(token)
    }

    /// The next token as [`Sampler::sample`] would draw it, if a device's summary of the logits is enough to know it: greedy,
    /// or among no more tokens than the summary has, with the logits as they are.
    pub fn sample_likeliest(
        &mut self,
        summary: &Summary<'_>,
        scratch: &mut Scratch,
    ) -> Option<Result<u32, SamplingError>> {
        let SamplingParams { temperature, top_k, .. } = self.params;
        let is_greedy = temperature <= 0.0;
        let is_enough = is_greedy || (1..summary.ids.len()).contains(&top_k);
        if !is_enough || self.penalizes() || !self.params.logit_bias.is_empty() {
            return None;
        }
        Some(greatest(summary).map(|(token, max)| {
            if is_greedy {
                return token;
            }
            let Scratch { candidates } = scratch;
            candidates.clear();
            candidates.extend(summary.ids.iter().copied().zip(summary.logits.iter().copied()).take(top_k));
            self.draw_among_top(max, candidates)
        }))
    }

    fn penalizes(&self) -> bool {
        let params = &self.params;
        params.repetition_penalty != 1.0 || params.presence_penalty != 0.0 || params.frequency_penalty != 0.0
    }

    fn add_bias(&self, logits: &mut [f32]) {
        for &(token, bias) in &self.params.logit_bias {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit += bias;
            }
        }
    }

    fn penalize(&self, logits: &mut [f32]) {
        let params = &self.params;
        for (&token, &num_output) in &self.seen {
            let Some(logit) = logits.get_mut(token as usize) else { continue };
            *logit = if *logit > 0.0 { *logit / params.repetition_penalty } else { *logit * params.repetition_penalty };
            if num_output > 0 {
                *logit -= params.presence_penalty + params.frequency_penalty * num_output as f32;
            }
        }
    }

    /// One draw. Weights are relative to the most likely token's, which is 1.
    fn draw(&mut self, logits: &mut [f32], max: f32, candidates: &mut Vec<Candidate>) -> u32 {
        let params = &self.params;
        if (1..logits.len()).contains(&params.top_k) {
            select_top(logits, params.top_k, candidates);
            return self.draw_among_top(max, candidates);
        }
        let uniform: f64 = self.rng.random();
        logits.iter_mut().for_each(|logit| *logit = weight(params, max, *logit));
        let total = sum(logits.iter().copied());
        if params.top_p >= 1.0 && params.min_p <= 0.0 {
            return pick(uniform * total, logits.iter().enumerate().map(|(id, &weight)| (id as u32, weight)));
        }
        // All tokens below this weight together are less than what top-p leaves out, so none of them is in it.
        let least = ((1.0 - f64::from(params.top_p)) * total / logits.len() as f64) as f32;
        let least = least.max(params.min_p).min(1.0);
        candidates.clear();
        let weights = logits.iter().enumerate().map(|(id, &weight)| (id as u32, weight));
        candidates.extend(weights.filter(|&(_, weight)| weight >= least));
        candidates.sort_unstable_by(by_falling_value);
        self.draw_among(uniform, total, candidates)
    }

    /// One draw among the `top_k` greatest logits, in falling order.
    fn draw_among_top(&mut self, max: f32, candidates: &mut Vec<Candidate>) -> u32 {
        let uniform: f64 = self.rng.random();
        candidates.iter_mut().for_each(|(_, value)| *value = weight(&self.params, max, *value));
        let total = sum(candidates.iter().map(|&(_, weight)| weight));
        self.draw_among(uniform, total, candidates)
    }

    /// One draw among candidates of falling weights, what top-p and min-p leave of them; all weights add up to `total`.
    fn draw_among(&self, uniform: f64, total: f64, candidates: &mut Vec<Candidate>) -> u32 {
        let params = &self.params;
        truncate_to_nucleus(candidates, f64::from(params.top_p) * total);
        let num_likely = candidates.partition_point(|&(_, weight)| weight >= params.min_p.min(1.0));
        candidates.truncate(num_likely);
        let total = sum(candidates.iter().map(|&(_, weight)| weight));
        pick(uniform * total, candidates.iter().copied())
    }
}

/// A logit's weight, relative to the greatest's.
fn weight(params: &SamplingParams, max: f32, logit: f32) -> f32 {
    ((logit - max) / params.temperature).exp()
}

/// The first token of the greatest logit. As for candidates, 0.0 is greater than -0.0.
fn likeliest(logits: &[f32], max: f32) -> Option<usize> {
    // Of either zero this makes 0.0.
    let greatest = (max + 0.0).to_bits();
    let place = logits.iter().position(|logit| logit.to_bits() == greatest);
    place.or_else(|| logits.iter().position(|&logit| logit == max))
}

/// The likeliest token and its logit.
fn greatest(summary: &Summary<'_>) -> Result<(u32, f32), SamplingError> {
    match (summary.ids.first(), summary.logits.first()) {
        _ if summary.log_sum.is_nan() => Err(SamplingError::NotANumber),
        (Some(&token), Some(&max)) if max.is_finite() => Ok((token, max)),
        _ => Err(SamplingError::NoCandidate),
    }
}

/// As [`log_softmax`], if a device's summary of the logits is enough to know it.
pub fn log_softmax_of_likeliest(summary: &Summary<'_>, token: u32, num_top: usize) -> Option<TokenLogprob> {
    let logprob = |logit: f32| (f64::from(logit) - summary.log_sum) as f32;
    let place = summary.ids.iter().position(|&id| id == token)?;
    let is_enough = num_top <= summary.ids.len() && summary.log_sum.is_finite();
    let top = summary.ids.iter().zip(summary.logits).map(|(&id, &logit)| (id, logprob(logit)));
    is_enough.then(|| TokenLogprob { logprob: logprob(summary.logits[place]), top: top.take(num_top).collect() })
}

/// The log-probability of `token` and of the `num_top` most likely tokens, under the softmax of `logits` `[vocab_size]`.
///
/// # Errors
/// When a logit is NaN, or none is finite.
pub fn log_softmax(
    logits: &[f32],
    token: u32,
    num_top: usize,
    scratch: &mut Scratch,
) -> Result<TokenLogprob, SamplingError> {
    let max = max_logit(logits)?;
    let log_sum = f64::from(max) + sum(logits.iter().map(|&logit| (logit - max).exp())).ln();
    let logprob = |logit: f32| (f64::from(logit) - log_sum) as f32;
    select_top(logits, num_top, &mut scratch.candidates);
    Ok(TokenLogprob {
        logprob: logits.get(token as usize).map_or(f32::NEG_INFINITY, |&logit| logprob(logit)),
        top: scratch.candidates.iter().map(|&(id, logit)| (id, logprob(logit))).collect(),
    })
}

fn sum(weights: impl Iterator<Item = f32>) -> f64 {
    weights.map(f64::from).sum()
}

/// The greatest logit, finite.
fn max_logit(logits: &[f32]) -> Result<f32, SamplingError> {
    // Lanes, because a reduction over single floats cannot be vectorized without changing its order.
    const LANES: usize = 16;
    let mut max = [f32::NEG_INFINITY; LANES];
    let mut any_nan = [false; LANES];
    let mut chunks = logits.chunks_exact(LANES);
    for chunk in &mut chunks {
        for lane in 0..LANES {
            max[lane] = max[lane].max(chunk[lane]);
            any_nan[lane] |= chunk[lane].is_nan();
        }
    }
    let rest = chunks.remainder();
    if any_nan.contains(&true) || rest.iter().any(|logit| logit.is_nan()) {
        return Err(SamplingError::NotANumber);
    }
    let max = max.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max);
    if max.is_finite() { Ok(max) } else { Err(SamplingError::NoCandidate) }
}

/// The greater value first; of equal values, the lower id.
fn by_falling_value(a: &Candidate, b: &Candidate) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// The `k` greatest logits in falling order, without sorting the vocabulary.
fn select_top(logits: &[f32], k: usize, candidates: &mut Vec<Candidate>) {
    candidates.clear();
    if k == 0 {
        return;
    }
    // At most 2k candidates are kept; each time they are full, the lower half sets the bar for what follows.
    let mut bar = f32::NEG_INFINITY;
    for (id, &logit) in logits.iter().enumerate() {
        if logit.total_cmp(&bar).is_gt() || candidates.len() < k {
            candidates.push((id as u32, logit));
            if candidates.len() == 2 * k {
                candidates.select_nth_unstable_by(k - 1, by_falling_value);
                candidates.truncate(k);
                bar = candidates[k - 1].1;
            }
        }
    }
    candidates.sort_unstable_by(by_falling_value);
    candidates.truncate(k);
}

/// Keeps the shortest prefix of the falling weights that reaches `mass`, at least one.
fn truncate_to_nucleus(candidates: &mut Vec<Candidate>, mass: f64) {
    let mut cumulative = 0.0;
    let reached = candidates.iter().position(|&(_, weight)| {
        cumulative += f64::from(weight);
        cumulative >= mass
    });
    if let Some(last) = reached {
        candidates.truncate(last + 1);
    }
}

/// The token in which the cumulative weight passes `point`.
fn pick(point: f64, weights: impl Iterator<Item = Candidate>) -> u32 {
    let mut cumulative = 0.0;
    let mut last = 0;
    for (id, weight) in weights {
        if weight > 0.0 {
            cumulative += f64::from(weight);
            last = id;
            if cumulative > point {
                break;
            }
        }
    }
    last
}

#[cfg(test)]
mod tests;
