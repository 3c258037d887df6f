use std::collections::{BTreeMap, HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::RangeInclusive;
use std::sync::Arc;

use kernels::attention::{BLOCK_SIZE, BlockId};
use proptest::prelude::*;

use super::*;
use crate::adapter::canonical::Adapter;
use crate::engine::request::PromptOutput;

pub(super) fn adapter(generation: &str) -> Arc<Adapter> {
    Arc::new(Adapter { name: generation.to_owned(), generation: generation.to_owned(), ..Adapter::default() })
}

fn sequence(id: u64, num_prompt_tokens: usize, max_tokens: usize) -> Sequence {
    let prompt: Vec<u32> = (0..num_prompt_tokens as u32).map(|position| position + 1000 * id as u32).collect();
    Sequence::new(SequenceId(id), &prompt, max_tokens, None, PromptOutput::Nothing)
}

/// Executes the plan as the engine would, the model saying 7 and sometimes 8. Returns the sequences that ended.
pub(super) fn step(scheduler: &mut Scheduler) -> Vec<SequenceId> {
    scheduler.schedule();
    finish_step(scheduler)
}

pub(super) fn finish_step(scheduler: &mut Scheduler) -> Vec<SequenceId> {
    finish_step_telling(scheduler, |_, _| {})
}

/// `on_token` is told whose token is drawn, and at which position the logits were.
fn finish_step_telling(scheduler: &mut Scheduler, mut on_token: impl FnMut(SequenceId, usize)) -> Vec<SequenceId> {
    let plan = scheduler.plan();
    let position = |row: &usize| {
        let planned = plan.sequences.iter().find(|planned| planned.rows.contains(row)).expect("a row is somebody's");
        planned.first_position + row - planned.rows.start
    };
    let positions: Vec<usize> = plan.logits_rows.iter().map(position).collect();
    scheduler.commit();
    let logits = scheduler.plan().logits.clone();
    let mut ended: Vec<SequenceId> = Vec::new();
    let mut num_drawn: HashMap<SequenceId, usize> = HashMap::new();
    for ((id, logits_use), position) in logits.into_iter().zip(positions) {
        let sequence = scheduler.get_mut(id).expect("a planned sequence runs");
        let num_drawn = num_drawn.entry(id).or_default();
        match logits_use {
            LogitsUse::Sample => {}
            LogitsUse::Verify { index, guess }
                if *num_drawn == index + 1 && sequence.tokens().last() == Some(&guess) =>
            {
                scheduler.accept(id);
            }
            LogitsUse::Verify { .. } | LogitsUse::Score(_) | LogitsUse::Report => continue,
        }
        *num_drawn += 1;
        on_token(id, position);
        let sequence = scheduler.get_mut(id).expect("a planned sequence runs");
        // Output that repeats itself, with surprises.
        sequence.push(if sequence.tokens().len().is_multiple_of(7) { 8 } else { 7 });
        if sequence.is_at_max_tokens() {
            ended.push(id);
        }
    }
    ended.extend(scheduler.computed_without_output().map(Sequence::id));
    for id in &ended {
        scheduler.remove(*id);
    }
    ended
}

fn shares(scheduler: &Scheduler) -> Vec<(u64, usize)> {
    let mut shares: Vec<_> = scheduler.plan().sequences.iter().map(|p| (p.id.0, p.rows.len())).collect();
    shares.sort_unstable();
    shares
}

#[test]
fn decode_rows_go_before_a_long_prefill() {
    let mut scheduler = Scheduler::new(8, 4, 64);
    scheduler.enqueue(sequence(0, 1, 9));
    step(&mut scheduler);
    scheduler.enqueue(sequence(1, 100, 1));
    scheduler.schedule();
    assert_eq!(shares(&scheduler), [(0, 1), (1, 7)]);
}

#[test]
fn a_short_prompt_gets_past_a_long_one() {
    let mut scheduler = Scheduler::new(32, 4, 64);
    scheduler.enqueue(sequence(0, 500, 1));
    scheduler.enqueue(sequence(1, 6, 1));
    scheduler.schedule();
    assert_eq!(shares(&scheduler), [(0, 26), (1, 6)], "what the short one leaves goes back to the long one");
    assert_eq!(finish_step(&mut scheduler), [SequenceId(1)]);
}

#[test]
fn every_prefilling_sequence_gets_rows_while_there_are_some() {
    let mut scheduler = Scheduler::new(32, 4, 64);
    (0..4).for_each(|id| scheduler.enqueue(sequence(id, 100, 1)));
    scheduler.schedule();
    assert_eq!(shares(&scheduler), [(0, 16), (1, 8), (2, 4), (3, 4)]);
}

#[test]
fn sequences_start_first_come_first_served() {
    let mut scheduler = Scheduler::new(64, 8, 4);
    scheduler.enqueue(sequence(0, 2 * BLOCK_SIZE, 1));
    scheduler.enqueue(sequence(1, 3 * BLOCK_SIZE, 1));
    scheduler.enqueue(sequence(2, 1, 1));
    scheduler.schedule();
    assert_eq!(shares(&scheduler), [(0, 32)], "a small sequence does not overtake one that waits for blocks");
    finish_step(&mut scheduler);
    scheduler.schedule();
    assert_eq!(shares(&scheduler)[0].0, 1);
}

#[test]
fn a_common_prefix_is_computed_once() {
    let prompt: Vec<u32> = (0..40).collect();
    let mut scheduler = Scheduler::new(64, 4, 16);
    let mut cached_tokens = |id, adapter, prompt_logprobs| {
        scheduler.enqueue(Sequence::new(SequenceId(id), &prompt, 1, adapter, output_of(prompt_logprobs)));
        scheduler.schedule();
        let first_position = scheduler.plan().sequences[0].first_position;
        assert_eq!(finish_step(&mut scheduler), [SequenceId(id)]);
        first_position
    };
    assert_eq!(cached_tokens(0, None, false), 0);
    assert_eq!(cached_tokens(1, None, false), 39);
    assert_eq!(cached_tokens(2, Some(adapter("a")), false), 0, "another adapter never hits");
    assert_eq!(cached_tokens(3, Some(adapter("b")), false), 0, "another generation never hits");
    assert_eq!(cached_tokens(4, Some(adapter("a")), false), 39);
    assert_eq!(cached_tokens(5, None, true), 0, "a scored prompt needs the logits of every position");
}

#[test]
fn a_wholly_cached_prompt_still_computes_its_last_token() {
    let mut scheduler = Scheduler::new(64, 4, 16);
    for id in 0..2 {
        scheduler.enqueue(Sequence::new(SequenceId(id), &[5; 2 * BLOCK_SIZE], 1, None, PromptOutput::Nothing));
        scheduler.schedule();
        let last = 2 * BLOCK_SIZE - 1;
        assert_eq!(scheduler.plan().sequences[0].first_position, if id == 0 { 0 } else { last });
        finish_step(&mut scheduler);
    }
}

#[test]
fn a_block_that_begins_as_a_cached_one_begins_as_a_copy_of_it() {
    let mut scheduler = Scheduler::new(64, 4, 5);
    let mut prompt: Vec<u32> = (0..40).collect();
    for id in 0..2 {
        scheduler.enqueue(Sequence::new(SequenceId(id), &prompt, 1, None, PromptOutput::Nothing));
        scheduler.schedule();
        let plan = scheduler.plan();
        assert_eq!((plan.copies.len(), plan.sequences[0].first_position), if id == 0 { (0, 0) } else { (1, 20) });
        let num_used = scheduler.blocks_used();
        assert_eq!(num_used, if id == 0 { 3 } else { 4 }, "the block to copy from is held until then");
        finish_step(&mut scheduler);
        prompt[20..].fill(7);
    }
    assert_eq!((scheduler.blocks_used(), scheduler.plan().copies.len()), (0, 0));
}

#[test]
fn a_block_to_copy_from_keeps_nobody_waiting() {
    let mut scheduler = Scheduler::new(64, 4, 2);
    for (id, last) in [(0, 7), (1, 8)] {
        let mut prompt = vec![5; 2 * BLOCK_SIZE];
        prompt[BLOCK_SIZE - 1] = last;
        scheduler.enqueue(Sequence::new(SequenceId(id), &prompt, 1, None, PromptOutput::Nothing));
        assert_eq!(step(&mut scheduler), [SequenceId(id)]);
    }
}

/// The rows of each sequence from now on.
fn rows_until_all_have_ended(scheduler: &mut Scheduler) -> Vec<(u64, usize)> {
    let mut num_rows = BTreeMap::new();
    while !scheduler.is_empty() {
        scheduler.schedule();
        shares(scheduler).into_iter().for_each(|(id, rows)| *num_rows.entry(id).or_default() += rows);
        finish_step(scheduler);
    }
    num_rows.into_iter().collect()
}

#[test]
fn a_prompt_that_another_is_computing_is_not_computed_again() {
    let prompt: Vec<u32> = (0..100).collect();
    for (num_steps, max_tokens) in [(0, 1), (0, 5), (1, 1), (1, 5)] {
        let mut scheduler = Scheduler::new(36, 8, 64);
        let new = |id| Sequence::new(SequenceId(id), &prompt, max_tokens, None, PromptOutput::Nothing);
        scheduler.enqueue(new(0));
        (0..num_steps).for_each(|_| drop(step(&mut scheduler)));
        (1..4).for_each(|id| scheduler.enqueue(new(id)));
        let first = 100 - 36 * num_steps + max_tokens - 1;
        let expected = [(0, first), (1, max_tokens), (2, max_tokens), (3, max_tokens)];
        assert_eq!(rows_until_all_have_ended(&mut scheduler), expected, "{num_steps} {max_tokens}");
        assert_eq!(scheduler.blocks_used(), 0);
    }
}

proptest! {
    #[test]
    fn a_prompt_that_is_sent_again_at_any_time_is_computed_once_for_each_adapter(
        num_prompt_tokens in 33..150usize,
        max_batch_rows in 8..64usize,
        mut arrivals in prop::collection::vec((0..12usize, 0..3usize, 1..4usize), 1..12),
    ) {
        arrivals.sort_unstable_by_key(|(at, ..)| *at);
        let adapters = [None, Some(adapter("a")), Some(adapter("b"))];
        let prompt: Vec<u32> = (0..num_prompt_tokens as u32).collect();
        let mut scheduler = Scheduler::new(max_batch_rows, 16, 256);
        let mut num_rows = [0; 3];
        let mut next = 0;
        for at in 0.. {
            while let Some(&(_, adapter, max_tokens)) = arrivals.get(next).filter(|arrival| arrival.0 <= at) {
                let id = SequenceId(next as u64);
                scheduler.enqueue(Sequence::new(id, &prompt, max_tokens, adapters[adapter].clone(), PromptOutput::Nothing));
                next += 1;
            }
            if scheduler.is_empty() && next == arrivals.len() {
                break;
            }
            scheduler.schedule();
            for (id, rows) in shares(&scheduler) {
                num_rows[arrivals[id as usize].1] += rows;
            }
            finish_step(&mut scheduler);
        }
        for (index, num_rows) in num_rows.into_iter().enumerate() {
            let max_tokens = arrivals.iter().filter(|arrival| arrival.1 == index).map(|arrival| arrival.2);
            let (count, num_decoded) = (max_tokens.clone().count(), max_tokens.sum::<usize>());
            // The first one; of each other one the last token, and fewer than are worth waiting for.
            let most = if count == 0 { 0 } else { num_prompt_tokens - 1 + num_decoded + 15 * (count - 1) };
            prop_assert!(num_rows <= most, "{num_rows} rows of {most} at most");
        }
    }
}

#[test]
fn whoever_follows_a_cancelled_sequence_goes_on_where_it_was() {
    let prompt: Vec<u32> = (0..100).collect();
    let mut scheduler = Scheduler::new(36, 8, 64);
    (0..3).for_each(|id| {
        scheduler.enqueue(Sequence::new(SequenceId(id), &prompt, 1, None, PromptOutput::Nothing));
    });
    (0..2).for_each(|_| drop(step(&mut scheduler)));
    assert_eq!((scheduler.num_running(), scheduler.num_waiting()), (1, 2));
    scheduler.remove(SequenceId(0));
    assert_eq!(rows_until_all_have_ended(&mut scheduler), [(1, 28), (2, 1)]);
}

#[test]
fn none_but_those_who_gain_by_it_wait_for_another() {
    let prompt: Vec<u32> = (0..100).collect();
    let like = |id, num_shared: usize, adapter, prompt_output| {
        let mut prompt = prompt.clone();
        prompt[num_shared..].fill(7);
        Sequence::new(SequenceId(id), &prompt, 1, adapter, prompt_output)
    };
    let mut scheduler = Scheduler::new(256, 8, 64);
    scheduler.enqueue(like(0, 100, None, PromptOutput::Nothing));
    scheduler.enqueue(like(1, 16, None, PromptOutput::Nothing));
    scheduler.enqueue(like(2, 15, None, PromptOutput::Nothing));
    scheduler.enqueue(like(3, 100, Some(adapter("a")), PromptOutput::Nothing));
    scheduler.enqueue(like(4, 100, None, PromptOutput::Logprobs));
    scheduler.schedule();
    assert_eq!(shares(&scheduler).iter().map(|(id, _)| *id).collect::<Vec<_>>(), [0, 2, 3, 4]);
    finish_step(&mut scheduler);
    assert!(rows_until_all_have_ended(&mut scheduler).contains(&(1, 84)));
}

#[test]
fn pinned_prefixes_outlive_prompts_that_came_after_them() {
    let pinned: Vec<u32> = (0..40).collect();
    let mut scheduler = Scheduler::new(128, 4, 8);
    let mut first_position = |id, prompt: &[u32], num_pinned_tokens| {
        let sequence = Sequence::new(SequenceId(id), prompt, 1, None, PromptOutput::Nothing);
        scheduler.enqueue(sequence.with_pinned_prefix(num_pinned_tokens));
        scheduler.schedule();
        let first_position = scheduler.plan().sequences[0].first_position;
        finish_step(&mut scheduler);
        first_position
    };
    first_position(0, &pinned, 32);
    (1..9).for_each(|id| assert_eq!(first_position(id, &[100 + id as u32; 50], 0), 0));
    assert_eq!(first_position(9, &pinned, 32), 32);
    (10..19).for_each(|id| assert_eq!(first_position(id, &[100 + id as u32; 100], 0), 0));
    assert_eq!(first_position(19, &pinned, 0), 16, "a block that was needed by all is given up too");
}

#[test]
fn the_youngest_sequence_makes_room_and_ends_later() {
    let mut scheduler = Scheduler::new(64, 4, 4);
    scheduler.enqueue(sequence(0, BLOCK_SIZE, 2 * BLOCK_SIZE));
    scheduler.enqueue(sequence(1, BLOCK_SIZE, 2 * BLOCK_SIZE));
    let ended: Vec<SequenceId> = (0..200).flat_map(|_| step(&mut scheduler)).collect();
    assert!(scheduler.num_preempted() > 0);
    assert_eq!(ended, [SequenceId(0), SequenceId(1)]);
    assert_eq!(scheduler.blocks_used(), 0);
}

#[test]
fn a_preempted_sequence_scores_no_prompt_token_twice() {
    let mut scheduler = Scheduler::new(64, 4, 4);
    scheduler.enqueue(sequence(0, BLOCK_SIZE, 2 * BLOCK_SIZE));
    let prompt: Vec<u32> = (0..16).collect();
    scheduler.enqueue(Sequence::new(SequenceId(1), &prompt, 2 * BLOCK_SIZE, None, PromptOutput::Logprobs));
    let mut scored = Vec::new();
    for _ in 0..200 {
        scheduler.schedule();
        scored.extend(scheduler.plan().logits.iter().filter_map(|(_, use_)| match use_ {
            LogitsUse::Score(token) => Some(*token),
            _ => None,
        }));
        finish_step(&mut scheduler);
    }
    assert!(scheduler.num_preempted() > 0);
    assert_eq!(scored, (1..16).collect::<Vec<u32>>());
}

#[test]
fn an_idle_scheduler_keeps_no_adapter_alive() {
    let lent = adapter("a");
    let mut scheduler = Scheduler::new(64, 4, 4);
    scheduler.enqueue(Sequence::new(SequenceId(0), &[1], 1, Some(lent.clone()), PromptOutput::Nothing));
    step(&mut scheduler);
    assert_eq!(Arc::strong_count(&lent), 1);
}

#[derive(Debug, Clone)]
enum Action {
    Arrive {
        num_prompt_tokens: usize,
        max_tokens: usize,
        adapter: usize,
        prompt_logprobs: bool,
    },
    Cancel(usize),
    /// The steps from now on take another time than those before.
    Learn(StepRows),
    Step,
}

const MAX_BATCH_ROWS: usize = 24;
const NUM_BLOCKS: usize = 8;

fn output_of(prompt_logprobs: bool) -> PromptOutput {
    if prompt_logprobs { PromptOutput::Logprobs } else { PromptOutput::Nothing }
}

fn actions() -> impl Strategy<Value = Vec<Action>> {
    let arrive = (prop_oneof![1..=4usize, 1..=100usize], 0..=28usize, 0..3usize, any::<bool>()).prop_map(
        |(num_prompt_tokens, max_tokens, adapter, prompt_logprobs)| Action::Arrive {
            num_prompt_tokens,
            max_tokens,
            adapter,
            prompt_logprobs,
        },
    );
    let learn = (0..6usize, prop_oneof![0..40usize, Just(usize::MAX)])
        .prop_map(|(as_base, beside_decoding)| Action::Learn(StepRows { as_base, beside_decoding }));
    let cancel = (0..8usize).prop_map(Action::Cancel);
    let action = prop_oneof![4 => arrive, 2 => cancel, 1 => learn, 12 => Just(Action::Step)];
    prop::collection::vec(action, 1..120)
}

/// Checks a plan against what the model and the promises need; `next_positions` are those of the steps before.
fn check_plan(
    scheduler: &Scheduler,
    next_positions: &mut HashMap<SequenceId, RangeInclusive<usize>>,
    was_preempted: bool,
) {
    let plan = scheduler.plan();
    assert!(plan.tokens.len() <= MAX_BATCH_ROWS);
    let mut row = 0;
    let mut planned_ids = HashSet::new();
    let mut written = HashSet::new();
    for planned in &plan.sequences {
        assert!(planned_ids.insert(planned.id), "planned once");
        assert_eq!(planned.rows.start, row, "rows without gaps");
        assert!(!planned.rows.is_empty());
        row = planned.rows.end;
        let num_drafted = scheduler.sequence(planned).draft().len();
        let end = planned.first_position + planned.rows.len();
        // A guess may have come true or not.
        let expected = next_positions.insert(planned.id, end - num_drafted..=end);
        if let Some(expected) = expected.filter(|_| !was_preempted) {
            assert!(expected.contains(&planned.first_position), "positions without gaps");
        }
        let sequence = scheduler.sequence(planned);
        let block_table = sequence.block_table();
        let end = planned.first_position + planned.rows.len();
        assert!(block_table.len() * BLOCK_SIZE >= end, "blocks cover every position");
        for position in planned.first_position..end {
            assert!(written.insert((block_table[position / BLOCK_SIZE], position % BLOCK_SIZE)), "written by one row");
        }
        let tokens = [sequence.tokens(), sequence.draft()].concat();
        assert_eq!(plan.tokens[planned.rows.clone()], tokens[planned.first_position..end]);
        let guesses = !sequence.draft().is_empty();
        assert!(!guesses || end == tokens.len(), "a guess comes behind the last token's row");
        assert!(!guesses || planned.first_position + 1 == sequence.tokens().len(), "only a decoding sequence guesses");
    }
    assert_eq!(row, plan.tokens.len());
    for other in &scheduler.running {
        let decodes = other.num_uncomputed_tokens() == 1;
        let is_contested = scheduler.running.len() > scheduler.step_rows.uncontested();
        assert!(
            !decodes || is_contested || planned_ids.contains(&other.id()),
            "decode rows that cost little always go"
        );
    }
    for planned in &plan.sequences {
        for (index, _) in planned.rows.clone().enumerate() {
            let block = scheduler.sequence(planned).block_table()[(planned.first_position + index) / BLOCK_SIZE];
            let holders = scheduler.running.iter().filter(|s| s.block_table().contains(&block)).count();
            assert_eq!(holders, 1, "a block that is written is not shared");
        }
    }
    let generations: Vec<_> = plan.groups.iter().map(|group| group.adapter.generation.as_str()).collect();
    assert!(generations.is_sorted_by(|a, b| a < b), "one group for each adapter: {generations:?}");
    for planned in &plan.sequences {
        let group = plan.groups.iter().find(|group| group.rows.contains(&planned.rows.start));
        assert_eq!(group.map(|group| group.adapter.generation.as_str()), scheduler.running[planned.index].generation());
        assert!(group.is_none_or(|group| planned.rows.end <= group.rows.end));
    }
    assert!(plan.logits_rows.is_sorted_by(|a, b| a < b));
    assert!(scheduler.running.is_sorted_by_key(Sequence::id) && scheduler.waiting.iter().is_sorted_by_key(|s| s.id()));
}

/// Of each position in the KV store, the hash of all tokens up to it, as plans have them computed.
#[derive(Default)]
struct Positions(HashMap<(BlockId, usize), u64>);

impl Positions {
    /// Checks that every row finds before it what its sequence needs.
    fn compute(&mut self, scheduler: &Scheduler) {
        let plan = scheduler.plan();
        let copied: Vec<BlockId> = plan.copies.iter().map(|copy| copy.to).collect();
        for copy in &plan.copies {
            assert!(!copied.contains(&copy.from), "copies may be made in any order");
            for offset in 0..BLOCK_SIZE {
                if let Some(hash) = self.0.get(&(copy.from, offset)).copied() {
                    self.0.insert((copy.to, offset), hash);
                }
            }
        }
        for planned in &plan.sequences {
            let sequence = scheduler.sequence(planned);
            let mut hasher = DefaultHasher::new();
            sequence.generation().hash(&mut hasher);
            let tokens = [sequence.tokens(), sequence.draft()].concat();
            for (position, token) in tokens[..planned.first_position + planned.rows.len()].iter().enumerate() {
                token.hash(&mut hasher);
                let slot = (sequence.block_table()[position / BLOCK_SIZE], position % BLOCK_SIZE);
                if position < planned.first_position {
                    assert_eq!(self.0.get(&slot), Some(&hasher.finish()), "{:?} at {position}", planned.id);
                } else {
                    self.0.insert(slot, hasher.finish());
                }
            }
        }
    }
}

proptest! {
    #[test]
    fn any_mix_of_arrivals_cancels_and_ends_keeps_plans_sound_and_returns_everything(
        actions in actions(), max_draft_tokens in 0..20usize,
    ) {
        let adapters = [None, Some(adapter("a")), Some(adapter("b"))];
        let mut scheduler = Scheduler::new(MAX_BATCH_ROWS, 6, NUM_BLOCKS).with_speculation(max_draft_tokens);
        let mut next_positions = HashMap::new();
        let mut positions = Positions::default();
        let mut live: Vec<SequenceId> = Vec::new();
        // Of each sequence, where its next token is drawn, and how many it is to have yet.
        let mut expected: HashMap<SequenceId, (usize, usize)> = HashMap::new();
        let mut next_id = 0;
        let num_actions = actions.len();
        // A tail of steps ends whatever the actions have left.
        let tail = std::iter::repeat_n(Action::Step, 20_000);
        for (index, action) in actions.into_iter().chain(tail).enumerate() {
            if index >= num_actions && live.is_empty() {
                break;
            }
            match action {
                Action::Arrive { num_prompt_tokens, max_tokens, adapter, prompt_logprobs } => {
                    let id = SequenceId(next_id);
                    next_id += 1;
                    live.push(id);
                    expected.insert(id, (num_prompt_tokens - 1, max_tokens));
                    // Few distinct prompts, so that prefixes are shared.
                    let prompt: Vec<u32> =
                        (0..num_prompt_tokens as u32).map(|position| position / 40 * (id.0 % 2) as u32).collect();
                    scheduler.enqueue(Sequence::new(id, &prompt, max_tokens, adapters[adapter].clone(), output_of(prompt_logprobs)));
                }
                Action::Cancel(index) if index < live.len() => scheduler.remove(live.remove(index)),
                Action::Cancel(_) => {}
                Action::Learn(step_rows) => scheduler.set_step_rows(step_rows),
                Action::Step => {
                    let num_preempted = scheduler.num_preempted();
                    scheduler.schedule();
                    let was_preempted = scheduler.num_preempted() > num_preempted;
                    if was_preempted {
                        next_positions.clear();
                    }
                    check_plan(&scheduler, &mut next_positions, was_preempted);
                    positions.compute(&scheduler);
                    prop_assert!(live.is_empty() || !scheduler.plan().sequences.is_empty(), "no deadlock");
                    let ended = finish_step_telling(&mut scheduler, |id, position| {
                        let (next, num_left) = expected.get_mut(&id).expect("it has come");
                        assert_eq!(position, *next, "a token is drawn once, behind the one before");
                        *next += 1;
                        *num_left = num_left.checked_sub(1).expect("no token more than was asked for");
                    });
                    prop_assert!(ended.iter().all(|id| expected[id].1 == 0), "no token less");
                    live.retain(|id| !ended.contains(id));
                }
            }
            prop_assert!(!live.is_empty() || scheduler.blocks_used() == 0, "no sequence, no block");
        }
        prop_assert!(live.is_empty(), "everything ends");
        prop_assert_eq!((scheduler.num_running(), scheduler.num_waiting(), scheduler.blocks_used()), (0, 0, 0));
        prop_assert!(adapters.iter().flatten().all(|adapter| Arc::strong_count(adapter) == 1));
    }
}
