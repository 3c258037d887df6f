//! Attention on the emulated device, against f64 and against the CPU's kernels.

mod arrays;
mod contexts;

use half::f16;
use kernels::attention::{BlockId, KvSlot, KvStore, KvType, Queries, RotaryTable, Scoring, rotate_and_store};
use kernels::cuda::args::{activation_place, num_units, unit_start};
use kernels::cuda::attention::{AttentionShape, MAX_SPLIT_ROWS};
use kernels::cuda::driver::DriverError;
use kernels::{Cpu, Isa};
use proptest::prelude::*;

use arrays::Numbers;
use contexts::{Attended, BLOCK, Context, Heads, Rows};

/// A bucket of rows for which contexts are not divided among warps.
const WHOLE: usize = MAX_SPLIT_ROWS + 1;

fn heads(num_heads: usize, num_kv_heads: usize, head_dim: usize) -> Heads {
    Heads { num_heads, num_kv_heads, head_dim, scoring: Scoring::plain(head_dim), kv_type: KvType::F16 }
}

fn bits(rows: &[f32]) -> Vec<u32> {
    rows.iter().map(|x| x.to_bits()).collect()
}

/// The last `rows` positions of one context.
fn last_rows(heads: Heads, context: &Context, rows: usize, bucket: usize, seed: u64) -> Attended {
    let positions = context.k.len() / heads.kv_width();
    heads.attend(&[Rows { context, first: positions - rows, rows }], bucket, positions, seed)
}

fn any_heads() -> impl Strategy<Value = Heads> {
    let dims = prop::sample::select(vec![16, 32, 64, 80, 96, 112, 128, 256]);
    let groups = prop::sample::select(vec![1, 2, 3, 4, 7, 8, 16]);
    let windows = prop::option::of(prop::sample::select(vec![1, 5, 16, 17, 64, 90, 150, 1000]));
    (1..=2_usize, groups, dims, 0.5..2.0_f32, prop::option::of(1.0..50.0_f32), windows).prop_map(
        |(num_kv_heads, group, head_dim, scale, soft_cap, window)| {
            let heads = heads(num_kv_heads * group, num_kv_heads, head_dim);
            Heads { scoring: Scoring { scale: heads.scoring.scale * scale, soft_cap, window }, ..heads }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..Default::default() })]

    #[test]
    fn rows_attend_as_in_f64(
        heads in any_heads(), positions in 1..200_usize, rows in 1..20_usize,
        bucket in prop::sample::select(vec![20, WHOLE]), sharpness in prop::sample::select(vec![0.0_f32, 1.0, 6.0]),
        seed: u64,
    ) {
        let rows = rows.min(positions);
        let context = heads.context(positions, &mut Numbers::new(seed), sharpness);
        let attended = last_rows(heads, &context, rows, bucket, seed);
        for (i, row) in attended.rows.chunks_exact(heads.q_width()).enumerate() {
            for (a, b) in row.iter().zip(heads.reference(&context, positions - rows + i)) {
                // Weights are rounded to 11 bits, and values reach to 2.
                prop_assert!((f64::from(*a) - b).abs() < 5e-4, "row {i}: {a} is not {b}");
            }
        }
    }

    #[test]
    fn a_rows_bits_are_its_own(
        heads in any_heads(), positions in 20..400_usize, rows in 2..20_usize, others in 1..40_usize, seed: u64,
    ) {
        let mut numbers = Numbers::new(seed);
        let context = heads.context(positions, &mut numbers, 3.0);
        let other = heads.context(others, &mut numbers, 3.0);
        let chunk = |bucket| last_rows(heads, &context, rows, bucket, seed);
        let whole = chunk(WHOLE);
        prop_assert_eq!(bits(&chunk(rows).rows), bits(&whole.rows));
        let alone = Rows { context: &context, first: positions - 1, rows: 1 };
        let beside = Rows { context: &other, first: 0, rows: others };
        for (index, attended) in [
            heads.attend(&[alone], 1, positions, seed ^ 8),
            heads.attend(&[alone, beside], 1 + others, 5000, seed ^ 16),
            heads.attend(&[alone, beside], WHOLE, positions, seed ^ 32),
        ].iter().enumerate() {
            let width = heads.q_width();
            prop_assert_eq!(bits(&attended.rows[..width]), bits(&whole.rows[(rows - 1) * width..]), "way {}", index);
            let stride = heads.stride();
            prop_assert_eq!(&attended.values[..stride], &whole.values[(rows - 1) * stride..]);
            prop_assert_eq!(&attended.meta[..stride / 32], &whole.meta[(rows - 1) * stride / 32..]);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..Default::default() })]

    #[test]
    fn keys_and_values_in_q8_0_give_the_bits_of_what_is_read_of_them_in_f16(
        heads in any_heads().prop_filter("q8_0 has scales for 32 dimensions", |heads| heads.head_dim % 32 == 0),
        positions in 1..200_usize, rows in 1..20_usize, bucket in prop::sample::select(vec![20, WHOLE]), seed: u64,
    ) {
        let context = heads.context(positions, &mut Numbers::new(seed), 3.0);
        let in_q8_0 = Heads { kv_type: KvType::Q8_0, ..heads };
        let rows = rows.min(positions);
        let attended = last_rows(in_q8_0, &context, rows, bucket, seed);
        let expected = last_rows(heads, &in_q8_0.as_read(&context), rows, bucket, seed ^ 4);
        prop_assert_eq!(bits(&attended.rows), bits(&expected.rows));
    }
}

