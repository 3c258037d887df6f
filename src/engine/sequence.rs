//! A request's life in the engine, as far as the scheduler sees it: tokens, progress and KV blocks.

use std::sync::Arc;

use kernels::attention::{BLOCK_SIZE, BlockId};

use super::fairness::{Account, Flow};
use super::kv_blocks::BlockPool;
use super::prediction::Prediction;
use super::prefix_cache::ChainHash;
use super::request::PromptOutput;
use super::speculate::Speculation;
use crate::adapter::canonical::Adapter;
use crate::model::FIRST_VIRTUAL_TOKEN;

/// Identity of a sequence; later arrivals have greater ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId(pub u64);

/// The running sequence that a waiting one follows: it computes what both begin with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leader {
    pub id: SequenceId,
    /// Tokens at the start that both have, virtual ones included.
    pub num_tokens: usize,
}

/// A full block at the start of a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PrefixBlock {
    pub parent: ChainHash,
    pub chain: ChainHash,
    pub tokens: [u32; BLOCK_SIZE],
}

#[derive(Debug)]
pub struct Sequence {
    id: SequenceId,
    adapter: Option<Arc<Adapter>>,
    flow: Flow,
    /// Tokens that it was admitted for and that are not computed yet.
    num_promised_tokens: usize,
    /// The positions of the adapter's prelude, the prompt, then the output.
    tokens: Vec<u32>,
    num_virtual_tokens: usize,
    /// Virtual ones included.
    num_prompt_tokens: usize,
    max_tokens: usize,
    /// Positions whose K and V are in the KV store.
    num_computed_tokens: usize,
    block_table: Vec<BlockId>,
    /// Identity of the last block known to the prefix cache, and how many are.
    chain: ChainHash,
    num_chained_blocks: usize,
    /// Tokens at the start, virtual ones included, whose blocks are pinned in the prefix cache.
    num_pinned_tokens: usize,
    prompt_output: PromptOutput,
    /// Prompt tokens whose log-probability has been asked for, virtual ones included.
    num_scored_tokens: usize,
    speculation: Speculation,
    prediction: Option<Prediction>,
    leader: Option<Leader>,
    num_restored_tokens: usize,
    /// When it had its last row; later ones are greater.
    last_step: u64,
}

impl Sequence {
    /// `prompt_tokens` must not be empty.
    pub fn new(
        id: SequenceId,
        prompt_tokens: &[u32],
        max_tokens: usize,
        adapter: Option<Arc<Adapter>>,
        prompt_output: PromptOutput,
    ) -> Self {
        let num_virtual_tokens = adapter.as_ref().map_or(0, |adapter| adapter.num_virtual_tokens());
        let num_prompt_tokens = num_virtual_tokens + prompt_tokens.len();
        // Room for the whole life, so that decoding does not allocate.
        let mut tokens = Vec::with_capacity(num_prompt_tokens + max_tokens);
        tokens.extend((FIRST_VIRTUAL_TOKEN..).take(num_virtual_tokens));
        tokens.extend_from_slice(prompt_tokens);
        Self {
            id,
            chain: ChainHash::root(adapter.as_ref().map(|adapter| adapter.generation.as_str())),
            flow: Flow::new(Account::default(), adapter.as_deref()),
            adapter,
            num_promised_tokens: 0,
            block_table: Vec::with_capacity(BlockPool::num_blocks_for(num_prompt_tokens + max_tokens)),
            tokens,
            num_virtual_tokens,
            num_prompt_tokens,
            max_tokens,
            num_computed_tokens: 0,
            num_chained_blocks: 0,
            num_pinned_tokens: num_virtual_tokens,
            prompt_output,
            // Nothing that was said predicts the first token.
            num_scored_tokens: num_virtual_tokens + 1,
            speculation: Speculation::default(),
            prediction: None,
            leader: None,
            num_restored_tokens: 0,
            last_step: 0,
        }
    }

    /// Pins the first `num_tokens` of the prompt in the prefix cache. The prelude before them is pinned in any case.
    #[must_use]
    pub fn with_pinned_prefix(self, num_tokens: usize) -> Self {
        Self { num_pinned_tokens: self.num_virtual_tokens + num_tokens, ..self }
    }

    /// Charges what is computed to `account`.
    #[must_use]
    pub fn for_account(self, account: Account) -> Self {
        Self { flow: Flow::new(account, self.adapter.as_deref()), ..self }
    }

    /// Guesses the output from what the client expects of it.
    #[must_use]
    pub fn with_prediction(self, prediction: Option<Prediction>) -> Self {
        Self { prediction, ..self }
    }

    pub fn id(&self) -> SequenceId {
        self.id
    }

    pub fn adapter(&self) -> Option<&Arc<Adapter>> {
        self.adapter.as_ref()
    }

    /// The adapter's generation; the base is `None`, which sorts first.
    pub fn generation(&self) -> Option<&str> {
        self.adapter.as_ref().map(|adapter| adapter.generation.as_str())
    }

