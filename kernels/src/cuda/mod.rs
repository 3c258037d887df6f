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
mod device;
pub mod driver;
pub mod embed;
pub mod experts;
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
mod worker;

use std::thread;

use crate::attention::{KvType, RotaryTable};
use crate::device::{DeviceError, StepLimits};
use crate::shape::{DecoderShape, LayerAttention, Rotary};
use crate::step::Step;
use crate::{Cpu, Isa};

use activations::{NormArgs, activation_stride, add_norm_quantize};
use adapters::Adapters;
use args::Activations;
use attention::AttentionShape;
use buffers::{Buffer, Buffers};
use driver::{DeviceMemory, Driver, DriverError};
use embed::RowType;
use experts::Slots;
use graphs::{GraphKey, Graphs};
use head::{HeadRows, summarize};
use kv::{CopyArgs, copy_blocks};
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
    kv_type: KvType,
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
    /// `[num_layers]`
    layers: Vec<LayerAttention>,
    /// Those that the layers name.
    rotaries: Vec<Turning<D>>,
}

/// How heads turn.
#[derive(Debug)]
struct Turning<D: Driver> {
    /// f32 `[position, pairs]`
    cos: D::Memory,
    sin: D::Memory,
    pairs: usize,
    /// f32 `[head_dim]`: 1 for dimensions that hardly turn, or else 0.
    stays: D::Memory,
}

impl<D: Driver> Turning<D> {
    fn new(driver: &D, rotary: &Rotary, context_length: usize, head_dim: usize) -> Result<Self, DriverError> {
        let table = RotaryTable::of(context_length, rotary);
        // Heads that do not turn have no angles, and there is no memory of no bytes.
        let upload = |angles: &[f32]| driver.upload_floats(if angles.is_empty() { &[0.0] } else { angles });
        let stays: Vec<f32> = (0..head_dim).map(|dim| f32::from(u8::from(table.stays(dim)))).collect();
        Ok(Self {
            cos: upload(table.cos())?,
            sin: upload(table.sin())?,
            pairs: rotary.frequencies.len(),
            stays: upload(&stays)?,
        })
    }
}

/// The weights of a norm, with the bias of one that centers its input.
#[derive(Debug)]
pub struct CudaNorm<D: Driver> {
    weight: D::Memory,
    bias: Option<D::Memory>,
}

impl<D: Driver> CudaNorm<D> {
    /// 0 for none.
    fn bias_address(&self) -> u64 {
        self.bias.as_ref().map_or(0, DeviceMemory::address)
    }
}

/// What steps work in.
#[derive(Debug)]
struct StepMemory<D: Driver> {
    limits: StepLimits,
    buffers: Buffers<D>,
    slots: Option<Slots<D>>,
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
    fn new(driver: &D, shape: &DecoderShape, kv_type: KvType, num_blocks: usize) -> Result<Self, DriverError> {
        let block_bytes = kv::block_bytes(kv_type, shape.num_kv_heads, shape.head_dim);
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
    pub fn new(driver: D, adapter_budget: usize, kv_type: KvType) -> Self {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        Self {
            graphs: Graphs::new(),
            way: Way::Eager,
            decoder: None,
            step: None,
            adapters: Adapters::new((0, 0), adapter_budget),
            cpu: Cpu::new(Isa::detect(), cores),
            host_logits: Vec::new(),
            adapter_budget,
            kv_type,
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

    fn set_input_width(&mut self, width: usize) {
        if let Some(step) = &mut self.step {
            step.input_width = width;
        }
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
            memory.slots = Slots::new(driver, &shape, memory.buffers.rows)?;
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
    fn launch_head(
        &self,
        norm: &CudaNorm<D>,
        head: &CudaLinear<D>,
        first: usize,
        num: usize,
    ) -> Result<(), DeviceError> {
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
            weight: norm.weight.address(),
            bias: norm.bias_address(),
            normed: buffers.address(Buffer::Exact),
            row_list: addresses.logits_rows + 4 * first as u64,
            activations,
            width: shape.hidden_size as i32,
            eps: shape.norm_eps,
        };
        add_norm_quantize(&self.driver, &args)?;
        let site = shape.num_layers * shape.layers_per_block();
        let logits = buffers.address(Buffer::Logits);
        self.run_linears(&[(head, site, logits)], self.input(num, shape.hidden_size, adapters))?;
        if self.step().data.needs.replaces_head {
            self.replace_heads(num, adapters)?;
        }
        if let Some(cap) = shape.logit_soft_cap {
            head::cap(&self.driver, logits, num * shape.vocab_size, cap)?;
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

/// The table of token embeddings as it lies in the file.
#[derive(Debug)]
pub struct CudaEmbedding<D: Driver> {
    table: D::Memory,
    row_type: RowType,
    row_bytes: usize,
}
