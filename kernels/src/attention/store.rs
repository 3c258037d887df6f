//! The KV store: keys and values of every layer, in blocks of positions.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use half::f16;

use super::BLOCK_SIZE;
use crate::activations::{BLOCK, quantize_block};
use crate::quantized::{BlockFormat, Layout};
use crate::simd::{Portable, Simd};
use crate::threads::DisjointMut;

/// Index of a block in a [`KvStore`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);

/// Where one row's K and V go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvSlot {
    pub block: BlockId,
    /// Position within the block.
    pub offset: usize,
    /// Position within the sequence.
    pub position: usize,
}

/// What keys and values are kept as; by number for the kernels of a card.
#[repr(i32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvType {
    F16 = 0,
    /// A whole number of 8 bits for each, and a scale in f16 for every 32 dimensions of a head, as GGUF's `q8_0` has it.
    Q8_0 = 1,
}

impl KvType {
    pub const ALL: [Self; 2] = [Self::F16, Self::Q8_0];

    /// Dimensions that heads are a multiple of.
    pub fn head_step(self) -> usize {
        match self {
            Self::F16 => 16,
            Self::Q8_0 => BLOCK,
        }
    }

    /// Bytes of the keys, and of the values, of one head in a block.
    pub fn head_bytes(self, head_dim: usize) -> usize {
        match self {
            Self::F16 => head_dim * BLOCK_SIZE * size_of::<f16>(),
            Self::Q8_0 => head_dim.div_ceil(BLOCK) * KEY_LAYOUT.record_bytes(),
        }
    }
}

impl fmt::Display for KvType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F16 => "f16",
            Self::Q8_0 => "q8_0",
        })
    }
}

impl FromStr for KvType {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let known = Self::ALL.into_iter().find(|known| known.to_string() == name);
        known.ok_or_else(|| {
            format!("unknown type of keys and values {name:?} ({})", Self::ALL.map(|t| t.to_string()).join(", "))
        })
    }
}

/// Keys in q8_0 are without what all of them have in common ([`KvStore::set`]) and turned ([`spread`]), then packed as
/// the weights of a matrix are whose 16 rows are the positions of the block: its products with queries are those of the
/// quantized GEMM.
pub(super) const KEY_FORMAT: BlockFormat = BlockFormat::Q8_0;
pub(super) const KEY_LAYOUT: Layout = Layout { bits: 8, groups: 1, has_min: false };

/// K and V of every layer for `num_blocks` blocks of [`BLOCK_SIZE`] positions.
///
/// Memory is reserved at once but touched only as blocks are written.
#[derive(Debug)]
pub struct KvStore {
    kv_type: KvType,
    num_kv_heads: usize,
    head_dim: usize,
    num_blocks: usize,
    layers: Vec<LayerKv>,
}

/// `[block][kv_head]` of what a head is:
///
/// ```text
///        keys                                             values
/// f16    [head_dim][16 positions]: transposed, so that    [16 positions][head_dim]
///        the positions' scores grow side by side
/// q8_0   [head_dim / 32] records of 16 rows, see          [16 positions][head_dim], then their scales, f16
///        `quantized/packed.rs`                            [16 positions][head_dim / 32]
/// ```
#[derive(Debug)]
pub(super) struct LayerKv {
    k: Zeros,
    v: Zeros,
}

/// Bytes that come from the system untouched, on the boundary of a cache line.
#[derive(Debug)]
struct Zeros {
    bytes: Vec<u8>,
    start: usize,
}

impl Zeros {
    const LINE: usize = 64;

    fn new(len: usize) -> Self {
        let bytes = vec![0; len + Self::LINE];
        let start = bytes.as_ptr().align_offset(Self::LINE);
        Self { bytes, start }
    }

    fn get(&self) -> &[u8] {
        &self.bytes[self.start..]
    }

    fn get_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..]
    }
}

