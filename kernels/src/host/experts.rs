//! Feed-forwards of experts: which rows go to which, and their products, grouped by expert.
//!
//! A row at one of its experts is a *slot*. Slots lie by expert, those of one expert in the order of their rows, so that every
//! expert that has rows is one pass over its weights.

use std::ops::Range;

use super::linear::{Layer, LinearBuffers, SiteDeltas, run};
use super::{Activations, HostLinear, activate};
use crate::Cpu;
use crate::canonical::{ROUTER, expert_layer};
use crate::device::DeviceError;
use crate::elementwise::sum_rows;
use crate::shape::{DecoderShape, Experts};
use crate::step::{Group, Step};

/// The part of an expert that reads what the other two give.
const DOWN: usize = 2;

/// What lies between router and sum, `[slots, ...]` but for the scores; reused from call to call.
#[derive(Debug, Default)]
pub(super) struct ExpertBuffers {
    /// `[rows, experts]`
    scores: Vec<f32>,
    routing: Routing,
    input: Activations,
    gate: Vec<f32>,
    up: Vec<f32>,
    activated: Activations,
    down: Vec<f32>,
}

/// The feed-forward of a block.
#[derive(Debug, Clone, Copy)]
pub(super) struct ExpertLayers<'a> {
    /// Number of the block.
    pub block: usize,
    pub router: &'a HostLinear,
    /// Their gates, ups and downs.
    pub experts: &'a [Vec<HostLinear>; 3],
}

impl ExpertLayers<'_> {
    /// Writes `[rows, hidden_size]` to `residual`.
    pub fn run(
        self,
        cpu: &Cpu,
        shape: &DecoderShape,
        step: &Step<'_>,
        input: &Activations,
        residual: &mut [f32],
        (buffers, linear): (&mut ExpertBuffers, &mut LinearBuffers),
    ) -> Result<(), DeviceError> {
        let Self { block, router, experts } = self;
        let DecoderShape { hidden_size, intermediate_size, activation, experts: Some(shares), .. } = *shape else {
            return Err(DeviceError::Unsupported("a decoder without experts has none to run".to_owned()));
        };
        let num_rows = step.num_rows();
        let num_slots = num_rows * shares.used;
        let ExpertBuffers { scores, routing, input: slots, gate, up, activated, down } = buffers;
        scores.resize(num_rows * shares.count, 0.0);
        [(&mut slots.exact, hidden_size), (gate, intermediate_size), (up, intermediate_size)]
            .into_iter()
            .chain([(&mut activated.exact, intermediate_size), (down, hidden_size)])
            .for_each(|(buffer, width)| buffer.resize(num_slots * width, 0.0));

        let delta_of_router = |group: usize, _| {
            let Group { rows, weights, .. } = (step.groups.get)(group);
            Some((rows, weights.site(block, ROUTER)?))
        };
        let deltas = SiteDeltas { num_groups: step.groups.count, get: &delta_of_router };
        run(cpu, [Layer::One(router)], &deltas, input, [&mut *scores], linear)?;
        routing.route(scores, shares, step);

        slots.quantized.fill(cpu, num_slots, hidden_size, &mut slots.exact, &|slot, x| {
            x.copy_from_slice(&input.exact[routing.slots[slot].row * hidden_size..][..hidden_size]);
        });
        let [gates, ups, downs] = experts.each_ref().map(|experts| PartOfExperts { experts, routing });
        let delta_of_expert = |run: usize, part: usize| {
            let Run { expert, group, slots } = &routing.runs[run];
            let weights = (step.groups.get)(*group).weights;
            Some((slots.clone(), weights.site(block, expert_layer(*expert, part))?))
        };
        let deltas = SiteDeltas { num_groups: routing.runs.len(), get: &delta_of_expert };
        let outs = [gate.as_mut_slice(), up.as_mut_slice()];
        run(cpu, [Layer::ByExpert(&gates), Layer::ByExpert(&ups)], &deltas, slots, outs, linear)?;
        activate(cpu, activation, num_slots, gate, up, activated);
        let deltas = SiteDeltas { num_groups: routing.runs.len(), get: &|run, _| delta_of_expert(run, DOWN) };
        run(cpu, [Layer::ByExpert(&downs)], &deltas, activated, [down.as_mut_slice()], linear)?;
        sum_rows(cpu, hidden_size, down, &routing.terms, &mut residual[..num_rows * hidden_size]);
        Ok(())
    }
}

/// Gate, up or down of the experts that have rows. They are of one shape and one type, and have no bias.
#[derive(Debug)]
pub(super) struct PartOfExperts<'a> {
    experts: &'a [HostLinear],
    routing: &'a Routing,
}

impl<'a> PartOfExperts<'a> {
    /// How many have rows; at least one.
    pub fn num_active(&self) -> usize {
        self.routing.active.len()
    }

    /// The slots of one of them, which follow those of the one before, and the layer.
    pub fn active(&self, number: usize) -> (Range<usize>, &'a HostLinear) {
        let (expert, slots) = &self.routing.active[number];
        (slots.clone(), &self.experts[*expert])
    }
}

/// Which experts the rows of a step go to; reused from call to call.
#[derive(Debug, Default)]
struct Routing {
    /// `[rows, used]`: the experts of a row, the best first, and their scores.
    chosen: Vec<(usize, f32)>,
    /// `[rows, used]`: the slots of a row in the same order, and their shares of the sum.
    terms: Vec<(usize, f32)>,
    slots: Vec<Slot>,
    /// `[experts]`: where the next slot of each goes while slots are dealt.
    next: Vec<usize>,
    /// The experts that have rows, ascending, and their slots.
    active: Vec<(usize, Range<usize>)>,
    /// Slots in a row that have expert and adapter in common.
    runs: Vec<Run>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    row: usize,
    /// The adapter group of the row.
    group: Option<usize>,
}

