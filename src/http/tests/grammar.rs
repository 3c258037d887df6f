//! Outputs that follow a grammar, over a real socket. The made-up model knows nothing of JSON: the grammar alone writes it.

use super::*;

fn schema() -> Value {
    json!({"type": "object", "properties": {"a": {"enum": [1, "x", null]}, "b": {"type": "boolean"}},
        "required": ["a", "b"], "additionalProperties": false})
}

fn drawn(seed: u64) -> Value {
    let format = json!({"type": "json_schema", "json_schema": {"name": "n", "schema": schema(), "strict": true}});
    json!({"prompt": "a", "max_tokens": 400, "temperature": 1.2, "seed": seed, "response_format": format})
}

#[tokio::test(flavor = "multi_thread")]
async fn drawn_replies_are_valid_and_the_same_in_any_batch() {
    let server = Server::quick().await;
    for seed in 0..50 {
        let plain = json!({"prompt": "a", "max_tokens": 60, "temperature": 1.2, "seed": seed});
        let chosen = json!({"prompt": "b", "temperature": 2, "seed": seed, "guided_choice": ["yes", "the", "then"]});
        let alone = (
            server.complete(drawn(seed)).await,
            server.complete(plain.clone()).await,
            server.complete(chosen.clone()).await,
        );
        let mixed = tokio::join!(server.complete(drawn(seed)), server.complete(plain), server.complete(chosen));
        assert_eq!(alone.0["choices"], mixed.0["choices"]);
        assert_eq!(alone.1["choices"], mixed.1["choices"]);
        assert_eq!(alone.2["choices"], mixed.2["choices"]);
        let value: Value = serde_json::from_str(text(&alone.0)).unwrap();
        assert!([json!(1), json!("x"), json!(null)].contains(&value["a"]) && value["b"].is_boolean(), "{value}");
        assert_eq!(alone.0["choices"][0]["finish_reason"], "stop");
        assert!(["yes", "the", "then"].contains(&text(&alone.2)), "{}", text(&alone.2));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_choice_follows_its_own_grammar_and_max_tokens_cuts_it() {
    let server = Server::quick().await;
    let reply = server.complete(json!({"prompt": "a", "n": 3, "guided_regex": "[xyz]{4}", "seed": 1})).await;
    for choice in reply["choices"].as_array().unwrap() {
        let text = choice["text"].as_str().unwrap();
        assert!(text.len() == 4 && text.chars().all(|c| "xyz".contains(c)), "{text}");
        assert_eq!(choice["finish_reason"], "stop");
    }
    let cut = server.complete(json!({"prompt": "a", "max_tokens": 2, "guided_regex": "x{9}"})).await;
    assert_eq!((text(&cut), &cut["choices"][0]["finish_reason"]), ("xx", &json!("length")));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_compiled_is_refused_by_name() {
    let server = Server::quick().await;
    for (name, value) in [
        ("guided_regex", json!("(")),
        ("grammar", json!("root ::= nowhere")),
        ("grammar", json!("root ::= root")),
        ("guided_regex", json!("a{0}")),
        ("guided_grammar", json!("start: nowhere")),
        ("guided_json", json!({"type": "no such type"})),
        ("response_format", json!({"type": "json_schema", "json_schema": {"schema": {"$ref": "https://a.b/c"}}})),
    ] {
        let mut body = json!({"prompt": "a"});
        body[name] = value;
        let response = server.completions(body).send().await.unwrap();
        assert_eq!(response.status(), StatusCode::BAD_REQUEST, "{name}");
        assert_eq!(response.json::<Value>().await.unwrap()["error"]["param"], name);
    }
    let beams = json!({"prompt": "a", "use_beam_search": true, "n": 2, "guided_regex": "a"});
    let response = server.completions(beams).send().await.unwrap();
    assert_eq!(response.json::<Value>().await.unwrap()["error"]["param"], "guided_regex");
}
