//! What can be wrong with a store and with a choice from it. Only [`OpenError`], which no client sees, names paths.

use std::io;
use std::path::PathBuf;

use super::CountError;
use super::selection::MAX_K;

/// Why a store could not be read, replaced or deleted.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error(
        "`{0}` cannot name a store: take 1 to 64 letters, digits, `.`, `_` and `-`, the first one a letter or a digit"
    )]
    InvalidName(String),
    #[error("there is no example store `{name}`; {known}")]
    Unknown { name: String, known: String },
    #[error("examples[{index}].{field}: {reason}")]
    Example { index: usize, field: &'static str, reason: String },
    #[error("examples: a store holds 1 to {max} examples, not {num_examples}")]
    NumExamples { num_examples: usize, max: usize },
    #[error("examples: a store holds at most {max} bytes, not {num_bytes}")]
    TooLarge { num_bytes: usize, max: usize },
    #[error("there are {max} example stores already: delete one first")]
    TooManyStores { max: usize },
    #[error("the server keeps no example stores: set icl.dir")]
    NoFolder,
    #[error(
        "store `{name}` could not be written ({}): nothing has changed; make room on the disk of icl.dir, or set it to a folder \
         that the server may write",
        .source.kind()
    )]
    NotWritable { name: String, source: io::Error },
}

/// Why the stores could not be loaded at the start.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("icl.dir {path}: {source}: create the folder, or set icl.dir to \"\" for no example stores", path = .path.display())]
    Folder { path: PathBuf, source: io::Error },
    #[error("example store {path}: {source}", path = .path.display())]
    Unreadable { path: PathBuf, source: io::Error },
    #[error("example store {path}, line {line}: {source}", path = .path.display())]
    Line { path: PathBuf, line: usize, source: serde_json::Error },
    #[error("example store {path}: {source}", path = .path.display())]
    Store { path: PathBuf, source: StoreError },
}

/// Why a request cannot have the examples it asks for; [`field`](Self::field) is the field of the request at fault.
#[derive(Debug, thiserror::Error)]
pub enum IclError {
    #[error("`{field}` {reason}")]
    Field { field: &'static str, reason: String },
    #[error("the model name `{0}` asks for examples in an unknown way: write `<model>+icl:<store>@<k>`")]
    ModelName(String),
    #[error("there is no example store `{store}`; {known}")]
    UnknownStore { store: String, known: String },
    #[error("`icl.k` must be from 1 to {MAX_K}, not {0}; for no examples leave `icl` out")]
    K(usize),
    #[error("`icl.k` is {k}, but the store `{store}` has only {num_examples} examples")]
    NotEnough { store: String, k: usize, num_examples: usize },
    #[error(
        "{k} examples of the store `{store}` do not fit: the prompt would have {num_prompt_tokens} tokens, \
         {max_prompt_tokens} is the most; {num_fitting} would fit"
    )]
    PromptTooLong { store: String, k: usize, num_prompt_tokens: usize, max_prompt_tokens: usize, num_fitting: usize },
    #[error("not one of the {k} examples of the store `{store}` fits in `icl.budget`, {budget} tokens")]
    BudgetTooSmall { store: String, k: usize, budget: usize },
    #[error("`icl.select`: `hybrid` needs an embedding endpoint, which is not configured (icl.embedding_url)")]
    NoEmbeddings,
    #[error(transparent)]
    Embedding(#[from] EmbeddingError),
    #[error("the prompt with its examples: {0}")]
    Count(#[source] CountError),
}

/// The endpoint is not the client's fault; its address is only in the log.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the embedding endpoint failed: {0}")]
pub struct EmbeddingError(pub String);

impl IclError {
    /// The field of the request at fault; `None` where it is not the request's fault.
    pub fn field(&self) -> Option<&'static str> {
        match self {
            Self::Field { field, .. } => Some(field),
            Self::ModelName(_) => Some("model"),
            Self::UnknownStore { .. } => Some("icl.store"),
            Self::K(_) | Self::NotEnough { .. } | Self::PromptTooLong { .. } => Some("icl.k"),
            Self::BudgetTooSmall { .. } => Some("icl.budget"),
            Self::NoEmbeddings => Some("icl.select"),
            Self::Count(_) => Some("icl"),
            Self::Embedding(_) => None,
        }
    }
}
