//! The CPU as a device: packed weights, activations and the KV store in the host's memory.

mod embedding;
mod experts;
mod linear;
pub mod peak;

use std::ops::Range;
use std::sync::Arc;

use crate::Cpu;
use crate::activations::QuantizedRows;
use crate::attention::{BLOCK_SIZE, KvSlot, KvStore, KvType, Queries, RotaryTable, Scoring, attend, rotate_and_store};
use crate::canonical::{AdapterWeights, HeadDelta, Prelude};
use crate::device::{
    AdapterTier, Caller, Device, DeviceError, HostLogits, Layer, Lease, MatrixSource, Output, Peaks, Placement,
    StepLimits,
};
use crate::elementwise::{
    LayerNorm, RmsNorm, add_layer_norm_quantize, add_norm_quantize, gelu_quantize, norm_in_place, soft_cap,
    swiglu_quantize,
};
use crate::mapped_file::MappedRows;
use crate::quantized::{PackedMatrix, WeightType};
use crate::shape::{Activation, AttentionPlan, DecoderShape};
use crate::step::Step;

use embedding::VirtualRow;
use experts::{ExpertBuffers, ExpertLayers};
pub use linear::{HostLinear, RowProduct, Unquantized};
use linear::{Layer as HostLayer, LinearBuffers, SiteDeltas};

/// Bytes that a matrix of `shape` `(out, in)` takes of memory once it is loaded: packed, or as f32 where it is not quantized.
pub fn weight_bytes(weight_type: WeightType, shape: (usize, usize)) -> usize {
    match weight_type {
        WeightType::Blocks(format) => PackedMatrix::bytes_of(format, shape),
        WeightType::F16 | WeightType::BF16 | WeightType::F32 => shape.0 * shape.1 * size_of::<f32>(),
    }
}

/// Rows whose logits are computed together.
const LOGITS_ROWS: usize = 16;

/// The host's processor and memory.
#[derive(Debug)]
pub struct Host {
    cpu: Cpu,
    unquantized: Unquantized,
    kv_type: KvType,
    /// Set by `prepare`, before anything else.
    shape: Option<DecoderShape>,
    plan: AttentionPlan,
    /// By [`LayerAttention::rotary`](crate::shape::LayerAttention::rotary), for every position that the KV store has room for.
    rotaries: Vec<RotaryTable>,
    kv: KvStore,
    buffers: Buffers,
}

/// The activations of a call, as they are and as the packed GEMM wants them.
#[derive(Debug, Default)]
struct Activations {
    /// `[rows, width]`; may be longer.
    exact: Vec<f32>,
    quantized: QuantizedRows,
}

/// Weights of a norm.
#[derive(Debug)]
pub struct HostNorm {
    weight: Vec<f32>,
    /// Where it centers.
    bias: Option<Vec<f32>>,
}

impl HostNorm {
    fn add_and_norm(&self, cpu: &Cpu, eps: f32, hidden: &mut [f32], residual: Option<&[f32]>, input: &mut Activations) {
        let Activations { exact, quantized } = input;
        match (self.weight.as_slice(), self.bias.as_deref()) {
            (weight, None) => add_norm_quantize(cpu, hidden, residual, RmsNorm { weight, eps }, exact, quantized),
            (weight, Some(bias)) => {
                add_layer_norm_quantize(cpu, hidden, residual, LayerNorm { weight, bias, eps }, exact, quantized);
            }
        }
    }
}

/// Everything between two layers, `[rows, ...]`; grown to the largest step once.
#[derive(Debug, Default)]
struct Buffers {
    slots: Vec<KvSlot>,
    /// What is taken off the keys of the block at hand, `[num_kv_heads, head_dim]`; none where nothing is added to all.
    center: Vec<f32>,
    virtual_rows: Vec<VirtualRow>,
    hidden: Vec<f32>,
    input: Activations,
    /// By [`Output`].
    outputs: [Vec<f32>; Output::COUNT],
    linear: LinearBuffers,
    experts: ExpertBuffers,
    /// `hidden` and `residual` of the rows whose logits are wanted.
    wanted: [Vec<f32>; 2],
    logits: Vec<f32>,
}

impl Buffers {
    fn resize(&mut self, shape: &DecoderShape, num_rows: usize) {
        let (q_width, kv_width) = (shape.q_width(), shape.kv_width());
        let widest = shape.intermediate_size.max(q_width).max(shape.hidden_size);
        self.hidden.resize(num_rows * shape.hidden_size, 0.0);
        self.input.exact.resize(num_rows * widest, 0.0);
        for (output, width) in [
            (Output::Q, q_width),
            (Output::K, kv_width),
            (Output::V, kv_width),
            (Output::Gate, shape.intermediate_size),
            (Output::Up, shape.intermediate_size),
            (Output::Residual, shape.hidden_size),
        ] {
            self.outputs[output as usize].resize(num_rows * width, 0.0);
        }
        self.logits.resize(LOGITS_ROWS * shape.vocab_size, 0.0);
    }
}

