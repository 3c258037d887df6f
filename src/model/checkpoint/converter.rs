//! The tensors of a checkpoint, one by one, as those of a GGUF file.

use std::collections::BTreeMap;
use std::sync::Mutex;

use candle_core::quantized::QTensor;
use candle_core::{DType, Tensor};

use super::CheckpointError;
use super::config::Config;
use super::family::{ROUTER, expert_number};
use super::matrix::{Form, Matrix};
use super::prequantized::Prequantized;
use super::quantize::{self, Quantization};
use super::shards::Shards;
use crate::model::base_weights::HEAD_TENSOR;

const EMBEDDING: &str = "model.embed_tokens";
const HEAD: &str = "lm_head";

pub struct Converter<'a> {
    config: &'a Config,
    shards: &'a Shards,
    prequantized: &'a Prequantized<'a>,
    quantization: Quantization,
    /// How many matrices that the checkpoint had quantized became what.
    fates: Mutex<BTreeMap<String, usize>>,
}

impl<'a> Converter<'a> {
    pub fn new(
        config: &'a Config,
        shards: &'a Shards,
        prequantized: &'a Prequantized<'a>,
        quantization: Quantization,
    ) -> Self {
        Self { config, shards, prequantized, quantization, fates: Mutex::default() }
    }

    /// What became of the matrices that the checkpoint had quantized; `None` without any.
    pub fn fates(&self) -> Option<String> {
        let fates: Vec<String> = lock(&self.fates).iter().map(|(fate, count)| format!("{count} {fate}")).collect();
        (!fates.is_empty()).then(|| fates.join(", "))
    }

