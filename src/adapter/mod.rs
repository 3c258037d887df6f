//! Adapters: what is in their files, what they become in memory, and which are there.

pub mod canonical;
pub mod check;
pub mod compose;
pub mod error;
pub mod files;
mod generations;
mod hub;
pub mod import;
pub mod loader;
pub mod manifest;
pub mod methods;
mod path_pattern;
pub mod peft_config;
pub mod registry;
pub mod residency;
mod root;
pub mod sites;
mod tensor_names;
pub mod tensors;
mod weights_header;
