//! The decoder of every family: embedding, blocks of attention and feed-forward, norm, head.
//!
//! Written once, over a device that does the arithmetic; what differs between families is data of the specification.

use std::path::Path;

use kernels::attention::KvStore;
use kernels::device::{
    AdapterTier, Caller, Device, DeviceError, Layer, MatrixSource, Output, Peaks, Placement, StepLimits,
};
use kernels::step::{Group, Groups, Step};

use super::base_weights::{EMBEDDING_TENSOR, HEAD_TENSOR};
use super::gguf::{GgufError, GgufFile, RawTensor};
use super::spec::{FileRows, ModelSpec, Module, Projection};
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
    /// Of queries and keys.
    head_norms: Option<[D::Norm; 2]>,
    /// After attention, and after the feed-forward.
    residual_norms: Option<[D::Norm; 2]>,
    scales_residuals: bool,
    /// q, k, v and o.
    attention: [D::Linear; Module::ATTENTION.len()],
    feed_forward: FeedForward<D>,
}

#[derive(Debug)]
enum FeedForward<D: Device> {
    Plain {
        gate: Option<D::Linear>,
        up: D::Linear,
        down: D::Linear,
    },
    Experts {
        router: D::Linear,
        /// Their gates, ups and downs.
        experts: [D::Stack; 3],
    },
}

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
        device.prepare(&spec.shape(), &spec.attention_plan()).map_err(GgufError::NotOnDevice)?;
        let (hidden, vocab) = (spec.hidden_size, spec.vocab_size);
        let mut blocks = Vec::new();
        for layer in 0..spec.num_layers {
            blocks.push(Block::load(&file, &mut device, &spec, layer)?);
            // What the device holds need not stay in memory as it was in the file too.
            file.release_pages();
        }
        // A model without a head of its own uses the embedding ("tied").
        let head = if file.has_tensor(HEAD_TENSOR) { HEAD_TENSOR } else { EMBEDDING_TENSOR };
        let all_rows = FileRows { part: head, num_matrices: None, num_rows: vocab, first_row: 0 };
        let head = load_linear(&file, &mut device, head, &all_rows, (vocab, hidden), None, None)?;
        // Whatever scales the logits scales what the head reads, adapters of the head included.
        let output_norm = load_norm(&file, &mut device, "output_norm", hidden, &spec, spec.features.logit_scale)?;
        file.release_pages();
        let embedding = device.load_embedding(file.matrix_rows(EMBEDDING_TENSOR, &[vocab, hidden])?);
        let embedding = embedding.map_err(in_tensor(EMBEDDING_TENSOR))?;
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

/// A norm of `width`, its weight and bias times `scale`.
fn load_norm<D: Device>(
    file: &impl Tensors,
    device: &mut D,
    name: &str,
    width: usize,
    spec: &ModelSpec,
    scale: f32,
) -> Result<D::Norm, GgufError> {
    let scaled = |part: &str| -> Result<Vec<f32>, GgufError> {
        let values = file.vector(&format!("{name}.{part}"), width)?;
        Ok(values.into_iter().map(|value| value * scale).collect())
    };
    let weight = scaled("weight")?;
    let bias = spec.features.centers_norms.then(|| scaled("bias")).transpose()?;
    device.load_norm(weight, bias).map_err(in_tensor(name))
}

/// A linear layer of `shape` `(out, in)` out of the tensor `name`; rows and bias in `row_order`, where there is one.
fn load_linear<D: Device>(
    file: &impl Tensors,
    device: &mut D,
    name: &str,
    rows: &FileRows,
    shape: (usize, usize),
    row_order: Option<&[usize]>,
    bias: Option<Vec<f32>>,
) -> Result<D::Linear, GgufError> {
    let RawTensor { weight_type, bytes, .. } = file.matrix(name, &rows.shape(shape.1))?;
    let row_bytes = bytes.len() / (rows.num_matrices.unwrap_or(1) * rows.num_rows).max(1);
    let bytes = &bytes[rows.first_row * row_bytes..][..shape.0 * row_bytes];
    let source = MatrixSource { weight_type, shape, bytes, row_order };
    let bias = match (bias, row_order) {
        (Some(bias), Some(order)) => Some(order.iter().map(|&row| bias[row]).collect()),
        (bias, _) => bias,
    };
    device.load_linear(&source, bias).map_err(in_tensor(name))
}

