//! Weights into GGUF's types, by mistralrs-quant's in-situ quantization.

use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::Linear;
use mistralrs_quant::{IsqType, QuantMethod, QuantMethodConfig, QuantizeOntoGuard, UnquantLinear};
use serde::{Deserialize, Deserializer};

/// What the matrices of a checkpoint become; `model.quantize`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantization {
    /// As they are in the checkpoint: BF16, F16 or F32.
    None,
    To(IsqType),
}

/// Names, and the number of `general.file_type` in GGUF.
const TYPES: [(&str, IsqType, u32); 10] = [
    ("q4k", IsqType::Q4K, 14),
    ("q5k", IsqType::Q5K, 16),
    ("q6k", IsqType::Q6K, 18),
    ("q8_0", IsqType::Q8_0, 7),
    ("q4_0", IsqType::Q4_0, 2),
    ("q4_1", IsqType::Q4_1, 3),
    ("q5_0", IsqType::Q5_0, 8),
    ("q5_1", IsqType::Q5_1, 9),
    ("q3k", IsqType::Q3K, 11),
    ("q2k", IsqType::Q2K, 10),
];

impl Quantization {
    pub fn name(self) -> &'static str {
        TYPES.iter().find(|(_, isq, _)| self == Self::To(*isq)).map_or("none", |(name, _, _)| name)
    }

    /// `general.file_type` of GGUF; `None` where the checkpoint decides.
    pub fn file_type(self) -> Option<u32> {
        TYPES.iter().find(|(_, isq, _)| self == Self::To(*isq)).map(|(_, _, number)| *number)
    }

    /// For the embedding and the head, which lose more: at least 6 bits.
    pub fn of_vocabulary(self) -> Self {
        match self {
            Self::To(IsqType::Q8_0) | Self::None => self,
            Self::To(_) => Self::To(IsqType::Q6K),
        }
    }
}

impl FromStr for Quantization {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "none" {
            return Ok(Self::None);
        }
        let known = || TYPES.iter().map(|(name, ..)| *name).collect::<Vec<_>>().join(", ");
        let found = TYPES.iter().find(|(name, ..)| text.eq_ignore_ascii_case(name));
        found
            .map(|(_, isq, _)| Self::To(*isq))
            .ok_or_else(|| format!("unknown quantization {text:?} (none, {})", known()))
    }
}

impl<'de> Deserialize<'de> for Quantization {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// `general.file_type` of GGUF for the type that most matrices have.
pub fn file_type_of_most<'a>(tensors: impl Iterator<Item = &'a QTensor>) -> Option<u32> {
    let types: Vec<GgmlDType> = tensors.filter(|tensor| tensor.rank() > 1).map(QTensor::dtype).collect();
    let most = *types.iter().max_by_key(|dtype| types.iter().filter(|other| other == dtype).count())?;
    let is_of = |isq: &IsqType| GgmlDType::try_from(*isq).is_ok_and(|dtype| dtype == most);
    TYPES.iter().find(|(_, isq, _)| is_of(isq)).map(|(_, _, number)| *number)
}

/// A matrix, or a stack of them, in the type that was asked for. Where a row does not divide into the type's blocks, the library takes the
/// next type of about as many bits that it does divide into.
pub fn pack(weights: Tensor, quantization: Quantization) -> candle_core::Result<QTensor> {
    let Quantization::To(isq) = quantization else {
        return QTensor::quantize(&weights, unquantized(weights.dtype()));
    };
    let shape = weights.shape().clone();
    let isq = if isq == IsqType::Q6K && !columns(&shape).is_multiple_of(GgmlDType::Q6K.block_size()) {
        // The library would take Q5_1, which is less.
        IsqType::Q8_0
    } else {
        isq
    };
    let rows = weights.reshape(((), columns(&shape)))?;
    let layer = Arc::new(UnquantLinear::new(QuantMethodConfig::Unquantized(Linear::new(rows, None)))?);
    let (count, guard) = (AtomicUsize::new(0), QuantizeOntoGuard::new());
    let packed = layer.apply_isq(Some(isq), Device::Cpu, &count, None, guard)?;
    from_uqff(&packed.serialize()?, shape)
}

/// A vector, or a matrix that is not to lose anything.
pub fn keep(weights: &Tensor) -> candle_core::Result<QTensor> {
    QTensor::quantize(weights, GgmlDType::F32)
}

/// The blocks within what the library writes of a layer: version (u32), kind (u8), length (u32), has a bias (u8), type
/// (u32), number of dimensions (u32), the dimensions (u32 each), blocks. Little endian; see its `gguf/mod.rs`.
fn from_uqff(serialized: &[u8], shape: Shape) -> candle_core::Result<QTensor> {
    const TYPE_AT: usize = 10;
    let field = |at: usize| serialized.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map(u32::from_le_bytes);
    let blocks = field(TYPE_AT + 4).and_then(|dims| serialized.get(TYPE_AT + 8 + 4 * dims as usize..));
    let (Some(number), Some(blocks)) = (field(TYPE_AT), blocks) else {
        candle_core::bail!("a quantized layer of {} bytes has no blocks", serialized.len());
    };
    let dtype = BLOCK_TYPES.iter().find(|(of, _)| *of == number).map(|(_, dtype)| *dtype);
    let Some(dtype) = dtype else { candle_core::bail!("a quantized layer has the type {number}") };
    QTensor::new(QStorage::from_data(blocks.into(), &Device::Cpu, dtype)?, shape)
}

/// Numbers of GGUF for the types that in-situ quantization gives.
const BLOCK_TYPES: [(u32, GgmlDType); 10] = [
    (2, GgmlDType::Q4_0),
    (3, GgmlDType::Q4_1),
    (6, GgmlDType::Q5_0),
    (7, GgmlDType::Q5_1),
    (8, GgmlDType::Q8_0),
    (10, GgmlDType::Q2K),
    (11, GgmlDType::Q3K),
    (12, GgmlDType::Q4K),
    (13, GgmlDType::Q5K),
    (14, GgmlDType::Q6K),
];

fn unquantized(dtype: DType) -> GgmlDType {
    match dtype {
        DType::BF16 => GgmlDType::BF16,
        DType::F16 => GgmlDType::F16,
        _ => GgmlDType::F32,
    }
}

fn columns(shape: &Shape) -> usize {
    shape.dims().last().copied().unwrap_or(0)
}