    /// Whose share its rows are of.
    pub fn flow(&self) -> &Flow {
        &self.flow
    }

    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Positions of the adapter's prelude, which no client has sent.
    pub fn num_virtual_tokens(&self) -> usize {
        self.num_virtual_tokens
    }

    /// Tokens of the client's prompt.
    pub fn num_prompt_tokens(&self) -> usize {
        self.num_prompt_tokens - self.num_virtual_tokens
    }

    pub fn num_computed_tokens(&self) -> usize {
        self.num_computed_tokens
    }

    /// Tokens still to go through the model; 1 for a decode row.
    pub fn num_uncomputed_tokens(&self) -> usize {
        self.tokens.len() - self.num_computed_tokens
    }

    /// Guessed next tokens, whose rows follow those of the tokens in the current plan.
    pub fn draft(&self) -> &[u32] {
        self.speculation.draft()
    }

    pub fn block_table(&self) -> &[BlockId] {
        &self.block_table
    }

    /// The full blocks that it could take from a cache, in order.
    pub(super) fn prefix_blocks(&self) -> Vec<PrefixBlock> {
        if self.needs_all_logits() {
            return Vec::new();
        }
        let mut parent = ChainHash::root(self.generation());
        let (blocks, _) = self.tokens[..self.tokens.len() - 1].as_chunks::<BLOCK_SIZE>();
        let blocks = blocks.iter().map(|tokens| {
            let chain = parent.extend(tokens);
            PrefixBlock { parent: std::mem::replace(&mut parent, chain), chain, tokens: *tokens }
        });
        blocks.collect()
    }

    /// Tokens whose blocks have been read from the disk for it, virtual ones included.
    pub fn num_restored_tokens(&self) -> usize {
        self.num_restored_tokens
    }

    pub(super) fn set_restored(&mut self, num_tokens: usize) {
        self.num_restored_tokens = num_tokens;
    }

    /// Whom it has waited for last.
    pub(super) fn leader(&self) -> Option<Leader> {
        self.leader
    }

    pub(super) fn follow(&mut self, leader: Leader) {
        self.leader = Some(leader);
    }

    /// Tokens at the start whose K and V `other` can take over when they are computed here.
    pub(super) fn num_shared_tokens(&self, other: &Self) -> usize {
        if other.needs_all_logits() || self.generation() != other.generation() {
            return 0;
        }
        let wanted = &other.tokens[..other.tokens.len() - 1];
        wanted.iter().zip(&self.tokens).take_while(|(a, b)| a == b).count()
    }

    /// A position that is taken over has no logits.
    fn needs_all_logits(&self) -> bool {
        self.prompt_output == PromptOutput::Logprobs
    }

    /// True when nothing is left to generate.
    pub fn is_at_max_tokens(&self) -> bool {
        self.num_tokens_left() == 0
    }

    fn num_tokens_left(&self) -> usize {
        (self.num_prompt_tokens + self.max_tokens).saturating_sub(self.tokens.len())
    }

    /// It runs from now on, with all its tokens to compute.
    pub(super) fn promise(&mut self) -> usize {
        self.num_promised_tokens = self.num_uncomputed_tokens();
        self.num_promised_tokens
    }

    /// Of `num_rows` computed ones and those to come no more, how many tokens it was admitted for.
    pub(super) fn take_promised(&mut self, num_rows: usize) -> usize {
        let num_taken = num_rows.min(self.num_promised_tokens);
        self.num_promised_tokens -= num_taken;
        num_taken
    }

    /// Whether all that it was admitted for is computed: while it runs, what it computes from now on is a row for each token that it
    /// draws.
    pub(super) fn is_streaming(&self) -> bool {
        self.num_promised_tokens == 0
    }

    /// Adds a generated token.
    pub fn push(&mut self, token: u32) {
        self.tokens.push(token);
        if let Some(prediction) = &mut self.prediction {
            prediction.follow(token);
        }
    }

    /// What the logits at `position` are for; positions past the last token are those of the draft.
    pub fn logits_use(&self, position: usize) -> Option<LogitsUse> {
        let next = position + 1;
        if let Some(index) = next.checked_sub(self.tokens.len() + 1) {
            return Some(LogitsUse::Verify { index, guess: self.draft()[index] });
        }
        if next == self.tokens.len() {
            return match self.prompt_output {
                PromptOutput::Logits => Some(LogitsUse::Report),
                _ => (!self.is_at_max_tokens()).then_some(LogitsUse::Sample),
            };
        }
        let is_scored = self.prompt_output == PromptOutput::Logprobs
            && (self.num_scored_tokens..self.num_prompt_tokens).contains(&next);
        is_scored.then(|| LogitsUse::Score(self.tokens[next]))
    }

