//! A random decoder small enough to make, write and check within a test, and random adapters for any decoder.

// Every test file compiles this one for itself and uses its own share.
#![allow(dead_code)]

pub mod peft;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use emulator::Emulator;
use half::f16;
use kernels::attention::{BLOCK_SIZE, BlockId, KvType};
use kernels::cuda::Cuda;
use kernels::cuda::nvidia::Nvidia;
use kernels::device::{Device as ComputeDevice, Lease, Logits, Placement, StepLimits};
use kernels::host::Host;
use kernels::low_rank::LowRank;
use kernels::{Cpu, Isa};
use lorry::adapter::canonical::{Adapter, AdapterWeights, Coverage, SiteDelta};
use lorry::model::decoder::Decoder;
use lorry::model::gguf::GgufError;
use lorry::model::spec::{Architecture, ModelSpec, Module};
use lorry::model::{AdapterGroup, ForwardBatch, Model, SequenceRows, unquantized};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// A GGUF file before it is written; tests may change it.
pub struct TinyModel {
    pub spec: ModelSpec,
    /// Type of the matrices; vectors are always F32.
    pub dtype: GgmlDType,
    pub metadata: BTreeMap<String, Value>,
    /// By GGUF's name, the rows in Hugging Face order.
    pub weights: BTreeMap<String, Tensor>,
}

impl TinyModel {
    /// `llama` without biases and with a tied head; `qwen2` with biases on q, k, v and a head of its own.
    pub fn new(architecture: Architecture, dtype: GgmlDType, seed: u64) -> Self {
        let spec = ModelSpec {
            architecture,
            hidden_size: 256,
            intermediate_size: 512,
            num_layers: 2,
            num_heads: 4,
            num_kv_heads: 2,
            head_dim: 64,
            vocab_size: 320,
            rope_theta: 5e4,
            norm_eps: 1e-6,
            context_length: 256,
            features: architecture.features(),
        };
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut weights = BTreeMap::new();
        let mut add = |name: String, shape: &[usize], mean: f32, deviation: f32| {
            let values = random(&mut rng, shape.iter().product(), mean, deviation);
            weights.insert(name, Tensor::from_vec(values, shape, &Device::Cpu).unwrap());
        };
        let (hidden, vocab) = (spec.hidden_size, spec.vocab_size);
        add("token_embd.weight".into(), &[vocab, hidden], 0.0, 1.0);
        add("output_norm.weight".into(), &[hidden], 1.0, 0.2);
        if architecture == Architecture::Qwen2 {
            add("output.weight".into(), &[vocab, hidden], 0.0, 0.1);
        }
        for layer in 0..spec.num_layers {
            for norm in ["attn_norm", "ffn_norm"] {
                add(format!("blk.{layer}.{norm}.weight"), &[hidden], 1.0, 0.2);
            }
            for module in Module::PLAIN {
                let (inputs, outputs) = spec.module_shape(module);
                // Results of about unit variance, and queries and keys that make attention choose.
                let gain = if matches!(module, Module::QProj | Module::KProj) { 1.3 } else { 1.0 };
                add(weight_name(layer, module), &[outputs, inputs], 0.0, gain / (inputs as f32).sqrt());
                if architecture == Architecture::Qwen2 && module <= Module::VProj {
                    add(bias_name(layer, module), &[outputs], 0.0, 0.5);
                }
            }
        }
        Self { metadata: metadata(&spec), spec, dtype, weights }
    }

    /// The type a tensor has in the file.
    pub fn dtype_of(&self, weight: &Tensor) -> GgmlDType {
        if weight.rank() == 1 { GgmlDType::F32 } else { self.dtype }
    }

    pub fn write(&self, path: &Path) {
        write_gguf(path, &self.metadata, &self.tensors());
    }

    /// As parts of a split model, the first with most of the metadata and none but its share of the tensors; their paths.
    pub fn write_parts(&self, dir: &Path, count: usize) -> Vec<PathBuf> {
        let tensors = self.tensors();
        let parts = tensors.chunks(tensors.len().div_ceil(count)).enumerate().map(|(number, tensors)| {
            let path = dir.join(format!("tiny-{:05}-of-{count:05}.gguf", number + 1));
            let mut metadata = if number == 0 { self.metadata.clone() } else { BTreeMap::new() };
            metadata.insert("split.no".into(), Value::U16(number as u16));
            metadata.insert("split.count".into(), Value::U16(count as u16));
            write_gguf(&path, &metadata, tensors);
            path
        });
        parts.collect()
    }

