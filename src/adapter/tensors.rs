//! The tensors of an adapter's file: taken by key, checked, and turned into numbers.

use std::collections::BTreeMap;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use super::error::AdapterError;

/// What stands before every key of a layer's tensors.
const PREFIX: &str = "base_model.model.";

/// The tensors that have not found their place yet.
#[derive(Debug)]
pub struct Tensors<'a>(BTreeMap<&'a str, TensorView<'a>>);

impl<'a> Tensors<'a> {
    /// # Errors
    /// When there are none.
    pub fn of(file: &'a SafeTensors<'a>) -> Result<Self, AdapterError> {
        if file.is_empty() {
            return Err(AdapterError::NoTensors);
        }
        Ok(Self(file.iter().collect()))
    }

    pub fn take(&mut self, key: &str) -> Option<NamedTensor<'a>> {
        self.0.remove_entry(key).map(|(key, view)| NamedTensor { key, view })
    }

    /// The tensor `name` of the module at a path, e.g. `lora_A.weight`.
    pub fn take_of(&mut self, path: &str, name: &str) -> Option<NamedTensor<'a>> {
        self.take(&format!("{PREFIX}{path}.{name}"))
    }

    /// # Errors
    /// When tensors are left, which the server would not apply; names the first.
    pub fn refuse_rest(self) -> Result<(), AdapterError> {
        let Some(key) = self.0.keys().next() else { return Ok(()) };
        let reason = if key.ends_with("base_layer.weight") || key.ends_with("embed_tokens.weight") {
            "is a weight of the base: save the adapter with save_embedding_layers=False"
        } else {
            "finds no site in the base"
        };
        Err(AdapterError::tensor(key, reason))
    }
}

/// A tensor under the name it has in the file.
#[derive(Debug)]
pub struct NamedTensor<'a> {
    pub key: &'a str,
    view: TensorView<'a>,
}

impl NamedTensor<'_> {
    /// Checks a two-dimensional shape whose dimension `rank_dim` is the rank and whose other is `features`.
    ///
    /// # Errors
    /// When the shape is another.
    pub fn check_rank(&self, rank_dim: usize, features: usize, rank: usize) -> Result<(), AdapterError> {
        let shape = self.view.shape();
        if shape.len() == 2 && shape[1 - rank_dim] == features && shape[rank_dim] != rank {
            let reason = format!("has rank {}, adapter_config.json says {rank}", shape[rank_dim]);
            return Err(AdapterError::tensor(self.key, reason));
        }
        self.check_shape(&if rank_dim == 0 { [rank, features] } else { [features, rank] })
    }

    /// # Errors
    /// When the shape is another.
    pub fn check_shape(&self, expected: &[usize]) -> Result<(), AdapterError> {
        if self.view.shape() == expected {
            return Ok(());
        }
        let reason = format!("has shape {:?}, the base needs {expected:?}", self.view.shape());
        Err(AdapterError::tensor(self.key, reason))
    }

    /// The elements, row-major, rounded to f16: that is what the kernels keep.
    ///
    /// # Errors
    /// When the type is none of F16, BF16 and F32, or a value is not finite or beyond the range of f16.
    pub fn f16_values(&self) -> Result<Vec<f16>, AdapterError> {
        let values = if self.view.dtype() == Dtype::F16 {
            let elements = self.view.data().as_chunks::<2>().0;
            elements.iter().map(|bytes| f16::from_le_bytes(*bytes)).collect()
        } else {
            let exact = self.elements()?;
            let mut values = vec![f16::ZERO; exact.len()];
            values.convert_from_f32_slice(&exact);
            values
        };
        // Without a branch for each, so that it takes many at a time.
        if values.iter().fold(true, |all, value| all & (value.to_bits() & 0x7fff < f16::INFINITY.to_bits())) {
            return Ok(values);
        }
        // What was beyond the range has become infinite: the file's own values tell the difference.
        let is_damaged = |value: &&f32| !(-f16::MAX.to_f32()..=f16::MAX.to_f32()).contains(*value);
        Err(self.refusal(self.elements()?.iter().find(is_damaged).copied().unwrap_or(f32::INFINITY)))
    }

    /// The elements, row-major.
    ///
    /// # Errors
    /// When the type is none of F16, BF16 and F32, or a value is not finite.
    pub fn f32_values(&self) -> Result<Vec<f32>, AdapterError> {
        let values = self.elements()?;
        match values.iter().find(|value| !value.is_finite()) {
            Some(value) => Err(self.refusal(*value)),
            None => Ok(values),
        }
    }

    fn elements(&self) -> Result<Vec<f32>, AdapterError> {
        let bytes = self.view.data();
        let two_bytes = bytes.as_chunks::<2>().0.iter();
        match self.view.dtype() {
            Dtype::F32 => Ok(bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect()),
            Dtype::F16 => Ok(two_bytes.map(|&b| f16::from_le_bytes(b)).collect::<Vec<_>>().to_f32_vec()),
            Dtype::BF16 => Ok(two_bytes.map(|&b| bf16::from_le_bytes(b)).collect::<Vec<_>>().to_f32_vec()),
            other => Err(AdapterError::tensor(self.key, format!("has type {other}; F16, BF16 and F32 are read"))),
        }
    }

    fn refusal(&self, value: f32) -> AdapterError {
        let reason = if value.is_finite() { "beyond the range of 16-bit floats" } else { "the weights are damaged" };
        AdapterError::tensor(self.key, format!("holds {value}: {reason}"))
    }
}
