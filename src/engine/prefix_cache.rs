//! Which full KV blocks can be used again: blocks found by what was computed into them, and the order they go in.

use std::collections::hash_map::{self, HashMap};

use kernels::attention::BlockId;
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
#[derive(Debug)]
pub struct PrefixCache {
    by_hash: HashMap<ChainHash, BlockId>,
    /// `[num_blocks]`; `None` for blocks that are not in the cache.
    entries: Vec<Option<Entry>>,
    oldest_idle: Option<BlockId>,
    newest_idle: Option<BlockId>,
    num_idle: usize,
}

#[derive(Debug)]
struct Entry {
    hash: ChainHash,
    /// Neighbours in the list of idle blocks.
    older: Option<BlockId>,
    newer: Option<BlockId>,
}

impl PrefixCache {
    pub fn new(num_blocks: usize) -> Self {
        Self {
            by_hash: HashMap::with_capacity(num_blocks),
            entries: std::iter::repeat_with(|| None).take(num_blocks).collect(),
            oldest_idle: None,
            newest_idle: None,
            num_idle: 0,
        }
    }

    pub fn get(&self, hash: &ChainHash) -> Option<BlockId> {
        self.by_hash.get(hash).copied()
    }

    pub fn contains(&self, block: BlockId) -> bool {
        self.entries[block.0 as usize].is_some()
    }

    pub fn num_idle(&self) -> usize {
        self.num_idle
    }

    /// Adds a block in use. The first block of an identity stays: a second one with the same content is not cached.
    pub fn insert(&mut self, hash: ChainHash, block: BlockId) {
        if let hash_map::Entry::Vacant(vacant) = self.by_hash.entry(hash) {
            vacant.insert(block);
            self.entries[block.0 as usize] = Some(Entry { hash, older: None, newer: None });
        }
    }

    /// A cached block has lost its last sequence: it becomes the most recently used of the idle ones.
    pub fn mark_idle(&mut self, block: BlockId) {
        let older = self.newest_idle.replace(block);
        if let Some(entry) = &mut self.entries[block.0 as usize] {
            (entry.older, entry.newer) = (older, None);
        }
        match older {
            Some(older) => self.set_newer(older, Some(block)),
            None => self.oldest_idle = Some(block),
        }
        self.num_idle += 1;
    }

    /// An idle block has found a sequence again.
    pub fn mark_used(&mut self, block: BlockId) {
        let Some(entry) = &mut self.entries[block.0 as usize] else { return };
        let (older, newer) = (entry.older.take(), entry.newer.take());
        match older {
            Some(older) => self.set_newer(older, newer),
            None => self.oldest_idle = newer,
        }
        match newer {
            Some(newer) => self.set_older(newer, older),
            None => self.newest_idle = older,
        }
        self.num_idle -= 1;
    }

    /// Forgets the least recently used idle block and gives it away.
    pub fn evict(&mut self) -> Option<BlockId> {
        let block = self.oldest_idle?;
        self.mark_used(block);
        if let Some(entry) = self.entries[block.0 as usize].take() {
            self.by_hash.remove(&entry.hash);
        }
        Some(block)
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

    #[test]
    fn idle_blocks_are_evicted_from_the_least_recently_used() {
        let mut cache = PrefixCache::new(3);
        let hashes: Vec<ChainHash> = (0..3).map(|token| ChainHash::root(None).extend(&[token])).collect();
        for (index, hash) in hashes.iter().enumerate() {
            cache.insert(*hash, BlockId(index as u32));
            cache.mark_idle(BlockId(index as u32));
        }
        cache.mark_used(BlockId(1));
        assert_eq!(cache.num_idle(), 2);
        cache.mark_idle(BlockId(1));
        assert_eq!([cache.evict(), cache.evict(), cache.evict()], [0, 2, 1].map(|id| Some(BlockId(id))));
        assert_eq!(cache.evict(), None);
        assert!(hashes.iter().all(|hash| cache.get(hash).is_none()));
    }
}
