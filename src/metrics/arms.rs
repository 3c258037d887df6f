//! What is counted for each arm of each experiment: as many as are configured.

use std::sync::{Arc, Mutex, PoisonError};

use prometheus::proto::MetricFamily;
use prometheus::{Histogram, IntCounter, IntCounterVec};

use super::declarations::Declarations;

#[derive(Debug, Default)]
pub(super) struct Arms(Mutex<Vec<Arc<ArmSeries>>>);

#[derive(Debug)]
pub struct ArmSeries {
    declarations: Declarations,
    /// That it stands on: who may not know of that does not see the arm.
    adapter: Option<String>,
    /// `outcome`: `completed`, `failed`, `cancelled`.
    pub requests_total: IntCounterVec,
    pub prompt_tokens_total: IntCounter,
    pub output_tokens_total: IntCounter,
    pub time_to_first_token: Histogram,
    pub time_per_output_token: Histogram,
}

impl Arms {
    pub fn add(&self, arm: Arc<ArmSeries>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(arm);
    }

    pub fn gather(&self, may_see: impl Fn(&str) -> bool) -> Vec<MetricFamily> {
        let arms = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let seen = arms.iter().filter(|arm| arm.adapter.as_deref().is_none_or(&may_see));
        seen.flat_map(|arm| arm.declarations.gather()).collect()
    }
}

impl ArmSeries {
    pub(super) fn new(experiment: &str, arm: &str, adapter: Option<&str>) -> Self {
        let d = Declarations::with_labels(&[("experiment", experiment), ("arm", arm)]);
        let requests_total =
            d.counters("lorry_experiment_requests_total", "Requests that an arm has answered.", &["outcome"]);
        for outcome in ["completed", "failed", "cancelled"] {
            requests_total.with_label_values(&[outcome]);
        }
        let tokens_total = d.counters("lorry_experiment_tokens_total", "Tokens of an arm's requests.", &["kind"]);
        let tokens = |kind| tokens_total.with_label_values(&[kind]);
        Self {
            adapter: adapter.map(str::to_owned),
            requests_total,
            prompt_tokens_total: tokens("prompt"),
            output_tokens_total: tokens("output"),
            time_to_first_token: d.latency(
                "lorry_experiment_time_to_first_token_seconds",
                "Of an arm, from accepted by HTTP to the first token.",
            ),
            time_per_output_token: d.latency(
                "lorry_experiment_time_per_output_token_seconds",
                "Of an arm, per request: (last token - first token) / (output tokens - 1).",
            ),
            declarations: d,
        }
    }
}
