//! In which order a tile kernel takes its rows and blocks: some blocks, as many as stay in the first cache, with some rows, as many
//! as the registers hold, after the other.

use std::ops::Range;

/// Blocks of which all passes share the unpacked weights: 16 KiB for two tiles.
const BLOCKS_PER_CHUNK: usize = 16;

/// Bytes ahead of the record at hand that are asked for from memory where each block is taken once.
const AHEAD: usize = 4096;

/// What a kernel works on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Extent {
    pub num_rows: usize,
    pub num_blocks: usize,
    /// Tiles that are multiplied together.
    pub num_tiles: usize,
    pub record_bytes: usize,
}

/// Some rows times some blocks.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Pass {
    pub rows: Range<usize>,
    pub blocks: Range<usize>,
    /// How far ahead of a record memory is asked for, in bytes.
    pub ahead: usize,
    /// The passes over the same blocks take turns in that, block by block: so many lines as all of them have cannot be on their way
    /// in the time of one pass.
    pub num_turns: usize,
    pub turn: usize,
}

/// All passes, at most `max_rows` rows in each. Rows and blocks are divided as evenly as it goes.
pub(super) fn passes(extent: Extent, max_rows: usize) -> impl Iterator<Item = Pass> {
    let Extent { num_rows, num_blocks, num_tiles, record_bytes } = extent;
    let num_turns = num_rows.div_ceil(max_rows);
    // Where each block is taken once, the last ones ask for the next tiles': of one tile alone those are what comes next anyway.
    let split = if num_tiles > 1 { num_blocks.saturating_sub(AHEAD / record_bytes) } else { num_blocks };
    let num_chunks = if num_turns > 1 { num_blocks.div_ceil(BLOCKS_PER_CHUNK) } else { 2 };
    (0..num_chunks).flat_map(move |chunk| {
        let is_last = chunk + 1 == num_chunks;
        let blocks = match num_turns {
            1 if is_last => split..num_blocks,
            1 => 0..split,
            _ => share(num_blocks, num_chunks, chunk),
        };
        let ahead = match num_turns {
            _ if is_last => (num_tiles * num_blocks - blocks.start) * record_bytes,
            1 => AHEAD,
            _ => blocks.len() * record_bytes,
        };
        let num_turns = if blocks.is_empty() { 0 } else { num_turns };
        (0..num_turns).map(move |turn| Pass {
            rows: share(num_rows, num_turns, turn),
            blocks: blocks.clone(),
            ahead,
            num_turns,
            turn,
        })
    })
}

/// Part `index` of `parts` of `0..total`. The first are the larger ones: they have more to do.
fn share(total: usize, parts: usize, index: usize) -> Range<usize> {
    let start = |index: usize| (index * total).div_ceil(parts);
    start(index)..start(index + 1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn each_row_meets_each_block_once_and_in_order(num_rows in 1usize..200, num_blocks in 1usize..70, max_rows in 1usize..7, num_tiles in 1usize..3) {
            let extent = Extent { num_rows, num_blocks, num_tiles, record_bytes: 352 };
            let mut next_block = vec![0; num_rows];
            for pass in passes(extent, max_rows) {
                prop_assert!(pass.rows.len() <= max_rows && !pass.rows.is_empty() && pass.turn < pass.num_turns);
                prop_assert!(!pass.blocks.is_empty() && (pass.num_turns == 1 || pass.blocks.len() <= BLOCKS_PER_CHUNK));
                for row in pass.rows {
                    prop_assert_eq!(next_block[row], pass.blocks.start);
                    next_block[row] = pass.blocks.end;
                }
            }
            prop_assert!(next_block.iter().all(|next| *next == num_blocks));
        }
    }
}
