//! `GET /v1/adapters/events`: what happens to the adapters that the caller may know of, as it happens.

use std::sync::Arc;

use axum::Extension;
use axum::extract::State;
use axum::response::Response;
use chrono::SecondsFormat;
use futures::StreamExt;
use futures::stream::unfold;
use schemars::JsonSchema;
use serde::Serialize;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;

use super::AppState;
use super::auth::Caller;
use super::sse;
use crate::adapter::registry::{AdapterChange, AdapterEvent};
use crate::generation::Access;

#[derive(Debug, JsonSchema, Serialize)]
pub struct EventView {
    name: String,
    /// What a request names as its model.
    model: String,
    /// Of the adapter's files; `null` while they have not been read.
    generation: Option<String>,
    /// RFC 3339.
    time: String,
    #[serde(flatten)]
    change: AdapterChange,
}

/// In place of events that the client was too slow for: `/v1/adapters` says how things stand.
#[derive(Debug, JsonSchema, Serialize)]
pub struct MissedView {
    event: Missed,
    /// Of all adapters, those too that the key does not open.
    num_missed: u64,
}

#[derive(Debug, JsonSchema, Serialize)]
#[serde(rename_all = "lowercase")]
enum Missed {
    Missed,
}

pub async fn listen(State(state): State<AppState>, Extension(caller): Extension<Caller>) -> Response {
    let shutting_down = state.generation.shutting_down();
    let events = state.generation.adapters().events();
    let listener = Listener { state: state.clone(), access: caller.access, events };
    let events = unfold(listener, async |mut listener| Some((listener.next().await?, listener)));
    sse::respond_rare(&state, events.take_until(shutting_down))
}

struct Listener {
    state: AppState,
    access: Access,
    events: Receiver<Arc<AdapterEvent>>,
}

impl Listener {
    /// Name and data of the next event.
    async fn next(&mut self) -> Option<(&'static str, String)> {
        loop {
            match self.events.recv().await {
                Ok(event) if self.access.allows(&event.name) => return Some(self.view(&event)),
                Ok(_) => {}
                Err(RecvError::Lagged(num_missed)) => {
                    return Some(("missed", sse::json(&MissedView { event: Missed::Missed, num_missed })));
                }
                Err(RecvError::Closed) => return None,
            }
        }
    }

    fn view(&self, event: &AdapterEvent) -> (&'static str, String) {
        let view = EventView {
            name: event.name.clone(),
            model: self.state.generation.model_id(&event.name),
            generation: event.generation.clone(),
            time: event.time.to_rfc3339_opts(SecondsFormat::Millis, true),
            change: event.change.clone(),
        };
        (event.change.as_str(), sse::json(&view))
    }
}
