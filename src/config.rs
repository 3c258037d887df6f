//! Configuration: compiled-in defaults < `--config FILE` < environment `LORRY__SECTION__KEY` < command line.

mod secret;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::fmt::Display;
use std::num::NonZeroU32;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use config::builder::DefaultState;
use config::{ConfigBuilder, Environment, File, FileFormat};
use kernels::Isa;
use kernels::attention::KvType;
use serde::{Deserialize, Deserializer};

use crate::adapter::registry::RegistryOptions;
use crate::experiments::{ExperimentsConfig, SPARE_PLACES};
use crate::fine_tuning::FineTuningConfig;
use crate::icl;
use crate::model::checkpoint::Quantization;

pub use secret::Secret;

/// Where adapters are looked for when nobody says otherwise; may be absent.
pub const DEFAULT_ADAPTERS_DIR: &str = "adapters";
/// Where example stores are kept when nobody says otherwise; may be absent.
pub const DEFAULT_ICL_DIR: &str = "config/icl";

/// A year: so long after now there is always a time that clocks can show.
const MAX_SECONDS: u64 = 365 * 24 * 60 * 60;
/// Of what is waited for and counted: semaphores and channels take no more than some number, which is far above this one.
const MAX_COUNT: usize = 1 << 24;
/// Of rows, sequences and threads: each takes memory at once, and no machine has use for more.
const MAX_ROWS: usize = 1 << 16;
const MAX_THREADS: usize = 1024;
/// An exbibyte, which still has a number of bytes.
const MAX_MIB: usize = 1 << 40;
/// Every key with its default and its meaning.
const DEFAULTS: &str = include_str!("../config/default.toml");

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("configuration from {origin}: {reason}")]
    Layer { origin: String, reason: String },
    #[error("no home directory is known: set LORRY_HOME to the folder for downloaded models")]
    NoHome,
}

/// The whole configuration; `config/default.toml` documents every key.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    pub server: ServerConfig,
    pub model: ModelConfig,
    pub adapters: AdaptersConfig,
    pub engine: EngineConfig,
    pub generation: GenerationConfig,
    pub icl: IclConfig,
    /// By name.
    pub prompt_formats: BTreeMap<String, PromptFormatConfig>,
    pub experiments: ExperimentsConfig,
    pub fine_tuning: FineTuningConfig,
    pub log: LogConfig,
    pub traces: TracesConfig,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServerConfig {
    pub host: String,
    pub port: u16,
    pub max_body_bytes: usize,
    pub max_body_bytes_in_flight: usize,
    pub max_connections: usize,
    pub header_timeout_seconds: u64,
    pub body_timeout_seconds: u64,
    pub keep_alive_seconds: u64,
    pub write_timeout_seconds: u64,
    /// 0 for no limit.
    pub max_request_seconds: u64,
    /// 0 for none.
    pub sse_keep_alive_seconds: u64,
    /// Files in PEM; both are empty where connections are not encrypted.
    pub tls_certificate: PathBuf,
    pub tls_key: PathBuf,
    pub cors: bool,
    pub admin_key: Secret,
    pub keys: Vec<KeyConfig>,
    /// Names that clients send of their own accord, and the base or adapter that each stands for.
    pub model_aliases: BTreeMap<String, String>,
}

/// A client's key and what it opens.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyConfig {
    /// Whose it is, for errors and logs.
    pub name: String,
    pub key: Secret,
    /// Names of adapters; one that ends in `*` stands for all that begin so.
    pub adapters: Vec<String>,
    /// How much of the machine it gets beside another that wants as much.
    #[serde(default = "one")]
    pub weight: NonZeroU32,
    /// 0 sets no limit.
    #[serde(default)]
    pub requests_per_minute: u32,
    /// Of prompts and outputs; 0 sets no limit.
    #[serde(default)]
    pub tokens_per_minute: u32,
}