    fn tensors(&self) -> Vec<(String, QTensor)> {
        let quantize = |(name, weight): (&String, &Tensor)| {
            let rows = match name.rsplit('.').nth(1) {
                Some("attn_q") => self.permuted(weight, self.spec.num_heads),
                Some("attn_k") => self.permuted(weight, self.spec.num_kv_heads),
                _ => weight.clone(),
            };
            (name.clone(), QTensor::quantize(&rows, self.dtype_of(weight)).unwrap())
        };
        self.weights.iter().map(quantize).collect()
    }

    /// What llama.cpp's converter does to the rows of queries and keys of architecture `llama`.
    fn permuted(&self, weight: &Tensor, num_heads: usize) -> Tensor {
        if !self.spec.features.has_interleaved_heads {
            return weight.clone();
        }
        let halves = weight.reshape((num_heads, 2, self.spec.head_dim / 2, self.spec.hidden_size)).unwrap();
        halves.transpose(1, 2).unwrap().reshape(weight.shape()).unwrap()
    }

    /// Through a file, as any model.
    pub fn load(&self, place: Place) -> Box<dyn Loaded> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tiny.gguf");
        self.write(&path);
        place.load(&path, usize::MAX).unwrap()
    }
}

fn write_gguf(path: &Path, metadata: &BTreeMap<String, Value>, tensors: &[(String, QTensor)]) {
    let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    gguf_file::write(&mut File::create(path).unwrap(), &metadata, &tensors).unwrap();
}

/// A model of architecture `qwen2` in a file, for as many decoders as a test loads.
pub struct TinyFile {
    pub spec: ModelSpec,
    pub path: PathBuf,
    _dir: tempfile::TempDir,
}

impl TinyFile {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (path, model) = (dir.path().join("tiny.gguf"), TinyModel::new(Architecture::Qwen2, GgmlDType::Q4K, 1));
        model.write(&path);
        Self { spec: model.spec, path, _dir: dir }
    }

    pub fn lora(&self, rank: usize, seed: u64) -> Arc<Adapter> {
        Lora::random(&self.spec, rank, false, seed).adapter(&format!("adapter-{seed}"))
    }
}

/// Where a decoder runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// On the CPU, with so many threads.
    Host(Isa, usize),
    /// The same, with keys and values in q8_0.
    HostQ8(Isa, usize),
    /// On the CUDA kernels, run by the CPU.
    EmulatedGpu(KvType),
    /// On a card.
    Gpu(KvType),
}

impl Place {
    /// Every one there is here, on `num_threads` threads.
    pub fn all(num_threads: usize) -> Vec<Self> {
        Isa::available().map(|isa| Self::Host(isa, num_threads)).chain([Self::EmulatedGpu(KvType::F16)]).collect()
    }

    /// What it keeps keys and values as.
    pub fn kv_type(self) -> KvType {
        match self {
            Self::Host(..) => KvType::F16,
            Self::HostQ8(..) => KvType::Q8_0,
            Self::EmulatedGpu(kv_type) | Self::Gpu(kv_type) => kv_type,
        }
    }

    pub fn load(self, path: &Path, context_length: usize) -> Result<Box<dyn Loaded>, GgufError> {
        Ok(match self {
            Self::Host(isa, num_threads) | Self::HostQ8(isa, num_threads) => {
                let host = Host::new(Cpu::new(isa, num_threads), unquantized::load, self.kv_type());
                Box::new(Decoder::load(path, host, context_length)?)
            }
            Self::EmulatedGpu(kv_type) => Box::new(Decoder::load(path, emulated_gpu(kv_type), context_length)?),
            Self::Gpu(kv_type) => {
                let card = Nvidia::open(0).unwrap_or_else(|e| panic!("{GPU_VARIABLE} is set, and {e}"));
                Box::new(Decoder::load(path, Cuda::new(card, 1 << 30, kv_type), context_length)?)
            }
        })
    }
}

/// Set where the tests of the CUDA kernels are to run on a card (`make test-gpu`).
const GPU_VARIABLE: &str = "LORRY_TEST_GPU";

