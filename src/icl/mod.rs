//! In-context examples: named, versioned stores of (instruction, code), and which of them a request gets.
//!
//! A store is an immutable snapshot behind an `Arc`: replacing it changes nothing for a request that has begun.

mod bm25;
mod budget;
mod embedding;
mod error;
mod python_random;
mod selection;
mod store;
mod stores;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use budget::{CountError, TokenBudget};
pub use error::{EmbeddingError, IclError, OpenError, StoreError};
pub use selection::{Chosen, DEFAULT_K, DEFAULT_SEED, MAX_K, Select, Selection};
pub use store::{MAX_CODE_BYTES, MAX_EXAMPLES, MAX_INSTRUCTION_BYTES, Store};
pub use stores::IclStores;

/// An instruction in words and the code that answers it.
#[derive(Debug, Clone, PartialEq, Eq, JsonSchema, Serialize, Deserialize)]
pub struct Example {
    pub instruction: String,
    pub code: String,
}
