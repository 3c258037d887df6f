//! The KV store of the emulated device: what is written to it, and copies within it.

mod arrays;

use emulator::{Emulator, Memory};
use half::f16;
use kernels::attention::{BlockId, KvSlot, KvStore, KvType, RotaryTable};
use kernels::cuda::args::AdapterTable;
use kernels::cuda::driver::{DeviceMemory, Driver};
use kernels::cuda::kv::{CopyArgs, RotateArgs, block_bytes, copy_blocks, rotate_and_store};
use kernels::shape::Rotary;
use kernels::{Cpu, Isa};
use proptest::prelude::*;

use arrays::Numbers;

const BLOCK: usize = 16;
const THETA: f32 = 1e4;
const NUM_POSITIONS: usize = 500;
const FIRST_VIRTUAL_TOKEN: u32 = 1 << 31;
const NAN: u16 = 0x7e00;

/// Rows of one layer, and where they go.
#[derive(Debug)]
struct Layer {
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
    rotary: RotaryTable,
    turned_pairs: usize,
    num_blocks: usize,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    positions: Vec<usize>,
    slots: Vec<i32>,
    tokens: Vec<u32>,
}

/// What is in device memory then.
#[derive(Debug, PartialEq)]
struct Stored {
    /// Bits of f16.
    q_half: Vec<u16>,
    keys: Vec<u8>,
    values: Vec<u8>,
}

fn integers(device: &Emulator, v: &[i32]) -> Memory {
    arrays::bytes(device, &v.iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<_>>())
}

fn read(device: &Emulator, memory: &Memory) -> Vec<u8> {
    let mut bytes = vec![0; memory.len()];
    device.read(memory, 0, &mut bytes).unwrap();
    bytes
}

fn halves_of(bytes: &[u8]) -> Vec<u16> {
    bytes.as_chunks().0.iter().map(|b| u16::from_le_bytes(*b)).collect()
}

fn bytes_of(halves: &[u16]) -> Vec<u8> {
    halves.iter().flat_map(|half| half.to_le_bytes()).collect()
}

impl Layer {
    fn new(heads: (usize, usize), head_dim: usize, num_rows: usize, seed: u64) -> Self {
        let mut numbers = Numbers::new(seed);
        let num_blocks = num_rows / BLOCK + 3;
        let mut free: Vec<i32> = (0..(num_blocks * BLOCK) as i32).collect();
        let (num_heads, num_kv_heads) = heads;
        let rotary = RotaryTable::new(NUM_POSITIONS, head_dim, THETA);
        Self {
            rotary,
            turned_pairs: head_dim / 2,
            num_heads,
            num_kv_heads,
            head_dim,
            num_blocks,
            q: numbers.any(num_rows * num_heads * head_dim),
            k: numbers.any(num_rows * num_kv_heads * head_dim),
            v: numbers.any(num_rows * num_kv_heads * head_dim),
            positions: (0..num_rows).map(|_| numbers.below(NUM_POSITIONS)).collect(),
            slots: (0..num_rows).map(|_| free.swap_remove(numbers.below(free.len()))).collect(),
            tokens: (0..num_rows).map(|_| numbers.below(1000) as u32).collect(),
        }
    }

    /// Of every head these dimensions turn, and the others stay as they are.
    fn turning(self, dims: usize) -> Self {
        let rotary = RotaryTable::of(NUM_POSITIONS, &Rotary::plain(dims, THETA));
        Self { rotary, turned_pairs: dims / 2, ..self }
    }

    fn kv_width(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }

    /// On the device; the table of each row's adapter is one of `adapters` or none.
    fn store(&self, device: &Emulator, layer: i32, adapters: Option<&[u64]>) -> Stored {
        self.store_as(device, (KvType::F16, None), layer, adapters)
    }

