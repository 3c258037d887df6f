//! What is counted for each adapter. Series come with the first load or request of an adapter and go with its
//! registration; whoever counts holds them, so that no token looks for its own, and a name that has gone does not return.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use prometheus::proto::MetricFamily;
use prometheus::{Histogram, IntCounter, IntCounterVec, IntGauge};

use super::declarations::Declarations;

/// Labels of what no single adapter served.
pub const BASE: &str = "base";
pub const COMPOSITION: &str = "composition";

/// Whether a label is one of these.
pub(super) fn is_no_adapter(label: &str) -> bool {
    label == BASE || label == COMPOSITION
}

/// By the label `adapter`: registered names, [`BASE`] and [`COMPOSITION`].
#[derive(Debug, Default)]
pub(super) struct Adapters(Mutex<BTreeMap<String, Arc<AdapterSeries>>>);

impl Adapters {
    pub fn of(&self, name: &str) -> Arc<AdapterSeries> {
        let mut series = self.lock();
        if let Some(series) = series.get(name) {
            return series.clone();
        }
        series.entry(name.to_owned()).or_insert_with(|| Arc::new(AdapterSeries::new(name))).clone()
    }

    pub fn all(&self) -> Vec<(String, Arc<AdapterSeries>)> {
        self.lock().iter().map(|(name, series)| (name.clone(), series.clone())).collect()
    }

    /// Forgets the adapters that are no longer registered.
    pub fn retain(&self, is_registered: impl Fn(&str) -> bool) {
        self.lock().retain(|name, _| is_no_adapter(name) || is_registered(name));
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Arc<AdapterSeries>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug)]
pub struct AdapterSeries {
    declarations: Declarations,
    pub loads_total: IntCounter,
    pub evictions_total: IntCounter,
    /// An adapter that was loaded and never asked for has none.
    requests: OnceLock<RequestSeries>,
}

#[derive(Debug)]
pub struct RequestSeries {
    pub running: IntGauge,
    pub waiting: IntGauge,
    /// `finish_reason`: `stop`, `length`, `cancelled`, `error`.
    pub ended_total: IntCounterVec,
    pub prompt_tokens_total: IntCounter,
    pub cached_tokens_total: IntCounter,
    pub output_tokens_total: IntCounter,
    pub queue: Histogram,
    pub time_to_first_token: Histogram,
    pub time_per_output_token: Histogram,
}

impl AdapterSeries {
    fn new(name: &str) -> Self {
        let d = Declarations::with_labels(&[("adapter", name)]);
        Self {
            loads_total: d.counter("lorry_adapter_loads_total", "Loads into the host's memory."),
            evictions_total: d
                .counter("lorry_adapter_evictions_total", "Times it left memory to make room for others."),
            requests: OnceLock::new(),
            declarations: d,
        }
    }

    pub fn requests(&self) -> &RequestSeries {
        self.requests.get_or_init(|| RequestSeries::new(&self.declarations))
    }

    pub(super) fn num_running(&self) -> i64 {
        self.requests.get().map_or(0, |requests| requests.running.get())
    }

    pub(super) fn num_waiting(&self) -> i64 {
        self.requests.get().map_or(0, |requests| requests.waiting.get())
    }

    pub(super) fn gather(&self) -> Vec<MetricFamily> {
        self.declarations.gather()
    }
}

impl RequestSeries {
    fn new(d: &Declarations) -> Self {
        let tokens_total = d.counters("lorry_tokens_total", "Tokens of requests.", &["kind"]);
        let tokens = |kind| tokens_total.with_label_values(&[kind]);
        Self {
            running: d.gauge("lorry_requests_running", "Requests that the engine has begun."),
            waiting: d.gauge("lorry_requests_waiting", "Requests that the engine has not begun."),
            ended_total: d.counters("lorry_requests_total", "Requests ended.", &["finish_reason"]),
            prompt_tokens_total: tokens("prompt"),
            cached_tokens_total: tokens("cached"),
            output_tokens_total: tokens("output"),
            queue: d.latency("lorry_request_queue_seconds", "From accepted to first planned."),
            time_to_first_token: d
                .latency("lorry_time_to_first_token_seconds", "From accepted by HTTP to the first token."),
            time_per_output_token: d.latency(
                "lorry_time_per_output_token_seconds",
                "Per request: (last token - first token) / (output tokens - 1).",
            ),
        }
    }
}
