//! Server-sent events: `data: {json}` and nothing else, but for comments to keep the connection alive where
//! `server.sse_keep_alive_seconds` asks for them, as several clients cannot read those, and where events are rare.

use std::convert::Infallible;
use std::time::Duration;

use axum::http::{HeaderName, HeaderValue};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::{Stream, StreamExt};
use serde::Serialize;

use super::AppState;
use super::error::ApiError;

/// The data of the last event; the connection's body ends right after it.
pub const DONE: &str = "[DONE]";
/// Of every stream: proxies that buffer would hold tokens back.
pub const UNBUFFERED: (HeaderName, HeaderValue) =
    (HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
/// Between comments, where nothing says otherwise: of clients that have gone without a word, only writing tells.
const RARE_KEEP_ALIVE_SECONDS: u64 = 15;

/// Each event is sent as soon as `data` has it.
pub fn respond(state: &AppState, data: impl Stream<Item = String> + Send + 'static) -> Response {
    respond_events(state.config.server.sse_keep_alive_seconds, data.map(|data| Event::default().data(data)))
}

fn respond_events(keep_alive_seconds: u64, events: impl Stream<Item = Event> + Send + 'static) -> Response {
    let events = Sse::new(events.map(Ok::<_, Infallible>));
    let mut response = match keep_alive_seconds {
        0 => events.into_response(),
        seconds => {
            let keep_alive = KeepAlive::new().interval(Duration::from_secs(seconds)).text("keep-alive");
            events.keep_alive(keep_alive).into_response()
        }
    };
    let (name, value) = UNBUFFERED;
    response.headers_mut().insert(name, value);
    response
}

/// As [`respond`], of events that have names.
pub fn respond_named(
    state: &AppState,
    events: impl Stream<Item = (&'static str, String)> + Send + 'static,
) -> Response {
    respond_events(state.config.server.sse_keep_alive_seconds, events.map(named))
}

/// As [`respond_named`], of events that may be long in coming.
pub fn respond_rare(state: &AppState, events: impl Stream<Item = (&'static str, String)> + Send + 'static) -> Response {
    let seconds = match state.config.server.sse_keep_alive_seconds {
        0 => RARE_KEEP_ALIVE_SECONDS,
        seconds => seconds,
    };
    respond_events(seconds, events.map(named))
}

fn named((name, data): (&'static str, String)) -> Event {
    Event::default().event(name).data(data)
}

/// `value` on one line. `data:` inside is escaped: there are clients that split events at every occurrence.
pub fn json(value: &impl Serialize) -> String {
    match serde_json::to_string(value) {
        Ok(json) => json.replace("data:", "data\\u003a"),
        Err(error) => {
            tracing::error!(%error, "a chunk could not be written as JSON");
            json(&ApiError::internal().into_envelope())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_in_the_text_is_escaped_and_reads_back_the_same() {
        let text = "print('data: 1')\ndata:\n";
        let json = json(&text);
        assert!(!json.contains("data:") && !json.contains('\n'), "{json}");
        assert_eq!(serde_json::from_str::<String>(&json).unwrap(), text);
    }
}