/// The buffers that a call writes.
fn select<const N: usize>(outputs: &mut [Vec<f32>; Output::COUNT], which: [Output; N]) -> [&mut [f32]; N] {
    let buffers = outputs.get_disjoint_mut(which.map(|output| output as usize));
    buffers.expect("the outputs of a call differ").map(Vec::as_mut_slice)
}

impl Host {
    /// `unquantized` takes over what the packed GEMM does not know.
    pub fn new(cpu: Cpu, unquantized: Unquantized, kv_type: KvType) -> Self {
        Self {
            cpu,
            unquantized,
            kv_type,
            shape: None,
            plan: AttentionPlan::default(),
            rotaries: Vec::new(),
            kv: KvStore::new(kv_type, 0, 0, 0, 0),
            buffers: Buffers::default(),
        }
    }

    fn shape(&self) -> DecoderShape {
        self.shape.expect("a decoder prepares its device first")
    }

    /// Puts the prelude's keys and values in the place of those computed for its rows.
    fn store_prelude(&mut self, step: &Step<'_>, block: usize, is_centered: bool) {
        let width = self.shape().kv_width();
        let center = is_centered.then_some(self.buffers.center.as_slice());
        for &VirtualRow { row, group, position } in &self.buffers.virtual_rows {
            if let Some(Prelude::KeyValues { keys, values, .. }) = &(step.groups.get)(group).weights.prelude {
                let at = position * width..(position + 1) * width;
                self.kv.set((block, center), self.buffers.slots[row], &keys[block][at.clone()], &values[block][at]);
            }
        }
    }
}

impl Device for Host {
    type Linear = HostLinear;
    type Stack = Vec<HostLinear>;
    type Norm = HostNorm;
    type Embedding = MappedRows;

    const IS_BESIDE_HOST: bool = false;

    fn name(&self) -> String {
        format!("CPU ({}, {} threads)", self.cpu.isa(), self.cpu.pool().num_threads())
    }

    fn prepare(&mut self, shape: &DecoderShape, plan: &AttentionPlan) -> Result<(), DeviceError> {
        let (kv_type, head_dim, step) = (self.kv_type, shape.head_dim, self.kv_type.head_step());
        if !head_dim.is_multiple_of(step) {
            return Err(DeviceError::Unsupported(format!(
                "engine.kv_cache_type = \"{kv_type}\" takes heads of a multiple of {step} dimensions, and these have {head_dim}"
            )));
        }
        self.plan = plan.clone();
        self.shape = Some(*shape);
        Ok(())
    }

    fn load_linear(&mut self, source: &MatrixSource<'_>, bias: Option<Vec<f32>>) -> Result<HostLinear, DeviceError> {
        HostLinear::load(&self.cpu, self.unquantized, source, bias)
    }

    fn load_stack(&mut self, source: &MatrixSource<'_>, count: usize) -> Result<Vec<HostLinear>, DeviceError> {
        let (shape, len) = ((source.shape.0 / count, source.shape.1), source.bytes.len() / count);
        let of_expert = |expert: usize| MatrixSource { shape, bytes: &source.bytes[expert * len..][..len], ..*source };
        (0..count).map(|expert| self.load_linear(&of_expert(expert), None)).collect()
    }

    fn load_norm(&mut self, weight: Vec<f32>, bias: Option<Vec<f32>>) -> Result<HostNorm, DeviceError> {
        Ok(HostNorm { weight, bias })
    }

    /// It stays in the mapped file: a token reads one row of it.
    fn load_embedding(&mut self, rows: MappedRows) -> Result<MappedRows, DeviceError> {
        Ok(rows)
    }

    fn linear_bytes(linear: &HostLinear) -> usize {
        linear.bytes()
    }

    fn stack_bytes(stack: &Vec<HostLinear>) -> usize {
        stack.iter().map(HostLinear::bytes).sum()
    }

    /// Buffers of a step grow with the largest one.
    fn reserve(&mut self, _limits: StepLimits, num_blocks: usize) -> Result<(), DeviceError> {
        let DecoderShape { num_layers, num_kv_heads, head_dim, context_length, .. } = self.shape();
        let num_positions = context_length.min(num_blocks.saturating_mul(BLOCK_SIZE));
        self.rotaries = self
            .plan
            .rotaries
            .iter()
            .map(|rotary| RotaryTable::first_of(num_positions, context_length, rotary))
            .collect();
        self.kv = KvStore::new(self.kv_type, num_layers, num_kv_heads, head_dim, num_blocks);
        Ok(())
    }

