//! What the wire is to clients that are unusual, slow or hostile, with a tiny random model.

mod tiny;

use std::time::Duration;

use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::Value as Metadata;
use lorry::app::App;
use lorry::config::{Config, Overrides};
use lorry::http;
use lorry::model::spec::Architecture;
use reqwest::{Client, StatusCode};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::TcpListener;

use tiny::TinyModel;

struct Server {
    address: String,
    client: Client,
    _dir: TempDir,
}

impl Server {
    /// `settings` is the inside of `[server]`; `chat_template` is that of the model.
    async fn start(settings: &str, chat_template: Option<&str>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (model, file) = (dir.path().join("tiny.gguf"), dir.path().join("lorry.toml"));
        let mut tiny = TinyModel::new(Architecture::Qwen2, GgmlDType::Q8_0, 1);
        if let Some(template) = chat_template {
            tiny.metadata.insert("tokenizer.chat_template".to_owned(), Metadata::String(template.to_owned()));
        }
        tiny.write(&model);
        std::fs::write(&file, format!("[server]\n{settings}")).unwrap();
        let model = Some(model.to_string_lossy().into_owned());
        let overrides = Overrides { model, adapters: Some(String::new()), ..Overrides::default() };
        let config = Config::load(Some(&file), &overrides).unwrap();
        let app = tokio::task::spawn_blocking(|| App::load(config).unwrap()).await.unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        tokio::spawn(http::serve(listener, app.state, std::future::pending()));
        Self { address, client: Client::builder().no_proxy().build().unwrap(), _dir: dir }
    }

    async fn post(&self, path: &str, body: Value) -> (StatusCode, Value) {
        let request = self.client.post(format!("http://{}{path}", self.address)).body(body.to_string());
        let response = request.timeout(Duration::from_secs(60)).send().await.unwrap();
        (response.status(), response.json().await.unwrap())
    }
}

fn chat() -> Value {
    json!({"messages": [{"role": "user", "content": "def f(x):"}], "max_tokens": 1})
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chat_template_that_does_not_compile_turns_off_chat_alone_and_says_why() {
    let server = Server::start("", Some("{% teleport %}")).await;
    let (status, reply) = server.post("/v1/chat/completions", chat()).await;
    assert_eq!((status, &reply["error"]["param"]), (StatusCode::BAD_REQUEST, &json!("messages")));
    assert!(reply["error"]["message"].as_str().unwrap().contains("teleport"), "{reply}");
    let (status, reply) = server.post("/v1/completions", json!({"prompt": "def f(x):", "max_tokens": 1})).await;
    assert_eq!(status, StatusCode::OK, "{reply}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chat_template_may_leave_its_loop() {
    let template = "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}";
    let server = Server::start("", Some(template)).await;
    let (status, one) = server.post("/v1/chat/completions", chat()).await;
    assert_eq!(status, StatusCode::OK, "{one}");
    let mut more = chat();
    more["messages"].as_array_mut().unwrap().push(json!({"role": "assistant", "content": "never read"}));
    let (_, two) = server.post("/v1/chat/completions", more).await;
    assert_eq!(one["usage"]["prompt_tokens"], two["usage"]["prompt_tokens"]);
}
