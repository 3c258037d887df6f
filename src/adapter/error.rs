//! Why an adapter was refused.

use super::files::WEIGHTS_FILE;
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
    /// Whether it says something of the moment and nothing of the files: the same ones may be read the next time.
    pub fn may_pass(&self) -> bool {
        matches!(self, Self::Unreadable { .. } | Self::Folder(_) | Self::Unsettled)
    }

    pub fn field(field: &str, reason: impl ToString) -> Self {
        Self::Field { field: excerpt(field, MAX_NAME_CHARS), reason: excerpt_of(reason) }
    }

    pub fn tensor(key: &str, reason: impl ToString) -> Self {
        Self::Tensor { key: excerpt(key, MAX_NAME_CHARS), reason: excerpt_of(reason) }
    }

    pub fn header(reason: impl ToString) -> Self {
        Self::Header { file: WEIGHTS_FILE, reason: excerpt_of(reason) }
    }

    pub fn parse(file: &'static str, reason: impl ToString) -> Self {
        Self::Parse { file, reason: excerpt_of(reason) }
    }

    pub fn manifest(key: &'static str, reason: impl ToString) -> Self {
        Self::Manifest { key, reason: excerpt_of(reason) }
    }
}

/// Names and values in a hostile file may be megabytes long; a log line must not be.
const MAX_NAME_CHARS: usize = 200;
const MAX_REASON_CHARS: usize = 1000;

/// A reason that may quote the file.
fn excerpt_of(reason: impl ToString) -> String {
    excerpt(&reason.to_string(), MAX_REASON_CHARS)
}

fn excerpt(text: &str, max_chars: usize) -> String {
    match text.char_indices().nth(max_chars) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn only_what_the_system_says_at_the_moment_may_pass() {
        for source in [5, 12, 13, 24, 116].map(io::Error::from_raw_os_error) {
            assert!(AdapterError::Unreadable { file: WEIGHTS_FILE, source }.may_pass());
        }
        assert!(AdapterError::Folder(io::ErrorKind::Other.into()).may_pass() && AdapterError::Unsettled.may_pass());
        assert!(!AdapterError::NoTensors.may_pass() && !AdapterError::FolderOutside.may_pass());
        assert!(!AdapterError::Missing { file: WEIGHTS_FILE, hint: String::new() }.may_pass());
    }

    #[test]
    fn no_refusal_is_as_long_as_the_file_that_it_quotes() {
        let long = "é".repeat(5000);
        for (refusal, min_chars) in [
            (AdapterError::field(&long, &long), 1200),
            (AdapterError::tensor(&long, &long), 1200),
            (AdapterError::header(&long), 1000),
            (AdapterError::parse("a", &long), 1000),
            (AdapterError::manifest("a", &long), 1000),
        ] {
            let num_chars = refusal.to_string().chars().filter(|c| *c == 'é').count();
            assert_eq!(num_chars, min_chars, "{refusal:?}");
        }
        assert_eq!(AdapterError::parse("a", "short").to_string(), "a: short");
    }
}
