//! Every metric of the server, declared once. Names: `lorry_<noun>_<unit>`, base units, counters end in `_total`.

use kernels::device::AdapterTier;
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{
    Counter, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder,
};

use crate::adapter::registry::Usage;

/// Seconds, from a fast first token to a long batch job.
const LATENCY_BUCKETS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0];

#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    pub requests_running: IntGauge,
    pub requests_waiting: IntGauge,
    pub kv_blocks_used: IntGauge,
    pub kv_blocks_capacity: IntGauge,
    pub preemptions_total: IntCounter,
    /// `kind`: `prompt`, `cached` (prompt tokens found in the prefix cache), `output`, `guessed` (rows spent on guessed
    /// tokens), `accepted` (guesses that came true).
    pub tokens_total: IntCounterVec,
    /// `adapter` (registered names and `base`), `finish_reason` (`stop`, `length`, `cancelled`, `error`).
    pub requests_total: IntCounterVec,
    /// `reason`: `overloaded`, `invalid`, `not_found`, `internal`.
    pub rejected_total: IntCounterVec,
    pub request_queue_seconds: Histogram,
    pub time_to_first_token_seconds: HistogramVec,
    pub inter_token_latency_seconds: HistogramVec,
    pub time_per_output_token_seconds: HistogramVec,
    pub request_seconds: HistogramVec,
    pub grammars_compiled_total: IntCounter,
    pub adapter_loads_total: IntCounter,
    pub adapter_load_seconds: Histogram,
    pub adapter_evictions_total: IntCounter,
    pub adapter_refusals_total: IntCounter,
    /// `device`: where the base runs; always 1.
    pub device_info: IntGaugeVec,
    pub device_adapters: DeviceAdapters,
    /// `result`: `written`, `refused` (a vote for an arm that was not there), `failed` (the database cannot be written),
    /// `dropped` (its queue was full), `skipped` (a shadow was not run for want of room).
    pub experiment_writes_total: IntCounterVec,
    /// `experiment`: configured names.
    pub canary_rollbacks_total: IntCounterVec,
}

/// The adapters in a device's own memory; 0 where the device is the host.
#[derive(Debug)]
pub struct DeviceAdapters {
    pub resident: IntGauge,
    pub resident_bytes: IntGauge,
    pub loads_total: IntCounter,
    pub evictions_total: IntCounter,
    pub transfer_seconds_total: Counter,
}

impl DeviceAdapters {
    fn new() -> Self {
        Self {
            resident: gauge("lorry_device_adapters_resident", "Adapters in device memory."),
            resident_bytes: gauge("lorry_device_adapter_resident_bytes", "Bytes of adapters in device memory."),
            loads_total: counter("lorry_device_adapter_loads_total", "Adapters sent to the device."),
            evictions_total: counter("lorry_device_adapter_evictions_total", "Adapters dropped from the device."),
            transfer_seconds_total: Counter::new(
                "lorry_device_adapter_transfer_seconds_total",
                "Time that adapters took to the device.",
            )
            .expect("constant name"),
        }
    }

    fn collectors(&self) -> [Box<dyn Collector>; 5] {
        [
            Box::new(self.resident.clone()),
            Box::new(self.resident_bytes.clone()),
            Box::new(self.loads_total.clone()),
            Box::new(self.evictions_total.clone()),
            Box::new(self.transfer_seconds_total.clone()),
        ]
    }

    /// Publishes what a device says; its counts only grow.
    pub fn set(&self, tier: &AdapterTier) {
        self.resident.set(tier.resident as i64);
        self.resident_bytes.set(tier.resident_bytes as i64);
        self.loads_total.inc_by(tier.loads.saturating_sub(self.loads_total.get()));
        self.evictions_total.inc_by(tier.evictions.saturating_sub(self.evictions_total.get()));
        self.transfer_seconds_total.inc_by((tier.transfer_seconds - self.transfer_seconds_total.get()).max(0.0));
    }
}

