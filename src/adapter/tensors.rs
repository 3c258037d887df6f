//! The tensors of an adapter's file: taken by key, checked, and turned into numbers.

use std::collections::BTreeMap;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use safetensors::SafeTensorError;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use super::error::AdapterError;
use super::sites::{EMBEDDING_PATH, HEAD_PATH, module_path};
use super::tensor_names::TensorName;
use crate::model::spec::{ModelSpec, Module};
use crate::model::{BaseWeights, VocabularyMatrix};

/// DeepSpeed leaves every process a part of each tensor, and of most of them nothing.
const EMPTY: &str = "has no elements: under DeepSpeed ZeRO-3 each process holds a part of the weights only; gather them \
                     before saving (stage3_gather_16bit_weights_on_model_save), or use zero_to_fp32.py";

const NO_SITE: &str = "finds no site in the base";

/// What an adapter has of a linear layer for each of its outputs.
const OUTPUT_TENSORS: [&str; 6] =
    ["lora_B.weight", "lora_B.bias", "lora_magnitude_vector", "lora_B", "vera_lambda_b", IA3];
/// What it has of one for its inputs or for the ranks, or whose outputs are no rows.
const WHOLE_TENSORS: [&str; 5] = ["lora_A.weight", "lora_A", "lora_E", "vera_lambda_d", "miss_block"];
const IA3: &str = "ia3_l";

/// The pair that all layers of a VeRA share.
pub const VERA_A: &str = "base_model.vera_A";
pub const VERA_B: &str = "base_model.vera_B";

/// What PEFT puts around a layer of the base that it does not train.
const BASE_LAYER: &str = "base_layer";
const ORIGINAL_MODULE: &str = "original_module";

/// Error of the base's own rows in a file of so many bits for each weight, of their norm: twice what rounding leaves (0.09 in Q4_0,
/// 0.005 in Q8_0), and what an adapter's own 16 bits do. Rows of another model are off by more than their norm.
fn max_base_error(bits: f64) -> f64 {
    (4.0 * (-bits).exp2() + 0.01).min(0.5)
}
/// How much more that may be in one row than in all of them.
const MAX_ROW_ERROR: f64 = 2.0;

/// From here on the largest of some weights loses nothing in f16, and those much smaller than it nothing that matters beside it.
const MIN_LARGEST: f32 = 1.0 / 64.0;

/// The power of two that divides weights into the range of f16, of which the largest is `largest`; 1 where they are in it.
fn half_scale(largest: f32) -> f32 {
    const EXPONENT: u32 = 0x7f80_0000;
    if largest == 0.0 || (MIN_LARGEST..=f16::MAX.to_f32()).contains(&largest) {
        return 1.0;
    }
    f32::from_bits(largest.max(f32::MIN_POSITIVE).to_bits() & EXPONENT)
}

/// Numbers that are finite as f16 holds them best, and the power of two that they are to be multiplied by.
pub fn scaled_f16(mut exact: Vec<f32>) -> (Vec<f16>, f32) {
    let scale = half_scale(exact.iter().fold(0.0, |largest, value| value.abs().max(largest)));
    if scale != 1.0 {
        exact.iter_mut().for_each(|value| *value /= scale);
    }
    let mut values = vec![f16::ZERO; exact.len()];
    values.convert_from_f32_slice(&exact);
    (values, scale)
}

/// The tensors that have not found their place yet, by their [`TensorName::canonical`].
#[derive(Debug)]
pub struct Tensors<'a>(BTreeMap<String, NamedTensor<'a>>);