/// A linear layer of all experts of a block.
fn load_stack<D: Device>(
    file: &impl Tensors,
    device: &mut D,
    spec: &ModelSpec,
    (layer, projection): (usize, Projection),
    count: usize,
) -> Result<D::Stack, GgufError> {
    let module = Module::Expert(0, projection);
    let (rows, (in_features, out_features)) = (spec.file_rows(module), spec.module_shape(module));
    let name = format!("blk.{layer}.{}.weight", rows.part);
    let RawTensor { weight_type, bytes, .. } = file.matrix(&name, &rows.shape(in_features))?;
    let source = MatrixSource { weight_type, shape: (count * out_features, in_features), bytes, row_order: None };
    device.load_stack(&source, count).map_err(in_tensor(&name))
}

impl<D: Device> Block<D> {
    fn load(file: &impl Tensors, device: &mut D, spec: &ModelSpec, layer: usize) -> Result<Self, GgufError> {
        let features = &spec.features;
        let mut norm =
            |part: &str, width: usize| load_norm(file, device, &format!("blk.{layer}.{part}"), width, spec, 1.0);
        let mut norms = |is_there: bool, parts: [&str; 2], width: usize| -> Result<Option<[D::Norm; 2]>, GgufError> {
            let [first, second] = parts;
            if is_there { Ok(Some([norm(first, width)?, norm(second, width)?])) } else { Ok(None) }
        };
        let head_norms = norms(features.norms_heads, ["attn_q_norm", "attn_k_norm"], spec.head_dim)?;
        let after = ["post_attention_norm", "post_ffw_norm"];
        let residual_norms = norms(features.norms_residuals, after, spec.hidden_size)?;
        let (attention_norm, feed_forward_norm) =
            (norm("attn_norm", spec.hidden_size)?, norm("ffn_norm", spec.hidden_size)?);
        let mut linear = |module: Module| -> Result<D::Linear, GgufError> {
            let rows = spec.file_rows(module);
            let (in_features, out_features) = spec.module_shape(module);
            let (name, order) = (format!("blk.{layer}.{}", rows.part), hugging_face_rows(spec, module));
            let bias = load_bias(file, &name, &rows, out_features)?;
            let (weight, shape) = (format!("{name}.weight"), (out_features, in_features));
            load_linear(file, device, &weight, &rows, shape, order.as_deref(), bias)
        };
        let [q, k, v, o] = Module::ATTENTION;
        let attention = [linear(q)?, linear(k)?, linear(v)?, linear(o)?];
        let feed_forward = match features.experts {
            None => FeedForward::Plain {
                gate: features.activation.is_gated().then(|| linear(Module::GateProj)).transpose()?,
                up: linear(Module::UpProj)?,
                down: linear(Module::DownProj)?,
            },
            Some(experts) => {
                let router = linear(Module::Router)?;
                let mut stack = |projection| load_stack(file, device, spec, (layer, projection), experts.count);
                let [gate, up, down] = Projection::ALL;
                FeedForward::Experts { router, experts: [stack(gate)?, stack(up)?, stack(down)?] }
            }
        };
        let scales_residuals = features.residual_scale != 1.0;
        Ok(Self {
            attention_norm,
            feed_forward_norm,
            head_norms,
            residual_norms,
            scales_residuals,
            attention,
            feed_forward,
        })
    }

