//! Who gets how much of a busy machine.

use std::collections::{HashMap, HashSet};
use std::num::NonZeroU32;
use std::sync::Arc;

use kernels::attention::BLOCK_SIZE;
use proptest::prelude::*;

use super::tests::{adapter, finish_step, step};
use super::*;
use crate::engine::fairness::{Account, Priority};
use crate::engine::request::PromptOutput;

const MAX_SEQUENCES: usize = 32;

fn account(key: &str, weight: u32, priority: Priority) -> Account {
    Account { key: Arc::from(key), weight: NonZeroU32::new(weight).unwrap(), priority }
}

fn scheduler() -> Scheduler {
    Scheduler::new(256, MAX_SEQUENCES, 1024)
}

/// A load: sequences of one account, of which a new one comes as soon as one has ended.
struct Clients {
    account: Account,
    adapter: Option<&'static str>,
    num_prompt_tokens: usize,
    max_tokens: usize,
    ids: Vec<SequenceId>,
    /// Tokens of the sequences that have ended, and how many those are.
    num_tokens: usize,
    num_ended: usize,
    /// Of all sequences, the rows that steps had.
    num_rows: usize,
    /// Of each sequence that has begun to run, the steps that it waited.
    waits: Vec<usize>,
}

impl Clients {
    fn new(account: Account, adapter: Option<&'static str>, num_prompt_tokens: usize, max_tokens: usize) -> Self {
        Self {
            account,
            adapter,
            num_prompt_tokens,
            max_tokens,
            ids: Vec::new(),
            num_tokens: 0,
            num_ended: 0,
            num_rows: 0,
            waits: Vec::new(),
        }
    }

    fn send(&mut self, scheduler: &mut Scheduler, next_id: &mut u64) {
        let prompt: Vec<u32> = (0..self.num_prompt_tokens as u32).map(|at| at + 1000 * *next_id as u32).collect();
        let id = SequenceId(*next_id);
        *next_id += 1;
        let adapter = self.adapter.map(adapter);
        let sequence = Sequence::new(id, &prompt, self.max_tokens, adapter, PromptOutput::Nothing);
        scheduler.enqueue(sequence.for_account(self.account.clone()));
        self.ids.push(id);
    }
}

/// So many clients of each kind, one request after the other.
fn run(scheduler: &mut Scheduler, loads: &mut [(usize, Clients)], num_steps: usize) {
    let mut next_id = 0;
    for (num_clients, clients) in &mut *loads {
        (0..*num_clients).for_each(|_| clients.send(scheduler, &mut next_id));
    }
    let (mut waited, mut has_begun): (HashMap<SequenceId, usize>, HashSet<SequenceId>) = Default::default();
    for _ in 0..num_steps {
        scheduler.schedule();
        let begun: HashMap<_, _> =
            scheduler.plan().sequences.iter().map(|planned| (planned.id, planned.rows.len())).collect();
        for (_, clients) in &mut *loads {
            for id in &clients.ids {
                clients.num_rows += begun.get(id).copied().unwrap_or(0);
                if has_begun.contains(id) {
                    continue;
                }
                if begun.contains_key(id) {
                    has_begun.insert(*id);
                    clients.waits.push(waited.remove(id).unwrap_or(0));
                } else {
                    *waited.entry(*id).or_default() += 1;
                }
            }
        }
        let ended = finish_step(scheduler);
        for (_, clients) in &mut *loads {
            let num_before = clients.ids.len();
            clients.ids.retain(|id| !ended.contains(id));
            for _ in clients.ids.len()..num_before {
                clients.num_tokens += clients.num_prompt_tokens + clients.max_tokens;
                clients.num_ended += 1;
                clients.send(scheduler, &mut next_id);
            }
        }
    }
}

#[test]
fn two_keys_get_tokens_by_their_weights_whether_slots_or_rows_are_what_is_short() {
    for (num_clients, weights) in [(12, [3, 1]), (60, [3, 1]), (24, [1, 1]), (16, [1, 7])] {
        let keys = ["a", "b"].into_iter().zip(weights);
        let clients = keys
            .map(|(key, weight)| (num_clients, Clients::new(account(key, weight, Priority::Completion), None, 20, 30)));
        let mut loads: Vec<_> = clients.collect();
        run(&mut scheduler(), &mut loads, 4000);
        let ratio = loads[0].1.num_tokens as f64 / loads[1].1.num_tokens as f64;
        let expected = f64::from(weights[0]) / f64::from(weights[1]);
        assert!((ratio / expected - 1.0).abs() < 0.1, "{num_clients} clients each, {weights:?}: {ratio}");
    }
}

