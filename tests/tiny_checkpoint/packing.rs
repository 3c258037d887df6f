//! Matrices of a checkpoint in the form of another program: bit by bit as AutoGPTQ's `qlinear_cuda_old.py`, AutoAWQ's `gemm.py` and
//! MLX's `quantize` pack them.

use half::{bf16, f16};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::tensor::Dtype;
use serde_json::{Value, json};

use super::{Checkpoint, LAYERS, MATRICES, Tensor, matrix_shape};

#[derive(Debug, Clone, Copy)]
pub enum Form {
    Gptq { bits: usize, group_size: Option<usize>, is_symmetric: bool, is_v2: bool, has_act_order: bool },
    Awq { group_size: usize },
    Mlx { bits: usize, group_size: usize },
}

pub const GPTQ: Form =
    Form::Gptq { bits: 4, group_size: Some(32), is_symmetric: true, is_v2: false, has_act_order: false };

impl Form {
    pub fn config(self) -> Value {
        match self {
            Self::Gptq { bits, group_size, is_symmetric, is_v2, has_act_order } => json!({
                "quant_method": "gptq", "bits": bits, "group_size": group_size.map_or(-1, |size| size as i64),
                "desc_act": has_act_order, "sym": is_symmetric, "damp_percent": 0.01, "true_sequential": true,
                "checkpoint_format": if is_v2 { "gptq_v2" } else { "gptq" }
            }),
            Self::Awq { group_size } => json!({
                "quant_method": "awq", "bits": 4, "group_size": group_size, "version": "gemm", "zero_point": true,
                "modules_to_not_convert": null
            }),
            Self::Mlx { bits, group_size } => json!({"bits": bits, "group_size": group_size, "mode": "affine"}),
        }
    }

    fn bits(self) -> usize {
        match self {
            Self::Gptq { bits, .. } | Self::Mlx { bits, .. } => bits,
            Self::Awq { .. } => 4,
        }
    }

    /// The group of each input.
    fn groups(self, inputs: usize) -> Vec<usize> {
        let size = match self {
            Self::Gptq { group_size, .. } => group_size.unwrap_or(inputs),
            Self::Awq { group_size } | Self::Mlx { group_size, .. } => group_size,
        };
        let mut groups: Vec<usize> = (0..inputs).map(|input| input / size).collect();
        if matches!(self, Self::Gptq { has_act_order: true, .. }) {
            // 7 and the inputs have no divisor in common.
            groups = (0..inputs).map(|input| groups[input * 7 % inputs]).collect();
        }
        groups
    }
}

/// Codes one after another, low bits first.
fn stream(codes: impl Iterator<Item = u32>, bits: usize) -> Vec<u32> {
    let mut words = Vec::new();
    for (at, code) in codes.enumerate() {
        for bit in 0..bits {
            let place = at * bits + bit;
            words.resize(place / 32 + 1, 0_u32);
            words[place / 32] |= (code >> bit & 1) << (place % 32);
        }
    }
    words
}

/// Eight codes of a row in a word, as AutoAWQ orders them.
fn awq_words(codes: &[u32]) -> Vec<u32> {
    const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];
    codes.chunks(8).map(|eight| (0..8).fold(0, |word, nibble| word | eight[ORDER[nibble]] << (4 * nibble))).collect()
}

fn words(shape: &[usize], words: &[u32], dtype: Dtype) -> Tensor {
    Tensor { dtype, shape: shape.to_vec(), bytes: words.iter().flat_map(|word| word.to_le_bytes()).collect() }
}

