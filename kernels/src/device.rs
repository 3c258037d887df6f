//! Where a decoder runs: a device holds weights, activations and the KV store, and does the steps of a decoder block, at the
//! granularity that kernels are fused at.
//!
//! The decoder is written once over this trait. Activations never leave the device: an operation reads and writes the
//! device's own buffers, and says so. A row's bits depend on its own sequence and adapter alone, on any device.

use std::fmt;
use std::sync::Arc;

use crate::attention::KvStore;
use crate::canonical::AdapterWeights;
use crate::mapped_file::MappedRows;
use crate::quantized::WeightType;
use crate::shape::{AttentionPlan, DecoderShape};
use crate::step::Step;

/// A weight matrix as it lies in a file, row-major `[out_features, in_features]`.
#[derive(Debug, Clone, Copy)]
pub struct MatrixSource<'a> {
    pub weight_type: WeightType,
    /// `(out_features, in_features)`
    pub shape: (usize, usize),
    pub bytes: &'a [u8],
    /// `row_order[i]` says which row of the file becomes row `i`; `None` keeps the order.
    pub row_order: Option<&'a [usize]>,
}

/// What a linear layer writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    Q,
    K,
    V,
    Gate,
    Up,
    /// What is added to the hidden state next.
    Residual,
}

impl Output {
    pub const COUNT: usize = 6;
}

/// A linear layer in a call.
#[derive(Debug)]
pub struct Layer<'a, D: Device> {
    pub linear: &'a D::Linear,
    /// Number of the layer within its decoder block, as in [`AdapterWeights::site`].
    pub module: usize,
    pub output: Output,
}

/// The most that a step can hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepLimits {
    pub max_rows: usize,
    pub max_sequences: usize,
}

/// Where an adapter is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Placement {
    /// Rows may run with it for as long as the lease is held.
    Ready(Lease),
    /// On its way, which [`Device::bring_adapters`] takes it. It may go as soon as it is there, unless this lease is held until
    /// then.
    Loading(Lease),
    /// Adapters in use take the room; ask again when one of them has ended.
    Full,
}

/// Keeps an adapter where it is.
#[derive(Debug, Clone, Default)]
pub struct Lease(pub(crate) Arc<()>);

impl PartialEq for Lease {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Lease {}

/// What a device has of adapters.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct AdapterTier {
    pub resident: usize,
    pub resident_bytes: usize,
    pub loads: u64,
    pub evictions: u64,
    /// Time that transfers took, in seconds, all together.
    pub transfer_seconds: f64,
}

/// What a device can do at most.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Peaks {
    /// Reading its memory.
    pub bytes_per_second: f64,
    /// Products of 8-bit integers in registers; a multiply and an add are two.
    pub int8_operations_per_second: f64,
}

/// Why a device cannot go on: a fault of the server, never of a request.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    #[error("base layer: {0}")]
    BaseLayer(String),
    #[error("token {0} is neither of the vocabulary nor of the prelude of its row's adapter")]
    Token(u32),
    #[error("adapter generation {0:?} is not on the device")]
    NotPlaced(String),
    #[error(
        "adapter takes {wanted} bytes of device memory, engine.device_adapters_mib allows {budget} for all: raise it"
    )]
    AdapterTooLarge { wanted: usize, budget: usize },
    #[error("device: {0}")]
    Driver(#[from] crate::cuda::driver::DriverError),
    #[error("{0}")]
    Unsupported(String),
}

/// The logits of one row.
pub trait Logits {
    /// All of them, `[vocab_size]`, to be changed freely. A device that holds them elsewhere copies them here.
    ///
    /// # Errors
    /// When the device does not answer.
    fn all(&mut self) -> Result<&mut [f32], DeviceError>;

    /// What the device has found out about them, if it looks.
    fn summary(&self) -> Option<Summary<'_>>;
}

/// The likeliest tokens of a row, and what its probabilities add up to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Summary<'a> {
    /// The tokens of the greatest logits; the greater first, of equal ones the lower id.
    pub ids: &'a [u32],
    /// Their logits.
    pub logits: &'a [f32],
    /// `ln Σ e^logit`; not a number if one of the logits is none.
    pub log_sum: f64,
}

