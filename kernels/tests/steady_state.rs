//! A step that has been seen before takes no memory from the system.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use half::f16;
use kernels::activations::QuantizedRows;
use kernels::attention::{
    BLOCK_SIZE, BlockId, KvSlot, KvStore, KvType, Queries, RotaryTable, Scoring, attend, rotate_and_store,
};
use kernels::elementwise::{RmsNorm, add_norm_quantize, swiglu_quantize};
use kernels::gemm::Product;
use kernels::linear::{self, Deltas, RowDelta, Shrunk};
use kernels::low_rank::LowRank;
use kernels::quantized::{BlockFormat, PackedMatrix};
use kernels::{Cpu, Isa};

/// The system's allocator, and how often any thread asked it for memory.
struct Counting(AtomicUsize);

#[global_allocator]
static ALLOCATOR: Counting = Counting(AtomicUsize::new(0));

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.0.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise, and `alloc` above.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        self.0.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise, and `alloc` above.
        unsafe { System.realloc(pointer, layout, new_size) }
    }
}

const HIDDEN_SIZE: usize = 128;
const INTERMEDIATE_SIZE: usize = 256;
const NUM_KV_HEADS: usize = 2;
const HEAD_DIM: usize = 32;
const KV_WIDTH: usize = NUM_KV_HEADS * HEAD_DIM;
const CONTEXT_LENGTH: usize = 64;

/// One decoder block and the buffers of its step.
struct Block {
    cpu: Cpu,
    /// Of q, k, v, o, gate, up, down.
    weights: [PackedMatrix; 7],
    /// One for each of `weights`.
    adapter: [LowRank; 7],
    /// Of the adapter's outputs, as long as the widest.
    scale: Vec<f32>,
    norm: Vec<f32>,
    rotary: RotaryTable,
    kv: KvStore,
    hidden: Vec<f32>,
    residual: Vec<f32>,
    exact: Vec<f32>,
    quantized: QuantizedRows,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    shrunk: Shrunk,
}

impl Block {
    fn new(isa: Isa, rows: usize) -> Self {
        let cpu = Cpu::new(isa, 2);
        let shapes = [
            (HIDDEN_SIZE, HIDDEN_SIZE),
            (KV_WIDTH, HIDDEN_SIZE),
            (KV_WIDTH, HIDDEN_SIZE),
            (HIDDEN_SIZE, HIDDEN_SIZE),
            (INTERMEDIATE_SIZE, HIDDEN_SIZE),
            (INTERMEDIATE_SIZE, HIDDEN_SIZE),
            (HIDDEN_SIZE, INTERMEDIATE_SIZE),
        ];
        let buffer = |width: usize| vec![0.5; rows * width];
        Self {
            weights: shapes.map(|shape| {
                let bytes = vec![0x11; shape.0 * shape.1 / 32 * BlockFormat::Q5_0.block_bytes()];
                PackedMatrix::pack(&cpu, BlockFormat::Q5_0, shape, &bytes, None).unwrap()
            }),
            adapter: shapes.map(|(output, input)| {
                let halves = |n| vec![f16::from_f32(0.01); n];
                LowRank::pack(4, input, output, 1.0, &halves(4 * input), &halves(4 * output))
            }),
            cpu,
            scale: vec![1.5; INTERMEDIATE_SIZE],
            norm: vec![1.0; HIDDEN_SIZE],
            rotary: RotaryTable::new(CONTEXT_LENGTH, HEAD_DIM, 1e4),
            kv: KvStore::new(KvType::F16, 1, NUM_KV_HEADS, HEAD_DIM, CONTEXT_LENGTH / BLOCK_SIZE),
            hidden: buffer(HIDDEN_SIZE),
            residual: buffer(HIDDEN_SIZE),
            exact: buffer(INTERMEDIATE_SIZE),
            quantized: QuantizedRows::default(),
            q: buffer(HIDDEN_SIZE),
            k: buffer(KV_WIDTH),
            v: buffer(KV_WIDTH),
            gate: buffer(INTERMEDIATE_SIZE),
            up: buffer(INTERMEDIATE_SIZE),
            shrunk: Shrunk::default(),
        }
    }

