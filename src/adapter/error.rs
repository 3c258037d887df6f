//! Why an adapter was refused.

use crate::model::gguf::GgufError;

/// Names the file, field, tensor or site at fault and never a path: the text reaches clients.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    #[error("{file} is missing: {hint}")]
    Missing { file: &'static str, hint: String },
    #[error("{file} cannot be read: {source}")]
    Unreadable { file: &'static str, source: std::io::Error },
    #[error("{file} is not a regular file")]
    NotAFile { file: &'static str },
    #[error("{file} is a link that leads outside the adapter's folder: copy it into place")]
    LeadsOutside { file: &'static str },
    #[error("the folder is a link that leads outside the folder of adapters: copy it into place")]
    FolderOutside,
    #[error("the folder cannot be read: {0}")]
    Folder(#[source] std::io::Error),
    #[error("the files keep changing while they are read: write them elsewhere and rename the folder into place")]
    Unsettled,
    #[error("{file} is larger than the {limit} bytes allowed")]
    TooLarge { file: &'static str, limit: u64 },
    #[error("{file} is empty: copy it again")]
    Empty { file: &'static str },
    #[error("{file} is a Git-LFS pointer, not the file itself: fetch it with `git lfs pull`")]
    LfsPointer { file: &'static str },
    #[error("{file} has a bad header: {reason}")]
    Header { file: &'static str, reason: String },
    #[error("{file} is truncated: its header describes {expected} bytes of data, {found} are there: copy it again")]
    Truncated { file: &'static str, expected: usize, found: usize },
    #[error("{file}: {reason}")]
    Parse { file: &'static str, reason: String },
    #[error("adapter_config.json: field {field}: {reason}")]
    Field { field: String, reason: String },
    #[error("manifest adapter.toml: {key}: {reason}")]
    Manifest { key: &'static str, reason: String },
    #[error("adapter_model.safetensors holds no tensors")]
    NoTensors,
    #[error("tensor {key:?}: {reason}")]
    Tensor { key: String, reason: String },
    #[error("{0}")]
    Sites(String),
    #[error("the base: {0}")]
    Base(#[from] GgufError),
}

impl AdapterError {
    pub fn field(field: &str, reason: impl ToString) -> Self {
        Self::Field { field: excerpt(field), reason: reason.to_string() }
    }

    pub fn tensor(key: &str, reason: impl ToString) -> Self {
        Self::Tensor { key: excerpt(key), reason: reason.to_string() }
    }
}

/// Names in a hostile file may be megabytes long; a log line must not be.
fn excerpt(name: &str) -> String {
    const MAX_CHARS: usize = 200;
    match name.char_indices().nth(MAX_CHARS) {
        Some((end, _)) => format!("{}…", &name[..end]),
        None => name.to_string(),
    }
}