/// Where the CUDA kernels run: on the CPU, unless a card is asked for.
pub fn gpu(kv_type: KvType) -> Place {
    if std::env::var_os(GPU_VARIABLE).is_some() { Place::Gpu(kv_type) } else { Place::EmulatedGpu(kv_type) }
}

/// A device whose memory is enough for any test.
pub fn emulated_gpu(kv_type: KvType) -> Cuda<Emulator> {
    Cuda::new(Emulator::new(4 << 30), 1 << 30, kv_type)
}

/// A decoder on some device.
pub trait Loaded: Model {
    /// Room for the steps of these tests and for `num_blocks` KV blocks.
    fn reserve(&mut self, num_blocks: usize);
}

impl<D: ComputeDevice> Loaded for Decoder<D> {
    fn reserve(&mut self, num_blocks: usize) {
        self.reserve(StepLimits { max_rows: 512, max_sequences: 64 }, num_blocks).unwrap();
    }
}

/// GGUF's name of a module's matrix.
pub fn weight_name(layer: usize, module: Module) -> String {
    format!("blk.{layer}.{}.weight", module.gguf_name())
}

/// GGUF's name of a module's bias.
pub fn bias_name(layer: usize, module: Module) -> String {
    format!("blk.{layer}.{}.bias", module.gguf_name())
}

fn metadata(spec: &ModelSpec) -> BTreeMap<String, Value> {
    let architecture = spec.architecture.name();
    let number = |n: usize| Value::U32(n as u32);
    // A SentencePiece vocabulary of three control tokens, the bytes, and fillers.
    let fillers = (259..spec.vocab_size).map(|id| format!("filler{id}"));
    let tokens = ["<unk>", "<s>", "</s>"].map(str::to_owned).into_iter();
    let tokens = tokens.chain((0..=255).map(|byte| format!("<0x{byte:02X}>"))).chain(fillers);
    let kinds = (0..spec.vocab_size).map(|id| Value::I32(if id < 3 { 3 } else { 6 - 5 * i32::from(id >= 259) }));
    let of_decoder = [
        ("embedding_length", number(spec.hidden_size)),
        ("feed_forward_length", number(spec.intermediate_size)),
        ("block_count", number(spec.num_layers)),
        ("attention.head_count", number(spec.num_heads)),
        ("attention.head_count_kv", number(spec.num_kv_heads)),
        ("attention.layer_norm_rms_epsilon", Value::F32(spec.norm_eps)),
        ("rope.freq_base", Value::F32(spec.rope_theta)),
        ("context_length", number(spec.context_length)),
    ];
    let of_tokenizer = [
        ("model", Value::String("llama".into())),
        ("tokens", Value::Array(tokens.map(Value::String).collect())),
        ("token_type", Value::Array(kinds.collect())),
        ("scores", Value::Array(vec![Value::F32(0.0); spec.vocab_size])),
        ("bos_token_id", number(1)),
        ("eos_token_id", number(2)),
    ];
    let of_decoder = of_decoder.into_iter().map(|(key, value)| (format!("{architecture}.{key}"), value));
    let of_tokenizer = of_tokenizer.into_iter().map(|(key, value)| (format!("tokenizer.ggml.{key}"), value));
    let name = ("general.architecture".to_owned(), Value::String(architecture.into()));
    of_decoder.chain(of_tokenizer).chain([name]).collect()
}

/// A random LoRA on all seven sites of every layer.
pub struct Lora {
    pub rank: usize,
    /// Alpha over rank.
    pub scale: f32,
    /// `[layer][Module::index]`
    pub sites: Vec<[LoraSite; Module::PLAIN.len()]>,
}

/// The factors of one site, exact in f16.
pub struct LoraSite {
    /// `(in, out)` features.
    pub shape: (usize, usize),
    /// `[rank, in]`
    pub a: Vec<f32>,
    /// `[out, rank]`
    pub b: Vec<f32>,
    /// `[out]`, scaled.
    pub bias: Option<Vec<f32>>,
}

