//! AVX2: `vpmaddubsw` multiplies unsigned weights with signed activations into 16-bit sums of two.
//!
//! These sums are added up in 16 bits over a whole group before they are widened once. They may wrap on the way, but not
//! in the end: a lane that starts at minus the format's offset times its own activations ends at the sum with signed
//! weights, and 8·2 products of 5 bits (16·127·16 = 32512) or 4·2 of 6 bits (32·127·8 = 32512) fit. Of 4 bits, unsigned
//! ones fit too (15·127·16 = 30480); of 5 bits without an offset only half of them (31·127·8 = 31496).
//! 8-bit weights are split into sign and magnitude (128·127·2 = 32512), the sign going to the activations.
//!
//! AVX-VNNI does all that in one instruction, with sums of 32 bits from the beginning.
//!
//! Where there are several passes, weights are unpacked to bytes once and read from cache by each of them.

use std::arch::asm;
use std::arch::x86_64::*;
use std::cell::RefCell;

use super::passes::{Extent, Pass, passes};
use super::{BLOCK, Tile, TileOut};
use crate::activations::QuantizedBlock;
use crate::quantized::{Layout, ROWS_PER_TILE};
use crate::simd::LINE;

/// Rows of activations that share one pass over a tile: twelve running sums, two vectors of weights, one of activations
/// and one of products are the 16 registers.
const ROWS_PER_PASS: usize = 6;
/// Bytes of one quad of the tile's 16 rows; the kernel works on its two halves of 8 rows.
const VECTOR: usize = ROWS_PER_TILE * 4;
/// Bytes of the unpacked weights of one block.
const UNPACKED_BLOCK: usize = 8 * VECTOR;

thread_local! {
    /// The unpacked weights of the blocks at hand, `[blocks][quads][halves]`.
    static UNPACKED: RefCell<Vec<__m256i>> = const { RefCell::new(Vec::new()) };
}

