//! `Content-Encoding` of requests: gzip is decoded, what is not known is refused.

use axum::extract::Request;
use axum::http::{HeaderMap, HeaderValue, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::error::ApiError;

/// What can be decoded, beside plain bodies.
const GZIP: &str = "gzip";
const PLAIN: &str = "identity";

/// Lets a request through whose body can be read, or answers 415.
pub async fn check(request: Request, next: Next) -> Response {
    match unknown_encoding(request.headers()) {
        None => next.run(request).await,
        Some(encoding) => {
            let mut refusal = ApiError::unsupported_encoding(&encoding).into_response();
            refusal.headers_mut().insert(header::ACCEPT_ENCODING, HeaderValue::from_static(GZIP));
            refusal
        }
    }
}

/// Several, one in the other, are one that is not known.
fn unknown_encoding(headers: &HeaderMap) -> Option<String> {
    let encodings: Vec<_> = headers.get_all(header::CONTENT_ENCODING).iter().collect();
    match encodings.as_slice() {
        [] => None,
        [one] if *one == GZIP || *one == PLAIN || one.is_empty() => None,
        several => {
            let names = several.iter().map(|name| String::from_utf8_lossy(name.as_bytes()));
            Some(names.collect::<Vec<_>>().join(", "))
        }
    }
}
