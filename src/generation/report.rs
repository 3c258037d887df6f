//! What came of the sequences of a request, for whoever keeps account of requests.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// One sequence, which has ended in some way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SequenceReport {
    /// `stop`, `length`, `error` or `cancelled`.
    pub finish_reason: &'static str,
    /// What it was in when it ended: `queue`, `prefill` or `decode`.
    pub phase: &'static str,
    /// Of sequences that have their prompt in common, only one has it, and what of it was found in the prefix cache.
    pub num_prompt_tokens: usize,
    pub num_cached_tokens: usize,
    pub num_output_tokens: usize,
    /// When HTTP had read the request.
    pub accepted: Instant,
    /// When the engine was asked.
    pub submitted: Instant,
    /// When the engine began; `None` before that, as with the others.
    pub started: Option<Instant>,
    pub first_token: Option<Instant>,
    pub ended: Instant,
}

/// Of the sequences of one request, each as it ends.
#[derive(Debug, Default)]
pub struct RequestReport(Mutex<Vec<SequenceReport>>);

impl RequestReport {
    pub(super) fn add(&self, sequence: SequenceReport) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(sequence);
    }

    /// Those that have ended by now.
    pub fn sequences(&self) -> Vec<SequenceReport> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
