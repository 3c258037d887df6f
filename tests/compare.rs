//! `/v1/compare` and in-context examples with real weights: an arm has the bits of the plain request it stands for.

mod adapter_server;
mod tiny;

use adapter_server::{ADMIN, Server};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

/// Examples short enough for the tiny model's context of 256 bytes.
fn examples() -> Value {
    let pairs = [("sum", "a + b"), ("difference", "a - b"), ("product", "a * b"), ("length of a list", "len(a)")];
    pairs.iter().map(|(instruction, code)| json!({"instruction": instruction, "code": code})).collect()
}

/// With the store `ops`.
async fn server() -> Server {
    let icl = tempfile::tempdir().unwrap();
    let server = Server::start(&format!("{ADMIN}[icl]\ndir = {:?}", icl.path())).await;
    let (status, reply) = server.admin(Method::PUT, "/v1/icl/ops", json!({"examples": examples()})).await;
    assert_eq!(status, StatusCode::OK, "{reply}");
    server
}

async fn post(server: &Server, path: &str, body: &Value) -> (StatusCode, Value) {
    server.send(server.request(Method::POST, path).body(body.to_string())).await
}

async fn reply(server: &Server, path: &str, body: &Value) -> Value {
    let (status, reply) = post(server, path, body).await;
    assert_eq!(status, StatusCode::OK, "{body}: {reply}");
    reply
}

/// What the arm's plain request is: the shared fields, its own over them, and the seed that the reply names.
fn plain_request(shared: &Value, arm: &Value, seed: &Value) -> Value {
    let mut request = shared.clone();
    for (field, value) in arm.as_object().unwrap().iter().filter(|(field, _)| *field != "name") {
        request[field] = value.clone();
    }
    (request["seed"], request["logprobs"]) = (seed.clone(), json!(2));
    request
}