    /// The same, with a bias that was added to all keys.
    fn store_as(
        &self,
        device: &Emulator,
        (kv_type, bias): (KvType, Option<&[f32]>),
        layer: i32,
        adapters: Option<&[u64]>,
    ) -> Stored {
        let stays: Vec<f32> = (0..self.head_dim).map(|dim| f32::from(u8::from(self.rotary.stays(dim)))).collect();
        let stays = arrays::floats(device, &stays);
        let common = bias.map(|bias| arrays::floats(device, bias));
        let positions: Vec<i32> = self.positions.iter().map(|p| *p as i32).collect();
        let tokens: Vec<i32> = self.tokens.iter().map(|t| t.cast_signed()).collect();
        let store_bytes = self.num_blocks * block_bytes(kv_type, self.num_kv_heads, self.head_dim);
        let memory = [
            arrays::floats(device, &self.q),
            arrays::floats(device, &self.k),
            arrays::floats(device, &self.v),
            arrays::floats(device, self.rotary.cos()),
            arrays::floats(device, self.rotary.sin()),
            integers(device, &positions),
            integers(device, &self.slots),
            integers(device, &tokens),
            arrays::addresses(device, adapters.unwrap_or(&[])),
            device.allocate(store_bytes).unwrap(),
            device.allocate(store_bytes).unwrap(),
            device.allocate(self.q.len() * 2).unwrap(),
        ];
        let [q, k, v, cos, sin, positions, slots, tokens, rows, keys, values, q_half] =
            memory.each_ref().map(DeviceMemory::address);
        let args = RotateArgs {
            q,
            k,
            v,
            cos,
            sin,
            positions,
            slots,
            tokens,
            adapters: if adapters.is_some() { rows } else { 0 },
            common: common.as_ref().map_or(0, DeviceMemory::address),
            stays: stays.address(),
            keys,
            values,
            q_half,
            num_heads: self.num_heads as i32,
            num_kv_heads: self.num_kv_heads as i32,
            head_dim: self.head_dim as i32,
            layer,
            turned_pairs: self.turned_pairs as i32,
            kv_type,
        };
        rotate_and_store(device, self.slots.len(), args).unwrap();
        let [.., keys, values, q_half] = memory.each_ref().map(|memory| read(device, memory));
        Stored { q_half: halves_of(&q_half), keys, values }
    }

    /// `q` and `k` as the CPU turns them.
    fn turned(&self) -> [Vec<f32>; 2] {
        let cpu = Cpu::new(Isa::Portable, 1);
        let num_rows = self.slots.len();
        let mut store = KvStore::new(KvType::F16, 1, self.num_kv_heads, self.head_dim, num_rows);
        let slot =
            |(row, position): (usize, &usize)| KvSlot { block: BlockId(row as u32), offset: 0, position: *position };
        let slots: Vec<KvSlot> = self.positions.iter().enumerate().map(slot).collect();
        let (mut q, mut k, mut v) = (self.q.clone(), self.k.clone(), self.v.clone());
        kernels::attention::rotate_and_store(
            &cpu,
            &mut store,
            (0, None),
            &self.rotary,
            &slots,
            [&mut q, &mut k, &mut v],
        );
        [q, k]
    }

    /// The store with these rows `[rows, kv_width]`, where they have a slot.
    fn expected(&self, q: &[f32], k: &[f32], v: &[f32]) -> Stored {
        let halves = |x: &[f32]| x.iter().map(|x| f16::from_f32(*x).to_bits()).collect::<Vec<_>>();
        let (k, v) = (halves(k), halves(v));
        let mut keys = vec![0; self.num_blocks * BLOCK * self.kv_width()];
        let mut values = keys.clone();
        for (row, slot) in self.slots.iter().enumerate() {
            let Ok(slot) = usize::try_from(*slot) else { continue };
            for i in 0..self.kv_width() {
                let (head, d) = (i / self.head_dim, i % self.head_dim);
                let start = (slot / BLOCK * self.num_kv_heads + head) * BLOCK * self.head_dim;
                keys[start + slot % BLOCK * self.head_dim + d] = k[row * self.kv_width() + i];
                values[start + d * BLOCK + slot % BLOCK] = v[row * self.kv_width() + i];
            }
        }
        Stored { q_half: halves(q), keys: bytes_of(&keys), values: bytes_of(&values) }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..Default::default() })]

    #[test]
    fn rows_are_turned_as_on_the_cpu_and_lie_where_their_slots_say(
        num_kv_heads in 1..4_usize, group in 1..8_usize,
        head_dim in prop::sample::select(vec![16, 64, 80, 128, 256]), turned in prop::sample::select(vec![2, 16, 40, 256]),
        num_rows in 1..40_usize, seed: u64,
    ) {
        let layer = Layer::new((num_kv_heads * group, num_kv_heads), head_dim, num_rows, seed);
        let mut layer = layer.turning(turned.min(head_dim));
        layer.slots.iter_mut().step_by(5).for_each(|slot| *slot = -1);
        let [q, k] = layer.turned();
        prop_assert_eq!(layer.store(&arrays::device(), 0, None), layer.expected(&q, &k, &layer.v));
    }
}

