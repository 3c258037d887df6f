//! Anthropic's routes. The base has no chat template: a format of the configuration words the last thing said.

use super::*;

fn body(said: &str) -> Value {
    json!({"model": BASE, "max_tokens": 3, "temperature": 0, "prompt_format": "short",
        "messages": [{"role": "user", "content": [{"type": "text", "text": said}]}]})
}

impl Server {
    async fn messages(&self, path: &str, body: &Value) -> (u16, Value) {
        let request = self.request(Method::POST, path).header("anthropic-version", "2023-06-01");
        let response = request.body(body.to_string()).send().await.unwrap();
        (response.status().as_u16(), response.json().await.unwrap())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_has_every_field_that_strict_clients_read() {
    let server = Server::quick().await;
    let (status, mut message) = server.messages("/v1/messages", &body("xyzabc")).await;
    assert_eq!(status, 200, "{message}");
    let id = message.as_object_mut().unwrap().remove("id").unwrap();
    assert!(id.as_str().unwrap().starts_with("msg_"));
    let usage = json!({"input_tokens": 6, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0,
        "output_tokens": 3});
    let expected = json!({"type": "message", "role": "assistant", "model": BASE,
        "content": [{"type": "text", "text": "def"}], "stop_reason": "max_tokens", "stop_sequence": null, "usage": usage});
    assert_eq!(message, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reply_says_why_it_ended() {
    let server = Server::quick().await;
    let mut body = body("w");
    body["max_tokens"] = json!(20);
    let (_, message) = server.messages("/v1/messages", &body).await;
    assert_eq!((&message["content"][0]["text"], &message["stop_reason"]), (&json!("xyz"), &json!("end_turn")));
    body["stop_sequences"] = json!(["a", "yz"]);
    let (_, message) = server.messages("/v1/messages", &body).await;
    assert_eq!((&message["content"][0]["text"], &message["stop_reason"]), (&json!("x"), &json!("stop_sequence")));
    assert_eq!(message["stop_sequence"], "yz");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_has_named_events_in_order() {
    let server = Server::quick().await;
    let mut body = body("abc");
    body["stream"] = json!(true);
    let text = server.request(Method::POST, "/v1/messages").body(body.to_string()).send().await.unwrap();
    let text = text.text().await.unwrap();
    let events = text.strip_suffix("\n\n").unwrap().split("\n\n").map(|event| {
        let (name, data) = event.split_once('\n').unwrap();
        let data: Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
        assert_eq!(name.strip_prefix("event: "), data["type"].as_str());
        data
    });
    let events: Vec<Value> = events.collect();
    let [start, open, deltas @ .., close, ending, stop] = events.as_slice() else { panic!("{events:?}") };
    assert_eq!(start["message"]["usage"]["input_tokens"], 3);
    assert_eq!((&start["message"]["content"], &start["message"]["stop_reason"]), (&json!([]), &Value::Null));
    assert_eq!(
        *open,
        json!({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}})
    );
    assert_eq!(deltas.iter().map(|delta| delta["delta"]["text"].as_str().unwrap()).collect::<String>(), "def");
    assert_eq!(*close, json!({"type": "content_block_stop", "index": 0}));
    assert_eq!(ending["delta"], json!({"stop_reason": "max_tokens", "stop_sequence": null}));
    assert_eq!((&ending["usage"]["output_tokens"], &stop["type"]), (&json!(3), &json!("message_stop")));
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_counted_without_generating_however_many_they_are() {
    let server = Server::quick().await;
    for (said, num_tokens) in [("abc".to_owned(), 3), ("a".repeat(CONTEXT_LENGTH + 5), CONTEXT_LENGTH + 5)] {
        let mut body = body(&said);
        body.as_object_mut().unwrap().remove("max_tokens");
        let counted = server.messages("/v1/messages/count_tokens", &body).await;
        assert_eq!(counted, (200, json!({"input_tokens": num_tokens})));
    }
    server.until_idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_error_has_anthropics_form_and_type() {
    let server = Server::quick().await;
    let with = |name: &str, value: Value| {
        let mut body = body("a");
        body[name] = value;
        body
    };
    for (path, body, status, kind, part) in [
        ("/v1/messages", with("max_tokens", Value::Null), 400, "invalid_request_error", "`max_tokens`"),
        ("/v1/messages", with("model", json!("claude-x")), 404, "not_found_error", "claude-x"),
        ("/v1/messages", with("thinking", json!({"type": "enabled"})), 400, "invalid_request_error", "`thinking`"),
        ("/v1/messages", with("n", json!(2)), 400, "invalid_request_error", "`n`"),
        ("/v1/messages", json!({"x": "y".repeat(20_000)}), 413, "request_too_large", "bytes"),
        ("/v1/messages/no", json!({}), 404, "not_found_error", "/v1/messages/no"),
    ] {
        let (got, error) = server.messages(path, &body).await;
        assert_eq!((got, &error["type"], &error["error"]["type"]), (status, &json!("error"), &json!(kind)), "{error}");
        assert!(error["error"]["message"].as_str().unwrap().contains(part), "{error}");
        assert!(!error["request_id"].as_str().unwrap().is_empty());
    }
    let response = server.request(Method::GET, "/v1/models/none").header("anthropic-version", "2023-06-01").send();
    assert_eq!(response.await.unwrap().json::<Value>().await.unwrap()["error"]["type"], "not_found_error");
}

#[tokio::test(flavor = "multi_thread")]
async fn models_are_listed_in_the_form_of_who_asks() {
    let server = Server::quick().await;
    let get = async |path: &str| {
        let request = server.request(Method::GET, path).header("anthropic-version", "2023-06-01");
        request.send().await.unwrap().json::<Value>().await.unwrap()
    };
    let list = get("/v1/models").await;
    let ids = (&list["first_id"], &list["last_id"], &list["has_more"]);
    assert_eq!(ids, (&json!(BASE), &json!("claude-tiny"), &json!(false)));
    let one = get(&format!("/v1/models/{BASE}")).await;
    assert_eq!(list["data"][0], one);
    assert_eq!((&one["type"], &one["display_name"]), (&json!("model"), &json!(BASE)));
    assert!(one["created_at"].as_str().unwrap().ends_with('Z'));
    let (status, message) = server
        .messages(
            "/v1/messages",
            &json!({"model": "claude-tiny", "max_tokens": 1,
        "prompt_format": "short", "messages": [{"role": "user", "content": "a"}]}),
        )
        .await;
    assert_eq!((status, &message["model"]), (200, &json!(BASE)));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_is_begun_is_gone_on_with_and_not_repeated() {
    let server = Server::able().await;
    let mut body = json!({"model": BASE, "max_tokens": 3, "temperature": 0, "messages": [
        {"role": "user", "content": "0"}, {"role": "assistant", "content": [{"type": "text", "text": "ab"}]}]});
    let (status, message) = server.messages("/v1/messages", &body).await;
    assert_eq!((status, &message["content"][0]["text"]), (200, &json!("cde")), "{message}");
    body["messages"][1] = json!({"role": "assistant", "content": "ab", "prefix": true});
    let chat = server.request(Method::POST, "/v1/chat/completions").body(body.to_string()).send().await.unwrap();
    let chat: Value = chat.json().await.unwrap();
    assert_eq!(chat["choices"][0]["message"]["content"], "abcde", "Mistral's is repeated: {chat}");
    let called = json!([{"type": "tool_use", "id": "t", "name": "f", "input": {}}]);
    let ending = json!({"max_tokens": 1, "messages": [{"role": "user", "content": "a"},
        {"role": "assistant", "content": called}]});
    let (status, error) = server.messages("/v1/messages", &ending).await;
    assert_eq!(status, 400);
    assert!(error["error"]["message"].as_str().unwrap().contains("`messages[1]`"), "{error}");
}
