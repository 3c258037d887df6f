//! Reading GGUF files: metadata through candle, tensor bytes through a memory map.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::{Content, Value};
use kernels::device::DeviceError;
use kernels::mapped_file::{MappedFile, MappedRows};
use kernels::quantized::{BlockFormat, WeightType};

use super::metadata;
use super::spec::ModelSpec;

#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    #[error("{path}: {source}")]
    Open { path: PathBuf, source: std::io::Error },
    #[error("{path} is not a readable GGUF file: {reason}")]
    Parse { path: PathBuf, reason: String },
    #[error("the GGUF file lacks the metadata key {0}")]
    MissingKey(String),
    #[error("the GGUF metadata key {key} is not {expected}")]
    WrongType { key: String, expected: &'static str },
    #[error("the GGUF file lacks the tensor {0}")]
    MissingTensor(String),
    #[error("tensor {name} has shape {got:?}, expected {expected:?}")]
    Shape { name: String, got: Vec<usize>, expected: Vec<usize> },
    #[error("tensor {name} of {len} bytes at offset {offset} does not lie within the file: the file is truncated")]
    Truncated { name: String, offset: usize, len: usize },
    #[error("tensor {0} has an impossible size or place: the file is damaged")]
    Damaged(String),
    #[error("the GGUF metadata key {key} = {value} is not supported: {reason}")]
    Metadata { key: String, value: String, reason: String },
    #[error("architecture {0:?} is not supported (supported: {1})")]
    Architecture(String, String),
    #[error("{0}")]
    Unsupported(String),
    #[error("tensor {name}: {source}")]
    Device { name: String, source: DeviceError },
}

/// A tensor as it lies in the file.
#[derive(Debug, Clone)]
pub struct RawTensor<'a> {
    pub weight_type: WeightType,
    /// Row-major, outermost first: a linear layer is `[out, in]`.
    pub shape: Vec<usize>,
    pub bytes: &'a [u8],
}

/// `None` for what this server can neither multiply nor read.
fn weight_type(dtype: GgmlDType) -> Option<WeightType> {
    Some(match dtype {
        GgmlDType::Q4_0 => WeightType::Blocks(BlockFormat::Q4_0),
        GgmlDType::Q4_1 => WeightType::Blocks(BlockFormat::Q4_1),
        GgmlDType::Q5_0 => WeightType::Blocks(BlockFormat::Q5_0),
        GgmlDType::Q5_1 => WeightType::Blocks(BlockFormat::Q5_1),
        GgmlDType::Q8_0 => WeightType::Blocks(BlockFormat::Q8_0),
        GgmlDType::Q2K => WeightType::Blocks(BlockFormat::Q2_K),
        GgmlDType::Q3K => WeightType::Blocks(BlockFormat::Q3_K),
        GgmlDType::Q4K => WeightType::Blocks(BlockFormat::Q4_K),
        GgmlDType::Q5K => WeightType::Blocks(BlockFormat::Q5_K),
        GgmlDType::Q6K => WeightType::Blocks(BlockFormat::Q6_K),
        GgmlDType::F16 => WeightType::F16,
        GgmlDType::BF16 => WeightType::BF16,
        GgmlDType::F32 => WeightType::F32,
        _ => return None,
    })
}

/// An open GGUF file. Tensor bytes stay on disk until they are touched.
#[derive(Debug)]
pub struct GgufFile {
    content: Content,
    file: Arc<MappedFile>,
}

impl GgufFile {
    pub fn open(path: &Path) -> Result<Self, GgufError> {
        let file = MappedFile::open(path).map_err(|source| GgufError::Open { path: path.to_path_buf(), source })?;
        let content = Content::read(&mut std::io::Cursor::new(file.bytes()))
            .map_err(|e| GgufError::Parse { path: path.to_path_buf(), reason: e.to_string() })?;
        Ok(Self { content, file: Arc::new(file) })
    }

    /// Gives the memory of the tensors read so far back to the system.
    pub fn release_pages(&mut self) {
        // Advice only; what still reads the file keeps its pages.
        if let Some(file) = Arc::get_mut(&mut self.file) {
            file.release_pages();
        }
    }

    pub fn metadata(&self, key: &str) -> Option<&Value> {
        self.content.metadata.get(key)
    }

    pub fn metadata_pairs(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.content.metadata.iter().map(|(key, value)| (key.as_str(), value))
    }

    fn required(&self, key: &str) -> Result<&Value, GgufError> {
        self.metadata(key).ok_or_else(|| GgufError::MissingKey(key.to_string()))
    }

    /// Any unsigned or signed integer that is not negative.
    pub fn usize(&self, key: &str) -> Result<usize, GgufError> {
        let wrong = || GgufError::WrongType { key: key.to_string(), expected: "a whole number" };
        whole_number(self.required(key)?).ok_or_else(wrong)
    }