    fn num_kv_blocks(&self) -> usize {
        self.kv.num_blocks()
    }

    fn host_kv(&mut self) -> Option<&mut KvStore> {
        Some(&mut self.kv)
    }

    fn max_kv_blocks(&self, _limits: StepLimits, _adapter_bytes: usize) -> Result<Option<usize>, DeviceError> {
        Ok(None)
    }

    /// Adapters run from where they were loaded.
    fn place(
        &mut self,
        _generation: &str,
        _weights: &Arc<AdapterWeights>,
        _is_pinned: bool,
    ) -> Result<Placement, DeviceError> {
        Ok(Placement::Ready(Lease(Arc::default())))
    }

    fn bring_adapters(&mut self) -> bool {
        false
    }

    fn adapter_tier(&self) -> Option<AdapterTier> {
        None
    }

    fn measure_peaks(&self) -> Result<Option<Peaks>, DeviceError> {
        Ok(peak::measure(&self.cpu))
    }

    fn begin(&mut self, step: &Step<'_>, embedding: &MappedRows) -> Result<(), DeviceError> {
        for copy in step.copies {
            self.kv.copy_block(copy.from, copy.to);
        }
        let shape = self.shape();
        self.buffers.resize(&shape, step.num_rows());
        let Buffers { slots, hidden, virtual_rows, .. } = &mut self.buffers;
        slots.clear();
        step.sequences.iter().for_each(|sequence| slots.extend(sequence.slots()));
        embedding::look_up(embedding, step, shape, hidden, virtual_rows)
    }

    fn add_norm(&mut self, _step: &Step<'_>, norm: &HostNorm, add_residual: bool) -> Result<(), DeviceError> {
        let eps = self.shape().norm_eps;
        let Buffers { hidden, input, outputs, .. } = &mut self.buffers;
        let residual = add_residual.then_some(outputs[Output::Residual as usize].as_slice());
        norm.add_and_norm(&self.cpu, eps, hidden, residual, input);
        Ok(())
    }

    fn adjust_residual(&mut self, _step: &Step<'_>, norm: Option<&HostNorm>) -> Result<(), DeviceError> {
        let DecoderShape { hidden_size, residual_scale, norm_eps: eps, .. } = self.shape();
        let norm = norm.map(|norm| RmsNorm { weight: &norm.weight, eps });
        let residual = &mut self.buffers.outputs[Output::Residual as usize];
        norm_in_place(&self.cpu, residual, hidden_size, norm, residual_scale);
        Ok(())
    }

    fn norm_heads(&mut self, _step: &Step<'_>, norms: [&HostNorm; 2]) -> Result<(), DeviceError> {
        let DecoderShape { head_dim, norm_eps: eps, .. } = self.shape();
        for (output, norm) in [Output::Q, Output::K].into_iter().zip(norms) {
            let norm = RmsNorm { weight: &norm.weight, eps };
            norm_in_place(&self.cpu, &mut self.buffers.outputs[output as usize], head_dim, Some(norm), 1.0);
        }
        Ok(())
    }