impl<'a> Tensors<'a> {
    /// # Errors
    /// When there are none, two belong to one place, they are of several adapters, or one has no elements, unless it `may_be_empty`.
    pub fn of(file: &'a SafeTensors<'a>, may_be_empty: bool) -> Result<Self, AdapterError> {
        if file.is_empty() {
            return Err(AdapterError::NoTensors);
        }
        let mut tensors: BTreeMap<String, NamedTensor<'a>> = BTreeMap::new();
        let mut adapter = None;
        for (key, view) in file.iter() {
            if view.shape().contains(&0) && !may_be_empty {
                return Err(AdapterError::tensor(key, EMPTY));
            }
            let name = TensorName::parse(key);
            if let (Some(one), Some(other)) = (adapter, name.adapter)
                && one != other
            {
                return Err(AdapterError::tensor(key, format!("the file holds two adapters, {one:?} and {other:?}")));
            }
            adapter = adapter.or(name.adapter);
            if let Some(other) = tensors.get(&name.canonical) {
                return Err(AdapterError::tensor(key, format!("belongs where {:?} does", other.key)));
            }
            tensors.insert(name.canonical, NamedTensor { key, view });
        }
        Ok(Self(tensors))
    }

    /// Gives each module of the base its own tensors where the base's layers hold several modules, or call one otherwise: a fused
    /// layer's A belongs to all of them, and of B, biases and scales each has its rows.
    ///
    /// # Errors
    /// When a tensor has another number of rows than the base's layer.
    pub fn take_apart(&mut self, spec: &ModelSpec) -> Result<(), AdapterError> {
        for layer in 0..spec.num_layers {
            let other_names = |module: &Module| spec.module_path(layer, *module) != module_path(layer, *module);
            let modules: Vec<Module> = spec.modules().filter(other_names).collect();
            for name in WHOLE_TENSORS.into_iter().chain(OUTPUT_TENSORS) {
                for (i, module) in modules.iter().enumerate() {
                    let path = spec.module_path(layer, *module);
                    let is_last = modules[i + 1..].iter().all(|later| spec.module_path(layer, *later) != path);
                    let key = format!("{path}.{name}");
                    let Some(whole) = self.0.get(&key) else { continue };
                    let (rows, (_, count)) = (spec.file_rows(*module), spec.module_shape(*module));
                    let part = match whole.view.shape() {
                        _ if WHOLE_TENSORS.contains(&name) => whole.clone(),
                        // (IA)³ of the inputs.
                        [1, _] if name == IA3 => whole.clone(),
                        _ => whole.rows(rows.first_row, count, rows.num_rows)?,
                    };
                    let key_of_part = format!("{}.{name}", module_path(layer, *module));
                    if let Some(other) = self.0.insert(key_of_part, part) {
                        return Err(AdapterError::tensor(other.key, NO_SITE));
                    }
                    if is_last {
                        self.0.remove(&key);
                    }
                }
            }
        }
        Ok(())
    }

    pub fn take(&mut self, key: &str) -> Option<NamedTensor<'a>> {
        self.0.remove(key)
    }

    /// The tensor `name` of the module at a path, e.g. `lora_A.weight`.
    pub fn take_of(&mut self, path: &str, name: &str) -> Option<NamedTensor<'a>> {
        self.take(&format!("{path}.{name}"))
    }

    /// Leaves out the base's own embedding and head, which PEFT saves beside an adapter of either; gives their names.
    /// `replaces_head` is whether the file's head is one of the adapter's.
    ///
    /// # Errors
    /// When such a matrix is not the base's.
    pub fn leave_out_base(
        &mut self,
        base: &dyn BaseWeights,
        replaces_head: bool,
    ) -> Result<Vec<&'a str>, AdapterError> {
        let mut left_out = Vec::new();
        for (matrix, path) in [(VocabularyMatrix::Embedding, EMBEDDING_PATH), (VocabularyMatrix::Head, HEAD_PATH)] {
            let is_plain_own = !(replaces_head && matrix == VocabularyMatrix::Head);
            let plain = is_plain_own.then(|| format!("{path}.weight"));
            let wrapped = [BASE_LAYER, ORIGINAL_MODULE].map(|within| format!("{path}.{within}.weight"));
            for name in wrapped.into_iter().chain(plain) {
                if let Some(tensor) = self.take(&name) {
                    tensor.check_is_base(base, matrix)?;
                    left_out.push(tensor.key);
                }
            }
        }
        Ok(left_out)
    }

    /// # Errors
    /// When tensors are left, which the server would not apply; names the first.
    pub fn refuse_rest(self) -> Result<(), AdapterError> {
        match self.0.values().next() {
            Some(tensor) => Err(AdapterError::tensor(tensor.key, NO_SITE)),
            None => Ok(()),
        }
    }
}

