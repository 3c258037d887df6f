//! Which rows the next step computes. Pure bookkeeping: it plans, others execute.
//!
//! There are no modes. Every sequence has tokens that are not computed yet: one for a decode row, more for a prefill
//! chunk, and the rows of a step hold both. Sequences come first come, first served; both queues are in order of arrival.

use std::collections::VecDeque;
use std::ops::Range;

use super::kv_blocks::BlockPool;
use super::sequence::{LogitsUse, Sequence, SequenceId};
use crate::model::{AdapterGroup, BlockCopy};

/// Rows of a step up to which guessing is worth its rows: about where the arithmetic of the rows begins to take longer
/// than reading the weights (docs/performance.md).
const MAX_SPECULATED_ROWS: usize = 16;

#[derive(Debug)]
pub struct Scheduler {
    max_batch_rows: usize,
    max_sequences: usize,
    max_draft_tokens: usize,
    pool: BlockPool,
    /// Oldest first; all are younger than every running sequence.
    waiting: VecDeque<Sequence>,
    /// Oldest first. Each holds blocks for all its tokens once [`Scheduler::schedule`] has run.
    running: Vec<Sequence>,
    num_preempted: usize,
    plan: Plan,
    /// Rows per running sequence, and the running sequences in row order; kept to reuse their memory.
    shares: Vec<usize>,
    row_order: Vec<usize>,
}

/// One step: its rows, in the order of [`crate::model::ForwardBatch`].
#[derive(Debug, Default)]
pub struct Plan {
    pub copies: Vec<BlockCopy>,
    pub tokens: Vec<u32>,
    pub sequences: Vec<PlannedSequence>,
    pub groups: Vec<AdapterGroup>,
    pub logits_rows: Vec<usize>,
    /// `[logits_rows]`: whose they are and what they are for.
    pub logits: Vec<(SequenceId, LogitsUse)>,
}

#[derive(Debug, Clone)]
pub struct PlannedSequence {
    pub id: SequenceId,
    pub rows: Range<usize>,
    pub first_position: usize,
    index: usize,
}

impl Scheduler {
    /// At most `max_batch_rows` sequences run, so that every decode row fits in every step.
    pub fn new(max_batch_rows: usize, max_sequences: usize, num_blocks: usize) -> Self {
        let max_batch_rows = max_batch_rows.max(1);
        Self {
            max_batch_rows,
            max_sequences: max_sequences.clamp(1, max_batch_rows),
            max_draft_tokens: 0,
            pool: BlockPool::new(num_blocks),
            waiting: VecDeque::new(),
            running: Vec::new(),
            num_preempted: 0,
            plan: Plan::default(),
            shares: Vec::new(),
            row_order: Vec::new(),
        }
    }

    /// Guesses up to `max_draft_tokens` next tokens of a decoding sequence from now on.
    #[must_use]
    pub fn with_speculation(self, max_draft_tokens: usize) -> Self {
        Self { max_draft_tokens, ..self }
    }

    /// Adds a sequence that is younger than all others and fits into the pool alone.
    pub fn enqueue(&mut self, sequence: Sequence) {
        self.waiting.push_back(sequence);
    }

    /// Ends a sequence in any state and returns its blocks.
    pub fn remove(&mut self, id: SequenceId) {
        let removed = match self.running_index(id) {
            Some(index) => Some(self.running.remove(index)),
            None => {
                let index = self.waiting.binary_search_by_key(&id, Sequence::id).ok();
                index.and_then(|index| self.waiting.remove(index))
            }
        };
        if let Some(mut sequence) = removed {
            sequence.release(&mut self.pool);
        }
    }

    /// A running sequence.
    pub fn get_mut(&mut self, id: SequenceId) -> Option<&mut Sequence> {
        self.running_index(id).map(|index| &mut self.running[index])
    }

