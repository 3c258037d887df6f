//! What a card does for a decoder.

use std::sync::Arc;

use crate::attention::{KvStore, Scoring};
use crate::canonical::{AdapterWeights, ROUTER, expert_layer};
use crate::device::{AdapterTier, Caller, Device, DeviceError, Layer, MatrixSource, Peaks, Placement, StepLimits};
use crate::mapped_file::MappedRows;
use crate::shape::{AttentionPlan, DecoderShape};
use crate::step::Step;

use super::activations::{
    ActivateArgs, InPlaceArgs, NormArgs, activate_quantize, add_norm_quantize, norm_heads, norm_rows,
};
use super::adapters::Adapters;
use super::attention::{AttendMemory, AttentionShape};
use super::buffers::{Buffer, Buffers, LOGITS_ROWS};
use super::driver::{DeviceMemory, Driver, DriverError};
use super::embed::{EmbedArgs, embed};
use super::experts::{MAX_EXPERTS, MAX_USED, Slots};
use super::graphs::{GraphKey, Graphs};
use super::kv::{RotateArgs, rotate_and_store};
use super::linear::{CudaLinear, Input};
use super::step_data::{self, StepData};
use super::{
    Cuda, CudaEmbedding, CudaNorm, FIRST_RANK_STRIDE, HEADROOM_BYTES, Kv, PEAK_BYTES, PEAK_ROUNDS, PreparedDecoder,
    StepMemory, Turning, Way, attention_of, head, not_reserved, peak,
};

/// Blocks of a launch along all but its first dimension.
const MAX_GRID: usize = 65535;

impl<D: Driver> Device for Cuda<D> {
    type Linear = CudaLinear<D>;
    type Stack = CudaLinear<D>;
    type Norm = CudaNorm<D>;
    type Embedding = CudaEmbedding<D>;

    const IS_BESIDE_HOST: bool = true;

    fn name(&self) -> String {
        self.driver.name()
    }

    fn prepare(&mut self, shape: &DecoderShape, plan: &AttentionPlan) -> Result<(), DeviceError> {
        let DecoderShape { num_layers, num_heads, num_kv_heads, head_dim, context_length, vocab_size, .. } = *shape;
        if let Some(experts) = shape.experts.filter(|it| it.count > MAX_EXPERTS || it.used > MAX_USED) {
            return Err(DeviceError::Unsupported(format!(
                "the CUDA device takes up to {MAX_EXPERTS} experts, of which a row uses up to {MAX_USED}, not {} of {}",
                experts.used, experts.count
            )));
        }
        if vocab_size > head::MAX_VOCAB {
            let most = head::MAX_VOCAB;
            return Err(DeviceError::Unsupported(format!(
                "the CUDA device takes vocabularies of up to {most} tokens, not {vocab_size}"
            )));
        }
        let attention = AttentionShape::new(self.kv_type, (num_heads, num_kv_heads), head_dim, context_length)?;
        let rotaries = plan.rotaries.iter().map(|rotary| Turning::new(&self.driver, rotary, context_length, head_dim));
        let rotaries = rotaries.collect::<Result<_, _>>()?;
        self.decoder = Some(PreparedDecoder { shape: *shape, attention, layers: plan.layers.clone(), rotaries });
        self.adapters = Adapters::new((num_layers, shape.layers_per_block()), self.adapter_budget);
        Ok(())
    }

    fn load_linear(&mut self, source: &MatrixSource<'_>, bias: Option<Vec<f32>>) -> Result<CudaLinear<D>, DeviceError> {
        CudaLinear::load(&self.driver, &self.cpu, source, bias)
    }

    fn load_stack(&mut self, source: &MatrixSource<'_>, count: usize) -> Result<CudaLinear<D>, DeviceError> {
        CudaLinear::load_stack(&self.driver, &self.cpu, source, None, count)
    }

    fn load_norm(&mut self, weight: Vec<f32>, bias: Option<Vec<f32>>) -> Result<CudaNorm<D>, DeviceError> {
        let bias = bias.map(|bias| self.driver.upload_floats(&bias)).transpose()?;
        Ok(CudaNorm { weight: self.driver.upload_floats(&weight)?, bias })
    }

    fn load_embedding(&mut self, rows: MappedRows) -> Result<CudaEmbedding<D>, DeviceError> {
        let row_bytes = rows.bytes().len() / rows.num_rows.max(1);
        let table = self.driver.upload(rows.bytes())?;
        Ok(CudaEmbedding { table, row_type: rows.weight_type.into(), row_bytes })
    }

    fn linear_bytes(linear: &CudaLinear<D>) -> usize {
        linear.bytes()
    }

    fn stack_bytes(stack: &CudaLinear<D>) -> usize {
        stack.bytes()
    }