pub(super) fn multiply(has_vnni: bool, tile: &Tile<'_>, first_row: usize, out: &mut TileOut) {
    if has_vnni {
        // SAFETY: `Isa::AvxVnni` is chosen only where the features were detected.
        unsafe { multiply_by::<true>(tile, first_row, out) }
    } else {
        // SAFETY: the same of `Isa::Avx2`.
        unsafe { multiply_by::<false>(tile, first_row, out) }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn multiply_by<const VNNI: bool>(tile: &Tile<'_>, first_row: usize, out: &mut TileOut) {
    match tile.layout {
        Layout { bits: 4, groups: 1, has_min: false } => multiply_as::<4, 1, false, VNNI>(tile, first_row, out),
        Layout { bits: 4, groups: 1, has_min: true } => multiply_as::<4, 1, true, VNNI>(tile, first_row, out),
        Layout { bits: 4, groups: 2, has_min: false } => multiply_as::<4, 2, false, VNNI>(tile, first_row, out),
        Layout { bits: 4, groups: 2, has_min: true } => multiply_as::<4, 2, true, VNNI>(tile, first_row, out),
        Layout { bits: 5, has_min: false, .. } => multiply_as::<5, 1, false, VNNI>(tile, first_row, out),
        Layout { bits: 5, has_min: true, .. } => multiply_as::<5, 1, true, VNNI>(tile, first_row, out),
        Layout { bits: 6, .. } => multiply_as::<6, 2, false, VNNI>(tile, first_row, out),
        _ => multiply_as::<8, 1, false, VNNI>(tile, first_row, out),
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn multiply_as<const BITS: usize, const GROUPS: usize, const MIN: bool, const VNNI: bool>(
    tile: &Tile<'_>,
    first_row: usize,
    out: &mut TileOut,
) {
    let record_bytes = layout_of::<BITS, GROUPS, MIN>().record_bytes();
    let (num_rows, num_blocks) = (out.len(), tile.activations.width() / BLOCK);
    UNPACKED.with_borrow_mut(|unpacked| {
        for pass in passes(Extent { num_rows, num_blocks, num_tiles: 1, record_bytes }, ROWS_PER_PASS) {
            let out = &mut out[pass.rows.clone()];
            if BITS == 8 || pass.num_turns == 1 {
                run::<BITS, GROUPS, MIN, VNNI, false>(tile, &[], first_row, &pass, out);
                continue;
            }
            if pass.turn == 0 {
                let needed = pass.blocks.len() * UNPACKED_BLOCK / 32;
                if unpacked.len() < needed {
                    unpacked.resize(needed, _mm256_setzero_si256());
                }
                let records = &tile.records[pass.blocks.start * record_bytes..pass.blocks.end * record_bytes];
                unpack::<BITS>(records, record_bytes, unpacked);
            }
            run::<BITS, GROUPS, MIN, VNNI, true>(tile, unpacked, first_row, &pass, out);
        }
    });
}

const fn layout_of<const BITS: usize, const GROUPS: usize, const MIN: bool>() -> Layout {
    Layout { bits: BITS, groups: GROUPS, has_min: MIN }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn unpack<const BITS: usize>(records: &[u8], record_bytes: usize, unpacked: &mut [__m256i]) {
    for (record, unpacked) in records.chunks_exact(record_bytes).zip(unpacked.chunks_exact_mut(UNPACKED_BLOCK / 32)) {
        for quad in 0..8 {
            for half in 0..2 {
                // SAFETY: the record has the vectors of its layout.
                unpacked[quad * 2 + half] = unsafe { weights::<BITS>(record.as_ptr(), quad, half) };
            }
        }
    }
}

/// The weights of one quad of 8 rows as unsigned bytes.
///
/// # Safety
/// `record` must point to the weight vectors of a record with `BITS` bits.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn weights<const BITS: usize>(record: *const u8, quad: usize, half: usize) -> __m256i {
    // SAFETY: vector 0..BITS of a record (the caller's promise), 32 bytes of its half.
    let vector = |index: usize| unsafe { _mm256_loadu_si256(record.add(index * VECTOR + half * 32).cast()) };
    if BITS == 8 {
        return vector(quad);
    }
    let nibbles = vector(quad % 4);
    let low = _mm256_and_si256(if quad < 4 { nibbles } else { _mm256_srli_epi16::<4>(nibbles) }, _mm256_set1_epi8(15));
    match BITS {
        5 => {
            let bits = vector(4);
            // Bit `quad` of every byte moves to bit 4; what crosses byte borders is masked off.
            let moved = match quad {
                0 => _mm256_slli_epi16::<4>(bits),
                1 => _mm256_slli_epi16::<3>(bits),
                2 => _mm256_slli_epi16::<2>(bits),
                3 => _mm256_slli_epi16::<1>(bits),
                4 => bits,
                5 => _mm256_srli_epi16::<1>(bits),
                6 => _mm256_srli_epi16::<2>(bits),
                _ => _mm256_srli_epi16::<3>(bits),
            };
            _mm256_or_si256(low, _mm256_and_si256(moved, _mm256_set1_epi8(0x10)))
        }
        6 => {
            let pairs = vector(4 + quad / 4);
            let moved = match quad % 4 {
                0 => _mm256_slli_epi16::<4>(pairs),
                1 => _mm256_slli_epi16::<2>(pairs),
                2 => pairs,
                _ => _mm256_srli_epi16::<2>(pairs),
            };
            _mm256_or_si256(low, _mm256_and_si256(moved, _mm256_set1_epi8(0x30)))
        }
        _ => low,
    }
}

/// Keeps a running sum a running sum: the optimizer would regroup the additions of all quads into a tree, for which it has
/// to hold every quad's weights at once and spills them.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn in_order(mut sum: __m256i) -> __m256i {
    // SAFETY: no instruction at all; the value passes through a register.
    unsafe { asm!("/* {0} */", inout(ymm_reg) sum, options(pure, nomem, nostack, preserves_flags)) };
    sum
}

/// Adds the products of four unsigned weights with four signed activations to each 32-bit sum. In assembly, since a function with the
/// feature that the intrinsic needs could not be a part of those that are common to processors with and without it.
///
/// # Safety
/// The processor has AVX-VNNI.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn multiply_quad(mut sum: __m256i, weights: __m256i, activations: __m256i) -> __m256i {
    // SAFETY: registers only, and the instruction is there (the caller's promise).
    unsafe {
        asm!(
            "{{vex}} vpdpbusd {sum}, {weights}, {activations}",
            sum = inout(ymm_reg) sum, weights = in(ymm_reg) weights, activations = in(ymm_reg) activations,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sum
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn run<const BITS: usize, const GROUPS: usize, const MIN: bool, const VNNI: bool, const UNPACKED: bool>(
    tile: &Tile<'_>,
    unpacked: &[__m256i],
    first_row: usize,
    pass: &Pass,
    out: &mut TileOut,
) {
    match out.len() {
        1 => some_rows::<BITS, GROUPS, MIN, VNNI, UNPACKED, 1>(tile, unpacked, first_row, pass, out),
        2 => some_rows::<BITS, GROUPS, MIN, VNNI, UNPACKED, 2>(tile, unpacked, first_row, pass, out),
        3 => some_rows::<BITS, GROUPS, MIN, VNNI, UNPACKED, 3>(tile, unpacked, first_row, pass, out),
        4 => some_rows::<BITS, GROUPS, MIN, VNNI, UNPACKED, 4>(tile, unpacked, first_row, pass, out),
        5 => some_rows::<BITS, GROUPS, MIN, VNNI, UNPACKED, 5>(tile, unpacked, first_row, pass, out),
        6 => some_rows::<BITS, GROUPS, MIN, VNNI, UNPACKED, 6>(tile, unpacked, first_row, pass, out),
        rows => unreachable!("{rows} rows in a pass"),
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn some_rows<
    const BITS: usize,
    const GROUPS: usize,
    const MIN: bool,
    const VNNI: bool,
    const UNPACKED: bool,
    const ROWS: usize,
>(
    tile: &Tile<'_>,
    unpacked: &[__m256i],
    first_row: usize,
    pass: &Pass,
    out: &mut TileOut,
) {
    let layout = layout_of::<BITS, GROUPS, MIN>();
    let num_blocks = tile.activations.width() / BLOCK;
    let rows: [&[QuantizedBlock]; ROWS] =
        std::array::from_fn(|m| tile.activations.row(first_row + pass.rows.start + m));
    // What the unchecked reads below rely on; a row has as many blocks as its width says.
    assert_eq!(tile.records.len(), num_blocks * layout.record_bytes());
    assert!(pass.blocks.end <= num_blocks);
    assert!(!UNPACKED || unpacked.len() >= pass.blocks.len() * UNPACKED_BLOCK / 32);
    let ones = _mm256_set1_epi16(1);
    let quads_per_group = 8 / GROUPS;
    // Quads whose 16-bit sums fit, see the module's head.
    let run = match BITS {
        _ if VNNI => quads_per_group,
        5 if MIN => 4,
        8 => 1,
        _ => quads_per_group,
    };
    let minus_offset = _mm256_set1_epi16(if MIN { 0 } else { -(tile.offset as i16) });
    let mut acc = [[_mm256_setzero_ps(); 2]; ROWS];
    if pass.blocks.start > 0 {
        for (acc, out) in acc.iter_mut().zip(&*out) {
            for half in 0..2 {
                // SAFETY: 8 of the row's 16 results so far.
                acc[half] = unsafe { _mm256_loadu_ps(out[half * 8..].as_ptr()) };
            }
        }
    }
    let mut until_turn = pass.turn;
    for b in pass.blocks.clone() {
        // SAFETY: block b of the tile and of each row (asserted above).
        let (record, x) =
            unsafe { (tile.records.as_ptr().add(b * layout.record_bytes()), rows.map(|row| row.get_unchecked(b))) };
        if until_turn == 0 {
            until_turn = pass.num_turns;
            for line in 0..layout.record_bytes().div_ceil(LINE) {
                // A prefetch reads nothing, wherever it points.
                _mm_prefetch::<_MM_HINT_T0>(record.wrapping_add(pass.ahead + line * LINE).cast());
            }
        }
        until_turn -= 1;
        for g in 0..GROUPS {
            let mut dot = [[_mm256_setzero_si256(); 2]; ROWS];
            if VNNI && !MIN {
                for m in 0..ROWS {
                    dot[m] = [_mm256_set1_epi32(x[m].start_for(tile.offset, (GROUPS > 1).then_some(g))); 2];
                }
            }
            for first_quad in (g * quads_per_group..(g + 1) * quads_per_group).step_by(run) {
                let mut short: [[__m256i; 2]; ROWS] = std::array::from_fn(|m| {
                    if VNNI || MIN || BITS == 8 {
                        return [_mm256_setzero_si256(); 2];
                    }
                    // SAFETY: two 16-bit sums, one for each half of a 32-bit lane.
                    let pair =
                        |g: usize| _mm256_set1_epi32(unsafe { x[m].sums[g].as_ptr().cast::<i32>().read_unaligned() });
                    let sum = if GROUPS == 1 { _mm256_add_epi16(pair(0), pair(1)) } else { pair(g) };
                    [_mm256_mullo_epi16(sum, minus_offset); 2]
                });
                for quad in first_quad..first_quad + run {
                    let w: [__m256i; 2] = std::array::from_fn(|half| {
                        if UNPACKED {
                            // SAFETY: asserted above: every block of the pass has its unpacked vectors.
                            unsafe {
                                *unpacked.get_unchecked((b - pass.blocks.start) * UNPACKED_BLOCK / 32 + quad * 2 + half)
                            }
                        } else {
                            // SAFETY: `record` points to a whole record of this layout (asserted above).
                            unsafe { weights::<BITS>(record, quad, half) }
                        }
                    });
                    if VNNI {
                        for m in 0..ROWS {
                            // SAFETY: four of the block's 32 activations.
                            let values = unsafe { x[m].values.as_ptr().add(quad * 4).cast::<i32>().read_unaligned() };
                            let values = _mm256_set1_epi32(values);
                            for half in 0..2 {
                                // SAFETY: the processor has AVX-VNNI, or this were not asked for.
                                dot[m][half] = unsafe { multiply_quad(dot[m][half], w[half], values) };
                            }
                        }
                    } else if BITS == 8 {
                        // Stored with an offset of 128; the sign moves to the activations.
                        let w = w.map(|w| _mm256_xor_si256(w, _mm256_set1_epi8(-128)));
                        let magnitude = w.map(|w| _mm256_abs_epi8(w));
                        for m in 0..ROWS {
                            // SAFETY: four of the block's 32 activations.
                            let values = _mm256_set1_epi32(unsafe {
                                x[m].values.as_ptr().add(quad * 4).cast::<i32>().read_unaligned()
                            });
                            for half in 0..2 {
                                let signed = _mm256_sign_epi8(values, w[half]);
                                let products = _mm256_maddubs_epi16(magnitude[half], signed);
                                dot[m][half] =
                                    in_order(_mm256_add_epi32(dot[m][half], _mm256_madd_epi16(products, ones)));
                            }
                        }
                    } else {
                        for m in 0..ROWS {
                            // SAFETY: four of the block's 32 activations.
                            let values = _mm256_set1_epi32(unsafe {
                                x[m].values.as_ptr().add(quad * 4).cast::<i32>().read_unaligned()
                            });
                            for half in 0..2 {
                                let products = _mm256_maddubs_epi16(w[half], values);
                                short[m][half] = in_order(_mm256_add_epi16(short[m][half], products));
                            }
                        }
                    }
                }
                if !VNNI && BITS != 8 {
                    for m in 0..ROWS {
                        for half in 0..2 {
                            dot[m][half] = _mm256_add_epi32(dot[m][half], _mm256_madd_epi16(short[m][half], ones));
                        }
                    }
                }
            }
            // SAFETY: scales (and minima) follow the weights in the record.
            let parts = unsafe { record.add(layout.weight_bytes() + g * 2 * ROWS_PER_TILE) };
            let f16_lanes =
                |at: usize, half: usize| unsafe { _mm256_cvtph_ps(_mm_loadu_si128(parts.add(at + half * 16).cast())) };
            for m in 0..ROWS {
                for half in 0..2 {
                    let scale = _mm256_mul_ps(f16_lanes(0, half), _mm256_set1_ps(x[m].scale));
                    acc[m][half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[m][half]), scale, acc[m][half]);
                    if MIN {
                        let sum_x = x[m].scaled_sum((GROUPS > 1).then_some(g));
                        let min = f16_lanes(layout.scales_bytes(), half);
                        acc[m][half] = _mm256_fnmadd_ps(min, _mm256_set1_ps(sum_x), acc[m][half]);
                    }
                }
            }
        }
    }
    for (acc, out) in acc.iter().zip(out) {
        for half in 0..2 {
            // SAFETY: 8 of the row's 16 results.
            unsafe { _mm256_storeu_ps(out[half * 8..].as_mut_ptr(), acc[half]) };
        }
    }
}
