//! Which KV blocks can be used again: blocks found by what was computed into them, and the order they go in.

use std::collections::hash_map::{self, HashMap};

use kernels::attention::BlockId;
use sha2::{Digest, Sha256};

/// Identity of a full block: SHA-256 over the adapter generation and every token up to the end of the block.
///
/// A pool belongs to one base, so the base needs no part in it. The hash is cryptographic because prompts are chosen by
/// clients: a collision would hand one client's KV to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ChainHash([u8; ChainHash::LEN]);

impl ChainHash {
    pub const LEN: usize = 32;

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

    pub fn from_bytes(bytes: [u8; Self::LEN]) -> Self {
        Self(bytes)
    }

    pub fn as_bytes(&self) -> &[u8; Self::LEN] {
        &self.0
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

/// Full blocks by identity, and the last ones of ended sequences, which are full to a part (*tails*). Those that no
/// sequence holds are *idle*: in a list from the least recently used, to evict. *Pinned* ones are evicted after all others.
#[derive(Debug)]
pub struct PrefixCache {
    by_hash: HashMap<ChainHash, BlockId>,
    /// The blocks behind each chain, in the order they came.
    children: HashMap<ChainHash, Vec<BlockId>>,
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
    /// `None` for a tail.
    hash: Option<ChainHash>,
    /// Those of a whole block, or less in a tail.
    tokens: Vec<u32>,
    is_pinned: bool,
    is_idle: bool,
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
            children: HashMap::with_capacity(num_blocks),
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

    /// The block behind the chain `parent` that begins as `tokens` do for longest, and for how many of them; of equals the
    /// latest.
    pub fn get_partial(&self, parent: &ChainHash, tokens: &[u32]) -> Option<(BlockId, usize)> {
        let num_shared = |block: &BlockId| {
            let cached = self.entries[block.0 as usize].iter().flat_map(|entry| &entry.tokens);
            cached.zip(tokens).take_while(|(a, b)| a == b).count()
        };
        let children = self.children.get(parent)?.iter();
        let longest = children.map(|block| (*block, num_shared(block))).max_by_key(|(_, num_shared)| *num_shared);
        longest.filter(|(_, num_shared)| *num_shared > 0)
    }

    pub fn contains(&self, block: BlockId) -> bool {
        self.entries[block.0 as usize].is_some()
    }

    pub fn num_idle(&self) -> usize {
        self.num_idle
    }

    /// Adds a block in use: `tokens` behind the chain `parent`, a whole block of them with its identity `hash`, or a tail.
    /// What is cached already is not cached again: the first block of an identity stays, and so does what begins with a
    /// whole tail.
    pub fn insert(&mut self, parent: ChainHash, tokens: &[u32], hash: Option<ChainHash>, block: BlockId) {
        let is_known = match &hash {
            Some(hash) => self.by_hash.contains_key(hash),
            None => self.get_partial(&parent, tokens).is_some_and(|(_, num_shared)| num_shared == tokens.len()),
        };
        if is_known {
            return;
        }
        if let Some(hash) = hash {
            self.by_hash.insert(hash, block);
        }
        self.children.entry(parent).or_default().push(block);
        let tokens = tokens.to_vec();
        self.entries[block.0 as usize] =
            Some(Entry { parent, hash, tokens, is_pinned: false, is_idle: false, older: None, newer: None });
    }

    /// Forgets an idle tail that `tokens` go on from, and gives it away: what is cached for them says all that it said.
    pub fn take_superseded(&mut self, parent: &ChainHash, tokens: &[u32]) -> Option<BlockId> {
        let is_superseded = |block: &&BlockId| {
            let entry = &self.entries[block.0 as usize];
            entry.as_ref().is_some_and(|entry| {
                entry.is_idle && entry.tokens.len() < tokens.len() && tokens.starts_with(&entry.tokens)
            })
        };
        let block = *self.children.get(parent)?.iter().find(is_superseded)?;
        self.forget(block);
        Some(block)
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
            (entry.older, entry.newer, entry.is_idle) = (older, None, true);
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
        entry.is_idle = false;
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
        self.forget(block);
        Some(block)
    }

    /// Of an idle block.
    fn forget(&mut self, block: BlockId) {
        self.mark_used(block);
        self.set_pinned(block, false);
        let Some(Entry { parent, hash, .. }) = self.entries[block.0 as usize].take() else { return };
        if let Some(hash) = hash {
            self.by_hash.remove(&hash);
        }
        if let hash_map::Entry::Occupied(mut children) = self.children.entry(parent) {
            children.get_mut().retain(|child| *child != block);
            if children.get().is_empty() {
                children.remove();
            }
        }
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
    use kernels::attention::BLOCK_SIZE;

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
            let hash = root.extend(&[index; BLOCK_SIZE]);
            cache.insert(root, &[index; BLOCK_SIZE], Some(hash), BlockId(index));
            hash
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
        cache.insert(root, &tokens, Some(root.extend(&tokens)), BlockId(1));
        assert_eq!(cache.get_partial(&root, &[7; BLOCK_SIZE]), Some((BlockId(1), 5)));
        assert_eq!(cache.get_partial(&root, &[7; 3]), Some((BlockId(1), 3)));
        assert_eq!(cache.get_partial(&root, &[8; BLOCK_SIZE]), None);
        assert_eq!(cache.get_partial(&root.extend(&tokens), &[7; BLOCK_SIZE]), None);
        cache.mark_idle(BlockId(1));
        cache.evict();
        assert_eq!(cache.get_partial(&root, &[7; BLOCK_SIZE]), None);
    }

    #[test]
    fn a_tail_is_found_until_one_that_goes_on_from_it_takes_its_place() {
        let (mut cache, root) = (PrefixCache::new(3), ChainHash::root(None));
        cache.insert(root, &[1, 2], None, BlockId(0));
        cache.insert(root, &[1, 2], None, BlockId(1));
        assert!(!cache.contains(BlockId(1)), "the same twice");
        cache.mark_idle(BlockId(0));
        assert_eq!(cache.get_partial(&root, &[1, 2, 3, 4]), Some((BlockId(0), 2)));
        assert_eq!(cache.take_superseded(&root, &[1, 2]), None);
        assert_eq!(cache.take_superseded(&root, &[1, 9, 3]), None);
        assert_eq!(cache.take_superseded(&root, &[1, 2, 3]), Some(BlockId(0)));
        cache.insert(root, &[1, 2, 3], None, BlockId(1));
        cache.insert(root, &[1, 2, 4], None, BlockId(2));
        assert_eq!(cache.get_partial(&root, &[1, 2, 3, 4]), Some((BlockId(1), 3)));
        assert_eq!(cache.get_partial(&root, &[1, 2, 9]), Some((BlockId(2), 2)), "of equals the latest");
        assert_eq!((cache.num_idle(), cache.evict()), (0, None));
    }
}