    fn reserve(&mut self, limits: StepLimits, num_blocks: usize) -> Result<(), DeviceError> {
        let shape = self.shape();
        if shape.num_slots(limits.max_rows) > MAX_GRID {
            return Err(DeviceError::Unsupported(format!(
                "engine.max_batch_rows is {}, and a step on a CUDA device has up to {} rows of this model",
                limits.max_rows,
                MAX_GRID / shape.num_slots(1)
            )));
        }
        // What was recorded points to what is given back here.
        self.graphs.clear();
        self.step = None;
        let driver = &self.driver;
        let buffers = Buffers::new(driver, &shape, &self.decoder().attention, limits.max_rows, FIRST_RANK_STRIDE)?;
        self.step = Some(StepMemory {
            limits,
            slots: Slots::new(driver, &shape, buffers.rows)?,
            buffers,
            data: StepData::new(driver, limits, shape.context_length)?,
            kv: Kv::new(driver, &shape, self.kv_type, num_blocks)?,
            rows: 0,
            input_width: 0,
        });
        Ok(())
    }

    fn num_kv_blocks(&self) -> usize {
        self.step.as_ref().map_or(0, |step| step.kv.num_blocks)
    }

    fn host_kv(&mut self) -> Option<&mut KvStore> {
        None
    }

    fn max_kv_blocks(&self, limits: StepLimits, adapter_bytes: usize) -> Result<Option<usize>, DeviceError> {
        let shape = self.shape();
        let memory = self.driver.memory_size()?;
        let step = Buffers::<D>::bytes(&shape, &self.decoder().attention, limits.max_rows, FIRST_RANK_STRIDE)
            + Slots::<D>::bytes(&shape, limits.max_rows.max(LOGITS_ROWS))
            + step_data::step_bytes(limits, shape.context_length);
        let taken = step + adapter_bytes + HEADROOM_BYTES;
        let num_blocks = memory.free.saturating_sub(taken) / shape.kv_block_bytes(self.kv_type);
        if num_blocks == 0 {
            let wanted = taken + shape.kv_block_bytes(self.kv_type);
            return Err(DriverError::OutOfMemory { wanted, free: memory.free, total: memory.total }.into());
        }
        Ok(Some(num_blocks))
    }

    fn place(
        &mut self,
        generation: &str,
        weights: &Arc<AdapterWeights>,
        is_pinned: bool,
    ) -> Result<Placement, DeviceError> {
        self.adapters.place(generation, weights, is_pinned)
    }

    fn bring_adapters(&mut self) -> bool {
        self.adapters.bring(&self.driver)
    }

    fn adapter_tier(&self) -> Option<AdapterTier> {
        Some(self.adapters.tier())
    }

    fn measure_peaks(&self) -> Result<Option<Peaks>, DeviceError> {
        Ok(Some(peak::measure(&self.driver, PEAK_BYTES, PEAK_ROUNDS)?))
    }

    fn begin(&mut self, step: &Step<'_>, embedding: &CudaEmbedding<D>) -> Result<(), DeviceError> {
        self.grow(step)?;
        let shape = self.shape();
        let bucket = Graphs::<D>::bucket(step.num_rows());
        let rows = bucket.unwrap_or(step.num_rows());
        let Self { step: Some(memory), driver, adapters, decoder, .. } = self else { return Err(not_reserved()) };
        memory.rows = rows;
        memory.input_width = shape.hidden_size;
        memory.data.write(driver, step, rows, &shape, &attention_of(decoder), adapters)?;
        let needs = memory.data.needs;
        let key = bucket.map(|bucket| GraphKey { bucket, wants_logits: !step.logits_rows.is_empty(), needs });
        self.copy_blocks()?;
        self.way = match key {
            None => Way::Eager,
            Some(key) if self.graphs.get(&key).is_some() => Way::Replay(key),
            Some(key) => {
                self.driver.begin_graph()?;
                Way::Record(key)
            }
        };
        if self.is_replaying() {
            return Ok(());
        }
        let addresses = self.addresses();
        let args = EmbedArgs {
            tokens: addresses.tokens,
            table: embedding.table.address(),
            hidden: self.step().buffers.address(Buffer::Hidden),
            adapters: addresses.adapters,
            row_bytes: embedding.row_bytes as i64,
            row_type: embedding.row_type,
            hidden_size: shape.hidden_size as i32,
            scale: shape.embedding_scale,
            virtual_scale: shape.prompt_scale,
        };
        Ok(embed(&self.driver, rows, args)?)
    }