impl Lora {
    pub fn random(spec: &ModelSpec, rank: usize, with_bias: bool, seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let site = |module| {
            let (inputs, outputs) = spec.module_shape(module);
            let a = random(&mut rng, rank * inputs, 0.0, (inputs as f32).powf(-0.5));
            let b = random(&mut rng, outputs * rank, 0.0, 0.15 * (rank as f32).powf(-0.5));
            let bias = with_bias.then(|| random(&mut rng, outputs, 0.0, 0.2));
            LoraSite { shape: (inputs, outputs), a, b, bias }
        };
        let mut site = site;
        let sites = (0..spec.num_layers).map(|_| Module::PLAIN.map(&mut site)).collect();
        Self { rank, scale: 2.0, sites }
    }

    /// The adapter of these weights; its name is its generation.
    pub fn adapter(&self, name: &str) -> Arc<Adapter> {
        let delta = |site: &LoraSite| {
            let (inputs, outputs) = site.shape;
            let halves = |values: &[f32]| values.iter().map(|value| f16::from_f32(*value)).collect::<Vec<_>>();
            let (a, b) = (halves(&site.a), halves(&site.b));
            let low_rank = LowRank::pack(self.rank, inputs, outputs, self.scale, &a, &b);
            Some(SiteDelta { low_rank: Some(low_rank), bias: site.bias.clone(), ..SiteDelta::default() })
        };
        let layers = self.sites.iter().map(|sites| sites.iter().map(delta).collect()).collect();
        let mut adapter = Adapter {
            name: name.to_owned(),
            generation: name.to_owned(),
            weights: Arc::new(AdapterWeights { layers, ..AdapterWeights::default() }),
            ..Adapter::default()
        };
        adapter.coverage = Coverage::of(&adapter);
        Arc::new(adapter)
    }
}

/// Evenly distributed values that f16 represents.
fn random(rng: &mut ChaCha8Rng, count: usize, mean: f32, deviation: f32) -> Vec<f32> {
    let mut value = || f16::from_f32(mean + deviation * 3.0f32.sqrt() * rng.random_range(-1.0..1.0)).to_f32();
    (0..count).map(|_| value()).collect()
}

pub fn random_tokens(spec: &ModelSpec, count: usize, seed: u64) -> Vec<u32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..count).map(|_| rng.random_range(0..spec.vocab_size as u32)).collect()
}

/// Waits until an adapter is on the device.
pub fn place(model: &mut dyn Loaded, adapter: &Adapter) -> Lease {
    let mut _under_way = None;
    loop {
        match model.place(adapter).unwrap() {
            Placement::Ready(lease) => return lease,
            Placement::Loading(lease) => {
                _under_way = Some(lease);
                model.bring_adapters();
                std::thread::yield_now();
            }
            Placement::Full => panic!("the device has no room for adapter {}", adapter.name),
        }
    }
}

/// Logits `[position][vocab]` of a sequence that runs alone and in one chunk.
pub fn logits_alone(decoder: &mut dyn Loaded, tokens: &[u32], adapter: Option<&Arc<Adapter>>) -> Vec<Vec<f32>> {
    let block_table: Vec<BlockId> = (0..tokens.len().div_ceil(BLOCK_SIZE) as u32).map(BlockId).collect();
    decoder.reserve(block_table.len());
    let _lease = adapter.map(|adapter| place(decoder, adapter));
    let rows = 0..tokens.len();
    let groups: Vec<_> =
        adapter.map(|adapter| AdapterGroup { rows: rows.clone(), adapter: adapter.clone() }).into_iter().collect();
    logits_of_rows(decoder, tokens, &[SequenceRows { rows, first_position: 0, block_table: &block_table }], &groups)
}

/// Logits `[row][vocab]` of one step.
pub fn logits_of_rows(
    decoder: &mut dyn Loaded,
    tokens: &[u32],
    sequences: &[SequenceRows<'_>],
    groups: &[AdapterGroup],
) -> Vec<Vec<f32>> {
    let logits_rows: Vec<usize> = (0..tokens.len()).collect();
    let batch = ForwardBatch { copies: &[], tokens, sequences, groups, logits_rows: &logits_rows };
    let mut all = vec![Vec::new(); tokens.len()];
    let mut keep = |row: usize, logits: &mut dyn Logits| {
        all[row] = logits.all()?.to_vec();
        Ok(())
    };
    decoder.forward(&batch, &mut keep).unwrap();
    all
}
