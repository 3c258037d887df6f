//! The decoder of Llama and Qwen2: embedding, blocks of attention and gated feed-forward, norm, head.

use std::ops::Range;
use std::path::Path;

use kernels::Cpu;
use kernels::attention::{BLOCK_SIZE, KvSlot, KvStore, Queries, RotaryTable, attend, rotate_and_store};
use kernels::elementwise::{RmsNorm, add_norm_quantize, swiglu_quantize};

use super::adapted_linear::{self, Activations, AdaptedLinear, LinearBuffers, SiteDeltas};
use super::embedding::{Embedding, VirtualRow};
use super::gguf::{GgufError, GgufFile};
use super::spec::{Architecture, ModelSpec, Module};
use super::{AdapterGroup, ForwardBatch, Model, StepError};
use crate::adapter::canonical::{HeadDelta, Prelude};

/// A decoder resident in memory, and the buffers of its step.
#[derive(Debug)]
pub struct Decoder {
    spec: ModelSpec,
    cpu: Cpu,
    embedding: Embedding,
    blocks: Vec<Block>,
    output_norm: Vec<f32>,
    head: AdaptedLinear,
    rotary: RotaryTable,
    buffers: Buffers,
}

#[derive(Debug)]
struct Block {
    attention_norm: Vec<f32>,
    q: AdaptedLinear,
    k: AdaptedLinear,
    v: AdaptedLinear,
    o: AdaptedLinear,
    feed_forward_norm: Vec<f32>,
    gate: AdaptedLinear,
    up: AdaptedLinear,
    down: AdaptedLinear,
}

/// Everything between two layers, `[rows, ...]`; grown to the largest step once.
#[derive(Debug, Default)]
struct Buffers {
    slots: Vec<KvSlot>,
    virtual_rows: Vec<VirtualRow>,
    hidden: Vec<f32>,
    /// What is added to `hidden` next: a block's attention or feed-forward result.
    residual: Vec<f32>,
    input: Activations,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    linear: LinearBuffers,
    /// `hidden` and `residual` of the rows whose logits are wanted.
    wanted: [Vec<f32>; 2],
    logits: Vec<f32>,
}

/// Rows whose logits are computed together.
const LOGITS_ROWS: usize = 16;

const EMBEDDING: &str = "token_embd.weight";

impl Decoder {
    /// Loads a GGUF file and packs its weights. `context_length` bounds the positions; at most the model's own.
    pub fn load(path: &Path, cpu: Cpu, context_length: usize) -> Result<Self, GgufError> {
        let mut file = GgufFile::open(path)?;
        let mut spec = file.spec()?;
        spec.context_length = spec.context_length.min(context_length);
        let (hidden, vocab) = (spec.hidden_size, spec.vocab_size);
        let mut blocks = Vec::new();
        for layer in 0..spec.num_layers {
            blocks.push(Block::load(&file, &cpu, &spec, layer)?);
            // What is packed need not stay in memory as it was in the file too.
            file.release_pages();
        }
        // A model without a head of its own uses the embedding ("tied").
        let head = if file.has_tensor("output.weight") { "output.weight" } else { EMBEDDING };
        let head = AdaptedLinear::load(&cpu, &file.matrix(head, (vocab, hidden))?, None, None)?;
        let output_norm = file.vector("output_norm.weight", hidden)?;
        file.release_pages();
        let embedding = Embedding::new(file, EMBEDDING, &spec)?;
        let rotary = RotaryTable::new(spec.context_length, spec.head_dim, spec.rope_theta);
        Ok(Self { spec, cpu, embedding, blocks, output_norm, head, rotary, buffers: Buffers::default() })
    }

    /// Bytes of the packed weights.
    pub fn resident_bytes(&self) -> usize {
        let blocks = self.blocks.iter().flat_map(|b| [&b.q, &b.k, &b.v, &b.o, &b.gate, &b.up, &b.down]);
        blocks.chain([&self.head]).map(AdaptedLinear::packed_bytes).sum()
    }

    fn run(
        &mut self,
        batch: &ForwardBatch<'_>,
        kv: &mut KvStore,
        on_logits: &mut dyn FnMut(usize, &mut [f32]),
    ) -> Result<(), StepError> {
        let Self { spec, cpu, blocks, buffers, rotary, .. } = self;
        let num_rows = batch.tokens.len();
        buffers.resize(spec, num_rows);
        self.embedding.look_up(batch, &mut buffers.hidden, &mut buffers.virtual_rows)?;
        buffers.slots.clear();
        for sequence in batch.sequences {
            buffers.slots.extend((0..sequence.rows.len()).map(|i| {
                let position = sequence.first_position + i;
                KvSlot { block: sequence.block_table[position / BLOCK_SIZE], offset: position % BLOCK_SIZE, position }
            }));
        }
        for (layer, block) in blocks.iter().enumerate() {
            let step = BlockStep { cpu, spec, rotary, layer, batch };
            block.forward(&step, kv, buffers)?;
        }
        self.logits(batch, on_logits)
    }

