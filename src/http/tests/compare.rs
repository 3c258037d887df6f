//! `/v1/compare` over a real socket: the reply, its errors and its end. That an arm has the bits of its plain request is
//! tested with real weights, in tests/compare.rs.

use super::*;

fn arms(names: &[&str]) -> Value {
    names.iter().map(|name| json!({"name": name})).collect()
}

async fn send(server: &Server, body: Value) -> (StatusCode, Value) {
    let response = server.request(Method::POST, "/v1/compare").body(body.to_string()).send().await.unwrap();
    (response.status(), response.json().await.unwrap())
}

async fn compare(server: &Server, body: Value) -> Value {
    let (status, reply) = send(server, body).await;
    assert_eq!(status, StatusCode::OK, "{reply}");
    reply
}

/// The events before `[DONE]`.
async fn stream(server: &Server, mut body: Value) -> Vec<Value> {
    body["stream"] = json!(true);
    let request = server.request(Method::POST, "/v1/compare").body(body.to_string());
    let text = request.send().await.unwrap().text().await.unwrap();
    let mut events: Vec<_> = text.split_terminator("\n\n").map(|event| event.strip_prefix("data: ").unwrap()).collect();
    assert_eq!(events.pop(), Some("[DONE]"), "{text}");
    events.into_iter().map(|event| serde_json::from_str(event).unwrap()).collect()
}

