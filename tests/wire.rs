//! What the wire is to clients that are unusual, slow or hostile, with a tiny random model.

mod tiny;

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::Value as Metadata;
use flate2::Compression;
use flate2::write::GzEncoder;
use lorry::app::App;
use lorry::config::{Config, Overrides};
use lorry::http;
use lorry::model::spec::Architecture;
use reqwest::{Client, StatusCode};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::mpsc;
use tokio::time::timeout;

use tiny::TinyModel;

/// Of a connection, in the system.
const BUFFER_BYTES: u32 = 4096;

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
        // What the system keeps of a reply is little, so that it shows soon what the client takes.
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_send_buffer_size(BUFFER_BYTES).unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let listener = socket.listen(1024).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let server = http::Server::start(listener, &app.state.config.server).unwrap();
        tokio::spawn(server.serve(app.state, std::future::pending()));
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

/// A client that writes what it likes.
async fn open(server: &Server, bytes: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(&server.address).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    stream
}

/// All that the server says until it closes.
async fn rest(stream: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    let read = stream.read_to_end(&mut bytes);
    // A connection that is closed with something unread may be reset.
    let _ = timeout(Duration::from_secs(60), read).await.expect("the server closes the connection");
    String::from_utf8_lossy(&bytes).into_owned()
}

