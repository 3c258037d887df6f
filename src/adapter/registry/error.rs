//! What can go wrong between a name and an adapter. Nothing here names a path but [`RegistryError`], which no client sees.

use std::io;
use std::path::PathBuf;

use crate::adapter::error::AdapterError;

#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    #[error("the adapter folder {root} cannot be read: {source}")]
    Root { root: PathBuf, source: io::Error },
    #[error("the thread that loads adapters cannot be started: {0}")]
    Thread(io::Error),
}

/// Why a request cannot have its adapter.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AcquireError {
    #[error("there is no adapter {0:?}")]
    Unknown(String),
    /// The files are there and cannot be served.
    #[error("the adapter {name:?} was refused: {cause}")]
    Refused { name: String, cause: String },
    /// What its files are cannot be said at the moment: worth trying again.
    #[error("the adapter {name:?} cannot be read at the moment, try again shortly: {cause}")]
    Unreadable { name: String, cause: String },
    /// The adapters named together cannot be combined.
    #[error("{0}")]
    Composition(String),
    /// No memory became free in time.
    #[error("no memory is free for the adapter {0:?}: raise adapters.host_budget_mib, or try again later")]
    OutOfMemory(String),
}

/// Why an adapter could not be installed, replaced or removed. Nothing has changed then.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChangeError {
    #[error("{0}")]
    InvalidName(String),
    #[error("there is no adapter {0:?}")]
    Unknown(String),
    /// The generation is not the one the caller expected to change.
    #[error("the generation is {found}, not {expected}")]
    Conflict { expected: String, found: String },
    /// What was to be installed cannot be served.
    #[error("refused: {0}")]
    Refused(String),
    /// Where it was to come from.
    #[error("{0}")]
    Source(String),
    #[error("the folder of adapters cannot be changed: there is none: set adapters.dir")]
    NoFolder,
    /// What has this name was put there by somebody else.
    #[error("the folder of adapters cannot be changed: {0:?} is there and holds no adapter: move it away")]
    NoAdapter(String),
    /// The folder of adapters cannot be changed.
    #[error("the folder of adapters cannot be changed: {0}")]
    Folder(String),
}

/// Why files are not served.
#[derive(Debug, Clone)]
pub struct Refusal {
    pub cause: String,
    /// The same files may be read the next time.
    pub may_pass: bool,
}

impl From<AdapterError> for Refusal {
    fn from(error: AdapterError) -> Self {
        Self { cause: error.to_string(), may_pass: error.may_pass() }
    }
}

impl From<String> for Refusal {
    fn from(cause: String) -> Self {
        Self { cause, may_pass: false }
    }
}
