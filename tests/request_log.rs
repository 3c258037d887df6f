//! The line that the log has for each request, as the command writes it.

mod adapter_server;
mod tiny;

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::Value as GgufValue;
use lorry::model::spec::Architecture;
use reqwest::{Client, Method, RequestBuilder, Response, StatusCode};
use serde_json::{Value, json};
use tempfile::TempDir;

use adapter_server::write_adapter;
use tiny::TinyModel;

const PROMPT: &str = "a prompt that nobody else should read";
const CONTEXT_LENGTH: u32 = 1 << 15;
const LONG: Duration = Duration::from_secs(120);

/// The command as it runs, with an adapter `a` that the key `team` opens.
struct Running {
    child: Child,
    lines: Receiver<String>,
    url: String,
    client: Client,
    _dir: TempDir,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Running {
    /// `log` is that section of the configuration.
    fn start(log: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let mut model = TinyModel::new(Architecture::Qwen2, GgmlDType::Q8_0, 1);
        // Room for a stream that does not end before its client leaves.
        model.metadata.insert("qwen2.context_length".to_owned(), GgufValue::U32(CONTEXT_LENGTH));
        model.write(&path("tiny.gguf"));
        write_adapter(&path("adapters/a"), 1);
        let keys = "[[server.keys]]\nname = 'team'\nkey = 'secret'\nadapters = ['*']";
        fs::write(path("lorry.toml"), format!("{keys}\n[log]\n{log}")).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_lorry"));
        command.args(["serve", "--port", "0", "--config"]).arg(path("lorry.toml"));
        command.arg("--model").arg(path("tiny.gguf")).arg("--adapters").arg(path("adapters"));
        command.env("LORRY_HOME", dir.path()).env_remove("RUST_LOG");
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let (sender, lines) = channel();
        thread::spawn(move || stderr.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
        let client = Client::builder().no_proxy().build().unwrap();
        let mut running = Self { child, lines, url: String::new(), client, _dir: dir };
        let line = running.line_with("serving tiny on ");
        let address = line.split_once("serving tiny on ").unwrap().1;
        running.url = address.split(['"', ' ']).next().unwrap().to_owned();
        running
    }

    /// The next line that says so.
    fn line_with(&self, text: &str) -> String {
        loop {
            let line = self.lines.recv_timeout(LONG).expect("there is such a line");
            if line.contains(text) {
                return line;
            }
        }
    }

    /// The next line of a request, where they are JSON.
    fn request_line(&self) -> Value {
        let line: Value = serde_json::from_str(&self.line_with("lorry::request")).unwrap();
        assert_eq!((&line["target"], &line["message"]), (&json!("lorry::request"), &json!("request")));
        line
    }

    fn completion(&self, mut body: Value) -> RequestBuilder {
        let defaults = json!({"model": "a", "prompt": PROMPT, "max_tokens": 4, "temperature": 0, "ignore_eos": true});
        for (key, value) in defaults.as_object().unwrap() {
            body.as_object_mut().unwrap().entry(key).or_insert(value.clone());
        }
        let request = self.client.request(Method::POST, format!("{}/v1/completions", self.url));
        request.bearer_auth("secret").body(body.to_string())
    }
}

fn id(response: &Response) -> String {
    response.headers()["x-request-id"].to_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn each_request_has_one_line_that_says_what_came_of_it_and_not_its_prompt() {
    let server = Running::start("format = 'json'");
    // Probes have none.
    let health = server.client.get(format!("{}/health", server.url)).send().await.unwrap();
    assert_eq!(health.status(), StatusCode::OK);

    let response = server.completion(json!({"n": 2})).header("x-request-id", "mine-1").send().await.unwrap();
    assert_eq!(id(&response), "mine-1");
    let reply: Value = response.json().await.unwrap();
    let line = server.request_line();
    let expected = json!({"level": "INFO", "id": "mine-1", "key": "team", "method": "POST", "route": "/v1/completions",
        "model": "tiny-a", "generation": reply["adapter"]["generation"], "status": 200, "finish_reason": "length",
        "prompt_tokens": reply["usage"]["prompt_tokens"], "completion_tokens": 8,
        "cached_tokens": reply["usage"]["prompt_tokens_details"]["cached_tokens"]});
    for (field, value) in expected.as_object().unwrap() {
        assert_eq!(line[field], *value, "{field}: {line}");
    }
    assert!(line["prompt_tokens"].as_u64() > Some(0), "{line}");
    let seconds = |field: &str| line[field].as_f64().unwrap();
    let (queue, ttft, total) = (seconds("queue_seconds"), seconds("ttft_seconds"), seconds("total_seconds"));
    assert!(0.0 <= queue && queue <= ttft && ttft <= total, "{line}");
    assert!(!line.to_string().contains(PROMPT) && line.get("cancelled_in").is_none(), "{line}");

    let mut response =
        server.completion(json!({"stream": true, "max_tokens": CONTEXT_LENGTH / 2})).send().await.unwrap();
    let own_id = id(&response);
    response.chunk().await.unwrap();
    drop(response);
    let line = server.request_line();
    assert_eq!((&line["id"], &line["status"]), (&json!(own_id), &json!(200)));
    assert_eq!((&line["finish_reason"], &line["cancelled_in"]), (&json!("cancelled"), &json!("decode")), "{line}");
    assert!((1..u64::from(CONTEXT_LENGTH) / 2).contains(&line["completion_tokens"].as_u64().unwrap()), "{line}");

    for (model, key, status, refusal) in
        [("nothing", "secret", 404, json!("not_found")), ("a", "wrong", 401, json!("invalid"))]
    {
        let request = server.completion(json!({"model": model})).header("x-request-id", "two words");
        let mut request = request.build().unwrap();
        request.headers_mut().insert("authorization", format!("Bearer {key}").parse().unwrap());
        let response = server.client.execute(request).await.unwrap();
        assert_eq!(response.status().as_u16(), status);
        let line = server.request_line();
        assert_eq!((&line["id"], &line["status"], &line["refusal"]), (&json!(id(&response)), &json!(status), &refusal));
        assert_ne!(line["id"], "two words");
        assert_eq!(line.get("key").is_some(), status == 404, "{line}");
        assert!(line.get("model").is_none() && line.get("prompt_tokens").is_none(), "{line}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_is_text_and_has_prompts_only_where_they_are_asked_for() {
    for (log, has_prompt) in [("", false), ("prompts = true", true)] {
        let server = Running::start(log);
        let response = server.completion(json!({})).send().await.unwrap();
        let line = server.line_with("lorry::request");
        for part in [&format!("id=\"{}\"", id(&response)), "INFO", "key=\"team\"", "model=\"tiny-a\"", "status=200"] {
            assert!(line.contains(part), "{part}: {line}");
        }
        assert_eq!(line.contains(PROMPT), has_prompt, "{line}");
    }
}
