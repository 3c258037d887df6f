//! A CUDA device: the kernels of `kernels/cuda`, over a driver.
//!
//! Weights, activations, KV store and adapters are in device memory. A step is sent as one piece of data and a run of
//! launches; the host waits once, for what is known about the logits.

pub mod activations;
mod adapter_layout;
mod adapters;
pub mod args;
pub mod attention;
mod buffers;
pub mod dense;
pub mod driver;
pub mod embed;
pub mod gemm;
mod graphs;
pub mod head;
pub mod kv;
mod linear;
mod logits;
pub mod low_rank;
pub mod matrix;
pub mod nvidia;
pub mod peak;
pub mod ptx;
mod step_data;

use std::sync::Arc;
use std::thread;

use crate::attention::RotaryTable;
use crate::canonical::{AdapterWeights, LAYERS_PER_BLOCK};
use crate::device::{
    AdapterTier, DecoderShape, Device, DeviceError, Layer, MatrixSource, OnLogits, Peaks, Placement, StepLimits,
};
use crate::mapped_file::MappedRows;
use crate::step::Step;
use crate::{Cpu, Isa};

use activations::{NormArgs, SwigluArgs, activation_stride, add_norm_quantize, swiglu_quantize};
use adapters::Adapters;
use args::Activations;
use attention::{AttendMemory, AttentionShape};
use buffers::{Buffer, Buffers, LOGITS_ROWS};
use driver::{DeviceMemory, Driver, DriverError};
use embed::{EmbedArgs, RowType, embed};
use graphs::{GraphKey, Graphs};
use head::{HeadRows, summarize};
use kv::{CopyArgs, RotateArgs, copy_blocks, rotate_and_store};
use linear::CudaLinear;
use step_data::{StepAddresses, StepData};

/// Device memory that is left alone: for the driver, recorded graphs, and what others take while lorry runs.
const HEADROOM_BYTES: usize = 512 << 20;
/// What the most that a card can do is measured with: more bytes than its caches hold, and some milliseconds of products.
const PEAK_BYTES: usize = 256 << 20;
const PEAK_ROUNDS: usize = 4096;
/// Ranks that steps have room for from the start.
const FIRST_RANK_STRIDE: usize = 64;

/// A card, or what stands for one.
#[derive(Debug)]
pub struct Cuda<D: Driver> {
    graphs: Graphs<D>,
    way: Way,
    decoder: Option<PreparedDecoder<D>>,
    step: Option<StepMemory<D>>,
    adapters: Adapters<D>,
    /// Packs weights at load.
    cpu: Cpu,
    /// The logits of a row, where all of them are asked for.
    host_logits: Vec<f32>,
    adapter_budget: usize,
    driver: D,
}

/// How the launches of the step at hand are done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// One by one.
    Eager,
    /// Recorded, and done at the end of the step.
    Record(GraphKey),
    /// They have been recorded: nothing is to be done before the end of the step.
    Replay(GraphKey),
}

/// What a decoder's shape alone decides.
#[derive(Debug)]
struct PreparedDecoder<D: Driver> {
    shape: DecoderShape,
    attention: AttentionShape,
    /// f32 `[position, head_dim / 2]`
    cos: D::Memory,
    sin: D::Memory,
}

/// What steps work in.
#[derive(Debug)]
struct StepMemory<D: Driver> {
    limits: StepLimits,
    buffers: Buffers<D>,
    data: StepData<D>,
    kv: Kv<D>,
    /// Rows of the launches, and the width of the input that linear layers read next.
    rows: usize,
    input_width: usize,
}

#[derive(Debug)]
struct Kv<D: Driver> {
    keys: D::Memory,
    values: D::Memory,
    num_blocks: usize,
    /// Of one layer.
    layer_bytes: usize,
    block_bytes: usize,
}

impl<D: Driver> Kv<D> {
    fn new(driver: &D, shape: &DecoderShape, num_blocks: usize) -> Result<Self, DriverError> {
        let block_bytes = kv::block_bytes(shape.num_kv_heads, shape.head_dim);
        let layer_bytes = num_blocks * block_bytes;
        let allocate = || driver.allocate(layer_bytes * shape.num_layers);
        Ok(Self { keys: allocate()?, values: allocate()?, num_blocks, layer_bytes, block_bytes })
    }

    fn layer(&self, layer: usize) -> (u64, u64) {
        let offset = (layer * self.layer_bytes) as u64;
        (self.keys.address() + offset, self.values.address() + offset)
    }
}