    /// Every tensor of the checkpoint under GGUF's name, on all cores.
    pub fn all(&self) -> Result<Vec<(String, QTensor)>, CheckpointError> {
        let mut named: BTreeMap<String, Vec<&str>> = BTreeMap::new();
        for name in self.shards.names() {
            if let Some(gguf) = self.gguf_name(name)? {
                named.entry(gguf).or_default().push(name);
            }
        }
        if self.config.ties_embedding == Some(false) && !named.contains_key(HEAD_TENSOR) {
            let reason = "tie_word_embeddings: false, and the checkpoint has no lm_head.weight: copy it whole";
            return Err(CheckpointError::file("config.json", reason));
        }
        let (left, done) = (Mutex::new(named.into_iter()), Mutex::new(Ok(Vec::new())));
        std::thread::scope(|scope| {
            for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
                scope.spawn(|| {
                    loop {
                        let Some((gguf, names)) = lock(&left).next() else { return };
                        let packed = self.convert(&names).map(|tensor| (gguf, tensor));
                        let mut done = lock(&done);
                        match (&mut *done, packed) {
                            (Ok(tensors), Ok(packed)) => tensors.push(packed),
                            (Ok(_), Err(e)) => *done = Err(e),
                            (Err(_), _) => return,
                        }
                    }
                });
            }
        });
        let mut tensors = done.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner)?;
        tensors.sort_by(|(a, _), (b, _)| a.cmp(b));
        Ok(tensors)
    }

    /// `None` for what a decoder does not need.
    fn gguf_name(&self, name: &str) -> Result<Option<String>, CheckpointError> {
        let has_place = || {
            let is_quantized = [".qweight", ".qzeros", ".scales", ".g_idx"].iter().any(|part| name.ends_with(part));
            CheckpointError::tensor(
                name,
                match is_quantized && !self.prequantized.is_quantized() {
                    true => "is of a quantized matrix, and config.json has no quantization_config that says how",
                    false => "has no place in this family of models",
                },
            )
        };
        if name.ends_with(".rotary_emb.inv_freq") {
            return Ok(None);
        }
        let (module, part) = split(name).ok_or_else(has_place)?;
        if module == HEAD && self.config.ties_embedding == Some(true) {
            let embedding = format!("{EMBEDDING}.weight");
            // Versions of transformers differ in which of two they take.
            if part == "weight" && self.shards.contains(&embedding) && !self.shards.are_same(name, &embedding) {
                let reason = format!("is another matrix than {embedding}, and config.json says tie_word_embeddings");
                return Err(CheckpointError::tensor(name, reason));
            }
            return Ok(None);
        }
        let gguf = self.config.family.gguf_module(module).ok_or_else(has_place)?;
        if self.prequantized.is_part(part) || self.prequantized.is_empty_bias(module, part)? {
            return Ok(None);
        }
        match part {
            "bias" if !self.config.has_bias(module) => {
                Err(CheckpointError::tensor(name, "is there, and by config.json this layer has no bias"))
            }
            "weight" | "bias" => Ok(Some(format!("{gguf}.{part}"))),
            part if self.prequantized.is_main_part(part) => Ok(Some(format!("{gguf}.weight"))),
            _ => Err(has_place()),
        }
    }

    /// The tensor that these become: one, or as many as there are experts.
    fn convert(&self, names: &[&str]) -> Result<QTensor, CheckpointError> {
        let [name, rest @ ..] = names else { return Err(CheckpointError::tensor("", "has no source")) };
        let module = module_of(name);
        if expert_number(module).is_some() {
            return self.convert_experts(names);
        }
        if let Some(other) = rest.first() {
            return Err(CheckpointError::tensor(other, format!("belongs where {name} does")));
        }
        let in_tensor = |e: candle_core::Error| CheckpointError::tensor(name, e);
        let tensor = self.shards.tensor(name)?;
        if tensor.rank() == 1 {
            let vector = if self.config.family.adds_one(name) {
                tensor.to_dtype(DType::F32).and_then(|weight| weight + 1.0)
            } else {
                self.in_gguf_order(module, tensor)
            };
            return vector.and_then(|vector| quantize::keep(&vector)).map_err(in_tensor);
        }
        let matrix =
            self.matrix(name, tensor)?.with_rows(|rows| self.in_gguf_order(module, rows)).map_err(in_tensor)?;
        // What is small and decides is kept whole.
        if self.config.family.gguf_module(module).is_some_and(|gguf| gguf.ends_with(ROUTER)) {
            return matrix.weights.to_dtype(DType::F32).and_then(|matrix| quantize::keep(&matrix)).map_err(in_tensor);
        }
        let is_vocabulary = [EMBEDDING, HEAD].contains(&module);
        let quantization = if is_vocabulary { self.quantization.of_vocabulary() } else { self.quantization };
        self.pack(matrix, quantization).map_err(in_tensor)
    }

    /// One projection of all experts of a layer, in the order of their numbers: `[experts, out, in]`.
    fn convert_experts(&self, names: &[&str]) -> Result<QTensor, CheckpointError> {
        let mut matrices: BTreeMap<usize, Matrix> = BTreeMap::new();
        for name in names {
            let matrix = self.matrix(name, self.shards.tensor(name)?)?;
            matrices.extend(expert_number(module_of(name)).map(|number| (number, matrix)));
        }
        let count = self.config.num_experts.unwrap_or(0);
        if names.len() != count || !matrices.keys().copied().eq(0..count) {
            let reason = format!("is one of {}, and the configuration says {count} experts", names.len());
            return Err(CheckpointError::tensor(names[0], reason));
        }
        let stack = Matrix::stack(matrices.into_values().collect());
        let packed = stack.and_then(|stack| self.pack(stack, self.quantization));
        packed.map_err(|e| CheckpointError::tensor(names[0], e))
    }

    fn pack(&self, matrix: Matrix, quantization: Quantization) -> candle_core::Result<QTensor> {
        let (packed, fate) = matrix.pack(quantization)?;
        if let Some(fate) = fate {
            *lock(&self.fates).entry(fate).or_default() += 1;
        }
        Ok(packed)
    }

    /// A matrix, dequantized if another program has quantized it.
    fn matrix(&self, name: &str, tensor: Tensor) -> Result<Matrix, CheckpointError> {
        let (module, part) = split(name).unwrap_or((name, ""));
        let is_float = tensor.dtype().is_float() && tensor.dtype() != DType::F8E4M3;
        let shape = self.config.matrix_shape(module);
        if !is_float || part != "weight" {
            let refuse = || format!("has the type {:?}, which is not that of weights", tensor.dtype());
            return match shape {
                Some(shape) if self.prequantized.is_main_part(part) => self.prequantized.matrix(module, shape),
                _ => Err(CheckpointError::tensor(name, refuse())),
            };
        }
        self.prequantized.refuse_parts_of(module)?;
        match shape {
            Some((rows, columns)) if tensor.dims() != [rows, columns] => {
                let reason = format!("is {:?}, and config.json says {:?}", tensor.dims(), [rows, columns]);
                Err(CheckpointError::tensor(name, reason))
            }
            _ => Ok(Matrix { weights: tensor, form: Form::Floats }),
        }
    }

    /// The rows in GGUF's order. Files of some architectures interleave the two halves of every query and key head: row
    /// `2i + j` of a head there is row `j·head_dim/2 + i` here (llama.cpp's `convert_hf_to_gguf.py`, `permute`).
    fn in_gguf_order(&self, module: &str, tensor: Tensor) -> candle_core::Result<Tensor> {
        if !self.config.family.interleaves(module) {
            return Ok(tensor);
        }
        let (shape, half) = (tensor.shape().clone(), self.config.head_dim / 2);
        let heads = shape.dims()[0] / (2 * half).max(1);
        tensor.reshape((heads, 2, half, ()))?.transpose(1, 2)?.contiguous()?.reshape(shape)
    }
}

/// Module and part of a tensor's name: of a quantized matrix, `weight.absmax` is a part as `scales` is.
fn split(name: &str) -> Option<(&str, &str)> {
    match name.find(".weight.") {
        Some(dot) => Some((&name[..dot], &name[dot + 1..])),
        None => name.rsplit_once('.'),
    }
}

fn module_of(name: &str) -> &str {
    split(name).map_or(name, |(module, _)| module)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
