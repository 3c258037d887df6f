//! AVX-512 VNNI: `vpdpbusd` multiplies four unsigned weights with four signed activations and adds them to 32 bits, for all
//! 16 rows of a tile at once.
//!
//! A multiplication needs its weights and its activations in registers, and two loads a cycle are all that there are. So up to
//! six rows of activations share what is loaded of the weights, and two tiles what is loaded of the activations. Where that takes
//! several passes, the first keeps the unpacked weights for the others, of as many blocks as stay in the first cache.

use std::arch::asm;
use std::arch::x86_64::*;
use std::cell::RefCell;

use super::passes::{Extent, Pass, passes};
use super::{BLOCK, Tile, TileOut};
use crate::activations::QuantizedBlock;
use crate::quantized::{Layout, ROWS_PER_TILE};
use crate::simd::LINE;

/// Rows of activations that share one pass over two tiles: their sums and totals fill 24 of the 32 registers.
const ROWS_PER_PASS: usize = 6;
/// Rows from which loads count; up to there memory does, which one tile after the other reads as one stream.
const ROWS_FOR_PAIRS: usize = 4;
/// Bytes of one quad of the tile's 16 rows: one register.
const VECTOR: usize = ROWS_PER_TILE * 4;
/// Vectors of the unpacked weights of one block.
const UNPACKED_BLOCK: usize = 8;

/// Where a pass takes weights from.
mod source {
    /// The records. They are used once, or are bytes already.
    pub const RECORDS: u8 = 0;
    /// The records. They are kept as bytes for the passes to come.
    pub const TO_KEEP: u8 = 1;
    /// What an earlier pass has kept.
    pub const KEPT: u8 = 2;
}

thread_local! {
    /// The unpacked weights of the chunk at hand, `[blocks][tiles][quads]`.
    static UNPACKED: RefCell<Vec<__m512i>> = const { RefCell::new(Vec::new()) };
}

