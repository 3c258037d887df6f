//! Puts a model where it is to run: chooses the device, loads the weights onto it and makes room for steps.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{env, fs, io, thread};

use kernels::attention::BLOCK_SIZE;
use kernels::cuda::Cuda;
use kernels::cuda::nvidia::{Nvidia, OpenError};
use kernels::device::{Device, DeviceError, StepLimits};
use kernels::host::Host;
use kernels::{Cpu, Isa};
use sha2::{Digest, Sha256};
use tracing::{info, warn};

use super::decoder::Decoder;
use super::gguf::{GgufError, GgufFile};
use super::host_memory;
use super::memory::{self, Memory};
use super::random::{RandomTensors, Shape};
use super::spec::ModelSpec;
use super::{Model, unquantized};
use crate::config::{DeviceChoice, EngineConfig};
use crate::engine::prefix_disk::{self, BlockFiles, Folder};
use crate::engine::{self, EngineHandle};
use crate::hexadecimal::hexadecimal;
use crate::metrics::Metrics;

/// Rows of a step where nobody says otherwise: what keeps the arithmetic of the device busy without keeping others waiting.
const HOST_ROWS: usize = 128;
const GPU_ROWS: usize = 1024;

#[derive(Debug, thiserror::Error)]
pub enum ResidentError {
    #[error("model {path}: {source}")]
    Load { path: PathBuf, source: GgufError },
    #[error(
        "{path} takes about {needed}, {weights} of it weights, and the control group of this process leaves {left}: lower \
         engine.kv_cache_mib, set engine.kv_cache_type = \"q8_0\", take a smaller model, or raise the group's limit"
    )]
    ControlGroup { path: PathBuf, needed: String, weights: String, left: String },
    #[error("random weights: {0}")]
    Build(GgufError),
    #[error("the model does not run on {device}: {source}")]
    Device { device: String, source: DeviceError },
    #[error("no memory for random weights: {0}")]
    Random(io::Error),
    #[error("engine.device = \"cuda\": {0}")]
    NoGpu(#[from] OpenError),
    #[error("{0}")]
    PrefixDisk(#[from] prefix_disk::OpenError),
    #[error(
        "engine.prefix_cache_dir is for bases on the CPU, and this one is on {0}: leave it empty, or set engine.device = \"cpu\""
    )]
    PrefixDiskOnCard(String),
    #[error("engine.prefix_cache_dir: this build cannot be told from others, its program cannot be read: {0}")]
    PrefixDiskIdentity(io::Error),
}