    fn linears<const N: usize>(
        &mut self,
        step: &Step<'_>,
        block: usize,
        layers: [Layer<'_, Self>; N],
    ) -> Result<(), DeviceError> {
        let modules = layers.each_ref().map(|layer| layer.module);
        let groups = step.groups;
        let get = |group: usize, layer: usize| {
            let group = (groups.get)(group);
            Some((group.rows, group.weights.site(block, modules[layer])?))
        };
        let deltas = SiteDeltas { num_groups: groups.count, get: &get };
        let Buffers { input, outputs, linear, .. } = &mut self.buffers;
        let outs = select(outputs, layers.each_ref().map(|layer| layer.output));
        linear::run(&self.cpu, layers.map(|layer| HostLayer::One(layer.linear)), &deltas, input, outs, linear)
    }

    fn rotate_and_store(&mut self, step: &Step<'_>, block: usize, keys: &HostLinear) -> Result<(), DeviceError> {
        let shape = self.shape();
        let Buffers { slots, outputs, center, .. } = &mut self.buffers;
        let qkv = select(outputs, [Output::Q, Output::K, Output::V]);
        let rotary = &self.rotaries[self.plan.layers[block].rotary];
        let bias = keys.bias().filter(|_| shape.keys_may_be_centered());
        rotary.center(shape.head_dim, bias.unwrap_or_default(), center);
        let center = bias.map(|_| center.as_slice());
        rotate_and_store(&self.cpu, &mut self.kv, (block, center), rotary, slots, qkv);
        self.store_prelude(step, block, bias.is_some());
        Ok(())
    }

    fn attend(&mut self, step: &Step<'_>, block: usize) -> Result<(), DeviceError> {
        let sequences = step.sequences;
        let queries = |i: usize| {
            let sequence = &sequences[i];
            Queries {
                first_row: sequence.rows.start,
                num_rows: sequence.rows.len(),
                first_position: sequence.first_position,
                block_table: sequence.block_table,
            }
        };
        let shape = self.shape();
        let (num_rows, width) = (step.num_rows(), shape.q_width());
        let scoring = Scoring::of(&shape, self.plan.layers[block]);
        let Buffers { input, outputs, .. } = &mut self.buffers;
        let attended = &mut input.exact[..num_rows * width];
        attend(
            &self.cpu,
            &self.kv,
            (block, scoring),
            sequences.len(),
            &queries,
            &outputs[Output::Q as usize],
            attended,
        );
        input.quantized.quantize(&self.cpu, num_rows, width, attended);
        Ok(())
    }

    fn activate(&mut self, step: &Step<'_>) -> Result<(), DeviceError> {
        let (num_rows, activation) = (step.num_rows(), self.shape().activation);
        let Buffers { input, outputs, .. } = &mut self.buffers;
        let (gate, up) = (&outputs[Output::Gate as usize], &outputs[Output::Up as usize]);
        activate(&self.cpu, activation, num_rows, gate, up, input);
        Ok(())
    }

    fn run_experts(
        &mut self,
        step: &Step<'_>,
        block: usize,
        router: &HostLinear,
        experts: &[Vec<HostLinear>; 3],
    ) -> Result<(), DeviceError> {
        let shape = self.shape();
        let Buffers { input, outputs, linear, experts: buffers, .. } = &mut self.buffers;
        let residual = &mut outputs[Output::Residual as usize];
        let layers = ExpertLayers { block, router, experts };
        layers.run(&self.cpu, &shape, step, input, residual, (buffers, linear))
    }

    /// A few rows at a time.
    fn logits(
        &mut self,
        step: &Step<'_>,
        norm: &HostNorm,
        head: &HostLinear,
        caller: &mut dyn Caller,
    ) -> Result<(), DeviceError> {
        let DecoderShape { hidden_size, vocab_size, norm_eps, logit_soft_cap, .. } = self.shape();
        let Self { cpu, buffers, .. } = self;
        let Buffers { hidden, outputs, wanted, input, linear, logits, .. } = buffers;
        for (chunk, rows) in step.logits_rows.chunks(LOGITS_ROWS).enumerate() {
            let [wanted_hidden, residual] = &mut *wanted;
            wanted_hidden.clear();
            residual.clear();
            for &row in rows {
                let at = row * hidden_size..(row + 1) * hidden_size;
                wanted_hidden.extend_from_slice(&hidden[at.clone()]);
                residual.extend_from_slice(&outputs[Output::Residual as usize][at]);
            }
            norm.add_and_norm(cpu, norm_eps, wanted_hidden, Some(residual), input);
            let logits = &mut logits[..rows.len() * vocab_size];
            let get = |group: usize, _| {
                let group = (step.groups.get)(group);
                Some((places(rows, &group.rows), group.weights.head_delta()?))
            };
            let deltas = SiteDeltas { num_groups: step.groups.count, get: &get };
            linear::run(cpu, [HostLayer::One(head)], &deltas, input, [&mut *logits], linear)?;
            for group in step.groups.iter() {
                if let Some(HeadDelta::Replaced(head)) = &group.weights.head {
                    let Range { start, end } = places(rows, &group.rows);
                    let normed = &input.exact[start * hidden_size..end * hidden_size];
                    head.multiply(cpu, normed, &mut logits[start * vocab_size..end * vocab_size]);
                }
            }
            if let Some(cap) = logit_soft_cap {
                soft_cap(cpu, logits, cap);
            }
            for (i, logits) in logits.chunks_exact_mut(vocab_size).enumerate() {
                caller.on_logits(chunk * LOGITS_ROWS + i, &mut HostLogits(logits))?;
            }
        }
        Ok(())
    }
}

/// What an activation makes of `gate` and `up`, `[rows, width]` each.
fn activate(cpu: &Cpu, activation: Activation, num_rows: usize, gate: &[f32], up: &[f32], activated: &mut Activations) {
    let Activations { exact, quantized } = activated;
    match activation {
        Activation::GatedSilu => swiglu_quantize(cpu, num_rows, gate, up, exact, quantized),
        Activation::GatedGelu => gelu_quantize(cpu, num_rows, gate, Some(up), exact, quantized),
        Activation::Gelu => gelu_quantize(cpu, num_rows, up, None, exact, quantized),
    }
}

/// Where in the ascending `rows` those within `range` stand.
fn places(rows: &[usize], range: &Range<usize>) -> Range<usize> {
    rows.partition_point(|row| *row < range.start)..rows.partition_point(|row| *row < range.end)
}
