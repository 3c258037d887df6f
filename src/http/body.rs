//! The bodies of requests: read within a size, a time, and the bytes that all bodies together may hold, as they came and
//! parsed. JSON is parsed off the connection threads where it takes longer than others should wait.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use futures::StreamExt;
use serde_json::Value;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::{spawn_blocking, yield_now};
use tokio::time::timeout;

use super::AppState;
use super::error::ApiError;
use super::surrogates::without_lone_surrogates;
use crate::config::ServerConfig;

/// Larger JSON is parsed on a thread of its own: about what is parsed in a millisecond.
const MAX_INLINE_BYTES: usize = 1 << 18;
/// About what a value, such as a number of one digit, takes when it is parsed.
const VALUE_BYTES: usize = 64;
/// Large bodies that are parsed at once: the others wait, so that probes find a processor also where there are two.
const MAX_PARSED: usize = 1;

/// Bytes for the bodies of all requests together.
#[derive(Debug, Clone)]
pub struct BodyBudget {
    max_bytes: usize,
    free: Arc<Semaphore>,
    parsers: Arc<Semaphore>,
}

/// What a body holds of the budget, until dropped.
#[derive(Debug)]
pub struct HeldBytes(OwnedSemaphorePermit);

impl BodyBudget {
    pub fn new(max_bytes: usize) -> Self {
        let max_bytes = max_bytes.min(Semaphore::MAX_PERMITS);
        Self { max_bytes, free: Arc::new(Semaphore::new(max_bytes)), parsers: Arc::new(Semaphore::new(MAX_PARSED)) }
    }

    fn take(&self, num_bytes: usize) -> Option<HeldBytes> {
        let num_bytes = u32::try_from(num_bytes).ok()?;
        self.free.clone().try_acquire_many_owned(num_bytes).ok().map(HeldBytes)
    }

    /// What `json` will take beside its own bytes.
    fn take_for_values(&self, json: &[u8]) -> Result<HeldBytes, ApiError> {
        let num_values = num_values(json);
        let num_bytes = num_values.saturating_mul(VALUE_BYTES);
        if json.len().saturating_add(num_bytes) > self.max_bytes {
            return Err(ApiError::too_many_values(num_values));
        }
        self.take(num_bytes).ok_or_else(spent)
    }
}

/// The JSON of a body, and what the body holds of the budget, which is to be kept as long as the JSON.
///
/// # Errors
/// 400 for what `read` refuses, 408 and 413 for a body that is too slow or too large, as it comes or parsed, and 503 where
/// the budget is spent.
pub async fn read_json<T: Send + 'static>(
    request: Request,
    state: &AppState,
    read: fn(&[u8]) -> Result<T, ApiError>,
) -> Result<(T, HeldBytes), ApiError> {
    let (body, mut held) = read_body(request, state).await?;
    let budget = state.bodies.clone();
    let parsers = budget.parsers.clone();
    let is_large = body.len() > MAX_INLINE_BYTES;
    let read = move || {
        held.0.merge(budget.take_for_values(&body)?.0);
        Ok((read(&body)?, held))
    };
    if !is_large {
        return read();
    }
    let _turn = parsers.acquire().await.map_err(|_| ApiError::internal())?;
    spawn_blocking(read).await.map_err(|_| ApiError::internal())?
}

/// # Errors
/// 400.
pub fn parse_json(body: &[u8]) -> Result<Value, ApiError> {
    serde_json::from_slice(&without_lone_surrogates(body))
        .map_err(|error| ApiError::malformed(format!("the request body is not valid JSON: {error}")))
}

/// How many values `json` has at most, by what separates them outside of strings.
fn num_values(json: &[u8]) -> usize {
    let (mut num_values, mut is_text) = (0, false);
    let mut bytes = json.iter();
    while let Some(byte) = bytes.next() {
        match byte {
            b'"' => is_text = !is_text,
            b'\\' if is_text => _ = bytes.next(),
            b',' | b'[' | b'{' if !is_text => num_values += 1,
            _ => {}
        }
    }
    num_values
}

fn spent() -> ApiError {
    ApiError::unavailable(
        "bodies",
        "the bodies of other requests hold all that server.max_body_bytes_in_flight allows: try again",
    )
}

async fn read_body(request: Request, state: &AppState) -> Result<(Vec<u8>, HeldBytes), ApiError> {
    let ServerConfig { max_body_bytes, body_timeout_seconds, .. } = state.config.server;
    let collected = collect(request.into_body(), &state.bodies, max_body_bytes);
    let collected = timeout(Duration::from_secs(body_timeout_seconds), collected).await;
    collected.map_err(|_| ApiError::body_too_slow(body_timeout_seconds))?
}

/// Takes of the budget what has come, not what is announced: who announces and sends nothing holds nothing.
async fn collect(body: Body, budget: &BodyBudget, max_body_bytes: usize) -> Result<(Vec<u8>, HeldBytes), ApiError> {
    let mut chunks = body.into_data_stream();
    let mut num_read = 0;
    let mut collected = budget.take(0).map(|held| (Vec::new(), held));
    while let Some(chunk) = chunks.next().await {
        let chunk =
            chunk.map_err(|error| ApiError::malformed(format!("the request body could not be read: {error}")))?;
        // A client that sends as fast as it is read would keep its thread from all others.
        if num_read > 0 {
            yield_now().await;
        }
        num_read += chunk.len();
        if num_read > max_body_bytes {
            return Err(ApiError::body_too_large(max_body_bytes));
        }
        // A client hears of its refusal when it has sent all: the rest is read, but no longer kept.
        collected = collected.and_then(|(mut bytes, mut held)| {
            held.0.merge(budget.take(chunk.len())?.0);
            bytes.extend_from_slice(&chunk);
            Some((bytes, held))
        });
    }
    collected.ok_or_else(spent)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_counted_outside_of_strings_and_never_too_few() {
        for (json, num) in [
            (r#""a""#, 0),
            ("[1,2,3]", 3),
            (r#"{"a,[{": "b\\", "c": "\",[{"}"#, 2),
            ("[[1],[2]]", 4),
            (r#"{"prompt": "f(x, y)[0], {}\\\",", "n": 1}"#, 2),
        ] {
            assert!(serde_json::from_str::<Value>(json).is_ok(), "{json}");
            assert_eq!(num_values(json.as_bytes()), num, "{json}");
        }
    }
}