#[test]
fn long_contexts_have_the_same_bits_divided_and_whole() {
    let all = heads(4, 1, 64);
    let window = |window| Heads { scoring: Scoring { window: Some(window), ..all.scoring }, ..all };
    for (heads, positions) in [
        (all, 1024),
        (all, 1025),
        (all, 1279),
        (all, 5120),
        (all, 5121),
        (all, 6200),
        (window(1024), 5200),
        (window(4096), 6200),
    ] {
        let context = heads.context(positions, &mut Numbers::new(positions as u64), 4.0);
        let divided = last_rows(heads, &context, 3, 3, 1);
        let whole = last_rows(heads, &context, 3, WHOLE, 2);
        assert_eq!(bits(&divided.rows), bits(&whole.rows), "{positions} positions");
        for (a, b) in divided.rows[2 * heads.q_width()..].iter().zip(heads.reference(&context, positions - 1)) {
            assert!((f64::from(*a) - b).abs() < 5e-4, "{positions} positions: {a} is not {b}");
        }
    }
}

#[test]
fn units_are_shared_among_fewer_warps_when_there_are_many_tiles() {
    let heads = heads(16, 16, 16);
    let context = heads.context(700, &mut Numbers::new(4), 4.0);
    let rows = Rows { context: &context, first: 699, rows: 1 };
    let alone = heads.attend(&[rows], 1, 700, 1);
    let many = heads.attend(&[rows; 20], 20, 700, 2);
    for row in many.rows.chunks_exact(heads.q_width()) {
        assert_eq!(bits(row), bits(&alone.rows));
    }
}

#[test]
fn rows_attend_as_on_the_cpu() {
    let cpu = Cpu::new(Isa::Portable, 1);
    let narrow = Scoring { scale: 0.2, soft_cap: Some(5.0), window: Some(30) };
    let narrow = Heads { scoring: narrow, ..heads(4, 2, 64) };
    for (heads, positions) in [(heads(14, 2, 64), 150), (heads(8, 2, 128), 70), (heads(3, 3, 80), 40), (narrow, 150)] {
        let mut context = heads.context(positions, &mut Numbers::new(9), 2.0);
        let floats = |x: &[f16]| -> Vec<f32> { x.iter().map(|x| x.to_f32()).collect() };
        let [mut q, mut k, mut v] = [&context.q, &context.k, &context.v].map(|x| floats(x));
        let table: Vec<BlockId> = (0..positions.div_ceil(BLOCK) as u32).map(BlockId).collect();
        let mut store = KvStore::new(KvType::F16, 1, heads.num_kv_heads, heads.head_dim, table.len());
        let slots: Vec<KvSlot> = (0..positions)
            .map(|position| KvSlot { block: table[position / BLOCK], offset: position % BLOCK, position })
            .collect();
        let rotary = RotaryTable::new(positions, heads.head_dim, 1e4);
        rotate_and_store(&cpu, &mut store, (0, None), &rotary, &slots, [&mut q, &mut k, &mut v]);
        let queries = Queries { first_row: 0, num_rows: positions, first_position: 0, block_table: &table };
        let mut out = vec![0.0; q.len()];
        kernels::attention::attend(&cpu, &store, (0, heads.scoring), 1, &|_| queries, &q, &mut out);

        let halves = |x: &[f32]| -> Vec<f16> { x.iter().map(|x| f16::from_f32(*x)).collect() };
        (context.q, context.k) = (halves(&q), halves(&k));
        let attended = last_rows(heads, &context, positions, WHOLE.max(positions), 3);
        for (a, b) in attended.rows.iter().zip(&out) {
            assert!((a - b).abs() < 4e-3, "{a} is not {b}, of values up to 2");
        }
    }
}

