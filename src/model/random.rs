//! Models and adapters of random weights in the shape of real ones: for benchmarks of speed where the files are not at hand.

use std::str::FromStr;
use std::sync::Arc;

use half::f16;
use kernels::canonical::{AdapterWeights, SiteDelta};
use kernels::low_rank::LowRank;
use kernels::mapped_file::{MappedFile, MappedRows};
use kernels::quantized::{BlockFormat, WeightType};
use kernels::shape::Experts;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::gguf::{GgufError, RawTensor};
use super::memory::has_six_bits;
use super::spec::{Architecture, Features, ModelSpec, Module};
use super::tensors::Tensors;
use crate::adapter::canonical::{Adapter, Coverage};

/// The shape of a model of the Qwen2.5-Coder or Qwen3-Coder family.
#[derive(Debug, Clone, PartialEq)]
pub struct Shape {
    /// As it was asked for.
    pub name: String,
    pub spec: ModelSpec,
}

impl FromStr for Shape {
    type Err = String;

    /// `0.5b`, `7b`, `32b` or `30b-a3b`, from the `config.json` of the models.
    fn from_str(name: &str) -> Result<Self, String> {
        let (hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, head_dim, vocab_size) = match name {
            "0.5b" => (896, 4864, 24, 14, 2, 64, 151_936),
            "7b" => (3584, 18944, 28, 28, 4, 128, 152_064),
            "32b" => (5120, 27648, 64, 40, 8, 128, 152_064),
            "30b-a3b" => (2048, 768, 48, 32, 4, 128, 151_936),
            _ => return Err(format!("unknown shape {name:?} (0.5b, 7b, 32b, 30b-a3b)")),
        };
        let experts = (name == "30b-a3b").then_some(Experts { count: 128, used: 8, normalizes_shares: true });
        let architecture = if experts.is_some() { Architecture::Qwen3Moe } else { Architecture::Qwen2 };
        let spec = ModelSpec {
            architecture,
            hidden_size,
            intermediate_size,
            num_layers,
            num_heads,
            num_kv_heads,
            head_dim,
            vocab_size,
            rope_theta: 1e6,
            norm_eps: 1e-6,
            context_length: 32_768,
            features: Features { experts, ..architecture.features() },
        };
        Ok(Self { name: name.to_owned(), spec })
    }
}

/// Weights in the types that llama.cpp's Q4_K_M has ([`Mix::Q4KM`](super::memory::Mix)).
///
/// All matrices of a type begin with the same bytes: what they hold does not matter for their speed.
#[derive(Debug)]
pub struct RandomTensors {
    four_bits: Bytes,
    six_bits: Bytes,
    /// In f32, as files have them.
    router: Vec<u8>,
    num_layers: usize,
}

/// As many bytes of one type as its largest matrix takes.
#[derive(Debug)]
struct Bytes {
    wide: (BlockFormat, MappedFileBytes),
    narrow: (BlockFormat, MappedFileBytes),
}

type MappedFileBytes = Arc<MappedFile>;

impl RandomTensors {
    /// # Errors
    /// When there is no memory for the largest matrix.
    pub fn new(spec: &ModelSpec, seed: u64) -> std::io::Result<Self> {
        let of_module = |module| {
            let (inputs, _) = spec.module_shape(module);
            spec.file_rows(module).shape(inputs).into_iter().product()
        };
        let largest = spec.modules().map(of_module).fold(spec.vocab_size * spec.hidden_size, usize::max);
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut bytes = |format: BlockFormat| -> std::io::Result<(BlockFormat, MappedFileBytes)> {
            let len = largest.div_ceil(format.block_len()) * format.block_bytes();
            let pattern: Vec<u8> = (0..PATTERN_BLOCKS).flat_map(|_| random_block(&mut rng, format)).collect();
            let file = MappedFile::of_memory(len, |bytes| {
                bytes.chunks_mut(pattern.len()).for_each(|part| part.copy_from_slice(&pattern[..part.len()]));
            })?;
            Ok((format, Arc::new(file)))
        };
        let (inputs, outputs) = spec.module_shape(Module::Router);
        let router = inputs * outputs;
        Ok(Self {
            four_bits: Bytes { wide: bytes(BlockFormat::Q4_K)?, narrow: bytes(BlockFormat::Q5_0)? },
            six_bits: Bytes { wide: bytes(BlockFormat::Q6_K)?, narrow: bytes(BlockFormat::Q8_0)? },
            router: (0..router).flat_map(|_| rng.random_range(-0.1_f32..0.1).to_le_bytes()).collect(),
            num_layers: spec.num_layers,
        })
    }

