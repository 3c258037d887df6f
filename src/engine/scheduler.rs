//! Which rows the next step computes. Pure bookkeeping: it plans, others execute.
//!
//! There are no modes. Every sequence has tokens that are not computed yet: one for a decode row, more for a prefill
//! chunk, and the rows of a step hold both. Both queues are in order of arrival; those of one flow come first come, first
//! served, and which flow is next is a matter of fairness (docs/decisions/0011).

mod admission;

use std::collections::VecDeque;
use std::ops::Range;

use kernels::attention::BlockId;

use super::fairness::{Credit, Fairness};
use super::kv_blocks::BlockPool;
use super::past_replies::PastReplies;
use super::prefix_cache::ChainHash;
use super::sequence::{LogitsUse, PrefixBlock, Sequence, SequenceId};
use crate::model::{AdapterGroup, BlockCopy};

/// Rows of a step up to which guessing is worth its rows: about where the arithmetic of the rows begins to take longer
/// than reading the weights (docs/performance.md).
const MAX_SPECULATED_ROWS: usize = 16;
/// The same where reading the weights takes longer, and for one sequence alone whose guesses come true one after the other.
const MAX_COPIED_ROWS: usize = 64;
/// Least rows of a step for prefilling, so that it goes on beside any number of streams.
const MIN_CHUNK_ROWS: usize = 16;
/// Tokens that one is owed that comes back, or had all that it wanted.
const MAX_CREDIT: f64 = 256.0;

#[derive(Debug)]
pub struct Scheduler {
    max_batch_rows: usize,
    max_sequences: usize,
    max_draft_tokens: usize,
    pool: BlockPool,
    past_replies: PastReplies,
    /// By all that is computed, of sequences in any state.
    fairness: Fairness,
    /// By the rows of the running sequences whose prompts are computed: what a prompt has taken does not hold the streams of its
    /// flow up.
    streams: Fairness,
    step_rows: StepRows,
    /// Oldest first.
    waiting: VecDeque<Sequence>,
    /// Oldest first. Each holds blocks for all its tokens once [`Scheduler::schedule`] has run.
    running: Vec<Sequence>,
    /// Those that the plan in the making starts, whose first block may still have to be copied: none of them is preempted.
    starting: Vec<Sequence>,
    num_preempted: usize,
    num_steps: u64,
    plan: Plan,
    /// Rows per running sequence, and the running sequences in the order in which they get and have them; kept to reuse their memory.
    shares: Vec<usize>,
    turns: Vec<usize>,
    row_order: Vec<usize>,
}

/// How many rows a step should have, as far as that depends on how long they take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepRows {
    /// How many that decode take as long as what every step takes, which is reading the weights for the most part.
    pub as_base: usize,
    /// The most while somebody's stream would wait for more.
    pub beside_decoding: usize,
}

impl Default for StepRows {
    fn default() -> Self {
        // Until it is known how long steps take.
        Self { as_base: 4, beside_decoding: usize::MAX }
    }
}