impl KvStore {
    /// # Panics
    /// When heads are no multiple of [`KvType::head_step`].
    pub fn new(kv_type: KvType, num_layers: usize, num_kv_heads: usize, head_dim: usize, num_blocks: usize) -> Self {
        assert!(head_dim.is_multiple_of(kv_type.head_step()), "heads of {head_dim} in {kv_type}");
        let zeros = || Zeros::new(num_blocks * num_kv_heads * kv_type.head_bytes(head_dim));
        let layers = (0..num_layers).map(|_| LayerKv { k: zeros(), v: zeros() }).collect();
        Self { kv_type, num_kv_heads, head_dim, num_blocks, layers }
    }

    pub fn num_blocks(&self) -> usize {
        self.num_blocks
    }

    pub(super) fn kv_type(&self) -> KvType {
        self.kv_type
    }

    pub(super) fn num_kv_heads(&self) -> usize {
        self.num_kv_heads
    }

    pub(super) fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Bytes of one block over all layers.
    pub fn block_bytes(kv_type: KvType, num_layers: usize, num_kv_heads: usize, head_dim: usize) -> usize {
        num_layers * 2 * num_kv_heads * kv_type.head_bytes(head_dim)
    }

    /// Bytes of one block over all layers.
    pub fn bytes_of_block(&self) -> usize {
        Self::block_bytes(self.kv_type, self.layers.len(), self.num_kv_heads, self.head_dim)
    }

    /// All of a block, as [`KvStore::write_block`] takes it.
    ///
    /// # Panics
    /// When it lies outside the store.
    pub fn read_block(&self, block: BlockId) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.bytes_of_block());
        let range = self.range_in_layer(block);
        for LayerKv { k, v } in &self.layers {
            [k, v].into_iter().for_each(|zeros| bytes.extend_from_slice(&zeros.get()[range.clone()]));
        }
        bytes
    }

    /// Replaces all of a block by what was read of one, in a store of the same type and shape.
    ///
    /// # Panics
    /// When the block lies outside the store, or there are not as many bytes as it has.
    pub fn write_block(&mut self, block: BlockId, bytes: &[u8]) {
        assert_eq!(bytes.len(), self.bytes_of_block(), "bytes of a block");
        let range = self.range_in_layer(block);
        let mut parts = bytes.chunks_exact(range.len().max(1));
        for LayerKv { k, v } in &mut self.layers {
            for (zeros, part) in [k, v].into_iter().zip(&mut parts) {
                zeros.get_mut()[range.clone()].copy_from_slice(part);
            }
        }
    }

    /// Where the keys, and the values, of a block are.
    fn range_in_layer(&self, block: BlockId) -> Range<usize> {
        let len = self.num_kv_heads * self.kv_type.head_bytes(self.head_dim);
        block.0 as usize * len..(block.0 as usize + 1) * len
    }

    /// Keys and values of one head in a block.
    pub(super) fn head(&self, layer: usize, block: BlockId, kv_head: usize) -> [&[u8]; 2] {
        let len = self.kv_type.head_bytes(self.head_dim);
        let start = (block.0 as usize * self.num_kv_heads + kv_head) * len;
        let LayerKv { k, v } = &self.layers[layer];
        [k, v].map(|zeros| &zeros.get()[start..start + len])
    }

    /// Replaces the K and V of one position, `[num_kv_heads, head_dim]` each, rounded.
    ///
    /// `center`, of the size of the keys, is taken off them where they are rounded to 8 bits. It must be the same for all positions of
    /// a sequence: then it takes the same off all scores of a query, which changes no weight of a softmax (without a soft cap).
    ///
    /// # Panics
    /// When the slot lies outside the store, or the rows do not fit it.
    pub fn set(&mut self, (layer, center): (usize, Option<&[f32]>), slot: KvSlot, keys: &[f32], values: &[f32]) {
        let writer = self.writer(layer, center);
        // SAFETY: nobody else has the store.
        write_row::<Portable>(unsafe { writer.at(slot) }, keys, values);
    }

    /// Replaces all of `to` by `from`, in every layer.
    ///
    /// # Panics
    /// When one of them lies outside the store.
    pub fn copy_block(&mut self, from: BlockId, to: BlockId) {
        let (from, to) = (self.range_in_layer(from), self.range_in_layer(to));
        for LayerKv { k, v } in &mut self.layers {
            for zeros in [k, v] {
                zeros.get_mut().copy_within(from.clone(), to.start);
            }
        }
    }

    pub(super) fn writer<'a>(&'a mut self, layer: usize, center: Option<&'a [f32]>) -> LayerWriter<'a> {
        let Self { kv_type, num_kv_heads, head_dim, num_blocks, layers } = self;
        let LayerKv { k, v } = &mut layers[layer];
        let (k, v) = (DisjointMut::new(k.get_mut()), DisjointMut::new(v.get_mut()));
        LayerWriter {
            kv_type: *kv_type,
            num_kv_heads: *num_kv_heads,
            head_dim: *head_dim,
            num_blocks: *num_blocks,
            center,
            k,
            v,
        }
    }
}