    fn bytes(&self, name: &str, width: usize) -> &(BlockFormat, MappedFileBytes) {
        let bytes = if has_six_bits(name, self.num_layers) { &self.six_bits } else { &self.four_bits };
        if width.is_multiple_of(256) { &bytes.wide } else { &bytes.narrow }
    }
}

/// Different blocks, after which they come again.
const PATTERN_BLOCKS: usize = 4096;

/// A block of random weights of about the size that real ones have.
fn random_block(rng: &mut ChaCha8Rng, format: BlockFormat) -> Vec<u8> {
    let mut block: Vec<u8> = (0..format.block_bytes()).map(|_| rng.random()).collect();
    let mut scale = |at: usize, value: f32| block[at..at + 2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
    match format {
        BlockFormat::Q4_K => {
            scale(0, 1e-4);
            scale(2, 7e-4);
        }
        BlockFormat::Q6_K => scale(208, 1e-5),
        BlockFormat::Q8_0 => scale(0, 2e-4),
        _ => scale(0, 2e-3),
    }
    block
}

impl Tensors for RandomTensors {
    fn has_tensor(&self, name: &str) -> bool {
        ["attn_q.bias", "attn_k.bias", "attn_v.bias", "output.weight"].iter().any(|end| name.ends_with(end))
    }

    fn matrix(&self, name: &str, shape: &[usize]) -> Result<RawTensor<'_>, GgufError> {
        if name.contains(Module::Router.gguf_name()) {
            return Ok(RawTensor { weight_type: WeightType::F32, shape: shape.to_vec(), bytes: &self.router });
        }
        let (num_rows, width) = rows_of(shape);
        let (format, bytes) = self.bytes(name, width);
        let row_bytes = format.row_bytes(width).ok_or_else(|| GgufError::Damaged(name.to_owned()))?;
        let bytes = &bytes.bytes()[..row_bytes * num_rows];
        Ok(RawTensor { weight_type: WeightType::Blocks(*format), shape: shape.to_vec(), bytes })
    }

    fn matrix_rows(&self, name: &str, shape: &[usize]) -> Result<MappedRows, GgufError> {
        let (weight_type, len) = self.matrix(name, shape).map(|tensor| (tensor.weight_type, tensor.bytes.len()))?;
        let (num_rows, width) = rows_of(shape);
        let (_, file) = self.bytes(name, width);
        Ok(MappedRows { file: file.clone(), weight_type, place: 0..len, num_rows })
    }

    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, GgufError> {
        let value = if name.contains("norm") { 1.0 } else { 0.1 };
        Ok(vec![value; len])
    }

    fn release_pages(&mut self) {}
}

/// Rows of a tensor, and their width.
fn rows_of(shape: &[usize]) -> (usize, usize) {
    let (width, rows) = shape.split_last().map_or((0, shape), |(width, rows)| (*width, rows));
    (rows.iter().product(), width)
}

/// A LoRA of `rank` on every linear layer.
pub fn lora(spec: &ModelSpec, rank: usize, seed: u64) -> Arc<Adapter> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut site = |module: Module| {
        let (inputs, outputs) = spec.module_shape(module);
        let mut halves = |n: usize, size: f32| -> Vec<f16> {
            (0..n).map(|_| f16::from_f32(rng.random_range(-size..size))).collect()
        };
        let (a, b) = (halves(rank * inputs, (inputs as f32).powf(-0.5)), halves(outputs * rank, 0.02));
        let low_rank = LowRank::pack(rank, inputs, outputs, 1.0, &a, &b);
        SiteDelta { low_rank: Some(low_rank), ..SiteDelta::default() }
    };
    let mut weights = AdapterWeights::default();
    for layer in 0..spec.num_layers {
        spec.modules().for_each(|module| weights.set_site(layer, module.index(), site(module)));
    }
    let name = format!("random-{seed}");
    let mut adapter = Adapter { generation: name.clone(), name, weights: Arc::new(weights), ..Adapter::default() };
    adapter.coverage = Coverage::of(&adapter);
    Arc::new(adapter)
}
