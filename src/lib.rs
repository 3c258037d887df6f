//! lorry: one quantized base model, a different adapter for every row of the batch.
//!
//! The way of a request:
//! `http` → `generation` → `prompt` → `tokenizer` → `engine` (scheduler → batch → `model` → sampler) → detokenize → SSE.
//! Two worlds meet only in `engine`: tokio (HTTP, loading) and one engine thread that owns model, KV store and scheduler.

#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

pub mod adapter;
pub mod app;
mod atomic_file;
mod background;
pub mod bench;
mod columns;
pub mod compare;
pub mod config;
pub mod engine;
pub mod experiments;
pub mod feedback;
pub mod fine_tuning;
pub mod generation;
pub mod grammar;
mod hexadecimal;
pub mod http;
pub mod icl;
pub mod loadgen;
pub mod log;
pub mod metrics;
pub mod model;
pub mod promotion;
pub mod prompt;
mod rate_limit;
pub mod service;
pub mod terminal;
pub mod tokenizer;
pub mod tools;
pub mod traces;