/// Puts a random matrix in the place of `{module}.weight`; its values, `[out, in]`.
pub fn quantize(checkpoint: &mut Checkpoint, module: &str, form: Form, rng: &mut ChaCha8Rng) -> Vec<f32> {
    let [outputs, inputs] = checkpoint.tensors[&format!("{module}.weight")].shape[..] else { panic!("{module}") };
    let (bits, groups) = (form.bits(), form.groups(inputs));
    let num_groups = groups.iter().max().unwrap() + 1;
    let mut codes = |count: usize| -> Vec<u32> { (0..count).map(|_| rng.random_range(0..1 << bits)).collect() };
    // [out, in] and [groups, out]
    let (codes, mut zeros) = (codes(outputs * inputs), codes(num_groups * outputs));
    // About the middle, as of weights whose mean is about 0; but for the first two.
    let middle = 1 << (bits - 1);
    zeros.iter_mut().for_each(|zero| *zero = middle - middle / 4 + *zero / 4);
    (zeros[0], zeros[1]) = (0, 2 * middle - 1);
    let step = 0.3 / (1 << bits) as f32;
    let mut scales: Vec<f32> = (0..num_groups * outputs).map(|_| rng.random_range(step..2.0 * step)).collect();
    let mut put = |part: &str, tensor: Tensor| checkpoint.tensors.insert(format!("{module}.{part}"), tensor);
    let affine = |at: usize, scales: &[f32], of_zero: &dyn Fn(usize) -> f32| {
        let group = groups[at % inputs] * outputs + at / inputs;
        scales[group] * codes[at] as f32 + of_zero(group)
    };
    if let Form::Mlx { .. } = form {
        let halves = |values: &mut Vec<f32>| {
            values.iter_mut().for_each(|value| *value = bf16::from_f32(*value).to_f32());
            let of_rows = (0..outputs).flat_map(|output| (0..num_groups).map(move |group| group * outputs + output));
            let bytes = of_rows.flat_map(|at| bf16::from_f32(values[at]).to_le_bytes()).collect();
            Tensor { dtype: Dtype::BF16, shape: vec![outputs, num_groups], bytes }
        };
        let mut biases: Vec<f32> = scales.iter().map(|scale| -scale * 0.47 * (1 << bits) as f32).collect();
        put("scales", halves(&mut scales));
        put("biases", halves(&mut biases));
        let packed: Vec<u32> = codes.chunks(inputs).flat_map(|row| stream(row.iter().copied(), bits)).collect();
        put("weight", words(&[outputs, inputs * bits / 32], &packed, Dtype::U32));
        return (0..codes.len()).map(|at| affine(at, &scales, &|group| biases[group])).collect();
    }
    scales.iter_mut().for_each(|scale| *scale = f16::from_f32(*scale).to_f32());
    let bytes = scales.iter().flat_map(|scale| f16::from_f32(*scale).to_le_bytes()).collect();
    put("scales", Tensor { dtype: Dtype::F16, shape: vec![num_groups, outputs], bytes });
    match form {
        Form::Gptq { is_symmetric, is_v2, .. } => {
            if is_symmetric {
                zeros.fill(middle);
            }
            let stored = |zero: &u32| if is_v2 { *zero } else { zero.wrapping_sub(1) & ((1 << bits) - 1) };
            let packed: Vec<u32> = zeros.chunks(outputs).flat_map(|row| stream(row.iter().map(stored), bits)).collect();
            put("qzeros", words(&[num_groups, outputs * bits / 32], &packed, Dtype::I32));
            // Along the inputs of each output.
            let of_outputs: Vec<Vec<u32>> = codes.chunks(inputs).map(|row| stream(row.iter().copied(), bits)).collect();
            let rows = inputs * bits / 32;
            let packed: Vec<u32> = (0..rows).flat_map(|row| of_outputs.iter().map(move |words| words[row])).collect();
            put("qweight", words(&[rows, outputs], &packed, Dtype::I32));
            let groups: Vec<u32> = groups.iter().map(|group| *group as u32).collect();
            put("g_idx", words(&[inputs], &groups, Dtype::I32));
        }
        _ => {
            let packed: Vec<u32> = zeros.chunks(outputs).flat_map(awq_words).collect();
            put("qzeros", words(&[num_groups, outputs / 8], &packed, Dtype::I32));
            let of_input = |input: usize| codes.iter().skip(input).step_by(inputs).copied().collect::<Vec<u32>>();
            let packed: Vec<u32> = (0..inputs).flat_map(|input| awq_words(&of_input(input))).collect();
            put("qweight", words(&[inputs, outputs / 8], &packed, Dtype::I32));
        }
    }
    checkpoint.tensors.remove(&format!("{module}.weight"));
    let weight = |at: usize| {
        let group = groups[at % inputs] * outputs + at / inputs;
        scales[group] * (codes[at] as i32 - zeros[group] as i32) as f32
    };
    (0..codes.len()).map(weight).collect()
}

/// A checkpoint with every matrix of its layers in `form`, and one with the same values as floats.
pub fn pair(model_type: &str, form: Form) -> (Checkpoint, Checkpoint) {
    let (mut quantized, mut floats) = (Checkpoint::new(model_type), Checkpoint::new(model_type));
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    for layer in 0..LAYERS {
        for name in MATRICES {
            let module = format!("model.layers.{layer}.{name}");
            let values = quantize(&mut quantized, &module, form, &mut rng);
            let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            let tensor = Tensor { dtype: Dtype::F32, shape: matrix_shape(name).to_vec(), bytes };
            floats.tensors.insert(format!("{module}.weight"), tensor);
        }
    }
    quantized.config["quantization_config"] = form.config();
    (quantized, floats)
}
