//! A server of its own for a test, with a tiny random model and three adapters.

// Every test program uses a part of it.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use candle_core::quantized::GgmlDType;
use lorry::app::App;
use lorry::config::{Config, Overrides};
use lorry::http;
use lorry::model::spec::Architecture;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use reqwest::{Client, Method, RequestBuilder, StatusCode};
use safetensors::tensor::{Dtype, TensorView, serialize};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::TcpListener;

use crate::tiny::TinyModel;

/// What the inside of `[server]` needs for `Server::admin`.
pub const ADMIN: &str = "admin_key = 'admin'\n";
const RANK: usize = 4;

/// A server of its own with the adapters `a`, `b` and one that is refused, `broken`.
pub struct Server {
    pub url: String,
    client: Client,
    dir: TempDir,
}

/// A LoRA on the queries of both layers, different for every seed; seed 0 changes nothing.
pub fn write_adapter(dir: &Path, seed: u64) {
    write_adapter_of_rank(dir, seed, RANK);
}

/// As [`write_adapter`]; each rank takes 2 KiB.
pub fn write_adapter_of_rank(dir: &Path, seed: u64, rank: usize) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut random = |count: usize, size: f32| -> Vec<u8> {
        (0..count).flat_map(|_| (size * rng.random_range(-1.0f32..1.0)).to_le_bytes()).collect()
    };
    let mut tensors = BTreeMap::new();
    for layer in 0..2 {
        let site = format!("base_model.model.model.layers.{layer}.self_attn.q_proj");
        tensors.insert(format!("{site}.lora_A.weight"), (vec![rank, 256], random(rank * 256, 0.1)));
        let size = if seed == 0 { 0.0 } else { 0.5 };
        tensors.insert(format!("{site}.lora_B.weight"), (vec![256, rank], random(256 * rank, size)));
    }
    let views = tensors.iter().map(|(name, (shape, bytes))| {
        let view = TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap();
        (name, view)
    });
    let config = json!({"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank,
        "target_modules": ["q_proj"]});
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join("adapter_model.safetensors"), serialize(views, None).unwrap()).unwrap();
    fs::write(dir.join("adapter_config.json"), config.to_string()).unwrap();
}

impl Server {
    /// `keys` is the inside of `[server]`.
    pub async fn start(keys: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        TinyModel::new(Architecture::Qwen2, GgmlDType::Q8_0, 1).write(&path("tiny.gguf"));
        write_adapter(&path("adapters/a"), 1);
        write_adapter(&path("adapters/b"), 2);
        write_adapter(&path("adapters/broken"), 3);
        fs::write(path("adapters/broken/adapter.toml"), "promt = 'x'").unwrap();
        fs::write(path("lorry.toml"), format!("[server]\n{keys}")).unwrap();
        let text = |path: PathBuf| Some(path.to_string_lossy().into_owned());
        let overrides =
            Overrides { model: text(path("tiny.gguf")), adapters: text(path("adapters")), ..Default::default() };
        let config = Config::load(Some(&path("lorry.toml")), &overrides).unwrap();
        let app = tokio::task::spawn_blocking(|| App::load(config).unwrap()).await.unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let server = http::Server::start(listener, &app.state.config.server).unwrap();
        tokio::spawn(server.serve(app.state, std::future::pending()));
        Self { url, client: Client::builder().no_proxy().build().unwrap(), dir }
    }

    /// The folder of the adapters.
    pub fn root(&self) -> PathBuf {
        self.dir.path().join("adapters")
    }

    pub fn address(&self) -> SocketAddr {
        self.url.trim_start_matches("http://").parse().unwrap()
    }

    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.client.request(method, format!("{}{path}", self.url))
    }

    /// Status and JSON (text as a string); no reply may tell where files lie.
    pub async fn send(&self, request: RequestBuilder) -> (StatusCode, Value) {
        let response = request.send().await.unwrap();
        let status = response.status();
        let body = response.text().await.unwrap();
        assert!(!body.contains(&*self.dir.path().to_string_lossy()), "{body}");
        let body: Value = serde_json::from_str(&body).unwrap_or(Value::String(body));
        if status.is_client_error() || status.is_server_error() {
            let error = &body["error"];
            assert!(!error["message"].as_str().unwrap().is_empty() && error["type"].is_string(), "{body}");
        }
        (status, body)
    }

    pub async fn get(&self, path: &str) -> Value {
        let (status, body) = self.send(self.request(Method::GET, path)).await;
        assert_eq!(status, StatusCode::OK, "{body}");
        body
    }

    pub async fn admin(&self, method: Method, path: &str, body: Value) -> (StatusCode, Value) {
        self.send(self.request(method, path).bearer_auth("admin").body(body.to_string())).await
    }

    /// A greedy completion with log-probabilities, so that equal replies had equal bits.
    pub fn completion(&self, mut body: Value) -> RequestBuilder {
        for (key, value) in json!({"prompt": "def f(x):", "max_tokens": 6, "temperature": 0, "logprobs": 5,
            "ignore_eos": true})
        .as_object()
        .unwrap()
        {
            body[key] = value.clone();
        }
        self.request(Method::POST, "/v1/completions").body(body.to_string())
    }

    pub async fn complete(&self, body: Value) -> Value {
        let (status, reply) = self.send(self.completion(body)).await;
        assert_eq!(status, StatusCode::OK, "{reply}");
        reply
    }

    pub async fn refusal(&self, body: Value) -> (StatusCode, Value) {
        let (status, reply) = self.send(self.completion(body)).await;
        (status, reply["error"].clone())
    }

    pub async fn get_id_of(&self, adapter: &str) -> Value {
        let path = format!("/v1/adapters/{adapter}");
        let (status, body) = self.send(self.request(Method::GET, &path).bearer_auth("admin")).await;
        assert_eq!(status, StatusCode::OK);
        body["id"].clone()
    }

    pub async fn until(&self, path: &str, condition: impl Fn(&Value) -> bool) -> Value {
        let polled = async {
            loop {
                let body = self.get(path).await;
                if condition(&body) {
                    return body;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), polled).await.expect("the condition comes true")
    }
}

pub fn ids(list: &Value) -> Vec<&str> {
    list["data"].as_array().unwrap().iter().map(|model| model["id"].as_str().unwrap()).collect()
}

pub fn names(list: &Value) -> Vec<&str> {
    list.as_array().unwrap().iter().map(|adapter| adapter["name"].as_str().unwrap()).collect()
}