impl Metrics {
    /// # Panics
    /// Never in practice: the names below are constant, valid and distinct.
    pub fn new() -> Self {
        let registry = Registry::new();
        let m = Self {
            requests_running: gauge("lorry_requests_running", "Sequences in the running batch."),
            requests_waiting: gauge("lorry_requests_waiting", "Sequences accepted and not yet planned."),
            kv_blocks_used: gauge("lorry_kv_blocks_used", "KV blocks held by sequences."),
            kv_blocks_capacity: gauge("lorry_kv_blocks_capacity", "KV blocks in the pool."),
            preemptions_total: counter("lorry_preemptions_total", "Sequences put back because KV blocks ran out."),
            tokens_total: counters("lorry_tokens_total", "Tokens processed.", &["kind"]),
            requests_total: counters("lorry_requests_total", "Requests ended.", &["adapter", "finish_reason"]),
            rejected_total: counters("lorry_rejected_total", "Requests refused before generation.", &["reason"]),
            request_queue_seconds: Histogram::with_opts(opts(
                "lorry_request_queue_seconds",
                "From accepted to first planned.",
            ))
            .expect("constant name"),
            time_to_first_token_seconds: histograms(
                "lorry_time_to_first_token_seconds",
                "From accepted by HTTP to the first token.",
            ),
            inter_token_latency_seconds: histograms("lorry_inter_token_latency_seconds", "Gap between two tokens."),
            time_per_output_token_seconds: histograms(
                "lorry_time_per_output_token_seconds",
                "Per request: (end - first token) / (output tokens - 1).",
            ),
            request_seconds: histograms("lorry_request_seconds", "From accepted by HTTP to the end."),
            grammars_compiled_total: counter(
                "lorry_grammars_compiled_total",
                "Schemas and grammars compiled; one that was used lately is not compiled again.",
            ),
            adapter_loads_total: counter("lorry_adapter_loads_total", "Adapters loaded into memory."),
            adapter_load_seconds: Histogram::with_opts(opts(
                "lorry_adapter_load_seconds",
                "From opening an adapter's files to ready, or refused.",
            ))
            .expect("constant name"),
            adapter_evictions_total: counter(
                "lorry_adapter_evictions_total",
                "Adapters that left memory to make room for others.",
            ),
            adapter_refusals_total: counter("lorry_adapter_refusals_total", "Adapters found that cannot be served."),
            device_info: IntGaugeVec::new(Opts::new("lorry_device_info", "Where the base runs."), &["device"])
                .expect("constant name"),
            device_adapters: DeviceAdapters::new(),
            experiment_writes_total: counters(
                "lorry_experiment_writes_total",
                "Requests and votes for the experiments database.",
                &["result"],
            ),
            canary_rollbacks_total: counters(
                "lorry_canary_rollbacks_total",
                "Canaries that broke a bound.",
                &["experiment"],
            ),
            registry,
        };
        let collectors: Vec<Box<dyn Collector>> = vec![
            Box::new(m.requests_running.clone()),
            Box::new(m.requests_waiting.clone()),
            Box::new(m.kv_blocks_used.clone()),
            Box::new(m.kv_blocks_capacity.clone()),
            Box::new(m.preemptions_total.clone()),
            Box::new(m.tokens_total.clone()),
            Box::new(m.requests_total.clone()),
            Box::new(m.rejected_total.clone()),
            Box::new(m.request_queue_seconds.clone()),
            Box::new(m.time_to_first_token_seconds.clone()),
            Box::new(m.inter_token_latency_seconds.clone()),
            Box::new(m.time_per_output_token_seconds.clone()),
            Box::new(m.request_seconds.clone()),
            Box::new(m.grammars_compiled_total.clone()),
            Box::new(m.adapter_loads_total.clone()),
            Box::new(m.adapter_load_seconds.clone()),
            Box::new(m.adapter_evictions_total.clone()),
            Box::new(m.adapter_refusals_total.clone()),
            Box::new(m.device_info.clone()),
            Box::new(m.experiment_writes_total.clone()),
            Box::new(m.canary_rollbacks_total.clone()),
        ];
        for collector in collectors.into_iter().chain(m.device_adapters.collectors()) {
            m.registry.register(collector).expect("metric names are distinct");
        }
        m
    }

    /// Has `usage` asked at every scrape: nobody tells when a lease ends.
    pub fn report_adapters(&self, usage: impl Fn() -> Usage + Send + Sync + 'static) {
        let adapters = Adapters {
            registered: gauge("lorry_adapters_registered", "Adapters known, in memory or not."),
            resident: gauge("lorry_adapters_resident", "Adapters and compositions in memory."),
            resident_bytes: gauge("lorry_adapter_resident_bytes", "Bytes of adapter weights in memory."),
            leases: gauge("lorry_adapter_leases", "Adapters held by sequences, counted once for each."),
            usage: Box::new(usage),
        };
        if let Err(e) = self.registry.register(Box::new(adapters)) {
            tracing::error!("the adapters are missing in the metrics: {e}");
        }
    }

    /// The Prometheus text exposition of every metric.
    pub fn render(&self) -> String {
        TextEncoder::new().encode_to_string(&self.registry.gather()).unwrap_or_default()
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

struct Adapters {
    registered: IntGauge,
    resident: IntGauge,
    resident_bytes: IntGauge,
    leases: IntGauge,
    usage: Box<dyn Fn() -> Usage + Send + Sync>,
}

impl Adapters {
    fn gauges(&self) -> [&IntGauge; 4] {
        [&self.registered, &self.resident, &self.resident_bytes, &self.leases]
    }
}

impl Collector for Adapters {
    fn desc(&self) -> Vec<&Desc> {
        self.gauges().into_iter().flat_map(Collector::desc).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let Usage { registered, resident, resident_bytes, leases } = (self.usage)();
        let values = [registered as u64, resident as u64, resident_bytes, leases as u64];
        for (gauge, value) in self.gauges().into_iter().zip(values) {
            gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
        }
        self.gauges().into_iter().flat_map(Collector::collect).collect()
    }
}

fn opts(name: &str, help: &str) -> HistogramOpts {
    HistogramOpts::new(name, help).buckets(LATENCY_BUCKETS.to_vec())
}

fn gauge(name: &str, help: &str) -> IntGauge {
    IntGauge::new(name, help).expect("constant name")
}

fn counter(name: &str, help: &str) -> IntCounter {
    IntCounter::new(name, help).expect("constant name")
}

fn counters(name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
    IntCounterVec::new(Opts::new(name, help), labels).expect("constant name")
}

/// Labelled with `adapter`: registered names and `base`.
fn histograms(name: &str, help: &str) -> HistogramVec {
    HistogramVec::new(opts(name, help), &["adapter"]).expect("constant name")
}
