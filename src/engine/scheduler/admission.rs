//! Which waiting sequences start, and what of theirs is not computed again: what the prefix cache has, and what running
//! sequences compute or have computed. So requests with one prompt, sent together, are prefilled once.

use std::cmp::Reverse;

use kernels::attention::{BLOCK_SIZE, BlockId};

use super::Scheduler;
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
            while let Some(refused) = self.try_start(sequence) {
                if self.is_led(&refused) {
                    self.wait(refused);
                    break;
                }
                if !self.preempt_for(&refused) {
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

    /// Makes room for `sequence` by preempting the youngest one of the flow that runs most above its share, if that is
    /// more than that of `sequence` would.
    fn preempt_for(&mut self, sequence: &Sequence) -> bool {
        let excess = |index: usize| {
            self.fairness.excess(self.running[index].flow(), sequence.flow()).map(|excess| (index, excess))
        };
        let most = (0..self.running.len()).filter_map(excess).max_by(|a, b| a.1.total_cmp(&b.1).then(a.0.cmp(&b.0)));
        most.map(|(index, _)| self.preempt(index)).is_some()
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
