//! /metrics as its readers rely on it: names, types, labels and what they mean, after real requests. docs/metrics.md says
//! who reads what.

mod adapter_server;
mod tiny;

use std::collections::BTreeMap;
use std::io::{ErrorKind, Write};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures::future::join_all;
use reqwest::{Method, StatusCode};
use serde_json::json;

use adapter_server::{ADMIN, Server};

/// A completion of so many tokens.
async fn complete(server: &Server, model: &str, prompt: &str, max_tokens: usize) {
    let body =
        json!({"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true});
    let request = server.request(Method::POST, "/v1/completions").bearer_auth("admin").body(body.to_string());
    let (status, reply) = server.send(request).await;
    assert_eq!(status, StatusCode::OK, "{reply}");
}

/// Of one scrape.
struct Scrape {
    text: String,
    /// `counter`, `gauge` or `histogram` of each name.
    types: BTreeMap<String, String>,
    /// By name and labels, as they stand in the text.
    samples: BTreeMap<String, f64>,
}

impl Scrape {
    async fn of(server: &Server, key: &str) -> Self {
        let mut request = server.request(Method::GET, "/metrics");
        if !key.is_empty() {
            request = request.bearer_auth(key);
        }
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        let text = response.text().await.unwrap();
        let words = |line: &str| line.rsplit_once(' ').map(|(key, value)| (key.to_owned(), value.to_owned())).unwrap();
        let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")).map(words).collect();
        let samples = text.lines().filter(|line| !line.starts_with('#')).map(words);
        let samples = samples.map(|(series, value)| (series, value.parse().unwrap())).collect();
        Self { text, types, samples }
    }

    /// Of a metric of vLLM that has its usual labels alone.
    fn vllm(&self, name: &str) -> f64 {
        self.value(&format!(r#"vllm:{name}{{engine="0",model_name="tiny"}}"#))
    }

    fn value(&self, series: &str) -> f64 {
        *self.samples.get(series).unwrap_or_else(|| panic!("{series} is missing in\n{}", self.text))
    }

    /// The lists of running and of waiting adapters, in the one series that has them.
    fn adapters_with_requests(&self) -> (&str, &str) {
        let mut series = self.samples.keys().filter(|series| series.starts_with("vllm:lora_requests_info{"));
        let labels = series.next().unwrap();
        assert_eq!(series.next(), None, "one series says what is the case");
        let value = |label: &str| labels.split_once(&format!("{label}=\"")).unwrap().1.split('"').next().unwrap();
        assert!(value("max_lora").parse::<u32>().unwrap() > 0, "{labels}");
        (value("running_lora_adapters"), value("waiting_lora_adapters"))
    }

    fn names(&self, adapter: &str) -> bool {
        let (running, waiting) = self.adapters_with_requests();
        let is_listed = [running, waiting].iter().any(|list| list.split(',').any(|name| name == adapter));
        is_listed || self.samples.keys().any(|series| series.contains(&format!("=\"{adapter}\"")))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_vllm_has_too_has_its_name_its_type_its_labels_and_its_meaning() {
    let server = Server::start(ADMIN).await;
    complete(&server, "tiny", "a prompt of some length", 6).await;
    let before = Scrape::of(&server, "").await;
    complete(&server, "tiny", "a prompt of some length", 6).await;
    complete(&server, "a", "a prompt of some length", 6).await;
    let after = Scrape::of(&server, "").await;
    let expected = [
        ("num_requests_running", "gauge"),
        ("num_requests_waiting", "gauge"),
        ("kv_cache_usage_perc", "gauge"),
        ("cache_config_info", "gauge"),
        ("engine_sleep_state", "gauge"),
        ("num_preemptions_total", "counter"),
        ("prompt_tokens_total", "counter"),
        ("generation_tokens_total", "counter"),
        ("prefix_cache_queries_total", "counter"),
        ("prefix_cache_hits_total", "counter"),
        ("spec_decode_num_draft_tokens_total", "counter"),
        ("spec_decode_num_accepted_tokens_total", "counter"),
        ("request_success_total", "counter"),
        ("time_to_first_token_seconds", "histogram"),
        ("inter_token_latency_seconds", "histogram"),
        ("request_time_per_output_token_seconds", "histogram"),
        ("e2e_request_latency_seconds", "histogram"),
        ("request_prefill_time_seconds", "histogram"),
        ("request_decode_time_seconds", "histogram"),
        ("request_inference_time_seconds", "histogram"),
        ("request_prompt_tokens", "histogram"),
        ("request_generation_tokens", "histogram"),
        ("external_prefix_cache_queries_total", "counter"),
        ("external_prefix_cache_hits_total", "counter"),
        ("request_queue_time_seconds", "histogram"),
        ("lora_requests_info", "gauge"),
        ("lora_adapter_loaded", "gauge"),
        ("lora_adapter_load_seconds", "histogram"),
        ("num_gpu_loaded_lora_adapters", "gauge"),
        ("num_cpu_loaded_lora_adapters", "gauge"),
        ("max_gpu_lora_adapters", "gauge"),
    ];
    for (name, kind) in expected {
        assert_eq!(after.types.get(&format!("vllm:{name}")).map(String::as_str), Some(kind), "{name}");
    }
    for name in ["time_to_first_token", "e2e_request_latency", "request_queue_time", "request_time_per_output_token"] {
        assert_eq!(after.vllm(&format!("{name}_seconds_count")), 3.0, "{name}: one for each request");
    }
    for name in ["prefill_time_seconds", "decode_time_seconds", "inference_time_seconds", "generation_tokens"] {
        assert_eq!(after.vllm(&format!("request_{name}_count")), 3.0, "{name}: one for each request");
    }
    assert_eq!(after.vllm("request_generation_tokens_sum"), 18.0);
    assert!(after.vllm("request_prompt_tokens_sum") > 3.0);
    let parts = ["prefill", "decode"].map(|part| after.vllm(&format!("request_{part}_time_seconds_sum")));
    assert!((parts[0] + parts[1] - after.vllm("request_inference_time_seconds_sum")).abs() < 1e-6);
    assert_eq!(after.vllm("inter_token_latency_seconds_count"), 15.0, "each of them has 6 tokens");
    assert_eq!(after.vllm("generation_tokens_total"), 18.0);
    let ended = |reason| {
        after
            .value(&format!(r#"vllm:request_success_total{{engine="0",finished_reason="{reason}",model_name="tiny"}}"#))
    };
    assert_eq!(["length", "stop", "abort", "error"].map(ended), [3.0, 0.0, 0.0, 0.0]);
    let awake = r#"vllm:engine_sleep_state{engine="0",model_name="tiny",sleep_state="awake"}"#;
    assert_eq!(after.value(awake), 1.0, "or vLLM's status board says that it is down");
    // Bounds that vLLM's dashboards offer for the share of requests within an objective.
    for (name, bounds) in [
        ("time_to_first_token", ["0.02", "0.75", "7.5", "2560"]),
        ("inter_token_latency", ["0.075", "0.15", "0.4", "80"]),
        ("request_time_per_output_token", ["0.075", "0.15", "0.4", "80"]),
        ("e2e_request_latency", ["0.3", "15", "480", "7680"]),
        ("request_queue_time", ["0.3", "15", "480", "7680"]),
    ] {
        for bound in bounds {
            let bucket = format!(r#"vllm:{name}_seconds_bucket{{engine="0",model_name="tiny",le="{bound}"}}"#);
            assert!(after.value(&bucket) <= after.vllm(&format!("{name}_seconds_count")));
        }
    }
    let grown = |name| after.vllm(name) - before.vllm(name);
    assert!(grown("prefix_cache_hits_total") > 0.0, "the same prompt again is found");
    assert!(grown("prefix_cache_queries_total") > grown("prefix_cache_hits_total"), "another adapter's is not");
    assert!(grown("prompt_tokens_total") > 0.0);
    assert_eq!(after.value(r#"lorry_tokens_total{adapter="a",kind="output"}"#), 6.0);
    assert_eq!(after.value(r#"lorry_requests_total{adapter="base",finish_reason="length"}"#), 2.0);
    assert_eq!(after.value(&format!(r#"lorry_build_info{{version="{}"}}"#, env!("CARGO_PKG_VERSION"))), 1.0);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
    assert!((now - after.value("process_start_time_seconds")).abs() < 600.0);
    assert_eq!(before.value("process_start_time_seconds"), after.value("process_start_time_seconds"));
    assert!(after.value("process_resident_memory_bytes") > (1 << 20) as f64);
    assert!(after.value("process_open_fds") > 3.0);
    check_with_promtool(&after.text);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adapter_is_listed_while_it_runs_in_memory_before_and_after_and_nowhere_once_it_is_removed() {
    let server = Server::start(ADMIN).await;
    let loaded = r#"vllm:lora_adapter_loaded{adapter_name="a",engine="0",level="gpu",model_name="tiny",pinned="false",rank="4"}"#;
    let before = Scrape::of(&server, "").await;
    assert_eq!((before.adapters_with_requests(), before.value(loaded)), (("", ""), 1.0));
    assert_eq!(before.vllm("num_gpu_loaded_lora_adapters"), 2.0);

    // Until they are seen running, however late that is looked for.
    let is_seen = AtomicBool::new(false);
    let running = async {
        let mut num_ended = 0;
        while !is_seen.load(Relaxed) {
            num_ended += join_all((0..4).map(|_| complete(&server, "a", "def f(x):", 200))).await.len();
        }
        num_ended
    };
    let watched = async {
        loop {
            let scrape = Scrape::of(&server, "").await;
            if scrape.adapters_with_requests().0 == "a" && scrape.vllm("kv_cache_usage_perc") > 0.0 {
                assert!(scrape.vllm("kv_cache_usage_perc") <= 1.0 && scrape.vllm("num_requests_running") > 0.0);
                is_seen.store(true, Relaxed);
                return scrape;
            }
        }
    };
    let (num_ended, during) = tokio::join!(running, watched);
    assert!(during.value(r#"lorry_requests_running{adapter="a"}"#) > 0.0);
    let mut after = Scrape::of(&server, "").await;
    assert_eq!((after.adapters_with_requests(), after.value(loaded)), (("", ""), 1.0));
    // What only the cache holds is free; an adapter's own test may still run.
    while after.vllm("kv_cache_usage_perc") > 0.0 {
        after = Scrape::of(&server, "").await;
    }

    assert!(after.names("a"));
    assert!(server.admin(Method::DELETE, "/v1/adapters/a", json!({})).await.0.is_success());
    let removed = Scrape::of(&server, "").await;
    assert!(!removed.names("a"), "{}", removed.text);
    assert!(removed.names("b"));
    assert_eq!(removed.vllm("time_to_first_token_seconds_count"), num_ended as f64, "what is of the server stays");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adapter_whose_requests_wait_for_another_is_listed_as_waiting() {
    let keys = "[[server.keys]]\nname = 'c'\nkey = 'client'\nadapters = ['b']\n";
    let server = Server::start(&format!("{ADMIN}{keys}[engine]\nmax_sequences = 1\n")).await;
    let is_seen = AtomicBool::new(false);
    let running = async {
        while !is_seen.load(Relaxed) {
            tokio::join!(complete(&server, "a", "def f(x):", 200), complete(&server, "b", "def g(x):", 200));
        }
    };
    let watched = async {
        while Scrape::of(&server, "admin").await.adapters_with_requests() != ("a", "b") {}
        // To whoever is not to know of the one that runs, the other waits all the same; it may run by now.
        let of_client = Scrape::of(&server, "client").await;
        assert!(!of_client.names("a"), "{}", of_client.text);
        is_seen.store(true, Relaxed);
    };
    tokio::join!(running, watched);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scrape_names_the_adapters_that_its_key_opens_and_without_one_none() {
    let keys = format!("{ADMIN}[[server.keys]]\nname = 'c'\nkey = 'client'\nadapters = ['b']");
    let server = Server::start(&keys).await;
    for adapter in ["a", "b"] {
        complete(&server, adapter, "def f(x):", 2).await;
    }
    for (key, seen) in [("admin", [true, true]), ("client", [false, true]), ("", [false, false])] {
        let scrape = Scrape::of(&server, key).await;
        assert_eq!(["a", "b"].map(|adapter| scrape.names(adapter)), seen, "{key:?} in\n{}", scrape.text);
        assert_eq!(scrape.vllm("time_to_first_token_seconds_count"), 2.0, "the server's are for all");
    }
    let wrong = server.send(server.request(Method::GET, "/metrics").bearer_auth("wrong")).await;
    assert_eq!(wrong.0, StatusCode::UNAUTHORIZED);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_request_but_probes_is_counted_by_its_route_and_status() {
    let server = Server::start(ADMIN).await;
    complete(&server, "a", "def f(x):", 2).await;
    for (method, path) in [
        (Method::POST, "//v1/completions/"),
        (Method::GET, "/v1/adapters/none"),
        (Method::GET, "/v1/adapters/a"),
        (Method::GET, "/adapters/b"),
        (Method::GET, "/nowhere/1"),
        (Method::from_bytes(b"BREW").unwrap(), "/nowhere/2"),
        (Method::GET, "/health"),
    ] {
        server.send(server.request(method, path).body("[]")).await;
    }
    let expected = [
        (r#"handler="/v1/completions",method="POST",status="2xx""#, 1.0),
        (r#"handler="/v1/completions",method="POST",status="4xx""#, 1.0),
        (r#"handler="/v1/adapters/{name}",method="GET",status="4xx""#, 1.0),
        (r#"handler="/v1/adapters/{name}",method="GET",status="2xx""#, 1.0),
        (r#"handler="/adapters/{name}",method="GET",status="2xx""#, 1.0),
        (r#"handler="none",method="GET",status="4xx""#, 1.0),
        (r#"handler="none",method="_OTHER",status="4xx""#, 1.0),
    ];
    let expected = expected.map(|(labels, count)| (format!("http_requests_total{{{labels}}}"), count));
    // A reply is counted when it is over, which its client may know before.
    let whole = async {
        loop {
            let scrape = Scrape::of(&server, "").await;
            let counted = scrape.samples.iter().filter(|(series, _)| series.starts_with("http_requests_total{"));
            let counted: BTreeMap<_, _> = counted.map(|(series, count)| (series.clone(), *count)).collect();
            if counted.values().sum::<f64>() >= expected.len() as f64 {
                return (counted, scrape);
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let (counted, scrape) = tokio::time::timeout(Duration::from_secs(60), whole).await.expect("all are counted");
    assert_eq!(counted, BTreeMap::from(expected));
    let durations = r#"http_request_duration_seconds_count{handler="/v1/completions",method="POST"}"#;
    assert_eq!(scrape.value(durations), 2.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_asks_for_text_with_a_wrong_key_is_counted_and_what_asks_for_none_is_not() {
    let server = Server::start(&format!("{ADMIN}[[server.keys]]\nname = 'c'\nkey = 'client'\nadapters = ['*']")).await;
    let asked = ["/v1/completions", "/chat/completions", "/v1/messages", "/infill", "/api/generate"];
    for path in asked.into_iter().chain(["/v1/tokenize", "/v1/adapters/a/load"]) {
        let request = server.request(Method::POST, path).bearer_auth("wrong").body("{}");
        // Not by `send`: Ollama's errors have another form.
        assert_eq!(request.send().await.unwrap().status(), StatusCode::UNAUTHORIZED, "{path}");
    }
    let scrape = Scrape::of(&server, "admin").await;
    assert_eq!(scrape.value(r#"lorry_rejected_total{reason="unauthorized"}"#), asked.len() as f64);
}

/// It parses, and the linter has nothing to say but that the names of vLLM have colons.
fn check_with_promtool(text: &str) {
    let mut promtool = Command::new("promtool");
    promtool.args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut promtool = match promtool.spawn() {
        Err(e) if e.kind() == ErrorKind::NotFound => return eprintln!("skipped: there is no promtool here"),
        started => started.unwrap(),
    };
    promtool.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let output = promtool.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(said.lines().all(|line| line.starts_with("vllm:")), "{said}");
}