    /// Guesses at most `most` next tokens, never more than can be output; `past` are replies of the same flow.
    pub(super) fn speculate(&mut self, past: &[u32], most: usize) {
        // The row of the last token draws one already.
        let most = most.min(self.num_tokens_left().saturating_sub(1));
        let expected = self.prediction.as_ref().map_or(&[][..], Prediction::expected);
        self.speculation.propose(&self.tokens, expected, past, most);
    }

    /// Most guesses that are worth their rows where the base of a step takes as long as `as_base` rows.
    pub(super) fn worth_guessing(&self, as_base: usize) -> usize {
        self.speculation.worth_guessing(as_base)
    }

    /// Gives up the guesses that the blocks have no room for.
    pub(super) fn fit_draft(&mut self) {
        self.speculation.truncate(self.block_table.len() * BLOCK_SIZE - self.tokens.len());
    }

    /// The next guess came true: its row counts. It has become the last token.
    pub(super) fn accept(&mut self, pool: &mut BlockPool) {
        self.speculation.accept();
        self.advance(1, pool);
    }

    /// Ends the guesses of a step.
    pub(super) fn settle(&mut self) {
        self.speculation.settle();
    }

    /// True when the blocks have room for every token, and every guess.
    pub(super) fn is_covered(&self) -> bool {
        self.block_table.len() * BLOCK_SIZE >= self.tokens.len() + self.draft().len()
    }

    pub(super) fn push_block(&mut self, block: BlockId) {
        self.block_table.push(block);
    }

    /// Takes the longest chain of cached blocks, always leaving at least one token to compute. Returns a block that begins
    /// as the next one would, with a share in it, and for how many positions.
    pub(super) fn match_prefix(&mut self, pool: &mut BlockPool) -> Option<(BlockId, usize)> {
        if self.needs_all_logits() {
            return None;
        }
        let num_to_match = self.tokens.len() - 1;
        for index in 0..num_to_match / BLOCK_SIZE {
            let chain = self.chain.extend(self.tokens_of_block(index));
            let Some(block) = pool.acquire_cached(&chain) else { break };
            self.block_table.push(block);
            self.chain_block(block, chain, pool);
        }
        self.num_computed_tokens = self.num_chained_blocks * BLOCK_SIZE;
        pool.acquire_partial(&self.chain, &self.tokens[self.num_computed_tokens..num_to_match])
    }

    /// Takes `block` as its next one, whose first `num_positions` will be a copy of another's.
    pub(super) fn push_copy(&mut self, block: BlockId, num_positions: usize) {
        self.block_table.push(block);
        self.num_computed_tokens += num_positions;
    }

    pub(super) fn last_step(&self) -> u64 {
        self.last_step
    }

    pub(super) fn set_last_step(&mut self, step: u64) {
        self.last_step = step;
    }

    /// The next `num_rows` tokens have gone through the model: their full blocks become known to the prefix cache.
    pub(super) fn advance(&mut self, num_rows: usize, pool: &mut BlockPool) {
        self.num_computed_tokens += num_rows;
        self.num_scored_tokens = self.num_scored_tokens.max(self.num_prompt_tokens.min(self.num_computed_tokens + 1));
        for index in self.num_chained_blocks..self.num_computed_tokens / BLOCK_SIZE {
            let (block, tokens) = (self.block_table[index], self.tokens_of_block(index));
            let chain = self.chain.extend(tokens);
            pool.register(block, self.chain, tokens, Some(chain));
            self.chain_block(block, chain, pool);
        }
    }

    fn tokens_of_block(&self, index: usize) -> &[u32] {
        &self.tokens[index * BLOCK_SIZE..][..BLOCK_SIZE]
    }

    /// The next full block is known to the prefix cache, and with it the chain is `chain`.
    fn chain_block(&mut self, block: BlockId, chain: ChainHash, pool: &mut BlockPool) {
        self.chain = chain;
        self.num_chained_blocks += 1;
        if self.num_chained_blocks * BLOCK_SIZE <= self.num_pinned_tokens {
            pool.pin(block);
        }
    }

    /// Gives every block back, the last one as a tail of the prefix cache; the tokens stay, to be computed again.
    pub(super) fn release(&mut self, pool: &mut BlockPool) {
        let tail = &self.tokens[self.num_chained_blocks * BLOCK_SIZE..self.num_computed_tokens];
        if let (false, Some(&block)) = (tail.is_empty(), self.block_table.get(self.num_chained_blocks)) {
            pool.register(block, self.chain, tail, None);
        }
        pool.release(&mut self.block_table);
        self.num_computed_tokens = 0;
        self.num_chained_blocks = 0;
        self.chain = ChainHash::root(self.generation());
    }
}

/// Why a row's logits are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogitsUse {
    /// The next token is to be drawn from them.
    Sample,
    /// The next token is to be drawn from them if `guess`, the draft's token `index`, is what the row before drew.
    Verify { index: usize, guess: u32 },
    /// The log-probability of this prompt token is to be read from them.
    Score(u32),
    /// The client wants them as they are.
    Report,
}
