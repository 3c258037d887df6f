//! The whole interface over a real socket, with an engine whose model continues the alphabet.

mod adapter_events;
mod anthropic;
mod beams;
mod compare;
mod contract;
mod deadlines;
mod endings;
mod gaps;
mod grammar;
mod icl;
mod keep_alive;
mod llama_cpp;
mod logged;
mod logprobs;
mod mutations;
mod ollama;
mod openapi;
mod promotions;
mod reviewed;
mod streams;
mod tabby;
mod tokenize;
mod trials;
mod unserved;
mod votes;

use std::path::Path;
use std::time::Duration;

use kernels::device::{Caller, DeviceError, HostLogits};
use reqwest::{Client, Method, RequestBuilder, StatusCode};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::*;
use crate::config::Overrides;
use crate::engine::{EngineConfig, EngineHandle, EngineState};
use crate::experiments::ModelNames;
use crate::generation::Base;
use crate::icl::IclStores;
use crate::model::file::ModelFile;
use crate::model::spec::{Architecture, Features, ModelSpec};
use crate::model::{ForwardBatch, Model};
use crate::prompt::PromptError;
use crate::prompt::chat::ChatTemplate;
use crate::prompt::fim::FillInMiddle;
use crate::prompt::formats::PromptFormats;
use crate::tokenizer::Tokenizer;

const CONTEXT_LENGTH: usize = 64;
const MAX_QUEUED: usize = 4;
const BASE: &str = "tiny-coder:1b";
/// A prompt that the model panics at.
const PANIC: &str = "~~~~";
/// And a database that nobody can open.
const NO_EXPERIMENTS: &str =
    "path = '/dev/null/experiments.db'\nmax_mib = 1\nmax_queued = 8\nkeep_text = true\nrun = []";

/// After each letter the next one, after `z` the end; `0` for ever; after `<` the two bytes of `é`; else `a`.
struct Alphabet {
    spec: ModelSpec,
    end: u32,
    step: Duration,
}

impl Alphabet {
    fn next(&self, token: u32) -> u32 {
        match u8::try_from(token) {
            Ok(b'z') => self.end,
            Ok(letter @ b'a'..=b'z') => u32::from(letter) + 1,
            Ok(b'0') => u32::from(b'0'),
            Ok(b'<') => 0xc3,
            Ok(0xc3) => 0xa9,
            _ => u32::from(b'a'),
        }
    }
}

impl Model for Alphabet {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn num_kv_blocks(&self) -> usize {
        32
    }

    fn forward(&mut self, batch: &ForwardBatch<'_>, caller: &mut dyn Caller) -> Result<(), DeviceError> {
        caller.meanwhile();
        std::thread::sleep(self.step);
        let is_bad = |tokens: &[u32]| tokens.iter().copied().eq(PANIC.bytes().map(u32::from));
        assert!(!batch.tokens.windows(PANIC.len()).any(is_bad), "a bad token");
        let mut logits = vec![0.0; self.spec.vocab_size];
        for (index, &row) in batch.logits_rows.iter().enumerate() {
            logits.fill(0.0);
            logits[self.next(batch.tokens[row]) as usize] = 10.0;
            caller.on_logits(index, &mut HostLogits(&mut logits))?;
        }
        Ok(())
    }
}

struct Server {
    url: String,
    client: Client,
    metrics: Arc<Metrics>,
    experiments: Arc<Experiments>,
    state: AppState,
    engine: EngineHandle,
    shutdown: oneshot::Sender<()>,
    served: JoinHandle<std::io::Result<()>>,
    /// Holds `icl`, the folder of the example stores.
    dir: TempDir,
}

impl Server {
    async fn start(control_tokens: &[&str], step: Duration) -> Self {
        Self::start_with(control_tokens, step, NO_EXPERIMENTS).await
    }

    /// `experiments` is that section of the configuration, in TOML.
    async fn start_with(control_tokens: &[&str], step: Duration, experiments: &str) -> Self {
        Self::start_with_chat(control_tokens, step, experiments, Err(PromptError::NoChatTemplate)).await
    }

    /// With all that a model can have: it fills gaps, chats and calls tools.
    async fn able() -> Self {
        Self::able_in(Duration::ZERO).await
    }