/// The tokens of one choice decide its log-probabilities; equal sums of equal length are equal bits of every one.
fn logprob_sum(plain: &Value) -> f64 {
    let logprobs = plain["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap();
    logprobs.iter().map(|logprob| f64::from(logprob.as_f64().unwrap() as f32)).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_arm_has_the_bits_of_its_plain_request() {
    let server = server().await;
    let shared = json!({"prompt": "def f(x):", "max_tokens": 24, "ignore_eos": true, "temperature": 0.9});
    let icl = json!({"store": "ops", "k": 2, "select": "random", "seed": 777});
    let arms = json!([
        {"name": "base"},
        {"name": "a", "adapter": "a"},
        {"name": "b by model", "model": "tiny-b", "max_tokens": 9},
        {"name": "both", "adapters": [{"name": "a", "scale": 0.5}, {"name": "b"}], "temperature": 0},
        {"name": "examples", "icl": icl, "prompt_format": "paper-rev"},
        {"name": "adapter and examples", "adapter": "a", "icl": icl, "prompt_format": "paper-rev", "top_p": 0.8},
        {"name": "its own seed", "seed": 11, "stop": ["e"]},
    ]);
    // Before and after, so that the prefix cache is cold for either side once.
    let mut plain_before = Vec::new();
    for arm in arms.as_array().unwrap().iter().take(4) {
        let seed = arm.get("seed").cloned().unwrap_or(json!(5));
        plain_before.push(reply(&server, "/v1/completions", &plain_request(&shared, arm, &seed)).await);
    }
    let mut body = shared.clone();
    (body["arms"], body["seed"]) = (arms.clone(), json!(5));
    let compared = reply(&server, "/v1/compare", &body).await;
    for (index, arm) in arms.as_array().unwrap().iter().enumerate() {
        let result = &compared["arms"][index];
        let after = reply(&server, "/v1/completions", &plain_request(&shared, arm, &result["seed"])).await;
        for plain in plain_before.get(index).into_iter().chain([&after]) {
            assert_eq!(result["text"], plain["choices"][0]["text"], "{arm}");
            assert_eq!(result["finish_reason"], plain["choices"][0]["finish_reason"], "{arm}");
            assert_eq!(result["logprob"].as_f64().unwrap().to_bits(), logprob_sum(plain).to_bits(), "{arm}");
            for key in ["model", "adapter", "adapters"] {
                assert_eq!(result[key], plain[key], "{arm} {key}");
            }
            for key in ["prompt_tokens", "completion_tokens"] {
                assert_eq!(result["usage"][key], plain["usage"][key], "{arm} {key}");
            }
            assert_eq!(result["icl"]["examples"], plain["icl"]["examples"], "{arm}");
        }
    }
    let results = compared["arms"].as_array().unwrap();
    assert_eq!(results[6]["seed"], 11);
    // The arms are not all the same, or all this says nothing.
    assert!((1..7).all(|index| results[index]["logprob"] != results[0]["logprob"]), "{compared}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_seed_that_a_comparison_names_repeats_it() {
    let server = server().await;
    let mut body = json!({"prompt": "x", "max_tokens": 16, "ignore_eos": true, "temperature": 1.5,
        "arms": [{"name": "base"}, {"name": "again"}, {"name": "a", "adapter": "a"}]});
    let texts = |reply: &Value| -> Vec<Value> {
        reply["arms"].as_array().unwrap().iter().map(|arm| arm["text"].clone()).collect()
    };
    let drawn = reply(&server, "/v1/compare", &body).await;
    assert_eq!((&drawn["arms"][1]["text"], &drawn["arms"][1]["agreement"]), (&drawn["arms"][0]["text"], &json!(1.0)));
    body["seed"] = drawn["seed"].clone();
    assert_eq!(texts(&reply(&server, "/v1/compare", &body).await), texts(&drawn));
    body["seed"] = json!(drawn["seed"].as_i64().unwrap() ^ 1);
    assert_ne!(texts(&reply(&server, "/v1/compare", &body).await), texts(&drawn));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_adapter_leaves_the_other_arms_unharmed_where_the_caller_asks_for_it() {
    let server = server().await;
    let shared = json!({"prompt": "def f(x):", "max_tokens": 8, "ignore_eos": true, "temperature": 0, "seed": 1});
    let mut body = shared.clone();
    body["arms"] = json!([{"name": "base"}, {"name": "broken", "adapter": "broken"}, {"name": "a", "adapter": "a"}]);
    let (status, refused) = post(&server, "/v1/compare", &body).await;
    assert_eq!((status, &refused["error"]["param"]), (StatusCode::NOT_FOUND, &json!("arms[1].adapter")), "{refused}");
    body["on_error"] = json!("skip");
    let skipped = reply(&server, "/v1/compare", &body).await;
    assert_eq!(skipped["arms"][1], json!({"name": "broken", "error": refused["error"]}));
    for index in [0, 2] {
        let plain = plain_request(&shared, &body["arms"][index], &json!(1));
        let plain = reply(&server, "/v1/completions", &plain).await;
        assert_eq!(skipped["arms"][index]["text"], plain["choices"][0]["text"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn examples_come_before_the_prompt_and_the_reply_names_them() {
    let server = server().await;
    let greedy = |mut body: Value| {
        (body["max_tokens"], body["temperature"], body["ignore_eos"]) = (json!(4), json!(0), json!(true));
        body
    };
    let with_icl = greedy(json!({"prompt": "quotient", "prompt_format": "paper-rev",
        "icl": {"store": "ops", "k": 2}}));
    let first = reply(&server, "/v1/completions", &with_icl).await;
    let icl = &first["icl"];
    assert_eq!((&icl["store"], &icl["k"], &icl["select"]), (&json!("ops"), &json!(2), &json!("fixed")));
    assert_eq!((&icl["examples"], &icl["seed"], &icl["cached_tokens"]), (&json!([0, 1]), &json!(null), &json!(0)));
    assert_eq!(icl["version"], server.get("/v1/icl/ops").await["version"]);

    // The same prompt, written by hand.
    let shot = |instruction: &str, code: &str| {
        format!("### Instruction:\n{instruction}\n### Response:\n```python\n{code}\n```\n\n")
    };
    let by_hand = shot("sum", "a + b") + &shot("difference", "a - b");
    let by_hand = format!("{by_hand}### Instruction:\nquotient\n### Response:\n```python\n");
    let hand = reply(&server, "/v1/completions", &greedy(json!({"prompt": by_hand}))).await;
    assert_eq!((&first["choices"], &hand["icl"]), (&hand["choices"], &json!(null)));
    assert_eq!(first["usage"]["prompt_tokens"], hand["usage"]["prompt_tokens"]);

    let by_name = greedy(json!({"prompt": "quotient", "prompt_format": "paper-rev", "model": "tiny+icl:ops@2"}));
    let by_name = reply(&server, "/v1/completions", &by_name).await;
    assert_eq!((&by_name["choices"], &by_name["model"]), (&first["choices"], &json!("tiny")));
    assert_eq!(server.get("/v1/models/tiny-a+icl:ops@2").await["id"], "tiny-a");

    // Another question behind the same fixed examples finds them computed.
    let mut next = with_icl.clone();
    next["prompt"] = json!("remainder");
    let next = reply(&server, "/v1/completions", &next).await;
    let shared = &by_hand[..by_hand.find("quotient").unwrap()];
    let shared = reply(&server, "/v1/completions", &greedy(json!({"prompt": shared}))).await;
    assert_eq!(next["icl"]["cached_tokens"], shared["usage"]["prompt_tokens"], "to the last token");

    let nearest = json!({"prompt": "length of a string", "prompt_format": "paper-rev", "stream": true,
        "icl": {"store": "ops", "k": 1, "select": "bm25"}});
    let text = server.request(Method::POST, "/v1/completions").body(greedy(nearest).to_string());
    let text = text.send().await.unwrap().text().await.unwrap();
    let events = text.split("\n\n").filter_map(|event| serde_json::from_str(event.strip_prefix("data: ")?).ok());
    let last: Value = events.last().unwrap();
    assert_eq!(last["icl"]["examples"], json!([3]), "{last}");
    assert!(last["icl"]["cached_tokens"].is_number(), "{last}");
}

#[tokio::test(flavor = "multi_thread")]
async fn examples_that_cannot_be_had_are_refused_by_field() {
    let server = server().await;
    for (body, status, param) in [
        (json!({"icl": {"store": "none"}}), 404, "icl.store"),
        (json!({"icl": {}}), 400, "icl.store"),
        (json!({"icl": "ops"}), 400, "icl"),
        (json!({"icl": {"store": "ops", "k": 5}}), 400, "icl.k"),
        (json!({"icl": {"store": "ops", "k": 0}}), 400, "icl.k"),
        (json!({"icl": {"store": "ops", "select": "best"}}), 400, "icl.select"),
        (json!({"icl": {"store": "ops", "select": "hybrid"}}), 400, "icl.select"),
        // 256 tokens are not enough for four.
        (json!({"icl": {"store": "ops", "k": 4}}), 400, "icl.k"),
        (json!({"icl": {"store": "ops", "k": 1}, "model": "tiny+icl:ops@1"}), 400, "icl"),
        (json!({"model": "tiny+icl:ops"}), 400, "model"),
        (json!({"model": "nobody+icl:ops@1"}), 404, "model"),
        (json!({"icl": {"store": "ops", "k": 1}, "prompt": ["a", "b"]}), 400, "icl"),
        (json!({"icl": {"store": "ops", "k": 1}, "prompt": [65, 66]}), 400, "icl"),
        (json!({"icl": {"store": "ops", "k": 1}, "suffix": "x"}), 400, "icl"),
        (json!({"prompt_format": "none"}), 400, "prompt_format"),
        // The tiny model has no chat template.
        (json!({"prompt_format": "chat"}), 400, "prompt"),
    ] {
        let mut request = json!({"prompt": "quotient", "prompt_format": "paper-rev", "max_tokens": 1});
        for (field, value) in body.as_object().unwrap() {
            request[field] = value.clone();
        }
        let (refused, error) = post(&server, "/v1/completions", &request).await;
        assert_eq!((refused.as_u16(), &error["error"]["param"]), (status, &json!(param)), "{body}: {error}");
    }
}
