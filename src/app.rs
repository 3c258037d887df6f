//! The one place that wires everything: model file → decoder → engine, adapters, tokenizer → generation → HTTP.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use tracing::{error, info, warn};

use crate::adapter::registry::{AdapterRegistry, ChangeError, RegistryError};
use crate::config::{self, Config, ConfigError, EngineConfig};
use crate::engine::EngineHandle;
use crate::experiments::{Experiments, ModelNames, OnRollBack};
use crate::fine_tuning::{self, FineTuning};
use crate::generation::{Base, Generation};
use crate::http::AppState;
use crate::icl::{IclStores, OpenError};
use crate::metrics::Metrics;
use crate::model::base_file::{BaseFile, BaseFileError};
use crate::model::base_weights::GgufWeights;
use crate::model::file::ModelFile;
use crate::model::gguf::{GgufError, GgufFile};
use crate::model::resident::{self, Resident, ResidentError, Source};
use crate::model::spec::ModelSpec;
use crate::prompt::PromptError;
use crate::prompt::chat::ChatTemplate;
use crate::prompt::fim::FillInMiddle;
use crate::prompt::formats::PromptFormats;
use crate::tokenizer::{Tokenizer, TokenizerError};

#[derive(Debug, thiserror::Error)]
pub enum AppError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    BaseFile(#[from] BaseFileError),
    #[error("model {path}: {source}")]
    Model { path: PathBuf, source: GgufError },
    #[error("tokenizer of {path}: {source}")]
    Tokenizer { path: PathBuf, source: TokenizerError },
    #[error(transparent)]
    Resident(#[from] ResidentError),
    #[error(transparent)]
    Adapters(#[from] RegistryError),
    #[error(transparent)]
    Icl(#[from] OpenError),
    #[error(transparent)]
    PromptFormats(PromptError),
    #[error("no thread can be started for the experiments: {0}")]
    Experiments(io::Error),
    #[error("the folder of adapters {path}, for fine-tuning, cannot be made: {source}")]
    AdaptersFolder { path: PathBuf, source: io::Error },
    #[error(transparent)]
    FineTuning(#[from] fine_tuning::OpenError),
}

/// Everything that runs, loaded and ready to serve.
#[derive(Debug)]
pub struct App {
    pub state: AppState,
    pub engine: EngineHandle,
    pub adapters: Arc<AdapterRegistry>,
    pub spec: ModelSpec,
}

impl App {
    /// Downloads the model where it is missing, loads it and its adapters, and starts the engine. Blocks for as long as
    /// that takes.
    pub fn load(config: Config) -> Result<Self, AppError> {
        Self::load_with(config, resident::load)
    }

    /// As [`App::load`], with the model put where `load_model` says.
    pub fn load_with(
        config: Config,
        load_model: impl FnOnce(Source<'_>, &EngineConfig) -> Result<Resident, ResidentError>,
    ) -> Result<Self, AppError> {
        // First what is quick to find wrong.
        let icl = Arc::new(IclStores::open(&config.icl)?);
        let formats = PromptFormats::new(&config.prompt_formats).map_err(AppError::PromptFormats)?;
        let home = config::lorry_home()?;
        let BaseFile { id, path } = BaseFile::of(&config.model, &home)?;
        let metrics = Arc::new(Metrics::new(&id));

        let mut resident = load_model(Source::File(&path), &config.engine)?;
        let block_files = resident.open_block_files(&config.engine, &path, &metrics)?;
        let (spec, device) = (resident.model.spec().clone(), resident.device.clone());
        let base = load_base(&path, &id, device)?;
        let adapters = Arc::new(load_adapters(&config, &path, &metrics)?);
        let engine = resident.start(&config.engine, block_files, metrics.clone());

        let (database, on_roll_back) = (config.experiments.path(&home), roll_back_adapter(&adapters));
        let registered = adapters.clone();
        let is_adapter = move |name: &str| registered.status(name).is_some();
        let names = ModelNames::new(&id, &config.server.model_aliases, is_adapter);
        let experiments = Experiments::start(&config.experiments, database, names, metrics.clone(), on_roll_back)
            .map_err(AppError::Experiments)?;

        let fine_tuning = config.fine_tuning.enabled.then(|| {
            let begins_with_bos = base.tokenizer.bos().is_some();
            let base = fine_tuning::Base { id: id.clone(), path: path.clone(), begins_with_bos };
            let dir = config.fine_tuning.dir(&home);
            FineTuning::start(&config.fine_tuning, dir, base, adapters.clone(), &metrics).map(Arc::new)
        });
        let fine_tuning = fine_tuning.transpose()?;

        let config = Arc::new(config);
        let generation =
            Generation::new(base, adapters.clone(), icl, formats, engine.clone(), metrics.clone(), config.clone());
        let state = AppState::new(Arc::new(generation), Arc::new(experiments), fine_tuning, metrics, config);
        Ok(Self { state, engine, adapters, spec })
    }
}

fn load_base(path: &Path, id: &str, device: String) -> Result<Base, AppError> {
    let in_file = || path.to_path_buf();
    let gguf = GgufFile::open(path).map_err(|source| AppError::Model { path: in_file(), source })?;
    let tokenizer = Tokenizer::from_gguf(&gguf).map_err(|source| AppError::Tokenizer { path: in_file(), source })?;
    let chat_template = ChatTemplate::from_gguf(&gguf, &tokenizer);
    if let Err(cause) = &chat_template {
        warn!("{id} is served without chat: {cause}");
    }
    let fill_in_middle = FillInMiddle::detect(&tokenizer);
    let file = ModelFile::read(path, &gguf).map_err(|source| AppError::Model { path: in_file(), source })?;
    Ok(Base { id: id.to_string(), device, file, tokenizer: Arc::new(tokenizer), chat_template, fill_in_middle })
}

fn load_adapters(config: &Config, path: &Path, metrics: &Arc<Metrics>) -> Result<AdapterRegistry, AppError> {
    let mut root = config.adapters.dir();
    if let Some(root) = root.filter(|_| config.fine_tuning.enabled) {
        fs::create_dir_all(root).map_err(|source| AppError::AdaptersFolder { path: root.to_path_buf(), source })?;
    }
    if let Some(absent) = root.take_if(|root| *root == Path::new(config::DEFAULT_ADAPTERS_DIR) && !root.exists()) {
        warn!("there is no folder {}: serving the base alone", absent.display());
    }
    let base = GgufWeights::open(path).map_err(|source| AppError::Model { path: path.to_path_buf(), source })?;
    Ok(AdapterRegistry::open(root, Arc::new(base), config.adapters.limits(), metrics.clone())?)
}

/// Reads files, and must not keep the experiments' writer waiting: each roll-back has a thread.
fn roll_back_adapter(adapters: &Arc<AdapterRegistry>) -> OnRollBack {
    let adapters = adapters.clone();
    Box::new(move |name, from| {
        let (adapters, name, from) = (adapters.clone(), name.to_owned(), from.map(str::to_owned));
        let roll_back = move || match futures::executor::block_on(adapters.roll_back(&name, None, from.as_deref())) {
            Ok(status) => info!("adapter {name}: back to generation {}", status.files_generation.unwrap_or_default()),
            // Somebody was quicker, or this server before it was killed.
            Err(ChangeError::Conflict { expected, found }) => {
                info!("adapter {name} stays as it is, at generation {found}: {expected} is not there any more");
            }
            Err(e) => error!("adapter {name} is out of its experiment, but stays as it is: {e}"),
        };
        if let Err(e) = thread::Builder::new().name("lorry-roll-back".to_owned()).spawn(roll_back) {
            error!("no thread can be started to roll an adapter back: {e}");
        }
    })
}
