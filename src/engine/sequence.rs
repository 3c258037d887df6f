//! A request's life in the engine, as far as the scheduler sees it: tokens, progress and KV blocks.

use std::sync::Arc;

use kernels::attention::{BLOCK_SIZE, BlockId};

use super::kv_blocks::BlockPool;
use super::prefix_cache::ChainHash;
use crate::adapter::canonical::Adapter;

/// Identity of a sequence; later arrivals have greater ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId(pub u64);

#[derive(Debug)]
pub struct Sequence {
    id: SequenceId,
    adapter: Option<Arc<Adapter>>,
    /// Prompt, then output.
    tokens: Vec<u32>,
    num_prompt_tokens: usize,
    max_tokens: usize,
    /// Positions whose K and V are in the KV store.
    num_computed_tokens: usize,
    block_table: Vec<BlockId>,
    /// Identity of the last block known to the prefix cache, and how many are.
    chain: ChainHash,
    num_chained_blocks: usize,
    /// Prompt tokens whose log-probability has been asked for, or `None` when nobody wants them.
    num_scored_tokens: Option<usize>,
}

impl Sequence {
    /// `prompt_tokens` must not be empty. `prompt_logprobs` asks for the logits of every prompt position.
    pub fn new(
        id: SequenceId,
        prompt_tokens: Vec<u32>,
        max_tokens: usize,
        adapter: Option<Arc<Adapter>>,
        prompt_logprobs: bool,
    ) -> Self {
        let num_prompt_tokens = prompt_tokens.len();
        let mut tokens = prompt_tokens;
        // Room for the whole life, so that decoding does not allocate.
        tokens.reserve_exact(max_tokens);
        Self {
            id,
            chain: ChainHash::root(adapter.as_ref().map(|adapter| adapter.generation.as_str())),
            adapter,
            block_table: Vec::with_capacity(BlockPool::num_blocks_for(num_prompt_tokens + max_tokens)),
            tokens,
            num_prompt_tokens,
            max_tokens,
            num_computed_tokens: 0,
            num_chained_blocks: 0,
            // Nothing predicts the first token.
            num_scored_tokens: prompt_logprobs.then_some(1),
        }
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

    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    pub fn num_prompt_tokens(&self) -> usize {
        self.num_prompt_tokens
    }

    pub fn num_computed_tokens(&self) -> usize {
        self.num_computed_tokens
    }

    /// Tokens still to go through the model; 1 for a decode row.
    pub fn num_uncomputed_tokens(&self) -> usize {
        self.tokens.len() - self.num_computed_tokens
    }

    pub fn block_table(&self) -> &[BlockId] {
        &self.block_table
    }

    /// True when nothing is left to generate.
    pub fn is_at_max_tokens(&self) -> bool {
        self.tokens.len() - self.num_prompt_tokens >= self.max_tokens
    }

    /// Adds a generated token.
    pub fn push(&mut self, token: u32) {
        self.tokens.push(token);
    }

    /// What the logits at `position` are for: the next prompt token to score, the next token to sample, or nothing.
    pub fn logits_use(&self, position: usize) -> Option<LogitsUse> {
        let next = position + 1;
        if next == self.tokens.len() {
            return (!self.is_at_max_tokens()).then_some(LogitsUse::Sample);
        }
        let num_scored = self.num_scored_tokens?;
        (num_scored..self.num_prompt_tokens).contains(&next).then(|| LogitsUse::Score(self.tokens[next]))
    }

    /// True when the blocks have room for every token.
    pub(super) fn is_covered(&self) -> bool {
        self.block_table.len() * BLOCK_SIZE >= self.tokens.len()
    }

    pub(super) fn push_block(&mut self, block: BlockId) {
        self.block_table.push(block);
    }

    /// Takes the longest chain of cached blocks, always leaving at least one token to compute.
    pub(super) fn match_prefix(&mut self, pool: &mut BlockPool) {
        if self.num_scored_tokens.is_some() {
            return; // A cached position has no logits.
        }
        let max_blocks = (self.tokens.len() - 1) / BLOCK_SIZE;
        for tokens in self.tokens.chunks_exact(BLOCK_SIZE).take(max_blocks) {
            let chain = self.chain.extend(tokens);
            let Some(block) = pool.acquire_cached(&chain) else { break };
            self.block_table.push(block);
            self.chain = chain;
            self.num_chained_blocks += 1;
        }
        self.num_computed_tokens = self.num_chained_blocks * BLOCK_SIZE;
    }

    /// The next `num_rows` tokens have gone through the model: their full blocks become known to the prefix cache.
    pub(super) fn advance(&mut self, num_rows: usize, pool: &mut BlockPool) {
        self.num_computed_tokens += num_rows;
        if let Some(num_scored) = &mut self.num_scored_tokens {
            *num_scored = (*num_scored).max(self.num_prompt_tokens.min(self.num_computed_tokens + 1));
        }
        for index in self.num_chained_blocks..self.num_computed_tokens / BLOCK_SIZE {
            self.chain = self.chain.extend(&self.tokens[index * BLOCK_SIZE..(index + 1) * BLOCK_SIZE]);
            pool.register(self.block_table[index], self.chain);
            self.num_chained_blocks = index + 1;
        }
    }

    /// Gives every block back; the tokens stay, to be computed again.
    pub(super) fn release(&mut self, pool: &mut BlockPool) {
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
    /// The log-probability of this prompt token is to be read from them.
    Score(u32),
}