    pub fn f32(&self, key: &str) -> Result<f32, GgufError> {
        self.required(key)?
            .to_f32()
            .map_err(|_| GgufError::WrongType { key: key.to_string(), expected: "a 32-bit float" })
    }

    pub fn str(&self, key: &str) -> Result<&str, GgufError> {
        self.required(key)?
            .to_string()
            .map(String::as_str)
            .map_err(|_| GgufError::WrongType { key: key.to_string(), expected: "a string" })
    }

    pub fn array(&self, key: &str) -> Result<&[Value], GgufError> {
        self.required(key)?
            .to_vec()
            .map(Vec::as_slice)
            .map_err(|_| GgufError::WrongType { key: key.to_string(), expected: "an array" })
    }

    /// Of all tensors together.
    pub fn num_parameters(&self) -> u64 {
        self.content.tensor_infos.values().map(|tensor| tensor.shape.elem_count() as u64).sum()
    }

    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.content.tensor_infos.keys().map(String::as_str)
    }

    pub fn has_tensor(&self, name: &str) -> bool {
        self.content.tensor_infos.contains_key(name)
    }

    pub fn tensor(&self, name: &str) -> Result<RawTensor<'_>, GgufError> {
        let (weight_type, shape, place) = self.place(name)?;
        Ok(RawTensor { weight_type, shape, bytes: &self.file.bytes()[place] })
    }

    /// Type, shape and bytes of a tensor, which lie within the file.
    fn place(&self, name: &str) -> Result<(WeightType, Vec<usize>, Range<usize>), GgufError> {
        let info = self.content.tensor_infos.get(name).ok_or_else(|| GgufError::MissingTensor(name.to_string()))?;
        let shape = info.shape.dims().to_vec();
        let damaged = || GgufError::Damaged(name.to_string());
        let elements = shape.iter().try_fold(1_usize, |n, dim| n.checked_mul(*dim)).ok_or_else(damaged)?;
        let len =
            (elements / info.ggml_dtype.block_size()).checked_mul(info.ggml_dtype.type_size()).ok_or_else(damaged)?;
        let offset = self.content.tensor_data_offset.checked_add(info.offset).ok_or_else(damaged)?;
        let offset = usize::try_from(offset).map_err(|_| damaged())?;
        let weight_type = weight_type(info.ggml_dtype).ok_or_else(|| {
            GgufError::Unsupported(format!("tensor {name} has the unsupported type {:?}", info.ggml_dtype))
        })?;
        match offset.checked_add(len).filter(|end| *end <= self.file.bytes().len()) {
            Some(end) => Ok((weight_type, shape, offset..end)),
            None => Err(GgufError::Truncated { name: name.to_string(), offset, len }),
        }
    }

    /// The rows of a matrix of exactly this shape.
    pub fn matrix_rows(&self, name: &str, shape: (usize, usize)) -> Result<MappedRows, GgufError> {
        let weight_type = self.matrix(name, shape)?.weight_type;
        let (_, _, place) = self.place(name)?;
        Ok(MappedRows { file: self.file.clone(), weight_type, place, num_rows: shape.0 })
    }

    /// A matrix of exactly this shape.
    pub fn matrix(&self, name: &str, shape: (usize, usize)) -> Result<RawTensor<'_>, GgufError> {
        let tensor = self.tensor(name)?;
        let expected = vec![shape.0, shape.1];
        if tensor.shape != expected {
            return Err(GgufError::Shape { name: name.to_string(), got: tensor.shape, expected });
        }
        Ok(tensor)
    }

    /// A vector of exactly this length, as f32.
    pub fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, GgufError> {
        let tensor = self.tensor(name)?;
        if tensor.shape != [len] {
            return Err(GgufError::Shape { name: name.to_string(), got: tensor.shape, expected: vec![len] });
        }
        let mut values = vec![0.0; len];
        tensor.weight_type.dequantize_row(tensor.bytes, &mut values);
        Ok(values)
    }

    /// The decoder this file describes.
    pub fn spec(&self) -> Result<ModelSpec, GgufError> {
        metadata::spec(self)
    }
}

/// Any unsigned or signed integer that is not negative.
pub fn whole_number(value: &Value) -> Option<usize> {
    let number = match value {
        Value::U8(v) => Some(u64::from(*v)),
        Value::U16(v) => Some(u64::from(*v)),
        Value::U32(v) => Some(u64::from(*v)),
        Value::U64(v) => Some(*v),
        Value::I8(v) => u64::try_from(*v).ok(),
        Value::I16(v) => u64::try_from(*v).ok(),
        Value::I32(v) => u64::try_from(*v).ok(),
        Value::I64(v) => u64::try_from(*v).ok(),
        _ => None,
    };
    number.and_then(|n| usize::try_from(n).ok())
}
