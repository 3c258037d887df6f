use proptest::prelude::*;

use super::*;
use crate::Isa;
use crate::shape::Rotary;

fn values(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed | 1;
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1);
            f32::from((state >> 56) as i8) / 64.0
        })
        .collect()
}

#[derive(Clone, Copy)]
struct Shape {
    kv_type: KvType,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    scoring: Scoring,
}

/// Stores all positions, then attends for the rows from `first` on, in chunks of `chunk`.
fn run(cpu: &Cpu, shape: &Shape, [q, k, v]: [&[f32]; 3], positions: usize, first: usize, chunk: usize) -> Vec<f32> {
    let Shape { kv_type, heads, kv_heads, head_dim, scoring } = *shape;
    let num_blocks = positions.div_ceil(BLOCK_SIZE);
    let mut store = KvStore::new(kv_type, 2, kv_heads, head_dim, num_blocks + 3);
    // Blocks in falling order: a table is not the identity.
    let table: Vec<BlockId> = (0..num_blocks).map(|b| BlockId((num_blocks + 2 - b) as u32)).collect();
    let rotary = RotaryTable::new(positions, head_dim, 1e4);
    let slots: Vec<KvSlot> = (0..positions)
        .map(|position| KvSlot { block: table[position / BLOCK_SIZE], offset: position % BLOCK_SIZE, position })
        .collect();
    let (mut q, mut k, mut v) = (q.to_vec(), k.to_vec(), v.to_vec());
    rotate_and_store(cpu, &mut store, (1, None), &rotary, &slots, [&mut q, &mut k, &mut v]);
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

/// Softmax attention in f64.
fn reference(shape: &Shape, [q, k, v]: [&[f32]; 3], positions: usize) -> Vec<f64> {
    let Shape { heads, kv_heads, head_dim, scoring, .. } = *shape;
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
        positions in 1usize..200, kv_heads in 1usize..3, group in 1usize..8, wide: bool, chunk in 1usize..40, seed: u64,
        window in proptest::option::of(1usize..50), soft_cap in proptest::option::of(1.0f32..50.0), halved: bool,
        kv_type in prop::sample::select(&KvType::ALL[..]),
    ) {
        // 96 is no multiple of 64, and 80 not even of 32.
        let head_dim = match (wide, kv_type) {
            (false, _) => 64,
            (true, KvType::F16) => 80,
            (true, KvType::Q8_0) => 96,
        };
        let scale = Scoring::plain(head_dim).scale * if halved { 0.5 } else { 1.0 };
        let shape = Shape { kv_type, heads: kv_heads * group, kv_heads, head_dim, scoring: Scoring { scale, soft_cap, window } };
        let q = values(positions * shape.heads * shape.head_dim, seed);
        let k = values(positions * kv_heads * shape.head_dim, seed ^ 5);
        let v = values(positions * kv_heads * shape.head_dim, seed ^ 9);
        // Values are up to 2.
        let tolerance = if kv_type == KvType::F16 { 6e-3 } else { 6e-2 };
        let expected = reference(&shape, [&q, &k, &v], positions);
        for isa in Isa::available() {
            let whole = run(&Cpu::new(isa, 2), &shape, [&q, &k, &v], positions, 0, positions);
            for (a, b) in whole.iter().zip(&expected) {
                prop_assert!((f64::from(*a) - b).abs() < tolerance, "{isa}, {kv_type}: {a} {b}");
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
    for (isa, kv_type) in Isa::available().flat_map(|isa| KvType::ALL.map(|kv_type| (isa, kv_type))) {
        let [mut stored, mut set] = [(); 2].map(|()| KvStore::new(kv_type, 2, kv_heads, head_dim, 3));
        let rotary = RotaryTable::new(1, head_dim, 1e4);
        let rows = [&mut vec![0.0; head_dim][..], &mut k.clone(), &mut v.clone()];
        rotate_and_store(&Cpu::new(isa, 1), &mut stored, (1, None), &rotary, &[slot], rows);
        set.set((1, None), slot, &k, &v);
        let heads = |store: &KvStore| -> Vec<u8> {
            let heads = (0..2)
                .flat_map(|layer| (0..3).flat_map(move |block| (0..kv_heads).map(move |head| (layer, block, head))));
            heads.flat_map(|(layer, block, head)| store.head(layer, BlockId(block), head).concat()).collect()
        };
        let (stored, set) = (heads(&stored), heads(&set));
        assert!(stored == set && stored.iter().any(|byte| *byte != 0), "{isa}, {kv_type}");
    }
}

#[test]
fn a_block_that_was_copied_or_read_and_written_is_attended_to_as_the_first_one() {
    let (kv_heads, head_dim) = (2, 64);
    let cpu = Cpu::new(Isa::detect(), 1);
    let (k, v) = (values(kv_heads * head_dim, 1), values(kv_heads * head_dim, 2));
    let q = values(4 * head_dim, 3);
    for kv_type in KvType::ALL {
        let new = || KvStore::new(kv_type, 2, kv_heads, head_dim, 4);
        let mut store = new();
        store.set((1, None), KvSlot { block: BlockId(0), offset: 0, position: 0 }, &k, &v);
        store.copy_block(BlockId(0), BlockId(2));
        let bytes = store.read_block(BlockId(0));
        store.write_block(BlockId(3), &bytes);
        let outputs = [0, 2, 3, 1].map(|block| {
            let table = [BlockId(block)];
            let queries = Queries { first_row: 0, num_rows: 1, first_position: 0, block_table: &table };
            let mut out = vec![f32::NAN; q.len()];
            attend(&cpu, &store, (1, Scoring::plain(head_dim)), 1, &|_| queries, &q, &mut out);
            out
        });
        let [first, copied, written, other] = outputs;
        assert!(first == copied && first == written && first != other, "{kv_type}");
        let mut elsewhere = new();
        elsewhere.write_block(BlockId(1), &bytes);
        assert!(elsewhere.read_block(BlockId(1)) == bytes && bytes.len() == store.bytes_of_block());
    }
}

/// Bytes are 8.5 bits a value, and the values stay within half a step of what they were.
#[test]
fn q8_0_rounds_to_a_whole_number_of_its_scale() {
    let (head_dim, position) = (64, 5);
    assert_eq!(KvStore::block_bytes(KvType::Q8_0, 1, 1, head_dim) * 8, 2 * BLOCK_SIZE * head_dim * 17 / 2);
    let cpu = Cpu::new(Isa::detect(), 1);
    let v = values(head_dim, 7);
    let mut store = KvStore::new(KvType::Q8_0, 1, 1, head_dim, 1);
    // One position is seen alone: what comes out is its value.
    let zeros = vec![0.0; head_dim];
    store.set((0, None), KvSlot { block: BlockId(0), offset: position, position }, &zeros, &v);
    let queries = Queries { first_row: 0, num_rows: 1, first_position: position, block_table: &[BlockId(0)] };
    let scoring = Scoring { window: Some(1), ..Scoring::plain(head_dim) };
    let mut out = vec![f32::NAN; head_dim];
    attend(&cpu, &store, (0, scoring), 1, &|_| queries, &zeros, &mut out);
    for (out, v) in out.chunks(32).zip(v.chunks(32)) {
        let step = v.iter().fold(0.0f32, |most, v| most.max(v.abs())) / 127.0;
        assert!(out.iter().zip(v).all(|(a, b)| (a - b).abs() <= step * 0.55), "{out:?} {v:?}");
        assert!(out.iter().zip(v).any(|(a, b)| a != b), "nothing was rounded");
    }
}

#[test]
fn the_center_is_what_hardly_turns_of_the_bias() {
    // The second of four pairs turns by 0.5 radians in 100 positions, the first by 50; the fourth dimension pair does not turn.
    let rotary = Rotary { frequencies: vec![0.5, 0.005, 0.0], magnitude: 1.0 };
    let (mut center, bias) = (vec![9.0; 3], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]);
    RotaryTable::of(100, &rotary).center(8, &bias, &mut center);
    assert_eq!(center, [0.0, 2.0, 3.0, 0.0, 5.0, 6.0, 7.0, 8.0]);
    RotaryTable::of(100, &Rotary::none()).center(4, &bias, &mut center);
    assert_eq!(center, bias);
}

#[test]
fn a_table_of_the_first_positions_is_the_beginning_of_that_of_all() {
    let rotary = Rotary { frequencies: vec![0.5, 0.005, 0.0], magnitude: 1.5 };
    let (whole, bias) = (RotaryTable::of(1000, &rotary), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    for num_positions in [0, 1, 100, 1000] {
        let first = RotaryTable::first_of(num_positions, 1000, &rotary);
        assert_eq!(first.cos(), &whole.cos()[..3 * num_positions]);
        assert_eq!(first.sin(), &whole.sin()[..3 * num_positions]);
        // What hardly turns in the whole context, as keys are kept by it.
        let [mut of_first, mut of_whole] = [Vec::new(), Vec::new()];
        first.center(6, &bias, &mut of_first);
        whole.center(6, &bias, &mut of_whole);
        assert_eq!(of_first, of_whole);
    }
}

#[test]
fn what_all_keys_have_in_common_costs_no_precision() {
    let (positions, head_dim) = (40_usize, 64);
    let center: Vec<f32> = (0..head_dim).map(|d| if d % 16 == 3 { 150.0 } else { 0.0 }).collect();
    let q = values(head_dim, 1001);
    for isa in Isa::available() {
        let attended = |kv_type, center: Option<&[f32]>, common: &[f32]| {
            let mut store = KvStore::new(kv_type, 1, 1, head_dim, positions.div_ceil(BLOCK_SIZE));
            let table: Vec<BlockId> = (0..store.num_blocks() as u32).map(BlockId).collect();
            for position in 0..positions {
                let (mut k, v) = (values(head_dim, position as u64), values(head_dim, 100 + position as u64));
                k.iter_mut().zip(common).for_each(|(k, common)| *k += common);
                let block = BlockId((position / BLOCK_SIZE) as u32);
                store.set((0, center), KvSlot { block, offset: position % BLOCK_SIZE, position }, &k, &v);
            }
            let queries = Queries { first_row: 0, num_rows: 1, first_position: positions - 1, block_table: &table };
            let mut out = vec![f32::NAN; head_dim];
            attend(&Cpu::new(isa, 1), &store, (0, Scoring::plain(head_dim)), 1, &|_| queries, &q, &mut out);
            out
        };
        let exact = attended(KvType::F16, None, &vec![0.0; head_dim]);
        let center_of_all = &center;
        let error = |center: Option<&[f32]>| {
            let out = attended(KvType::Q8_0, center, center_of_all);
            out.iter().zip(&exact).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
        };
        let (with, without) = (error(Some(&center)), error(None));
        assert!(with < 0.04 && with * 3.0 < without, "{isa}: {with} {without}");
    }
}