/// A layer that several tasks write to.
pub(super) struct LayerWriter<'a> {
    kv_type: KvType,
    num_kv_heads: usize,
    head_dim: usize,
    num_blocks: usize,
    center: Option<&'a [f32]>,
    k: DisjointMut<'a, u8>,
    v: DisjointMut<'a, u8>,
}

/// The one who writes a slot.
pub(super) struct SlotWriter<'a> {
    layer: &'a LayerWriter<'a>,
    slot: KvSlot,
}

impl LayerWriter<'_> {
    /// # Safety
    /// Nobody else writes this slot meanwhile.
    ///
    /// # Panics
    /// When the slot lies outside the store.
    pub unsafe fn at(&self, slot: KvSlot) -> SlotWriter<'_> {
        assert!((slot.block.0 as usize) < self.num_blocks && slot.offset < BLOCK_SIZE, "KV slot outside the store");
        SlotWriter { layer: self, slot }
    }
}

/// Replaces the K and V of a position, `[num_kv_heads, head_dim]` each, rounded.
///
/// # Panics
/// When the rows do not fit the store.
#[inline(always)]
pub(super) fn write_row<S: Simd>(writer: SlotWriter<'_>, keys: &[f32], values: &[f32]) {
    let SlotWriter { layer: LayerWriter { kv_type, num_kv_heads, head_dim, center, k, v, .. }, slot } = writer;
    let (num_kv_heads, head_dim, head_bytes) = (*num_kv_heads, *head_dim, kv_type.head_bytes(*head_dim));
    let width = num_kv_heads * head_dim;
    assert!(keys.len() == width && values.len() == width, "K and V of one position");
    assert!(center.is_none_or(|center| center.len() == width), "center of the keys");
    let heads = keys.chunks_exact(head_dim).zip(values.chunks_exact(head_dim));
    for (kv_head, (keys, values)) in heads.enumerate() {
        let head = slot.block.0 as usize * num_kv_heads + kv_head;
        let start = head * head_bytes;
        // SAFETY: the slot is within the store, and nobody else writes it: `LayerWriter::at`.
        let key_bytes = |at: usize, len: usize| unsafe { k.slice(start + at, len) };
        // SAFETY: as above.
        let value_bytes = |at: usize, len: usize| unsafe { v.slice(start + at, len) };
        match kv_type {
            KvType::F16 => {
                for (d, key) in keys.iter().enumerate() {
                    let at = (d * BLOCK_SIZE + slot.offset) * size_of::<f16>();
                    key_bytes(at, size_of::<f16>()).copy_from_slice(&f16::from_f32(*key).to_ne_bytes());
                }
                let values_len = head_dim * size_of::<f16>();
                let target = halves_mut(value_bytes(slot.offset * values_len, values_len));
                for (s, t) in values.chunks_exact(8).zip(target.chunks_exact_mut(8)) {
                    S::load(s).store_f16(t);
                }
            }
            KvType::Q8_0 => {
                let (mut rounded, num_groups) = ([0; BLOCK], head_dim / BLOCK);
                for (group, keys) in keys.as_chunks::<BLOCK>().0.iter().enumerate() {
                    let mut keys = *keys;
                    if let Some(center) = center {
                        let center = &center[kv_head * head_dim + group * BLOCK..][..BLOCK];
                        keys.iter_mut().zip(center).for_each(|(key, center)| *key -= center);
                    }
                    spread(&mut keys);
                    let scale = round_block::<S>(&keys, &mut rounded);
                    let record = group * KEY_LAYOUT.record_bytes();
                    for (quad, rounded) in rounded.as_chunks::<4>().0.iter().enumerate() {
                        let stored = rounded.map(|key| (i32::from(key) + KEY_FORMAT.offset()) as u8);
                        key_bytes(record + (quad * BLOCK_SIZE + slot.offset) * 4, 4).copy_from_slice(&stored);
                    }
                    let at = record + KEY_LAYOUT.weight_bytes() + slot.offset * size_of::<f16>();
                    key_bytes(at, size_of::<f16>()).copy_from_slice(&scale.to_le_bytes());
                }
                for (group, values) in values.chunks_exact(BLOCK).enumerate() {
                    let scale = round_block::<S>(values, &mut rounded);
                    let stored = rounded.map(|value| value as u8);
                    value_bytes(slot.offset * head_dim + group * BLOCK, BLOCK).copy_from_slice(&stored);
                    let at = BLOCK_SIZE * head_dim + (slot.offset * num_groups + group) * size_of::<f16>();
                    value_bytes(at, size_of::<f16>()).copy_from_slice(&scale.to_le_bytes());
                }
            }
        }
    }
}