/// As the store of the host keeps the head of a position in q8_0: whole numbers and scales of its keys, then of its values.
fn head_on_host(store: &KvStore, (num_kv_heads, head_dim): (usize, usize), slot: usize, head: usize) -> [Vec<i32>; 4] {
    let block = store.read_block(BlockId((slot / BLOCK) as u32));
    let (offset, groups) = (slot % BLOCK, head_dim / 32);
    let [keys, values] = [0, 1].map(|part| &block[(part * num_kv_heads + head) * head_dim * 17..][..head_dim * 17]);
    let half = |bytes: &[u8], at: usize| i32::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
    // Records of 16 rows of 32 weights, four of them at a time, then the rows' scales.
    let key = |d: usize| i32::from(keys[d / 32 * 544 + (d % 32 / 4 * BLOCK + offset) * 4 + d % 4]) - 128;
    let value = |d: usize| i32::from(values[offset * head_dim + d].cast_signed());
    [
        (0..head_dim).map(key).collect(),
        (0..groups).map(|group| half(keys, group * 544 + 512 + offset * 2)).collect(),
        (0..head_dim).map(value).collect(),
        (0..groups).map(|group| half(values, head_dim * BLOCK + (offset * groups + group) * 2)).collect(),
    ]
}

/// The same of the device's.
fn head_on_device(
    stored: &Stored,
    (num_kv_heads, head_dim): (usize, usize),
    slot: usize,
    head: usize,
) -> [Vec<i32>; 4] {
    let (offset, groups) = (slot % BLOCK, head_dim / 32);
    let start = (slot / BLOCK * num_kv_heads + head) * head_dim * 17;
    let [keys, values] = [&stored.keys, &stored.values].map(|bytes| &bytes[start..][..head_dim * 17]);
    let scales = [keys, values].map(|bytes| halves_of(&bytes[head_dim * BLOCK..]));
    let whole = |byte: u8| i32::from(byte) - 128;
    [
        (0..head_dim).map(|d| whole(keys[offset * head_dim + d])).collect(),
        (0..groups).map(|group| i32::from(scales[0][offset * groups + group])).collect(),
        (0..head_dim).map(|d| whole(values[d * BLOCK + offset])).collect(),
        (0..groups).map(|group| i32::from(scales[1][group * BLOCK + offset])).collect(),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..Default::default() })]

    #[test]
    fn rows_in_q8_0_are_the_whole_numbers_and_scales_of_the_cpus(
        num_kv_heads in 1..4_usize, head_dim in prop::sample::select(vec![32, 64, 96, 128, 256]),
        turned in prop::sample::select(vec![0, 16, 32, 256]), has_bias: bool, size in -24..3_i32, num_rows in 1..20_usize,
        seed: u64,
    ) {
        let mut layer = Layer::new((num_kv_heads, num_kv_heads), head_dim, num_rows, seed).turning(turned.min(head_dim));
        // From such whose scales are no numbers of f16 to great ones; and zeros.
        layer.v.iter_mut().chain(&mut layer.k).for_each(|x| *x *= f32::powi(2.0, size));
        layer.v[..32].fill(0.0);
        let bias = Numbers::new(seed ^ 3).any(layer.kv_width());
        let bias = has_bias.then_some(&bias[..]);
        let stored = layer.store_as(&arrays::device(), (KvType::Q8_0, bias), 0, None);

        let mut store = KvStore::new(KvType::Q8_0, 1, num_kv_heads, head_dim, layer.num_blocks);
        let slots = layer.slots.iter().zip(&layer.positions).map(|(slot, position)| KvSlot {
            block: BlockId((*slot as usize / BLOCK) as u32),
            offset: *slot as usize % BLOCK,
            position: *position,
        });
        let mut center = Vec::new();
        layer.rotary.center(head_dim, bias.unwrap_or_default(), &mut center);
        let (mut q, mut k, mut v) = (layer.q.clone(), layer.k.clone(), layer.v.clone());
        kernels::attention::rotate_and_store(
            &Cpu::new(Isa::Portable, 1),
            &mut store,
            (0, bias.map(|_| &center[..])),
            &layer.rotary,
            &slots.collect::<Vec<_>>(),
            [&mut q, &mut k, &mut v],
        );
        for slot in &layer.slots {
            for head in 0..num_kv_heads {
                let shape = (num_kv_heads, head_dim);
                let expected = head_on_host(&store, shape, *slot as usize, head);
                prop_assert_eq!(head_on_device(&stored, shape, *slot as usize, head), expected);
            }
        }
        // Queries by Hadamard's matrix: -1 where numbers of row and column have an odd number of bits in common.
        for (spread, q) in stored.q_half.chunks_exact(32).zip(q.chunks_exact(32)) {
            for (row, spread) in spread.iter().enumerate() {
                let sign = |column: usize| if (row & column).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
                let expected = (0..32).map(|column| sign(column) * q[column]).sum::<f32>() / f32::sqrt(32.0);
                prop_assert!((f16::from_bits(*spread).to_f32() - expected).abs() < 4e-3);
            }
        }
    }
}