    /// Norm and head of the rows that want logits, a few at a time.
    fn logits(
        &mut self,
        batch: &ForwardBatch<'_>,
        on_logits: &mut dyn FnMut(usize, &mut [f32]),
    ) -> Result<(), StepError> {
        let Self { spec, cpu, buffers, .. } = self;
        let (hidden_size, vocab) = (spec.hidden_size, spec.vocab_size);
        let norm = RmsNorm { weight: &self.output_norm, eps: spec.rms_norm_eps };
        for (chunk, rows) in batch.logits_rows.chunks(LOGITS_ROWS).enumerate() {
            let [hidden, residual] = &mut buffers.wanted;
            hidden.clear();
            residual.clear();
            for &row in rows {
                hidden.extend_from_slice(&buffers.hidden[row * hidden_size..][..hidden_size]);
                residual.extend_from_slice(&buffers.residual[row * hidden_size..][..hidden_size]);
            }
            let Activations { exact, quantized } = &mut buffers.input;
            add_norm_quantize(cpu, hidden, Some(residual), norm, exact, quantized);
            let logits = &mut buffers.logits[..rows.len() * vocab];
            let get = |group: usize, _| {
                let AdapterGroup { rows: of_group, adapter } = &batch.groups[group];
                match &adapter.head {
                    Some(HeadDelta::Delta(delta)) => Some((places(rows, of_group), delta)),
                    _ => None,
                }
            };
            let deltas = SiteDeltas { num_groups: batch.groups.len(), get: &get };
            let (input, linear) = (&buffers.input, &mut buffers.linear);
            adapted_linear::run(cpu, [&self.head], &deltas, input, [&mut *logits], linear)?;
            for AdapterGroup { rows: of_group, adapter } in batch.groups {
                if let Some(HeadDelta::Replaced(head)) = &adapter.head {
                    let Range { start, end } = places(rows, of_group);
                    let normed = &input.exact[start * hidden_size..end * hidden_size];
                    head.multiply(cpu, normed, &mut logits[start * vocab..end * vocab]);
                }
            }
            for (i, logits) in logits.chunks_exact_mut(vocab).enumerate() {
                on_logits(chunk * LOGITS_ROWS + i, logits);
            }
        }
        Ok(())
    }
}

/// Where in the ascending `rows` those within `range` stand.
fn places(rows: &[usize], range: &Range<usize>) -> Range<usize> {
    rows.partition_point(|row| *row < range.start)..rows.partition_point(|row| *row < range.end)
}

/// What a block's pass needs beside its weights and buffers.
struct BlockStep<'a> {
    cpu: &'a Cpu,
    spec: &'a ModelSpec,
    rotary: &'a RotaryTable,
    layer: usize,
    batch: &'a ForwardBatch<'a>,
}

impl BlockStep<'_> {
    /// Runs layers that read `input`, adapters included.
    fn linears<const N: usize>(
        &self,
        layers: [(&AdaptedLinear, Module); N],
        input: &Activations,
        outs: [&mut [f32]; N],
        buffers: &mut LinearBuffers,
    ) -> Result<(), StepError> {
        let (number, groups) = (self.layer, self.batch.groups);
        let modules = layers.map(|(_, module)| module);
        let get = |group: usize, layer: usize| {
            let AdapterGroup { rows, adapter } = &groups[group];
            Some((rows.clone(), adapter.site(number, modules[layer])?))
        };
        let deltas = SiteDeltas { num_groups: groups.len(), get: &get };
        Ok(adapted_linear::run(self.cpu, layers.map(|(layer, _)| layer), &deltas, input, outs, buffers)?)
    }

    /// Puts the prelude's keys and values in the place of those computed for its rows.
    fn store_prelude(&self, kv: &mut KvStore, slots: &[KvSlot], virtual_rows: &[VirtualRow]) {
        for &VirtualRow { row, group, position } in virtual_rows {
            if let Some(Prelude::KeyValues { keys, values, .. }) = &self.batch.groups[group].adapter.prelude {
                let width = self.spec.num_kv_heads * self.spec.head_dim;
                let at = position * width..(position + 1) * width;
                kv.set(self.layer, slots[row], &keys[self.layer][at.clone()], &values[self.layer][at]);
            }
        }
    }
}

