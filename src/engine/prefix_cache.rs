//! Which full KV blocks can be used again: blocks found by what was computed into them, and the order they go in.

use std::collections::hash_map::{self, HashMap};

use kernels::attention::{BLOCK_SIZE, BlockId};
use sha2::{Digest, Sha256};

/// Identity of a full block: SHA-256 over the adapter generation and every token up to the end of the block.
///
/// A pool belongs to one base, so the base needs no part in it. The hash is cryptographic because prompts are chosen by
/// clients: a collision would hand one client's KV to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ChainHash([u8; 32]);

impl ChainHash {
    /// The chain before its first block.
    pub fn root(adapter_generation: Option<&str>) -> Self {
        let mut hasher = Sha256::new();
        match adapter_generation {
            None => hasher.update(b"base"),
            Some(generation) => {
                hasher.update(b"adapter:");
                hasher.update(generation.as_bytes());
            }
        }
        Self(hasher.finalize().into())
    }

    /// The chain with one more full block of `tokens`.
    #[must_use]
    pub fn extend(&self, tokens: &[u32]) -> Self {
        let mut hasher = Sha256::new();
        hasher.update(self.0);
        for token in tokens {
            hasher.update(token.to_le_bytes());
        }
        Self(hasher.finalize().into())
    }
}

/// Full blocks by identity. Those that no sequence holds are *idle*: in a list from the least recently used, to evict.
/// *Pinned* ones are evicted after all others.
#[derive(Debug)]
pub struct PrefixCache {
    by_hash: HashMap<ChainHash, BlockId>,
    /// The block that was cached last behind each chain.
    latest_child: HashMap<ChainHash, BlockId>,
    /// `[num_blocks]`; `None` for blocks that are not in the cache.
    entries: Vec<Option<Entry>>,
    idle: IdleList,
    idle_pinned: IdleList,
    num_idle: usize,
    num_pinned: usize,
}

#[derive(Debug)]
struct Entry {
    parent: ChainHash,
    hash: ChainHash,
    tokens: [u32; BLOCK_SIZE],
    is_pinned: bool,
    /// Neighbours in the list of idle blocks.
    older: Option<BlockId>,
    newer: Option<BlockId>,
}

#[derive(Debug, Default)]
struct IdleList {
    oldest: Option<BlockId>,
    newest: Option<BlockId>,
}

impl PrefixCache {
    pub fn new(num_blocks: usize) -> Self {
        Self {
            by_hash: HashMap::with_capacity(num_blocks),
            latest_child: HashMap::with_capacity(num_blocks),
            entries: std::iter::repeat_with(|| None).take(num_blocks).collect(),
            idle: IdleList::default(),
            idle_pinned: IdleList::default(),
            num_idle: 0,
            num_pinned: 0,
        }
    }

    pub fn get(&self, hash: &ChainHash) -> Option<BlockId> {
        self.by_hash.get(hash).copied()
    }

    /// A block behind the chain `parent` that begins as `tokens` do, and for how many of them. Where several do, it is
    /// the latest: behind examples that many prompts share, any of them will do.
    pub fn get_partial(&self, parent: &ChainHash, tokens: &[u32]) -> Option<(BlockId, usize)> {
        let block = *self.latest_child.get(parent)?;
        let cached = &self.entries[block.0 as usize].as_ref()?.tokens;
        let num_shared = cached.iter().zip(tokens).take_while(|(a, b)| a == b).count();
        (num_shared > 0).then_some((block, num_shared))
    }

    pub fn contains(&self, block: BlockId) -> bool {
        self.entries[block.0 as usize].is_some()
    }

    pub fn num_idle(&self) -> usize {
        self.num_idle
    }

    /// Adds a block in use: `tokens` behind the chain `parent`. The first block of an identity stays: a second one with the
    /// same content is not cached.
    pub fn insert(&mut self, parent: ChainHash, tokens: [u32; BLOCK_SIZE], block: BlockId) {
        let hash = parent.extend(&tokens);
        if let hash_map::Entry::Vacant(vacant) = self.by_hash.entry(hash) {
            vacant.insert(block);
            self.latest_child.insert(parent, block);
            self.entries[block.0 as usize] =
                Some(Entry { parent, hash, tokens, is_pinned: false, older: None, newer: None });
        }
    }

    /// Pins a cached block in use. At most half of all blocks are pinned: beyond that the least recently used of them is
    /// an ordinary one again, and if all are in use, so stays `block`.
    pub fn pin(&mut self, block: BlockId) {
        if self.entries[block.0 as usize].as_ref().is_none_or(|entry| entry.is_pinned) {
            return;
        }
        if self.num_pinned >= self.entries.len() / 2 {
            let Some(oldest) = self.idle_pinned.oldest else { return };
            self.mark_used(oldest);
            self.set_pinned(oldest, false);
            self.mark_idle(oldest);
        }
        self.set_pinned(block, true);
    }

    /// A cached block has lost its last sequence: it becomes the most recently used of the idle ones.
    pub fn mark_idle(&mut self, block: BlockId) {
        let older = self.list(block).newest.replace(block);
        if let Some(entry) = &mut self.entries[block.0 as usize] {
            (entry.older, entry.newer) = (older, None);
        }
        match older {
            Some(older) => self.set_newer(older, Some(block)),
            None => self.list(block).oldest = Some(block),
        }
        self.num_idle += 1;
    }

    /// An idle block has found a sequence again.
    pub fn mark_used(&mut self, block: BlockId) {
        let Some(entry) = &mut self.entries[block.0 as usize] else { return };
        let (older, newer) = (entry.older.take(), entry.newer.take());
        match older {
            Some(older) => self.set_newer(older, newer),
            None => self.list(block).oldest = newer,
        }
        match newer {
            Some(newer) => self.set_older(newer, older),
            None => self.list(block).newest = older,
        }
        self.num_idle -= 1;
    }

