//! AVX-512 VNNI: `vpdpbusd` multiplies four unsigned weights with four signed activations and adds them to 32 bits, for all
//! 16 rows of a tile at once.

use std::arch::x86_64::*;

use super::{BLOCK, Tile, TileOut};
use crate::activations::{QuantizedRow, sum_of};
use crate::quantized::{Layout, ROWS_PER_TILE};

/// Rows of activations that share one pass over a tile: their sums and totals fill half of the 32 registers.
const ROWS_PER_PASS: usize = 8;
/// Bytes of one quad of the tile's 16 rows: one register.
const VECTOR: usize = ROWS_PER_TILE * 4;

pub(super) fn multiply(tile: &Tile<'_>, first_row: usize, out: &mut TileOut) {
    // SAFETY: `Isa::Avx512Vnni` is chosen only where the features were detected.
    match tile.layout {
        Layout { bits: 4, groups: 1, has_min: false } => unsafe { all_rows::<4, 1, false>(tile, first_row, out) },
        Layout { bits: 4, groups: 1, has_min: true } => unsafe { all_rows::<4, 1, true>(tile, first_row, out) },
        Layout { bits: 4, groups: 2, has_min: false } => unsafe { all_rows::<4, 2, false>(tile, first_row, out) },
        Layout { bits: 4, groups: 2, has_min: true } => unsafe { all_rows::<4, 2, true>(tile, first_row, out) },
        Layout { bits: 5, has_min: false, .. } => unsafe { all_rows::<5, 1, false>(tile, first_row, out) },
        Layout { bits: 5, has_min: true, .. } => unsafe { all_rows::<5, 1, true>(tile, first_row, out) },
        Layout { bits: 6, .. } => unsafe { all_rows::<6, 2, false>(tile, first_row, out) },
        _ => unsafe { all_rows::<8, 1, false>(tile, first_row, out) },
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn all_rows<const BITS: usize, const GROUPS: usize, const MIN: bool>(
    tile: &Tile<'_>,
    first_row: usize,
    out: &mut TileOut,
) {
    let bulk = out.len() / ROWS_PER_PASS * ROWS_PER_PASS;
    let (passes, rest) = out.split_at_mut(bulk);
    for (i, out) in passes.chunks_exact_mut(ROWS_PER_PASS).enumerate() {
        some_rows::<BITS, GROUPS, MIN, ROWS_PER_PASS>(tile, first_row + i * ROWS_PER_PASS, out);
    }
    let fours = rest.len() / 4 * 4;
    let (four, rest) = rest.split_at_mut(fours);
    if !four.is_empty() {
        some_rows::<BITS, GROUPS, MIN, 4>(tile, first_row + bulk, four);
    }
    match rest.len() {
        1 => some_rows::<BITS, GROUPS, MIN, 1>(tile, first_row + bulk + fours, rest),
        2 => some_rows::<BITS, GROUPS, MIN, 2>(tile, first_row + bulk + fours, rest),
        3 => some_rows::<BITS, GROUPS, MIN, 3>(tile, first_row + bulk + fours, rest),
        _ => {}
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

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn some_rows<const BITS: usize, const GROUPS: usize, const MIN: bool, const ROWS: usize>(
    tile: &Tile<'_>,
    first_row: usize,
    out: &mut TileOut,
) {
    let layout = Layout { bits: BITS, groups: GROUPS, has_min: MIN };
    let num_blocks = tile.activations.width() / BLOCK;
    let rows: [QuantizedRow<'_>; ROWS] = std::array::from_fn(|m| tile.activations.row(first_row + m));
    // What the unchecked reads below rely on; a row has as many blocks as its width says.
    assert_eq!(tile.records.len(), num_blocks * layout.record_bytes());
    let quads_per_group = 8 / GROUPS;
    let mut acc = [_mm512_setzero_ps(); ROWS];
    for b in 0..num_blocks {
        // SAFETY: block b of the tile and of each row (asserted above).
        let (record, x, sums, scaled_sums, scales_x) = unsafe {
            (
                tile.records.as_ptr().add(b * layout.record_bytes()),
                rows.map(|row| row.values.as_ptr().add(b * BLOCK)),
                rows.map(|row| &*row.sums.as_ptr().add(b * 2).cast::<[[i16; 2]; 2]>()),
                rows.map(|row| &*row.scaled_sums.as_ptr().add(b * 2).cast::<[f32; 2]>()),
                rows.map(|row| *row.scales.get_unchecked(b)),
            )
        };
        for g in 0..GROUPS {
            let mut dot: [__m512i; ROWS] = std::array::from_fn(|m| {
                let sum_x = sum_of(if GROUPS == 1 { sums[m] } else { &sums[m][g..=g] });
                _mm512_set1_epi32(if MIN { 0 } else { -tile.offset * sum_x })
            });
            for quad in g * quads_per_group..(g + 1) * quads_per_group {
                // SAFETY: `record` points to a whole record of this layout (asserted above).
                let w = unsafe { weights::<BITS>(record, quad) };
                for m in 0..ROWS {
                    // SAFETY: four of the block's 32 activations.
                    let x = _mm512_set1_epi32(unsafe { x[m].add(quad * 4).cast::<i32>().read_unaligned() });
                    dot[m] = _mm512_dpbusd_epi32(dot[m], w, x);
                }
            }
            // SAFETY: scales (and minima) follow the weights in the record.
            let parts = unsafe { record.add(layout.weight_bytes() + g * 2 * ROWS_PER_TILE) };
            let f16_lanes = |at: usize| unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(parts.add(at).cast())) };
            for m in 0..ROWS {
                let scale = _mm512_mul_ps(f16_lanes(0), _mm512_set1_ps(scales_x[m]));
                acc[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[m]), scale, acc[m]);
                if MIN {
                    let sum_x = if GROUPS == 1 { scaled_sums[m][0] + scaled_sums[m][1] } else { scaled_sums[m][g] };
                    let min = f16_lanes(layout.scales_bytes());
                    acc[m] = _mm512_fnmadd_ps(min, _mm512_set1_ps(sum_x), acc[m]);
                }
            }
        }
    }
    for (acc, out) in acc.iter().zip(out) {
        // SAFETY: the row's 16 results.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), *acc) };
    }
}
