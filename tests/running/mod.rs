//! The command as it runs, in a process of its own.

// Every test program uses a part of it.
#![allow(dead_code)]

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::Value as GgufValue;
use lorry::model::spec::Architecture;
use reqwest::{Client, Method, RequestBuilder, StatusCode};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::adapter_server::write_adapter;
use crate::tiny::TinyModel;

pub const PROMPT: &str = "a prompt that nobody else should read";
pub const CONTEXT_LENGTH: u32 = 1 << 15;
/// Of servers that are started with [`ADMIN`] in their environment.
const ADMIN_KEY: &str = "admin";
pub const ADMIN: (&str, &str) = ("LORRY__SERVER__ADMIN_KEY", ADMIN_KEY);
const BOUNDARY: &str = "a-boundary";
const LONG: Duration = Duration::from_secs(120);

/// The command as it runs, with an adapter `a` that the key `team` opens.
pub struct Running {
    child: Child,
    lines: Receiver<String>,
    pub url: String,
    pub client: Client,
    _dir: Option<TempDir>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Running {
    /// `config` is what its configuration has beside the key.
    pub fn start(config: &str, environment: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut running = Self::start_in(dir.path(), config, environment);
        running._dir = Some(dir);
        running
    }

    /// In a folder that may be that of one that has ended.
    pub fn start_in(dir: &Path, config: &str, environment: &[(&str, &str)]) -> Self {
        let path = |name: &str| dir.join(name);
        let mut model = TinyModel::new(Architecture::Qwen2, GgmlDType::Q8_0, 1);
        // Room for a stream that does not end before its client leaves.
        model.metadata.insert("qwen2.context_length".to_owned(), GgufValue::U32(CONTEXT_LENGTH));
        model.write(&path("tiny.gguf"));
        write_adapter(&path("adapters/a"), 1);
        let keys = "[[server.keys]]\nname = 'team'\nkey = 'secret'\nadapters = ['*']";
        fs::write(path("lorry.toml"), format!("{keys}\n{config}")).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_lorry"));
        command.args(["serve", "--port", "0", "--config"]).arg(path("lorry.toml"));
        command.arg("--model").arg(path("tiny.gguf")).arg("--adapters").arg(path("adapters"));
        command.env("LORRY_HOME", dir).env_remove("RUST_LOG").envs(environment.iter().copied());
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let (sender, lines) = channel();
        thread::spawn(move || stderr.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
        let client = Client::builder().no_proxy().build().unwrap();
        let mut running = Self { child, lines, url: String::new(), client, _dir: None };
        let line = running.line_with("serving tiny on ");
        let address = line.split_once("serving tiny on ").unwrap().1;
        running.url = address.split(['"', ' ']).next().unwrap().to_owned();
        running
    }

    /// The next line that says so.
    pub fn line_with(&self, text: &str) -> String {
        loop {
            let line = self.lines.recv_timeout(LONG).expect("there is such a line");
            if line.contains(text) {
                return line;
            }
        }
    }

    /// The next line of a request, where they are JSON.
    pub fn request_line(&self) -> Value {
        let line: Value = serde_json::from_str(&self.line_with("lorry::request")).unwrap();
        assert_eq!((&line["target"], &line["message"]), (&json!("lorry::request"), &json!("request")));
        line
    }

    pub fn completion(&self, mut body: Value) -> RequestBuilder {
        let defaults = json!({"model": "a", "prompt": PROMPT, "max_tokens": 4, "temperature": 0, "ignore_eos": true});
        for (key, value) in defaults.as_object().unwrap() {
            body.as_object_mut().unwrap().entry(key).or_insert(value.clone());
        }
        let request = self.client.request(Method::POST, format!("{}/v1/completions", self.url));
        request.bearer_auth("secret").body(body.to_string())
    }

    /// With the admin key, below `/v1`.
    pub fn admin(&self, method: Method, path: &str) -> RequestBuilder {
        self.client.request(method, format!("{}/v1{path}", self.url)).bearer_auth(ADMIN_KEY)
    }

    /// A file, with other parts of the form behind those that there must be.
    pub fn upload(&self, text: &str, purpose: &str, more: &[(&str, &str)]) -> RequestBuilder {
        let part = |head: &str, content: &str| {
            format!("--{BOUNDARY}\r\nContent-Disposition: form-data; {head}\r\n\r\n{content}\r\n")
        };
        let file = part("name=\"file\"; filename=\"train.jsonl\"", text);
        let more: String = more.iter().map(|(name, content)| part(&format!("name={name:?}"), content)).collect();
        let body = format!("{}{file}{more}--{BOUNDARY}--\r\n", part("name=\"purpose\"", purpose));
        let form = format!("multipart/form-data; boundary={BOUNDARY}");
        self.admin(Method::POST, "/files").header("content-type", form).body(body)
    }

    /// What the administrator gets, which is there.
    pub async fn admin_get(&self, path: &str) -> Value {
        let (status, reply) = sent(self.admin(Method::GET, path)).await;
        assert_eq!(status, StatusCode::OK, "{path}: {reply}");
        reply
    }
}

/// The reply, as text where it is no JSON.
pub async fn sent(request: RequestBuilder) -> (StatusCode, Value) {
    let response = request.send().await.unwrap();
    let status = response.status();
    let text = response.text().await.unwrap();
    (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
}