impl Block {
    fn load(file: &GgufFile, cpu: &Cpu, spec: &ModelSpec, layer: usize) -> Result<Self, GgufError> {
        let name = |part: &str| format!("blk.{layer}.{part}");
        let linear = |module: Module| {
            let part = gguf_name(module);
            let (in_features, out_features) = spec.module_shape(module);
            let tensor = file.matrix(&name(&format!("{part}.weight")), (out_features, in_features))?;
            let bias_name = name(&format!("{part}.bias"));
            let bias = file.has_tensor(&bias_name).then(|| file.vector(&bias_name, out_features)).transpose()?;
            let order = hugging_face_rows(spec, module);
            AdaptedLinear::load(cpu, &tensor, order.as_deref(), bias)
        };
        Ok(Self {
            attention_norm: file.vector(&name("attn_norm.weight"), spec.hidden_size)?,
            q: linear(Module::QProj)?,
            k: linear(Module::KProj)?,
            v: linear(Module::VProj)?,
            o: linear(Module::OProj)?,
            feed_forward_norm: file.vector(&name("ffn_norm.weight"), spec.hidden_size)?,
            gate: linear(Module::GateProj)?,
            up: linear(Module::UpProj)?,
            down: linear(Module::DownProj)?,
        })
    }

    fn forward(&self, step: &BlockStep<'_>, kv: &mut KvStore, b: &mut Buffers) -> Result<(), StepError> {
        let BlockStep { cpu, spec, layer, batch, .. } = *step;
        let eps = spec.rms_norm_eps;
        let num_rows = batch.tokens.len();
        let norm = RmsNorm { weight: &self.attention_norm, eps };
        let delta = (layer > 0).then_some(b.residual.as_slice());
        add_norm_quantize(cpu, &mut b.hidden, delta, norm, &mut b.input.exact, &mut b.input.quantized);
        step.linears(
            [(&self.q, Module::QProj), (&self.k, Module::KProj), (&self.v, Module::VProj)],
            &b.input,
            [&mut b.q, &mut b.k, &mut b.v],
            &mut b.linear,
        )?;
        rotate_and_store(cpu, kv, layer, step.rotary, &b.slots, [&mut b.q, &mut b.k, &mut b.v]);
        step.store_prelude(kv, &b.slots, &b.virtual_rows);
        let queries = |i: usize| {
            let sequence = &batch.sequences[i];
            Queries {
                first_row: sequence.rows.start,
                num_rows: sequence.rows.len(),
                first_position: sequence.first_position,
                block_table: sequence.block_table,
            }
        };
        let width = spec.num_heads * spec.head_dim;
        let attended = &mut b.input.exact[..num_rows * width];
        attend(cpu, kv, layer, batch.sequences.len(), &queries, &b.q, attended);
        b.input.quantized.quantize(cpu, num_rows, width, attended);
        step.linears([(&self.o, Module::OProj)], &b.input, [&mut b.residual], &mut b.linear)?;
        let norm = RmsNorm { weight: &self.feed_forward_norm, eps };
        add_norm_quantize(cpu, &mut b.hidden, Some(&b.residual), norm, &mut b.input.exact, &mut b.input.quantized);
        step.linears(
            [(&self.gate, Module::GateProj), (&self.up, Module::UpProj)],
            &b.input,
            [&mut b.gate, &mut b.up],
            &mut b.linear,
        )?;
        let Activations { exact, quantized } = &mut b.input;
        swiglu_quantize(cpu, num_rows, &b.gate, &b.up, exact, quantized);
        step.linears([(&self.down, Module::DownProj)], &b.input, [&mut b.residual], &mut b.linear)
    }
}

impl Buffers {
    fn resize(&mut self, spec: &ModelSpec, num_rows: usize) {
        let q_width = spec.num_heads * spec.head_dim;
        let kv_width = spec.num_kv_heads * spec.head_dim;
        let widest = spec.intermediate_size.max(q_width).max(spec.hidden_size);
        for (buffer, width) in [
            (&mut self.hidden, spec.hidden_size),
            (&mut self.residual, spec.hidden_size),
            (&mut self.input.exact, widest),
            (&mut self.q, q_width),
            (&mut self.k, kv_width),
            (&mut self.v, kv_width),
            (&mut self.gate, spec.intermediate_size),
            (&mut self.up, spec.intermediate_size),
        ] {
            buffer.resize(num_rows * width, 0.0);
        }
        self.logits.resize(LOGITS_ROWS * spec.vocab_size, 0.0);
    }
}

impl Model for Decoder {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn forward(
        &mut self,
        batch: &ForwardBatch<'_>,
        kv: &mut KvStore,
        on_logits: &mut dyn FnMut(usize, &mut [f32]),
    ) -> Result<(), StepError> {
        for copy in batch.copies {
            kv.copy_block(copy.from, copy.to);
        }
        self.run(batch, kv, on_logits)
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