#[derive(Debug)]
struct Run {
    expert: usize,
    group: usize,
    slots: Range<usize>,
}

impl Routing {
    /// `scores` are `[rows, experts]`, before the softmax.
    fn route(&mut self, scores: &[f32], experts: Experts, step: &Step<'_>) {
        let Self { chosen, terms, slots, next, active, runs } = self;
        [&mut *chosen, &mut *terms].into_iter().for_each(Vec::clear);
        for scores in scores.chunks_exact(experts.count) {
            let first = chosen.len();
            for (expert, &score) in scores.iter().enumerate() {
                // Behind all that are not worse: of equal ones, the lower number is the better.
                let place = first + chosen[first..].partition_point(|(_, other)| *other >= score);
                chosen.insert(place, (expert, score));
                chosen.truncate(first + experts.used);
            }
            let best = chosen[first].1;
            let share = |score: f32| (score - best).exp();
            let total: f32 = if experts.normalizes_shares {
                chosen[first..].iter().map(|(_, score)| share(*score)).sum()
            } else {
                scores.iter().map(|score| share(*score)).sum()
            };
            terms.extend(chosen[first..].iter().map(|(_, score)| (0, share(*score) / total)));
        }

        next.clear();
        next.resize(experts.count, 0);
        chosen.iter().for_each(|(expert, _)| next[*expert] += 1);
        active.clear();
        let mut end = 0;
        for (expert, next) in next.iter_mut().enumerate() {
            let start = end;
            end += std::mem::replace(next, start);
            if start < end {
                active.push((expert, start..end));
            }
        }
        slots.clear();
        slots.resize(chosen.len(), Slot::default());
        for (i, (expert, _)) in chosen.iter().enumerate() {
            terms[i].0 = next[*expert];
            slots[next[*expert]].row = i / experts.used;
            next[*expert] += 1;
        }
        runs.clear();
        if step.groups.count == 0 {
            return;
        }
        for (expert, of_expert) in active.iter() {
            let mut groups = step.groups.iter().enumerate().peekable();
            for slot in &mut slots[of_expert.clone()] {
                while groups.next_if(|(_, group)| group.rows.end <= slot.row).is_some() {}
                slot.group = groups.peek().filter(|(_, group)| group.rows.start <= slot.row).map(|(group, _)| *group);
            }
            let mut start = of_expert.start;
            for slots in slots[of_expert.clone()].chunk_by(|a, b| a.group == b.group) {
                let end = start + slots.len();
                runs.extend(slots[0].group.map(|group| Run { expert: *expert, group, slots: start..end }));
                start = end;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::canonical::AdapterWeights;
    use crate::step::Groups;

    const EXPERTS: Experts = Experts { count: 4, used: 2, normalizes_shares: true };

    /// Three rows, of which the first two are of one adapter and the last of another.
    fn route(scores: &[f32; 12], experts: Experts) -> Routing {
        let weights = [AdapterWeights::default(), AdapterWeights::default()];
        let get = |i: usize| Group { rows: [0..2, 2..3][i].clone(), generation: "", weights: &weights[i] };
        let step = Step {
            copies: &[],
            tokens: &[0; 3],
            sequences: &[],
            groups: Groups { count: 2, get: &get },
            logits_rows: &[],
        };
        let mut routing = Routing::default();
        routing.route(scores, experts, &step);
        routing
    }

    #[test]
    fn equal_scores_go_to_the_lower_number_and_shares_add_up_to_one() {
        let routing = route(&[1.0, 3.0, 3.0, 3.0, 2.0, 2.0, 2.0, 2.0, 0.0, 1.0, -1.0, 5.0], EXPERTS);
        let experts: Vec<usize> = routing.chosen.iter().map(|(expert, _)| *expert).collect();
        assert_eq!(experts, [1, 2, 0, 1, 3, 1]);
        for terms in routing.terms.chunks(2) {
            assert!((terms[0].1 + terms[1].1 - 1.0).abs() < 1e-6 && terms[0].1 >= terms[1].1);
        }
        let among_all = route(&[2.0; 12], Experts { normalizes_shares: false, ..EXPERTS });
        assert!(among_all.terms.iter().all(|(_, share)| *share == 0.25));
    }

    #[test]
    fn slots_lie_by_expert_then_by_row_and_runs_keep_adapters_apart() {
        let routing = route(&[9.0, 8.0, 0.0, 0.0, 9.0, 8.0, 0.0, 0.0, 0.0, 9.0, 0.0, 8.0], EXPERTS);
        let rows: Vec<usize> = routing.slots.iter().map(|slot| slot.row).collect();
        assert_eq!(rows, [0, 1, 0, 1, 2, 2]);
        assert_eq!(routing.active, [(0, 0..2), (1, 2..5), (3, 5..6)]);
        let slots: Vec<usize> = routing.terms.iter().map(|(slot, _)| *slot).collect();
        assert_eq!(slots, [0, 2, 1, 3, 4, 5]);
        let runs: Vec<_> = routing.runs.iter().map(|run| (run.expert, run.group, run.slots.clone())).collect();
        assert_eq!(runs, [(0, 0, 0..2), (1, 0, 2..4), (1, 1, 4..5), (3, 1, 5..6)]);
    }

    #[test]
    fn scores_that_are_no_numbers_still_give_every_row_its_experts() {
        let routing = route(&[f32::NAN; 12], EXPERTS);
        assert_eq!(routing.slots.len(), 6);
        assert!(routing.terms.iter().all(|(slot, share)| *slot < 6 && share.is_nan()));
    }
}