/// Logits in the host's memory.
#[derive(Debug)]
pub struct HostLogits<'a>(pub &'a mut [f32]);

impl Logits for HostLogits<'_> {
    fn all(&mut self) -> Result<&mut [f32], DeviceError> {
        Ok(self.0)
    }

    fn summary(&self) -> Option<Summary<'_>> {
        None
    }
}

/// Who asks for a step: what it does while the step is computed, and with what comes of it.
pub trait Caller {
    /// The device is at work, or begins when this returns if it is the host's processor. Called once, before any logits,
    /// in a step that does not fail earlier.
    fn meanwhile(&mut self) {}

    /// `index` is one into [`Step::logits_rows`].
    ///
    /// # Errors
    /// Ends the step.
    fn on_logits(&mut self, index: usize, logits: &mut dyn Logits) -> Result<(), DeviceError>;
}

/// One with nothing to do meanwhile.
impl<F: FnMut(usize, &mut dyn Logits) -> Result<(), DeviceError>> Caller for F {
    fn on_logits(&mut self, index: usize, logits: &mut dyn Logits) -> Result<(), DeviceError> {
        self(index, logits)
    }
}

pub trait Device: fmt::Debug + Send + Sized + 'static {
    /// The weights and the bias of a linear layer.
    type Linear: fmt::Debug + Send;
    /// The weights of one linear layer of every expert of a block, all of one shape, without biases.
    type Stack: fmt::Debug + Send;
    /// The weights of a norm.
    type Norm: fmt::Debug + Send;
    /// The table of token embeddings.
    type Embedding: fmt::Debug + Send;

    /// Whether it computes beside the host: what it is asked for is not done yet when the call returns. Such a device
    /// calls [`Caller::meanwhile`] in [`Device::logits`], before it waits; for any other, the decoder does before the step. It
    /// does there too what [`Device::bring_adapters`] does.
    const IS_BESIDE_HOST: bool;

    /// What it is, for people: log, `/health`, metrics, reports.
    fn name(&self) -> String;

    /// Says what will be loaded; before anything is.
    ///
    /// # Errors
    /// When this device has no kernels for such a decoder.
    fn prepare(&mut self, shape: &DecoderShape, plan: &AttentionPlan) -> Result<(), DeviceError>;

    /// # Errors
    /// When the matrix cannot be taken over.
    fn load_linear(&mut self, source: &MatrixSource<'_>, bias: Option<Vec<f32>>) -> Result<Self::Linear, DeviceError>;

    /// `source` are the matrices of `count` experts, one below the other.
    ///
    /// # Errors
    /// When they cannot be taken over.
    fn load_stack(&mut self, source: &MatrixSource<'_>, count: usize) -> Result<Self::Stack, DeviceError>;

    /// The bias is there where the shape's norms center.
    fn load_norm(&mut self, weight: Vec<f32>, bias: Option<Vec<f32>>) -> Result<Self::Norm, DeviceError>;

    fn load_embedding(&mut self, rows: MappedRows) -> Result<Self::Embedding, DeviceError>;

    /// Bytes of a layer's weights on the device.
    fn linear_bytes(linear: &Self::Linear) -> usize;

    /// The same of all experts.
    fn stack_bytes(stack: &Self::Stack) -> usize;

    /// Makes room for steps, and for `num_blocks` KV blocks; what was in the KV store is lost.
    ///
    /// # Errors
    /// When the device's memory does not hold them.
    fn reserve(&mut self, limits: StepLimits, num_blocks: usize) -> Result<(), DeviceError>;

    fn num_kv_blocks(&self) -> usize;

    /// The KV store, where it is in the host's memory.
    fn host_kv(&mut self) -> Option<&mut KvStore>;

    /// KV blocks that the device's memory holds beside the weights and a step of `limits`, with `adapter_bytes` left for
    /// adapters; `None` when it is the host's memory.
    ///
    /// # Errors
    /// When there is no room for a single one.
    fn max_kv_blocks(&self, limits: StepLimits, adapter_bytes: usize) -> Result<Option<usize>, DeviceError>;

    /// Sees to it that rows can run with an adapter. What is pinned goes after all others when room is needed. Nothing is asked
    /// of the device here.
    ///
    /// # Errors
    /// When the device can never hold it.
    fn place(
        &mut self,
        generation: &str,
        weights: &Arc<AdapterWeights>,
        is_pinned: bool,
    ) -> Result<Placement, DeviceError>;

    /// Takes adapters that were asked for one step on their way to the device. Says whether one has arrived or failed by that, so
    /// that it is time to ask for it again.
    fn bring_adapters(&mut self) -> bool;

    /// Its adapters; `None` when they are those of the host.
    fn adapter_tier(&self) -> Option<AdapterTier>;

    /// Measures what it can do at most; `None` where it has nothing to measure with.
    ///
    /// # Errors
    /// When the device does not answer, or has no memory left to measure with.
    fn measure_peaks(&self) -> Result<Option<Peaks>, DeviceError>;

    /// Begins a step: copies blocks, and makes each row's token its hidden state.
    ///
    /// # Errors
    /// When a token is of neither the vocabulary nor a prelude.
    fn begin(&mut self, step: &Step<'_>, embedding: &Self::Embedding) -> Result<(), DeviceError>;

    /// `hidden += residual` where `add_residual`, then `input = norm(hidden)`.
    fn add_norm(&mut self, step: &Step<'_>, norm: &Self::Norm, add_residual: bool) -> Result<(), DeviceError>;

    /// `residual = norm(residual) · residual_scale`, of a decoder that has one of the two.
    ///
    /// # Errors
    /// When the device has no kernel for it.
    fn adjust_residual(&mut self, step: &Step<'_>, norm: Option<&Self::Norm>) -> Result<(), DeviceError>;

    /// Norms every head of the queries and of the keys, of a decoder that does.
    ///
    /// # Errors
    /// When the device has no kernel for it.
    fn norm_heads(&mut self, step: &Step<'_>, norms: [&Self::Norm; 2]) -> Result<(), DeviceError>;

    /// Linear layers of decoder block `block` that read the input, with what the adapters of the rows do to them.
    fn linears<const N: usize>(
        &mut self,
        step: &Step<'_>,
        block: usize,
        layers: [Layer<'_, Self>; N],
    ) -> Result<(), DeviceError>;

    /// Turns queries and keys by their positions, and stores keys and values of decoder block `block`. `keys` is the layer that made
    /// the keys.
    fn rotate_and_store(&mut self, step: &Step<'_>, block: usize, keys: &Self::Linear) -> Result<(), DeviceError>;

    /// `input = attention` of the queries over the positions that each row sees.
    fn attend(&mut self, step: &Step<'_>, block: usize) -> Result<(), DeviceError>;

    /// The feed-forward of decoder block `block` by experts: `residual` = the sum of what those that `router` chooses for a row make
    /// of its input, each times its share, with what the adapters of the rows do to router and experts. `experts` are their
    /// gates, ups and downs.
    ///
    /// The experts of a row are those of the greatest scores; of equal ones, that of the lower number. They are added up in the
    /// order of their scores.
    ///
    /// # Errors
    /// When the device fails.
    fn run_experts(
        &mut self,
        step: &Step<'_>,
        block: usize,
        router: &Self::Linear,
        experts: &[Self::Stack; 3],
    ) -> Result<(), DeviceError>;

    /// `input` = what the shape's activation makes of `gate` and `up`.
    fn activate(&mut self, step: &Step<'_>) -> Result<(), DeviceError>;

    /// Ends a step: norm and head of the rows whose logits are wanted.
    fn logits(
        &mut self,
        step: &Step<'_>,
        norm: &Self::Norm,
        head: &Self::Linear,
        caller: &mut dyn Caller,
    ) -> Result<(), DeviceError>;
}
