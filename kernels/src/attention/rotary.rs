//! Turning queries and keys by their positions, on their way to the KV store.

use super::store::{KvSlot, KvStore, SlotWriter, write_row};
use crate::Cpu;
use crate::shape::Rotary;
use crate::simd::dispatch;
use crate::threads::DisjointMut;

/// Rotary position embedding (Su et al. 2021): cosines and sines per position, `[position][turned dimensions / 2]`.
#[derive(Debug)]
pub struct RotaryTable {
    half_dim: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
    /// Of each pair of dimensions, whether it turns by less than a radian up to the end of the context.
    is_slow: Vec<bool>,
}

impl RotaryTable {
    /// For positions `0..num_positions`, of whole heads.
    pub fn new(num_positions: usize, head_dim: usize, theta: f32) -> Self {
        Self::of(num_positions, &Rotary::plain(head_dim, theta))
    }

    /// For positions `0..num_positions`.
    pub fn of(num_positions: usize, rotary: &Rotary) -> Self {
        Self::first_of(num_positions, num_positions, rotary)
    }

    /// For positions `0..num_positions`, which are the first of a context of `context_length`.
    pub fn first_of(num_positions: usize, context_length: usize, rotary: &Rotary) -> Self {
        let Rotary { frequencies, magnitude } = rotary;
        let positions = (0..num_positions).map(|position| position as f64);
        let angles = positions.flat_map(|position| frequencies.iter().map(move |frequency| position * frequency));
        let (cos, sin) = angles.map(|a| ((a.cos() * magnitude) as f32, (a.sin() * magnitude) as f32)).unzip();
        let is_slow = frequencies.iter().map(|frequency| context_length as f64 * frequency < 1.0).collect();
        Self { half_dim: frequencies.len(), cos, sin, is_slow }
    }

    /// Replaces `center` by what nearly all turned keys have in common of `bias` `[num_kv_heads, head_dim]`, which was added to each:
    /// its dimensions that hardly turn.
    pub fn center(&self, head_dim: usize, bias: &[f32], center: &mut Vec<f32>) {
        center.clear();
        center.extend(bias.iter().enumerate().map(|(at, bias)| if self.stays(at % head_dim) { *bias } else { 0.0 }));
    }

    /// Whether a dimension of a head hardly turns, or not at all.
    pub fn stays(&self, dim: usize) -> bool {
        dim >= 2 * self.half_dim || self.is_slow[dim % self.half_dim]
    }

    /// `[position][turned dimensions / 2]`
    pub fn cos(&self) -> &[f32] {
        &self.cos
    }

    /// `[position][turned dimensions / 2]`
    pub fn sin(&self) -> &[f32] {
        &self.sin
    }
}

/// Turns `q` `[rows, num_heads, head_dim]` and `k` `[rows, num_kv_heads, head_dim]` in place and writes `k` and `v` of each
/// row to its slot; for `center`, see [`KvStore::set`].
///
/// # Panics
/// When a slot lies outside the store or the table. Slots of one call must differ.
pub fn rotate_and_store(
    cpu: &Cpu,
    store: &mut KvStore,
    (layer, center): (usize, Option<&[f32]>),
    table: &RotaryTable,
    slots: &[KvSlot],
    [q, k, v]: [&mut [f32]; 3],
) {
    let head_dim = store.head_dim();
    let (q_width, kv_width) = (q.len() / slots.len().max(1), k.len() / slots.len().max(1));
    let v = &*v;
    let (q, k) = (DisjointMut::new(q), DisjointMut::new(k));
    let writer = &store.writer(layer, center);
    let isa = cpu.isa();
    // Small rows: a few to a task.
    const ROWS_PER_TASK: usize = 4;
    cpu.pool().run(slots.len().div_ceil(ROWS_PER_TASK), &|task| {
        for row in task * ROWS_PER_TASK..((task + 1) * ROWS_PER_TASK).min(slots.len()) {
            let slot = slots[row];
            let angles = slot.position * table.half_dim..(slot.position + 1) * table.half_dim;
            let (cos, sin) = (&table.cos[angles.clone()], &table.sin[angles]);
            // SAFETY: each row belongs to one task.
            let (q, k) = unsafe { (q.slice(row * q_width, q_width), k.slice(row * kv_width, kv_width)) };
            for head in q.chunks_exact_mut(head_dim).chain(k.chunks_exact_mut(head_dim)) {
                // Dimensions beyond twice the table's stay as they are.
                let (first, second) = head.split_at_mut(table.half_dim);
                for (((a, b), c), s) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                    (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
                }
            }
            let (k, v) = (&*k, &v[row * kv_width..][..kv_width]);
            // SAFETY: slots of one call differ, so no other task writes this position.
            let writer = unsafe { writer.at(slot) };
            dispatch!(isa, write_row(writer: SlotWriter<'_>, k: &[f32], v: &[f32]));
        }
    });
}
