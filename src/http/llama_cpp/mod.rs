//! llama.cpp's own interface, for the editors that speak it: completion with its timings, adapters by number, and what
//! is asked before.

mod generate;
mod lora_adapters;
mod props;
mod reply;
mod request;

use axum::Router;
use axum::middleware::from_fn_with_state;
use axum::routing::{get, post};

use super::{AppState, count_rejection, tokenize};

/// Behind the layer that authenticates.
pub fn routes(state: &AppState) -> Router<AppState> {
    let generating = Router::new()
        .route("/infill", post(generate::infill))
        .route("/completion", post(generate::completion))
        .route_layer(from_fn_with_state(state.clone(), count_rejection));
    generating
        .route("/lora-adapters", get(lora_adapters::list).post(lora_adapters::set))
        .route("/props", get(props::props))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route("/apply-template", post(tokenize::apply_template))
}
