//! What means the same as in vLLM, under its names and with its labels, so that what reads vLLM reads lorry:
//! docs/metrics.md says who does. Each covers the whole server, and no name of an adapter is in any.

use prometheus::proto::MetricFamily;
use prometheus::{Gauge, Histogram, IntCounter, IntCounterVec, IntGauge, IntGaugeVec};

use super::declarations::Declarations;

/// `finished_reason` as vLLM's `FinishReason` words it.
const FINISHED_REASONS: [&str; 4] = ["stop", "length", "abort", "error"];

// Its buckets are among these: dashboards ask for the share below one of their bounds. Those below its first are not its own:
// within a bucket a quantile is a guess.
const FIRST_TOKEN_BUCKETS: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
];
const NEXT_TOKEN_BUCKETS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0,
];
const REQUEST_BUCKETS: &[f64] = &[
    0.001, 0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0,
    240.0, 480.0, 960.0, 1920.0, 7680.0,
];
const TOKEN_BUCKETS: &[f64] = &[
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10_000.0, 20_000.0, 50_000.0,
    100_000.0,
];

#[derive(Debug)]
pub struct Vllm {
    declarations: Declarations,
    pub num_requests_running: IntGauge,
    pub num_requests_waiting: IntGauge,
    /// Of the blocks, how many sequences hold; those that only the prefix cache knows do not count.
    pub kv_cache_usage: Gauge,
    cache_config: IntGaugeVec,
    /// That one batch can have.
    pub max_adapters: IntGauge,
    pub num_preemptions_total: IntCounter,
    /// With those found in the prefix cache.
    pub prompt_tokens_total: IntCounter,
    pub generation_tokens_total: IntCounter,
    /// In tokens, of prompts that the cache may serve.
    pub prefix_cache_queries_total: IntCounter,
    pub prefix_cache_hits_total: IntCounter,
    /// The same of the cache on disk: what was not in memory, and was found there.
    pub external_prefix_cache_queries_total: IntCounter,
    pub external_prefix_cache_hits_total: IntCounter,
    /// Rows spent on guessed tokens, and guesses that came true.
    pub draft_tokens_total: IntCounter,
    pub accepted_tokens_total: IntCounter,
    request_success_total: IntCounterVec,
    pub request_queue_time: Histogram,
    pub time_to_first_token: Histogram,
    pub inter_token_latency: Histogram,
    pub time_per_output_token: Histogram,
    pub e2e_request_latency: Histogram,
    /// Of each choice, its parts: to the first token and from there to the last, once the engine has begun.
    pub request_prefill_time: Histogram,
    pub request_decode_time: Histogram,
    pub request_inference_time: Histogram,
    /// In tokens.
    pub request_prompt_tokens: Histogram,
    pub request_generation_tokens: Histogram,
    /// From an adapter's files to the host's memory.
    pub adapter_load: Histogram,
}

