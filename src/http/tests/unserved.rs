//! What is asked for and not served, over a real socket, and what other servers call what is.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn what_is_asked_for_and_not_served_is_refused_by_name_on_every_route() {
    let server = Server::quick().await;
    let bodies = [
        ("/v1/completions", json!({"prompt": "a"})),
        ("/v1/chat/completions", json!({"messages": [{"role": "user", "content": "a"}]})),
        ("/v1/compare", json!({"prompt": "a", "arms": [{"name": "a"}, {"name": "b"}]})),
    ];
    let asked = json!({"guided_whitespace_pattern": " ", "structural_tag": {"a": 1}, "ebnf": "x",
        "functions": [{}], "chat_template": "x", "adapter_source": "s3", "min_tokens": 3});
    for (path, body) in bodies {
        for (name, value) in asked.as_object().unwrap() {
            let mut body = body.clone();
            body[name] = value.clone();
            let response = server.request(Method::POST, path).body(body.to_string()).send().await.unwrap();
            assert_eq!(response.status(), StatusCode::BAD_REQUEST, "{path} {name}");
            assert_eq!(response.json::<Value>().await.unwrap()["error"]["param"], *name, "{path}");
        }
    }
    let unknown = server.completions(json!({"prompt": "a", "adapter_id": "nobody"})).send().await.unwrap();
    assert_eq!(unknown.status(), StatusCode::NOT_FOUND, "never the base in silence");
}

#[tokio::test(flavor = "multi_thread")]
async fn neutral_values_of_what_is_not_served_change_nothing() {
    let server = Server::quick().await;
    let plain = server.complete(json!({"prompt": "a", "max_tokens": 3, "temperature": 0})).await;
    let body = json!({"prompt": "a", "n_predict": 3, "temperature": 0, "response_format": {"type": "text"}, "tools": [],
        "suffix": "", "logprobs": false, "top_logprobs": 0, "seed": -1, "model": "", "adapter_id": "", "samplers": ["top_k"],
        "user": "u", "metadata": {}});
    assert_eq!(server.complete(body).await["choices"], plain["choices"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seed_of_minus_one_is_drawn_anew_and_named() {
    let server = Server::quick().await;
    let body = json!({"prompt": "a", "max_tokens": 1, "seed": -1});
    let (first, second) = (server.complete(body.clone()).await, server.complete(body).await);
    assert!(first["seed"].as_i64() >= Some(0) && first["seed"] != second["seed"], "{first} {second}");
}

#[tokio::test(flavor = "multi_thread")]
async fn stop_token_ids_end_the_output_and_are_no_part_of_it() {
    let server = Server::quick().await;
    let body = json!({"prompt": "a", "temperature": 0, "stop_token_ids": [u32::from(b'd')], "ignore_eos": true});
    let reply = server.complete(body).await;
    assert_eq!((text(&reply), &reply["choices"][0]["finish_reason"]), ("bc", &json!("stop")));
    let unknown = server.completions(json!({"prompt": "a", "stop_token_ids": [999]})).send().await.unwrap();
    assert_eq!(unknown.json::<Value>().await.unwrap()["error"]["param"], "stop_token_ids");
}