    fn add_norm(&mut self, _step: &Step<'_>, norm: &CudaNorm<D>, add_residual: bool) -> Result<(), DeviceError> {
        let shape = self.shape();
        self.set_input_width(shape.hidden_size);
        if self.is_replaying() {
            return Ok(());
        }
        let StepMemory { buffers, rows, .. } = self.step();
        let args = NormArgs {
            hidden: buffers.address(Buffer::Hidden),
            delta: if add_residual { buffers.address(Buffer::Residual) } else { 0 },
            weight: norm.weight.address(),
            bias: norm.bias_address(),
            normed: buffers.address(Buffer::Exact),
            row_list: 0,
            activations: self.activations(*rows, shape.hidden_size),
            width: shape.hidden_size as i32,
            eps: shape.norm_eps,
        };
        Ok(add_norm_quantize(&self.driver, &args)?)
    }

    fn adjust_residual(&mut self, _step: &Step<'_>, norm: Option<&CudaNorm<D>>) -> Result<(), DeviceError> {
        if self.is_replaying() {
            return Ok(());
        }
        let DecoderShape { hidden_size, residual_scale, norm_eps: eps, .. } = self.shape();
        let StepMemory { buffers, rows, .. } = self.step();
        let args = InPlaceArgs {
            x: buffers.address(Buffer::Residual),
            weight: norm.map_or(0, |norm| norm.weight.address()),
            num_vectors: *rows as i32,
            width: hidden_size as i32,
            eps,
            scale: residual_scale,
        };
        Ok(norm_rows(&self.driver, &args)?)
    }

    fn norm_heads(&mut self, _step: &Step<'_>, norms: [&CudaNorm<D>; 2]) -> Result<(), DeviceError> {
        if self.is_replaying() {
            return Ok(());
        }
        let DecoderShape { num_heads, num_kv_heads, head_dim, norm_eps: eps, .. } = self.shape();
        let StepMemory { buffers, rows, .. } = self.step();
        for ((buffer, num_heads), norm) in [(Buffer::Q, num_heads), (Buffer::K, num_kv_heads)].into_iter().zip(norms) {
            let args = InPlaceArgs {
                x: buffers.address(buffer),
                weight: norm.weight.address(),
                num_vectors: (rows * num_heads) as i32,
                width: head_dim as i32,
                eps,
                scale: 1.0,
            };
            norm_heads(&self.driver, &args)?;
        }
        Ok(())
    }