    async fn able_in(step: Duration) -> Self {
        let template =
            "{% for message in messages %}{{ message.content }}{% endfor %}{% if tools %}<tool_call>{% endif %}";
        let template = ChatTemplate::new(template, String::new(), String::new());
        // The database is in the server's own folder.
        let experiments = format!(
            "path = ''\nmax_mib = 1\nmax_queued = 8\nkeep_text = true\n[[run]]\nname = 'one'\nalias = 'coder'\n
             arms = [{{name = 'base', model = '{BASE}', weight = 1}}, {{name = 'tuned', model = 'x', weight = 1, canary = true}}]
             bounds = {{min_samples = 1, max_error_rate = 0.5}}"
        );
        let tokens = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|end|>"];
        Self::start_with_chat(&tokens, step, &experiments, template).await
    }

    async fn start_with_chat(
        control_tokens: &[&str],
        step: Duration,
        experiments: &str,
        chat_template: Result<ChatTemplate, PromptError>,
    ) -> Self {
        Self::start_within(control_tokens, step, experiments, chat_template, 0).await
    }

    /// Requests take `max_request_seconds` at most.
    async fn start_within(
        control_tokens: &[&str],
        step: Duration,
        experiments: &str,
        chat_template: Result<ChatTemplate, PromptError>,
        max_request_seconds: u64,
    ) -> Self {
        let tokenizer = Arc::new(Tokenizer::tiny(control_tokens));
        let spec = ModelSpec {
            architecture: Architecture::Llama,
            hidden_size: 2,
            intermediate_size: 2,
            num_layers: 1,
            num_heads: 1,
            num_kv_heads: 1,
            head_dim: 2,
            vocab_size: tokenizer.vocab_size(),
            rope_theta: 1e4,
            norm_eps: 1e-5,
            context_length: CONTEXT_LENGTH,
            features: Features::PLAIN,
        };
        let end = tokenizer.eos().unwrap();
        let metrics = Arc::new(Metrics::new(BASE));
        let dir = tempfile::tempdir().unwrap();
        let (file, stores) = (dir.path().join("lorry.toml"), dir.path().join("icl"));
        std::fs::create_dir(&stores).unwrap();
        let short = "{% for example in examples %}{{ example.code }}{% endfor %}{{ instruction }}";
        let toml = format!(
            "[server]\nadmin_key = 'admin'\nmodel_aliases = {{ claude-tiny = '{BASE}' }}\n[icl]\ndir = {stores:?}\n[prompt_formats.short]\ntemplate = '{short}'"
        );
        std::fs::write(&file, toml).unwrap();
        let mut config = Config::load(Some(&file), &Overrides::default()).unwrap();
        config.engine.max_queued = MAX_QUEUED;
        config.server.max_body_bytes = 10_000;
        config.server.max_request_seconds = max_request_seconds;
        config.experiments = toml::from_str(experiments).unwrap();
        let config = Arc::new(config);
        let limits = EngineConfig {
            max_batch_rows: 32,
            max_sequences: 8,
            max_draft_tokens: 0,
            max_inter_token: None,
            max_queued: MAX_QUEUED,
            context_length: CONTEXT_LENGTH,
        };
        let engine = EngineHandle::start(Box::new(Alphabet { spec, end, step }), limits, metrics.clone());
        let fill_in_middle = FillInMiddle::detect(&tokenizer);
        let base = Base {
            device: "CPU".to_owned(),
            file: ModelFile {
                architecture: "llama".to_owned(),
                num_parameters: 1_000_000_000,
                quantization: "Q4_K_M",
                size_bytes: 600_000_000,
                modified: SystemTime::UNIX_EPOCH,
                trained_context_length: CONTEXT_LENGTH,
                hidden_size: 2,
            },
            id: BASE.to_owned(),
            tokenizer,
            chat_template,
            fill_in_middle,
        };
        let icl = Arc::new(IclStores::open(&config.icl).unwrap());
        let formats = PromptFormats::new(&config.prompt_formats).unwrap();
        let generation =
            Generation::new(base, Arc::default(), icl, formats, engine.clone(), metrics.clone(), config.clone());
        let path = config.experiments.path(dir.path());
        let names = ModelNames::new(BASE, &config.server.model_aliases, |_| false);
        let experiments =
            Experiments::start(&config.experiments, path, names, metrics.clone(), Box::new(|_, _| {})).unwrap();
        let experiments = Arc::new(experiments);
        let tuned = crate::fine_tuning::Base { id: BASE.to_owned(), path: file, begins_with_bos: false };
        let jobs = dir.path().join("jobs");
        let jobs = FineTuning::start(&config.fine_tuning, jobs, tuned, Arc::default(), &metrics).map(Arc::new).ok();
        let state = AppState::new(Arc::new(generation), experiments.clone(), jobs, metrics.clone(), config);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (shutdown, stopped) = oneshot::channel();
        let stopped = async move { stopped.await.unwrap_or_default() };
        let served = super::Server::start(listener, &state.config.server).unwrap();
        let served = tokio::spawn(served.serve(state.clone(), stopped));
        let client = Client::builder().no_proxy().build().unwrap();
        Self { url, client, metrics, experiments, state, engine, shutdown, served, dir }
    }

