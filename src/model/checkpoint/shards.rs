//! The tensors of a checkpoint, in one safetensors file or in several with an index.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::Init;
use candle_nn::var_builder::SimpleBackend;
use kernels::mapped_file::MappedFile;
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;
use serde::Deserialize;

use super::{CheckpointError, language_model, read_json};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Bytes before the header, which say how long it is.
const PREFIX_BYTES: usize = 8;

/// The mapped files, shared by all clones; bytes are read when a tensor is.
#[derive(Clone)]
pub struct Shards(Arc<Files>);

#[derive(Default)]
struct Files {
    maps: Vec<MappedFile>,
    tensors: BTreeMap<String, Place>,
}

struct Place {
    file: usize,
    dtype: DType,
    shape: Vec<usize>,
    bytes: Range<usize>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Shards {
    /// Of a checkpoint that also sees, `is_part` leaves only what its language model has, under the names it has alone.
    pub fn open(folder: &Path, is_part: bool) -> Result<Self, CheckpointError> {
        let mut names = match read_json::<Index>(folder, INDEX)? {
            Some(index) => index.weight_map.into_values().collect(),
            None => vec![SINGLE.to_owned()],
        };
        names.sort_unstable();
        names.dedup();
        let mut files = Files::default();
        for name in names {
            // An index is a file from outside: it names files of its own folder only.
            if Path::new(&name).components().count() != 1 || name.starts_with('.') {
                return Err(CheckpointError::file(INDEX, format!("names {name:?}, which is no file beside it")));
            }
            files.add(folder, &name, is_part)?;
        }
        Ok(Self(Arc::new(files)))
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.tensors.keys().map(String::as_str)
    }

    pub fn contains(&self, name: &str) -> bool {
        self.0.tensors.contains_key(name)
    }

    /// A tensor as it is in its file.
    pub fn tensor(&self, name: &str) -> Result<Tensor, CheckpointError> {
        let place = self.0.tensors.get(name).ok_or_else(|| CheckpointError::tensor(name, "is missing"))?;
        let bytes = self.bytes(place);
        if !are_numbers(place.dtype, bytes) {
            return Err(CheckpointError::tensor(
                name,
                "holds what is no number (NaN or infinite): the weights are damaged",
            ));
        }
        Tensor::from_raw_buffer(bytes, place.dtype, &place.shape, &Device::Cpu)
            .map_err(|e| CheckpointError::tensor(name, e))
    }

    fn bytes(&self, place: &Place) -> &[u8] {
        &self.0.maps[place.file].bytes()[place.bytes.clone()]
    }

    /// Whether two tensors are there and alike to the bit.
    pub fn are_same(&self, one: &str, other: &str) -> bool {
        let [one, other] = [one, other].map(|name| self.0.tensors.get(name));
        one.zip(other).is_some_and(|(one, other)| {
            (one.dtype, &one.shape) == (other.dtype, &other.shape) && self.bytes(one) == self.bytes(other)
        })
    }

    /// A part of a quantized matrix, which the configuration says the shape of.
    pub fn tensor_of(
        &self,
        name: &str,
        shape: &[usize],
        is_type: impl Fn(DType) -> bool,
    ) -> Result<Tensor, CheckpointError> {
        let tensor = self.tensor(name)?;
        if tensor.dims() == shape && is_type(tensor.dtype()) {
            return Ok(tensor);
        }
        let (dims, dtype) = (tensor.dims(), tensor.dtype());
        let reason = format!(
            "is {dims:?} in {dtype:?}, and by quantization_config and the model's sizes in config.json it would be {shape:?}"
        );
        Err(CheckpointError::tensor(name, reason))
    }

    /// The values of such a part, of any type of floats, row-major.
    pub fn floats_of(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, CheckpointError> {
        let floats = self.tensor_of(name, shape, |dtype| dtype.is_float())?.to_dtype(DType::F32);
        let floats = floats.and_then(|floats| floats.flatten_all()).and_then(|floats| floats.to_vec1::<f32>());
        floats.map_err(|e| CheckpointError::tensor(name, e))
    }
}

impl Files {
    fn add(&mut self, folder: &Path, name: &str, is_part: bool) -> Result<(), CheckpointError> {
        let path = folder.join(name);
        if !path.exists() && name == SINGLE {
            return Err(CheckpointError::file(
                SINGLE,
                format!("is not there, and neither is {INDEX}: {}", hint(folder)),
            ));
        }
        let file = MappedFile::open(&path).map_err(|e| CheckpointError::file(name, e))?;
        // The data must be as long as the header says, to the byte.
        let (header, metadata) = SafeTensors::read_metadata(file.bytes())
            .map_err(|e| CheckpointError::file(name, format!("is not a whole safetensors file: {e}")))?;
        let data_start = PREFIX_BYTES + header;
        for (tensor, info) in metadata.tensors() {
            let tensor = if is_part { language_model::tensor_name(&tensor) } else { Some(tensor) };
            let Some(tensor) = tensor else { continue };
            let dtype = dtype(info.dtype).ok_or_else(|| {
                CheckpointError::tensor(&tensor, format!("has the type {:?}, which is not read", info.dtype))
            })?;
            let (start, end) = info.data_offsets;
            let bytes = data_start + start..data_start + end;
            let place = Place { file: self.maps.len(), dtype, shape: info.shape.clone(), bytes };
            if self.tensors.insert(tensor.clone(), place).is_some() {
                return Err(CheckpointError::tensor(&tensor, "is in two files of the checkpoint"));
            }
        }
        self.maps.push(file);
        Ok(())
    }
}

/// How the quantization library asks for tensors.
impl SimpleBackend for Shards {
    fn get(&self, shape: Shape, name: &str, _: Init, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        let tensor = self.get_unchecked(name, dtype, device)?;
        if *tensor.shape() != shape {
            candle_core::bail!("tensor {name} has shape {:?}, expected {shape:?}", tensor.shape());
        }
        Ok(tensor)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        self.tensor(name).map_err(candle_core::Error::wrap)?.to_device(device)?.to_dtype(dtype)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.contains(name)
    }
}

/// Whether every value of floats is a number: NaN and infinite ones have an exponent of ones.
fn are_numbers(dtype: DType, bytes: &[u8]) -> bool {
    fn none_has<const N: usize>(bytes: &[u8], mask: [u8; N]) -> bool {
        let (values, _) = bytes.as_chunks::<N>();
        !values.iter().any(|value| value.iter().zip(&mask).all(|(byte, mask)| byte & mask == *mask))
    }
    match dtype {
        DType::F32 => none_has(bytes, 0x7f80_0000_u32.to_le_bytes()),
        DType::BF16 => none_has(bytes, 0x7f80_u16.to_le_bytes()),
        DType::F16 => none_has(bytes, 0x7c00_u16.to_le_bytes()),
        // Of its kind, only the one with a mantissa of ones is none.
        DType::F8E4M3 => none_has(bytes, [0x7f]),
        _ => true,
    }
}

fn dtype(dtype: Dtype) -> Option<DType> {
    Some(match dtype {
        Dtype::BF16 => DType::BF16,
        Dtype::F16 => DType::F16,
        Dtype::F32 => DType::F32,
        Dtype::U8 => DType::U8,
        Dtype::U32 => DType::U32,
        Dtype::I32 => DType::I32,
        Dtype::I64 => DType::I64,
        Dtype::F8_E4M3 => DType::F8E4M3,
        _ => return None,
    })
}

pub const UQFF: &str = "UQFF numbers the layers in an order that only its program knows and is not read: give the checkpoint that it was made of";

/// What to do where there are no weights in safetensors.
fn hint(folder: &Path) -> &'static str {
    let ends = |ending: &str| {
        let entries = folder.read_dir().into_iter().flatten().filter_map(Result::ok);
        entries.into_iter().any(|entry| entry.file_name().to_string_lossy().ends_with(ending))
    };
    if ends(".gguf") {
        "name the GGUF file in the folder"
    } else if ends(".uqff") {
        UQFF
    } else if ends(".bin") || ends(".pt") || ends(".pth") {
        "pickles can run code when opened and are not read: save the model as safetensors"
    } else {
        "a checkpoint is a folder as save_pretrained of transformers writes it"
    }
}
