//! Matrices of GPTQ and AWQ: integers of a few bits in words of 32, a scale and a zero for each group of inputs.
//!
//! `weight[o, i] = scales[g, o] · (code[i, o] − zero[g, o])`, where `g` is the group of input `i`. The layouts are those of
//! AutoGPTQ's `qlinear_cuda_old.py` and AutoAWQ's `gemm.py`.

use candle_core::{DType, Device, Tensor};

use super::CheckpointError;
use super::matrix::{BLOCK_LEN, Form, Matrix};
use super::shards::Shards;

pub struct Layout {
    pub bits: usize,
    /// Inputs that share a scale; `None` for all of a row.
    pub group_size: Option<usize>,
    pub packing: Packing,
}

#[derive(Clone, Copy)]
pub enum Packing {
    /// `qweight` `[in · bits / 32, out]`, codes along the inputs; `g_idx` `[in]` says the groups.
    Gptq {
        /// What the first version of the format stores; 0 as the largest.
        zeros_are_one_less: bool,
        /// Whether groups are of the inputs in another order, that of their importance.
        has_act_order: bool,
    },
    /// `qweight` `[in, out / 8]`, codes along the outputs, eight in an order of their own.
    Awq,
}

/// The nibble of a word in which AWQ has each of eight outputs.
const AWQ_NIBBLES: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

const WORD_BITS: usize = 32;

/// Words of a tensor, through which codes go as one stream of bits.
struct Codes {
    words: Vec<u32>,
    bits: usize,
}

impl Codes {
    /// Code `index` of the stream that begins at word `first` and goes on every `stride` words. Low bits come first.
    fn get(&self, first: usize, stride: usize, index: usize) -> u32 {
        let (word, shift) = (index * self.bits / WORD_BITS, index * self.bits % WORD_BITS);
        let low = self.words[first + word * stride] >> shift;
        let is_cut = shift + self.bits > WORD_BITS;
        let high = if is_cut { self.words[first + (word + 1) * stride] << (WORD_BITS - shift) } else { 0 };
        (low | high) & ((1 << self.bits) - 1)
    }
}

impl Layout {
    /// What belongs to a matrix beside `qweight`.
    pub fn parts(&self) -> &'static [&'static str] {
        match self.packing {
            Packing::Gptq { .. } => &["qzeros", "scales", "g_idx"],
            Packing::Awq => &["qzeros", "scales"],
        }
    }

    /// The matrix of a module, of `shape` `(out, in)`.
    ///
    /// # Errors
    /// Tensors that are missing, or have another shape than the configuration says, by name.
    pub fn read(
        &self,
        shards: &Shards,
        module: &str,
        (outputs, inputs): (usize, usize),
    ) -> Result<Matrix, CheckpointError> {
        let name = |part: &str| format!("{module}.{part}");
        let words_of = |count: usize| {
            let whole = (count * self.bits).is_multiple_of(WORD_BITS).then_some(count * self.bits / WORD_BITS);
            let reason =
                || format!("is of {count} codes in a row or column, which are no whole words of {WORD_BITS} bits");
            whole.ok_or_else(|| CheckpointError::tensor(&name("qweight"), reason()))
        };
        let num_groups = inputs.div_ceil(self.group_size.unwrap_or(inputs));
        let code_shape = match self.packing {
            Packing::Gptq { .. } => [words_of(inputs)?, outputs],
            Packing::Awq => [inputs, words_of(outputs)?],
        };
        let zero_words = words_of(outputs)?;
        let codes = Codes { words: words(shards, &name("qweight"), &code_shape)?, bits: self.bits };
        let zeros = Codes { words: words(shards, &name("qzeros"), &[num_groups, zero_words])?, bits: self.bits };
        let scales = shards.floats_of(&name("scales"), &[num_groups, outputs])?;
        let group_of = self.groups(shards, &name("g_idx"), inputs, num_groups)?;

        let zero = |group: usize, output: usize| match self.packing {
            Packing::Gptq { zeros_are_one_less, .. } => {
                let stored = zeros.get(group * zero_words, 1, output);
                if zeros_are_one_less { (stored + 1) & ((1 << self.bits) - 1) } else { stored }
            }
            Packing::Awq => zeros.get(group * zero_words, 1, output / 8 * 8 + AWQ_NIBBLES[output % 8]),
        };
        let code = |input: usize, output: usize| match self.packing {
            Packing::Gptq { .. } => codes.get(output, outputs, input),
            Packing::Awq => codes.get(input * code_shape[1], 1, output / 8 * 8 + AWQ_NIBBLES[output % 8]),
        };
        let mut weights = Vec::with_capacity(outputs * inputs);
        for output in 0..outputs {
            let of_groups: Vec<(f32, i32)> =
                (0..num_groups).map(|group| (scales[group * outputs + output], zero(group, output) as i32)).collect();
            weights.extend((0..inputs).map(|input| {
                let (scale, zero) = of_groups[group_of[input]];
                scale * (code(input, output) as i32 - zero) as f32
            }));
        }
        let blocks: Option<Vec<usize>> = match group_of.as_chunks::<BLOCK_LEN>() {
            (blocks, []) => blocks.iter().map(|b| b.iter().all(|group| *group == b[0]).then_some(b[0])).collect(),
            _ => None,
        };
        let build = || {
            let weights = Tensor::from_vec(weights, (outputs, inputs), &Device::Cpu)?;
            let Some(blocks) = blocks else { return Ok(Matrix { weights, form: Form::Scattered }) };
            let scale = |output: usize| blocks.iter().map(move |group| group * outputs + output);
            let scales: Vec<f32> = (0..outputs).flat_map(scale).map(|at| scales[at]).collect();
            let scales = Tensor::from_vec(scales, (outputs, blocks.len()), &Device::Cpu)?;
            Ok(Matrix { weights, form: Form::Blocks { scales, offsets: None } })
        };
        build().map_err(|e: candle_core::Error| CheckpointError::tensor(&name("qweight"), e))
    }

    /// The group of each input.
    fn groups(
        &self,
        shards: &Shards,
        name: &str,
        inputs: usize,
        num_groups: usize,
    ) -> Result<Vec<usize>, CheckpointError> {
        match self.packing {
            Packing::Gptq { has_act_order, .. } if has_act_order || shards.contains(name) => {
                let groups: Vec<usize> =
                    words(shards, name, &[inputs])?.into_iter().map(|group| group as usize).collect();
                match groups.iter().find(|group| **group >= num_groups) {
                    Some(group) => Err(CheckpointError::tensor(name, format!("has group {group} of {num_groups}"))),
                    None => Ok(groups),
                }
            }
            _ => Ok((0..inputs).map(|input| input / self.group_size.unwrap_or(inputs)).collect()),
        }
    }
}

fn words(shards: &Shards, name: &str, shape: &[usize]) -> Result<Vec<u32>, CheckpointError> {
    let words = shards.tensor_of(name, shape, |dtype| dtype == DType::I32)?.flatten_all();
    let words = words.and_then(|words| words.to_vec1::<i32>()).map_err(|e| CheckpointError::tensor(name, e))?;
    Ok(words.into_iter().map(i32::cast_unsigned).collect())
}
