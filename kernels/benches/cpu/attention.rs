//! Attention of the default model: 14 heads over 2 KV heads of 64.

use criterion::{BenchmarkId, Criterion, Throughput};
use kernels::Cpu;
use kernels::attention::{
    BLOCK_SIZE, BlockId, KvSlot, KvStore, KvType, Queries, RotaryTable, Scoring, attend, rotate_and_store,
};

use crate::gemm::values;
use crate::{all_cores, group, num_turns, work};

const NUM_HEADS: usize = 14;
const NUM_KV_HEADS: usize = 2;
const HEAD_DIM: usize = 64;
const THETA: f32 = 1e6;

pub fn bench(criterion: &mut Criterion) {
    let cpu = all_cores();
    let mut group = group(criterion, &cpu, "attention");
    for kv_type in [KvType::F16, KvType::Q8_0] {
        for (name, first_position, rows) in [
            ("decode at 512", 511_usize, 1),
            ("decode at 2048", 2047, 1),
            ("decode at 32768", 32767, 1),
            ("prefill at 512", 512, 128),
            ("prefill at 8192", 8192, 128),
        ] {
            let positions = first_position + rows;
            let layer_bytes = KvStore::block_bytes(kv_type, 1, NUM_KV_HEADS, HEAD_DIM) * positions.div_ceil(BLOCK_SIZE);
            // Each row sees itself and what is before it; a key costs a dot product, a value a weighted sum.
            let keys_seen: usize = (first_position + 1..=positions).sum();
            group.throughput(work(4 * NUM_HEADS * HEAD_DIM * keys_seen, layer_bytes));
            group.bench_function(BenchmarkId::new(name, format!("{rows} rows, {kv_type}")), |bencher| {
                let num_layers = num_turns(layer_bytes);
                let store = filled_store(&cpu, kv_type, num_layers, positions);
                let block_table = block_table(positions);
                let sequence = |_| Queries { first_row: 0, num_rows: rows, first_position, block_table: &block_table };
                let q = values(rows * NUM_HEADS * HEAD_DIM);
                let mut out = vec![0.0; q.len()];
                let mut layer = 0;
                bencher.iter(|| {
                    layer = (layer + 1) % num_layers;
                    attend(&cpu, &store, (layer, Scoring::plain(HEAD_DIM)), 1, &sequence, &q, &mut out);
                });
            });
        }
    }
    for rows in [1, 128] {
        let mut qkv = [NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS].map(|heads| values(rows * heads * HEAD_DIM));
        let bytes: usize = qkv.iter().map(|part| size_of_val(part.as_slice())).sum();
        group.throughput(Throughput::Bytes(bytes as u64));
        group.bench_function(BenchmarkId::new("rotate and store", format!("{rows} rows")), |bencher| {
            let mut store = KvStore::new(KvType::F16, 1, NUM_KV_HEADS, HEAD_DIM, rows.div_ceil(BLOCK_SIZE));
            let (table, slots) = (RotaryTable::new(rows, HEAD_DIM, THETA), slots(rows));
            bencher.iter(|| {
                let qkv = qkv.each_mut().map(Vec::as_mut_slice);
                rotate_and_store(&cpu, &mut store, (0, None), &table, &slots, qkv);
            });
        });
    }
    group.finish();
}

/// A store whose first `positions` positions hold values in every layer.
fn filled_store(cpu: &Cpu, kv_type: KvType, num_layers: usize, positions: usize) -> KvStore {
    let mut store = KvStore::new(kv_type, num_layers, NUM_KV_HEADS, HEAD_DIM, positions.div_ceil(BLOCK_SIZE));
    let (table, slots) = (RotaryTable::new(positions, HEAD_DIM, THETA), slots(positions));
    let mut qkv = [NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS].map(|heads| values(positions * heads * HEAD_DIM));
    for layer in 0..num_layers {
        rotate_and_store(cpu, &mut store, (layer, None), &table, &slots, qkv.each_mut().map(Vec::as_mut_slice));
    }
    store
}

fn block_table(positions: usize) -> Vec<BlockId> {
    (0..positions.div_ceil(BLOCK_SIZE)).map(|block| BlockId(block as u32)).collect()
}

fn slots(positions: usize) -> Vec<KvSlot> {
    (0..positions)
        .map(|position| KvSlot {
            block: BlockId((position / BLOCK_SIZE) as u32),
            offset: position % BLOCK_SIZE,
            position,
        })
        .collect()
}
