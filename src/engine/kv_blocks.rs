//! The pool of KV blocks: who holds which, and what is left.
//!
//! A block is *used* (held by one or more sequences), *idle* (cached, held by none) or *free*. Idle blocks are taken
//! when no free one is left.

use std::collections::VecDeque;

use kernels::attention::{BLOCK_SIZE, BlockId};

use super::prefix_cache::{ChainHash, PrefixCache};

#[derive(Debug)]
pub struct BlockPool {
    /// `[num_blocks]`
    ref_counts: Vec<u32>,
    free: Vec<BlockId>,
    cache: PrefixCache,
    /// Full blocks that have been computed, in that order, for who keeps them elsewhere too; `None` where nobody does.
    unsaved: Option<VecDeque<(ChainHash, BlockId)>>,
}

impl BlockPool {
    /// # Panics
    /// When `num_blocks` does not fit a [`BlockId`].
    pub fn new(num_blocks: usize) -> Self {
        let num_ids = u32::try_from(num_blocks).expect("a KV store has fewer than 2^32 blocks");
        Self {
            ref_counts: vec![0; num_blocks],
            free: (0..num_ids).rev().map(BlockId).collect(),
            cache: PrefixCache::new(num_blocks),
            unsaved: None,
        }
    }

    /// Remembers the full blocks that are computed from now on until they are asked for.
    #[must_use]
    pub fn with_saving(self) -> Self {
        Self { unsaved: Some(VecDeque::new()), ..self }
    }

    /// Blocks that hold `num_tokens` positions.
    pub fn num_blocks_for(num_tokens: usize) -> usize {
        num_tokens.div_ceil(BLOCK_SIZE)
    }

    pub fn num_blocks(&self) -> usize {
        self.ref_counts.len()
    }

    pub fn blocks_used(&self) -> usize {
        self.ref_counts.len() - self.blocks_available()
    }

    /// Blocks that [`BlockPool::allocate`] can still give.
    pub fn blocks_available(&self) -> usize {
        self.free.len() + self.cache.num_idle()
    }

    /// How many shares in a block are held.
    pub fn num_holders(&self, block: BlockId) -> u32 {
        self.ref_counts[block.0 as usize]
    }

    /// A block of its own for one sequence, or `None` when all are used.
    pub fn allocate(&mut self) -> Option<BlockId> {
        let block = self.free.pop().or_else(|| self.cache.evict())?;
        self.ref_counts[block.0 as usize] = 1;
        Some(block)
    }

    /// A share in the cached block of this identity, if there is one. Its positions must not be written again.
    pub fn acquire_cached(&mut self, hash: &ChainHash) -> Option<BlockId> {
        let block = self.cache.get(hash)?;
        self.share(block);
        Some(block)
    }

    /// A share in a cached block that begins as `tokens` do behind the chain `parent`, and for how many of them: its
    /// content is to be copied, and [`BlockPool::release_shared`] to be called.
    pub fn acquire_partial(&mut self, parent: &ChainHash, tokens: &[u32]) -> Option<(BlockId, usize)> {
        let (block, num_shared) = self.cache.get_partial(parent, tokens)?;
        self.share(block);
        Some((block, num_shared))
    }

    /// A share in a block that is cached or in use.
    pub fn share(&mut self, block: BlockId) {
        let ref_count = &mut self.ref_counts[block.0 as usize];
        if *ref_count == 0 {
            self.cache.mark_used(block);
        }
        *ref_count += 1;
    }

    /// Makes a block available to others in which `tokens` behind the chain `parent` are computed: all of its positions, or
    /// the first ones, if nobody will write the others any more. `chain` is that with the block, `None` if it is not full.
    pub fn register(&mut self, block: BlockId, parent: ChainHash, tokens: &[u32], chain: Option<ChainHash>) {
        if self.cache.contains(block) {
            return;
        }
        self.cache_block(block, parent, tokens, chain);
        if let Some(unsaved) = &mut self.unsaved
            && let Some(chain) = chain.filter(|_| self.cache.contains(block))
        {
            // No more are cached than there are blocks: if there are more here, the oldest have been evicted.
            if unsaved.len() == self.ref_counts.len() {
                unsaved.pop_front();
            }
            unsaved.push_back((chain, block));
        }
    }

    /// Caches a block whose content is kept elsewhere, as the latest of the idle ones. It is to be written at once. `None`
    /// where it is cached already, or all blocks are used.
    pub fn restore(&mut self, parent: ChainHash, tokens: &[u32], chain: ChainHash) -> Option<BlockId> {
        if self.is_cached(&chain) {
            return None;
        }
        let block = self.allocate()?;
        self.cache_block(block, parent, tokens, Some(chain));
        self.release_shared(block);
        Some(block)
    }