    /// Every kernel of a decoder block, for one sequence at `first_position`; its later half runs with the adapter if
    /// `adapted`.
    fn step(&mut self, first_position: usize, adapted: bool) {
        let rows = self.hidden.len() / HIDDEN_SIZE;
        let Self { cpu, weights: [q, k, v, o, gate, up, down], adapter, scale, kv, .. } = self;
        let run = |first: usize,
                   products: &mut [Product<'_>],
                   quantized: &QuantizedRows,
                   exact: &[f32],
                   shrunk: &mut Shrunk| {
            let get = |i: usize| {
                let low_rank = Some(&adapter[first + i]);
                let scale = low_rank.map(|pair| &scale[..pair.out_features()]);
                Some(RowDelta { product: i, rows: rows / 2..rows, low_rank, output_scale: scale, bias: scale })
            };
            let deltas = Deltas { count: if adapted { products.len() } else { 0 }, get: &get };
            linear::run(cpu, quantized, exact, products, &deltas, shrunk);
        };
        let norm = RmsNorm { weight: &self.norm, eps: 1e-6 };
        let normed = &mut self.exact[..rows * HIDDEN_SIZE];
        add_norm_quantize(cpu, &mut self.hidden, Some(&self.residual), norm, normed, &mut self.quantized);
        let qkv = &mut [product(q, &mut self.q), product(k, &mut self.k), product(v, &mut self.v)];
        run(0, qkv, &self.quantized, normed, &mut self.shrunk);

        let blocks: [BlockId; CONTEXT_LENGTH / BLOCK_SIZE] = std::array::from_fn(|i| BlockId(i as u32));
        let slots: [KvSlot; CONTEXT_LENGTH] = std::array::from_fn(|position| KvSlot {
            block: blocks[position / BLOCK_SIZE],
            offset: position % BLOCK_SIZE,
            position,
        });
        let slots = &slots[first_position..first_position + rows];
        rotate_and_store(cpu, kv, (0, None), &self.rotary, slots, [&mut self.q, &mut self.k, &mut self.v]);
        let sequence = |_| Queries { first_row: 0, num_rows: rows, first_position, block_table: &blocks };
        attend(cpu, kv, (0, Scoring::plain(HEAD_DIM)), 1, &sequence, &self.q, normed);
        self.quantized.quantize(cpu, rows, HIDDEN_SIZE, normed);
        run(3, &mut [product(o, &mut self.residual)], &self.quantized, normed, &mut self.shrunk);

        add_norm_quantize(cpu, &mut self.hidden, Some(&self.residual), norm, normed, &mut self.quantized);
        let gate_up = &mut [product(gate, &mut self.gate), product(up, &mut self.up)];
        run(4, gate_up, &self.quantized, normed, &mut self.shrunk);
        swiglu_quantize(cpu, rows, &self.gate, &self.up, &mut self.exact, &mut self.quantized);
        run(6, &mut [product(down, &mut self.residual)], &self.quantized, &self.exact, &mut self.shrunk);
    }
}

fn product<'a>(weights: &'a PackedMatrix, out: &'a mut [f32]) -> Product<'a> {
    Product { weights: Some(weights.into()), bias: None, out }
}

/// Steps that are counted.
const STEPS: usize = 100;

// One test: another one beside it would be counted too.
#[test]
fn a_step_allocates_nothing_after_the_first_of_its_size() {
    for isa in Isa::available() {
        for rows in [1, 16] {
            let mut block = Block::new(isa, rows);
            block.step(0, true);
            let before = ALLOCATOR.0.load(Ordering::Relaxed);
            assert!(before > 0, "the first step allocates its buffers");
            for step in 0..STEPS {
                block.step((step % 3 + 1) * rows, step % 2 == 0);
            }
            let count = ALLOCATOR.0.load(Ordering::Relaxed) - before;
            // A worker takes its own buffer when it unpacks for the first time, and that is in whichever step the system
            // lets it run: a handful of times in all. A step that allocates does so every time.
            assert!(count < STEPS / 4, "{count} allocations in {STEPS} steps of {rows} rows on {isa}");
        }
    }
}
