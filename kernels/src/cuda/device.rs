//! What a card does for a decoder.

use std::sync::Arc;

use crate::attention::RotaryTable;
use crate::canonical::{AdapterWeights, LAYERS_PER_BLOCK};
use crate::device::{AdapterTier, Caller, Device, DeviceError, Layer, MatrixSource, Peaks, Placement, StepLimits};
use crate::mapped_file::MappedRows;
use crate::shape::{AttentionPlan, DecoderShape};
use crate::step::Step;

use super::activations::{NormArgs, SwigluArgs, add_norm_quantize, swiglu_quantize};
use super::adapters::Adapters;
use super::attention::{AttendMemory, AttentionShape};
use super::buffers::{Buffer, Buffers, LOGITS_ROWS};
use super::driver::{DeviceMemory, Driver, DriverError};
use super::embed::{EmbedArgs, embed};
use super::graphs::{GraphKey, Graphs};
use super::kv::{RotateArgs, rotate_and_store};
use super::linear::CudaLinear;
use super::step_data::{self, StepData};
use super::{
    Cuda, CudaEmbedding, FIRST_RANK_STRIDE, HEADROOM_BYTES, Kv, PEAK_BYTES, PEAK_ROUNDS, PreparedDecoder, StepMemory,
    Way, attention_of, head, not_reserved, peak,
};

/// A decoder that this device has no kernels for.
fn lacks(feature: &str) -> DeviceError {
    DeviceError::Unsupported(format!(
        "the CUDA device has no kernels for {feature}, which this model has; run it with engine.device = \"cpu\""
    ))
}

impl<D: Driver> Device for Cuda<D> {
    type Linear = CudaLinear<D>;
    type Norm = D::Memory;
    type Embedding = CudaEmbedding<D>;

    const IS_BESIDE_HOST: bool = true;

    fn name(&self) -> String {
        self.driver.name()
    }

    fn prepare(&mut self, shape: &DecoderShape, plan: &AttentionPlan) -> Result<(), DeviceError> {
        if let Some(feature) = shape.beyond_plain(plan) {
            return Err(lacks(feature));
        }
        let [rotary] = &plan.rotaries[..] else { return Err(lacks("layers that turn their heads differently")) };
        let DecoderShape { num_layers, num_heads, num_kv_heads, head_dim, context_length, vocab_size, .. } = *shape;
        if vocab_size > head::MAX_VOCAB {
            let most = head::MAX_VOCAB;
            return Err(DeviceError::Unsupported(format!(
                "the CUDA device takes vocabularies of up to {most} tokens, not {vocab_size}"
            )));
        }
        let attention = AttentionShape::new(num_heads, num_kv_heads, head_dim, context_length)?;
        let table = RotaryTable::of(context_length, rotary);
        let (cos, sin) = (self.driver.upload_floats(table.cos())?, self.driver.upload_floats(table.sin())?);
        self.decoder = Some(PreparedDecoder { shape: *shape, attention, cos, sin });
        self.adapters = Adapters::new(num_layers, self.adapter_budget);
        Ok(())
    }

    fn load_linear(&mut self, source: &MatrixSource<'_>, bias: Option<Vec<f32>>) -> Result<CudaLinear<D>, DeviceError> {
        CudaLinear::load(&self.driver, &self.cpu, source, bias)
    }

    fn load_norm(&mut self, weight: Vec<f32>, bias: Option<Vec<f32>>) -> Result<D::Memory, DeviceError> {
        if bias.is_some() {
            return Err(lacks("LayerNorm"));
        }
        Ok(self.driver.upload_floats(&weight)?)
    }

    fn load_embedding(&mut self, rows: MappedRows) -> Result<CudaEmbedding<D>, DeviceError> {
        let row_bytes = rows.bytes().len() / rows.num_rows.max(1);
        let row_type = rows.weight_type.try_into()?;
        Ok(CudaEmbedding { table: self.driver.upload(rows.bytes())?, row_type, row_bytes })
    }

    fn linear_bytes(linear: &CudaLinear<D>) -> usize {
        linear.bytes()
    }

