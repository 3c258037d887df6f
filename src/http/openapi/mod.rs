//! `GET /openapi.json`: what this server takes and answers, in OpenAPI 3.1. Requests are described here, with the limits
//! and lists of the parsers where those have them, and `http/tests/openapi.rs` asks the parsers about the rest; replies are described by
//! the types that are written.

mod admin;
mod anthropic;
mod compare;
mod document;
mod fields;
mod fine_tuning;
mod llama_cpp;
mod ollama;
mod openai;
mod probes;
mod schema;
mod tabby;

use std::sync::LazyLock;

use axum::Router;
use axum::http::header;
use axum::response::IntoResponse;
use axum::routing::get;
use serde_json::Value;

use super::AppState;
use document::Document;

static TEXT: LazyLock<String> = LazyLock::new(|| document().to_string());

/// Open to everyone, like the probes: it is the same whatever is served, and tools read it before they have a key.
pub fn routes() -> Router<AppState> {
    Router::new().route("/openapi.json", get(serve))
}

async fn serve() -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/json")], TEXT.as_str())
}

fn document() -> Value {
    let mut document = Document::new();
    openai::describe(&mut document);
    llama_cpp::describe(&mut document);
    ollama::describe(&mut document);
    anthropic::describe(&mut document);
    tabby::describe(&mut document);
    compare::describe(&mut document);
    admin::describe(&mut document);
    fine_tuning::describe(&mut document);
    probes::describe(&mut document);
    document.finish()
}
