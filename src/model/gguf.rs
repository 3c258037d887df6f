//! Reading GGUF files: a header, and tensor bytes through a memory map. A model split over files is one to its readers.

mod header;
mod types;

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::quantized::gguf_file::Value;
use kernels::device::DeviceError;
use kernels::mapped_file::{MappedFile, MappedRows};
use kernels::quantized::WeightType;
use sha2::{Digest, Sha256};

use super::metadata;
use super::spec::ModelSpec;
use header::Header;

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
    /// Before anything is loaded.
    #[error(transparent)]
    NotOnDevice(DeviceError),
}

impl GgufError {
    /// A key that is refused for its value.
    pub fn of_key(key: &str, value: &Value, reason: &str) -> Self {
        let shown = match value {
            Value::String(text) => format!("{text:?}"),
            Value::Bool(flag) => flag.to_string(),
            Value::F32(number) => format!("{number:?}"),
            Value::F64(number) => format!("{number:?}"),
            Value::Array(values) => format!("an array of {}", values.len()),
            Value::I8(number) => number.to_string(),
            Value::I16(number) => number.to_string(),
            Value::I32(number) => number.to_string(),
            Value::I64(number) => number.to_string(),
            other => whole_number(other).map_or_else(|| format!("{other:?}"), |number| number.to_string()),
        };
        Self::Metadata { key: key.to_owned(), value: shown, reason: reason.to_owned() }
    }
}

/// A tensor as it lies in the file.
#[derive(Debug, Clone)]
pub struct RawTensor<'a> {
    pub weight_type: WeightType,
    /// Row-major, outermost first: a linear layer is `[out, in]`.
    pub shape: Vec<usize>,
    pub bytes: &'a [u8],
}

/// An open GGUF file. Tensor bytes stay on disk until they are touched.
#[derive(Debug)]
pub struct GgufFile {
    metadata: HashMap<String, Value>,
    tensors: HashMap<String, Tensor>,
    /// More than one where the model is split.
    files: Vec<Arc<MappedFile>>,
}

/// Where a tensor lies.
#[derive(Debug)]
struct Tensor {
    /// Index into the files.
    file: usize,
    type_number: u32,
    shape: Vec<usize>,
    /// In bytes of the file.
    offset: Option<usize>,
}

/// Keys of files that hold a part of a model. Parts are counted from 0, and from 1 in their names.
const SPLIT_COUNT: &str = "split.count";
const SPLIT_NUMBER: &str = "split.no";

impl GgufFile {
    /// Opens a file, and the others of a model that is split; `path` is that of the first.
    pub fn open(path: &Path) -> Result<Self, GgufError> {
        let (file, header) = open_one(path)?;
        let split = |header: &Header, key| header.metadata.get(key).and_then(whole_number);
        let count = split(&header, SPLIT_COUNT).unwrap_or(1).max(1);
        let number = split(&header, SPLIT_NUMBER).unwrap_or(0);
        if count > 1 && number != 0 {
            let (path, number) = (path.display(), number + 1);
            return Err(GgufError::Unsupported(format!(
                "{path} is part {number} of {count} of a model: give the first, whose name ends in {}",
                part_suffix(1, count)
            )));
        }
        let mut opened = Self { metadata: HashMap::new(), tensors: HashMap::new(), files: Vec::new() };
        opened.add_tensors(file, &header)?;
        for number in 1..count {
            let path = part_path(path, number + 1, count)?;
            let (file, part) = open_one(&path)?;
            if (split(&part, SPLIT_NUMBER), split(&part, SPLIT_COUNT)) != (Some(number), Some(count)) {
                let reason = format!("it is not part {} of {count} of the model", number + 1);
                return Err(GgufError::Parse { path, reason });
            }
            opened.add_tensors(file, &part)?;
        }
        opened.metadata = header.metadata;
        Ok(opened)
    }

    fn add_tensors(&mut self, file: MappedFile, header: &Header) -> Result<(), GgufError> {
        for (name, entry) in &header.tensors {
            let offset = usize::try_from(entry.offset).ok().and_then(|offset| offset.checked_add(header.data_offset));
            let (type_number, shape) = (entry.type_number, entry.shape.clone());
            let tensor = Tensor { file: self.files.len(), type_number, shape, offset };
            if self.tensors.insert(name.clone(), tensor).is_some() {
                return Err(GgufError::Damaged(name.clone()));
            }
        }
        self.files.push(Arc::new(file));
        Ok(())
    }

    /// Adds every byte of the model to a hash.
    pub fn hash_into(&self, sha256: &mut Sha256) {
        self.files.iter().for_each(|file| sha256.update(file.bytes()));
    }

    /// Gives the memory of the tensors read so far back to the system.
    pub fn release_pages(&mut self) {
        // Advice only; what still reads a file keeps its pages.
        for file in self.files.iter_mut().filter_map(Arc::get_mut) {
            file.release_pages();
        }
    }

