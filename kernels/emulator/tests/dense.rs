//! Products with matrices that are not quantized, against the formula and the CPU's f16 product.

mod arrays;

use emulator::{Emulator, Memory};
use half::{bf16, f16};
use kernels::cuda::args::AdapterTable;
use kernels::cuda::dense::{DenseMatrix, DeviceRows, Element, multiply_adapter_heads};
use kernels::cuda::driver::DeviceMemory;
use kernels::cuda::low_rank::{row_major, row_stride};
use kernels::half_matrix::HalfMatrix;
use kernels::{Cpu, Isa};
use proptest::prelude::*;

use arrays::{Numbers, adapter, addresses, device, f16_bits, floats, halves, read_floats, same_bits};

fn element_bytes(element: Element, values: &[f32]) -> Vec<u8> {
    let bytes = |value: &f32| match element {
        Element::F16 => f16::from_f32(*value).to_le_bytes().to_vec(),
        Element::Bf16 => bf16::from_f32(*value).to_le_bytes().to_vec(),
        Element::F32 => value.to_le_bytes().to_vec(),
    };
    values.iter().flat_map(bytes).collect()
}

fn multiply(device: &Emulator, matrix: &DenseMatrix<Memory>, x: &[f32], bias: Option<&[f32]>) -> Vec<f32> {
    let num_rows = x.len() / matrix.in_features();
    let y = floats(device, &vec![f32::NAN; num_rows * matrix.out_features()]);
    let bias = bias.map(|bias| floats(device, bias));
    let x = floats(device, x);
    let rows = DeviceRows { address: x.address(), num_rows, stride: matrix.in_features() };
    matrix.multiply(device, rows, bias.as_ref().map_or(0, DeviceMemory::address), y.address()).unwrap();
    read_floats(device, &y)
}

fn product(weights: &[f32], x: &[f32]) -> f32 {
    weights.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum::<f64>() as f32
}

