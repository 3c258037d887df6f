//! The kernels between the products against those of the CPU, and their rounding to int8 against its formula.

mod arrays;

use emulator::{Emulator, Memory};
use kernels::cuda::activations::{
    ActivateArgs, InPlaceArgs, NormArgs, ScaleArgs, activate_quantize, activation_stride, add_norm_quantize,
    norm_heads, norm_rows, quantize_rows, scale_quantize,
};
use kernels::cuda::args::{Activations, AdapterTable, BlockMeta, Site, activation_place};
use kernels::cuda::driver::{DeviceMemory, Driver, DriverError};
use kernels::elementwise::{self, LayerNorm, RmsNorm};
use kernels::quantized::{BlockFormat, PackedMatrix};
use kernels::shape::Activation;
use kernels::{Cpu, Isa, activations::QuantizedRows, gemm};
use proptest::prelude::*;

use arrays::{Numbers, adapter, addresses, bytes, device, floats, read_floats, same_bits};

/// Int8 activations in device memory.
struct Rounded {
    values: Memory,
    meta: Memory,
    stride: usize,
    num_rows: usize,
}

/// A row as numbers, in input order and with its padding.
#[derive(Debug, PartialEq, Clone)]
struct Row {
    values: Vec<i8>,
    meta: Vec<BlockMeta>,
}

impl Rounded {
    /// Memory that holds something else at first.
    fn new(device: &Emulator, num_rows: usize, width: usize) -> Self {
        let stride = activation_stride(width);
        let values = bytes(device, &vec![0x55; num_rows * stride]);
        let meta = bytes(device, &vec![0x55; num_rows * stride / 32 * size_of::<BlockMeta>()]);
        Self { values, meta, stride, num_rows }
    }

    /// For a launch over `num_rows` rows.
    fn activations(&self, num_rows: usize) -> Activations {
        let (stride, num_rows) = (self.stride as i32, num_rows as i32);
        Activations { values: self.values.address(), meta: self.meta.address(), stride, num_rows }
    }

    fn rows(&self, device: &Emulator) -> Vec<Row> {
        let mut values = vec![0; self.values.len()];
        device.read(&self.values, 0, &mut values).unwrap();
        let mut meta = vec![0; self.meta.len()];
        device.read(&self.meta, 0, &mut meta).unwrap();
        let meta: Vec<BlockMeta> = meta
            .as_chunks::<8>()
            .0
            .iter()
            .map(|b| BlockMeta {
                scale: f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
                sums: [i16::from_le_bytes([b[4], b[5]]), i16::from_le_bytes([b[6], b[7]])],
            })
            .collect();
        let num_blocks = self.stride / 32;
        (0..self.num_rows)
            .map(|row| Row {
                values: (0..self.stride)
                    .map(|k| values[row * self.stride + activation_place(k)].cast_signed())
                    .collect(),
                meta: meta[row * num_blocks..][..num_blocks].to_vec(),
            })
            .collect()
    }
}

/// The formula of the CPU's `QuantizedRows`, for rows of numbers.
fn rounded(x: &[f32]) -> Row {
    let mut padded = x.to_vec();
    padded.resize(activation_stride(x.len()), 0.0);
    let mut row = Row { values: Vec::new(), meta: Vec::new() };
    for block in padded.chunks_exact(32) {
        let largest = block.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
        let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
        let q: Vec<i8> = block.iter().map(|x| (x * inverse).round_ties_even() as i8).collect();
        let sum = |half: &[i8]| half.iter().map(|q| i16::from(*q)).sum();
        row.meta.push(BlockMeta { scale: largest / 127.0, sums: [sum(&q[..16]), sum(&q[16..])] });
        row.values.extend(q);
    }
    row
}

fn all_rounded(x: &[f32], width: usize) -> Vec<Row> {
    x.chunks_exact(width).map(rounded).collect()
}

/// What the CPU made of a row, read back through a product with the identity.
fn of_cpu(cpu: &Cpu, quantized: &QuantizedRows, width: usize) -> Vec<f32> {
    let identity: Vec<u8> = (0..width * width / 32)
        .flat_map(|block| {
            let (row, first) = (block / (width / 32), block % (width / 32) * 32);
            let one = half::f16::from_f32(1.0).to_le_bytes();
            one.into_iter().chain((first..first + 32).map(move |k| u8::from(k == row)))
        })
        .collect();
    let weights = PackedMatrix::pack(cpu, BlockFormat::Q8_0, (width, width), &identity, None).unwrap();
    let mut out = vec![0.0; quantized.num_rows() * width];
    let product = gemm::Product { weights: Some((&weights).into()), bias: None, out: &mut out };
    gemm::run(cpu, quantized, &mut [product], 0, &|_| {});
    out
}

