//! The file of the base that a configuration names, wherever it comes from.

use std::path::{Path, PathBuf};

use super::catalogue::{self, CatalogueError};
use super::checkpoint::{self, CheckpointError};
use super::pull::{self, PullError};
use crate::config::ModelConfig;

#[derive(Debug, thiserror::Error)]
pub enum BaseFileError {
    #[error(transparent)]
    Catalogue(#[from] CatalogueError),
    #[error(transparent)]
    Pull(#[from] PullError),
    #[error("model {path}: {source}")]
    Checkpoint { path: PathBuf, source: CheckpointError },
}

/// A base on disk, ready to be loaded.
#[derive(Debug)]
pub struct BaseFile {
    /// The id clients see.
    pub id: String,
    /// In GGUF.
    pub path: PathBuf,
}

impl BaseFile {
    /// Downloads the base below `home` where it is missing, and quantizes a checkpoint. Blocks for as long as that takes.
    pub fn of(model: &ModelConfig, home: &Path) -> Result<Self, BaseFileError> {
        let source = catalogue::resolve(&model.id)?;
        let path = pull::pull(&source, home)?;
        if !checkpoint::is_of_checkpoint(&path) {
            return Ok(Self { id: source.id, path });
        }
        match checkpoint::quantized(&path, model.quantize, home) {
            Ok(path) => Ok(Self { id: source.id, path }),
            Err(source) => Err(BaseFileError::Checkpoint { path, source }),
        }
    }
}