    /// Whether no sequence is left.
    pub fn is_empty(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    pub fn num_running(&self) -> usize {
        self.running.len()
    }

    pub fn num_waiting(&self) -> usize {
        self.waiting.len()
    }

    pub fn blocks_used(&self) -> usize {
        self.pool.blocks_used()
    }

    /// Sequences put back to waiting for want of blocks, since the start.
    pub fn num_preempted(&self) -> usize {
        self.num_preempted
    }

    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The sequence of a row range of the current plan.
    pub fn sequence(&self, planned: &PlannedSequence) -> &Sequence {
        &self.running[planned.index]
    }

    /// Running sequences that are all computed and generate nothing: they were only to be scored.
    pub fn computed_without_output(&self) -> impl Iterator<Item = &Sequence> {
        self.running.iter().filter(|sequence| sequence.num_uncomputed_tokens() == 0)
    }

    /// Plans the next step. The plan holds until [`Scheduler::commit`]; sequences are not removed in between.
    pub fn schedule(&mut self) {
        self.running.iter_mut().for_each(Sequence::settle);
        self.cover_running();
        self.admit();
        self.share_rows();
        self.speculate();
        self.pack();
    }

    /// The planned rows are computed. Those of guesses count only once [`Scheduler::accept`] says so.
    pub fn commit(&mut self) {
        for planned in &self.plan.sequences {
            let sequence = &mut self.running[planned.index];
            let num_rows = planned.rows.len() - sequence.draft().len();
            sequence.advance(num_rows, &mut self.pool);
        }
        for copy in self.plan.copies.drain(..) {
            self.pool.release_shared(copy.from);
        }
        // An idle engine must not keep adapters alive.
        self.plan.groups.clear();
    }

    /// The next guess of a sequence came true; [`Sequence::push`] has made it its last token.
    pub fn accept(&mut self, id: SequenceId) {
        if let Some(index) = self.running_index(id) {
            self.running[index].accept(&mut self.pool);
        }
    }

    /// Guessed tokens in the current plan.
    pub fn num_drafted(&self) -> usize {
        self.running.iter().map(|sequence| sequence.draft().len()).sum()
    }

    fn running_index(&self, id: SequenceId) -> Option<usize> {
        self.running.binary_search_by_key(&id, Sequence::id).ok()
    }

    /// Gives every running sequence blocks for all its tokens, the oldest first, at the cost of the youngest.
    fn cover_running(&mut self) {
        let mut index = 0;
        while index < self.running.len() {
            if self.running[index].is_covered() {
                index += 1;
            } else if let Some(block) = self.pool.allocate() {
                self.running[index].push_block(block);
            } else if let Some(mut youngest) = self.running.pop() {
                youngest.release(&mut self.pool);
                self.waiting.push_front(youngest);
                self.num_preempted += 1;
            }
        }
    }

    /// Starts waiting sequences, none before its elders, while their blocks leave one spare for each running sequence:
    /// without it the next decode rows would throw the newcomer out again.
    fn admit(&mut self) {
        while self.running.len() < self.max_sequences && self.pool.blocks_available() > self.running.len() {
            let Some(mut sequence) = self.waiting.pop_front() else { return };
            let mut partial = sequence.match_prefix(&mut self.pool);
            let num_blocks = BlockPool::num_blocks_for(sequence.tokens().len()) - sequence.block_table().len();
            let is_room = |pool: &BlockPool| num_blocks + self.running.len() <= pool.blocks_available();
            // The share in a block to copy from must not be what keeps the sequence waiting.
            if let Some((shared, _)) = partial.take_if(|_| !is_room(&self.pool)) {
                self.pool.release_shared(shared);
            }
            if !is_room(&self.pool) {
                sequence.release(&mut self.pool);
                self.waiting.push_front(sequence);
                return;
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
            self.running.push(sequence);
        }
    }

    /// One row for each decoding sequence; of the rest, each prefilling sequence in turn gets up to half as long as
    /// others wait behind it, so that a short prompt gets past a long one. What is left goes to the oldest.
    fn share_rows(&mut self) {
        self.shares.clear();
        self.shares.extend(self.running.iter().map(|s| usize::from(s.num_uncomputed_tokens() == 1)));
        let num_decoding: usize = self.shares.iter().sum();
        let mut num_prefilling = self.running.len() - num_decoding;
        let mut rows_left = self.max_batch_rows - num_decoding;
        for (share, sequence) in self.shares.iter_mut().zip(&self.running).filter(|(share, _)| **share == 0) {
            num_prefilling -= 1;
            let cap = if num_prefilling > 0 { rows_left.div_ceil(2) } else { rows_left };
            *share = sequence.num_uncomputed_tokens().min(cap);
            rows_left -= *share;
        }
        for (share, sequence) in self.shares.iter_mut().zip(&self.running) {
            let extra = rows_left.min(sequence.num_uncomputed_tokens() - *share);
            *share += extra;
            rows_left -= extra;
        }
    }

    /// Adds rows for guessed tokens while they are cheap: with nobody prefilling, and as long as the step is small enough
    /// for reading the weights, and not the arithmetic of its rows, to take most of its time.
    fn speculate(&mut self) {
        let num_rows: usize = self.shares.iter().sum();
        if self.max_draft_tokens == 0 || num_rows != self.running.len() {
            return;
        }
        let mut rows_left = MAX_SPECULATED_ROWS.min(self.max_batch_rows).saturating_sub(num_rows);
        for index in 0..self.running.len() {
            let decoding = self.running.len() - index;
            let most = self.max_draft_tokens.min(rows_left / decoding);
            if most == 0 {
                continue;
            }
            let sequence = &mut self.running[index];
            // A guess takes a block only if that leaves one for the next token of every sequence.
            let has_spare = self.pool.blocks_available() > self.shares.len();
            if has_spare
                && !sequence.has_room_for(most)
                && let Some(block) = self.pool.allocate()
            {
                sequence.push_block(block);
            }
            sequence.speculate(most);
            self.shares[index] += sequence.draft().len();
            rows_left -= sequence.draft().len();
        }
    }

    /// Lays the rows out so that those of one adapter generation are contiguous, the base first.
    fn pack(&mut self) {
        let Self { running, plan, shares, row_order, .. } = self;
        plan.tokens.clear();
        plan.sequences.clear();
        plan.groups.clear();
        plan.logits_rows.clear();
        plan.logits.clear();
        row_order.clear();
        row_order.extend((0..running.len()).filter(|&index| shares[index] > 0));
        row_order.sort_unstable_by_key(|&index| (running[index].generation(), index));
        for &index in &*row_order {
            plan.push(index, &running[index], shares[index]);
        }
    }
}

impl Plan {
    fn push(&mut self, index: usize, sequence: &Sequence, num_rows: usize) {
        let first_row = self.tokens.len();
        let first_position = sequence.num_computed_tokens();
        let rows = first_row..first_row + num_rows;
        let num_drafted = sequence.draft().len();
        let end = first_position + num_rows - num_drafted;
        self.tokens.extend_from_slice(&sequence.tokens()[first_position..end]);
        self.tokens.extend_from_slice(sequence.draft());
        for row in rows.clone() {
            if let Some(logits_use) = sequence.logits_use(first_position + row - first_row) {
                self.logits_rows.push(row);
                self.logits.push((sequence.id(), logits_use));
            }
        }
        if let Some(adapter) = sequence.adapter() {
            match self.groups.last_mut() {
                Some(group) if group.adapter.generation == adapter.generation => group.rows.end = rows.end,
                _ => self.groups.push(AdapterGroup { rows: rows.clone(), adapter: adapter.clone() }),
            }
        }
        self.sequences.push(PlannedSequence { id: sequence.id(), rows, first_position, index });
    }
}

#[cfg(test)]
mod tests;
