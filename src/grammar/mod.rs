//! Grammars that an output must follow: what clients ask for, compiled for the base's vocabulary, and for each sequence a
//! matcher that says which tokens may come next. The parsing is llguidance's.

mod compiler;
mod gbnf;
mod matcher;

use serde_json::Value;

pub use compiler::{GrammarCompiler, with_bounded_space};
pub use matcher::Matcher;

/// What an output must be.
#[derive(Debug, Clone, PartialEq)]
pub enum Constraint {
    /// Any JSON object.
    Json,
    /// A JSON value that the schema allows.
    JsonSchema(Value),
    /// A text that the regular expression, in the syntax of Rust's crate, matches as a whole.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// A text of the grammar in llguidance's variant of Lark's notation, from its rule `start`.
    Lark(String),
    /// A text of the grammar in llama.cpp's notation, from its rule `root`.
    Gbnf(String),
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GrammarError {
    #[error("it has {0} bytes, {1} are the most")]
    TooLarge(usize, usize),
    /// It cannot be compiled, or asks for what is not supported.
    #[error("{0}")]
    Invalid(String),
    /// An output could not be followed.
    #[error("the grammar of the output could not be followed: {0}")]
    Lost(String),
}

#[cfg(test)]
mod tests;