#[test]
fn a_key_with_many_adapters_gets_no_more_than_one_with_none() {
    let adapters = ["p", "q", "r", "s"].map(Some);
    let one = (16, Clients::new(account("one", 1, Priority::Completion), None, 20, 30));
    let many = adapters.map(|adapter| (4, Clients::new(account("many", 1, Priority::Completion), adapter, 20, 30)));
    let mut loads: Vec<_> = [one].into_iter().chain(many).collect();
    run(&mut scheduler(), &mut loads, 3000);
    let tokens: Vec<_> = loads.iter().map(|(_, clients)| clients.num_tokens as f64).collect();
    let of_many: f64 = tokens[1..].iter().sum();
    assert!((tokens[0] / of_many - 1.0).abs() < 0.1, "{tokens:?}");
    assert!(tokens[1..].iter().all(|tokens| (tokens * 4.0 / of_many - 1.0).abs() < 0.1), "{tokens:?}");
}

#[test]
fn a_flood_for_one_adapter_keeps_no_other_waiting() {
    let load =
        |num_clients, adapter| (num_clients, Clients::new(account("", 1, Priority::Completion), Some(adapter), 20, 30));
    let mut loads = vec![load(200, "flood"), load(1, "b"), load(1, "c"), load(1, "d")];
    run(&mut scheduler(), &mut loads, 2000);
    for (_, quiet) in &loads[1..] {
        assert!(quiet.waits.iter().all(|steps| *steps <= 1), "{:?}", quiet.waits);
        // One step for the prompt, one for each token after its first.
        assert!(quiet.num_ended >= 2000 / 32, "{}", quiet.num_ended);
    }
    assert!(loads[0].1.num_ended > 100, "and the flood goes on: {}", loads[0].1.num_ended);
}

#[test]
fn completions_go_before_chats_and_chats_before_batches_and_all_go_on() {
    let load = |priority| (24, Clients::new(account("", 1, priority), None, 64, 16));
    let mut loads: Vec<_> = Priority::ALL.into_iter().map(load).collect();
    run(&mut scheduler(), &mut loads, 4000);
    let tokens: Vec<_> = loads.iter().map(|(_, clients)| clients.num_tokens).collect();
    assert!(tokens[0] > 3 * tokens[1] && tokens[1] > 3 * tokens[2] && tokens[2] > 0, "{tokens:?}");
}

#[test]
fn who_was_away_is_not_owed_for_it_and_owes_what_it_took() {
    let mut scheduler = scheduler();
    let (a, b) = (account("a", 1, Priority::Completion), account("b", 1, Priority::Completion));
    let mut loads = vec![(40, Clients::new(a, None, 20, 30))];
    run(&mut scheduler, &mut loads, 500);
    let before = loads[0].1.num_tokens;
    let mut next_id = 1_000_000;
    let mut late = Clients::new(b, None, 20, 30);
    (0..40).for_each(|_| late.send(&mut scheduler, &mut next_id));
    let mut ended = 0;
    for _ in 0..60 {
        ended += step(&mut scheduler).iter().filter(|id| id.0 < 1_000_000).count();
    }
    assert!(before > 0 && ended > 4, "the one that was there goes on beside it: {ended}");
}

#[test]
fn who_had_all_it_wanted_is_owed_little_for_what_others_had_beside_it() {
    for accounts in [["a", "a"], ["a", "b"]] {
        let mut scheduler = scheduler();
        let [quiet, busy] = accounts.map(|key| account(key, 1, Priority::Completion));
        let mut next_id = 0;
        let mut busy = Clients::new(busy, Some("busy"), 1, 4000);
        let mut quiet = Clients::new(quiet, None, 1, 4000);
        (0..6).for_each(|_| busy.send(&mut scheduler, &mut next_id));
        quiet.send(&mut scheduler, &mut next_id);
        (0..1000).for_each(|_| drop(step(&mut scheduler)));
        // Now it wants much, and the others are not to stand still for what it never asked for.
        (0..25).for_each(|_| quiet.send(&mut scheduler, &mut next_id));
        let mut num_rows = 0;
        for _ in 0..60 {
            scheduler.schedule();
            num_rows += scheduler.plan().sequences.iter().filter(|planned| busy.ids.contains(&planned.id)).count();
            finish_step(&mut scheduler);
        }
        assert!(num_rows > 60, "{accounts:?}: {num_rows}");
    }
}