    /// The block that was computed first of those not asked for yet and still cached.
    pub fn next_unsaved(&mut self) -> Option<(ChainHash, BlockId)> {
        let Self { unsaved, cache, .. } = self;
        std::iter::from_fn(|| unsaved.as_mut()?.pop_front()).find(|(chain, block)| cache.get(chain) == Some(*block))
    }

    pub fn has_unsaved(&self) -> bool {
        self.unsaved.as_ref().is_some_and(|unsaved| !unsaved.is_empty())
    }

    pub fn is_cached(&self, chain: &ChainHash) -> bool {
        self.cache.get(chain).is_some()
    }

    /// Whether the block is cached and held by nobody.
    pub fn is_idle(&self, chain: &ChainHash) -> bool {
        self.cache.get(chain).is_some_and(|block| self.num_holders(block) == 0)
    }

    fn cache_block(&mut self, block: BlockId, parent: ChainHash, tokens: &[u32], chain: Option<ChainHash>) {
        while let Some(superseded) = self.cache.take_superseded(&parent, tokens) {
            self.free.push(superseded);
        }
        self.cache.insert(parent, tokens, chain, block);
    }

    /// A cached block of a sequence is to be evicted after all others.
    pub fn pin(&mut self, block: BlockId) {
        self.cache.pin(block);
    }

    /// Takes every block away from a sequence, the last first, so that the start of a chain is evicted after its end.
    pub fn release(&mut self, block_table: &mut Vec<BlockId>) {
        while let Some(block) = block_table.pop() {
            self.release_shared(block);
        }
    }

    /// Takes one share away.
    pub fn release_shared(&mut self, block: BlockId) {
        let ref_count = &mut self.ref_counts[block.0 as usize];
        *ref_count -= 1;
        if *ref_count > 0 {
            return;
        }
        if self.cache.contains(block) {
            self.cache.mark_idle(block);
        } else {
            self.free.push(block);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(token: u32) -> ChainHash {
        ChainHash::root(None).extend(&[token; BLOCK_SIZE])
    }

    fn register(pool: &mut BlockPool, block: BlockId, token: u32) {
        pool.register(block, ChainHash::root(None), &[token; BLOCK_SIZE], Some(hash(token)));
    }

    #[test]
    fn a_shared_block_is_used_until_its_last_holder_lets_go() {
        let mut pool = BlockPool::new(2);
        let mut first = vec![pool.allocate().unwrap()];
        register(&mut pool, first[0], 1);
        let mut second = vec![pool.acquire_cached(&hash(1)).unwrap()];
        assert_eq!(first, second);
        pool.release(&mut first);
        assert_eq!(pool.blocks_used(), 1);
        pool.release(&mut second);
        assert_eq!((pool.blocks_used(), pool.blocks_available()), (0, 2));
        assert!(pool.acquire_cached(&hash(1)).is_some(), "an idle block can be used again");
    }

    #[test]
    fn idle_blocks_are_taken_only_when_no_free_one_is_left() {
        let mut pool = BlockPool::new(2);
        let mut table = vec![pool.allocate().unwrap()];
        register(&mut pool, table[0], 1);
        pool.release(&mut table);
        let mut fresh = vec![pool.allocate().unwrap()];
        let cached = pool.acquire_cached(&hash(1)).unwrap();
        assert_ne!(fresh[0], cached);
        assert_eq!(pool.allocate(), None);
        pool.release(&mut vec![cached]);
        fresh.push(pool.allocate().unwrap());
        assert_eq!(pool.acquire_cached(&hash(1)), None, "an evicted block is forgotten");
        pool.release(&mut fresh);
        assert_eq!(pool.blocks_used(), 0);
    }

    #[test]
    fn the_end_of_a_chain_is_evicted_before_its_start() {
        let mut pool = BlockPool::new(2);
        let mut table = vec![pool.allocate().unwrap(), pool.allocate().unwrap()];
        register(&mut pool, table[0], 1);
        register(&mut pool, table[1], 2);
        pool.release(&mut table);
        pool.allocate().unwrap();
        assert!(pool.acquire_cached(&hash(2)).is_none());
        assert!(pool.acquire_cached(&hash(1)).is_some());
    }

    #[test]
    fn equal_content_computed_twice_is_cached_once() {
        let mut pool = BlockPool::new(2);
        let mut table = vec![pool.allocate().unwrap(), pool.allocate().unwrap()];
        register(&mut pool, table[0], 1);
        register(&mut pool, table[1], 1);
        assert_eq!(pool.acquire_cached(&hash(1)), Some(table[0]));
        table.push(table[0]);
        pool.release(&mut table);
        assert_eq!((pool.blocks_used(), pool.blocks_available()), (0, 2));
    }
}