    /// Of all linear layers.
    fn weight_bytes(&self) -> usize {
        let attention: usize = self.attention.iter().map(D::linear_bytes).sum();
        attention
            + match &self.feed_forward {
                FeedForward::Plain { gate, up, down } => gate.iter().chain([up, down]).map(D::linear_bytes).sum(),
                FeedForward::Experts { router, experts } => {
                    D::linear_bytes(router) + experts.iter().map(D::stack_bytes).sum::<usize>()
                }
            }
    }

    fn forward(&self, device: &mut D, step: &Step<'_>, number: usize) -> Result<(), DeviceError> {
        device.add_norm(step, &self.attention_norm, number > 0)?;
        let [q, keys, v, o] = &self.attention;
        let q = layer(q, Module::QProj, Output::Q);
        let k = layer(keys, Module::KProj, Output::K);
        let v = layer(v, Module::VProj, Output::V);
        device.linears(step, number, [q, k, v])?;
        if let Some(norms) = &self.head_norms {
            device.norm_heads(step, norms.each_ref())?;
        }
        device.rotate_and_store(step, number, keys)?;
        device.attend(step, number)?;
        device.linears(step, number, [layer(o, Module::OProj, Output::Residual)])?;
        self.adjust_residual(device, step, 0)?;
        device.add_norm(step, &self.feed_forward_norm, true)?;
        match &self.feed_forward {
            FeedForward::Plain { gate, up, down } => {
                let up = layer(up, Module::UpProj, Output::Up);
                match gate {
                    Some(gate) => device.linears(step, number, [layer(gate, Module::GateProj, Output::Gate), up])?,
                    None => device.linears(step, number, [up])?,
                }
                device.activate(step)?;
                device.linears(step, number, [layer(down, Module::DownProj, Output::Residual)])?;
            }
            FeedForward::Experts { router, experts } => device.run_experts(step, number, router, experts)?,
        }
        self.adjust_residual(device, step, 1)
    }

    /// Of attention (0) or of the feed-forward (1).
    fn adjust_residual(&self, device: &mut D, step: &Step<'_>, part: usize) -> Result<(), DeviceError> {
        let norm = self.residual_norms.as_ref().map(|norms| &norms[part]);
        if norm.is_some() || self.scales_residuals { device.adjust_residual(step, norm) } else { Ok(()) }
    }
}

fn layer<D: Device>(linear: &D::Linear, module: Module, output: Output) -> Layer<'_, D> {
    Layer { linear, module: module.index(), output }
}

/// A module's part of the bias of the matrix `name`, where that has one; in the file's order.
pub(super) fn load_bias(
    file: &impl Tensors,
    name: &str,
    rows: &FileRows,
    out_features: usize,
) -> Result<Option<Vec<f32>>, GgufError> {
    let name = format!("{name}.bias");
    if !file.has_tensor(&name) {
        return Ok(None);
    }
    let bias = file.vector(&name, rows.num_rows)?;
    Ok(Some(bias[rows.first_row..][..out_features].to_vec()))
}

impl<D: Device> Model for Decoder<D> {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn num_kv_blocks(&self) -> usize {
        self.device.num_kv_blocks()
    }

    fn host_kv(&mut self) -> Option<&mut KvStore> {
        self.device.host_kv()
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
        self.blocks.iter().map(Block::weight_bytes).sum::<usize>() + D::linear_bytes(&self.head)
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

/// Which row of the file holds each row of the Hugging Face model.
///
/// GGUF files of Llama and its kin interleave the two halves of every query and key head (llama.cpp's
/// `convert_hf_to_gguf.py`, `permute`): row `2i + j` of a head is Hugging Face's row `j·head_dim/2 + i`. Putting the rows
/// back at load lets adapters apply as they are, and leaves one rotary order for all architectures.
pub(super) fn hugging_face_rows(spec: &ModelSpec, module: Module) -> Option<Vec<usize>> {
    let permuted = spec.features.has_interleaved_heads && matches!(module, Module::QProj | Module::KProj);
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
