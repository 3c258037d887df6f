//! What happens to the adapters, told to whoever listens as it happens.

use std::sync::Arc;

use chrono::{DateTime, Utc};
use schemars::JsonSchema;
use serde::Serialize;
use tokio::sync::broadcast::{Receiver, Sender};

use super::status::Tier;

/// Events that are kept for a listener who is behind; the oldest are lost to it, and it is told how many.
const MAX_KEPT: usize = 1024;
/// Of a cause, in characters; the status of the adapter has all of it.
const MAX_REASON_LEN: usize = 2000;

#[derive(Debug, Clone, PartialEq)]
pub struct AdapterEvent {
    pub name: String,
    /// Of the files; `None` while they have not been read.
    pub generation: Option<String>,
    pub time: DateTime<Utc>,
    pub change: AdapterChange,
}

#[derive(Debug, Clone, PartialEq, JsonSchema, Serialize)]
#[serde(tag = "event", rename_all = "lowercase")]
pub enum AdapterChange {
    /// The folder has an adapter of this name, which it had not.
    Registered,
    /// The name has other files than before.
    Replaced {
        previous_generation: String,
    },
    /// Now in `tier`, `seconds` after its files were opened.
    Loaded {
        tier: Tier,
        seconds: f64,
    },
    /// Out of memory, to make room for others.
    Evicted,
    /// Its files cannot be served.
    Refused {
        reason: String,
    },
    Removed,
}

impl AdapterChange {
    pub(super) fn refused(cause: &str) -> Self {
        Self::Refused { reason: cause.chars().take(MAX_REASON_LEN).collect() }
    }

    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Registered => "registered",
            Self::Replaced { .. } => "replaced",
            Self::Loaded { .. } => "loaded",
            Self::Evicted => "evicted",
            Self::Refused { .. } => "refused",
            Self::Removed => "removed",
        }
    }
}

/// To every listener there is.
#[derive(Debug)]
pub(super) struct Events(Sender<Arc<AdapterEvent>>);

impl Events {
    pub fn new() -> Self {
        Self(Sender::new(MAX_KEPT))
    }

    /// All that happens from now on.
    pub fn listen(&self) -> Receiver<Arc<AdapterEvent>> {
        self.0.subscribe()
    }

    pub fn tell(&self, name: &str, generation: Option<&str>, change: AdapterChange) {
        let (name, generation) = (name.to_owned(), generation.map(str::to_owned));
        // An error means that nobody listens.
        let _ = self.0.send(Arc::new(AdapterEvent { name, generation, time: Utc::now(), change }));
    }
}
