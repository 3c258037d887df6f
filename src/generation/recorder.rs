//! The clock of one sequence: what it reports to the metrics, also when nobody waits for its end.

use std::sync::Arc;
use std::time::{Duration, Instant};

use prometheus::Histogram;

use crate::metrics::Metrics;

/// How long a sequence took, from when HTTP had read its request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Timing {
    /// To the first token (TTFT); `None` without any.
    pub first_token: Option<Duration>,
    /// For each token after the first (TPOT), on average; `None` with less than two.
    pub per_output_token: Option<Duration>,
    /// To the end.
    pub total: Duration,
}

/// Counts the sequence when dropped; one that nothing has finished by then was cancelled by its client.
#[derive(Debug)]
pub struct Recorder {
    metrics: Arc<Metrics>,
    adapter: String,
    inter_token_latency: Histogram,
    accepted: Instant,
    first_token: Option<Instant>,
    last_token: Instant,
    num_output_tokens: u32,
    finish_reason: &'static str,
}

impl Recorder {
    /// `adapter` is a registered name, `base` or `composition`; `accepted` is when HTTP had read the request.
    pub fn new(metrics: Arc<Metrics>, adapter: &str, accepted: Instant) -> Self {
        Self {
            inter_token_latency: metrics.inter_token_latency_seconds.with_label_values(&[adapter]),
            metrics,
            adapter: adapter.to_owned(),
            accepted,
            first_token: None,
            last_token: accepted,
            num_output_tokens: 0,
            finish_reason: "cancelled",
        }
    }

    pub fn token(&mut self) {
        let now = Instant::now();
        if self.first_token.is_none() {
            self.first_token = Some(now);
            let ttft = self.metrics.time_to_first_token_seconds.with_label_values(&[&self.adapter]);
            ttft.observe((now - self.accepted).as_secs_f64());
        } else {
            self.inter_token_latency.observe((now - self.last_token).as_secs_f64());
        }
        self.last_token = now;
        self.num_output_tokens += 1;
    }

    /// Of the first token.
    pub fn since_first_token(&self) -> Option<Duration> {
        self.first_token.map(|first_token| first_token.elapsed())
    }

    /// `finish_reason` is one of `stop`, `length`, `error`.
    pub fn finish(&mut self, finish_reason: &'static str) {
        self.finish_reason = finish_reason;
    }

    pub fn timing(&self) -> Timing {
        Timing {
            first_token: self.first_token.map(|first_token| first_token - self.accepted),
            per_output_token: self.per_output_token(),
            total: self.accepted.elapsed(),
        }
    }

    fn per_output_token(&self) -> Option<Duration> {
        let num_gaps = self.num_output_tokens.checked_sub(1).filter(|num_gaps| *num_gaps > 0)?;
        Some((self.last_token - self.first_token?) / num_gaps)
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        let adapter = self.adapter.as_str();
        self.metrics.requests_total.with_label_values(&[adapter, self.finish_reason]).inc();
        let e2e = self.metrics.request_seconds.with_label_values(&[adapter]);
        e2e.observe(self.accepted.elapsed().as_secs_f64());
        if let Some(per_output_token) = self.per_output_token() {
            let tpot = self.metrics.time_per_output_token_seconds.with_label_values(&[adapter]);
            tpot.observe(per_output_token.as_secs_f64());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(metrics: &Metrics, finish_reason: &str) -> u64 {
        metrics.requests_total.with_label_values(&["base", finish_reason]).get()
    }

    #[test]
    fn a_sequence_dropped_before_its_end_counts_as_cancelled() {
        let metrics = Arc::new(Metrics::new());
        drop(Recorder::new(metrics.clone(), "base", Instant::now()));
        assert_eq!((ended(&metrics, "cancelled"), ended(&metrics, "stop")), (1, 0));
    }

    #[test]
    fn three_tokens_are_one_first_token_and_two_gaps() {
        let metrics = Arc::new(Metrics::new());
        let mut recorder = Recorder::new(metrics.clone(), "base", Instant::now());
        (0..3).for_each(|_| recorder.token());
        recorder.finish("stop");
        drop(recorder);
        assert_eq!(metrics.time_to_first_token_seconds.with_label_values(&["base"]).get_sample_count(), 1);
        assert_eq!(metrics.inter_token_latency_seconds.with_label_values(&["base"]).get_sample_count(), 2);
        assert_eq!(metrics.time_per_output_token_seconds.with_label_values(&["base"]).get_sample_count(), 1);
        assert_eq!((ended(&metrics, "cancelled"), ended(&metrics, "stop")), (0, 1));
    }
}
