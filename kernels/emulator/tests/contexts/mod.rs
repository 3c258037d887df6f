//! Sequences whose keys and values lie in an emulated KV store, and attention over them.

use half::f16;
use kernels::attention::{KvType, Scoring};
use kernels::cuda::args::{Activations, AttendTile, BlockMeta};
use kernels::cuda::attention::{AttendMemory, AttentionShape};
use kernels::cuda::driver::{DeviceMemory, Driver};
use kernels::cuda::kv::block_bytes;

use crate::arrays::{self, Numbers};

pub const BLOCK: usize = 16;

#[derive(Debug, Clone, Copy)]
pub struct Heads {
    pub num_heads: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
    pub scoring: Scoring,
    pub kv_type: KvType,
}

/// Positions of one sequence, f16: queries `[positions, num_heads, head_dim]`, keys and values alike.
#[derive(Debug, Clone)]
pub struct Context {
    pub q: Vec<f16>,
    pub k: Vec<f16>,
    pub v: Vec<f16>,
}

/// Rows of a step: positions `first..first + rows` of a context.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    pub context: &'a Context,
    pub first: usize,
    pub rows: usize,
}

/// What a step made of its real rows.
#[derive(Debug, Clone, PartialEq)]
pub struct Attended {
    /// `[rows, num_heads · head_dim]`
    pub rows: Vec<f32>,
    /// `[rows, stride]`
    pub values: Vec<i8>,
    /// `[rows, stride / 32]`
    pub meta: Vec<BlockMeta>,
}

impl Heads {
    pub fn q_width(&self) -> usize {
        self.num_heads * self.head_dim
    }

    pub fn kv_width(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }

    pub fn stride(&self) -> usize {
        self.q_width().next_multiple_of(128)
    }

    pub fn context(&self, positions: usize, numbers: &mut Numbers, sharpness: f32) -> Context {
        let mut of = |width: usize, factor: f32| -> Vec<f16> {
            numbers.any(positions * width).into_iter().map(|x| f16::from_f32(x * factor)).collect()
        };
        Context { q: of(self.q_width(), sharpness), k: of(self.kv_width(), 1.0), v: of(self.kv_width(), 2.0) }
    }