/// A tensor under the name it has in the file.
#[derive(Debug, Clone)]
pub struct NamedTensor<'a> {
    pub key: &'a str,
    view: TensorView<'a>,
}

impl<'a> NamedTensor<'a> {
    /// `count` rows of `num_rows`, from row `first` on.
    fn rows(&self, first: usize, count: usize, num_rows: usize) -> Result<Self, AdapterError> {
        let shape = self.view.shape();
        if shape.first() != Some(&num_rows) {
            let reason = format!("has shape {shape:?}, the base's layer has {num_rows} outputs");
            return Err(AdapterError::tensor(self.key, reason));
        }
        let row_bytes = self.view.data().len() / num_rows;
        let rows = &self.view.data()[first * row_bytes..][..count * row_bytes];
        let shape = [&[count], &shape[1..]].concat();
        let wrong = |e: SafeTensorError| AdapterError::tensor(self.key, e.to_string());
        Ok(Self { key: self.key, view: TensorView::new(self.view.dtype(), shape, rows).map_err(wrong)? })
    }
}

impl NamedTensor<'_> {
    pub fn shape(&self) -> &[usize] {
        self.view.shape()
    }

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

    /// # Errors
    /// When this is not `matrix` of the base, as far as its quantization lets one see.
    fn check_is_base(&self, base: &dyn BaseWeights, matrix: VocabularyMatrix) -> Result<(), AdapterError> {
        let (vocab_size, hidden_size) = (base.spec().vocab_size, base.spec().hidden_size);
        if self.view.shape() != [vocab_size, hidden_size] {
            let reason = format!(
                "has shape {:?}, the base's is [{vocab_size}, {hidden_size}]: an adapter cannot change the vocabulary",
                self.view.shape()
            );
            return Err(AdapterError::tensor(self.key, reason));
        }
        let row_bytes = self.view.data().len() / vocab_size;
        let mut row = vec![0.0; hidden_size];
        // Squared, of each row and of all.
        let (mut rows, mut error, mut norm) = (Vec::with_capacity(vocab_size), 0.0, 0.0);
        for token in 0..vocab_size {
            base.dequantize_token(matrix, token, &mut row);
            let saved = self.elements_of(&self.view.data()[token * row_bytes..][..row_bytes])?;
            let of_row: f64 = saved.iter().zip(&row).map(|(saved, own)| f64::from(saved - own).powi(2)).sum();
            let own: f64 = row.iter().map(|own| f64::from(*own).powi(2)).sum();
            rows.push((of_row, own));
            error += of_row;
            norm += own;
        }
        let most = max_base_error(base.bits_per_weight(matrix)).powi(2);
        // A token that nobody uses may have a row of next to nothing, of which nothing is left.
        let usual = norm / vocab_size as f64;
        let is_base_row = |(error, own): &(f64, f64)| *error <= most * MAX_ROW_ERROR.powi(2) * own.max(usual);
        // Not the other way round: what is not a number is not the base's.
        if error <= most * norm && rows.iter().all(is_base_row) {
            return Ok(());
        }
        let reason = "is not the base's own, and adapter_config.json does not name it in modules_to_save: it was trained \
                      on another base, or saved by a program that trained it besides";
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

    /// The elements of one of a pair, as f16 holds them best, row-major, and the power of two that their scale is to be multiplied
    /// by: weights that are all small, under a large alpha, would be rounded to nothing.
    ///
    /// # Errors
    /// When the type is none of F16, BF16 and F32, or a value is not finite.
    pub fn scaled_f16_values(&self) -> Result<(Vec<f16>, f32), AdapterError> {
        if self.view.dtype() == Dtype::F16 {
            return self.f16_values().map(|values| (values, 1.0));
        }
        self.f32_values().map(scaled_f16)
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
        self.elements_of(self.view.data())
    }

    /// Those of a part of the tensor, `bytes`.
    fn elements_of(&self, bytes: &[u8]) -> Result<Vec<f32>, AdapterError> {
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
