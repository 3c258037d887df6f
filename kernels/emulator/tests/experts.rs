//! Feed-forwards of experts on the emulated device: who goes where, and products by expert.

mod arrays;
mod layers;

use emulator::{Emulator, Memory};
use kernels::cuda::args::RowGroup;
use kernels::cuda::dense::{DenseMatrix, DeviceRows, Element};
use kernels::cuda::driver::{DeviceMemory, Driver};
use kernels::cuda::experts::{ChooseArgs, DealArgs, choose_experts, deal_slots, max_groups};
use kernels::cuda::gemm::{GemmArgs, GemmKernel, Product};
use kernels::cuda::matrix::Matrix;
use proptest::prelude::*;

use arrays::{Numbers, addresses, bytes, device, floats, read_floats, same_bits};
use layers::{FORMATS, Rows, Weights, random_weights, width_of};

const KERNELS: [GemmKernel; 5] =
    [GemmKernel::Decode1, GemmKernel::Decode2, GemmKernel::Decode4, GemmKernel::Decode8, GemmKernel::Prefill];

fn integers(device: &Emulator, v: &[i32]) -> Memory {
    bytes(device, &v.iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<_>>())
}

fn read<const N: usize, T>(device: &Emulator, memory: &Memory, from: fn([u8; N]) -> T) -> Vec<T> {
    let mut bytes = vec![0; memory.len()];
    device.read(memory, 0, &mut bytes).unwrap();
    bytes.as_chunks().0.iter().map(|b| from(*b)).collect()
}

/// Slots that lie by expert, `(expert, choice)`, in groups of `group_rows`.
fn groups_of(slots: &[(i32, usize)], group_rows: usize) -> Vec<RowGroup> {
    let (mut groups, mut first) = (Vec::new(), 0);
    for of_expert in slots.chunk_by(|a, b| a.0 == b.0) {
        for group in of_expert.chunks(group_rows) {
            groups.push(RowGroup { expert: group[0].0, first, count: group.len() as i32, unused: 0 });
            first += group.len() as i32;
        }
    }
    groups
}