    async fn quick() -> Self {
        Self::start(&["<|end|>"], Duration::ZERO).await
    }

    /// One token takes long enough to do something meanwhile.
    async fn slow() -> Self {
        Self::start(&["<|end|>"], Duration::from_millis(50)).await
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.client.request(method, format!("{}{path}", self.url))
    }

    fn completions(&self, body: Value) -> RequestBuilder {
        self.request(Method::POST, "/v1/completions").body(body.to_string())
    }

    async fn complete(&self, body: Value) -> Value {
        let response = self.completions(body).send().await.unwrap();
        let status = response.status();
        let reply: Value = response.json().await.unwrap();
        assert_eq!(status, StatusCode::OK, "{reply}");
        reply
    }

    /// The data of every event of a streamed reply.
    async fn stream(&self, mut body: Value) -> Vec<String> {
        body["stream"] = json!(true);
        let text = self.completions(body).send().await.unwrap().text().await.unwrap();
        let events = text.strip_suffix("\n\n").unwrap().split("\n\n");
        events.map(|event| event.strip_prefix("data: ").unwrap().to_owned()).collect()
    }

    fn num_cancelled(&self) -> u64 {
        self.metrics.of_adapter("base").requests().ended_total.with_label_values(&["cancelled"]).get()
    }

    /// Waits for `condition`; fails only when it has no hope left.
    async fn until(&self, condition: impl Fn(&Self) -> bool) {
        let polled = async {
            let mut poll = tokio::time::interval(Duration::from_millis(5));
            while !condition(self) {
                poll.tick().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), polled).await.expect("the condition comes true");
    }

    /// Waits for the end of all that was taken in: its state alone says nothing yet of what has not been planned.
    async fn until_idle(&self) {
        let is_idle =
            |engine: &EngineHandle| engine.num_free_places() == MAX_QUEUED && engine.state() == EngineState::default();
        self.until(|server| is_idle(&server.engine)).await;
    }
}

