//! Every metric of the server, declared once; docs/metrics.md says what each means and who reads it. What means the same as
//! in vLLM has its name (`vllm.rs`); the rest is `lorry_<noun>_<unit>`, for each adapter (`adapters.rs`), for each arm of an
//! experiment (`arms.rs`) or for the server (here). Units are base units, and counters end in `_total`.

mod adapters;
mod arms;
mod declarations;
mod scrape;
mod vllm;

use std::fmt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::SystemTime;

use kernels::device::AdapterTier;
use prometheus::{Counter, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, TextEncoder};

pub use adapters::{AdapterSeries, BASE, COMPOSITION, RequestSeries};
pub use arms::ArmSeries;
pub use vllm::Vllm;

use crate::adapter::registry::{AdapterUsage, Usage};
use adapters::Adapters;
use arms::Arms;
use declarations::Declarations;

/// What is known of all adapters together, and of each.
type AskRegistry = Box<dyn Fn() -> (Usage, Vec<AdapterUsage>) + Send + Sync>;

pub struct Metrics {
    /// Of the base.
    model_name: String,
    started: SystemTime,
    declarations: Declarations,
    pub vllm: Vllm,
    adapters: Adapters,
    arms: Arms,
    registry: Mutex<Option<AskRegistry>>,
    device_adapters: OnceLock<DeviceAdapters>,
    disk_blocks: OnceLock<Arc<DiskBlocks>>,
    http: Http,
    /// `reason`: as `http::error` words them.
    pub rejected_total: IntCounterVec,
    /// `phase`: `queue`, `prefill`, `decode`, what the request was in.
    pub cancelled_total: IntCounterVec,
    pub grammars_compiled_total: IntCounter,
    pub adapter_refusals_total: IntCounter,
    /// `device`: where the base runs; always 1.
    pub device_info: IntGaugeVec,
    /// `result`: `written`, `refused` (a vote for an arm that was not there), `failed` (the database cannot be written),
    /// `dropped` (its queue was full), `skipped` (a shadow was not run for want of room).
    pub experiment_writes_total: IntCounterVec,
    /// `experiment`: configured names.
    pub canary_rollbacks_total: IntCounterVec,
    /// `status`: as clients are told.
    pub fine_tuning_jobs: IntGaugeVec,
}

/// The adapters in a device's own memory.
#[derive(Debug)]
pub struct DeviceAdapters {
    pub resident: IntGauge,
    pub resident_bytes: IntGauge,
    pub loads_total: IntCounter,
    pub evictions_total: IntCounter,
    pub transfer_seconds_total: Counter,
}

impl DeviceAdapters {
    fn new(d: &Declarations) -> Self {
        Self {
            resident: d.gauge("lorry_device_adapters_resident", "Adapters in device memory."),
            resident_bytes: d.gauge("lorry_device_adapter_resident_bytes", "Bytes of adapters in device memory."),
            loads_total: d.counter("lorry_device_adapter_loads_total", "Adapters sent to the device."),
            evictions_total: d.counter("lorry_device_adapter_evictions_total", "Adapters dropped from the device."),
            transfer_seconds_total: d.seconds_counter(
                "lorry_device_adapter_transfer_seconds_total",
                "Time that adapters took to the device.",
            ),
        }
    }

    /// Publishes what a device says; its counts only grow.
    fn set(&self, tier: &AdapterTier) {
        self.resident.set(tier.resident as i64);
        self.resident_bytes.set(tier.resident_bytes as i64);
        self.loads_total.inc_by(tier.loads.saturating_sub(self.loads_total.get()));
        self.evictions_total.inc_by(tier.evictions.saturating_sub(self.evictions_total.get()));
        self.transfer_seconds_total.inc_by((tier.transfer_seconds - self.transfer_seconds_total.get()).max(0.0));
    }
}

/// The prefix cache's blocks on disk.
#[derive(Debug)]
pub struct DiskBlocks {
    pub bytes: IntGauge,
    /// `event`: `written`, `unwritten` (it failed, or has lately), `read`, `lost` (damaged or gone), `evicted`.
    blocks_total: IntCounterVec,
}

impl DiskBlocks {
    fn new(d: &Declarations) -> Self {
        Self {
            bytes: d.gauge("lorry_prefix_cache_disk_bytes", "Bytes of the prefix cache on disk, all bases together."),
            blocks_total: d.counters(
                "lorry_prefix_cache_disk_blocks_total",
                "Blocks, by what became of them.",
                &["event"],
            ),
        }
    }

    pub fn count(&self, event: &str) {
        self.blocks_total.with_label_values(&[event]).inc();
    }
}

/// Requests of any kind, as vLLM's web server counts its own; labels are as its are.
#[derive(Debug)]
struct Http {
    /// `handler`, `method`, `status`.
    requests_total: IntCounterVec,
    /// `handler`, `method`.
    request_duration: HistogramVec,
}