fn group_words(groups: &[RowGroup]) -> Vec<i32> {
    groups.iter().flat_map(|group| [group.expert, group.first, group.count, group.unused]).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..Default::default() })]

    #[test]
    fn rows_go_to_their_best_experts_and_lie_by_them(
        num_rows in 1..150_usize, num_experts in 1..140_usize, most in 1..9_usize, kernel in prop::sample::select(KERNELS.to_vec()),
        normalizes: bool, has_adapters: bool, seed: u64,
    ) {
        let (device, mut numbers, used) = (device(), Numbers::new(seed), most.min(num_experts));
        // Many are equal.
        let scores: Vec<f32> = (0..num_rows * num_experts).map(|_| numbers.below(40) as f32 / 4.0 - 5.0).collect();
        let num_slots = num_rows * used;
        let num_groups = max_groups(num_slots, num_experts, kernel.group_rows());
        let tables: Vec<u64> = (0..num_rows).map(|_| [0, 1 << 20, 2 << 20][numbers.below(3)]).collect();
        let (scores_memory, tables_memory) = (floats(&device, &scores), addresses(&device, &tables));
        let slot_arrays: [Memory; 5] = std::array::from_fn(|_| integers(&device, &vec![-1; num_slots]));
        let [chosen, shares, places, rows, experts] = &slot_arrays;
        let slot_adapters = addresses(&device, &vec![9; num_slots]);
        let groups = integers(&device, &vec![-1; num_groups * 4]);
        let choose = ChooseArgs {
            scores: scores_memory.address(),
            chosen: chosen.address(),
            shares: shares.address(),
            num_rows: num_rows as i32,
            num_experts: num_experts as i32,
            used: used as i32,
            normalizes_shares: i32::from(normalizes),
        };
        choose_experts(&device, &choose).unwrap();
        let deal = DealArgs {
            chosen: chosen.address(),
            adapters: if has_adapters { tables_memory.address() } else { 0 },
            places: places.address(),
            rows: rows.address(),
            experts: experts.address(),
            slot_adapters: slot_adapters.address(),
            groups: groups.address(),
            num_slots: num_slots as i32,
            used: used as i32,
            num_experts: num_experts as i32,
            group_rows: kernel.group_rows() as i32,
            num_groups: num_groups as i32,
            unused: 0,
        };
        deal_slots(&device, &deal).unwrap();

        let mut expected = Vec::new();
        let mut expected_shares = Vec::new();
        for scores in scores.chunks_exact(num_experts) {
            let mut order: Vec<usize> = (0..num_experts).collect();
            order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
            order.truncate(used);
            let share = |expert: &usize| f64::from(scores[*expert] - scores[order[0]]).exp();
            let total: f64 =
                if normalizes { order.iter().map(share).sum() } else { (0..num_experts).map(|expert| share(&expert)).sum() };
            expected_shares.extend(order.iter().map(|expert| share(expert) / total));
            expected.extend(order.into_iter().map(|expert| expert as i32));
        }
        prop_assert_eq!(&read(&device, chosen, i32::from_le_bytes), &expected);
        for (share, expected) in read_floats(&device, shares).into_iter().zip(expected_shares) {
            prop_assert!((f64::from(share) - expected).abs() < 1e-6);
        }
        let mut slots: Vec<(i32, usize)> = expected.into_iter().zip(0..).collect();
        slots.sort();
        let places = read(&device, places, i32::from_le_bytes);
        prop_assert!(slots.iter().enumerate().all(|(slot, (_, choice))| places[*choice] == slot as i32));
        let of_slots = |f: &dyn Fn(i32, usize) -> u64| slots.iter().map(|(expert, choice)| f(*expert, *choice)).collect::<Vec<_>>();
        let read_slots = |memory: &Memory| read(&device, memory, |b| u64::from(u32::from_le_bytes(b)));
        prop_assert_eq!(read_slots(rows), of_slots(&|_, choice| (choice / used) as u64));
        prop_assert_eq!(read_slots(experts), of_slots(&|expert, _| expert as u64));
        let moved = |expert: i32, choice: usize| match tables[choice / used] {
            _ if !has_adapters => 9,
            0 => 0,
            table => table + 3 * 64 * expert as u64,
        };
        prop_assert_eq!(read(&device, &slot_adapters, u64::from_le_bytes), of_slots(&moved));
        let mut expected_groups = groups_of(&slots, kernel.group_rows());
        expected_groups.resize(num_groups, RowGroup::default());
        prop_assert_eq!(read(&device, &groups, i32::from_le_bytes), group_words(&expected_groups));
    }

    #[test]
    fn a_slot_has_the_bits_of_its_row_at_its_expert_alone(
        num_experts in 2..6_usize, tiles in 1..10_usize, blocks in 1..9_usize, num_slots in 1..140_usize,
        kernel in prop::sample::select(KERNELS.to_vec()), format in prop::sample::select(FORMATS.to_vec()), seed: u64,
    ) {
        let (device, mut numbers, out, width) = (device(), Numbers::new(seed), tiles * 16, width_of(format, blocks));
        let weights = random_weights(&mut numbers, format, num_experts * out, width);
        let stack = Weights::new(&device, format, (num_experts * out, width), &weights);
        let each: Vec<_> = weights
            .chunks_exact(weights.len() / num_experts)
            .map(|weights| Weights::new(&device, format, (out, width), weights))
            .collect();
        let mut slots: Vec<(i32, usize)> = (0..num_slots).map(|slot| (numbers.below(num_experts) as i32, slot)).collect();
        slots.sort();
        let mut groups = groups_of(&slots, kernel.group_rows());
        groups.resize(max_groups(num_slots, num_experts, kernel.group_rows()), RowGroup::default());
        let group_memory = integers(&device, &group_words(&groups));
        let x = numbers.any(num_slots * width);
        let (rows, y) = (Rows::new(&device, num_slots, width, &x), floats(&device, &vec![f32::NAN; num_slots * out]));
        let mut args = GemmArgs {
            activations: rows.activations(num_slots),
            num_products: 1,
            groups: group_memory.address(),
            num_groups: groups.len() as i32,
            ..GemmArgs::default()
        };
        let w = Matrix { out_features: out as i32, ..stack.cuda.matrix() };
        args.products[0] = Product { w, out: y.address(), ..Product::default() };
        kernel.launch(&device, &args).unwrap();
        let y = read_floats(&device, &y);
        for (expert, weights) in each.iter().enumerate() {
            let first = slots.partition_point(|(other, _)| *other < expert as i32);
            let end = slots.partition_point(|(other, _)| *other <= expert as i32);
            if first < end {
                let x = &x[first * width..end * width];
                let alone = weights.on_device(&device, GemmKernel::for_rows(end - first), None, end - first, x);
                prop_assert!(same_bits(&y[first * out..end * out], &alone), "{:?}, {:?}, expert {}", kernel, format, expert);
            }
        }
    }

    #[test]
    fn so_does_it_where_weights_are_not_quantized(
        num_experts in 2..6_usize, out in 1..40_usize, quads in 1..40_usize, num_slots in 1..60_usize, seed: u64,
    ) {
        let (device, mut numbers, width) = (device(), Numbers::new(seed), quads * 4);
        let weights: Vec<u8> = numbers.any(num_experts * out * width).iter().flat_map(|w| w.to_le_bytes()).collect();
        let stack = DenseMatrix::upload(&device, Element::F32, (num_experts * out, width), &weights, None).unwrap();
        let mut experts: Vec<i32> = (0..num_slots).map(|_| numbers.below(num_experts) as i32).collect();
        experts.sort();
        let x = numbers.any(num_slots * width);
        let multiply = |matrix: &DenseMatrix<Memory>, count: usize, experts: &[i32], x: &[f32]| {
            let (x, experts) = (floats(&device, x), integers(&device, experts));
            let num_rows = experts.len() / 4;
            let y = floats(&device, &vec![f32::NAN; num_rows * out]);
            let rows = DeviceRows { address: x.address(), num_rows, stride: width };
            matrix.multiply_by_expert(&device, rows, (count, experts.address()), 0, y.address()).unwrap();
            read_floats(&device, &y)
        };
        let y = multiply(&stack, num_experts, &experts, &x);
        for (expert, weights) in weights.chunks_exact(weights.len() / num_experts).enumerate() {
            let matrix = DenseMatrix::upload(&device, Element::F32, (out, width), weights, None).unwrap();
            for (slot, _) in experts.iter().enumerate().filter(|(_, other)| **other == expert as i32) {
                let alone = multiply(&matrix, 1, &[0], &x[slot * width..][..width]);
                prop_assert!(same_bits(&y[slot * out..][..out], &alone), "slot {}", slot);
            }
        }
    }
}