impl<D: Driver> Cuda<D> {
    /// `adapter_budget` in bytes of device memory.
    pub fn new(driver: D, adapter_budget: usize) -> Self {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        Self {
            graphs: Graphs::new(),
            way: Way::Eager,
            decoder: None,
            step: None,
            adapters: Adapters::new(0, adapter_budget),
            cpu: Cpu::new(Isa::detect(), cores),
            host_logits: Vec::new(),
            adapter_budget,
            driver,
        }
    }

    pub fn driver(&self) -> &D {
        &self.driver
    }

    fn decoder(&self) -> &PreparedDecoder<D> {
        self.decoder.as_ref().expect("a decoder prepares its device first")
    }

    fn shape(&self) -> DecoderShape {
        self.decoder().shape
    }

    fn step(&self) -> &StepMemory<D> {
        self.step.as_ref().expect("a decoder reserves memory before it steps")
    }

    fn upload(&self, bytes: &[u8]) -> Result<D::Memory, DriverError> {
        let memory = self.driver.allocate(bytes.len())?;
        self.driver.write(&memory, 0, bytes)?;
        Ok(memory)
    }

    fn upload_floats(&self, values: &[f32]) -> Result<D::Memory, DriverError> {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.upload(&bytes)
    }

    /// Launches need not be asked for: they are done again at the end of the step.
    fn is_replaying(&self) -> bool {
        matches!(self.way, Way::Replay(_))
    }

    /// Addresses of the step's arrays, and of its rows' adapters if it has any.
    fn addresses(&self) -> StepAddresses {
        let data = &self.step().data;
        let addresses = data.addresses();
        let has_adapters = data.needs.has_adapters;
        let only = |address: u64| if has_adapters { address } else { 0 };
        StepAddresses {
            adapters: only(addresses.adapters),
            logits_adapters: only(addresses.logits_adapters),
            ..addresses
        }
    }

    /// The int8 activations of `rows` rows of `width` inputs.
    fn activations(&self, rows: usize, width: usize) -> Activations {
        let buffers = &self.step().buffers;
        Activations {
            values: buffers.address(Buffer::Values),
            meta: buffers.address(Buffer::Meta),
            stride: activation_stride(width) as i32,
            num_rows: rows as i32,
        }
    }

    /// Room for a step that is larger than those before.
    fn grow(&mut self, step: &Step<'_>) -> Result<(), DeviceError> {
        let shape = self.shape();
        let ranks =
            step.groups.iter().map(|group| self.adapters.placed(group.generation).map(|placed| placed.max_rank));
        let max_rank = ranks.collect::<Result<Vec<_>, _>>()?.into_iter().max().unwrap_or(0);
        let Self { step: Some(memory), driver, graphs, decoder, .. } = self else { return Err(not_reserved()) };
        let rows = step.num_rows().max(memory.limits.max_rows);
        if rows > memory.buffers.rows {
            graphs.clear();
            memory.buffers = Buffers::new(driver, &shape, &attention_of(decoder), rows, memory.buffers.rank_stride)?;
        }
        if max_rank > memory.buffers.rank_stride {
            graphs.clear();
            memory.buffers.grow_ranks(driver, &shape, &attention_of(decoder), max_rank.next_power_of_two())?;
        }
        if !memory.data.holds(step) {
            graphs.clear();
            let max_sequences = step.sequences.len().max(step.copies.len()).max(memory.limits.max_sequences);
            memory.limits = StepLimits { max_rows: rows, max_sequences };
            memory.data = StepData::new(driver, memory.limits, shape.context_length)?;
        }
        Ok(())
    }

    /// Blocks are copied by themselves: few steps copy any.
    fn copy_blocks(&self) -> Result<(), DriverError> {
        let StepMemory { kv, data, .. } = self.step();
        if data.num_copies == 0 {
            return Ok(());
        }
        let copies = data.addresses().copies;
        let args = CopyArgs {
            keys: kv.keys.address(),
            values: kv.values.address(),
            copies: copies + step_data::COPIES_HEAD as u64,
            num_copies: copies,
            layer_words: (kv.layer_bytes / 16) as i64,
            block_words: (kv.block_bytes / 16) as i32,
            unused: 0,
        };
        copy_blocks(&self.driver, self.shape().num_layers, args)
    }

