use proptest::prelude::*;

use super::*;
use crate::Isa;

fn values(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed | 1;
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1);
            f32::from((state >> 56) as i8) / 64.0
        })
        .collect()
}

struct Shape {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    scoring: Scoring,
}

/// Stores all positions, then attends for the rows from `first` on, in chunks of `chunk`.
fn run(cpu: &Cpu, shape: &Shape, [q, k, v]: [&[f32]; 3], positions: usize, first: usize, chunk: usize) -> Vec<f32> {
    let Shape { heads, kv_heads, head_dim, scoring } = *shape;
    let num_blocks = positions.div_ceil(BLOCK_SIZE);
    let mut store = KvStore::new(2, kv_heads, head_dim, num_blocks + 3);
    // Blocks in falling order: a table is not the identity.
    let table: Vec<BlockId> = (0..num_blocks).map(|b| BlockId((num_blocks + 2 - b) as u32)).collect();
    let rotary = RotaryTable::new(positions, head_dim, 1e4);
    let slots: Vec<KvSlot> = (0..positions)
        .map(|position| KvSlot { block: table[position / BLOCK_SIZE], offset: position % BLOCK_SIZE, position })
        .collect();
    let (mut q, mut k, mut v) = (q.to_vec(), k.to_vec(), v.to_vec());
    rotate_and_store(cpu, &mut store, 1, &rotary, &slots, [&mut q, &mut k, &mut v]);
    let width = heads * head_dim;
    let mut out = vec![f32::NAN; (positions - first) * width];
    for start in (first..positions).step_by(chunk) {
        let num_rows = chunk.min(positions - start);
        let queries = Queries { first_row: 0, num_rows, first_position: start, block_table: &table };
        let rows = &mut out[(start - first) * width..][..num_rows * width];
        attend(cpu, &store, (1, scoring), 1, &|_| queries, &q[start * width..][..num_rows * width], rows);
    }
    out
}

/// Softmax attention in f64 over f16 keys and values.
fn reference(shape: &Shape, [q, k, v]: [&[f32]; 3], positions: usize) -> Vec<f64> {
    let Shape { heads, kv_heads, head_dim, scoring } = *shape;
    let first_seen = |row: usize| scoring.window.map_or(0, |window| (row + 1).saturating_sub(window));
    let capped = |score: f64| scoring.soft_cap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh());
    let turn = |x: &[f32], position: usize| -> Vec<f64> {
        let half = head_dim / 2;
        (0..head_dim)
            .map(|d| {
                let angle = position as f64 * 1e4f64.powf(-((d % half) as f64) / half as f64);
                let (a, b) = (f64::from(x[d % half]), f64::from(x[d % half + half]));
                if d < half { a * angle.cos() - b * angle.sin() } else { b * angle.cos() + a * angle.sin() }
            })
            .collect()
    };
    let mut out = Vec::new();
    for row in 0..positions {
        for head in 0..heads {
            let kv = head / (heads / kv_heads);
            let at = |x: &[f32], t: usize| x[(t * kv_heads + kv) * head_dim..][..head_dim].to_vec();
            let query = turn(&q[(row * heads + head) * head_dim..][..head_dim], row);
            let scores: Vec<f64> = (first_seen(row)..=row)
                .map(|t| {
                    let key = turn(&at(k, t), t);
                    capped(query.iter().zip(&key).map(|(a, b)| a * b).sum::<f64>() * f64::from(scoring.scale))
                })
                .collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
            for d in 0..head_dim {
                out.push(
                    (first_seen(row)..=row)
                        .zip(&scores)
                        .map(|(t, score)| (score - max).exp() / sum * f64::from(at(v, t)[d]))
                        .sum(),
                );
            }
        }
    }
    out
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn attention_equals_the_formula_and_chunks_do_not_change_bits(
        positions in 1usize..70, kv_heads in 1usize..3, group in 1usize..8, wide: bool, chunk in 1usize..40, seed: u64,
        window in proptest::option::of(1usize..50), soft_cap in proptest::option::of(1.0f32..50.0), halved: bool,
    ) {
        let head_dim = if wide { 80 } else { 64 };
        let scale = Scoring::plain(head_dim).scale * if halved { 0.5 } else { 1.0 };
        let shape = Shape { heads: kv_heads * group, kv_heads, head_dim, scoring: Scoring { scale, soft_cap, window } };
        let q = values(positions * shape.heads * shape.head_dim, seed);
        let k = values(positions * kv_heads * shape.head_dim, seed ^ 5);
        let v = values(positions * kv_heads * shape.head_dim, seed ^ 9);
        let expected = reference(&shape, [&q, &k, &v], positions);
        for isa in Isa::available() {
            let whole = run(&Cpu::new(isa, 2), &shape, [&q, &k, &v], positions, 0, positions);
            for (a, b) in whole.iter().zip(&expected) {
                prop_assert!((f64::from(*a) - b).abs() < 6e-3, "{isa}: {a} {b}");
            }
            let chunked = run(&Cpu::new(isa, 1), &shape, [&q, &k, &v], positions, 0, chunk);
            prop_assert!(whole.iter().zip(&chunked).all(|(a, b)| a.to_bits() == b.to_bits()), "{isa} chunks of {chunk}");
            let last = run(&Cpu::new(isa, 1), &shape, [&q, &k, &v], positions, positions - 1, 1);
            let width = shape.heads * shape.head_dim;
            prop_assert!(last.iter().zip(&whole[(positions - 1) * width..]).all(|(a, b)| a.to_bits() == b.to_bits()));
        }
    }
}

#[test]
fn setting_a_position_equals_storing_it_without_rotation() {
    let (kv_heads, head_dim) = (2, 64);
    let (k, v) = (values(kv_heads * head_dim, 1), values(kv_heads * head_dim, 2));
    let slot = KvSlot { block: BlockId(1), offset: 5, position: 0 };
    for isa in Isa::available() {
        let [mut stored, mut set] = [(); 2].map(|()| KvStore::new(2, kv_heads, head_dim, 3));
        let rotary = RotaryTable::new(1, head_dim, 1e4);
        let rows = [&mut vec![0.0; head_dim][..], &mut k.clone(), &mut v.clone()];
        rotate_and_store(&Cpu::new(isa, 1), &mut stored, 1, &rotary, &[slot], rows);
        set.set(1, slot, &k, &v);
        assert!(stored.layers.iter().zip(&set.layers).all(|(a, b)| a.k == b.k && a.v == b.v), "{isa}");
    }
}
