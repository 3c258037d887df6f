//! Adapters: what is in their files, what they become in memory, and which are there.

pub mod canonical;
pub mod error;
pub mod files;
pub mod loader;
pub mod manifest;
pub mod methods;
pub mod peft_config;
pub mod registry;
pub mod sites;