    /// Norm, head and summary of `num` rows of the list of rows whose logits are wanted, from number `first` on.
    fn launch_head(&self, norm: &D::Memory, head: &CudaLinear<D>, first: usize, num: usize) -> Result<(), DeviceError> {
        let shape = self.shape();
        let StepMemory { buffers, .. } = self.step();
        let addresses = self.addresses();
        let adapters = match addresses.logits_adapters {
            0 => 0,
            adapters => adapters + 8 * first as u64,
        };
        let activations = self.activations(num, shape.hidden_size);
        let args = NormArgs {
            hidden: buffers.address(Buffer::Hidden),
            delta: buffers.address(Buffer::Residual),
            weight: norm.address(),
            normed: buffers.address(Buffer::Exact),
            row_list: addresses.logits_rows + 4 * first as u64,
            activations,
            width: shape.hidden_size as i32,
            eps: shape.rms_norm_eps,
        };
        add_norm_quantize(&self.driver, &args)?;
        let site = shape.num_layers * LAYERS_PER_BLOCK;
        let logits = buffers.address(Buffer::Logits);
        self.run_linears(&[(head, site, logits)], num, shape.hidden_size, adapters)?;
        if self.step().data.needs.replaces_head {
            self.replace_heads(num, adapters)?;
        }
        let rows = HeadRows {
            logits,
            scratch: buffers.address(Buffer::Slices),
            summaries: buffers.address(Buffer::Summaries),
            num_rows: num,
            vocab: shape.vocab_size,
        };
        Ok(summarize(&self.driver, rows)?)
    }
}

fn not_reserved() -> DeviceError {
    DeviceError::Unsupported("no memory is reserved for steps".to_owned())
}

fn attention_of<D: Driver>(decoder: &Option<PreparedDecoder<D>>) -> AttentionShape {
    decoder.as_ref().expect("a decoder prepares its device first").attention
}

impl<D: Driver> Device for Cuda<D> {
    type Linear = CudaLinear<D>;
    type Norm = D::Memory;
    type Embedding = CudaEmbedding<D>;

    fn name(&self) -> String {
        self.driver.name()
    }

    fn prepare(&mut self, shape: &DecoderShape) -> Result<(), DeviceError> {
        let DecoderShape { num_layers, num_heads, num_kv_heads, head_dim, context_length, vocab_size, .. } = *shape;
        if vocab_size > head::MAX_VOCAB {
            let most = head::MAX_VOCAB;
            return Err(DeviceError::Unsupported(format!(
                "the CUDA device takes vocabularies of up to {most} tokens, not {vocab_size}"
            )));
        }
        let attention = AttentionShape::new(num_heads, num_kv_heads, head_dim, context_length)?;
        let table = RotaryTable::new(context_length, head_dim, shape.rope_theta);
        let (cos, sin) = (self.upload_floats(table.cos())?, self.upload_floats(table.sin())?);
        self.decoder = Some(PreparedDecoder { shape: *shape, attention, cos, sin });
        self.adapters = Adapters::new(num_layers, self.adapter_budget);
        Ok(())
    }

    fn load_linear(&mut self, source: &MatrixSource<'_>, bias: Option<Vec<f32>>) -> Result<CudaLinear<D>, DeviceError> {
        CudaLinear::load(&self.driver, &self.cpu, source, bias)
    }

    fn load_norm(&mut self, weight: Vec<f32>) -> Result<D::Memory, DeviceError> {
        Ok(self.upload_floats(&weight)?)
    }

    fn load_embedding(&mut self, rows: MappedRows) -> Result<CudaEmbedding<D>, DeviceError> {
        let row_bytes = rows.bytes().len() / rows.num_rows.max(1);
        Ok(CudaEmbedding { table: self.upload(rows.bytes())?, row_type: rows.weight_type.into(), row_bytes })
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
        self.adapters.place(&self.driver, generation, weights, is_pinned)
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
            eps: shape.rms_norm_eps,
        };
        Ok(add_norm_quantize(&self.driver, &args)?)
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

    fn swiglu(&mut self, _step: &Step<'_>) -> Result<(), DeviceError> {
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
        on_logits: &mut OnLogits<'_>,
    ) -> Result<(), DeviceError> {
        let rows = self.step().rows;
        let num_wanted = step.logits_rows.len();
        match self.way {
            Way::Eager => {
                for first in (0..num_wanted).step_by(LOGITS_ROWS) {
                    let num = LOGITS_ROWS.min(num_wanted - first);
                    self.launch_head(norm, head, first, num)?;
                    self.give_logits(first, num, on_logits)?;
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
        self.give_logits(0, num_wanted, on_logits)
    }
}

impl<D: Driver> Cuda<D> {
    fn set_input_width(&mut self, width: usize) {
        if let Some(step) = &mut self.step {
            step.input_width = width;
        }
    }
}

/// The table of token embeddings as it lies in the file.
#[derive(Debug)]
pub struct CudaEmbedding<D: Driver> {
    table: D::Memory,
    row_type: RowType,
    row_bytes: usize,
}