/// Turns 32 dimensions by an orthogonal matrix, Hadamard's over `sqrt(32)`, which leaves the products of queries and keys that are
/// both turned as they were. A key of which one dimension is far larger than the others (biases of Qwen2's are) becomes one of
/// 32 like dimensions, whose common scale is so much smaller.
#[inline(always)]
pub(super) fn spread(values: &mut [f32; BLOCK]) {
    let mut half = BLOCK / 2;
    while half > 0 {
        for pair in values.chunks_exact_mut(2 * half) {
            let (first, second) = pair.split_at_mut(half);
            for (a, b) in first.iter_mut().zip(second) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        half /= 2;
    }
    values.iter_mut().for_each(|value| *value *= (1.0 / BLOCK as f32).sqrt());
}

/// The scale that 32 values are whole numbers of, and these.
#[inline(always)]
fn round_block<S: Simd>(values: &[f32], rounded: &mut [i8; BLOCK]) -> f16 {
    let mut scale = f16::ZERO;
    quantize_block::<S>(values, rounded, |largest| {
        scale = f16::from_f32(largest / 127.0);
        // Of what it is once it is rounded.
        if scale > f16::ZERO { 1.0 / scale.to_f32() } else { 0.0 }
    });
    scale
}

/// Elements of a store of f16.
pub(super) fn halves(bytes: &[u8]) -> &[f16] {
    // SAFETY: any two bytes are an f16.
    let (before, halves, after) = unsafe { bytes.align_to::<f16>() };
    assert!(before.is_empty() && after.is_empty(), "a store begins on a cache line");
    halves
}

fn halves_mut(bytes: &mut [u8]) -> &mut [f16] {
    // SAFETY: any two bytes are an f16, and any f16 is two bytes.
    let (before, halves, after) = unsafe { bytes.align_to_mut::<f16>() };
    assert!(before.is_empty() && after.is_empty(), "a store begins on a cache line");
    halves
}