pub(super) fn multiply(tiles: &[Tile<'_>], first_row: usize, outs: &mut [&mut TileOut]) {
    let Some(Tile { layout, .. }) = tiles.first() else { return };
    // SAFETY: `Isa::Avx512Vnni` is chosen only where the features were detected.
    match layout {
        Layout { bits: 4, groups: 1, has_min: false } => unsafe { all_tiles::<4, 1, false>(tiles, first_row, outs) },
        Layout { bits: 4, groups: 1, has_min: true } => unsafe { all_tiles::<4, 1, true>(tiles, first_row, outs) },
        Layout { bits: 4, groups: 2, has_min: false } => unsafe { all_tiles::<4, 2, false>(tiles, first_row, outs) },
        Layout { bits: 4, groups: 2, has_min: true } => unsafe { all_tiles::<4, 2, true>(tiles, first_row, outs) },
        Layout { bits: 5, has_min: false, .. } => unsafe { all_tiles::<5, 1, false>(tiles, first_row, outs) },
        Layout { bits: 5, has_min: true, .. } => unsafe { all_tiles::<5, 1, true>(tiles, first_row, outs) },
        Layout { bits: 6, .. } => unsafe { all_tiles::<6, 2, false>(tiles, first_row, outs) },
        _ => unsafe { all_tiles::<8, 1, false>(tiles, first_row, outs) },
    }
}

/// Two tiles at a time, where that pays.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn all_tiles<const BITS: usize, const GROUPS: usize, const MIN: bool>(
    tiles: &[Tile<'_>],
    first_row: usize,
    outs: &mut [&mut TileOut],
) {
    match (tiles, outs) {
        ([a, b], [out_a, out_b]) if out_a.len() >= ROWS_FOR_PAIRS => {
            all_rows::<BITS, GROUPS, MIN, 2>([a, b], first_row, [out_a, out_b]);
        }
        (tiles, outs) => {
            for (tile, out) in tiles.iter().zip(outs) {
                all_rows::<BITS, GROUPS, MIN, 1>([tile], first_row, [out]);
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn all_rows<const BITS: usize, const GROUPS: usize, const MIN: bool, const TILES: usize>(
    tiles: [&Tile<'_>; TILES],
    first_row: usize,
    mut outs: [&mut TileOut; TILES],
) {
    let extent = Extent {
        num_rows: outs[0].len(),
        num_blocks: tiles[0].activations.width() / BLOCK,
        num_tiles: TILES,
        record_bytes: Layout { bits: BITS, groups: GROUPS, has_min: MIN }.record_bytes(),
    };
    UNPACKED.with_borrow_mut(|unpacked| {
        for pass in passes(extent, ROWS_PER_PASS) {
            // Eight bits are bytes as they are.
            let is_kept = BITS < 8 && pass.num_turns > 1;
            let needed = pass.blocks.len() * TILES * UNPACKED_BLOCK;
            if is_kept && unpacked.len() < needed {
                unpacked.resize(needed, _mm512_setzero_si512());
            }
            let outs = outs.each_mut().map(|out| &mut out[pass.rows.clone()]);
            match (is_kept, pass.turn) {
                (false, _) => {
                    run::<BITS, GROUPS, MIN, { source::RECORDS }, TILES>(tiles, unpacked, first_row, &pass, outs)
                }
                (_, 0) => run::<BITS, GROUPS, MIN, { source::TO_KEEP }, TILES>(tiles, unpacked, first_row, &pass, outs),
                _ => run::<BITS, GROUPS, MIN, { source::KEPT }, TILES>(tiles, unpacked, first_row, &pass, outs),
            }
        }
    });
}

/// Zeros that the compiler does not know to be such: copied they cost nothing, while of registers that are set to zero those from
/// the 16th on wait for what they held before.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn opaque_zero() -> __m512i {
    let mut zero = _mm512_setzero_si512();
    // SAFETY: no instruction at all; the value passes through a register.
    unsafe { asm!("/* {0} */", inout(zmm_reg) zero, options(pure, nomem, nostack, preserves_flags)) };
    zero
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn run<const BITS: usize, const GROUPS: usize, const MIN: bool, const SOURCE: u8, const TILES: usize>(
    tiles: [&Tile<'_>; TILES],
    unpacked: &mut [__m512i],
    first_row: usize,
    pass: &Pass,
    outs: [&mut TileOut; TILES],
) {
    match pass.rows.len() {
        1 => some_rows::<BITS, GROUPS, MIN, SOURCE, TILES, 1>(tiles, unpacked, first_row, pass, outs),
        2 => some_rows::<BITS, GROUPS, MIN, SOURCE, TILES, 2>(tiles, unpacked, first_row, pass, outs),
        3 => some_rows::<BITS, GROUPS, MIN, SOURCE, TILES, 3>(tiles, unpacked, first_row, pass, outs),
        4 => some_rows::<BITS, GROUPS, MIN, SOURCE, TILES, 4>(tiles, unpacked, first_row, pass, outs),
        5 => some_rows::<BITS, GROUPS, MIN, SOURCE, TILES, 5>(tiles, unpacked, first_row, pass, outs),
        6 => some_rows::<BITS, GROUPS, MIN, SOURCE, TILES, 6>(tiles, unpacked, first_row, pass, outs),
        rows => unreachable!("{rows} rows in a pass"),
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn some_rows<
    const BITS: usize,
    const GROUPS: usize,
    const MIN: bool,
    const SOURCE: u8,
    const TILES: usize,
    const ROWS: usize,
>(
    tiles: [&Tile<'_>; TILES],
    unpacked: &mut [__m512i],
    first_row: usize,
    pass: &Pass,
    outs: [&mut TileOut; TILES],
) {
    let layout = Layout { bits: BITS, groups: GROUPS, has_min: MIN };
    let activations = tiles[0].activations;
    let num_blocks = activations.width() / BLOCK;
    let rows: [&[QuantizedBlock]; ROWS] = std::array::from_fn(|m| activations.row(first_row + pass.rows.start + m));
    let (keeps, has_kept) = (SOURCE == source::TO_KEEP, SOURCE == source::KEPT);
    // What the unchecked reads below rely on; a row has as many blocks as its width says.
    assert!(tiles.iter().all(|tile| tile.records.len() == num_blocks * layout.record_bytes()));
    assert!(pass.blocks.end <= num_blocks);
    assert!(!(keeps || has_kept) || unpacked.len() >= pass.blocks.len() * TILES * UNPACKED_BLOCK);
    assert!(MIN || tiles.iter().all(|tile| tile.offset == offset_of::<BITS, GROUPS>()));
    let quads_per_group = 8 / GROUPS;
    let zero = opaque_zero();
    let mut acc = [[_mm512_setzero_ps(); TILES]; ROWS];
    if pass.blocks.start > 0 {
        for m in 0..ROWS {
            for t in 0..TILES {
                // SAFETY: the row's 16 results so far.
                acc[m][t] = unsafe { _mm512_loadu_ps(outs[t][m].as_ptr()) };
            }
        }
    }
    let mut until_turn = pass.turn;
    for b in pass.blocks.clone() {
        // SAFETY: block b of the tiles and of each row (asserted above).
        let (records, x) = unsafe {
            (
                tiles.map(|tile| tile.records.as_ptr().add(b * layout.record_bytes())),
                rows.map(|row| row.get_unchecked(b)),
            )
        };
        if until_turn == 0 {
            until_turn = pass.num_turns;
            for record in records {
                for line in 0..layout.record_bytes().div_ceil(LINE) {
                    // A prefetch reads nothing, wherever it points.
                    _mm_prefetch::<_MM_HINT_T0>(record.wrapping_add(pass.ahead + line * LINE).cast());
                }
            }
        }
        until_turn -= 1;
        for g in 0..GROUPS {
            let mut dot = [[zero; TILES]; ROWS];
            if !MIN {
                for m in 0..ROWS {
                    let start = if GROUPS == 1 { x[m].start } else { x[m].starts[g] };
                    dot[m] = [for_offset::<BITS, GROUPS>(_mm512_set1_epi32(start)); TILES];
                }
            }
            for quad in g * quads_per_group..(g + 1) * quads_per_group {
                let mut w = [zero; TILES];
                for t in 0..TILES {
                    let at = ((b - pass.blocks.start) * TILES + t) * UNPACKED_BLOCK + quad;
                    if has_kept {
                        // SAFETY: every block of the chunk has its vectors (asserted above).
                        w[t] = unsafe { *unpacked.get_unchecked(at) };
                    } else {
                        // SAFETY: it points to a whole record of this layout (asserted above).
                        w[t] = unsafe { weights::<BITS>(records[t], quad) };
                    }
                    if keeps {
                        // SAFETY: as where they are read.
                        unsafe { *unpacked.get_unchecked_mut(at) = w[t] };
                    }
                }
                for m in 0..ROWS {
                    // SAFETY: four of the block's 32 activations.
                    let values =
                        _mm512_set1_epi32(unsafe { x[m].values.as_ptr().add(quad * 4).cast::<i32>().read_unaligned() });
                    for t in 0..TILES {
                        dot[m][t] = _mm512_dpbusd_epi32(dot[m][t], w[t], values);
                    }
                }
            }
            // SAFETY: scales (and minima) follow the weights in the record.
            let f16_lanes = |record: *const u8, at: usize| unsafe {
                let at = layout.weight_bytes() + g * 2 * ROWS_PER_TILE + at;
                _mm512_cvtph_ps(_mm256_loadu_si256(record.add(at).cast()))
            };
            let scales = records.map(|record| f16_lanes(record, 0));
            for m in 0..ROWS {
                let scale_x = _mm512_set1_ps(x[m].scale);
                for t in 0..TILES {
                    let scale = _mm512_mul_ps(scales[t], scale_x);
                    acc[m][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[m][t]), scale, acc[m][t]);
                }
            }
            if MIN {
                let minima = records.map(|record| f16_lanes(record, layout.scales_bytes()));
                for m in 0..ROWS {
                    let sum_x = x[m].scaled_sum((GROUPS > 1).then_some(g));
                    let sum_x = _mm512_set1_ps(sum_x);
                    for t in 0..TILES {
                        acc[m][t] = _mm512_fnmadd_ps(minima[t], sum_x, acc[m][t]);
                    }
                }
            }
        }
    }
    for m in 0..ROWS {
        for t in 0..TILES {
            // SAFETY: the row's 16 results.
            unsafe { _mm512_storeu_ps(outs[t][m].as_mut_ptr(), acc[m][t]) };
        }
    }
}

/// What weights without a minimum are stored with on top.
const fn offset_of<const BITS: usize, const GROUPS: usize>() -> i32 {
    match (BITS, GROUPS) {
        (4, 1) => 8,
        (4, _) => 4,
        (5, _) => 16,
        (6, _) => 32,
        _ => 128,
    }
}

/// [`BlockTerms::start`](crate::activations::BlockTerms) for that offset instead of 128.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn for_offset<const BITS: usize, const GROUPS: usize>(start: __m512i) -> __m512i {
    match offset_of::<BITS, GROUPS>() {
        4 => _mm512_srai_epi32::<5>(start),
        8 => _mm512_srai_epi32::<4>(start),
        16 => _mm512_srai_epi32::<3>(start),
        32 => _mm512_srai_epi32::<2>(start),
        _ => start,
    }
}

/// The weights of one quad of all 16 rows as unsigned bytes.
///
/// # Safety
/// `record` must point to the weight vectors of a record with `BITS` bits.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn weights<const BITS: usize>(record: *const u8, quad: usize) -> __m512i {
    // SAFETY: vector 0..BITS of a record (the caller's promise).
    let vector = |index: usize| unsafe { _mm512_loadu_si512(record.add(index * VECTOR).cast()) };
    if BITS == 8 {
        return vector(quad);
    }
    let nibbles = vector(quad % 4);
    let low = _mm512_and_si512(if quad < 4 { nibbles } else { _mm512_srli_epi16::<4>(nibbles) }, _mm512_set1_epi8(15));
    match BITS {
        5 => {
            let bits = vector(4);
            // Bit `quad` of every byte moves to bit 4; what crosses byte borders is masked off.
            let moved = match quad {
                0 => _mm512_slli_epi16::<4>(bits),
                1 => _mm512_slli_epi16::<3>(bits),
                2 => _mm512_slli_epi16::<2>(bits),
                3 => _mm512_slli_epi16::<1>(bits),
                4 => bits,
                5 => _mm512_srli_epi16::<1>(bits),
                6 => _mm512_srli_epi16::<2>(bits),
                _ => _mm512_srli_epi16::<3>(bits),
            };
            _mm512_or_si512(low, _mm512_and_si512(moved, _mm512_set1_epi8(0x10)))
        }
        6 => {
            let pairs = vector(4 + quad / 4);
            let moved = match quad % 4 {
                0 => _mm512_slli_epi16::<4>(pairs),
                1 => _mm512_slli_epi16::<2>(pairs),
                2 => pairs,
                _ => _mm512_srli_epi16::<2>(pairs),
            };
            _mm512_or_si512(low, _mm512_and_si512(moved, _mm512_set1_epi8(0x30)))
        }
        _ => low,
    }
}
