//! The decoder of Llama and Qwen2: embedding, blocks of attention and gated feed-forward, norm, head.
//!
//! Written once, over a device that does the arithmetic.

use std::path::Path;

use kernels::device::{
    AdapterTier, Caller, Device, DeviceError, Layer, MatrixSource, Output, Peaks, Placement, StepLimits,
};
use kernels::step::{Group, Groups, Step};

use super::gguf::{GgufError, GgufFile};
use super::spec::{Architecture, ModelSpec, Module};
use super::tensors::Tensors;
use super::{AdapterGroup, ForwardBatch, Model};
use crate::adapter::canonical::Adapter;

/// A decoder resident on a device.
#[derive(Debug)]
pub struct Decoder<D: Device> {
    spec: ModelSpec,
    device: D,
    embedding: D::Embedding,
    blocks: Vec<Block<D>>,
    output_norm: D::Norm,
    head: D::Linear,
}

#[derive(Debug)]
struct Block<D: Device> {
    attention_norm: D::Norm,
    feed_forward_norm: D::Norm,
    /// `[Module as usize]`
    linears: [D::Linear; Module::ALL.len()],
}

const EMBEDDING: &str = "token_embd.weight";

impl<D: Device> Decoder<D> {
    /// Loads a GGUF file onto the device. `context_length` bounds the positions; at most the model's own.
    pub fn load(path: &Path, device: D, context_length: usize) -> Result<Self, GgufError> {
        let file = GgufFile::open(path)?;
        let mut spec = file.spec()?;
        spec.context_length = spec.context_length.min(context_length);
        Self::build(spec, file, device)
    }

    /// A decoder of these tensors.
    pub fn build(spec: ModelSpec, mut file: impl Tensors, mut device: D) -> Result<Self, GgufError> {
        device.prepare(&spec.shape()).map_err(|e| GgufError::Unsupported(e.to_string()))?;
        let (hidden, vocab) = (spec.hidden_size, spec.vocab_size);
        let mut blocks = Vec::new();
        for layer in 0..spec.num_layers {
            blocks.push(Block::load(&file, &mut device, &spec, layer)?);
            // What the device holds need not stay in memory as it was in the file too.
            file.release_pages();
        }
        // A model without a head of its own uses the embedding ("tied").
        let head = if file.has_tensor("output.weight") { "output.weight" } else { EMBEDDING };
        let head = load_linear(&file, &mut device, head, (vocab, hidden), None, None)?;
        let norm = "output_norm.weight";
        let output_norm = device.load_norm(file.vector(norm, hidden)?).map_err(in_tensor(norm))?;
        file.release_pages();
        let embedding = device.load_embedding(file.matrix_rows(EMBEDDING, (vocab, hidden))?);
        let embedding = embedding.map_err(in_tensor(EMBEDDING))?;
        Ok(Self { spec, device, embedding, blocks, output_norm, head })
    }

    /// Makes room for steps and for `num_blocks` KV blocks; what was in the KV store is lost.
    ///
    /// # Errors
    /// When the device's memory does not hold them.
    pub fn reserve(&mut self, limits: StepLimits, num_blocks: usize) -> Result<(), DeviceError> {
        self.device.reserve(limits, num_blocks)
    }

    pub fn device(&self) -> &D {
        &self.device
    }
}

/// Says which tensor the device refused.
fn in_tensor(name: &str) -> impl FnOnce(DeviceError) -> GgufError {
    let name = name.to_owned();
    move |source| GgufError::Device { name, source }
}

/// A linear layer of `shape` `(out, in)`; rows and bias in `row_order`, where there is one.
fn load_linear<D: Device>(
    file: &impl Tensors,
    device: &mut D,
    name: &str,
    shape: (usize, usize),
    row_order: Option<&[usize]>,
    bias: Option<Vec<f32>>,
) -> Result<D::Linear, GgufError> {
    let tensor = file.matrix(name, shape)?;
    let source = MatrixSource { weight_type: tensor.weight_type, shape, bytes: tensor.bytes, row_order };
    let bias = match (bias, row_order) {
        (Some(bias), Some(order)) => Some(order.iter().map(|&row| bias[row]).collect()),
        (bias, _) => bias,
    };
    device.load_linear(&source, bias).map_err(in_tensor(name))
}