    /// Forgets the least recently used idle block and gives it away.
    pub fn evict(&mut self) -> Option<BlockId> {
        let block = self.idle.oldest.or(self.idle_pinned.oldest)?;
        self.mark_used(block);
        self.set_pinned(block, false);
        if let Some(Entry { parent, hash, .. }) = self.entries[block.0 as usize].take() {
            self.by_hash.remove(&hash);
            if self.latest_child.get(&parent) == Some(&block) {
                self.latest_child.remove(&parent);
            }
        }
        Some(block)
    }

    /// Where `block` is while it is idle.
    fn list(&mut self, block: BlockId) -> &mut IdleList {
        match &self.entries[block.0 as usize] {
            Some(Entry { is_pinned: true, .. }) => &mut self.idle_pinned,
            _ => &mut self.idle,
        }
    }

    /// Of a block that is in no list.
    fn set_pinned(&mut self, block: BlockId, is_pinned: bool) {
        let Some(entry) = &mut self.entries[block.0 as usize] else { return };
        let was_pinned = std::mem::replace(&mut entry.is_pinned, is_pinned);
        self.num_pinned = self.num_pinned + usize::from(is_pinned) - usize::from(was_pinned);
    }

    fn set_older(&mut self, block: BlockId, older: Option<BlockId>) {
        if let Some(entry) = &mut self.entries[block.0 as usize] {
            entry.older = older;
        }
    }

    fn set_newer(&mut self, block: BlockId, newer: Option<BlockId>) {
        if let Some(entry) = &mut self.entries[block.0 as usize] {
            entry.newer = newer;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identity_depends_on_the_adapter_generation_and_on_every_earlier_token() {
        let chain = |generation, blocks: &[&[u32]]| {
            blocks.iter().fold(ChainHash::root(generation), |hash, tokens| hash.extend(tokens))
        };
        let base = chain(None, &[&[1, 2], &[3, 4]]);
        assert_eq!(base, chain(None, &[&[1, 2], &[3, 4]]));
        assert_ne!(base, chain(Some("a"), &[&[1, 2], &[3, 4]]));
        assert_ne!(chain(Some("a"), &[&[1, 2]]), chain(Some("b"), &[&[1, 2]]));
        assert_ne!(base, chain(None, &[&[9, 2], &[3, 4]]));
        assert_ne!(base, chain(None, &[&[1, 2, 3, 4]]));
        assert_ne!(ChainHash::root(None), ChainHash::root(Some("")));
    }

    /// `num_blocks` blocks behind the root, of one repeated token each.
    fn cache(num_blocks: u32) -> (PrefixCache, Vec<ChainHash>) {
        let (mut cache, root) = (PrefixCache::new(num_blocks as usize), ChainHash::root(None));
        let hashes = (0..num_blocks).map(|index| {
            cache.insert(root, [index; BLOCK_SIZE], BlockId(index));
            root.extend(&[index; BLOCK_SIZE])
        });
        let hashes = hashes.collect();
        (cache, hashes)
    }

    fn evict_all(cache: &mut PrefixCache) -> Vec<u32> {
        std::iter::from_fn(|| cache.evict()).map(|block| block.0).collect()
    }

    #[test]
    fn idle_blocks_are_evicted_from_the_least_recently_used() {
        let (mut cache, hashes) = cache(3);
        (0..3).for_each(|index| cache.mark_idle(BlockId(index)));
        cache.mark_used(BlockId(1));
        assert_eq!(cache.num_idle(), 2);
        cache.mark_idle(BlockId(1));
        assert_eq!(evict_all(&mut cache), [0, 2, 1]);
        assert!(hashes.iter().all(|hash| cache.get(hash).is_none()));
    }

    #[test]
    fn pinned_blocks_are_evicted_last_and_at_most_half_of_all_are_pinned() {
        let (mut cache, _) = cache(5);
        [3, 0].into_iter().for_each(|index| cache.pin(BlockId(index)));
        (0..4).for_each(|index| cache.mark_idle(BlockId(index)));
        // The third takes the place of the least recently used.
        cache.pin(BlockId(4));
        cache.mark_idle(BlockId(4));
        assert_eq!(cache.num_pinned, 2);
        assert_eq!(evict_all(&mut cache), [1, 2, 0, 3, 4]);
        assert_eq!((cache.num_idle(), cache.num_pinned), (0, 0));
    }

    #[test]
    fn no_block_is_pinned_in_place_of_one_in_use() {
        let (mut cache, _) = cache(2);
        [0, 1].into_iter().for_each(|index| cache.pin(BlockId(index)));
        [0, 1].into_iter().for_each(|index| cache.mark_idle(BlockId(index)));
        assert_eq!(evict_all(&mut cache), [1, 0]);
    }

    #[test]
    fn a_block_that_begins_the_same_is_found_until_it_is_evicted() {
        let (mut cache, root) = (PrefixCache::new(2), ChainHash::root(None));
        let mut tokens = [7; BLOCK_SIZE];
        tokens[5] = 8;
        cache.insert(root, tokens, BlockId(1));
        assert_eq!(cache.get_partial(&root, &[7; BLOCK_SIZE]), Some((BlockId(1), 5)));
        assert_eq!(cache.get_partial(&root, &[7; 3]), Some((BlockId(1), 3)));
        assert_eq!(cache.get_partial(&root, &[8; BLOCK_SIZE]), None);
        assert_eq!(cache.get_partial(&root.extend(&tokens), &[7; BLOCK_SIZE]), None);
        cache.mark_idle(BlockId(1));
        cache.evict();
        assert_eq!(cache.get_partial(&root, &[7; BLOCK_SIZE]), None);
    }
}