    pub fn metadata(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    pub fn metadata_pairs(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.metadata.iter().map(|(key, value)| (key.as_str(), value))
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
        let elements = |tensor: &Tensor| tensor.shape.iter().fold(1, |n: u64, dim| n.saturating_mul(*dim as u64));
        self.tensors.values().map(elements).fold(0, u64::saturating_add)
    }

    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub fn has_tensor(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    pub fn tensor(&self, name: &str) -> Result<RawTensor<'_>, GgufError> {
        let (weight_type, tensor, place) = self.place(name)?;
        let (shape, bytes) = (tensor.shape.clone(), &self.files[tensor.file].bytes()[place]);
        Ok(RawTensor { weight_type, shape, bytes })
    }

    /// The type of a tensor's weights.
    pub fn weight_type(&self, name: &str) -> Result<WeightType, GgufError> {
        Ok(self.place(name)?.0)
    }

    /// A tensor, and its bytes, which lie within its file.
    fn place(&self, name: &str) -> Result<(WeightType, &Tensor, Range<usize>), GgufError> {
        let tensor = self.tensors.get(name).ok_or_else(|| GgufError::MissingTensor(name.to_string()))?;
        let damaged = || GgufError::Damaged(name.to_string());
        let weight_type = types::weight_type(tensor.type_number)
            .map_err(|reason| GgufError::Unsupported(format!("tensor {name} {reason}")))?;
        let (width, rows) = tensor.shape.split_last().ok_or_else(damaged)?;
        // No type takes more than four bytes a weight.
        width.checked_mul(4).ok_or_else(damaged)?;
        let row_bytes = weight_type.row_bytes(*width).ok_or_else(damaged)?;
        let len = rows.iter().try_fold(row_bytes, |len, dim| len.checked_mul(*dim)).ok_or_else(damaged)?;
        let offset = tensor.offset.ok_or_else(damaged)?;
        match offset.checked_add(len).filter(|end| *end <= self.files[tensor.file].bytes().len()) {
            Some(end) => Ok((weight_type, tensor, offset..end)),
            None => Err(GgufError::Truncated { name: name.to_string(), offset, len }),
        }
    }

    /// The rows of a tensor of exactly this shape.
    pub fn matrix_rows(&self, name: &str, shape: &[usize]) -> Result<MappedRows, GgufError> {
        self.matrix(name, shape)?;
        let (weight_type, tensor, place) = self.place(name)?;
        let num_rows = shape[..shape.len() - 1].iter().product();
        Ok(MappedRows { file: self.files[tensor.file].clone(), weight_type, place, num_rows })
    }

    /// A matrix, or a stack of them, of exactly this shape.
    pub fn matrix(&self, name: &str, shape: &[usize]) -> Result<RawTensor<'_>, GgufError> {
        let tensor = self.tensor(name)?;
        if tensor.shape != shape {
            let expected = shape.to_vec();
            return Err(GgufError::Shape { name: name.to_string(), got: tensor.shape, expected });
        }
        Ok(tensor)
    }

    /// A vector of exactly this length, as f32; all of it numbers.
    pub fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, GgufError> {
        let tensor = self.tensor(name)?;
        if tensor.shape != [len] {
            return Err(GgufError::Shape { name: name.to_string(), got: tensor.shape, expected: vec![len] });
        }
        let mut values = vec![0.0; len];
        tensor.weight_type.dequantize_row(tensor.bytes, &mut values);
        // Activations are rounded to whole numbers, which would hide it.
        match values.iter().find(|value| !value.is_finite()) {
            Some(value) => Err(GgufError::Unsupported(format!("tensor {name} holds {value}: the weights are damaged"))),
            None => Ok(values),
        }
    }

    /// The decoder this file describes.
    pub fn spec(&self) -> Result<ModelSpec, GgufError> {
        metadata::spec(self)
    }
}

fn open_one(path: &Path) -> Result<(MappedFile, Header), GgufError> {
    let file = MappedFile::open(path).map_err(|source| GgufError::Open { path: path.to_path_buf(), source })?;
    let parse = |reason| GgufError::Parse { path: path.to_path_buf(), reason };
    let header = header::read(file.bytes()).map_err(parse)?;
    Ok((file, header))
}

/// `-00001-of-00003.gguf`
fn part_suffix(number: usize, count: usize) -> String {
    format!("-{number:05}-of-{count:05}.gguf")
}

/// Names of the other parts of a model that is split, by the name of its first; none of one that is whole.
pub fn other_parts(first: &str) -> Vec<String> {
    let split = first.strip_suffix(".gguf").and_then(|name| name.rsplit_once("-00001-of-"));
    let count = |digits: &str| digits.parse::<usize>().ok().filter(|count| format!("{count:05}") == digits);
    let Some((stem, Some(count))) = split.map(|(stem, digits)| (stem, count(digits))) else { return Vec::new() };
    (2..=count).map(|number| format!("{stem}{}", part_suffix(number, count))).collect()
}

/// Where part `number` of a model lies whose first is `first`.
fn part_path(first: &Path, number: usize, count: usize) -> Result<PathBuf, GgufError> {
    let name = first.file_name().unwrap_or_default().to_string_lossy();
    let suffix = part_suffix(1, count);
    let stem = name.strip_suffix(&suffix).ok_or_else(|| GgufError::Parse {
        path: first.to_path_buf(),
        reason: format!("it is the first of {count} parts of a model, and its name does not end in {suffix}"),
    })?;
    Ok(first.with_file_name(format!("{stem}{}", part_suffix(number, count))))
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

#[cfg(test)]
mod tests {
    use super::other_parts;

    #[test]
    fn a_model_that_is_split_has_other_parts() {
        let parts = ["q4/coder-00002-of-00003.gguf", "q4/coder-00003-of-00003.gguf"];
        assert_eq!(other_parts("q4/coder-00001-of-00003.gguf"), parts);
        for whole in [
            "coder.gguf",
            "coder-00001-of-00001.gguf",
            "coder-00002-of-00003.gguf",
            "coder-00001-of-3.gguf",
            "coder-00001-of-00003.bin",
            "coder-00001-of-many.gguf",
            "coder-00001-of-.gguf",
        ] {
            assert!(other_parts(whole).is_empty(), "{whole}");
        }
    }
}