fn text(reply: &Value) -> &str {
    reply["choices"][0]["text"].as_str().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plain_completion_has_every_field_that_strict_clients_read() {
    let server = Server::quick().await;
    let reply =
        server.complete(json!({"model": "tiny-coder:1b", "prompt": "xyzabc", "max_tokens": 3, "seed": 5})).await;
    assert!(reply["id"].as_str().unwrap().starts_with("cmpl-"));
    assert!(reply["created"].as_u64().unwrap() > 0);
    assert_eq!(reply["object"], "text_completion");
    assert_eq!(reply["model"], "tiny-coder:1b");
    assert_eq!((&reply["seed"], &reply["adapter"]), (&json!(5), &Value::Null));
    assert_eq!(reply["choices"], json!([{"index": 0, "text": "def", "logprobs": null, "finish_reason": "length"}]));
    let usage = json!({"prompt_tokens": 6, "completion_tokens": 3, "total_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 0}});
    assert_eq!(reply["usage"], usage);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_string_over_several_tokens_never_shows() {
    let server = Server::quick().await;
    let body = json!({"prompt": "a", "temperature": 0, "stop": ["zzz", "fgh", "c!"]});
    let reply = server.complete(body.clone()).await;
    assert_eq!((text(&reply), &reply["choices"][0]["finish_reason"]), ("bcde", &json!("stop")));
    let events = server.stream(body).await;
    let deltas = events.iter().filter_map(|event| serde_json::from_str::<Value>(event).ok());
    assert_eq!(deltas.map(|chunk| text(&chunk).to_owned()).collect::<String>(), "bcde");
    server.until_idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn choices_are_prompt_major_and_prompts_count_once() {
    let server = Server::quick().await;
    let reply =
        server.complete(json!({"prompt": ["a", "mm"], "n": 2, "best_of": 2, "max_tokens": 1, "temperature": 0})).await;
    let choices = reply["choices"].as_array().unwrap();
    let texts: Vec<_> =
        choices.iter().map(|choice| (choice["index"].as_u64().unwrap(), choice["text"].as_str().unwrap())).collect();
    assert_eq!(texts, [(0, "b"), (1, "b"), (2, "n"), (3, "n")]);
    assert_eq!((&reply["usage"]["prompt_tokens"], &reply["usage"]["completion_tokens"]), (&json!(3), &json!(4)));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_refusal_has_the_right_status_and_names_the_field() {
    let server = Server::quick().await;
    let too_long = json!({"prompt": "a".repeat(CONTEXT_LENGTH)}).to_string();
    let too_large = json!({"prompt": "a".repeat(20_000)}).to_string();
    let post = Method::POST;
    for (method, path, body, status, param, code) in [
        (post.clone(), "/v1/completions", "{", 400, json!(null), json!(null)),
        (post.clone(), "/v1/completions", "[]", 400, json!(null), json!(null)),
        (post.clone(), "/v1/completions", "{}", 400, json!("prompt"), json!(null)),
        (post.clone(), "/v1/completions", r#"{"prompt":"a","max_tokens":"1"}"#, 400, json!("max_tokens"), json!(null)),
        (post.clone(), "/v1/completions", r#"{"prompt":"a","logprobs":21}"#, 400, json!("logprobs"), json!(null)),
        (post.clone(), "/v1/completions", r#"{"prompt":[999]}"#, 400, json!("prompt"), json!(null)),
        (post.clone(), "/v1/completions", r#"{"prompt":[[]]}"#, 400, json!("prompt"), json!(null)),
        (post.clone(), "/v1/completions", r#"{"prompt":""}"#, 400, json!("prompt"), json!(null)),
        (post.clone(), "/v1/completions", r#"{"prompt":"a","suffix":"b"}"#, 400, json!("suffix"), json!(null)),
        (
            post.clone(),
            "/v1/completions",
            r#"{"prompt":"a","logit_bias":{"999":1}}"#,
            400,
            json!("logit_bias"),
            json!(null),
        ),
        (post.clone(), "/v1/completions", r#"{"prompt":"a","n":100}"#, 400, json!("n"), json!(null)),
        (post.clone(), "/v1/completions", r#"{"prompt":["a","b"],"n":3}"#, 400, json!("n"), json!(null)),
        (post.clone(), "/v1/completions", r#"{"prompt":["a","b","c","d","e"]}"#, 400, json!("prompt"), json!(null)),
        (
            post.clone(),
            "/v1/completions",
            r#"{"prompt":"a","use_beam_search":true,"best_of":9}"#,
            400,
            json!("best_of"),
            json!(null),
        ),
        (
            post.clone(),
            "/v1/completions",
            r#"{"prompt":"a","model":"b"}"#,
            404,
            json!("model"),
            json!("model_not_found"),
        ),
        (post.clone(), "/v1/completions", &too_long, 400, json!("prompt"), json!("context_length_exceeded")),
        (post.clone(), "/v1/completions", &too_large, 413, json!(null), json!("body_too_large")),
        (post.clone(), "/v1/chat/completions", r#"{"messages":[]}"#, 400, json!("messages"), json!(null)),
        (
            post.clone(),
            "/v1/chat/completions",
            r#"{"messages":[{"role":"user","content":"a"}]}"#,
            400,
            json!("messages"),
            json!(null),
        ),
        (Method::GET, "/v1/completions", "", 405, json!(null), json!("method_not_allowed")),
        (post, "/v1/embeddings", "{}", 404, json!(null), json!("not_found")),
        (Method::GET, "/v1/models/none", "", 404, json!("model"), json!("model_not_found")),
        (Method::GET, "/nowhere", "", 404, json!(null), json!("not_found")),
    ] {
        let response = server.request(method, path).body(body.to_owned()).send().await.unwrap();
        let shown = &body[..body.len().min(80)];
        assert_eq!(response.status(), status, "{path} {shown}");
        let error = response.json::<Value>().await.unwrap()["error"].clone();
        assert!(!error["message"].as_str().unwrap().is_empty(), "{path} {shown}");
        assert!(error["type"].is_string(), "{path} {shown}");
        assert_eq!((&error["param"], &error["code"]), (&param, &code), "{path} {shown}: {error}");
    }
    assert_eq!(server.metrics.rejected_total.with_label_values(&["not_found"]).get(), 1);
    server.until_idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_its_model_says_so_and_becomes_one_with_it() {
    let with_model = Server::quick().await;
    let (generation, config) = (with_model.state.generation.clone(), with_model.state.config.clone());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let loading = super::Server::start(listener, &config.server).unwrap();
    for path in ["/health", "/v1/models", "/v1/messages", "/api/tags", "/nothing"] {
        let reply = with_model.client.get(format!("{url}{path}")).send().await.unwrap();
        assert_eq!((reply.status().as_u16(), reply.headers()["retry-after"].to_str().unwrap()), (503, "1"), "{path}");
        assert!(reply.headers().contains_key("x-request-id"));
        assert!(reply.text().await.unwrap().contains("Loading model"), "{path}");
    }
    let _served = tokio::spawn(loading.serve(with_model.state.clone(), std::future::pending()));
    // On the connection that was opened before.
    let health = async || with_model.client.get(format!("{url}/health")).send().await.unwrap().status().as_u16();
    while health().await != 200 {}
    assert!(generation.is_accepting());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_and_its_files_are_served_beside_the_api() {
    let server = Server::quick().await;
    for (path, content) in [("/", "<!doctype html>"), ("//", "<!doctype html>"), ("/assets/main.js", "import")] {
        let response = server.request(Method::GET, path).header("accept", "text/html,*/*").send().await.unwrap();
        assert_eq!(response.status(), 200, "{path}");
        assert!(response.text().await.unwrap().contains(content), "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn max_tokens_is_cut_to_the_context_and_an_over_long_prompt_says_by_how_much() {
    let server = Server::quick().await;
    let reply = server.complete(json!({"prompt": "00", "max_tokens": 4000, "temperature": 0})).await;
    assert_eq!(reply["usage"]["total_tokens"], CONTEXT_LENGTH);
    let full = json!({"prompt": "a".repeat(CONTEXT_LENGTH), "max_tokens": 0});
    assert_eq!(server.complete(full).await["usage"]["completion_tokens"], 0);
    let response = server.completions(json!({"prompt": "a".repeat(CONTEXT_LENGTH + 1)})).send().await.unwrap();
    let error = response.json::<Value>().await.unwrap()["error"].clone();
    assert_eq!((&error["n_prompt_tokens"], &error["n_ctx"]), (&json!(CONTEXT_LENGTH + 1), &json!(CONTEXT_LENGTH)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_cancels_its_sequences_streamed_or_plain() {
    let server = Server::slow().await;
    let body = json!({"prompt": "0", "max_tokens": 60, "n": 2, "temperature": 0});
    let mut streamed = body.clone();
    streamed["stream"] = json!(true);
    let mut response = server.completions(streamed).send().await.unwrap();
    assert!(response.chunk().await.unwrap().is_some());
    drop(response);
    server.until_idle().await;
    server.until(|server| server.num_cancelled() == 2).await;

    let plain = tokio::spawn(server.completions(body).send());
    server.until(|server| server.engine.state().running == 2).await;
    plain.abort();
    server.until_idle().await;
    server.until(|server| server.num_cancelled() == 4).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_is_503_and_says_when_to_come_back() {
    let server = Server::slow().await;
    let body = json!({"prompt": "0", "max_tokens": 60, "n": MAX_QUEUED, "stream": true, "temperature": 0});
    let mut response = server.completions(body).send().await.unwrap();
    response.chunk().await.unwrap();
    let refused = server.completions(json!({"prompt": "a"})).send().await.unwrap();
    assert_eq!(refused.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(refused.headers()["retry-after"], "1");
    assert_eq!(server.metrics.rejected_total.with_label_values(&["overloaded"]).get(), 1);
    let health = server.request(Method::GET, "/health").send().await.unwrap();
    assert_eq!(health.json::<Value>().await.unwrap(), json!({"status": "ok", "device": "CPU"}));
}

#[tokio::test(flavor = "multi_thread")]
async fn shutting_down_refuses_new_requests_and_finishes_those_under_way() {
    let server = Server::slow().await;
    let body = json!({"prompt": "0", "max_tokens": 30, "stream": true, "temperature": 0});
    let mut response = server.completions(body).send().await.unwrap();
    let mut events = String::from_utf8_lossy(&response.chunk().await.unwrap().unwrap()).into_owned();
    server.shutdown.send(()).unwrap();
    let health = || server.client.get(format!("{}/health", server.url)).send();
    while health().await.unwrap().status() == StatusCode::OK {}
    let refused = server.client.post(format!("{}/v1/completions", server.url)).body(r#"{"prompt":"a"}"#);
    assert_eq!(refused.send().await.unwrap().status(), StatusCode::SERVICE_UNAVAILABLE);
    while let Some(chunk) = response.chunk().await.unwrap() {
        events.push_str(&String::from_utf8_lossy(&chunk));
    }
    assert!(events.contains(r#""finish_reason":"length""#) && events.ends_with("data: [DONE]\n\n"), "{events}");
    server.served.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_seed_a_reply_names_repeats_its_text() {
    let server = Server::quick().await;
    let body =
        |seed: Value| json!({"prompt": "a", "temperature": 2, "max_tokens": 40, "ignore_eos": true, "seed": seed});
    let drawn = server.complete(body(Value::Null)).await;
    let repeated = server.complete(body(drawn["seed"].clone())).await;
    let other = server.complete(body(json!(drawn["seed"].as_i64().unwrap() ^ 1))).await;
    assert_eq!(text(&drawn), text(&repeated));
    assert_ne!(text(&drawn), text(&other));
}

#[tokio::test(flavor = "multi_thread")]
async fn paths_tolerate_slashes_and_a_missing_prefix_and_every_reply_has_a_request_id() {
    let server = Server::quick().await;
    for path in ["/v1/models", "/models", "/v1/models/", "//v1//models"] {
        let response = server.request(Method::GET, path).header("x-request-id", "mine").send().await.unwrap();
        assert_eq!(response.headers()["x-request-id"], "mine", "{path}");
        let models: Value = response.json().await.unwrap();
        assert_eq!(models["data"][0]["id"], "tiny-coder:1b", "{path}");
        assert_eq!(models["data"][0]["max_model_len"], CONTEXT_LENGTH, "{path}");
    }
    let models = server.request(Method::GET, "/v1/models").send().await.unwrap().json::<Value>().await.unwrap();
    assert_eq!((&models["data"][1]["id"], &models["data"][1]["root"]), (&json!("claude-tiny"), &json!(BASE)));
    assert_eq!(server.complete(json!({"model": "claude-tiny", "prompt": "a", "max_tokens": 1})).await["model"], BASE);
    let one = server.request(Method::GET, "/v1/models/Tiny-Coder-1B").send().await.unwrap();
    assert!(!one.headers()["x-request-id"].is_empty());
    assert_eq!(one.json::<Value>().await.unwrap()["id"], "tiny-coder:1b");
}

#[tokio::test(flavor = "multi_thread")]
async fn browsers_may_ask_from_any_origin() {
    let server = Server::quick().await;
    let preflight = server
        .request(Method::OPTIONS, "/v1/completions")
        .header("origin", "vscode-webview://x")
        .header("access-control-request-method", "POST")
        .header("access-control-request-headers", "authorization,content-type");
    let response = preflight.send().await.unwrap();
    assert!(response.status().is_success());
    assert_eq!(response.headers()["access-control-allow-origin"], "*");
    // Browsers do not take `*` for `authorization`.
    assert_eq!(response.headers()["access-control-allow-headers"], "authorization,content-type");
    assert_eq!(response.headers()["access-control-allow-methods"], "POST");
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_are_exposed_as_text() {
    let server = Server::quick().await;
    server.complete(json!({"prompt": "a", "max_tokens": 2, "temperature": 0})).await;
    let text = server.request(Method::GET, "/metrics").send().await.unwrap().text().await.unwrap();
    assert!(text.contains(r#"lorry_requests_total{adapter="base",finish_reason="length"} 1"#), "{text}");
    assert!(text.contains(r#"lorry_time_to_first_token_seconds_count{adapter="base"} 1"#), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prediction_changes_no_text_and_the_usage_says_how_much_of_it_came() {
    let server = Server::quick().await;
    let body = json!({"prompt": "xyzabc", "max_tokens": 4, "seed": 5, "n": 2});
    let plain = server.complete(body.clone()).await;
    assert_eq!(plain["usage"].get("completion_tokens_details"), None);
    let text_part = |text| json!({"type": "text", "text": text});
    for (content, accepted, rejected) in [
        (json!("defg"), 4, 0),
        (json!("dexyz"), 2, 3),
        (json!([text_part("d"), text_part("efghi")]), 4, 2),
        (json!(""), 0, 0),
    ] {
        let mut predicted = body.clone();
        predicted["prediction"] = json!({"type": "content", "content": content});
        let reply = server.complete(predicted).await;
        assert_eq!(reply["choices"], plain["choices"]);
        let details = json!({"accepted_prediction_tokens": 2 * accepted, "rejected_prediction_tokens": 2 * rejected});
        assert_eq!(reply["usage"]["completion_tokens_details"], details, "{content}");
    }
}