/// Where weights come from.
#[derive(Debug, Clone, Copy)]
pub enum Source<'a> {
    /// A GGUF file.
    File(&'a Path),
    /// Nowhere: to measure speed.
    Random(&'a Shape),
}

const RANDOM_SEED: u64 = 1;

/// A model that is ready to be stepped.
pub struct Resident {
    pub model: Box<dyn Model>,
    /// What it runs on, for people.
    pub device: String,
    limits: StepLimits,
}

impl Resident {
    /// Opens the folder in which its prefix cache goes on; `None` where `config` names none. `file` is that of the base.
    ///
    /// # Errors
    /// When the folder cannot be used, or the model is on a card.
    pub fn open_block_files(
        &mut self,
        config: &EngineConfig,
        file: &Path,
        metrics: &Metrics,
    ) -> Result<Option<BlockFiles>, ResidentError> {
        let Some(dir) = config.prefix_cache_dir() else { return Ok(None) };
        let Some(kv) = self.model.host_kv() else {
            return Err(ResidentError::PrefixDiskOnCard(self.device.clone()));
        };
        let block_bytes = kv.bytes_of_block();
        let identity = self.identity(config, file)?;
        let folder = Folder::open(dir, &identity, block_bytes, config.prefix_cache_dir_mib.saturating_mul(1 << 20))?;
        Ok(Some(BlockFiles::start(folder, metrics.disk_blocks())))
    }

    /// Of everything that keys and values depend on, but for adapters and tokens: the weights, how they are computed (another build may
    /// round otherwise), and what is kept of them.
    fn identity(&self, config: &EngineConfig, file: &Path) -> Result<String, ResidentError> {
        let mut sha256 = Sha256::new();
        let weights =
            GgufFile::open(file).map_err(|source| ResidentError::Load { path: file.to_path_buf(), source })?;
        weights.hash_into(&mut sha256);
        let program = env::current_exe().and_then(fs::read).map_err(ResidentError::PrefixDiskIdentity)?;
        sha256.update(&program);
        let isa = instruction_set(config);
        sha256.update(format!("{isa} {} {}", config.kv_cache_type, self.model.spec().context_length));
        Ok(hexadecimal(sha256)[..32].to_owned())
    }

    /// Starts the engine that steps it, with a prefix cache that goes on in files where there are some.
    pub fn start(self, config: &EngineConfig, block_files: Option<BlockFiles>, metrics: Arc<Metrics>) -> EngineHandle {
        metrics.device_info.with_label_values(&[&self.device]).set(1);
        let engine_config = engine::EngineConfig {
            max_batch_rows: self.limits.max_rows,
            max_sequences: self.limits.max_sequences,
            max_queued: config.max_queued,
            context_length: self.model.spec().context_length,
            max_draft_tokens: config.max_draft_tokens,
            max_inter_token: Some(config.max_inter_token_ms).filter(|ms| *ms > 0).map(Duration::from_millis),
        };
        EngineHandle::start_with_files(self.model, engine_config, block_files, metrics)
    }
}

/// Loads a model onto the device that `config` asks for.
///
/// # Errors
/// When there is no such device, the file cannot be read, or the device does not hold it.
pub fn load(source: Source<'_>, config: &EngineConfig) -> Result<Resident, ResidentError> {
    match config.device {
        DeviceChoice::Cpu => {
            check_memory(source, config)?;
            load_onto(source, host(config), config, HOST_ROWS)
        }
        DeviceChoice::Cuda(number) => load_onto(source, cuda(Nvidia::open(number)?, config), config, GPU_ROWS),
        DeviceChoice::Auto => match Nvidia::first_usable().and_then(Nvidia::open) {
            Ok(card) => load_onto_first(source, cuda(card, config), config),
            Err(reason) => load_onto_host(source, config, &format!("no GPU: {reason}")),
        },
    }
}

/// Loads a model onto this device, or onto the host where the device has no kernels for such a decoder.
fn load_onto_first<D: Device>(source: Source<'_>, device: D, config: &EngineConfig) -> Result<Resident, ResidentError> {
    let name = device.name();
    info!("device: {name}");
    match load_onto(source, device, config, GPU_ROWS) {
        Err(
            ResidentError::Load { source: GgufError::NotOnDevice(reason), .. }
            | ResidentError::Build(GgufError::NotOnDevice(reason)),
        ) => load_onto_host(source, config, &format!("not {name}: {reason}")),
        loaded => loaded,
    }
}

/// `why_not` says why no other device runs it.
fn load_onto_host(source: Source<'_>, config: &EngineConfig, why_not: &str) -> Result<Resident, ResidentError> {
    let device = host(config);
    info!("device: {}; {why_not}", device.name());
    check_memory(source, config)?;
    load_onto(source, device, config, HOST_ROWS)
}

/// Before the kernel ends the process without a word.
fn check_memory(source: Source<'_>, config: &EngineConfig) -> Result<(), ResidentError> {
    let Source::File(path) = source else { return Ok(()) };
    let sizes = |file: GgufFile| {
        let (memory, spec) = (Memory::of_file(&file)?, file.spec()?);
        Ok::<_, GgufError>((memory.needed_bytes(&spec, config), memory.weight_bytes))
    };
    // A file that cannot be read is refused by who loads it.
    let Ok((needed, weights)) = GgufFile::open(path).and_then(sizes) else { return Ok(()) };
    // What a control group does not leave is had nowhere; what the system does not have free, others may give up.
    if let Some(left) = host_memory::left_by_control_groups().filter(|left| needed > *left) {
        return Err(ResidentError::ControlGroup {
            path: path.to_path_buf(),
            needed: memory::readable(needed),
            weights: memory::readable(weights),
            left: memory::readable(left),
        });
    }
    if let Some(available) = host_memory::available_bytes().filter(|available| needed > *available) {
        warn!(
            "{} takes about {}, and {} of memory are available: see engine.kv_cache_mib and kv_cache_type, or take a smaller model",
            path.display(),
            memory::readable(needed),
            memory::readable(available)
        );
    }
    Ok(())
}

fn host(config: &EngineConfig) -> Host {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let num_threads = if config.threads == 0 { cores } else { config.threads };
    Host::new(Cpu::new(instruction_set(config), num_threads), unquantized::load, config.kv_cache_type)
}

fn instruction_set(config: &EngineConfig) -> Isa {
    config.instruction_set.unwrap_or_else(Isa::detect)
}

fn cuda(card: Nvidia, config: &EngineConfig) -> Cuda<Nvidia> {
    Cuda::new(card, device_adapters_bytes(config), config.kv_cache_type)
}

fn device_adapters_bytes(config: &EngineConfig) -> usize {
    config.device_adapters_mib.saturating_mul(1 << 20)
}

/// Loads a model onto this device; `default_rows` are those of a step where `config` does not say.
///
/// # Errors
/// When the file cannot be read, or the device does not hold it.
pub fn load_onto<D: Device>(
    source: Source<'_>,
    device: D,
    config: &EngineConfig,
    default_rows: usize,
) -> Result<Resident, ResidentError> {
    let (name, started) = (device.name(), Instant::now());
    let context_length = if config.context_length == 0 { usize::MAX } else { config.context_length };
    let mut decoder = match source {
        Source::File(path) => Decoder::load(path, device, context_length)
            .map_err(|source| ResidentError::Load { path: path.to_path_buf(), source })?,
        Source::Random(Shape { spec, .. }) => {
            let spec = ModelSpec { context_length: spec.context_length.min(context_length), ..spec.clone() };
            let tensors = RandomTensors::new(&spec, RANDOM_SEED).map_err(ResidentError::Random)?;
            Decoder::build(spec, tensors, device).map_err(ResidentError::Build)?
        }
    };
    let spec = decoder.spec();
    info!(
        "{:?}, {} layers, {} MiB of weights, loaded onto {name} in {:.1} s",
        spec.architecture,
        spec.num_layers,
        decoder.weight_bytes() >> 20,
        started.elapsed().as_secs_f64()
    );
    let max_rows = if config.max_batch_rows == 0 { default_rows } else { config.max_batch_rows };
    let limits = StepLimits { max_rows, max_sequences: config.max_sequences.min(max_rows) };
    if limits.max_sequences < config.max_sequences {
        warn!(
            "engine.max_sequences is {}, and only {max_rows} run at the same time: each has a row of a step, of which \
             engine.max_batch_rows allows no more; raise it",
            config.max_sequences
        );
    }
    let (asked, longest) = (config.context_length, spec.context_length);
    if asked > longest {
        warn!("engine.context_length is {asked}, and sequences end at {longest} tokens: the model knows no more");
    }
    let on_device = |source| ResidentError::Device { device: name.clone(), source };
    let free = decoder.device().max_kv_blocks(limits, device_adapters_bytes(config)).map_err(on_device)?;
    let num_blocks = match free {
        Some(free) if config.kv_cache_mib == 0 => free.clamp(1, memory::max_kv_blocks(spec, config)),
        _ => memory::host_kv_blocks(spec, config),
    };
    decoder.reserve(limits, num_blocks).map_err(on_device)?;
    let room = num_blocks * BLOCK_SIZE;
    if room < longest {
        warn!("sequences end at {room} tokens, not {longest}: the KV store holds no more; raise engine.kv_cache_mib");
    }
    let kv_type = config.kv_cache_type;
    let bytes = memory::readable(num_blocks * memory::kv_block_bytes(decoder.spec(), config));
    info!("KV store: {num_blocks} blocks of {BLOCK_SIZE} tokens in {kv_type}, {bytes}");
    Ok(Resident { model: Box::new(decoder), device: name, limits })
}

#[cfg(test)]
mod tests {
    use emulator::Emulator;
    use kernels::shape::Experts;

    use super::*;
    use crate::config::{Config, Overrides};

    #[test]
    fn a_model_that_the_card_has_no_kernels_for_runs_on_the_host() {
        let mut shape = "0.5b".parse::<Shape>().unwrap();
        (shape.spec.num_layers, shape.spec.vocab_size, shape.spec.head_dim) = (1, 512, 48);
        let config = Config::load(None, &Overrides::default()).unwrap().engine;
        let on_card = load_onto(
            Source::Random(&shape),
            Cuda::new(Emulator::new(1 << 30), 1 << 20, config.kv_cache_type),
            &config,
            GPU_ROWS,
        );
        assert!(on_card.err().unwrap().to_string().contains("head_dim of 48"));
        let loaded = load_onto_first(
            Source::Random(&shape),
            Cuda::new(Emulator::new(1 << 30), 1 << 20, config.kv_cache_type),
            &config,
        );
        assert!(loaded.unwrap().device.starts_with("CPU"));
    }

    #[test]
    fn what_the_launches_of_a_card_have_no_room_for_is_refused_by_name() {
        let config = Config::load(None, &Overrides::default()).unwrap().engine;
        let refusal = |count, used, max_batch_rows| {
            let mut shape = "30b-a3b".parse::<Shape>().unwrap();
            (shape.spec.num_layers, shape.spec.vocab_size, shape.spec.intermediate_size) = (1, 512, 64);
            shape.spec.features.experts = Some(Experts { count, used, normalizes_shares: true });
            let config = EngineConfig { max_batch_rows, ..config.clone() };
            let card = Cuda::new(Emulator::new(1 << 40), 1 << 20, config.kv_cache_type);
            load_onto(Source::Random(&shape), card, &config, GPU_ROWS).err().unwrap().to_string()
        };
        for (count, used) in [(513, 8), (512, 33)] {
            let refusal = refusal(count, used, 16);
            assert!(
                refusal.ends_with(&format!("up to 512 experts, of which a row uses up to 32, not {used} of {count}"))
            );
        }
        let refusal = refusal(4, 2, 40_000);
        assert!(refusal.ends_with(
            "engine.max_batch_rows is 40000, and a step on a CUDA device has up to 32767 rows of this model"
        ));
    }

    #[test]
    fn no_more_sequences_run_than_a_step_has_rows_and_no_number_of_mib_is_too_large() {
        let mut shape = "0.5b".parse::<Shape>().unwrap();
        (shape.spec.num_layers, shape.spec.vocab_size) = (1, 512);
        let config = Config::load(None, &Overrides::default()).unwrap().engine;
        let config = EngineConfig { max_batch_rows: 4, max_sequences: 9, device_adapters_mib: 1 << 44, ..config };
        assert_eq!(device_adapters_bytes(&config), usize::MAX);
        let StepLimits { max_rows, max_sequences } =
            load_onto(Source::Random(&shape), host(&config), &config, HOST_ROWS).unwrap().limits;
        assert_eq!((max_rows, max_sequences), (4, 4));
    }

    #[test]
    fn a_prefix_cache_on_disk_is_refused_on_a_card() {
        let mut shape = "0.5b".parse::<Shape>().unwrap();
        (shape.spec.num_layers, shape.spec.vocab_size) = (1, 512);
        let config = Config::load(None, &Overrides::default()).unwrap().engine;
        let config = EngineConfig { prefix_cache_dir: "nowhere".into(), ..config };
        let card = Cuda::new(Emulator::new(1 << 32), 1 << 20, config.kv_cache_type);
        let mut loaded = load_onto(Source::Random(&shape), card, &config, 16).unwrap();
        let refusal = loaded.open_block_files(&config, Path::new("no file"), &Metrics::default()).unwrap_err();
        let refusal = refusal.to_string();
        assert!(refusal.contains("engine.prefix_cache_dir") && refusal.contains(&loaded.device), "{refusal}");
    }
}