    fn linears<const N: usize>(
        &mut self,
        _step: &Step<'_>,
        block: usize,
        layers: [Layer<'_, Self>; N],
    ) -> Result<(), DeviceError> {
        if self.is_replaying() {
            return Ok(());
        }
        let StepMemory { buffers, rows, input_width, .. } = self.step();
        let first_site = block * self.shape().layers_per_block();
        let layers = layers.map(|layer| {
            let out = buffers.address(Buffer::of(layer.output));
            (layer.linear, first_site + layer.module, out)
        });
        self.run_linears(&layers, self.input(*rows, *input_width, self.addresses().adapters))
    }

    fn rotate_and_store(&mut self, _step: &Step<'_>, block: usize, keys: &CudaLinear<D>) -> Result<(), DeviceError> {
        if self.is_replaying() {
            return Ok(());
        }
        let PreparedDecoder { shape, layers, rotaries, .. } = self.decoder();
        let Turning { cos, sin, pairs, stays } = &rotaries[layers[block].rotary];
        let StepMemory { buffers, kv, rows, .. } = self.step();
        let addresses = self.addresses();
        let common = if shape.keys_may_be_centered() { keys.bias() } else { 0 };
        let (keys, values) = kv.layer(block);
        let args = RotateArgs {
            q: buffers.address(Buffer::Q),
            k: buffers.address(Buffer::K),
            v: buffers.address(Buffer::V),
            cos: cos.address(),
            sin: sin.address(),
            positions: addresses.positions,
            slots: addresses.slots,
            tokens: addresses.tokens,
            adapters: addresses.adapters,
            common,
            stays: stays.address(),
            keys,
            values,
            q_half: buffers.address(Buffer::Queries),
            num_heads: shape.num_heads as i32,
            num_kv_heads: shape.num_kv_heads as i32,
            head_dim: shape.head_dim as i32,
            layer: block as i32,
            turned_pairs: *pairs as i32,
            kv_type: self.kv_type,
        };
        Ok(rotate_and_store(&self.driver, *rows, args)?)
    }

    fn attend(&mut self, _step: &Step<'_>, block: usize) -> Result<(), DeviceError> {
        let width = self.shape().q_width();
        self.set_input_width(width);
        if self.is_replaying() {
            return Ok(());
        }
        let StepMemory { buffers, kv, rows, data, .. } = self.step();
        let addresses = self.addresses();
        let (keys, values) = kv.layer(block);
        let memory = AttendMemory {
            q_half: buffers.address(Buffer::Queries),
            keys,
            values,
            tiles: addresses.tiles,
            block_tables: addresses.block_tables,
            positions: addresses.positions,
            workspace: buffers.address(Buffer::Partials),
            attended: buffers.address(Buffer::Exact),
            activations: self.activations(*rows, width),
        };
        // Recorded launches are for as many tiles as rows: those of a later step may be more.
        let num_tiles = if self.way == Way::Eager { data.num_tiles } else { *rows };
        let PreparedDecoder { shape, attention, layers, .. } = self.decoder();
        Ok(attention.attend(&self.driver, Scoring::of(shape, layers[block]), *rows, num_tiles, &memory)?)
    }

    fn run_experts(
        &mut self,
        _step: &Step<'_>,
        block: usize,
        router: &CudaLinear<D>,
        experts: &[CudaLinear<D>; 3],
    ) -> Result<(), DeviceError> {
        if self.is_replaying() {
            return Ok(());
        }
        let DecoderShape { hidden_size, intermediate_size, .. } = self.shape();
        let StepMemory { buffers, slots: Some(slots), rows, .. } = self.step() else { return Err(not_reserved()) };
        let first_site = block * self.shape().layers_per_block();
        let site = |part: usize| first_site + expert_layer(0, part);
        let [gate, up, down] = experts;
        let input = self.input(*rows, hidden_size, self.addresses().adapters);
        self.run_linears(&[(router, first_site + ROUTER, slots.scores())], input)?;
        let input = slots.deal(&self.driver, &input)?;
        let [to_gate, to_up] = [Buffer::Gate, Buffer::Up].map(|buffer| buffers.address(buffer));
        self.run_linears(&[(gate, site(0), to_gate), (up, site(1), to_up)], input)?;
        let num_slots = input.activations.num_rows as usize;
        self.activate_rows(num_slots)?;
        let activated = self.input(num_slots, intermediate_size, input.adapters);
        let activated = Input { by_expert: input.by_expert, ..activated };
        self.run_linears(&[(down, site(2), slots.down())], activated)?;
        slots.sum(&self.driver, *rows, buffers.address(Buffer::Residual))
    }

    fn activate(&mut self, _step: &Step<'_>) -> Result<(), DeviceError> {
        self.set_input_width(self.shape().intermediate_size);
        if self.is_replaying() { Ok(()) } else { self.activate_rows(self.step().rows) }
    }

    fn logits(
        &mut self,
        step: &Step<'_>,
        norm: &CudaNorm<D>,
        head: &CudaLinear<D>,
        caller: &mut dyn Caller,
    ) -> Result<(), DeviceError> {
        let rows = self.step().rows;
        let num_wanted = step.logits_rows.len();
        match self.way {
            Way::Eager => {
                let num_first = num_wanted.min(LOGITS_ROWS);
                if num_first > 0 {
                    self.launch_head(norm, head, 0, num_first)?;
                }
                caller.meanwhile();
                self.bring_adapters();
                self.give_logits(0, num_first, caller)?;
                for first in (num_first..num_wanted).step_by(LOGITS_ROWS) {
                    let num = LOGITS_ROWS.min(num_wanted - first);
                    self.launch_head(norm, head, first, num)?;
                    self.give_logits(first, num, caller)?;
                }
                return Ok(());
            }
            Way::Record(key) => {
                if key.wants_logits {
                    self.launch_head(norm, head, 0, rows)?;
                }
                let graph = self.driver.end_graph()?;
                let graph = self.graphs.insert(key, graph);
                // SAFETY: the buffers and weights that the launches were recorded with are those of now: whatever moves
                // them clears the graphs. What changes from step to step has been written to the step's arrays.
                unsafe { self.driver.replay(graph)? };
            }
            Way::Replay(key) => {
                let graph = self.graphs.get(&key).ok_or_else(not_reserved)?;
                // SAFETY: as above.
                unsafe { self.driver.replay(graph)? };
            }
        }
        self.way = Way::Eager;
        caller.meanwhile();
        self.bring_adapters();
        self.give_logits(0, num_wanted, caller)
    }
}

impl<D: Driver> Cuda<D> {
    /// What the activation makes of gate and up, of rows or slots.
    fn activate_rows(&self, rows: usize) -> Result<(), DeviceError> {
        let DecoderShape { intermediate_size: width, activation, .. } = self.shape();
        let buffers = &self.step().buffers;
        let args = ActivateArgs {
            gate: buffers.address(Buffer::Gate),
            up: buffers.address(Buffer::Up),
            activated: buffers.address(Buffer::Exact),
            activations: self.activations(rows, width),
            width: width as i32,
            activation: activation.into(),
        };
        Ok(activate_quantize(&self.driver, &args)?)
    }
}