#[test]
fn a_value_that_is_no_number_is_stored_in_q8_0_as_a_key_that_is_none() {
    let mut layer = Layer::new((2, 2), 64, 5, 6);
    let good = layer.store_as(&arrays::device(), (KvType::Q8_0, None), 0, None);
    let broken = [(1, 0, f32::NAN), (2, 1, f32::INFINITY), (4, 0, 7e4)];
    for (row, head, value) in broken {
        layer.v[(row * 2 + head) * 64 + 40] = value;
    }
    let stored = layer.store_as(&arrays::device(), (KvType::Q8_0, None), 0, None);
    for (row, slot) in layer.slots.iter().enumerate() {
        for head in 0..2 {
            let of = |stored: &Stored| head_on_device(stored, (2, 64), *slot as usize, head);
            let ([keys, key_scales, values, value_scales], good) = (of(&stored), of(&good));
            if broken.iter().any(|(r, h, _)| (*r, *h) == (row, head)) {
                assert_eq!(key_scales, [i32::from(NAN); 2]);
                assert_eq!((values[..32].to_vec(), value_scales), (good[2][..32].to_vec(), vec![good[3][0], 0]));
            } else {
                assert_eq!([keys, key_scales, values, value_scales], good);
            }
        }
    }
}

#[test]
fn virtual_rows_store_what_their_adapter_has_for_the_layer() {
    let device = arrays::device();
    let mut layer = Layer::new((4, 2), 32, 7, 3);
    let (num_layers, num_virtual, width) = (3, 2, layer.kv_width());
    let mut numbers = Numbers::new(8);
    let mut halves =
        || -> Vec<f16> { numbers.any(num_layers * num_virtual * width).into_iter().map(f16::from_f32).collect() };
    let (prelude_keys, prelude_values) = (halves(), halves());
    let upload = |x: &[f16]| arrays::halves(&device, &x.iter().map(|x| x.to_bits()).collect::<Vec<_>>());
    let (key_memory, value_memory) = (upload(&prelude_keys), upload(&prelude_values));
    let key_values = AdapterTable {
        prelude_keys: key_memory.address(),
        prelude_values: value_memory.address(),
        num_virtual: num_virtual as i32,
        ..Default::default()
    };
    let key_values = arrays::adapter(&device, &key_values, &[]);
    // A prelude of rows: their keys and values are computed.
    let rows = arrays::adapter(&device, &AdapterTable { num_virtual: 2, ..Default::default() }, &[]);
    let adapters = [0, key_values.address(), key_values.address(), key_values.address(), rows.address(), 0, 0];
    for (row, position) in [(1, 0), (2, 1), (4, 1)] {
        layer.tokens[row] = FIRST_VIRTUAL_TOKEN + position;
    }

    let stored = layer.store(&device, 2, Some(&adapters));

    let [q, mut k] = layer.turned();
    let mut v = layer.v.clone();
    for (row, position) in [(1, 0), (2, 1)] {
        let of = |x: &[f16]| -> Vec<f32> {
            x[(2 * num_virtual + position) * width..][..width].iter().map(|x| x.to_f32()).collect()
        };
        k[row * width..][..width].copy_from_slice(&of(&prelude_keys));
        v[row * width..][..width].copy_from_slice(&of(&prelude_values));
    }
    assert_eq!(stored, layer.expected(&q, &k, &v));
}