impl Http {
    fn new(d: &Declarations) -> Self {
        Self {
            requests_total: d.counters(
                "http_requests_total",
                "Requests that were answered, probes left out.",
                &["handler", "method", "status"],
            ),
            request_duration: d.histograms(
                "http_request_duration_seconds",
                "From a request's header to the end of its reply, probes left out.",
                &[0.1, 0.5, 1.0],
                &["handler", "method"],
            ),
        }
    }
}

impl Metrics {
    /// Of a server of this base.
    pub fn new(model_name: &str) -> Self {
        let d = Declarations::default();
        let build = d.gauges("lorry_build_info", "What is running; always 1.", &["version"]);
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        Self {
            model_name: model_name.to_owned(),
            started: SystemTime::now(),
            vllm: Vllm::new(model_name),
            adapters: Adapters::default(),
            arms: Arms::default(),
            registry: Mutex::default(),
            device_adapters: OnceLock::new(),
            rejected_total: d.counters("lorry_rejected_total", "Requests refused before any output.", &["reason"]),
            disk_blocks: OnceLock::new(),
            http: Http::new(&d),
            cancelled_total: d.counters("lorry_cancelled_total", "Requests whose clients left.", &["phase"]),
            grammars_compiled_total: d.counter(
                "lorry_grammars_compiled_total",
                "Schemas and grammars compiled; one that was used lately is not compiled again.",
            ),
            adapter_refusals_total: d.counter("lorry_adapter_refusals_total", "Adapters found that cannot be served."),
            device_info: d.gauges("lorry_device_info", "Where the base runs.", &["device"]),
            experiment_writes_total: d.counters(
                "lorry_experiment_writes_total",
                "Requests and votes for the experiments database.",
                &["result"],
            ),
            canary_rollbacks_total: d.counters(
                "lorry_canary_rollbacks_total",
                "Canaries that broke a bound.",
                &["experiment"],
            ),
            fine_tuning_jobs: d.gauges("lorry_fine_tuning_jobs", "Fine-tuning jobs, by how they stand.", &["status"]),
            declarations: d,
        }
    }

    /// What is counted for an adapter: a registered name, [`BASE`] or [`COMPOSITION`]. To be kept by whoever counts often.
    pub fn of_adapter(&self, label: &str) -> Arc<AdapterSeries> {
        self.adapters.of(label)
    }

    /// What is counted for an arm of an experiment, which stands on `adapter`, or on the base. To be asked for once.
    pub fn new_arm(&self, experiment: &str, arm: &str, adapter: Option<&str>) -> Arc<ArmSeries> {
        let series = Arc::new(ArmSeries::new(experiment, arm, adapter));
        self.arms.add(series.clone());
        series
    }

    /// The sum of a counter over all adapters that are registered.
    pub fn sum_over_adapters(&self, counter: impl Fn(&AdapterSeries) -> &IntCounter) -> u64 {
        self.adapters.all().iter().map(|(_, series)| counter(series).get()).sum()
    }

    /// `route` as it is declared, `None` where there is none; `method` is one of a few.
    pub fn http_request_ended(&self, route: Option<&str>, method: &str, status: u16, seconds: f64) {
        let (handler, class) = (route.unwrap_or("none"), format!("{}xx", status / 100));
        self.http.requests_total.with_label_values(&[handler, method, &class]).inc();
        self.http.request_duration.with_label_values(&[handler, method]).observe(seconds);
    }

    /// `None` where the base runs on the host.
    pub fn device_adapters(&self) -> Option<&DeviceAdapters> {
        self.device_adapters.get()
    }

    pub fn set_device_adapters(&self, tier: &AdapterTier) {
        self.device_adapters.get_or_init(|| DeviceAdapters::new(&self.declarations)).set(tier);
    }

    /// Of a server whose prefix cache has a folder.
    pub fn disk_blocks(&self) -> Arc<DiskBlocks> {
        self.disk_blocks.get_or_init(|| Arc::new(DiskBlocks::new(&self.declarations))).clone()
    }

    /// Has the registry asked at every scrape: nobody tells when a lease ends.
    pub fn report_adapters(&self, ask: impl Fn() -> (Usage, Vec<AdapterUsage>) + Send + Sync + 'static) {
        *self.registry.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(ask));
    }

    fn ask_registry(&self) -> (Usage, Vec<AdapterUsage>) {
        let registry = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
        registry.as_ref().map(|ask| ask()).unwrap_or_default()
    }

    /// The Prometheus text exposition of every metric; of the adapters, those that `may_see` allows.
    pub fn render(&self, may_see: impl Fn(&str) -> bool) -> String {
        TextEncoder::new().encode_to_string(&self.gather(may_see)).unwrap_or_default()
    }
}

/// Of no server: what is counted is lost.
impl Default for Metrics {
    fn default() -> Self {
        Self::new("")
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").field("model_name", &self.model_name).finish_non_exhaustive()
    }
}