impl StepRows {
    /// Up to so many, nobody's row is worth leaving out for the sake of others: where the rows take twice what every step
    /// takes, one more is two thirds of its price.
    fn uncontested(self) -> usize {
        (2 * self.as_base).max(1)
    }
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
            past_replies: PastReplies::default(),
            fairness: Fairness::new(Credit::Tokens(MAX_CREDIT)),
            streams: Fairness::new(Credit::OneTurn),
            step_rows: StepRows::default(),
            waiting: VecDeque::new(),
            running: Vec::new(),
            starting: Vec::new(),
            num_preempted: 0,
            num_steps: 0,
            plan: Plan::default(),
            shares: Vec::new(),
            turns: Vec::new(),
            row_order: Vec::new(),
        }
    }

    /// Guesses up to `max_draft_tokens` next tokens of a decoding sequence from now on.
    #[must_use]
    pub fn with_speculation(self, max_draft_tokens: usize) -> Self {
        Self { max_draft_tokens, ..self }
    }

    /// Says from now on which blocks have been computed ([`Scheduler::next_unsaved`]).
    #[must_use]
    pub fn with_saving(self) -> Self {
        Self { pool: self.pool.with_saving(), ..self }
    }

    /// What the steps from now on should hold.
    pub fn set_step_rows(&mut self, step_rows: StepRows) {
        self.step_rows = step_rows;
    }

    /// Adds a sequence that fits into the pool alone.
    pub fn enqueue(&mut self, sequence: Sequence) {
        self.fairness.enter(sequence.flow());
        self.past_replies.forget_gone();
        self.wait(sequence);
    }

    /// Ends a sequence in any state and returns its blocks.
    pub fn remove(&mut self, id: SequenceId) {
        let removed = match self.running_index(id) {
            Some(index) => Some(self.stop(index)),
            None => {
                let index = self.waiting.binary_search_by_key(&id, Sequence::id).ok();
                index.and_then(|index| self.waiting.remove(index))
            }
        };
        if let Some(sequence) = removed {
            self.fairness.leave(sequence.flow());
            if self.max_draft_tokens > 0 {
                self.past_replies.learn(&sequence);
            }
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

    /// Blocks that can be restored without keeping a running sequence from its next one.
    pub fn blocks_to_spare(&self) -> usize {
        self.pool.blocks_available().saturating_sub(self.running.len())
    }

    pub fn is_cached(&self, chain: &ChainHash) -> bool {
        self.pool.is_cached(chain)
    }

    /// Whether it is cached and counts among the blocks to spare.
    pub fn is_idle(&self, chain: &ChainHash) -> bool {
        self.pool.is_idle(chain)
    }

    /// Of idle blocks, this one is evicted last.
    pub fn touch(&mut self, chain: &ChainHash) {
        if let Some(block) = self.pool.acquire_cached(chain) {
            self.pool.release_shared(block);
        }
    }

    /// The place of a block whose content is to be written there before the next step; `None` if it has none.
    pub fn restore(&mut self, PrefixBlock { parent, chain, tokens }: &PrefixBlock) -> Option<BlockId> {
        self.pool.restore(*parent, tokens, *chain)
    }

    /// A block that has been computed and stays as it is until the next plan.
    pub fn next_unsaved(&mut self) -> Option<(ChainHash, BlockId)> {
        self.pool.next_unsaved()
    }

    pub fn has_unsaved(&self) -> bool {
        self.pool.has_unsaved()
    }

    /// Of the pool, how much sequences hold; 1 is all.
    pub fn kv_usage(&self) -> f64 {
        self.pool.blocks_used() as f64 / self.pool.num_blocks().max(1) as f64
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
        self.settle_accounts();
        self.speculate();
        self.pack();
    }

    /// The planned rows are computed. Those of guesses count only once [`Scheduler::accept`] says so.
    pub fn commit(&mut self) {
        self.num_steps += 1;
        for planned in &self.plan.sequences {
            let sequence = &mut self.running[planned.index];
            let num_rows = planned.rows.len() - sequence.draft().len();
            sequence.advance(num_rows, &mut self.pool);
            sequence.set_last_step(self.num_steps);
            let num_promised = sequence.take_promised(num_rows);
            self.fairness.serve(sequence.flow(), num_rows, num_promised);
            if num_promised == 0 {
                self.streams.serve(sequence.flow(), num_rows, 0);
            } else if sequence.is_streaming() {
                self.streams.enter(sequence.flow());
            }
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
            self.fairness.serve(self.running[index].flow(), 1, 0);
            self.streams.serve(self.running[index].flow(), 1, 0);
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
            } else {
                self.preempt(self.running.len() - 1);
            }
        }
    }

    /// Ends the running of a sequence, whose blocks go back.
    fn stop(&mut self, index: usize) -> Sequence {
        let mut sequence = self.running.remove(index);
        sequence.release(&mut self.pool);
        if sequence.is_streaming() {
            self.streams.leave(sequence.flow());
        }
        let num_promised = sequence.take_promised(usize::MAX);
        self.fairness.stop(sequence.flow(), num_promised);
        sequence
    }

    /// Puts a running sequence back to waiting.
    fn preempt(&mut self, index: usize) {
        let sequence = self.stop(index);
        self.wait(sequence);
        self.num_preempted += 1;
    }

    fn wait(&mut self, sequence: Sequence) {
        let place = self.waiting.partition_point(|other| other.id() < sequence.id());
        self.waiting.insert(place, sequence);
    }

    fn share_rows(&mut self) {
        let num_decoding = self.share_among_streams();
        self.share_among_prompts(num_decoding);
    }

    /// A row for each sequence that decodes; where those are many, only for as many as are nearly free, and beyond them for
    /// whoever is within its share. Of a flood, beside the prompt of another, no more than a few: its streams would fill the steps
    /// that the prompt needs. Of one flow, whoever has waited longest comes first. How many rows that makes.
    fn share_among_streams(&mut self) -> usize {
        let Self { running, shares, turns, streams, fairness, .. } = self;
        let uncontested = self.step_rows.uncontested();
        shares.clear();
        shares.extend(running.iter().map(|sequence| usize::from(sequence.num_uncomputed_tokens() == 1)));
        let num_decoding = shares.iter().sum();
        if num_decoding <= uncontested {
            return num_decoding;
        }
        // The last token of a prompt, which is no stream's yet, has its row.
        turns.clear();
        turns.extend((0..running.len()).filter(|&index| shares[index] == 1 && running[index].is_streaming()));
        turns.sort_by_key(|&index| running[index].last_step());
        let flows: Vec<_> = turns.iter().map(|&index| running[index].flow()).collect();
        let prefilling = running.iter().filter(|sequence| sequence.num_uncomputed_tokens() > 1);
        let floods = fairness.floods_among(flows.iter().copied(), prefilling.map(Sequence::flow));
        let most_of_floods = uncontested.max(MIN_CHUNK_ROWS);
        let mut num_rows = num_decoding - flows.len();
        for turn in streams.turns(&flows) {
            let makes_way = num_rows >= most_of_floods && floods.contains(flows[turn.index]);
            let has_row = num_rows < uncontested || turn.is_within_share && !makes_way;
            shares[turns[turn.index]] = usize::from(has_row);
            num_rows += usize::from(has_row);
        }
        num_rows
    }

    /// Prefilling sequences have the rows beside those of streams, as far as these may wait for them. In a step with rows enough, those
    /// get none before whom others should be served that have none either: who has its row, and who cannot start, would not have
    /// what is held back. Where all of those pause as streams, prefilling goes on with the least. A flood gets a few beside the
    /// stream of another, with which the step takes about twice as long: its prompts would make every step of the other as long as
    /// steps may be.
    fn share_among_prompts(&mut self, num_decoding: usize) {
        let Self { running, shares, turns, fairness, .. } = self;
        let without = (0..running.len()).filter(|index| shares[*index] == 0).map(|index| running[index].flow());
        let floors = (num_decoding >= self.step_rows.uncontested()).then(|| fairness.floors_of(without));
        let is_waited_for =
            |index: &usize| !floors.as_ref().is_some_and(|floors| fairness.is_ahead(running[*index].flow(), floors));
        turns.clear();
        turns.extend((0..running.len()).filter(|index| running[*index].num_uncomputed_tokens() > 1));
        turns.sort_by_cached_key(|&index| (fairness.standing(running[index].flow()), index));
        let first = turns.first().copied();
        turns.retain(is_waited_for);
        let least = num_decoding + MIN_CHUNK_ROWS;
        let most = match (num_decoding, first.filter(|_| turns.is_empty())) {
            (_, Some(first)) => {
                turns.push(first);
                least
            }
            (0, None) => usize::MAX,
            (_, None) => self.step_rows.beside_decoding.max(least),
        };
        let mut rows_left = most.min(self.max_batch_rows) - num_decoding;
        let streaming =
            running.iter().zip(&*shares).filter(|(sequence, share)| **share == 1 && sequence.is_streaming());
        let streaming = streaming.map(|(sequence, _)| sequence.flow());
        let floods = fairness.floods_among(turns.iter().map(|&index| running[index].flow()), streaming);
        turns.sort_by_key(|&index| floods.contains(running[index].flow()));
        let num_others = turns.partition_point(|&index| !floods.contains(running[index].flow()));
        let (others, of_floods) = turns.split_at(num_others);
        hand_out(running, shares, others, &mut rows_left);
        let mut rows_of_floods = rows_left.min(MIN_CHUNK_ROWS.max(self.step_rows.as_base + num_decoding));
        hand_out(running, shares, of_floods, &mut rows_of_floods);
    }

    /// Of all that is asked for, and of the streams alone.
    fn settle_accounts(&mut self) {
        let Self { running, waiting, shares, fairness, streams, .. } = self;
        let is_short = |(sequence, share): &(&Sequence, &usize)| **share < sequence.num_uncomputed_tokens();
        let short = || running.iter().zip(&*shares).filter(is_short).map(|(sequence, _)| sequence);
        fairness.settle(short().chain(&*waiting).map(Sequence::flow));
        streams.settle(short().filter(|sequence| sequence.is_streaming()).map(Sequence::flow));
    }

    /// Adds rows for guessed tokens while they are cheap: with every sequence decoding, and as long as the step is small enough
    /// for reading the weights, and not the arithmetic of its rows, to take most of its time. Those that pause do so for a
    /// step or few, for which nobody else's guesses are held back.
    fn speculate(&mut self) {
        if self.max_draft_tokens == 0 || self.running.iter().any(|sequence| sequence.num_uncomputed_tokens() != 1) {
            return;
        }
        let num_decoding = self.shares.iter().sum();
        let (num_running, mut num_rows) = (self.running.len(), num_decoding);
        let as_base = self.step_rows.as_base;
        let max_rows =
            if num_running == 1 { MAX_COPIED_ROWS } else { as_base.clamp(MAX_SPECULATED_ROWS, MAX_COPIED_ROWS) };
        let max_rows = max_rows.min(self.max_batch_rows);
        let decoding = self.running.iter_mut().zip(&mut self.shares).filter(|(_, share)| **share == 1);
        for (index, (sequence, share)) in decoding.enumerate() {
            let rows_left = max_rows.saturating_sub(num_rows);
            let most =
                self.max_draft_tokens.min(rows_left / (num_decoding - index)).min(sequence.worth_guessing(as_base));
            if most == 0 {
                continue;
            }
            sequence.speculate(self.past_replies.of(sequence.flow()), most);
            // Guesses take a block only if that leaves one for the next token of every sequence.
            while !sequence.is_covered()
                && self.pool.blocks_available() > num_running
                && let Some(block) = self.pool.allocate()
            {
                sequence.push_block(block);
            }
            sequence.fit_draft();
            *share += sequence.draft().len();
            num_rows += sequence.draft().len();
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

/// Of so many rows, each of these in turn gets up to half as long as others wait behind it, so that a short prompt gets past a long
/// one. What is left goes to the first.
fn hand_out(running: &[Sequence], shares: &mut [usize], turns: &[usize], rows_left: &mut usize) {
    for (turn, &index) in turns.iter().enumerate() {
        let is_last = turn + 1 == turns.len();
        let cap = if is_last { *rows_left } else { rows_left.div_ceil(2) };
        shares[index] = running[index].num_uncomputed_tokens().min(cap);
        *rows_left -= shares[index];
    }
    for &index in turns {
        let extra = (*rows_left).min(running[index].num_uncomputed_tokens() - shares[index]);
        shares[index] += extra;
        *rows_left -= extra;
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
mod fairness_tests;
#[cfg(test)]
mod tests;
