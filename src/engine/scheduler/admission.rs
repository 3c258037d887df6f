//! Which waiting sequences start, and what of theirs is not computed again: what the prefix cache has, and what running
//! sequences compute or have computed. So requests with one prompt, sent together, are prefilled once.

use std::cmp::Reverse;
use std::collections::HashMap;

use kernels::attention::{BLOCK_SIZE, BlockId};

use super::Scheduler;
use crate::engine::fairness::Flow;
use crate::engine::kv_blocks::BlockPool;
use crate::engine::sequence::{Leader, Sequence};
use crate::model::BlockCopy;

/// Tokens worth waiting for while another sequence computes them: it takes one more step, which takes about as long as so many
/// rows.
const MIN_LED_TOKENS: usize = 16;

/// The running sequence that begins as another does for longest.
struct Forerunner {
    /// Of those tokens, the ones it has computed.
    num_computed_tokens: usize,
    /// Its block where the other one goes on.
    block: Option<BlockId>,
    /// Where it is going to compute the others before the other one could.
    leader: Option<Leader>,
}

impl Scheduler {
    /// Starts waiting sequences, while their blocks leave one spare for each running sequence: without it the next decode
    /// rows would throw the newcomer out again. None overtakes the next one because it is smaller.
    pub(super) fn admit(&mut self) {
        while let Some(index) = self.next_waiting()
            && let Some(mut sequence) = self.waiting.remove(index)
        {
            while let Some(mut refused) = self.try_start(sequence) {
                if self.is_led(&refused) {
                    self.wait(refused);
                    break;
                }
                if !self.make_room_for(&mut refused) {
                    self.wait(refused);
                    return self.run_started();
                }
                sequence = refused;
            }
        }
        self.run_started();
    }

    /// Who is to run next: the oldest of the flow that has been served least. Those that follow another are passed over.
    fn next_waiting(&self) -> Option<usize> {
        let standing = |index: &usize| (self.fairness.expected_standing(self.waiting[*index].flow()), *index);
        (0..self.waiting.len()).filter(|index| !self.is_led(&self.waiting[*index])).min_by_key(standing)
    }

    /// Makes room for `sequence` at the cost of flows that run above their shares.
    fn make_room_for(&mut self, sequence: &mut Sequence) -> bool {
        let mut victims = self.victims_for(sequence);
        victims.sort_unstable_by_key(|index| Reverse(*index));
        victims.iter().for_each(|index| self.preempt(*index));
        !victims.is_empty()
    }

    /// Whom to preempt for `sequence`: one after the other the youngest one of the flow that runs most above its share, as long
    /// as that is more than that of `sequence` would. Nobody where all of them are not room enough: they would stand still for
    /// nothing.
    fn victims_for(&mut self, sequence: &mut Sequence) -> Vec<usize> {
        let Self { running, starting, pool, fairness, max_sequences, .. } = self;
        if running.iter().all(|other| fairness.excess(other.flow(), sequence.flow()).is_none()) {
            return Vec::new();
        }
        // The youngest of each last.
        let mut by_flow: HashMap<&Flow, Vec<usize>> = HashMap::new();
        running.iter().enumerate().for_each(|(index, other)| by_flow.entry(other.flow()).or_default().push(index));
        // What the cache has of it needs no room, whoever else holds it.
        if let Some((block, _)) = sequence.match_prefix(pool) {
            pool.release_shared(block);
        }
        let num_blocks = BlockPool::num_blocks_for(sequence.tokens().len()) - sequence.block_table().len();
        let (mut num_left, mut num_free) = (running.len() + starting.len(), pool.blocks_available());
        let mut num_let_go: HashMap<BlockId, u32> = HashMap::new();
        let mut victims = Vec::new();
        while num_left >= *max_sequences || num_blocks + num_left > num_free {
            let youngest = |(flow, left): (&&Flow, &Vec<usize>)| {
                Some((fairness.excess(flow, sequence.flow())?, left.last().copied()?))
            };
            let most = by_flow.iter().filter_map(youngest).max_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
            let Some((_, index)) = most else { break };
            let flow = running[index].flow();
            by_flow.get_mut(flow).and_then(Vec::pop);
            // As if it had been preempted, until all have been found.
            fairness.stop(flow, 0);
            victims.push(index);
            num_left -= 1;
            for block in running[index].block_table() {
                let num_let_go = num_let_go.entry(*block).or_default();
                *num_let_go += 1;
                num_free += usize::from(*num_let_go == pool.num_holders(*block));
            }
        }
        victims.iter().for_each(|index| fairness.admit(running[*index].flow(), 0));
        sequence.release(pool);
        if num_left >= *max_sequences || num_blocks + num_left > num_free {
            victims.clear();
        }
        victims
    }

