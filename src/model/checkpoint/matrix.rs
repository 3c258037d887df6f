//! A matrix on its way from a checkpoint to GGUF. One that was quantized in steps keeps every value, if a type of GGUF has them.

use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{DType, Device, Tensor};
use half::f16;
use mistralrs_quant::IsqType;

use super::quantize::{self, Quantization};

/// Inputs that share a scale in GGUF's simple types.
pub const BLOCK_LEN: usize = 32;

pub struct Matrix {
    /// `[out, in]`, or a stack of such.
    pub weights: Tensor,
    pub form: Form,
}

/// How the checkpoint has it.
pub enum Form {
    /// As it was trained.
    Floats,
    /// Quantized floats, whose values no packed type has.
    Dequantized,
    /// `weight = scale · step + offset` with whole steps. `scales` and `offsets` are `[out, in / 32]`; without any, offsets are 0.
    Blocks { scales: Tensor, offsets: Option<Tensor> },
    /// Likewise, with inputs of several scales in a block.
    Scattered,
}

/// A type of GGUF with whole steps in blocks of 32: `weight = d · (code − zero) + m`, `d` and `m` in f16.
struct StepType {
    dtype: GgmlDType,
    bits: usize,
    zero: i32,
    has_offset: bool,
}

/// From the smallest on.
const STEP_TYPES: [StepType; 5] = [
    StepType { dtype: GgmlDType::Q4_0, bits: 4, zero: 8, has_offset: false },
    StepType { dtype: GgmlDType::Q4_1, bits: 4, zero: 0, has_offset: true },
    StepType { dtype: GgmlDType::Q5_0, bits: 5, zero: 16, has_offset: false },
    StepType { dtype: GgmlDType::Q5_1, bits: 5, zero: 0, has_offset: true },
    StepType { dtype: GgmlDType::Q8_0, bits: 8, zero: 128, has_offset: false },
];

impl Matrix {
    /// With its rows in another order.
    pub fn with_rows(self, reorder: impl Fn(Tensor) -> candle_core::Result<Tensor>) -> candle_core::Result<Self> {
        let form = match self.form {
            Form::Blocks { scales, offsets } => {
                Form::Blocks { scales: reorder(scales)?, offsets: offsets.map(&reorder).transpose()? }
            }
            other => other,
        };
        Ok(Self { weights: reorder(self.weights)?, form })
    }

    /// `[matrices, out, in]`
    pub fn stack(matrices: Vec<Self>) -> candle_core::Result<Self> {
        let is_float = matrices.iter().all(|matrix| matches!(matrix.form, Form::Floats));
        let (mut weights, mut scales, mut offsets) = (Vec::new(), Vec::new(), Vec::new());
        let (count, mut form) = (matrices.len(), Form::Floats);
        for matrix in matrices {
            weights.push(if is_float { matrix.weights } else { matrix.weights.to_dtype(DType::F32)? });
            match matrix.form {
                Form::Blocks { scales: of_one, offsets: its } => {
                    scales.push(of_one);
                    offsets.extend(its);
                }
                other => form = other,
            }
        }
        if scales.len() == count {
            let offsets = if offsets.is_empty() { None } else { Some(Tensor::stack(&offsets, 0)?) };
            form = Form::Blocks { scales: Tensor::stack(&scales, 0)?, offsets };
        } else if !scales.is_empty() {
            form = Form::Scattered;
        }
        Ok(Self { weights: Tensor::stack(&weights, 0)?, form })
    }

    /// The matrix in a type of GGUF: `quantization` for what the checkpoint has in floats. The text says what became of one that the
    /// checkpoint has quantized.
    pub fn pack(self, quantization: Quantization) -> candle_core::Result<(QTensor, Option<String>)> {
        let quantization = match self.form {
            Form::Floats => return Ok((quantize::pack(self.weights, quantization)?, None)),
            Form::Dequantized => quantization,
            Form::Blocks { scales, offsets } => {
                if let Some(whole) = exact(&self.weights, &scales, offsets.as_ref())? {
                    let fate = format!("kept whole as {:?}", whole.dtype());
                    return Ok((whole, Some(fate)));
                }
                nearest(quantization)
            }
            Form::Scattered => nearest(quantization),
        };
        let packed = quantize::pack(self.weights, quantization)?;
        let fate = format!("quantized anew to {:?}", packed.dtype());
        Ok((packed, Some(fate)))
    }
}

/// For integers that no type has as they are.
fn nearest(quantization: Quantization) -> Quantization {
    match quantization {
        Quantization::None => Quantization::None,
        Quantization::To(_) => Quantization::To(IsqType::Q8_0),
    }
}

/// The same values in the smallest type that has them all.
fn exact(weights: &Tensor, scales: &Tensor, offsets: Option<&Tensor>) -> candle_core::Result<Option<QTensor>> {
    let values = weights.flatten_all()?.to_vec1::<f32>()?;
    let scales = scales.flatten_all()?.to_vec1::<f32>()?;
    let offsets = offsets.map(|offsets| offsets.flatten_all()?.to_vec1::<f32>()).transpose()?;
    let (blocks, []) = values.as_chunks::<BLOCK_LEN>() else { return Ok(None) };
    if scales.len() != blocks.len() || offsets.as_ref().is_some_and(|offsets| offsets.len() != blocks.len()) {
        candle_core::bail!("has {} scales for {} blocks of {BLOCK_LEN}", scales.len(), blocks.len());
    }
    for step_type in STEP_TYPES.iter().filter(|step_type| step_type.has_offset == offsets.is_some()) {
        let mut packed = Vec::with_capacity(blocks.len() * step_type.dtype.type_size());
        let offset = |block: usize| offsets.as_ref().map_or(0.0, |offsets| offsets[block]);
        let mut numbered = blocks.iter().enumerate();
        if numbered.all(|(at, block)| step_type.push(block, scales[at], offset(at), &mut packed)) {
            // Borrowed: the storage is made from a slice, which one that is owned would not outlive.
            let storage = QStorage::from_data(packed.as_slice().into(), &Device::Cpu, step_type.dtype)?;
            return Ok(Some(QTensor::new(storage, weights.shape().clone())?));
        }
    }
    Ok(None)
}

impl StepType {
    /// Appends a block, unless the type has another value for one of its weights.
    fn push(&self, weights: &[f32; BLOCK_LEN], scale: f32, offset: f32, packed: &mut Vec<u8>) -> bool {
        let (d, m) = (f16::from_f32(scale), f16::from_f32(offset));
        let (scale, offset) = (d.to_f32(), m.to_f32());
        let mut codes = [0_u8; BLOCK_LEN];
        for (code, weight) in codes.iter_mut().zip(weights) {
            let step = if scale == 0.0 { 0.0 } else { ((weight - offset) / scale).round() };
            let found = step as i32 + self.zero;
            if scale * step + offset != *weight || !(0..1 << self.bits).contains(&found) {
                return false;
            }
            *code = found as u8;
        }
        packed.extend(d.to_le_bytes());
        if self.has_offset {
            packed.extend(m.to_le_bytes());
        }
        if self.bits == 8 {
            // Signed.
            packed.extend(codes.map(|code| code ^ 128));
            return true;
        }
        if self.bits == 5 {
            let high = codes.iter().enumerate().fold(0_u32, |high, (i, code)| high | u32::from(code >> 4) << i);
            packed.extend(high.to_le_bytes());
        }
        packed.extend((0..BLOCK_LEN / 2).map(|i| (codes[i] & 15) | (codes[i + BLOCK_LEN / 2] << 4)));
        true
    }
}
