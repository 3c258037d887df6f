//! The tiny models of `reference.json`, as files.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;
use std::sync::LazyLock;

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use safetensors::tensor::{Dtype, TensorView, serialize};
use serde::Deserialize;
use serde_json::{Value as Json, json};

use crate::tiny::{Loaded, Place};

#[derive(Deserialize)]
pub struct Reference {
    pub tokens: Vec<u32>,
    /// Whose logits are kept.
    pub positions: Vec<usize>,
    pub families: Vec<Family>,
}

#[derive(Deserialize)]
pub struct Family {
    pub name: String,
    pub architecture: String,
    pub metadata: BTreeMap<String, Json>,
    /// `config.json` of the same model.
    pub config: Json,
    pub tensors: BTreeMap<String, Drawn>,
    pub logits: Vec<f32>,
    pub adapters: Vec<PeftCase>,
    pub variants: Vec<Variant>,
}

/// A file that says something else than its family's.
#[derive(Deserialize)]
pub struct Variant {
    pub name: String,
    pub metadata: BTreeMap<String, Json>,
    pub config: Json,
    pub tensors: BTreeMap<String, Drawn>,
    pub without: Vec<String>,
    pub logits: Vec<f32>,
}

#[derive(Deserialize)]
pub struct PeftCase {
    pub kind: String,
    pub config: Json,
    pub tensors: BTreeMap<String, Drawn>,
    pub logits: Vec<f32>,
}

/// A tensor drawn from its name, or of these values.
#[derive(Deserialize, Clone)]
pub struct Drawn {
    pub shape: Vec<usize>,
    /// The parameter of transformers that it is, where it is one; `{}` stands for the number of an expert.
    pub parameter: Option<String>,
    /// Its name, unless it is said.
    pub drawn_as: Option<String>,
    #[serde(default)]
    pub mean: f32,
    #[serde(default)]
    pub step: f32,
    #[serde(default)]
    pub blocks: Option<bool>,
    pub values: Option<Vec<f32>>,
}

pub static REFERENCE: LazyLock<Reference> =
    LazyLock::new(|| serde_json::from_str(include_str!("reference.json")).unwrap());

/// Whole numbers in -127..=127: splitmix64, seeded with the FNV-1a hash of the name.
fn draw(name: &str, count: usize) -> Vec<i32> {
    let hash = |state: u64, byte: u8| (state ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    let mut state = name.bytes().fold(0xcbf2_9ce4_8422_2325, hash);
    let mut number = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ z >> 31) >> 40) as i32 % 255 - 127
    };
    (0..count).map(|_| number()).collect()
}

impl Drawn {
    pub fn values(&self, name: &str) -> Vec<f32> {
        if let Some(values) = &self.values {
            return values.clone();
        }
        let mut numbers = draw(self.drawn_as.as_deref().unwrap_or(name), self.shape.iter().product());
        if self.shape.len() > 1 && self.blocks != Some(false) {
            // Every block of Q8_0 has a number of the greatest size, so that its scale is the step.
            numbers.iter_mut().step_by(32).for_each(|number| *number = if *number < 0 { -127 } else { 127 });
        }
        numbers.into_iter().map(|number| number as f32 * self.step + self.mean).collect()
    }
}

fn metadata_value(value: &Json) -> Value {
    match value {
        Json::Bool(flag) => Value::Bool(*flag),
        Json::String(text) => Value::String(text.clone()),
        Json::Number(number) if number.is_u64() => Value::U32(number.as_u64().unwrap() as u32),
        Json::Number(number) => Value::F32(number.as_f64().unwrap() as f32),
        other => panic!("{other} is no metadata of these tests"),
    }
}

/// A GGUF file before it is written.
#[derive(Clone)]
pub struct Model {
    pub architecture: String,
    pub metadata: BTreeMap<String, Value>,
    pub tensors: BTreeMap<String, Drawn>,
}