impl<D: Device> Block<D> {
    fn load(file: &impl Tensors, device: &mut D, spec: &ModelSpec, layer: usize) -> Result<Self, GgufError> {
        let name = |part: &str| format!("blk.{layer}.{part}");
        let mut norm = |part: &str| {
            let name = name(part);
            device.load_norm(file.vector(&name, spec.hidden_size)?).map_err(in_tensor(&name))
        };
        let (attention_norm, feed_forward_norm) = (norm("attn_norm.weight")?, norm("ffn_norm.weight")?);
        let mut linear = |module: Module| {
            let part = gguf_name(module);
            let (in_features, out_features) = spec.module_shape(module);
            let bias_name = name(&format!("{part}.bias"));
            let bias = file.has_tensor(&bias_name).then(|| file.vector(&bias_name, out_features)).transpose()?;
            let (weight, order) = (name(&format!("{part}.weight")), hugging_face_rows(spec, module));
            load_linear(file, device, &weight, (out_features, in_features), order.as_deref(), bias)
        };
        let [q, k, v, o, gate, up, down] = Module::ALL.map(&mut linear);
        let linears = [q?, k?, v?, o?, gate?, up?, down?];
        Ok(Self { attention_norm, feed_forward_norm, linears })
    }

    fn layer(&self, module: Module, output: Output) -> Layer<'_, D> {
        Layer { linear: &self.linears[module as usize], module: module as usize, output }
    }

    fn forward(&self, device: &mut D, step: &Step<'_>, number: usize) -> Result<(), DeviceError> {
        device.add_norm(step, &self.attention_norm, number > 0)?;
        let q = self.layer(Module::QProj, Output::Q);
        let k = self.layer(Module::KProj, Output::K);
        let v = self.layer(Module::VProj, Output::V);
        device.linears(step, number, [q, k, v])?;
        device.rotate_and_store(step, number)?;
        device.attend(step, number)?;
        device.linears(step, number, [self.layer(Module::OProj, Output::Residual)])?;
        device.add_norm(step, &self.feed_forward_norm, true)?;
        let gate = self.layer(Module::GateProj, Output::Gate);
        let up = self.layer(Module::UpProj, Output::Up);
        device.linears(step, number, [gate, up])?;
        device.swiglu(step)?;
        device.linears(step, number, [self.layer(Module::DownProj, Output::Residual)])
    }
}

impl<D: Device> Model for Decoder<D> {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn num_kv_blocks(&self) -> usize {
        self.device.num_kv_blocks()
    }

    fn place(&mut self, adapter: &Adapter) -> Result<Placement, DeviceError> {
        self.device.place(&adapter.generation, &adapter.weights, adapter.manifest.pin)
    }

    fn bring_adapters(&mut self) -> bool {
        self.device.bring_adapters()
    }

    fn adapter_tier(&self) -> Option<AdapterTier> {
        self.device.adapter_tier()
    }

    fn weight_bytes(&self) -> usize {
        self.blocks.iter().flat_map(|block| &block.linears).chain([&self.head]).map(D::linear_bytes).sum()
    }

    fn measure_peaks(&self) -> Result<Option<Peaks>, DeviceError> {
        self.device.measure_peaks()
    }

    fn forward(&mut self, batch: &ForwardBatch<'_>, caller: &mut dyn Caller) -> Result<(), DeviceError> {
        let ForwardBatch { copies, tokens, sequences, groups, logits_rows } = *batch;
        let get = |group: usize| {
            let AdapterGroup { rows, adapter } = &groups[group];
            Group { rows: rows.clone(), generation: &adapter.generation, weights: &adapter.weights }
        };
        let step = Step { copies, tokens, sequences, groups: Groups { count: groups.len(), get: &get }, logits_rows };
        let Self { device, embedding, blocks, output_norm, head, .. } = self;
        if !D::IS_BESIDE_HOST {
            caller.meanwhile();
        }
        device.begin(&step, embedding)?;
        for (number, block) in blocks.iter().enumerate() {
            block.forward(device, &step, number)?;
        }
        device.logits(&step, output_norm, head, caller)
    }
}

pub(super) fn gguf_name(module: Module) -> &'static str {
    match module {
        Module::QProj => "attn_q",
        Module::KProj => "attn_k",
        Module::VProj => "attn_v",
        Module::OProj => "attn_output",
        Module::GateProj => "ffn_gate",
        Module::UpProj => "ffn_up",
        Module::DownProj => "ffn_down",
    }
}

/// Which row of the file holds each row of the Hugging Face model.
///
/// GGUF files of architecture `llama` interleave the two halves of every query and key head (llama.cpp's
/// `convert_hf_to_gguf.py`, `permute`): row `2i + j` of a head is Hugging Face's row `j·head_dim/2 + i`. Putting the rows
/// back at load lets adapters apply as they are, and leaves one rotary order for all architectures.
pub(super) fn hugging_face_rows(spec: &ModelSpec, module: Module) -> Option<Vec<usize>> {
    let permuted = spec.architecture == Architecture::Llama && matches!(module, Module::QProj | Module::KProj);
    permuted.then(|| {
        let (head_dim, half) = (spec.head_dim, spec.head_dim / 2);
        let (_, out_features) = spec.module_shape(module);
        (0..out_features)
            .map(|row| {
                let (head, at) = (row / head_dim, row % head_dim);
                head * head_dim + at % half * 2 + at / half
            })
            .collect()
    })
}
