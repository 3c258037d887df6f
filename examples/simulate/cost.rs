//! How long a step takes: so much for each thing that it has to do, fitted to what `lorry bench` has measured.

use std::array;

use lorry::bench::Report;
use lorry::engine::EngineConfig;
use lorry::engine::request::PromptOutput;
use lorry::engine::scheduler::Scheduler;
use lorry::engine::sequence::{Sequence, SequenceId};

use crate::machine::Machine;
use crate::replica::adapter;

/// What [`Work`] counts, in order.
pub const TERMS: [&str; 6] = ["step", "row with logits", "row without", "position seen", "adapter", "row with adapter"];

/// What a step, or several, have to do.
#[derive(Debug, Clone, Copy, Default)]
pub struct Work([f64; TERMS.len()]);

impl Work {
    pub fn of_plan(scheduler: &Scheduler) -> Self {
        let plan = scheduler.plan();
        let num_logits = plan.logits_rows.len();
        let positions = plan.sequences.iter().map(|planned| {
            let (first, num_rows) = (planned.first_position, planned.rows.len());
            num_rows * first + num_rows * (num_rows + 1) / 2
        });
        let counts = [
            1,
            num_logits,
            plan.tokens.len() - num_logits,
            positions.sum(),
            plan.groups.len(),
            plan.groups.iter().map(|group| group.rows.len()).sum(),
        ];
        Self(counts.map(|count| count as f64))
    }

    pub fn num_rows(&self) -> f64 {
        self.0[1] + self.0[2]
    }

    fn add(&mut self, other: &Self) {
        self.0 = array::from_fn(|term| self.0[term] + other.0[term]);
    }
}

/// Seconds for one of each.
#[derive(Debug, Clone, Default)]
pub struct Cost(pub [f64; TERMS.len()]);

/// What was measured of some work, in seconds.
#[derive(Debug, Clone, Copy)]
struct Observed {
    work: Work,
    seconds: f64,
}

/// Times that the work of the runs is planned and the cost fitted to it: how a step is filled depends on what rows cost.
const NUM_ROUNDS: usize = 3;
const NUM_SWEEPS: usize = 20_000;

impl Cost {
    pub fn seconds(&self, work: &Work) -> f64 {
        self.0.iter().zip(work.0).map(|(seconds, count)| seconds * count).sum()
    }

    /// Fits the cost to `reports`, with the work that the scheduler plans for what they measured. Returns the largest share by which a
    /// measured time is missed, too.
    ///
    /// # Errors
    /// Where they are too few to say anything.
    pub fn fit(reports: &[Report], config: &EngineConfig) -> Result<(Self, f64), String> {
        if reports.len() < 3 {
            return Err(format!(
                "{} runs of `lorry bench` are too few to fit a cost to: measure several batches, prompts and adapters",
                reports.len()
            ));
        }
        // At first a step is all that costs.
        let mut cost = Self(array::from_fn(|term| if term == 0 { 1e-2 } else { 1e-3 }));
        let mut observed = Vec::new();
        for _ in 0..NUM_ROUNDS {
            observed = reports.iter().flat_map(|report| observe(report, config, &cost)).collect();
            cost = solve(&observed);
        }
        let miss = |observed: &Observed| (cost.seconds(&observed.work) / observed.seconds - 1.0).abs();
        Ok((cost.clone(), observed.iter().map(miss).fold(0.0, f64::max)))
    }
}