fn one() -> NonZeroU32 {
    NonZeroU32::MIN
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    pub id: String,
    /// What the matrices of a checkpoint become.
    pub quantize: Quantization,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdaptersConfig {
    dir: PathBuf,
    pub host_budget_mib: u64,
    pub max_adapter_mib: u64,
    pub min_residency_seconds: u64,
    pub max_wait_seconds: u64,
    pub rescan_seconds: u64,
    pub keep_generations: usize,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EngineConfig {
    #[serde(deserialize_with = "parsed")]
    pub device: DeviceChoice,
    pub device_adapters_mib: usize,
    pub threads: usize,
    #[serde(deserialize_with = "instruction_set")]
    pub instruction_set: Option<Isa>,
    pub max_batch_rows: usize,
    pub max_sequences: usize,
    pub kv_cache_mib: usize,
    #[serde(deserialize_with = "parsed")]
    pub kv_cache_type: KvType,
    pub max_queued: usize,
    pub context_length: usize,
    pub max_draft_tokens: usize,
    pub max_inter_token_ms: u64,
    pub prefix_cache_dir: PathBuf,
    pub prefix_cache_dir_mib: u64,
}

/// Where the base is to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceChoice {
    /// A usable GPU, or else the CPU.
    Auto,
    Cpu,
    /// The card of this number.
    Cuda(usize),
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refusal = || format!("unknown device {text:?} (auto, cpu, cuda, cuda:N)");
        match text.split_once(':') {
            None if text == "auto" => Ok(Self::Auto),
            None if text == "cpu" => Ok(Self::Cpu),
            None if text == "cuda" => Ok(Self::Cuda(0)),
            Some(("cuda", number)) => number.parse().map(Self::Cuda).map_err(|_| refusal()),
            _ => Err(refusal()),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GenerationConfig {
    pub completion_max_tokens: usize,
    pub chat_max_tokens: usize,
    pub fim_temperature: f32,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IclConfig {
    dir: PathBuf,
    pub nearest_last: bool,
    pub embedding_url: String,
    pub embedding_model: String,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PromptFormatConfig {
    pub template: String,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogConfig {
    pub format: LogFormat,
    /// Whether the lines of requests have their prompts.
    pub prompts: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    Text,
    /// An object on each line.
    Json,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TracesConfig {
    /// Empty for none.
    pub url: String,
}

/// What a string says.
fn parsed<'de, D: Deserializer<'de>, T: FromStr<Err = String>>(deserializer: D) -> Result<T, D::Error> {
    String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
}

/// `auto`, or the name of an instruction set.
fn instruction_set<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Isa>, D::Error> {
    match String::deserialize(deserializer)?.as_str() {
        "auto" => Ok(None),
        name => name.parse().map(Some).map_err(serde::de::Error::custom),
    }
}

/// What the command line says; wins over every other layer.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Overrides {
    /// Base model: catalogue id, path of a GGUF file or of a checkpoint's folder, hf:owner/repo/file.gguf or hf:owner/repo
    #[arg(long, value_name = "ID|PATH")]
    pub model: Option<String>,
    /// Folder with one sub-folder per adapter; "" for none
    #[arg(long, value_name = "DIR")]
    pub adapters: Option<String>,
    /// Address to listen on
    #[arg(long)]
    pub host: Option<String>,
    /// Port to listen on; 0 takes any free one
    #[arg(long)]
    pub port: Option<u16>,
    /// Where the base runs: auto, cpu, cuda or cuda:N
    #[arg(long)]
    pub device: Option<String>,
}

impl Config {
    /// Reads all layers.
    ///
    /// # Errors
    /// The first layer that cannot be read, has an unknown key or a value of the wrong type or range; the message
    /// names layer and key.
    pub fn load(file: Option<&Path>, overrides: &Overrides) -> Result<Self, ConfigError> {
        Self::load_layers(file, None, overrides)
    }

    /// `environment` replaces the process's own, for tests.
    fn load_layers(
        file: Option<&Path>,
        environment: Option<HashMap<String, String>>,
        overrides: &Overrides,
    ) -> Result<Self, ConfigError> {
        // Each layer is checked on top of those before it, so that an error is the layer's own.
        let mut builder = config::Config::builder().add_source(File::from_str(DEFAULTS, FileFormat::Toml));
        if let Some(path) = file {
            builder = builder.add_source(File::from(path).format(FileFormat::Toml));
            check(&builder, &path.display().to_string())?;
        }
        builder = builder.add_source(Environment::with_prefix("LORRY").separator("__").source(environment));
        check(&builder, "the environment (LORRY__SECTION__KEY)")?;
        let origin = "the command line";
        builder = overrides.apply(builder).map_err(|e| layer_error(origin, &e))?;
        check(&builder, origin)
    }

    fn validate(&self) -> Result<(), String> {
        let ranges = [
            ("server.max_body_bytes", self.server.max_body_bytes, 1..=usize::MAX),
            ("server.max_connections", self.server.max_connections, 1..=MAX_COUNT),
            ("engine.device_adapters_mib", self.engine.device_adapters_mib, 0..=MAX_MIB),
            ("engine.threads", self.engine.threads, 0..=MAX_THREADS),
            ("engine.max_batch_rows", self.engine.max_batch_rows, 0..=MAX_ROWS),
            ("engine.max_sequences", self.engine.max_sequences, 1..=MAX_ROWS),
            ("engine.kv_cache_mib", self.engine.kv_cache_mib, 0..=MAX_MIB),
            ("engine.max_queued", self.engine.max_queued, 1..=MAX_COUNT),
            ("engine.context_length", self.engine.context_length, 0..=MAX_COUNT),
            ("engine.max_draft_tokens", self.engine.max_draft_tokens, 0..=MAX_ROWS),
            ("generation.completion_max_tokens", self.generation.completion_max_tokens, 1..=usize::MAX),
            ("generation.chat_max_tokens", self.generation.chat_max_tokens, 1..=usize::MAX),
            ("experiments.max_queued", self.experiments.max_queued, 1..=MAX_COUNT),
        ];
        ranges.iter().try_for_each(|(key, value, range)| in_range(key, value, range))?;
        let seconds = [
            ("adapters.max_wait_seconds", self.adapters.max_wait_seconds, 0),
            ("adapters.min_residency_seconds", self.adapters.min_residency_seconds, 0),
            ("adapters.rescan_seconds", self.adapters.rescan_seconds, 1),
            ("server.body_timeout_seconds", self.server.body_timeout_seconds, 1),
            ("server.header_timeout_seconds", self.server.header_timeout_seconds, 1),
            ("server.keep_alive_seconds", self.server.keep_alive_seconds, 1),
            ("server.max_request_seconds", self.server.max_request_seconds, 0),
            ("server.sse_keep_alive_seconds", self.server.sse_keep_alive_seconds, 0),
            ("server.write_timeout_seconds", self.server.write_timeout_seconds, 1),
        ];
        seconds.iter().try_for_each(|(key, value, min)| in_range(key, value, &(*min..=MAX_SECONDS)))?;
        if let Some((key, _)) =
            [("server.host", &self.server.host), ("model.id", &self.model.id)].into_iter().find(|(_, v)| v.is_empty())
        {
            return Err(format!("{key} must not be empty"));
        }
        if self.server.max_body_bytes_in_flight < self.server.max_body_bytes {
            return Err("server.max_body_bytes_in_flight must be at least server.max_body_bytes".to_owned());
        }
        self.server.validate_keys()?;
        self.validate_model_aliases()?;
        self.experiments.validate(&self.model.id, &self.server.model_aliases)?;
        let num_places = self.engine.max_queued;
        if num_places <= SPARE_PLACES && self.experiments.run.iter().any(|run| run.promotion.is_some()) {
            return Err(format!(
                "engine.max_queued must be more than {SPARE_PLACES} for a promotion, not {num_places}: so many a check leaves free"
            ));
        }
        self.fine_tuning.validate()?;
        if self.fine_tuning.enabled && self.adapters.dir().is_none() {
            return Err("fine_tuning.enabled needs a folder for adapters: set adapters.dir".to_owned());
        }
        let temperature = self.generation.fim_temperature;
        if !(0.0..=2.0).contains(&temperature) {
            return Err(format!("generation.fim_temperature must be between 0 and 2, not {temperature}"));
        }
        for (key, url) in [("icl.embedding_url", &self.icl.embedding_url), ("traces.url", &self.traces.url)] {
            if !(url.is_empty() || url.starts_with("http://") || url.starts_with("https://")) {
                return Err(format!("{key} must begin with http:// or https://"));
            }
        }
        Ok(())
    }

    /// What an alias stands for is looked for among the base and its adapters, and nowhere else.
    fn validate_model_aliases(&self) -> Result<(), String> {
        let aliases = &self.server.model_aliases;
        let is_experiment = |name: &str| self.experiments.run.iter().any(|experiment| experiment.alias == name);
        for (alias, model) in aliases {
            let at = format!("server.model_aliases.{alias:?}");
            if is_experiment(alias) {
                return Err(format!("{at} is the alias of an experiment, too, which would answer for it: rename one"));
            }
            let has_examples = !matches!(icl::Selection::split_model_name(model), Ok((_, None)));
            if aliases.contains_key(model) || is_experiment(model) || has_examples {
                return Err(format!(
                    "{at} must be the base or an adapter, not {model:?}: no other alias, no experiment, and no examples"
                ));
            }
        }
        Ok(())
    }
}

impl ServerConfig {
    fn validate_keys(&self) -> Result<(), String> {
        for (index, KeyConfig { name, key, adapters, .. }) in self.keys.iter().enumerate() {
            let at = format!("server.keys[{index}]");
            if name.is_empty() || key.is_empty() {
                return Err(format!("{at} needs a name and a key that are not empty"));
            }
            let others = self.keys[..index].iter();
            if others.clone().any(|other| other.name == *name) {
                return Err(format!("{at}.name {name:?} is taken by another key"));
            }
            if others.map(|other| &other.key).chain([&self.admin_key]).any(|other| other == key) {
                return Err(format!("{at}.key, of {name:?}, is also another's"));
            }
            let is_pattern = |pattern: &str| !pattern.strip_suffix('*').unwrap_or(pattern).contains('*');
            if let Some(pattern) = adapters.iter().find(|pattern| !is_pattern(pattern)) {
                return Err(format!("{at}.adapters has {pattern:?}: a `*` may stand only at the end, and once"));
            }
        }
        Ok(())
    }
}

impl AdaptersConfig {
    /// The folder with the adapters, unless the server is to run without any.
    pub fn dir(&self) -> Option<&Path> {
        (!self.dir.as_os_str().is_empty()).then_some(self.dir.as_path())
    }

    /// What adapters are kept within.
    pub fn limits(&self) -> RegistryOptions {
        RegistryOptions {
            host_budget_bytes: self.host_budget_mib.saturating_mul(1 << 20),
            max_adapter_bytes: self.max_adapter_mib.saturating_mul(1 << 20),
            min_residency: Duration::from_secs(self.min_residency_seconds),
            max_wait: Duration::from_secs(self.max_wait_seconds),
            rescan: Duration::from_secs(self.rescan_seconds),
            keep_generations: self.keep_generations,
        }
    }
}

impl EngineConfig {
    /// The folder in which the prefix cache goes on, unless it is in memory alone.
    pub fn prefix_cache_dir(&self) -> Option<&Path> {
        (!self.prefix_cache_dir.as_os_str().is_empty()).then_some(self.prefix_cache_dir.as_path())
    }
}

impl IclConfig {
    /// The folder with the example stores, unless the server is to run without any.
    pub fn dir(&self) -> Option<&Path> {
        (!self.dir.as_os_str().is_empty()).then_some(self.dir.as_path())
    }
}

impl Overrides {
    fn apply(&self, builder: ConfigBuilder<DefaultState>) -> Result<ConfigBuilder<DefaultState>, config::ConfigError> {
        builder
            .set_override_option("model.id", self.model.clone())?
            .set_override_option("adapters.dir", self.adapters.clone())?
            .set_override_option("server.host", self.host.clone())?
            .set_override_option("server.port", self.port)?
            .set_override_option("engine.device", self.device.clone())
    }
}

/// # Errors
/// Names the key and the most that it may be, or the least.
fn in_range<T: PartialOrd + Display>(key: &str, value: &T, range: &RangeInclusive<T>) -> Result<(), String> {
    if value < range.start() {
        return Err(format!("{key} must be at least {}, not {value}", range.start()));
    }
    if value > range.end() {
        return Err(format!("{key} must be at most {}, not {value}", range.end()));
    }
    Ok(())
}

/// The configuration up to the layer that was added last, called `origin` in errors.
fn check(builder: &ConfigBuilder<DefaultState>, origin: &str) -> Result<Config, ConfigError> {
    let config: Config =
        builder.build_cloned().and_then(config::Config::try_deserialize).map_err(|e| layer_error(origin, &e))?;
    config.validate().map_err(|reason| ConfigError::Layer { origin: origin.to_string(), reason })?;
    Ok(config)
}

fn layer_error(origin: &str, error: &config::ConfigError) -> ConfigError {
    ConfigError::Layer { origin: origin.to_string(), reason: error.to_string() }
}

/// The folder for downloaded models: `$LORRY_HOME`, else `$XDG_CACHE_HOME/lorry`, else `~/.cache/lorry`.
///
/// # Errors
/// None of the three is known.
pub fn lorry_home() -> Result<PathBuf, ConfigError> {
    lorry_home_from(|name| std::env::var_os(name).map(PathBuf::from), std::env::home_dir())
}

fn lorry_home_from(
    variable: impl Fn(&str) -> Option<PathBuf>,
    user_home: Option<PathBuf>,
) -> Result<PathBuf, ConfigError> {
    let set = |name| variable(name).filter(|path| !path.as_os_str().is_empty());
    set("LORRY_HOME")
        .or_else(|| set("XDG_CACHE_HOME").filter(|path| path.is_absolute()).map(|cache| cache.join("lorry")))
        .or_else(|| user_home.map(|home| home.join(".cache/lorry")))
        .ok_or(ConfigError::NoHome)
}
