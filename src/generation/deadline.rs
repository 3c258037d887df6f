//! When a request has to have ended, whatever has come of it (`server.max_request_seconds`).

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::time::{Sleep, sleep_until, timeout_at};

use super::GenerationError;

/// Shared by all that is done for one request.
#[derive(Debug, Clone)]
pub(super) struct Deadline {
    at: Instant,
    max_seconds: u64,
    /// Whether any of its sequences has a token.
    has_output: Arc<AtomicBool>,
}

impl Deadline {
    /// So long after `accepted`; 0 seconds set none.
    pub fn new(accepted: Instant, max_seconds: u64) -> Option<Self> {
        let at = accepted + Duration::from_secs(max_seconds);
        (max_seconds > 0).then(|| Self { at, max_seconds, has_output: Arc::default() })
    }

    /// What comes of `work`, which is dropped when it takes too long.
    ///
    /// # Errors
    /// Those of `work`, and that it took too long.
    pub async fn limit<T>(&self, work: impl Future<Output = Result<T, GenerationError>>) -> Result<T, GenerationError> {
        timeout_at(self.at.into(), work).await.unwrap_or_else(|_| Err(self.exceeded()))
    }

    pub fn at(&self) -> Instant {
        self.at
    }

    pub fn exceeded(&self) -> GenerationError {
        GenerationError::DeadlineExceeded { max_seconds: self.max_seconds }
    }

    pub fn note_output(&self) {
        self.has_output.store(true, Ordering::Relaxed);
    }

    pub fn has_output(&self) -> bool {
        self.has_output.load(Ordering::Relaxed)
    }
}

/// A deadline that one sequence waits for.
#[derive(Debug)]
pub(super) struct Alarm {
    pub deadline: Deadline,
    sleep: Option<Pin<Box<Sleep>>>,
}

impl Alarm {
    pub fn new(deadline: Deadline) -> Self {
        Self { deadline, sleep: None }
    }

    /// Ready when the deadline has passed.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        // A timer can only be made where one runs.
        let sleep = self.sleep.get_or_insert_with(|| Box::pin(sleep_until(self.deadline.at.into())));
        sleep.as_mut().poll(cx)
    }
}
