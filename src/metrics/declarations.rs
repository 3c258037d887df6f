//! Metrics under names that are said once: what declares one registers it.

use std::collections::HashMap;

use prometheus::core::Collector;
use prometheus::proto::MetricFamily;
use prometheus::{
    Counter, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec,
    Opts, Registry,
};

/// Seconds, from a fast first token to a long batch job.
const LATENCY_BUCKETS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0];

/// Metrics that have some labels in common.
///
/// # Panics
/// Never in practice: the names given to the functions below are constant, valid and distinct.
#[derive(Debug, Default)]
pub(super) struct Declarations {
    registry: Registry,
    labels: HashMap<String, String>,
}

impl Declarations {
    pub fn with_labels(labels: &[(&str, &str)]) -> Self {
        let labels = labels.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Self { registry: Registry::new(), labels }
    }

    /// The samples of all metrics at this moment.
    pub fn gather(&self) -> Vec<MetricFamily> {
        self.registry.gather()
    }

    pub fn gauge(&self, name: &str, help: &str) -> IntGauge {
        self.registered(IntGauge::with_opts(self.opts(name, help)))
    }

    pub fn fraction(&self, name: &str, help: &str) -> Gauge {
        self.registered(Gauge::with_opts(self.opts(name, help)))
    }

    pub fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
        self.registered(IntGaugeVec::new(self.opts(name, help), labels))
    }

    pub fn times(&self, name: &str, help: &str, labels: &[&str]) -> GaugeVec {
        self.registered(GaugeVec::new(self.opts(name, help), labels))
    }

    pub fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.registered(IntCounter::with_opts(self.opts(name, help)))
    }

    pub fn counters(&self, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        self.registered(IntCounterVec::new(self.opts(name, help), labels))
    }

    pub fn seconds_counter(&self, name: &str, help: &str) -> Counter {
        self.registered(Counter::with_opts(self.opts(name, help)))
    }

    pub fn latency(&self, name: &str, help: &str) -> Histogram {
        self.histogram(name, help, LATENCY_BUCKETS)
    }

    /// As [`Declarations::latency`], with a label that has always the same value.
    pub fn latency_of(&self, name: &str, help: &str, label: (&str, &str)) -> Histogram {
        let opts = self.histogram_opts(name, help, LATENCY_BUCKETS).const_label(label.0, label.1);
        self.registered(Histogram::with_opts(opts))
    }

    pub fn histograms(&self, name: &str, help: &str, buckets: &[f64], labels: &[&str]) -> HistogramVec {
        self.registered(HistogramVec::new(self.histogram_opts(name, help, buckets), labels))
    }

    pub fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Histogram {
        self.registered(Histogram::with_opts(self.histogram_opts(name, help, buckets)))
    }

    fn opts(&self, name: &str, help: &str) -> Opts {
        Opts::new(name, help).const_labels(self.labels.clone())
    }

    fn histogram_opts(&self, name: &str, help: &str, buckets: &[f64]) -> HistogramOpts {
        HistogramOpts::from(self.opts(name, help)).buckets(buckets.to_vec())
    }

    fn registered<C: Collector + Clone + 'static>(&self, metric: prometheus::Result<C>) -> C {
        let metric = metric.expect("constant name");
        self.registry.register(Box::new(metric.clone())).expect("metric names are distinct");
        metric
    }
}
