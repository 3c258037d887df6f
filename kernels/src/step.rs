//! One pass of a decoder as a device sees it: rows, whose sequences and adapters they are, and what is wanted of them.

use std::ops::Range;

use crate::attention::{BLOCK_SIZE, BlockId, KvSlot};
use crate::canonical::AdapterWeights;

/// Tokens from here on are not of the vocabulary: `FIRST_VIRTUAL_TOKEN + i` is position `i` of the prelude of the row's
/// adapter.
pub const FIRST_VIRTUAL_TOKEN: u32 = 1 << 31;

/// The rows of one step, packed: prefill chunks and decode rows of many sequences, each row one token position.
///
/// Rows of one sequence are contiguous and in position order; sequences of one adapter are contiguous.
#[derive(Debug, Clone, Copy)]
pub struct Step<'a> {
    /// Blocks to be copied in the KV store before any row is computed.
    pub copies: &'a [BlockCopy],
    /// Token ids, `[rows]`.
    pub tokens: &'a [u32],
    /// The sequences in row order; their ranges cover `0..rows` without gaps.
    pub sequences: &'a [SequenceRows<'a>],
    /// Row ranges that run with an adapter, ascending and disjoint. Rows outside every group run the base alone.
    pub groups: Groups<'a>,
    /// Rows whose logits are wanted, ascending.
    pub logits_rows: &'a [usize],
}

/// The block `to` is to begin as the block `from` does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockCopy {
    pub from: BlockId,
    pub to: BlockId,
}

/// One sequence's share of a batch.
#[derive(Debug, Clone)]
pub struct SequenceRows<'a> {
    pub rows: Range<usize>,
    /// Position of the first of these rows in the sequence; all earlier positions are already in the KV store.
    pub first_position: usize,
    /// KV blocks of the sequence; covers at least `first_position + rows.len()` positions.
    pub block_table: &'a [BlockId],
}

impl SequenceRows<'_> {
    /// Where the K and V of its rows go.
    pub fn slots(&self) -> impl Iterator<Item = KvSlot> {
        (self.first_position..self.first_position + self.rows.len()).map(|position| KvSlot {
            block: self.block_table[position / BLOCK_SIZE],
            offset: position % BLOCK_SIZE,
            position,
        })
    }
}

/// Rows that run with one adapter.
#[derive(Debug, Clone)]
pub struct Group<'a> {
    pub rows: Range<usize>,
    /// Which weights these are: of two groups with one generation, the weights are the same.
    pub generation: &'a str,
    pub weights: &'a AdapterWeights,
}

/// The groups of a step, asked for by number so that nobody has to store a list: `get(i)` for `i` in `0..count`.
#[derive(Clone, Copy)]
pub struct Groups<'a> {
    pub count: usize,
    pub get: &'a (dyn Fn(usize) -> Group<'a> + Sync),
}

impl std::fmt::Debug for Groups<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Groups").field("count", &self.count).finish_non_exhaustive()
    }
}

impl<'a> Groups<'a> {
    pub fn iter(self) -> impl Iterator<Item = Group<'a>> + Clone {
        (0..self.count).map(self.get)
    }
}

/// What a row's token is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowToken {
    /// A token of the vocabulary.
    Real(usize),
    /// This position of the prelude of the row's adapter.
    Virtual(usize),
}

impl<'a> Step<'a> {
    pub fn num_rows(&self) -> usize {
        self.tokens.len()
    }

    /// Each row's token, checked, and the number of the adapter group it belongs to; or the token that is none.
    pub fn rows(self, vocab_size: usize) -> impl Iterator<Item = Result<(RowToken, Option<usize>), u32>> + use<'a> {
        let mut groups = (0..self.groups.count).peekable();
        self.tokens.iter().enumerate().map(move |(row, &token)| {
            let rows = |group: usize| (self.groups.get)(group).rows;
            while groups.next_if(|group| rows(*group).end <= row).is_some() {}
            let group = groups.peek().copied().filter(|group| rows(*group).contains(&row));
            match token.checked_sub(FIRST_VIRTUAL_TOKEN).map(|position| position as usize) {
                None if (token as usize) < vocab_size => Ok((RowToken::Real(token as usize), group)),
                Some(position) if self.is_in_prelude(group, position) => Ok((RowToken::Virtual(position), group)),
                _ => Err(token),
            }
        })
    }

    fn is_in_prelude(&self, group: Option<usize>, position: usize) -> bool {
        let weights = group.map(|group| (self.groups.get)(group).weights);
        weights.and_then(|weights| weights.prelude.as_ref()).is_some_and(|prelude| position < prelude.num_tokens())
    }
}