    /// Attention for `sequences`, in a step of `bucket` rows whose KV store has its blocks in an order of `seed` and is full
    /// of NaN keys and of great values where no position is.
    pub fn attend(&self, sequences: &[Rows<'_>], bucket: usize, max_positions: usize, seed: u64) -> Attended {
        let device = arrays::device();
        let Self { num_heads, num_kv_heads, head_dim, kv_type, .. } = *self;
        let shape = AttentionShape::new(kv_type, (num_heads, num_kv_heads), head_dim, max_positions).unwrap();
        let mut numbers = Numbers::new(seed);
        let blocks_of = |rows: &Rows<'_>| rows.context.k.len().div_ceil(self.kv_width() * BLOCK);
        let mut free: Vec<usize> = (0..sequences.iter().map(blocks_of).sum::<usize>() + 3).collect();
        let mut keys = vec![0; free.len() * block_bytes(kv_type, num_kv_heads, head_dim)];
        let mut values = keys.clone();
        let elements = free.len() * BLOCK * self.kv_width();
        let unused = Context { q: Vec::new(), k: vec![f16::NAN; elements], v: vec![f16::from_f32(6e4); elements] };
        self.store(&unused, &free, &mut keys, &mut values);
        let (mut q, mut positions, mut table, mut tiles) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for sequence in sequences {
            let first_row = positions.len();
            tiles.extend(shape.tiles(first_row..first_row + sequence.rows, sequence.first, table.len()));
            let start = table.len();
            table.extend((0..blocks_of(sequence)).map(|_| free.swap_remove(numbers.below(free.len()))));
            self.store(sequence.context, &table[start..], &mut keys, &mut values);
            positions.extend(sequence.first..sequence.first + sequence.rows);
            let rows = sequence.first * self.q_width()..(sequence.first + sequence.rows) * self.q_width();
            q.extend(sequence.context.q[rows].iter().map(|x| x.to_bits()));
        }
        let num_rows = positions.len();
        positions.resize(bucket, 0);
        q.resize(bucket * self.q_width(), 0x7e00);
        // Nothing to do, before what there is.
        let nothing = AttendTile { first_row: 0, num_rows: 0, first_position: 1000, block_table: 1 << 30 };
        tiles.splice(0..0, [nothing; 3]);
        let num_tiles = tiles.len();
        let integers = |v: &[usize]| v.iter().flat_map(|n| (*n as i32).to_le_bytes()).collect::<Vec<_>>();
        let tiles = tiles.iter().flat_map(|t| [t.first_row, t.num_rows, t.first_position, t.block_table]);
        let memory = [
            arrays::halves(&device, &q),
            arrays::bytes(&device, &keys),
            arrays::bytes(&device, &values),
            arrays::bytes(&device, &tiles.flat_map(i32::to_le_bytes).collect::<Vec<_>>()),
            arrays::bytes(&device, &integers(&table)),
            arrays::bytes(&device, &integers(&positions)),
            device.allocate(shape.workspace_bytes(bucket)).unwrap(),
            arrays::floats(&device, &vec![f32::NAN; bucket * self.q_width()]),
            arrays::bytes(&device, &vec![0x55; bucket * self.stride()]),
            arrays::bytes(&device, &vec![0x55; bucket * self.stride() / 32 * size_of::<BlockMeta>()]),
        ];
        let [q_half, keys, values, tiles, block_tables, positions, workspace, attended, bytes, meta] =
            memory.each_ref().map(DeviceMemory::address);
        let activations = Activations { values: bytes, meta, stride: self.stride() as i32, num_rows: bucket as i32 };
        let addresses =
            AttendMemory { q_half, keys, values, tiles, block_tables, positions, workspace, attended, activations };
        shape.attend(&device, self.scoring, bucket, num_tiles, &addresses).unwrap();
        let mut rows = arrays::read_floats(&device, &memory[7]);
        rows.truncate(num_rows * self.q_width());
        let mut read = [vec![0; num_rows * self.stride()], vec![0; num_rows * self.stride() / 4]];
        device.read(&memory[8], 0, &mut read[0]).unwrap();
        device.read(&memory[9], 0, &mut read[1]).unwrap();
        let meta = read[1].as_chunks::<8>().0.iter().map(|b| BlockMeta {
            scale: f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
            sums: [i16::from_le_bytes([b[4], b[5]]), i16::from_le_bytes([b[6], b[7]])],
        });
        Attended { rows, values: read[0].iter().map(|b| b.cast_signed()).collect(), meta: meta.collect() }
    }

    fn store(&self, context: &Context, table: &[usize], keys: &mut [u8], values: &mut [u8]) {
        let Self { num_kv_heads, head_dim, kv_type, .. } = *self;
        let head_bytes = kv_type.head_bytes(head_dim);
        for (index, (k, v)) in context.k.chunks_exact(head_dim).zip(context.v.chunks_exact(head_dim)).enumerate() {
            let (position, head) = (index / num_kv_heads, index % num_kv_heads);
            let (block, offset) = (table[position / BLOCK], position % BLOCK);
            let start = (block * num_kv_heads + head) * head_bytes;
            let [keys, values] = [&mut *keys, &mut *values].map(|store| &mut store[start..][..head_bytes]);
            if kv_type == KvType::F16 {
                for (d, (k, v)) in k.iter().zip(v).enumerate() {
                    put_half(keys, offset * head_dim + d, *k);
                    put_half(values, d * BLOCK + offset, *v);
                }
                continue;
            }
            // Scales lie behind the bytes.
            let (scales, groups) = (head_dim * BLOCK / 2, head_dim / 32);
            for (group, (k, v)) in k.chunks_exact(32).zip(v.chunks_exact(32)).enumerate() {
                let ((k, key_scale), (v, value_scale)) = (rounded(k), rounded(v));
                for i in 0..32 {
                    let d = group * 32 + i;
                    keys[offset * head_dim + d] = (k[i] + 128) as u8;
                    values[d * BLOCK + offset] = (v[i] + 128) as u8;
                }
                put_half(keys, scales + offset * groups + group, key_scale);
                put_half(values, scales + group * BLOCK + offset, value_scale);
            }
        }
    }

    /// What is read of a context whose keys and values are kept in q8_0.
    pub fn as_read(&self, context: &Context) -> Context {
        let read = |values: &[f16]| -> Vec<f16> {
            let groups = values.chunks_exact(32).map(rounded);
            groups.flat_map(|(whole, scale)| whole.map(|q| f16::from_f32(q as f32 * scale.to_f32()))).collect()
        };
        Context { q: context.q.clone(), k: read(&context.k), v: read(&context.v) }
    }

    /// Softmax attention of one row in f64.
    pub fn reference(&self, context: &Context, position: usize) -> Vec<f64> {
        let Self { num_heads, num_kv_heads, head_dim, scoring: Scoring { scale, soft_cap, window }, .. } = *self;
        let capped = |score: f64| soft_cap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh());
        let first = window.map_or(0, |window| (position + 1).saturating_sub(window));
        let at = |x: &[f16], index: usize| -> Vec<f64> {
            x[index * head_dim..][..head_dim].iter().map(|x| x.to_f64()).collect()
        };
        let mut out = Vec::new();
        for head in 0..num_heads {
            let kv_head = head / (num_heads / num_kv_heads);
            let query = at(&context.q, position * num_heads + head);
            let scores: Vec<f64> = (first..=position)
                .map(|t| at(&context.k, t * num_kv_heads + kv_head))
                .map(|key| capped(query.iter().zip(&key).map(|(a, b)| a * b).sum::<f64>() * f64::from(scale)))
                .collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
            let mut sums = vec![0.0; head_dim];
            for (t, weight) in (first..).zip(&weights) {
                let value = at(&context.v, t * num_kv_heads + kv_head);
                sums.iter_mut().zip(value).for_each(|(sum, v)| *sum += weight * v);
            }
            let whole: f64 = weights.iter().sum();
            out.extend(sums.iter().map(|sum| sum / whole));
        }
        out
    }
}

fn put_half(bytes: &mut [u8], index: usize, half: f16) {
    bytes[index * 2..][..2].copy_from_slice(&half.to_le_bytes());
}

/// 32 values as whole numbers of a scale, which is not a number if one of them is none.
fn rounded(values: &[f16]) -> ([i32; 32], f16) {
    let largest =
        values.iter().map(|x| x.to_f32().abs()).fold(0.0, |a: f32, b| if b > a || b.is_nan() { b } else { a });
    let scale = f16::from_f32(largest / 127.0);
    let whole = |i: usize| (values[i].to_f32() / scale.to_f32()).round().clamp(-127.0, 127.0) as i32;
    (std::array::from_fn(whole), scale)
}
