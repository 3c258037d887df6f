//! Matrices of bitsandbytes in four bits: `weight = quant_map[code] · absmax[block]`, in blocks of one matrix, row-major.
//!
//! The layout is that of `bitsandbytes/functional.py`: two codes in a byte, the high one first; scales may be quantized themselves.
//! mistralrs-quant reads it on a card: on the CPU, one of two scales is lost to it.

use candle_core::{DType, Device, Tensor};
use serde::Deserialize;

use super::CheckpointError;
use super::matrix::{Form, Matrix};
use super::shards::Shards;

const STATES: [&str; 2] = ["weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4"];

/// What belongs to a matrix beside `weight`.
pub const PARTS: &[&str] =
    &["weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map", STATES[0], STATES[1]];

/// How a matrix was quantized: JSON, in a tensor of bytes.
#[derive(Deserialize)]
struct State {
    shape: Vec<usize>,
    blocksize: usize,
    /// Scales that share one, where they are quantized.
    nested_blocksize: Option<usize>,
    nested_offset: Option<f32>,
}

/// The matrix of a module, of `shape` `(out, in)`.
///
/// # Errors
/// Tensors that are missing, or have another shape than the configuration and `quant_state` say, by name.
pub fn read(shards: &Shards, module: &str, (outputs, inputs): (usize, usize)) -> Result<Matrix, CheckpointError> {
    let name = |part: &str| format!("{module}.{part}");
    let state_name = STATES.map(name).into_iter().find(|state| shards.contains(state));
    let state_name = state_name
        .ok_or_else(|| CheckpointError::tensor(&name("weight"), "has no quant_state of nf4 or fp4 beside it"))?;
    let in_state = |reason: String| CheckpointError::tensor(&state_name, reason);
    let text = flat::<u8>(shards.tensor(&state_name)?).map_err(|e| in_state(e.to_string()))?;
    let state: State = serde_json::from_slice(&text).map_err(|e| in_state(e.to_string()))?;
    if state.shape != [outputs, inputs] {
        let reason = format!("says the shape {:?}, and config.json says {:?}", state.shape, [outputs, inputs]);
        return Err(in_state(reason));
    }
    if state.blocksize == 0 || state.nested_blocksize == Some(0) {
        return Err(in_state("says blocks of 0".to_owned()));
    }
    let count = outputs * inputs;
    let scales = scales(shards, name, &state, count.div_ceil(state.blocksize))?;
    let map = shards.floats_of(&name("weight.quant_map"), &[16])?;
    let codes = bytes_of(shards, &name("weight"), &[count.div_ceil(2), 1])?;
    let codes = codes.iter().flat_map(|byte| [byte >> 4, byte & 0xf]).take(count);
    let weights = codes.enumerate().map(|(at, code)| map[usize::from(code)] * scales[at / state.blocksize]).collect();
    let weights = Tensor::from_vec::<_, f32>(weights, (outputs, inputs), &Device::Cpu);
    let weights = weights.map_err(|e| CheckpointError::tensor(&name("weight"), e))?;
    Ok(Matrix { weights, form: Form::Dequantized })
}

/// One for each block.
fn scales(
    shards: &Shards,
    name: impl Fn(&str) -> String,
    state: &State,
    count: usize,
) -> Result<Vec<f32>, CheckpointError> {
    let Some(blocksize) = state.nested_blocksize else { return shards.floats_of(&name("weight.absmax"), &[count]) };
    let codes = bytes_of(shards, &name("weight.absmax"), &[count])?;
    let map = shards.floats_of(&name("weight.nested_quant_map"), &[256])?;
    let scales = shards.floats_of(&name("weight.nested_absmax"), &[count.div_ceil(blocksize)])?;
    let offset = state.nested_offset.unwrap_or(0.0);
    let scale = |(at, code): (usize, &u8)| map[usize::from(*code)] * scales[at / blocksize] + offset;
    Ok(codes.iter().enumerate().map(scale).collect())
}

fn bytes_of(shards: &Shards, name: &str, shape: &[usize]) -> Result<Vec<u8>, CheckpointError> {
    let bytes = shards.tensor_of(name, shape, |dtype| dtype == DType::U8)?;
    flat(bytes).map_err(|e| CheckpointError::tensor(name, e))
}

fn flat<T: candle_core::WithDType>(tensor: Tensor) -> candle_core::Result<Vec<T>> {
    tensor.flatten_all()?.to_vec1()
}
