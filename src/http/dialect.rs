//! Whose interface a request speaks, which its errors are worded in.

use axum::body::Body;
use axum::extract::Request;
use axum::http::{HeaderMap, HeaderName, header};
use axum::middleware::Next;
use axum::response::Response;
use serde_json::{Value, json};

use super::REQUEST_ID;
use super::error::ErrorBody;

/// Sent by every client of Anthropic's.
const ANTHROPIC_VERSION: HeaderName = HeaderName::from_static("anthropic-version");

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    OpenAi,
    Ollama,
    Anthropic,
}

impl Dialect {
    fn of(path: &str, headers: &HeaderMap) -> Self {
        let path = path.strip_prefix("/v1").unwrap_or(path);
        let is_in = |room: &str| path.strip_prefix(room).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        if is_in("/api") {
            Self::Ollama
        } else if is_in("/messages") || is_in("/models") && Self::is_anthropic(headers) {
            Self::Anthropic
        } else {
            Self::OpenAi
        }
    }

    /// Of the routes whose path both have.
    pub fn is_anthropic(headers: &HeaderMap) -> bool {
        headers.contains_key(ANTHROPIC_VERSION)
    }

    /// The whole of an error's body; `None` for OpenAI's, in which errors are made.
    fn error(self, error: &ErrorBody, request_id: Option<&str>) -> Option<Value> {
        match self {
            Self::OpenAi => None,
            Self::Ollama => Some(ollama_error(error)),
            Self::Anthropic => Some(anthropic_error(error, request_id)),
        }
    }
}

pub fn ollama_error(error: &ErrorBody) -> Value {
    json!({"error": error.message()})
}

pub fn anthropic_error(error: &ErrorBody, request_id: Option<&str>) -> Value {
    let error = json!({"type": error.anthropic_type(), "message": error.message()});
    json!({"type": "error", "error": error, "request_id": request_id})
}

/// Words the error of a response, wherever it came from, as the client expects errors of that path.
pub async fn word_errors(request: Request, next: Next) -> Response {
    let dialect = Dialect::of(request.uri().path(), request.headers());
    let request_id = request.headers().get(REQUEST_ID).and_then(|id| id.to_str().ok()).map(str::to_owned);
    let mut response = next.run(request).await;
    let error = response.extensions_mut().remove::<ErrorBody>();
    let Some(body) = error.and_then(|error| dialect.error(&error, request_id.as_deref())) else { return response };
    response.headers_mut().remove(header::CONTENT_LENGTH);
    response.map(|_| Body::from(body.to_string()))
}