/// Two arms that agree, one that differs, and one of another length.
fn four_arms() -> Value {
    json!({"prompt": "a", "max_tokens": 4, "temperature": 0, "seed": 7, "arms": [
        {"name": "first"}, {"name": "same"}, {"name": "other", "prompt": "mc"}, {"name": "short", "max_tokens": 2}]})
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reply_has_every_arm_in_order_with_its_figures() {
    let server = Server::quick().await;
    let reply = compare(&server, four_arms()).await;
    assert!(reply["id"].as_str().unwrap().starts_with("cmp-") && reply["created"].as_u64().unwrap() > 0);
    assert_eq!((&reply["object"], &reply["seed"]), (&json!("comparison"), &json!(7)));
    let arms = reply["arms"].as_array().unwrap();
    let of = |key: &str| arms.iter().map(|arm| arm[key].clone()).collect::<Value>();
    assert_eq!(of("name"), json!(["first", "same", "other", "short"]));
    assert_eq!(of("text"), json!(["bcde", "bcde", "defg", "bc"]));
    // Of `bcde` and `defg`, `de` is common: 2·2 / 8; of `bcde` and `bc`: 2·2 / 6.
    assert_eq!(of("agreement"), json!([1.0, 1.0, 0.5, 2.0 / 3.0]));
    assert_eq!(of("finish_reason"), json!(["length", "length", "length", "length"]));
    for (key, value) in [("model", json!("tiny-coder:1b")), ("adapter", json!(null)), ("icl", json!(null))] {
        assert!(arms.iter().all(|arm| arm[key] == value), "{key}");
    }
    let usage = json!({"prompt_tokens": 2, "completion_tokens": 4, "total_tokens": 6,
        "prompt_tokens_details": {"cached_tokens": 0}});
    assert_eq!(arms[2]["usage"], usage);
    for arm in arms {
        assert!(arm["logprob"].as_f64().unwrap() < 0.0);
        let [ttft, tpot, total] = ["ttft_ms", "tpot_ms", "total_ms"].map(|key| arm[key].as_f64().unwrap());
        assert!(ttft > 0.0 && tpot >= 0.0 && ttft + tpot <= total, "{arm}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_starts_every_arm_tells_its_text_and_ends_with_the_plain_result() {
    let server = Server::quick().await;
    let plain = compare(&server, four_arms()).await;
    let events = stream(&server, four_arms()).await;
    let (done, events) = events.split_last().unwrap();
    assert_eq!(done["event"], "done");
    assert!(events.iter().all(|event| event["id"] == done["id"]));
    let (starts, events) = events.split_at(4);
    assert!(starts.iter().all(|event| event["event"] == "start" && event["model"] == "tiny-coder:1b"));
    for (index, arm) in plain["arms"].as_array().unwrap().iter().enumerate() {
        let of_arm: Vec<&Value> = events.iter().filter(|event| event["arm"] == index).collect();
        let (finish, deltas) = of_arm.split_last().unwrap();
        assert!(deltas.iter().all(|event| event["event"] == "delta" && event["name"] == arm["name"]), "{deltas:?}");
        let text: String = deltas.iter().map(|event| event["text"].as_str().unwrap()).collect();
        assert_eq!(text, arm["text"].as_str().unwrap());
        assert_eq!(finish["event"], "finish");
        for key in ["name", "text", "finish_reason", "logprob", "agreement", "seed"] {
            assert_eq!(finish[key], arm[key], "{key}");
        }
        assert_eq!(finish["usage"]["completion_tokens"], arm["usage"]["completion_tokens"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_arm_that_cannot_be_served_refuses_all_or_is_left_out_as_the_client_says() {
    let server = Server::quick().await;
    for (arm, status, param, code) in [
        (json!({"model": "nobody"}), 404, "arms[1].model", json!("model_not_found")),
        (json!({"adapters": [{"name": "nobody"}]}), 404, "arms[1].adapters[0].name", json!("model_not_found")),
        (json!({"icl": {"store": "nothing"}}), 404, "arms[1].icl.store", json!("store_not_found")),
        (json!({"model": "tiny-coder:1b+icl:nothing@3"}), 404, "arms[1].icl.store", json!("store_not_found")),
        (json!({"prompt": "a".repeat(CONTEXT_LENGTH)}), 400, "arms[1].prompt", json!("context_length_exceeded")),
        (json!({"prompt_format": "none"}), 400, "arms[1].prompt_format", json!(null)),
        (json!({"temperature": "hot"}), 400, "arms[1].temperature", json!(null)),
        (json!({"suffix": "b"}), 400, "arms[1].suffix", json!(null)),
    ] {
        let mut body = json!({"prompt": "a", "max_tokens": 4, "temperature": 0, "arms": [{"name": "good"}, arm]});
        body["arms"][1]["name"] = json!("bad");
        let (refused, reply) = send(&server, body.clone()).await;
        assert_eq!((refused.as_u16(), &reply["error"]["code"]), (status, &code), "{arm}: {reply}");
        assert_eq!(reply["error"]["param"], param, "{reply}");
        assert!(reply["error"]["message"].as_str().unwrap().starts_with("arm \"bad\": "), "{reply}");

        body["on_error"] = json!("skip");
        let skipped = compare(&server, body.clone()).await;
        assert_eq!(skipped["arms"][0]["text"], "bcde");
        assert_eq!(skipped["arms"][1], json!({"name": "bad", "error": reply["error"]}));
        let events = stream(&server, body).await;
        let kinds: Vec<_> =
            events.iter().map(|event| (event["arm"].as_u64(), event["event"].as_str().unwrap())).collect();
        assert_eq!(kinds[..2], [(Some(0), "start"), (Some(1), "error")]);
        assert_eq!(kinds[kinds.len() - 2..], [(Some(0), "finish"), (None, "done")]);
        assert_eq!(events[1]["error"], reply["error"]);
    }
    server.until_idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_first_arm_there_is_nothing_to_agree_with() {
    let server = Server::quick().await;
    let arms = json!([{"name": "bad", "model": "nobody"}, {"name": "a"}, {"name": "b"}]);
    let body = json!({"prompt": "a", "max_tokens": 2, "temperature": 0, "arms": arms, "on_error": "skip"});
    let reply = compare(&server, body).await;
    assert_eq!((&reply["arms"][1]["text"], &reply["arms"][1]["agreement"]), (&json!("bc"), &json!(null)));
    let none = json!({"prompt": "a", "model": "nobody", "arms": arms_of_two(), "on_error": "skip"});
    let reply = compare(&server, none).await;
    assert!(reply["arms"].as_array().unwrap().iter().all(|arm| arm["error"]["param"] == "model"), "{reply}");
}

fn arms_of_two() -> Value {
    arms(&["a", "b"])
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_cancels_every_arm_streamed_or_plain() {
    let server = Server::slow().await;
    let body = json!({"prompt": "0", "max_tokens": 60, "temperature": 0, "arms": arms(&["a", "b", "c"])});
    let mut streamed = body.clone();
    streamed["stream"] = json!(true);
    let request = server.request(Method::POST, "/v1/compare").body(streamed.to_string());
    let mut response = request.send().await.unwrap();
    assert!(response.chunk().await.unwrap().is_some());
    drop(response);
    server.until_idle().await;
    server.until(|server| server.num_cancelled() == 3).await;

    let plain = tokio::spawn(server.request(Method::POST, "/v1/compare").body(body.to_string()).send());
    server.until(|server| server.engine.state().running == 3).await;
    plain.abort();
    server.until_idle().await;
    server.until(|server| server.num_cancelled() == 6).await;
    // Every place in the queue is free again.
    compare(&server, json!({"prompt": "y", "temperature": 0, "arms": arms(&["a", "b", "c", "d"])})).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn arms_get_their_places_together_or_not_at_all() {
    let server = Server::slow().await;
    let (status, reply) = send(&server, json!({"prompt": "a", "arms": arms(&["a", "b", "c", "d", "e"])})).await;
    assert_eq!((status, &reply["error"]["param"]), (StatusCode::BAD_REQUEST, &json!("arms")));
    let body = json!({"prompt": "0", "max_tokens": 60, "n": MAX_QUEUED - 1, "stream": true, "temperature": 0});
    let mut response = server.completions(body).send().await.unwrap();
    response.chunk().await.unwrap();
    // Not even for arms that may be left out: nothing is wrong with them.
    let (status, reply) = send(&server, json!({"prompt": "a", "arms": arms_of_two(), "on_error": "skip"})).await;
    assert_eq!((status, &reply["error"]["code"]), (StatusCode::SERVICE_UNAVAILABLE, &json!("overloaded")));
    server.complete(json!({"prompt": "y", "max_tokens": 1})).await;
}