impl Vllm {
    pub(super) fn new(model_name: &str) -> Self {
        let d = Declarations::with_labels(&labels(model_name));
        let request_success_total =
            d.counters("vllm:request_success_total", "Requests ended, in any way.", &["finished_reason"]);
        for reason in FINISHED_REASONS {
            request_success_total.with_label_values(&[reason]);
        }
        let sleep_state = d.gauges("vllm:engine_sleep_state", "It never sleeps: awake = 1.", &["sleep_state"]);
        for (state, value) in [("awake", 1), ("weights_offloaded", 0), ("discard_all", 0)] {
            sleep_state.with_label_values(&[state]).set(value);
        }
        Self {
            num_requests_running: d.gauge("vllm:num_requests_running", "Sequences in the running batch."),
            num_requests_waiting: d.gauge("vllm:num_requests_waiting", "Sequences accepted and not yet planned."),
            kv_cache_usage: d.fraction("vllm:kv_cache_usage_perc", "Of the KV blocks, held by sequences: 1 is all."),
            cache_config: d.gauges(
                "vllm:cache_config_info",
                "The KV blocks: tokens in each, and how many there are.",
                &["block_size", "num_gpu_blocks"],
            ),
            max_adapters: d.gauge("vllm:max_gpu_lora_adapters", "Adapters that one batch can have."),
            num_preemptions_total: d
                .counter("vllm:num_preemptions_total", "Sequences put back because KV blocks ran out."),
            prompt_tokens_total: d.counter("vllm:prompt_tokens_total", "Prompt tokens, cached ones too."),
            generation_tokens_total: d.counter("vllm:generation_tokens_total", "Tokens generated."),
            prefix_cache_queries_total: d
                .counter("vllm:prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache."),
            prefix_cache_hits_total: d
                .counter("vllm:prefix_cache_hits_total", "Prompt tokens found in the prefix cache."),
            external_prefix_cache_queries_total: d.counter(
                "vllm:external_prefix_cache_queries_total",
                "Prompt tokens that were not in memory, looked up on disk.",
            ),
            external_prefix_cache_hits_total: d
                .counter("vllm:external_prefix_cache_hits_total", "Prompt tokens found on disk."),
            draft_tokens_total: d.counter("vllm:spec_decode_num_draft_tokens_total", "Rows spent on guessed tokens."),
            accepted_tokens_total: d
                .counter("vllm:spec_decode_num_accepted_tokens_total", "Guessed tokens that came true."),
            request_success_total,
            request_queue_time: d.histogram(
                "vllm:request_queue_time_seconds",
                "From accepted to first planned.",
                REQUEST_BUCKETS,
            ),
            time_to_first_token: d.histogram(
                "vllm:time_to_first_token_seconds",
                "From accepted by HTTP to the first token.",
                FIRST_TOKEN_BUCKETS,
            ),
            inter_token_latency: d.histogram(
                "vllm:inter_token_latency_seconds",
                "Gap between two tokens.",
                NEXT_TOKEN_BUCKETS,
            ),
            time_per_output_token: d.histogram(
                "vllm:request_time_per_output_token_seconds",
                "Per request: (last token - first token) / (output tokens - 1).",
                NEXT_TOKEN_BUCKETS,
            ),
            e2e_request_latency: d.histogram(
                "vllm:e2e_request_latency_seconds",
                "From accepted by HTTP to the end.",
                REQUEST_BUCKETS,
            ),
            request_prefill_time: d.histogram(
                "vllm:request_prefill_time_seconds",
                "Per request: from first planned to the first token.",
                REQUEST_BUCKETS,
            ),
            request_decode_time: d.histogram(
                "vllm:request_decode_time_seconds",
                "Per request: from the first token to the last.",
                REQUEST_BUCKETS,
            ),
            request_inference_time: d.histogram(
                "vllm:request_inference_time_seconds",
                "Per request: from first planned to the last token.",
                REQUEST_BUCKETS,
            ),
            request_prompt_tokens: d.histogram(
                "vllm:request_prompt_tokens",
                "Per request: tokens of its prompt.",
                TOKEN_BUCKETS,
            ),
            request_generation_tokens: d.histogram(
                "vllm:request_generation_tokens",
                "Per request: tokens generated.",
                TOKEN_BUCKETS,
            ),
            adapter_load: d.latency_of(
                "vllm:lora_adapter_load_seconds",
                "From opening an adapter's files to ready, or refused.",
                ("transition", "load"),
            ),
            declarations: d,
        }
    }

    /// `finish_reason` is one of `stop`, `length`, `cancelled`, `error`.
    pub fn request_ended(&self, finish_reason: &str) -> IntCounter {
        let reason = if finish_reason == "cancelled" { "abort" } else { finish_reason };
        self.request_success_total.with_label_values(&[reason])
    }

    /// What the engine has, from its start on.
    pub fn set_capacity(&self, block_size: usize, num_blocks: usize, max_adapters: usize) {
        self.cache_config.with_label_values(&[&block_size.to_string(), &num_blocks.to_string()]).set(1);
        self.max_adapters.set(max_adapters as i64);
    }

    /// What the engine holds now; of the KV blocks, a fraction.
    pub fn set_load(&self, num_running: usize, num_waiting: usize, kv_cache_usage: f64) {
        self.num_requests_running.set(num_running as i64);
        self.num_requests_waiting.set(num_waiting as i64);
        self.kv_cache_usage.set(kv_cache_usage);
    }

    pub(super) fn gather(&self) -> Vec<MetricFamily> {
        self.declarations.gather()
    }
}

/// One server has one engine.
pub(super) fn labels(model_name: &str) -> [(&str, &str); 2] {
    [("model_name", model_name), ("engine", "0")]
}