fn dequantized(rows: &[Row], width: usize) -> Vec<f32> {
    let one = |row: &Row| -> Vec<f32> {
        row.values[..width].iter().zip(0..).map(|(q, k)| f32::from(*q) * row.meta[k / 32].scale).collect()
    };
    rows.iter().flat_map(one).collect()
}

/// Rows of every size, some blocks all zero.
fn some_rows(numbers: &mut Numbers, num_rows: usize, width: usize) -> Vec<f32> {
    let mut x = numbers.any(num_rows * width);
    for block in x.chunks_exact_mut(32) {
        let size = [0.0, 1e-20, 1e-3, 1.0, 1.0, 40.0, 1e4][numbers.below(7)];
        block.iter_mut().for_each(|x| *x *= size);
    }
    x
}

fn near(a: &[f32], b: &[f32], bound: f32) -> bool {
    near_above(a, b, bound, 1e-3)
}

/// `bound` is of each number of `b`, or of `least` if that is more.
fn near_above(a: &[f32], b: &[f32], bound: f32, least: f32) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() <= bound * b.abs().max(least))
}

/// Runs the norm over `num_rows` rows of `hidden`: hidden, normed and int8 after it.
fn norm(
    device: &Emulator,
    hidden: &[f32],
    delta: Option<&[f32]>,
    (weight, bias): (&[f32], Option<&[f32]>),
    row_list: Option<&[i32]>,
) -> (Vec<f32>, Vec<f32>, Vec<Row>) {
    let width = weight.len();
    let num_rows = row_list.map_or(hidden.len() / width, <[i32]>::len);
    let (hidden, weight) = (floats(device, hidden), floats(device, weight));
    let [delta, bias] = [delta, bias].map(|values| values.map(|values| floats(device, values)));
    let row_list = row_list.map(|rows| bytes(device, &rows.iter().flat_map(|r| r.to_le_bytes()).collect::<Vec<_>>()));
    let normed = floats(device, &vec![f32::NAN; num_rows * width]);
    let to = Rounded::new(device, num_rows, width);
    let args = NormArgs {
        hidden: hidden.address(),
        delta: delta.as_ref().map_or(0, DeviceMemory::address),
        weight: weight.address(),
        bias: bias.as_ref().map_or(0, DeviceMemory::address),
        normed: normed.address(),
        row_list: row_list.as_ref().map_or(0, DeviceMemory::address),
        activations: to.activations(num_rows),
        width: width as i32,
        eps: 1e-6,
    };
    add_norm_quantize(device, &args).unwrap();
    (read_floats(device, &hidden), read_floats(device, &normed), to.rows(device))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn rows_are_rounded_as_the_cpu_rounds_them(num_rows in 1usize..6, blocks in 1usize..45, seed: u64) {
        let (device, width) = (device(), blocks * 32);
        let mut x = some_rows(&mut Numbers::new(seed), num_rows, width);
        let (memory, to) = (floats(&device, &x), Rounded::new(&device, num_rows, width));
        quantize_rows(&device, memory.address(), width, to.activations(num_rows)).unwrap();
        let rows = to.rows(&device);
        prop_assert_eq!(&rows, &all_rounded(&x, width));
        for isa in Isa::available() {
            let cpu = Cpu::new(isa, 1);
            let mut quantized = QuantizedRows::default();
            quantized.quantize(&cpu, num_rows, width, &mut x);
            prop_assert!(same_bits(&of_cpu(&cpu, &quantized, width), &dequantized(&rows, width)), "{isa}");
        }
    }

    #[test]
    fn a_norm_is_the_cpus_within_rounding_and_a_row_alone_has_its_bits(num_rows in 1usize..5, blocks in 1usize..70, has_delta: bool, centers: bool, seed: u64) {
        let (device, width, mut numbers) = (device(), blocks * 32, Numbers::new(seed));
        let before = some_rows(&mut numbers, num_rows, width);
        let (delta, weight, bias) = (numbers.any(num_rows * width), numbers.any(width), numbers.any(width));
        let delta = has_delta.then_some(delta.as_slice());
        let weights = (weight.as_slice(), centers.then_some(bias.as_slice()));
        let (hidden, normed, rows) = norm(&device, &before, delta, weights, None);
        let (mut expected_hidden, mut expected, mut quantized) = (before.clone(), vec![0.0; before.len()], QuantizedRows::default());
        let cpu = Cpu::new(Isa::Portable, 1);
        if centers {
            let norm = LayerNorm { weight: &weight, bias: &bias, eps: 1e-6 };
            elementwise::add_layer_norm_quantize(&cpu, &mut expected_hidden, delta, norm, &mut expected, &mut quantized);
        } else {
            let norm = RmsNorm { weight: &weight, eps: 1e-6 };
            elementwise::add_norm_quantize(&cpu, &mut expected_hidden, delta, norm, &mut expected, &mut quantized);
        }
        prop_assert!(same_bits(&hidden, &expected_hidden));
        // What a mean is taken from leaves less than it was.
        let least = if centers { 1.0 } else { 1e-3 };
        prop_assert!(near_above(&normed, &expected, 1e-5, least));
        prop_assert_eq!(&rows, &all_rounded(&normed, width));
        let row = numbers.below(num_rows);
        let at = row * width..(row + 1) * width;
        let alone = norm(&device, &before[at.clone()], delta.map(|delta| &delta[at.clone()]), weights, None);
        prop_assert!(same_bits(&alone.1, &normed[at]));
        // Listed rows are the same ones, and leave what they are made of.
        let list = [row as i32, 0, row as i32];
        let (kept, listed, _) = norm(&device, &before, delta, weights, Some(&list));
        prop_assert!(same_bits(&kept, &before));
        for (row, listed) in list.iter().zip(listed.chunks_exact(width)) {
            prop_assert!(same_bits(listed, &normed[*row as usize * width..][..width]));
        }
    }

    #[test]
    fn norms_in_place_are_the_cpus_within_rounding(
        num_vectors in 1usize..20, blocks in 1usize..40, has_norm: bool, scale in 0.1f32..3.0, seed: u64,
    ) {
        let (device, width, mut numbers) = (device(), blocks * 8, Numbers::new(seed));
        let (before, weight) = (some_rows(&mut numbers, num_vectors, width), numbers.any(width));
        let weights = floats(&device, &weight);
        let run = |kernel: fn(&Emulator, &InPlaceArgs) -> Result<(), DriverError>, weight: u64, scale: f32| {
            let x = floats(&device, &before);
            let (num_vectors, width) = (num_vectors as i32, width as i32);
            kernel(&device, &InPlaceArgs { x: x.address(), weight, num_vectors, width, eps: 1e-6, scale }).unwrap();
            read_floats(&device, &x)
        };
        let expected = |norm: Option<RmsNorm<'_>>, scale: f32| {
            let mut x = before.clone();
            elementwise::norm_in_place(&Cpu::new(Isa::Portable, 1), &mut x, width, norm, scale);
            x
        };
        let norm = Some(RmsNorm { weight: &weight, eps: 1e-6 });
        let rows = run(norm_rows, if has_norm { weights.address() } else { 0 }, scale);
        prop_assert!(near(&rows, &expected(norm.filter(|_| has_norm), scale), 1e-5));
        prop_assert!(near(&run(norm_heads, weights.address(), 1.0), &expected(norm, 1.0), 1e-5));
    }

    #[test]
    fn activations_are_the_cpus_within_rounding(
        num_rows in 1usize..5, blocks in 1usize..80, code in 0usize..3, seed: u64,
    ) {
        let activation = [Activation::GatedSilu, Activation::GatedGelu, Activation::Gelu][code];

        let (device, width, mut numbers) = (device(), blocks * 32, Numbers::new(seed));
        let gate: Vec<f32> = numbers.any(num_rows * width).iter().map(|x| x * 100.0).collect();
        let up = some_rows(&mut numbers, num_rows, width);
        let (g, u) = (floats(&device, &gate), floats(&device, &up));
        let (a, to) = (floats(&device, &vec![f32::NAN; gate.len()]), Rounded::new(&device, num_rows, width));
        let args = ActivateArgs {
            gate: if activation.is_gated() { g.address() } else { 0 },
            up: u.address(),
            activated: a.address(),
            activations: to.activations(num_rows),
            width: width as i32,
            activation: activation.into(),
        };
        activate_quantize(&device, &args).unwrap();
        let activated = read_floats(&device, &a);
        let (mut expected, mut quantized) = (vec![0.0; gate.len()], QuantizedRows::default());
        let cpu = Cpu::new(Isa::Portable, 1);
        match activation {
            Activation::GatedSilu => elementwise::swiglu_quantize(&cpu, num_rows, &gate, &up, &mut expected, &mut quantized),
            Activation::GatedGelu => elementwise::gelu_quantize(&cpu, num_rows, &gate, Some(&up), &mut expected, &mut quantized),
            Activation::Gelu => elementwise::gelu_quantize(&cpu, num_rows, &up, None, &mut expected, &mut quantized),
        }
        // Of a large negative gate is left what two nearly equal numbers differ by: the error is of the size of what they are taken of.
        let inputs = gate.iter().zip(&up).map(|(gate, up)| if activation.is_gated() { gate * up } else { *up });
        let mut numbers = activated.iter().zip(&expected).zip(inputs);
        prop_assert!(numbers.all(|((a, b), input)| (a - b).abs() <= 2e-6 * input.abs().max(1e-3)));
        prop_assert_eq!(to.rows(&device), all_rounded(&activated, width));
    }

    #[test]
    fn a_product_sees_its_own_input_scale_on_the_rows_that_have_one(num_rows in 1usize..6, blocks in 1usize..40, seed: u64) {
        let (device, width, mut numbers) = (device(), blocks * 32, Numbers::new(seed));
        let x = some_rows(&mut numbers, num_rows, width);
        let (scale, other) = (numbers.any(width), numbers.any(width));
        let (scales, others) = (floats(&device, &scale), floats(&device, &other));
        let site = |memory: &Memory| Site { input_scale: memory.address(), ..Site::default() };
        // The first adapter scales sites 1 and 2, the second one nothing.
        let sites = [Site::default(), site(&scales), site(&others)];
        let first = adapter(&device, &AdapterTable::default(), &sites);
        let second = adapter(&device, &AdapterTable::default(), &[Site::default(); 3]);
        let tables = [first.address(), second.address(), 0];
        let chosen: Vec<usize> = (0..num_rows).map(|_| numbers.below(3)).collect();
        let of_rows = addresses(&device, &chosen.iter().map(|i| tables[*i]).collect::<Vec<_>>());
        let (memory, to) = (floats(&device, &x), Rounded::new(&device, 3 * num_rows, width));
        let exact = floats(&device, &vec![f32::NAN; 3 * x.len()]);
        let args = ScaleArgs {
            x: memory.address(),
            scaled: exact.address(),
            adapters: of_rows.address(),
            activations: to.activations(num_rows),
            sites: [1, 0, 2],
            width: width as i32,
        };
        scale_quantize(&device, &args, 3).unwrap();
        let (rows, exact) = (to.rows(&device), read_floats(&device, &exact));
        for (product, scale) in [Some(&scale), None, Some(&other)].into_iter().enumerate() {
            for (row, chosen) in chosen.iter().enumerate() {
                let x = &x[row * width..][..width];
                let scaled: Vec<f32> = match scale.filter(|_| *chosen == 0) {
                    Some(scale) => x.iter().zip(scale).map(|(x, s)| x * s).collect(),
                    None => x.to_vec(),
                };
                let row = product * num_rows + row;
                prop_assert_eq!(&rows[row], &rounded(&scaled));
                prop_assert!(same_bits(&exact[row * width..][..width], &scaled));
            }
        }
    }
}

#[test]
fn what_is_not_a_number_stays_in_its_row_and_is_seen_there() {
    let (device, width, mut numbers) = (device(), 160, Numbers::new(5));
    let (weight, whole) = (numbers.any(width), numbers.any(3 * width));
    let (_, normed, rows) = norm(&device, &whole, None, (&weight, None), None);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut hidden = whole.clone();
        hidden[width + 40] = bad;
        let (_, spoilt, spoilt_rows) = norm(&device, &hidden, None, (&weight, None), None);
        for row in [0, 2] {
            assert!(same_bits(&spoilt[row * width..][..width], &normed[row * width..][..width]));
            assert_eq!(spoilt_rows[row], rows[row]);
        }
        assert!(spoilt_rows[1].meta.iter().any(|meta| meta.scale.is_nan()), "{bad}");
    }
}