    /// Gives the sequence back where there is no room for it, and where it is to follow another.
    fn try_start(&mut self, mut sequence: Sequence) -> Option<Sequence> {
        let num_running = self.running.len() + self.starting.len();
        if num_running >= self.max_sequences || self.pool.blocks_available() <= num_running {
            return Some(sequence);
        }
        let mut partial = sequence.match_prefix(&mut self.pool);
        if let Some(forerunner) = self.forerunner(&sequence) {
            let num_found = sequence.num_computed_tokens() + partial.map_or(0, |(_, num_positions)| num_positions);
            if let Some(leader) = forerunner.leader.filter(|leader| leader.num_tokens >= num_found + MIN_LED_TOKENS) {
                self.release_partial(partial);
                sequence.release(&mut self.pool);
                sequence.follow(leader);
                return Some(sequence);
            }
            if forerunner.num_computed_tokens > num_found
                && let Some(block) = forerunner.block
            {
                self.release_partial(partial);
                self.pool.share(block);
                let num_positions = forerunner.num_computed_tokens - sequence.num_computed_tokens();
                partial = Some((block, num_positions.min(BLOCK_SIZE)));
            }
        }
        let num_blocks = BlockPool::num_blocks_for(sequence.tokens().len()) - sequence.block_table().len();
        let is_room = |pool: &BlockPool| num_blocks + num_running <= pool.blocks_available();
        // The share in a block to copy from must not be what keeps the sequence waiting.
        if !is_room(&self.pool) {
            self.release_partial(partial.take());
        }
        if !is_room(&self.pool) {
            sequence.release(&mut self.pool);
            return Some(sequence);
        }
        for block in std::iter::repeat_with(|| self.pool.allocate()).take(num_blocks).flatten() {
            match partial.take() {
                Some((from, num_positions)) => {
                    self.plan.copies.push(BlockCopy { from, to: block });
                    sequence.push_copy(block, num_positions);
                }
                None => sequence.push_block(block),
            }
        }
        let num_promised = sequence.promise();
        self.fairness.admit(sequence.flow(), num_promised);
        self.starting.push(sequence);
        None
    }

    fn release_partial(&mut self, partial: Option<(BlockId, usize)>) {
        if let Some((block, _)) = partial {
            self.pool.release_shared(block);
        }
    }

    /// Of equals the oldest. Only one of the same flow leads: another's turn may come later than that of who follows it.
    fn forerunner(&self, sequence: &Sequence) -> Option<Forerunner> {
        let likeness = |other: &Sequence| (other.num_shared_tokens(sequence), other.flow() == sequence.flow());
        let all = self.running.iter().chain(&self.starting);
        let longest = all.max_by_key(|other| (likeness(other), Reverse(other.id())))?;
        let (num_tokens, is_of_same_flow) = likeness(longest);
        let num_computed_tokens = longest.num_computed_tokens().min(num_tokens);
        let block = longest.block_table().get(sequence.block_table().len()).copied();
        Some(Forerunner {
            num_computed_tokens,
            // What is a copy itself is not there before the step.
            block: block.filter(|block| self.plan.copies.iter().all(|copy| copy.to != *block)),
            leader: (is_of_same_flow && num_computed_tokens < num_tokens)
                .then(|| Leader { id: longest.id(), num_tokens }),
        })
    }

    /// Whether the one that `sequence` follows still runs and has not computed all that is waited for.
    fn is_led(&self, sequence: &Sequence) -> bool {
        let Some(leader) = sequence.leader() else { return false };
        let running = match self.running_index(leader.id) {
            Some(index) => Some(&self.running[index]),
            None => self.starting.iter().find(|starting| starting.id() == leader.id),
        };
        running.is_some_and(|running| running.num_computed_tokens() < leader.num_tokens)
    }

    fn run_started(&mut self) {
        self.running.append(&mut self.starting);
        self.running.sort_unstable_by_key(Sequence::id);
    }
}
