//! What Tabby's plugins ask.

use super::*;

const SENTINELS: [&str; 4] = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|end|>"];

#[tokio::test]
async fn segments_are_completed_and_their_votes_taken() {
    let server = Server::start(&SENTINELS, Duration::ZERO).await;
    let body = json!({"language": "python", "segments": {"prefix": "x", "suffix": ""}, "temperature": 0});
    let reply = server.complete(body).await;
    assert_eq!(reply["choices"], json!([{"index": 0, "text": "abcdefghijklmnopqrstuvwxyz"}]));
    assert!(reply["id"].as_str().unwrap().starts_with("cmpl-"));
    let several = json!({"segments": {"prefix": "x"}, "n": 2});
    let refused = server.completions(several).send().await.unwrap();
    assert_eq!(
        (refused.status(), refused.json::<Value>().await.unwrap()["error"]["param"].clone()),
        (StatusCode::BAD_REQUEST, json!("n"))
    );
}

#[tokio::test]
async fn a_model_that_fills_no_gaps_says_so() {
    let server = Server::quick().await;
    let reply = server.completions(json!({"segments": {"prefix": "x"}})).send().await.unwrap();
    assert_eq!(reply.status(), StatusCode::NOT_IMPLEMENTED);
}

#[tokio::test]
async fn a_plugin_finds_its_model_by_get_and_by_post() {
    let server = Server::quick().await;
    for method in [Method::GET, Method::POST] {
        let health: Value = server.request(method, "/v1/health").send().await.unwrap().json().await.unwrap();
        assert_eq!(
            (&health["model"], &health["chat_model"], &health["device"]),
            (&json!(BASE), &Value::Null, &json!("CPU"))
        );
    }
    let get = async |path| server.request(Method::GET, path).send().await.unwrap().json::<Value>().await.unwrap();
    assert_eq!(get("/v1beta/server_setting").await, json!({"disable_client_side_telemetry": true}));
    assert_eq!(get("/v1beta/models").await, json!({"completion": [BASE], "chat": null, "embedding": null}));
}