#[test]
fn rows_whose_scores_are_no_numbers_still_have_their_experts() {
    let device = device();
    let scores = floats(&device, &[f32::NAN, f32::NAN, f32::NAN, 1.0, f32::NAN, f32::NEG_INFINITY]);
    let [chosen, shares] = [(); 2].map(|()| integers(&device, &[-1; 4]));
    let args = ChooseArgs {
        scores: scores.address(),
        chosen: chosen.address(),
        shares: shares.address(),
        num_rows: 2,
        num_experts: 3,
        used: 2,
        normalizes_shares: 1,
    };
    choose_experts(&device, &args).unwrap();
    assert_eq!(read(&device, &chosen, i32::from_le_bytes), [0, 1, 0, 1]);
    assert!(read_floats(&device, &shares).iter().all(|share| share.is_nan()));
}

#[test]
fn there_are_never_more_groups_than_are_reckoned_with() {
    for (num_slots, num_experts) in [(1, 4), (8, 128), (9, 2), (64, 8), (100, 3)] {
        // As uneven as may be: one slot too many for all but one.
        for per_expert in 1..20 {
            let slots: Vec<_> =
                (0..num_slots).map(|slot| ((slot / per_expert).min(num_experts - 1) as i32, slot)).collect();
            assert!(groups_of(&slots, 8).len() <= max_groups(num_slots, num_experts, 8));
        }
    }
    assert_eq!(max_groups(8, 128, 8), 8);
}