    fn reserve(&mut self, limits: StepLimits, num_blocks: usize) -> Result<(), DeviceError> {
        let shape = self.shape();
        // What was recorded points to what is given back here.
        self.graphs.clear();
        self.step = None;
        let driver = &self.driver;
        self.step = Some(StepMemory {
            limits,
            buffers: Buffers::new(driver, &shape, &self.decoder().attention, limits.max_rows, FIRST_RANK_STRIDE)?,
            data: StepData::new(driver, limits, shape.context_length)?,
            kv: Kv::new(driver, &shape, num_blocks)?,
            rows: 0,
            input_width: 0,
        });
        Ok(())
    }

    fn num_kv_blocks(&self) -> usize {
        self.step.as_ref().map_or(0, |step| step.kv.num_blocks)
    }

    fn max_kv_blocks(&self, limits: StepLimits, adapter_bytes: usize) -> Result<Option<usize>, DeviceError> {
        let shape = self.shape();
        let memory = self.driver.memory_size()?;
        let step = Buffers::<D>::bytes(&shape, &self.decoder().attention, limits.max_rows, FIRST_RANK_STRIDE)
            + step_data::step_bytes(limits, shape.context_length);
        let taken = step + adapter_bytes + HEADROOM_BYTES;
        let num_blocks = memory.free.saturating_sub(taken) / shape.kv_block_bytes();
        if num_blocks == 0 {
            let wanted = taken + shape.kv_block_bytes();
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
        };
        Ok(embed(&self.driver, rows, args)?)
    }

    fn add_norm(&mut self, _step: &Step<'_>, norm: &D::Memory, add_residual: bool) -> Result<(), DeviceError> {
        let shape = self.shape();
        self.set_input_width(shape.hidden_size);
        if self.is_replaying() {
            return Ok(());
        }
        let StepMemory { buffers, rows, .. } = self.step();
        let args = NormArgs {
            hidden: buffers.address(Buffer::Hidden),
            delta: if add_residual { buffers.address(Buffer::Residual) } else { 0 },
            weight: norm.address(),
            normed: buffers.address(Buffer::Exact),
            row_list: 0,
            activations: self.activations(*rows, shape.hidden_size),
            width: shape.hidden_size as i32,
            eps: shape.norm_eps,
        };
        Ok(add_norm_quantize(&self.driver, &args)?)
    }

    fn adjust_residual(&mut self, _step: &Step<'_>, _norm: Option<&D::Memory>) -> Result<(), DeviceError> {
        Err(lacks("what is done to attention or feed-forward before it is added"))
    }

    fn norm_heads(&mut self, _step: &Step<'_>, _norms: [&D::Memory; 2]) -> Result<(), DeviceError> {
        Err(lacks("norms of queries and keys"))
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
        let layers = layers.map(|layer| {
            let out = buffers.address(Buffer::of(layer.output));
            (layer.linear, block * LAYERS_PER_BLOCK + layer.module, out)
        });
        self.run_linears(&layers, *rows, *input_width, self.addresses().adapters)
    }

    fn rotate_and_store(&mut self, _step: &Step<'_>, block: usize) -> Result<(), DeviceError> {
        if self.is_replaying() {
            return Ok(());
        }
        let PreparedDecoder { shape, cos, sin, .. } = self.decoder();
        let StepMemory { buffers, kv, rows, .. } = self.step();
        let addresses = self.addresses();
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
            keys,
            values,
            q_half: buffers.address(Buffer::Queries),
            num_heads: shape.num_heads as i32,
            num_kv_heads: shape.num_kv_heads as i32,
            head_dim: shape.head_dim as i32,
            layer: block as i32,
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
        Ok(self.decoder().attention.attend(&self.driver, *rows, num_tiles, &memory)?)
    }

    fn activate(&mut self, _step: &Step<'_>) -> Result<(), DeviceError> {
        let width = self.shape().intermediate_size;
        self.set_input_width(width);
        if self.is_replaying() {
            return Ok(());
        }
        let StepMemory { buffers, rows, .. } = self.step();
        let args = SwigluArgs {
            gate: buffers.address(Buffer::Gate),
            up: buffers.address(Buffer::Up),
            activated: buffers.address(Buffer::Exact),
            activations: self.activations(*rows, width),
            width: width as i32,
            unused: 0,
        };
        Ok(swiglu_quantize(&self.driver, &args)?)
    }

    fn logits(
        &mut self,
        step: &Step<'_>,
        norm: &D::Memory,
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