async fn health(server: &Server) -> String {
    rest(&mut open(server, b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await).await
}

async fn metrics(server: &Server) -> String {
    rest(&mut open(server, b"GET //metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await).await
}

fn post_head(length: usize) -> String {
    format!("POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n\r\n")
}

/// The JSON behind the header of a reply that is not chunked.
fn body_of(reply: &str) -> Value {
    serde_json::from_str(reply.split_once("\r\n\r\n").unwrap().1).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_header_that_does_not_come_ends_the_connection_and_so_does_one_in_drops() {
    let server = Server::start("header_timeout_seconds = 1", None).await;
    for bytes in [b"".as_slice(), b"GET /hea", b"GET /health HTTP/1.1\r\nhost: x\r\n"] {
        assert_eq!(rest(&mut open(&server, bytes).await).await, "", "{bytes:?}");
    }
    let mut dripping = open(&server, b"GET /health HTTP/1.1\r\n").await;
    let drops = async {
        while dripping.write_all(b"x-drop: 1\r\n").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    timeout(Duration::from_secs(60), drops).await.expect("every drop does not begin the time anew");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_does_not_come_is_408_in_the_one_shape() {
    let server = Server::start("body_timeout_seconds = 1", None).await;
    let mut stream = open(&server, (post_head(100) + "{\"prompt\":").as_bytes()).await;
    let reply = rest(&mut stream).await;
    assert!(reply.starts_with("HTTP/1.1 408 ") && reply.contains("connection: close"), "{reply}");
    let error = &body_of(&reply)["error"];
    assert_eq!((&error["type"], &error["code"]), (&json!("invalid_request_error"), &json!("request_timeout")));
    assert!(error["message"].is_string() && error.as_object().unwrap().contains_key("param"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kept_connection_serves_again_until_it_is_idle_for_too_long() {
    let server = Server::start("keep_alive_seconds = 1\nheader_timeout_seconds = 60", None).await;
    let request = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n";
    let mut stream = open(&server, request).await;
    let mut first = [0; 4096];
    let num_read = stream.read(&mut first).await.unwrap();
    assert!(first[..num_read].starts_with(b"HTTP/1.1 200 "));
    stream.write_all(request).await.unwrap();
    let second = rest(&mut stream).await;
    assert!(second.starts_with("HTTP/1.1 200 ") && second.matches("HTTP/1.1").count() == 1, "{second}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_stops_reading_a_stream_is_left_and_its_sequences_end() {
    let server = Server::start("write_timeout_seconds = 1", None).await;
    let num_choices = 8;
    let body = json!({"prompt": "def f(x):", "n": num_choices, "max_tokens": 200, "ignore_eos": true, "logprobs": 20,
        "stream": true});
    let request = post_head(body.to_string().len()) + &body.to_string();
    // Connected with little room for what it does not read.
    let connect = async || {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(BUFFER_BYTES).unwrap();
        let mut stream = socket.connect(server.address.parse().unwrap()).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        stream
    };
    let mut reading = connect().await;
    let mut read = Vec::new();
    let whole = async {
        while !read.ends_with(b"data: [DONE]\n\n\r\n0\r\n\r\n") {
            assert_ne!(reading.read_buf(&mut read).await.unwrap(), 0, "the reply is cut");
        }
    };
    timeout(Duration::from_secs(60), whole).await.expect("who reads gets everything");

    let _silent = connect().await;
    let cancelled = format!(r#"lorry_requests_total{{adapter="base",finish_reason="cancelled"}} {num_choices}"#);
    let left = async {
        while !metrics(&server).await.contains(&cancelled) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(Duration::from_secs(60), left).await.expect("who does not read holds nothing");
    let metrics = metrics(&server).await;
    for state in ["running", "waiting"] {
        assert!(metrics.contains(&format!(r#"lorry_requests_{state}{{adapter="base"}} 0"#)), "{metrics}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn probes_are_answered_when_every_connection_is_taken_and_others_are_told() {
    let server = Server::start("max_connections = 4\nheader_timeout_seconds = 60", None).await;
    let mut held = Vec::new();
    for _ in 0..4 {
        held.push(open(&server, b"GET /slow").await);
    }
    // Beyond the limit, and silent: they make room for whoever speaks.
    for _ in 0..300 {
        held.push(open(&server, b"GE").await);
    }
    assert!(health(&server).await.contains(r#""status":"ok""#));
    let metrics = metrics(&server).await;
    assert!(metrics.contains("vllm:num_requests_running"), "{metrics}");
    let body = json!({"prompt": "def"}).to_string();
    let refused = rest(&mut open(&server, (post_head(body.len()) + &body).as_bytes()).await).await;
    assert!(refused.starts_with("HTTP/1.1 503 ") && refused.contains("retry-after: 1"), "{refused}");
    assert_eq!(body_of(&refused)["error"]["code"], "overloaded");
    // In the form of each interface, and with what every reply has.
    type IsWorded = fn(&Value) -> bool;
    let forms: [(&str, IsWorded); 3] = [
        ("/v1/models", |error| error["error"]["type"] == "overloaded_error"),
        ("/v1/messages", |error| error["type"] == "error" && error["error"]["type"] == "overloaded_error"),
        ("/api//tags", |error| error["error"].is_string()),
    ];
    for (path, is_worded) in forms {
        let asked = format!("GET {path} HTTP/1.1\r\nhost: x\r\norigin: x\r\nx-request-id: mine\r\n\r\n");
        let refused = rest(&mut open(&server, asked.as_bytes()).await).await;
        assert!(refused.starts_with("HTTP/1.1 503 ") && refused.contains("x-request-id: mine"), "{path}: {refused}");
        assert!(refused.contains("access-control-allow-origin: *"), "{path}: {refused}");
        assert!(is_worded(&body_of(&refused)), "{path}: {refused}");
    }
    let metrics = self::metrics(&server).await;
    assert!(metrics.contains(r#"lorry_rejected_total{reason="connections"} 4"#), "{metrics}");
    // A place that is given back is one for the next.
    drop(held);
    let served = async {
        while server.post("/v1/completions", json!({"prompt": "def", "max_tokens": 1})).await.0 != StatusCode::OK {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(Duration::from_secs(60), served).await.expect("the places are free again");
}

#[tokio::test(flavor = "multi_thread")]
async fn three_hundred_half_open_requests_leave_the_server_its_others() {
    let server = Server::start("header_timeout_seconds = 2\nbody_timeout_seconds = 2", None).await;
    let mut hostile = Vec::new();
    for index in 0..300 {
        let bytes = if index % 2 == 0 { "GET / HTT".to_owned() } else { post_head(1000) + "{\"prompt\"" };
        hostile.push(open(&server, bytes.as_bytes()).await);
    }
    assert!(health(&server).await.starts_with("HTTP/1.1 200 "));
    let (status, reply) = server.post("/v1/completions", json!({"prompt": "def", "max_tokens": 1})).await;
    assert_eq!(status, StatusCode::OK, "{reply}");
    for (index, stream) in hostile.iter_mut().enumerate() {
        let said = rest(stream).await;
        assert!(if index % 2 == 0 { said.is_empty() } else { said.starts_with("HTTP/1.1 408 ") }, "{index}: {said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_header_that_is_too_large_is_431() {
    let server = Server::start("", None).await;
    for (num_bytes, status) in [(50_000, "HTTP/1.1 200 "), (200_000, "HTTP/1.1 431 ")] {
        let filling = "x".repeat(num_bytes);
        let request = format!("GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\nx-much: {filling}\r\n\r\n");
        let said = rest(&mut open(&server, request.as_bytes()).await).await;
        assert!(said.starts_with(status), "{num_bytes}: {said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_many_hostile_clients_ask_at_once_is_refused_by_name_while_probes_are_answered() {
    let limits = "max_connections = 150\nmax_body_bytes = 2_000_000\nmax_body_bytes_in_flight = 8_000_000";
    let server =
        Server::start(&format!("{limits}\nheader_timeout_seconds = 600\nbody_timeout_seconds = 3"), None).await;
    // They stand until the end.
    let mut silent = Vec::new();
    for _ in 0..50 {
        silent.push(open(&server, b"GET /v1/models HTTP/1.1\r\nhost").await);
    }
    let ask = async |body: Value| {
        let body = body.to_string();
        let head = post_head(body.len()).replacen("\r\n", "\r\nconnection: close\r\n", 1);
        rest(&mut open(&server, (head + &body).as_bytes()).await).await
    };
    let large = json!({"prompt": "def f(x): ".repeat(190_000), "max_tokens": 1});
    let stops = json!({"prompt": "def", "stop": (0..100_000).map(|stop| format!("stop {stop}")).collect::<Vec<_>>()});
    let mut hostile = std::pin::pin!(futures::future::join_all(
        (0..16).map(|index| ask(if index == 0 { &stops } else { &large }.clone()))
    ));
    let mut num_probes = 0;
    let probe = async || {
        tokio::time::sleep(Duration::from_millis(10)).await;
        health(&server).await
    };
    let said = loop {
        tokio::select! {
            said = &mut hostile => break said,
            health = probe() => {
                assert!(health.starts_with("HTTP/1.1 200 "), "{health}");
                num_probes += 1;
            }
        }
    };
    assert!(num_probes > 0, "nothing was asked meanwhile: this shows nothing");
    for (index, said) in said.iter().enumerate() {
        let error = &body_of(said)["error"];
        let message = error["message"].as_str().unwrap();
        let is_refused = match index {
            0 => message.contains("`stop` has 100000 strings"),
            _ => error["code"] == "context_length_exceeded",
        };
        assert!(is_refused || message.contains("max_body_bytes_in_flight"), "{index}: {said:.300}");
    }
    // More than there are places.
    let cut = post_head(1000) + "{\"prompt\"";
    let mut half_open = Vec::new();
    for _ in 0..120 {
        half_open.push(open(&server, cut.as_bytes()).await);
    }
    assert!(health(&server).await.starts_with("HTTP/1.1 200 "));
    let mut num_beyond = 0;
    for stream in &mut half_open {
        let said = rest(stream).await;
        match body_of(&said)["error"]["code"].as_str() {
            Some("request_timeout") => {}
            Some("overloaded") => num_beyond += 1,
            _ => panic!("{said}"),
        }
    }
    assert!((20..120).contains(&num_beyond), "{num_beyond}");
    drop(silent);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_the_budget_has_no_room_for_is_503_until_the_others_are_gone() {
    let server = Server::start("max_body_bytes = 100_000\nmax_body_bytes_in_flight = 100_000", None).await;
    // Announced, and not sent: they hold nothing.
    let mut held = Vec::new();
    for _ in 0..4 {
        held.push(open(&server, post_head(100_000).as_bytes()).await);
    }
    let body = " ".repeat(50_000) + &json!({"prompt": "def f(x):", "max_tokens": 1}).to_string();
    let request = post_head(body.len()) + &body;
    let ask = async || {
        let mut stream = open(&server, request.replacen("\r\n", "\r\nconnection: close\r\n", 1).as_bytes()).await;
        rest(&mut stream).await
    };
    let reply = ask().await;
    assert!(reply.starts_with("HTTP/1.1 200 "), "{reply}");
    // What is being read beside another may be the one that finds no room, so that it is sent until it is the other.
    let refused_beside = async || {
        loop {
            let unfinished = open(&server, (post_head(90_000) + &" ".repeat(80_000)).as_bytes()).await;
            tokio::time::sleep(Duration::from_millis(10)).await;
            let reply = ask().await;
            if reply.starts_with("HTTP/1.1 503 ") {
                return (unfinished, reply);
            }
        }
    };
    let limit = Duration::from_secs(60);
    let served = async || while !ask().await.starts_with("HTTP/1.1 200 ") {};
    let (mut unfinished, refused) = timeout(limit, refused_beside()).await.expect("one of them is refused");
    assert!(refused.contains("retry-after: 1"), "{refused}");
    let error = &body_of(&refused)["error"];
    assert_eq!(error["code"], "overloaded");
    assert!(error["message"].as_str().unwrap().contains("server.max_body_bytes_in_flight"), "{error}");
    let metrics = metrics(&server).await;
    assert!(metrics.contains(r#"lorry_rejected_total{reason="bodies"}"#), "{metrics}");
    assert!(!metrics.contains(r#"reason="overloaded""#), "the queue was not full: {metrics}");
    // What was refused holds nothing, and what is finished or left no longer does.
    let (status, reply) = server.post("/v1/completions", json!({"prompt": "def f(x):", "max_tokens": 1})).await;
    assert_eq!(status, StatusCode::OK, "{reply}");
    unfinished.write_all(" ".repeat(10_000).as_bytes()).await.unwrap();
    timeout(limit, served()).await.expect("what is finished holds nothing");
    let (left, _) = timeout(limit, refused_beside()).await.expect("one of them is refused");
    drop(left);
    timeout(limit, served()).await.expect("what is left holds nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_small_body_of_very_many_values_is_413() {
    let server = Server::start("max_body_bytes = 100_000\nmax_body_bytes_in_flight = 1_000_000", None).await;
    let (status, reply) = server.post("/v1/completions", json!({"prompt": vec![1; 20_000]})).await;
    assert_eq!((status, &reply["error"]["code"]), (StatusCode::PAYLOAD_TOO_LARGE, &json!("body_too_large")));
    assert!(reply["error"]["message"].as_str().unwrap().contains("values"), "{reply}");
    let (status, reply) = server.post("/v1/completions", json!({"prompt": vec![1; 100], "max_tokens": 1})).await;
    assert_eq!(status, StatusCode::OK, "{reply}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_body_is_read_as_a_small_one_is() {
    let server = Server::start("", None).await;
    let padded = |padding: usize, body: &str| " ".repeat(padding) + body;
    for padding in [0, 1 << 20] {
        let body = padded(padding, &json!({"prompt": "def f(x):", "max_tokens": 1}).to_string());
        let reply = server.client.post(format!("http://{}/v1/completions", server.address)).body(body).send().await;
        assert_eq!(reply.unwrap().status(), StatusCode::OK, "{padding}");
        for (body, what) in [("[]", "must be a JSON object"), ("{", "not valid JSON")] {
            let request = server.client.post(format!("http://{}/v1/completions", server.address));
            let reply = request.body(padded(padding, body)).send().await.unwrap();
            assert_eq!(reply.status(), StatusCode::BAD_REQUEST);
            let reply = reply.text().await.unwrap();
            assert!(reply.contains(what), "{padding}: {reply}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_in_gzip_is_read_within_the_limit_and_other_encodings_are_415() {
    let server = Server::start("max_body_bytes = 10_000", None).await;
    let gzip = |body: &str| {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(body.as_bytes()).unwrap();
        encoder.finish().unwrap()
    };
    let send = async |encoding: &str, body: Vec<u8>| {
        let request = server.client.post(format!("http://{}/v1/completions", server.address));
        let response = request.header("content-encoding", encoding).body(body).send().await.unwrap();
        (response.status().as_u16(), response.json::<Value>().await.unwrap()["error"]["code"].clone())
    };
    let body = json!({"prompt": "def f(x):", "max_tokens": 1}).to_string();
    for encoding in ["gzip", "GZIP", "x-gzip", "X-Gzip", "identity, gzip"] {
        assert_eq!(send(encoding, gzip(&body)).await, (200, Value::Null), "{encoding}");
    }
    for encoding in ["identity", "IDENTITY", ""] {
        assert_eq!(send(encoding, body.clone().into()).await, (200, Value::Null), "{encoding:?}");
    }
    assert_eq!(send("br", body.clone().into()).await, (415, json!("unsupported_content_encoding")));
    assert_eq!(send("gzip, gzip", gzip(&body)).await, (415, json!("unsupported_content_encoding")));
    assert_eq!(send("gzip", body.into()).await, (400, Value::Null));
    let bomb = json!({"prompt": "a".repeat(1_000_000)}).to_string();
    let (status, code) = send("gzip", gzip(&bomb)).await;
    assert_eq!((status, code), (413, json!("body_too_large")));
}

/// Keys with what they may use in a minute: requests, tokens.
fn limited_keys(keys: &[(&str, u32, u32)]) -> String {
    let key = |(name, requests, tokens): &(&str, u32, u32)| {
        let limits = format!("requests_per_minute = {requests}\ntokens_per_minute = {tokens}");
        format!("[[server.keys]]\nname = '{name}'\nkey = '{name}'\nadapters = []\n{limits}\n")
    };
    keys.iter().map(key).collect()
}

async fn post_as(server: &Server, key: &str, path: &str, body: &Value) -> reqwest::Response {
    let request = server.client.post(format!("http://{}{path}", server.address)).bearer_auth(key);
    request.body(body.to_string()).timeout(Duration::from_secs(60)).send().await.unwrap()
}

fn header<'a>(response: &'a reqwest::Response, name: &str) -> Option<&'a str> {
    response.headers().get(name).map(|value| value.to_str().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_has_used_its_requests_is_429_in_every_interface_and_others_are_served() {
    let server = Server::start(&limited_keys(&[("few", 2, 0), ("free", 0, 0)]), None).await;
    let body = json!({"prompt": "def f(x):", "max_tokens": 1});
    for (remaining, resets) in [("1", 20..=30), ("0", 50..=60)] {
        let response = post_as(&server, "few", "/v1/completions", &body).await;
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(header(&response, "x-ratelimit-limit-requests"), Some("2"));
        assert_eq!(header(&response, "x-ratelimit-remaining-requests"), Some(remaining));
        let reset = header(&response, "x-ratelimit-reset-requests").unwrap().strip_suffix('s').unwrap();
        let (minutes, seconds) = reset.split_once('m').unwrap_or(("0", reset));
        let reset = 60 * minutes.parse::<u64>().unwrap() + seconds.parse::<u64>().unwrap();
        assert!(resets.contains(&reset), "{remaining}: {reset}");
        assert_eq!(header(&response, "x-ratelimit-limit-tokens"), None);
    }
    let message = json!({"messages": [{"role": "user", "content": "a"}], "max_tokens": 1});
    for (path, body) in [
        ("/v1/completions", &body),
        ("/v1/chat/completions", &message),
        ("/infill", &json!({"input_prefix": "a"})),
        ("/v1/messages", &message),
        ("/api/generate", &body),
    ] {
        let response = post_as(&server, "few", path, body).await;
        assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS, "{path}");
        let wait: u64 = header(&response, "retry-after").unwrap().parse().unwrap();
        assert!((20..=30).contains(&wait), "{wait}");
        assert_eq!(header(&response, "x-ratelimit-remaining-requests"), Some("0"));
        let reply: Value = response.json().await.unwrap();
        let message = match path {
            "/v1/messages" => {
                assert_eq!((&reply["type"], &reply["error"]["type"]), (&json!("error"), &json!("rate_limit_error")));
                &reply["error"]["message"]
            }
            "/api/generate" => &reply["error"],
            _ => {
                assert_eq!(reply["error"]["type"], "requests");
                assert_eq!(reply["error"]["code"], "rate_limit_exceeded");
                &reply["error"]["message"]
            }
        };
        assert!(message.as_str().unwrap().contains("2 requests per minute"), "{path}: {reply}");
    }
    let listed = server.client.get(format!("http://{}/v1/models", server.address)).bearer_auth("few").send().await;
    assert_eq!(listed.unwrap().status(), StatusCode::OK, "only what generates is counted");
    for _ in 0..3 {
        let response = post_as(&server, "free", "/v1/completions", &body).await;
        assert_eq!((response.status(), header(&response, "x-ratelimit-limit-requests")), (StatusCode::OK, None));
    }
    let metrics = metrics(&server).await;
    assert!(metrics.contains(r#"lorry_rejected_total{reason="rate_limited"} 5"#), "{metrics}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_tokens_of_prompt_and_output_are_counted_and_the_request_that_takes_the_last_is_served_whole() {
    let keys = ["plain", "streamed", "ollama", "compared"].map(|name| (name, 0, 60));
    let server = Server::start(&limited_keys(&keys), None).await;
    let listed = server.client.get(format!("http://{}/v1/models", server.address)).bearer_auth("plain").send().await;
    let model = listed.unwrap().json::<Value>().await.unwrap()["data"][0]["id"].clone();
    let text = json!({"prompt": "def f(x):", "max_tokens": 110, "ignore_eos": true});
    let with = |field: &str, value: Value| {
        let mut body = text.clone();
        body[field] = value;
        body
    };
    let arms = json!([{"name": "a", "model": model}, {"name": "b", "model": model}]);
    let options = json!({"num_predict": 110, "temperature": 0});
    let ollama = json!({"model": model, "prompt": "def f(x):", "raw": true, "stream": false, "options": options});
    for (key, path, body) in [
        ("plain", "/v1/completions", text.clone()),
        ("streamed", "/v1/completions", with("stream", json!(true))),
        ("ollama", "/api/generate", ollama),
        ("compared", "/v1/compare", with("arms", arms)),
    ] {
        let response = post_as(&server, key, path, &body).await;
        let (status, limit) = (response.status(), header(&response, "x-ratelimit-limit-tokens").map(str::to_owned));
        let reply = response.text().await.unwrap();
        assert_eq!((status, limit.as_deref()), (StatusCode::OK, Some("60")), "{key}: {reply}");
        let response = post_as(&server, key, path, &body).await;
        assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS, "{key}");
        assert_eq!(header(&response, "x-ratelimit-remaining-tokens"), Some("0"));
        let wait: u64 = header(&response, "retry-after").unwrap().parse().unwrap();
        assert!(wait > 20, "{key}: what is above the limit is waited for: {wait}");
        let reply = response.text().await.unwrap();
        assert!(reply.contains("60 tokens per minute"), "{key}: {reply}");
    }
    // What is refused takes nothing.
    assert_eq!(post_as(&server, "plain", "/v1/completions", &json!({})).await.status(), StatusCode::TOO_MANY_REQUESTS);
}

/// Of the first so many replies, how many each key has got. The outputs are long and the clients many, so that both keys
/// always have requests that wait, however slow the clients are.
#[tokio::test(flavor = "multi_thread")]
async fn two_keys_get_replies_by_their_weights() {
    const NUM_REPLIES: usize = 240;
    let key = |name: &str, weight: u32| {
        format!("[[server.keys]]\nname = '{name}'\nkey = '{name}'\nadapters = []\nweight = {weight}\n")
    };
    let keys = [key("three", 3), key("one", 1)].concat();
    let server = Arc::new(Server::start(&format!("{keys}[engine]\nmax_sequences = 4"), None).await);
    let (replied, mut replies) = mpsc::unbounded_channel();
    for name in ["three", "one"].repeat(24) {
        let (server, replied) = (server.clone(), replied.clone());
        tokio::spawn(async move {
            let body = json!({"prompt": "def f(x):", "max_tokens": 100, "ignore_eos": true});
            loop {
                let status = post_as(&server, name, "/v1/completions", &body).await.status();
                if replied.send((name, status)).is_err() {
                    return;
                }
            }
        });
    }
    let mut num_three = 0;
    for _ in 0..NUM_REPLIES {
        let (name, status) = replies.recv().await.unwrap();
        assert_eq!(status, StatusCode::OK);
        num_three += usize::from(name == "three");
    }
    let ratio = num_three as f64 / (NUM_REPLIES - num_three) as f64;
    assert!((2.4..3.6).contains(&ratio), "{ratio}");
}
