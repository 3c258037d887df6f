//! Ollama's routes, with a base that has no chat template: a prompt is read as it is.

use super::*;

async fn ask(server: &Server, path: &str, body: Value) -> (u16, Value) {
    let response = server.request(Method::POST, path).body(body.to_string()).send().await.unwrap();
    (response.status().as_u16(), response.json().await.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn whole_and_streamed_generations_say_the_same() {
    let server = Server::quick().await;
    let mut body = json!({"model": BASE, "prompt": "xyzabc", "stream": false,
        "options": {"temperature": 0, "num_predict": 3, "num_ctx": 2048}});
    let (status, whole) = ask(&server, "/api/generate", body.clone()).await;
    assert_eq!((status, &whole["response"], &whole["model"]), (200, &json!("def"), &json!(BASE)));
    assert_eq!((&whole["done"], &whole["done_reason"]), (&json!(true), &json!("length")));
    assert_eq!((&whole["prompt_eval_count"], &whole["eval_count"]), (&json!(6), &json!(3)));
    let nanoseconds = |name: &str| whole[name].as_u64().unwrap();
    let parts = nanoseconds("prompt_eval_duration") + nanoseconds("eval_duration");
    assert!(nanoseconds("total_duration") >= parts && nanoseconds("load_duration") == 0);

    body.as_object_mut().unwrap().remove("stream");
    let response = server.request(Method::POST, "/api/generate").body(body.to_string()).send().await.unwrap();
    assert_eq!(response.headers()["content-type"], "application/x-ndjson");
    assert_eq!(response.headers()["x-accel-buffering"], "no");
    let lines = response.text().await.unwrap();
    let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let (last, parts) = lines.split_last().unwrap();
    assert_eq!(parts.iter().map(|part| part["response"].as_str().unwrap()).collect::<String>(), "def");
    assert!(parts.iter().all(|part| part["done"] == false && part.get("done_reason").is_none()));
    assert_eq!(
        (&last["response"], &last["done_reason"], &last["eval_count"]),
        (&json!(""), &json!("length"), &json!(3))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_without_text_is_about_memory() {
    let server = Server::quick().await;
    for (body, reason) in [(json!({"model": BASE}), "load"), (json!({"model": BASE, "keep_alive": 0}), "unload")] {
        let (status, reply) = ask(&server, "/api/generate", body.clone()).await;
        assert_eq!((status, &reply["response"], &reply["done_reason"]), (200, &json!(""), &json!(reason)));
        let (status, reply) = ask(&server, "/api/chat", body).await;
        assert_eq!((status, &reply["message"]["content"], &reply["done_reason"]), (200, &json!(""), &json!(reason)));
    }
    let (status, _) = ask(&server, "/api/generate", json!({"model": "other"})).await;
    assert_eq!(status, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_has_a_tag_or_the_latest_or_none() {
    let server = Server::quick().await;
    for name in [BASE, "tiny-coder", "tiny-coder:latest", "TINY-CODER:1B"] {
        for field in ["model", "name"] {
            let body = json!({field: name, "prompt": "a", "stream": false, "options": {"num_predict": 1}});
            let (status, reply) = ask(&server, "/api/generate", body).await;
            assert_eq!((status, &reply["model"]), (200, &json!(BASE)), "{name}");
        }
    }
    for name in ["tiny-coder:7b", "tiny:latest", "other"] {
        let (status, error) = ask(&server, "/api/show", json!({"model": name})).await;
        assert_eq!(status, 404, "{name}: {error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn models_are_described_as_clients_look_for_it() {
    let server = Server::start(&["<|end|>", "<fim_prefix>", "<fim_suffix>", "<fim_middle>"], Duration::ZERO).await;
    let get = async |path: &str| server.request(Method::GET, path).send().await.unwrap().json::<Value>().await.unwrap();
    assert_eq!(get("/api/version").await["lorry"], env!("CARGO_PKG_VERSION"));
    let tags = get("/api/tags").await;
    let [base, alias] = tags["models"].as_array().unwrap().as_slice() else { panic!("{tags}") };
    assert_eq!((&alias["name"], &alias["size"]), (&json!("claude-tiny"), &base["size"]));
    assert_eq!((&base["name"], &base["model"], &base["size"]), (&json!(BASE), &json!(BASE), &json!(600_000_000)));
    assert_eq!(base["modified_at"], "1970-01-01T00:00:00Z");
    assert_eq!(base["details"]["parameter_size"], "1.00B");
    let resident = get("/api/ps").await;
    assert_eq!((&resident["models"][0]["model"], &resident["models"][0]["size_vram"]), (&json!(BASE), &json!(0)));

    let (status, shown) = ask(&server, "/api/show", json!({"model": BASE})).await;
    assert_eq!((status, &shown["capabilities"]), (200, &json!(["completion", "insert"])));
    assert_eq!(shown["model_info"]["llama.context_length"], CONTEXT_LENGTH);
    let template = "{{- if .Suffix }}<fim_prefix>{{ .Prompt }}<fim_suffix>{{ .Suffix }}<fim_middle>{{ else }}{{ .Prompt }}{{ end }}";
    assert_eq!(shown["template"], template);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_error_is_a_sentence_and_nothing_else() {
    let server = Server::quick().await;
    for (path, body, status, part) in [
        ("/api/generate", json!({"prompt": "a", "format": "yaml"}), 400, "`format`"),
        ("/api/generate", json!({"prompt": "a", "template": "x"}), 400, "`template`"),
        ("/api/generate", json!({"prompt": "a", "think": true}), 400, "`think`"),
        ("/api/generate", json!({"max_tokens": "a"}), 400, "`max_tokens`"),
        ("/api/chat", json!({"messages": [], "adapters": 1}), 400, "`adapters`"),
        ("/api/generate", json!({"prompt": "a", "n": 2}), 400, "`n`"),
        ("/api/generate", json!({"prompt": "a", "logprobs": 1}), 400, "`logprobs`"),
        ("/api/generate", json!({"prompt": "a", "suffix": "b"}), 400, "suffix"),
        ("/api/generate", json!([]), 400, "JSON object"),
        ("/api/chat", json!({"messages": [{"role": "robot", "content": "a"}]}), 400, "messages[0].role"),
        ("/api/show", json!({}), 400, "`model`"),
        ("/api/show", json!({"model": "no"}), 404, "no"),
        ("/api/pull", json!({"model": "no"}), 501, "/v1/adapters"),
        ("/api/embed", json!({"model": BASE}), 501, "embeddings"),
        ("/api/delete", json!({"model": BASE}), 405, "POST"),
        ("/api/nothing", json!({}), 404, "/api/nothing"),
        ("/api/tags", json!({}), 405, "POST"),
        ("//api/tags", json!({}), 405, "POST"),
    ] {
        let (got, error) = ask(&server, path, body).await;
        let message = error["error"].as_str().unwrap_or_default();
        assert_eq!((got, error.as_object().unwrap().len()), (status, 1), "{path}: {error}");
        assert!(message.contains(part), "{path}: {error}");
    }
    assert!(server.metrics.rejected_total.with_label_values(&["invalid"]).get() >= 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_browser_finds_ollama() {
    let server = Server::quick().await;
    let plain = server.request(Method::GET, "/").send().await.unwrap();
    assert_eq!((plain.status().as_u16(), plain.text().await.unwrap().as_str()), (200, "Ollama is running"));
    assert_eq!(server.request(Method::HEAD, "/").send().await.unwrap().status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_names_what_the_client_sent() {
    let server = Server::able().await;
    for (path, body, place) in [
        ("/api/generate", json!({"prompt": "a", "options": {"temperature": 9}}), "`options.temperature`"),
        ("/api/generate", json!({"prompt": "a", "options": {"mirostat": 2}}), "`options.mirostat`"),
        ("/api/generate", json!({"prompt": "a", "options": {"ignore_eos": "x"}}), "`options.ignore_eos`"),
        ("/api/generate", json!({"prompt": "a", "raw": true, "options": {"user": 1}}), "`options.user`"),
        ("/api/chat", json!({"messages": [], "options": {"n": 2.5}}), "`options.n`"),
        ("/api/chat", json!({"options": {"messages": []}}), "`options.messages`"),
        ("/api/generate", json!({"prompt": "a", "raw": true, "format": {"type": 1}}), "`format`"),
        ("/api/chat", json!({"messages": [{"role": "tool", "content": "x"}]}), "`messages[0].tool_call_id`"),
    ] {
        let (status, error) = ask(&server, path, body.clone()).await;
        assert_eq!(status, 400, "{body}");
        assert!(error["error"].as_str().unwrap().contains(place), "{body}: {error}");
    }
}