/// The work of a run of `lorry bench` up to its last first token, and behind it.
fn observe(report: &Report, config: &EngineConfig, cost: &Cost) -> [Observed; 2] {
    let num_tokens = report.prompt_tokens + report.max_tokens;
    let num_blocks = 2 * report.batch * num_tokens.div_ceil(kernels::attention::BLOCK_SIZE);
    let mut machine = Machine::new(config, num_blocks);
    for index in 0..report.batch {
        let prompt: Vec<u32> =
            (0..report.prompt_tokens).map(|position| (index * num_tokens + position) as u32).collect();
        let adapter = (report.num_adapters > 0).then(|| adapter(&format!("a{}", index % report.num_adapters)));
        let id = SequenceId(index as u64);
        machine.enqueue(Sequence::new(id, &prompt, report.max_tokens, adapter, PromptOutput::Nothing));
    }
    let (mut prefill, mut decode, mut num_decoded) = (Work::default(), Work::default(), 0);
    let mut is_begun = vec![false; report.batch];
    while let Some((work, _)) = machine.begin_step(cost) {
        let is_decode = is_begun.iter().all(|is_begun| *is_begun);
        if is_decode {
            decode.add(&work)
        } else {
            prefill.add(&work)
        }
        machine.end_step(|id, _| {
            is_begun[id.0 as usize] = true;
            num_decoded += usize::from(is_decode);
        });
    }
    let prefill_seconds = (report.prompt_tokens * report.batch) as f64 / report.prefill_tok_s;
    let decode_seconds = num_decoded as f64 / report.decode_tok_s;
    [Observed { work: prefill, seconds: prefill_seconds }, Observed { work: decode, seconds: decode_seconds }]
}

/// Least squares of the relative misses, with no cost below zero: one term after the other, until nothing changes.
fn solve(observed: &[Observed]) -> Cost {
    let rows: Vec<[f64; TERMS.len()]> = observed
        .iter()
        .filter(|observed| observed.seconds.is_finite() && observed.seconds > 0.0)
        .map(|observed| observed.work.0.map(|count| count / observed.seconds))
        .collect();
    let mut cost = [0.0; TERMS.len()];
    for term in (0..TERMS.len()).cycle().take(NUM_SWEEPS * TERMS.len()) {
        let (mut squares, mut products) = (0.0, 0.0);
        for row in &rows {
            let all: f64 = row.iter().zip(cost).map(|(work, cost)| work * cost).sum();
            squares += row[term] * row[term];
            products += row[term] * (1.0 - all + row[term] * cost[term]);
        }
        cost[term] = if squares > 0.0 { f64::max(products / squares, 0.0) } else { 0.0 };
    }
    Cost(cost)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::{CONFIG, TRUE_COST};

    /// What `lorry bench` would say of a machine with this cost.
    fn report(prompt_tokens: usize, batch: usize, num_adapters: usize, cost: &Cost) -> Report {
        let mut report = Report {
            model: String::new(),
            device: String::new(),
            prompt_tokens,
            max_tokens: 32,
            batch,
            num_adapters,
            prefill_tok_s: 1.0,
            decode_tok_s: 1.0,
            ttft_ms: lorry::bench::Ttft { p50: 0.0, max: 0.0 },
            bandwidth_share: None,
            int8_share: None,
            decode_int8_share: None,
        };
        let [prefill, decode] = observe(&report, &CONFIG, cost);
        report.prefill_tok_s = (prompt_tokens * batch) as f64 / cost.seconds(&prefill.work);
        report.decode_tok_s = decode.seconds / cost.seconds(&decode.work);
        report
    }

    #[test]
    fn a_cost_is_found_again_in_what_it_makes() {
        let truth = Cost(TRUE_COST);
        let cases = [(16, 1), (16, 4), (16, 16), (512, 1), (512, 8), (1024, 1), (64, 32)];
        let reports: Vec<_> = cases
            .into_iter()
            .flat_map(|(prompt_tokens, batch)| [0, 1, 8].map(|adapters| (prompt_tokens, batch, adapters)))
            .map(|(prompt_tokens, batch, adapters)| report(prompt_tokens, batch, adapters, &truth))
            .collect();
        let (cost, miss) = Cost::fit(&reports, &CONFIG).unwrap();
        assert!(miss < 0.02, "{miss} {cost:?}");
        for (term, name) in TERMS.iter().enumerate().take(4) {
            assert!((cost.0[term] / truth.0[term] - 1.0).abs() < 0.1, "{name}: {cost:?}");
        }
    }

    #[test]
    fn too_few_runs_are_refused() {
        assert!(Cost::fit(&[], &CONFIG).unwrap_err().contains("too few"));
    }
}