#[test]
fn what_a_prompt_takes_holds_no_stream_of_its_flow_up() {
    let mut scheduler = scheduler();
    scheduler.set_step_rows(StepRows { as_base: 1, ..StepRows::default() });
    let load = |adapter, num_clients, num_prompt_tokens| {
        (num_clients, Clients::new(Account::default(), Some(adapter), num_prompt_tokens, 1000))
    };
    run(&mut scheduler, &mut [load("a", 2, 20), load("b", 2, 20)], 20);
    let mut next_id = 1_000;
    Clients::new(Account::default(), Some("a"), 200, 1).send(&mut scheduler, &mut next_id);
    for _ in 0..40 {
        scheduler.schedule();
        let num_streams = scheduler.plan().sequences.iter().filter(|planned| planned.id.0 < 1_000).count();
        assert_eq!(num_streams, 4);
        finish_step(&mut scheduler);
    }
}

/// Of each sequence that runs, the most steps in a row without a row for it, out of so many.
fn longest_pauses(scheduler: &mut Scheduler, num_steps: usize) -> HashMap<SequenceId, usize> {
    let (mut pauses, mut longest): (HashMap<SequenceId, usize>, HashMap<SequenceId, usize>) = Default::default();
    for _ in 0..num_steps {
        scheduler.schedule();
        let planned: HashSet<_> = scheduler.plan().sequences.iter().map(|planned| planned.id).collect();
        for id in scheduler.running.iter().map(Sequence::id) {
            let pause = pauses.entry(id).or_default();
            *pause = if planned.contains(&id) { 0 } else { *pause + 1 };
            let most = longest.entry(id).or_default();
            *most = (*most).max(*pause);
        }
        finish_step(scheduler);
    }
    longest
}