impl Model {
    pub fn of(family: &Family) -> Self {
        let mut model = Self {
            architecture: family.architecture.clone(),
            metadata: BTreeMap::new(),
            tensors: family.tensors.clone(),
        };
        family.metadata.iter().for_each(|(key, value)| model.set(key, metadata_value(value)));
        model
    }

    pub fn with(mut self, variant: &Variant) -> Self {
        variant.metadata.iter().for_each(|(key, value)| self.set(key, metadata_value(value)));
        self.tensors.extend(variant.tensors.clone());
        self.tensors.retain(|name, _| !variant.without.contains(name));
        self
    }

    pub fn set(&mut self, key: &str, value: Value) {
        self.metadata.insert(format!("{}.{key}", self.architecture), value);
    }

    pub fn unset(&mut self, key: &str) {
        self.metadata.remove(&format!("{}.{key}", self.architecture));
    }

    pub fn write(&self, path: &Path, dtype: GgmlDType) {
        let quantized = |(name, drawn): (&String, &Drawn)| {
            let values = Tensor::from_vec(drawn.values(name), drawn.shape.as_slice(), &Device::Cpu).unwrap();
            // Routers are never quantized.
            let is_whole = drawn.shape.len() == 1 || name.contains("ffn_gate_inp");
            let dtype = if is_whole { GgmlDType::F32 } else { dtype };
            (name.clone(), QTensor::quantize(&values, dtype).unwrap())
        };
        let tensors: Vec<(String, QTensor)> = self.tensors.iter().map(quantized).collect();
        let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        let architecture = Value::String(self.architecture.clone());
        let mut metadata: Vec<_> = self.metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
        metadata.push(("general.architecture", &architecture));
        gguf_file::write(&mut File::create(path).unwrap(), &metadata, &tensors).unwrap();
    }

    pub fn load(&self, dtype: GgmlDType, place: Place) -> Result<Box<dyn Loaded>, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tiny.gguf");
        self.write(&path, dtype);
        place.load(&path, usize::MAX).map_err(|e| e.to_string())
    }
}

/// Writes the checkpoint that transformers would save of a family's tensors.
pub fn write_checkpoint(folder: &Path, family: &Family, config: &Json, without: &[String]) {
    let is_interleaved = ["llama", "smollm3", "granite"].contains(&family.name.as_str());
    let adds_one = family.name.starts_with("gemma");
    let tensors = family.tensors.iter().filter(|(name, _)| !without.contains(name)).map(|(name, drawn)| {
        let mut values = drawn.values(name);
        if adds_one && name.ends_with("norm.weight") {
            values.iter_mut().for_each(|value| *value -= 1.0);
        }
        if is_interleaved && (name.ends_with("attn_q.weight") || name.ends_with("attn_k.weight")) {
            let (columns, head_dim) = (drawn.shape[1], config["head_dim"].as_u64().unwrap() as usize);
            // Row 2i + j of a head in the file is row j · head_dim/2 + i of the model.
            let row = |row: usize| row / head_dim * head_dim + row % 2 * head_dim / 2 + row % head_dim / 2;
            let file = values.clone();
            for (at, rows) in file.chunks(columns).enumerate() {
                values[row(at) * columns..][..columns].copy_from_slice(rows);
            }
        }
        let bytes = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
        let parameter = drawn.parameter.clone().unwrap();
        if !parameter.contains("{}") {
            return vec![(parameter, drawn.shape.clone(), bytes(&values))];
        }
        let experts = values.chunks(values.len() / drawn.shape[0]).enumerate();
        let expert = |(number, values)| {
            (parameter.replace("{}", &format!("{number}")), drawn.shape[1..].to_vec(), bytes(values))
        };
        experts.map(expert).collect()
    });
    let tensors: Vec<_> = tensors.flatten().collect();
    let views =
        tensors.iter().map(|(name, shape, bytes)| (name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
    fs::write(folder.join("model.safetensors"), serialize(views, None).unwrap()).unwrap();
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let pre_tokenizer =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let tokenizer = json!({"pre_tokenizer": pre_tokenizer, "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}});
    fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
}
