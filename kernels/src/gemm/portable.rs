//! The reference in plain Rust: what the vector paths are tested against, and what runs on other processors.

use half::f16;

use super::{Tile, TileOut};
use crate::quantized::{Layout, ROWS_PER_TILE};

pub(super) fn multiply(tile: &Tile<'_>, first_row: usize, out: &mut TileOut) {
    let layout = tile.layout;
    let offset = tile.offset;
    let activations = tile.activations;
    out.fill([0.0; ROWS_PER_TILE]);
    let mut weights = [[0u8; ROWS_PER_TILE * 4]; 8];
    for (b, record) in tile.records.chunks_exact(layout.record_bytes()).enumerate() {
        for (quad, weights) in weights.iter_mut().enumerate() {
            unpack_quad(layout, record, quad, weights);
        }
        for (m, out) in out.iter_mut().enumerate() {
            let block = &activations.row(first_row + m)[b];
            for g in 0..layout.groups {
                let quads = 8 / layout.groups;
                let group = (layout.groups > 1).then_some(g);
                let scaled_sum = block.scaled_sum(group);
                let mut dot = [block.start_for(offset, group); ROWS_PER_TILE];
                let of_group = g * quads..(g + 1) * quads;
                for (weights, x) in weights[of_group.clone()].iter().zip(&block.values.as_chunks::<4>().0[of_group]) {
                    for (dot, w) in dot.iter_mut().zip(weights.chunks_exact(4)) {
                        for (w, x) in w.iter().zip(x) {
                            *dot += i32::from(*w) * i32::from(*x);
                        }
                    }
                }
                let parts = &record[layout.weight_bytes() + g * 2 * ROWS_PER_TILE..];
                for (r, out) in out.iter_mut().enumerate() {
                    *out += dot[r] as f32 * (f16_at(parts, r) * block.scale);
                    if layout.has_min {
                        *out -= f16_at(&parts[layout.scales_bytes()..], r) * scaled_sum;
                    }
                }
            }
        }
    }
}

fn f16_at(values: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([values[at * 2], values[at * 2 + 1]]).to_f32()
}

/// The weights of one quad as bytes, `[16 rows][4 inputs]`.
fn unpack_quad(layout: Layout, record: &[u8], quad: usize, weights: &mut [u8; ROWS_PER_TILE * 4]) {
    const VECTOR: usize = ROWS_PER_TILE * 4;
    for (at, w) in weights.iter_mut().enumerate() {
        let low = || record[quad % 4 * VECTOR + at] >> (quad / 4 * 4) & 15;
        *w = match layout.bits {
            8 => record[quad * VECTOR + at],
            5 => low() | (record[4 * VECTOR + at] >> quad & 1) << 4,
            6 => low() | (record[(4 + quad / 4) * VECTOR + at] >> (quad % 4 * 2) & 3) << 4,
            _ => low(),
        };
    }
}