#[test]
fn a_stream_of_less_weight_pauses_for_as_many_steps_as_its_weight_says() {
    let mut scheduler = Scheduler::new(256, 32, 4096);
    let mut next_id = 0;
    let kinds = [Priority::Chat, Priority::Batch].into_iter().chain([Priority::Completion; 9]);
    for (priority, adapter) in kinds.zip(ADAPTERS.into_iter().chain(["j", "k"])) {
        Clients::new(account("", 1, priority), Some(adapter), 1, 10_000).send(&mut scheduler, &mut next_id);
    }
    (0..20).for_each(|_| drop(step(&mut scheduler)));
    let pauses = longest_pauses(&mut scheduler, 400);
    let pauses: Vec<_> = (0..11).map(|id| pauses[&SequenceId(id)]).collect();
    assert_eq!(pauses, [3, 15, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn the_streams_of_one_flow_take_turns() {
    let mut scheduler = scheduler_with_streams(32, &[5, 1, 1, 1, 1, 1, 1, 1, 1]);
    let pauses = longest_pauses(&mut scheduler, 200);
    assert_eq!((0..13).map(|id| pauses[&SequenceId(id)]).collect::<Vec<_>>(), [4, 4, 4, 4, 4, 0, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn what_a_stream_had_before_others_came_does_not_make_it_pause() {
    let mut scheduler = scheduler_with_streams(32, &[1, 1, 1]);
    // Those have been away for a while, and come back together.
    (0..1000).for_each(|_| drop(step(&mut scheduler)));
    let mut next_id = LONG_ID;
    for adapter in &ADAPTERS[3..] {
        Clients::new(Account::default(), Some(*adapter), 1, 1).send(&mut scheduler, &mut next_id);
    }
    (0..300).for_each(|_| drop(step(&mut scheduler)));
    for adapter in ADAPTERS[3..].iter().chain(&["j", "k", "l"]) {
        Clients::new(Account::default(), Some(*adapter), 1, 1000).send(&mut scheduler, &mut next_id);
    }
    let pauses = longest_pauses(&mut scheduler, 200);
    assert!((0..3).all(|id| pauses[&SequenceId(id)] <= 4), "{pauses:?}");
}

/// Rows of the sequences from `first_id` on in each step until they have all ended, or so many steps.
fn rows_by_step(scheduler: &mut Scheduler, first_id: u64, num_steps: usize) -> Vec<usize> {
    let mut rows = Vec::new();
    for _ in 0..num_steps {
        scheduler.schedule();
        let planned = scheduler.plan().sequences.iter().filter(|planned| planned.id.0 >= first_id);
        rows.push(planned.map(|planned| planned.rows.len()).sum());
        if finish_step(scheduler).iter().any(|id| id.0 >= first_id) {
            return rows;
        }
    }
    rows
}

const ADAPTERS: [&str; 9] = ["a", "b", "c", "d", "e", "f", "g", "h", "i"];

/// Of each of the first adapters so many streams, which have all begun.
fn scheduler_with_streams(max_sequences: usize, num_streams: &[usize]) -> Scheduler {
    let mut scheduler = Scheduler::new(256, max_sequences, 4096);
    scheduler.set_step_rows(StepRows { beside_decoding: 64, ..StepRows::default() });
    let mut next_id = 0;
    for (adapter, num_streams) in ADAPTERS.into_iter().zip(num_streams) {
        let mut clients = Clients::new(Account::default(), Some(adapter), 1, 10_000);
        (0..*num_streams).for_each(|_| clients.send(&mut scheduler, &mut next_id));
    }
    (0..20).for_each(|_| drop(step(&mut scheduler)));
    scheduler
}

const LONG_ID: u64 = 1_000;

#[test]
fn a_long_prompt_goes_on_beside_streams_that_have_their_rows() {
    for is_one_waiting in [false, true] {
        let mut scheduler = scheduler_with_streams(9, &[1; 8]);
        Clients::new(Account::default(), Some("long"), 2000, 1).send(&mut scheduler, &mut { LONG_ID });
        step(&mut scheduler);
        if is_one_waiting {
            // No slot is free for it, and nobody runs more than its share.
            Clients::new(Account::default(), Some("waiting"), 1, 1).send(&mut scheduler, &mut 900);
        }
        let rows = rows_by_step(&mut scheduler, LONG_ID, 1000);
        assert_eq!(rows.iter().sum::<usize>(), 2000 - 56, "{rows:?}");
        assert!(rows[..rows.len() - 1].iter().all(|rows| *rows == 56), "{is_one_waiting}: {rows:?}");
        assert_eq!(scheduler.num_waiting(), usize::from(is_one_waiting));
    }
}

#[test]
fn a_long_prompt_goes_on_with_the_least_beside_streams_that_pause() {
    let mut scheduler = scheduler_with_streams(32, &[1, 1, 1, 1, 1, 1, 1, 1, 20]);
    Clients::new(Account::default(), Some("long"), 2000, 1).send(&mut scheduler, &mut { LONG_ID });
    let rows = rows_by_step(&mut scheduler, LONG_ID, 1000);
    assert!(rows[..rows.len() - 1].iter().all(|rows| *rows >= MIN_CHUNK_ROWS), "{rows:?}");
    assert!(rows[1..].contains(&MIN_CHUNK_ROWS), "some of the streams wait for a row themselves: {rows:?}");
}

#[test]
fn the_streams_of_a_flood_make_way_for_the_prompt_of_another() {
    let mut scheduler = scheduler_with_streams(40, &[30]);
    let flood = |scheduler: &Scheduler| -> HashSet<_> {
        let planned = scheduler.plan().sequences.iter().filter(|planned| planned.id.0 < LONG_ID);
        planned.map(|planned| planned.id).collect()
    };
    // The other one has been there, and comes back before what it is owed is too old.
    let mut next_id = LONG_ID;
    Clients::new(Account::default(), Some("b"), 1, 1).send(&mut scheduler, &mut next_id);
    for _ in 0..8 {
        scheduler.schedule();
        assert_eq!(flood(&scheduler).len(), 30);
        finish_step(&mut scheduler);
    }
    Clients::new(Account::default(), Some("b"), 96, 1).send(&mut scheduler, &mut next_id);
    let mut seen = HashSet::new();
    for _ in 0..2 {
        scheduler.schedule();
        let streams = flood(&scheduler);
        assert_eq!((streams.len(), scheduler.plan().tokens.len()), (16, 64));
        seen.extend(streams);
        finish_step(&mut scheduler);
    }
    assert_eq!(seen.len(), 30, "they take turns");
}

#[test]
fn the_prompts_of_a_flood_leave_the_steps_of_other_streams_short() {
    let mut scheduler = scheduler_with_streams(40, &[4, 1]);
    let mut next_id = LONG_ID;
    let rows_of_flood = |scheduler: &mut Scheduler, next_id: &mut u64| {
        let mut flood = Clients::new(Account::default(), Some("a"), 200, 1);
        (0..8).for_each(|_| flood.send(scheduler, next_id));
        scheduler.schedule();
        let planned = scheduler.plan().sequences.iter().filter(|planned| flood.ids.contains(&planned.id));
        let num_rows: usize = planned.map(|planned| planned.rows.len()).sum();
        finish_step(scheduler);
        flood.ids.iter().for_each(|id| scheduler.remove(*id));
        num_rows
    };
    let rows: Vec<_> = (0..8).map(|_| rows_of_flood(&mut scheduler, &mut next_id)).collect();
    assert_eq!((rows[0], rows[7]), (59, MIN_CHUNK_ROWS), "{rows:?}");
}

#[test]
fn nobody_is_stopped_where_that_makes_no_room() {
    for (num_blocks, expected) in [(11, 0), (13, 1), (17, 2), (18, 0)] {
        let mut scheduler = Scheduler::new(512, 8, 20);
        let mut next_id = 0;
        let mut streams = Clients::new(Account::default(), Some("a"), 20, 12);
        (0..3).for_each(|_| streams.send(&mut scheduler, &mut next_id));
        step(&mut scheduler);
        assert_eq!(scheduler.blocks_used(), 6);
        // Of the three one is the flow's share: without the others there are 18 blocks, one of them for its next token.
        Clients::new(Account::default(), Some("b"), num_blocks * BLOCK_SIZE, 1).send(&mut scheduler, &mut next_id);
        step(&mut scheduler);
        assert_eq!(scheduler.num_preempted(), expected, "{num_blocks} blocks");
    }
}

#[test]
fn of_a_key_that_runs_too_much_the_flow_that_does_most_of_it_makes_room() {
    let mut scheduler = Scheduler::new(256, 31, 1024);
    let mut next_id = 0;
    let mut batch = Clients::new(account("a", 1, Priority::Batch), None, 1, 1000);
    (0..30).for_each(|_| batch.send(&mut scheduler, &mut next_id));
    let mut chat = Clients::new(account("a", 1, Priority::Chat), None, 1, 1000);
    chat.send(&mut scheduler, &mut next_id);
    step(&mut scheduler);
    Clients::new(account("b", 1, Priority::Chat), None, 1, 1000).send(&mut scheduler, &mut next_id);
    scheduler.schedule();
    assert_eq!(scheduler.num_preempted(), 1);
    assert!(scheduler.running_index(chat.ids[0]).is_some(), "the only chat goes on, though it is the youngest");
    assert!(scheduler.running_index(batch.ids[29]).is_none(), "the youngest of the batch has made room");
}

#[test]
fn prefilling_beside_streams_is_cut_to_what_they_may_wait_for() {
    let mut scheduler = Scheduler::new(256, 8, 256);
    let mut next_id = 0;
    Clients::new(Account::default(), None, 1, 90).send(&mut scheduler, &mut next_id);
    step(&mut scheduler);
    for (beside_decoding, expected) in [(usize::MAX, 256), (40, 40), (0, 17)] {
        scheduler.set_step_rows(StepRows { beside_decoding, ..StepRows::default() });
        let mut long = Clients::new(Account::default(), None, 300, 1);
        long.send(&mut scheduler, &mut next_id);
        scheduler.schedule();
        assert_eq!(scheduler.plan().tokens.len(), expected);
        finish_step(&mut scheduler);
        scheduler.remove(long.ids[0]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Of any accounts under any load, whoever waits is served before the others have had much more than their shares.
    #[test]
    fn nobody_waits_beyond_the_bound(
        weights in prop::collection::vec(1..=8u32, 2..5),
        num_clients in prop::collection::vec(1..=40usize, 5),
        num_prompt_tokens in prop::collection::vec(1..=60usize, 5),
        max_tokens in prop::collection::vec(1..=40usize, 5),
    ) {
        const NAMES: [&str; 5] = ["a", "b", "c", "d", "e"];
        let mut loads: Vec<_> = weights.iter().enumerate().map(|(index, &weight)| {
            let account = account(NAMES[index], weight, Priority::Completion);
            (num_clients[index], Clients::new(account, None, num_prompt_tokens[index], max_tokens[index]))
        }).collect();
        let mut scheduler = scheduler();
        run(&mut scheduler, &mut loads, 600);
        let total: usize = loads.iter().map(|(_, clients)| clients.num_tokens).sum();
        let num_rows: usize = loads.iter().map(|(_, clients)| clients.num_rows).sum();
        let sum: u32 = weights.iter().sum();
        for (index, (num_clients, clients)) in loads.iter().enumerate() {
            let part = f64::from(weights[index]) / f64::from(sum);
            // With so many clients it always wants more than it gets.
            if *num_clients < MAX_SEQUENCES {
                // Many that share a small part go on together, and none of them may have ended yet.
                let share = num_rows as f64 * part;
                prop_assert!(clients.num_ended > 0 || clients.num_rows as f64 > 0.5 * share, "{} of {share}", clients.num_rows);
                continue;
            }
            let share = total as f64 * part;
            let bound = ((num_prompt_tokens[index] + max_tokens[index]) * MAX_SEQUENCES) as f64;
            prop_assert!(clients.num_tokens as f64 > 0.9 * share - bound, "{} of {share}", clients.num_tokens);
        }
    }
}
