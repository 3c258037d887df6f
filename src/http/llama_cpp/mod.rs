//! llama.cpp's own interface, for the editors that speak it: completion with its timings, adapters by number, and what
//! is asked before.

mod generate;
mod lora_adapters;
mod props;
mod reply;
mod request;

pub use lora_adapters::LoraAdapter;
pub use props::Props;
pub use reply::{Part, Reply};

use axum::Router;
use axum::routing::{get, post};

use super::{AppState, tokenize};

/// Those that generate.
pub fn generation() -> Router<AppState> {
    Router::new().route("/infill", post(generate::infill)).route("/completion", post(generate::completion))
}

/// The others, behind the layer that authenticates.
pub fn routes() -> Router<AppState> {
    Router::new()
        .route("/lora-adapters", get(lora_adapters::list).post(lora_adapters::set))
        .route("/props", get(props::props))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route("/apply-template", post(tokenize::apply_template))
}