fn any_element() -> impl Strategy<Value = Element> {
    prop_oneof![Just(Element::F16), Just(Element::Bf16), Just(Element::F32)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn sums_that_are_exact_are_those_of_the_formula(
        element in any_element(), num_rows in 1usize..20, quads in 1usize..80, out in 1usize..70, has_bias: bool,
        is_ordered: bool, seed: u64,
    ) {
        let (device, in_features, mut numbers) = (device(), quads * 4, Numbers::new(seed));
        let (weights, x, bias) =
            (numbers.eighths(out * in_features), numbers.eighths(num_rows * in_features), numbers.eighths(out));
        let order: Vec<usize> = (0..out).rev().collect();
        let (bias, order) = (has_bias.then_some(&bias[..]), is_ordered.then_some(&order[..]));
        let bytes = element_bytes(element, &weights);
        let matrix = DenseMatrix::upload(&device, element, (out, in_features), &bytes, order).unwrap();
        let y = multiply(&device, &matrix, &x, bias);
        for (m, x) in x.chunks_exact(in_features).enumerate() {
            for o in 0..out {
                let weights = &weights[order.map_or(o, |order| order[o]) * in_features..][..in_features];
                prop_assert_eq!(y[m * out + o], product(weights, x) + bias.map_or(0.0, |bias| bias[o]), "{} {}", m, o);
            }
        }
    }

    #[test]
    fn a_row_alone_and_in_any_company_has_the_same_bits(
        element in any_element(), num_rows in 2usize..20, quads in 1usize..200, out in 1usize..40, seed: u64,
    ) {
        let (device, in_features, mut numbers) = (device(), quads * 4, Numbers::new(seed));
        let bytes = element_bytes(element, &numbers.any(out * in_features));
        let matrix = DenseMatrix::upload(&device, element, (out, in_features), &bytes, None).unwrap();
        let mut x = numbers.any(num_rows * in_features);
        let bad = numbers.below(num_rows);
        x[bad * in_features..][..in_features].fill(f32::INFINITY);
        let together = multiply(&device, &matrix, &x, None);
        for (row, x) in x.chunks_exact(in_features).enumerate().filter(|(row, _)| *row != bad) {
            let alone = multiply(&device, &matrix, x, None);
            prop_assert!(same_bits(&alone, &together[row * out..][..out]), "row {row}");
            prop_assert!(alone.iter().all(|y| y.is_finite()));
        }
    }

    #[test]
    fn only_rows_whose_adapter_has_a_head_get_its_logits(
        num_rows in 1usize..20, quads in 1usize..40, vocab in 1usize..60, seed: u64,
    ) {
        let (device, hidden, mut numbers) = (device(), quads * 4, Numbers::new(seed));
        let cpu = Cpu::new(Isa::Portable, 1);
        let heads: Vec<(Vec<f32>, HalfMatrix, Memory)> = (0..2)
            .map(|_| {
                let weights = numbers.eighths(vocab * hidden);
                let values: Vec<f16> = weights.iter().map(|w| f16::from_f32(*w)).collect();
                let matrix = HalfMatrix::pack(vocab, hidden, &values);
                let mut rows = Vec::new();
                row_major(&matrix, row_stride(hidden), &mut rows);
                (weights, matrix, halves(&device, &rows))
            })
            .collect();
        let tables: Vec<Memory> = [heads[0].2.address(), heads[1].2.address(), 0]
            .iter()
            .map(|&head| adapter(&device, &AdapterTable { head, ..AdapterTable::default() }, &[]))
            .collect();
        let kinds: Vec<usize> = (0..num_rows).map(|row| (numbers.below(9) + row / 3) % 4).collect();
        let owners: Vec<u64> = kinds.iter().map(|kind| tables.get(*kind).map_or(0, DeviceMemory::address)).collect();
        let owners = addresses(&device, &owners);
        let x = numbers.eighths(num_rows * hidden);
        let (rows, y) = (floats(&device, &x), floats(&device, &vec![99.0; num_rows * vocab]));
        let rows = DeviceRows { address: rows.address(), num_rows, stride: hidden };
        multiply_adapter_heads(&device, rows, owners.address(), (vocab, hidden), y.address()).unwrap();
        let y = read_floats(&device, &y);
        for (row, kind) in kinds.iter().enumerate() {
            let mut expected = vec![99.0; vocab];
            if let Some((_, matrix, _)) = heads.get(*kind) {
                matrix.multiply(&cpu, &x[row * hidden..][..hidden], &mut expected);
            }
            prop_assert_eq!(&y[row * vocab..][..vocab], &expected[..], "row {}", row);
        }
    }
}

#[test]
fn a_row_multiplied_by_an_adapters_head_has_the_bits_of_the_same_matrix_in_the_base() {
    // More outputs than one round of all blocks takes.
    let (device, mut numbers, vocab, hidden) = (device(), Numbers::new(3), 8300, 36);
    let weights = numbers.any(vocab * hidden);
    let x = numbers.any(9 * hidden);
    let bytes = element_bytes(Element::F16, &weights);
    let matrix = DenseMatrix::upload(&device, Element::F16, (vocab, hidden), &bytes, None).unwrap();
    let padded: Vec<f32> = weights.chunks_exact(hidden).flat_map(|row| [row, &[0.0; 4]].concat()).collect();
    let head = halves(&device, &f16_bits(&padded));
    let table = adapter(&device, &AdapterTable { head: head.address(), ..AdapterTable::default() }, &[]);
    for num_rows in [1, 2, 4, 9] {
        let x = &x[..num_rows * hidden];
        let (rows, y) = (floats(&device, x), floats(&device, &vec![0.0; num_rows * vocab]));
        let rows = DeviceRows { address: rows.address(), num_rows, stride: hidden };
        let owners = addresses(&device, &vec![table.address(); num_rows]);
        multiply_adapter_heads(&device, rows, owners.address(), (vocab, hidden), y.address()).unwrap();
        assert!(same_bits(&read_floats(&device, &y), &multiply(&device, &matrix, x, None)), "{num_rows} rows");
    }
}

#[test]
fn a_single_row_of_a_wide_matrix_and_of_many_outputs_has_the_bits_it_has_among_others() {
    let (device, mut numbers) = (device(), Numbers::new(5));
    for (out, in_features) in [(8193, 32), (33, 4100)] {
        let bytes = element_bytes(Element::Bf16, &numbers.any(out * in_features));
        let matrix = DenseMatrix::upload(&device, Element::Bf16, (out, in_features), &bytes, None).unwrap();
        let x = numbers.any(3 * in_features);
        let together = multiply(&device, &matrix, &x, None);
        for (row, x) in x.chunks_exact(in_features).enumerate() {
            assert!(same_bits(&multiply(&device, &matrix, x, None), &together[row * out..][..out]));
        }
    }
}