#[test]
fn a_value_that_is_no_number_is_stored_as_a_key_that_is_none() {
    let mut layer = Layer::new((2, 2), 64, 5, 6);
    let [q, mut k] = layer.turned();
    let width = layer.kv_width();
    let mut v = layer.v.clone();
    // The greatest too is no f16.
    for (row, head, value) in [(1, 0, f32::NAN), (2, 1, f32::INFINITY), (4, 0, 7e4)] {
        let at = row * width + head * 64;
        layer.v[at + 40] = value;
        v[at + 40] = 0.0;
        k[at..at + 64].fill(f16::from_bits(NAN).to_f32());
    }
    assert_eq!(layer.store(&arrays::device(), 0, None), layer.expected(&q, &k, &v));
}

#[test]
fn blocks_are_copied_in_every_layer_one_after_the_other() {
    for block_len in [block_bytes(KvType::F16, 3, 48), block_bytes(KvType::Q8_0, 3, 96)] {
        check_copies(block_len);
    }
}

/// `block_len` in bytes.
fn check_copies(block_len: usize) {
    let device = arrays::device();
    let (num_layers, num_blocks) = (3, 5);
    let mut numbers = Numbers::new(4);
    let mut store =
        || -> Vec<u8> { (0..num_layers * num_blocks * block_len).map(|_| numbers.below(256) as u8).collect() };
    let before = [store(), store()];
    let memory = before.each_ref().map(|bytes| arrays::bytes(&device, bytes));
    let pairs = [(1, 3), (3, 0), (4, 1)];
    let copies = integers(&device, &pairs.iter().flat_map(|(from, to)| [*from, *to]).collect::<Vec<_>>());
    let num_copies = integers(&device, &[0]);
    let [keys, values] = memory.each_ref().map(DeviceMemory::address);
    let args = CopyArgs {
        keys,
        values,
        copies: copies.address(),
        num_copies: num_copies.address(),
        layer_words: (num_blocks * block_len / 16) as i64,
        block_words: (block_len / 16) as i32,
        unused: 0,
    };
    let mut expected = before.clone();
    for count in [0, 2, 3] {
        device.write(&num_copies, 0, &i32::to_le_bytes(count)).unwrap();
        copy_blocks(&device, num_layers, args).unwrap();
        for bytes in &mut expected {
            for layer in bytes.chunks_exact_mut(num_blocks * block_len) {
                for (from, to) in &pairs[..count as usize] {
                    let (from, to) = (*from as usize * block_len, *to as usize * block_len);
                    layer.copy_within(from..from + block_len, to);
                }
            }
        }
        let after = memory.each_ref().map(|memory| read(&device, memory));
        assert!(after == expected, "{count} copies");
    }
}