#[test]
fn what_is_no_number_stays_in_the_rows_that_see_it() {
    let heads = heads(4, 2, 64);
    let good = heads.context(40, &mut Numbers::new(5), 2.0);
    let expected = last_rows(heads, &good, 20, 20, 1);
    let mut broken = good.clone();
    // As `rotate_and_store` stores them: keys that are no numbers, values that are.
    broken.k[30 * heads.kv_width()] = f16::NAN;
    broken.q[35 * heads.q_width()] = f16::INFINITY;
    for bucket in [20, WHOLE] {
        let attended = last_rows(heads, &broken, 20, bucket, 1);
        let rows = attended.rows.chunks_exact(heads.head_dim).zip(expected.rows.chunks_exact(heads.head_dim));
        for (index, (row, expected)) in rows.enumerate() {
            let (position, head) = (20 + index / heads.num_heads, index % heads.num_heads);
            let sees_it = position >= 30 && head < 2 || position == 35 && head == 0;
            if sees_it {
                assert!(row.iter().all(|x| x.is_nan()), "head {head} of position {position}");
            } else {
                assert_eq!(bits(row), bits(expected), "head {head} of position {position}");
            }
        }
    }
}

#[test]
fn results_are_rounded_to_int8_with_zeros_beyond_the_width() {
    for heads in [heads(3, 1, 80), heads(2, 2, 16), heads(4, 2, 64)] {
        let context = heads.context(30, &mut Numbers::new(2), 2.0);
        let attended = last_rows(heads, &context, 5, 8, 4);
        let (width, stride) = (heads.q_width(), heads.stride());
        for (row, x) in attended.rows.chunks_exact(width).enumerate() {
            let mut x = x.to_vec();
            x.resize(stride, 0.0);
            for (block, x) in x.chunks_exact(32).enumerate() {
                let meta = attended.meta[row * stride / 32 + block];
                let largest = x.iter().fold(0.0_f32, |a, b| a.max(b.abs()));
                let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
                assert_eq!(meta.scale, largest / 127.0);
                let mut sums = [0, 0];
                for (i, x) in x.iter().enumerate() {
                    let value = attended.values[row * stride + activation_place(block * 32 + i)];
                    assert_eq!(f32::from(value), (x * inverse).round_ties_even());
                    sums[i / 16] += i16::from(value);
                }
                assert_eq!(meta.sums, sums);
            }
        }
    }
}

#[test]
fn equal_scores_give_the_mean_exactly() {
    let heads = heads(2, 1, 64);
    let mut context = heads.context(64, &mut Numbers::new(1), 0.0);
    context.v = Numbers::new(3).eighths(context.v.len()).into_iter().map(f16::from_f32).collect();
    let attended = last_rows(heads, &context, 1, 1, 6);
    for (d, x) in attended.rows.iter().enumerate() {
        let mean = (0..64).map(|t| context.v[t * 64 + d % 64].to_f32()).sum::<f32>() / 64.0;
        assert_eq!(*x, mean);
    }
}

#[test]
fn shapes_without_a_kernel_are_refused_by_name() {
    for (kv_type, heads, head_dim, named) in [
        (KvType::F16, (4, 2), 72, "head_dim of 72"),
        (KvType::F16, (34, 2), 64, "34 heads over 2"),
        (KvType::F16, (3, 2), 64, "3 heads"),
        (KvType::Q8_0, (4, 2), 80, "only for 32, 64, 96, 128, 256"),
    ] {
        match AttentionShape::new(kv_type, heads, head_dim, 100) {
            Err(DriverError::Failed(message)) => assert!(message.contains(named), "{message}"),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn tiles_hold_each_row_once_with_its_position() {
    for (num_heads, per_tile) in [(1, 16), (7, 2), (9, 1), (16, 1)] {
        let shape = AttentionShape::new(KvType::F16, (num_heads, 1), 64, 100).unwrap();
        for rows in 1..40 {
            let tiles: Vec<_> = shape.tiles(5..5 + rows, 30, 8).collect();
            let mut next = 0;
            for tile in tiles {
                assert_eq!((tile.first_row, tile.first_position, tile.block_table), (5 + next, 30 + next, 8));
                assert!((1..=per_tile).contains(&tile.num_rows));
                next += tile.num_rows;
            }
            assert_eq!(next, rows as i32);
        }
    }
}

#[test]
fn units_follow_each_other_and_hold_their_positions() {
    for positions in (1..7000).chain([32_768, 131_072]) {
        let units = num_units(positions);
        assert!(unit_start(units - 1) < positions && positions <= unit_start(units), "{positions} positions");
    }
}
