//! `/v1/icl` over a real socket.

use super::*;

async fn send(server: &Server, method: Method, path: &str, body: Value) -> (StatusCode, Value) {
    let response = server.request(method, path).bearer_auth("admin").body(body.to_string()).send().await.unwrap();
    (response.status(), response.json().await.unwrap())
}

async fn put(server: &Server, name: &str, body: Value) -> (StatusCode, Value) {
    send(server, Method::PUT, &format!("/v1/icl/{name}"), body).await
}

async fn get(server: &Server, path: &str) -> (StatusCode, Value) {
    send(server, Method::GET, path, Value::Null).await
}

fn one_example() -> Value {
    json!({"examples": [{"instruction": "add `a` and `b`", "code": "a + b\n"}]})
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_is_put_listed_shown_replaced_and_deleted() {
    let server = Server::quick().await;
    assert_eq!(get(&server, "/v1/icl").await.1, json!({"object": "list", "data": []}));

    let (status, first) = put(&server, "sums", one_example()).await;
    assert_eq!((status, &first["name"], &first["num_examples"]), (StatusCode::OK, &json!("sums"), &json!(1)));
    assert_eq!(get(&server, "/icl").await.1, json!({"object": "list", "data": [first]}));
    let (_, whole) = get(&server, "/v1/icl/sums").await;
    assert_eq!(whole["examples"], json!([{"id": 0, "instruction": "add `a` and `b`", "code": "a + b\n"}]));
    assert_eq!(whole["version"], first["version"]);
    assert!(server.dir.path().join("icl/sums.jsonl").is_file());

    let (_, second) = put(&server, "sums", json!({"examples": [{"instruction": "x", "code": "y"}]})).await;
    assert_ne!(second["version"], first["version"]);
    let (status, deleted) = send(&server, Method::DELETE, "/v1/icl/sums", Value::Null).await;
    assert_eq!((status, deleted), (StatusCode::OK, json!({"name": "sums", "deleted": true})));
    assert!(!server.dir.path().join("icl/sums.jsonl").exists());
    for method in [Method::GET, Method::DELETE] {
        let (status, error) = send(&server, method, "/v1/icl/sums", Value::Null).await;
        assert_eq!((status, &error["error"]["code"]), (StatusCode::NOT_FOUND, &json!("store_not_found")));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_bad_store_is_refused_by_the_field_at_fault() {
    let server = Server::quick().await;
    let example = |instruction: Value, code: Value| json!({"examples": [{"instruction": instruction, "code": code}]});
    let cases = [
        ("s", json!({}), "examples"),
        ("s", json!({"examples": {}}), "examples"),
        ("s", json!({"examples": []}), "examples"),
        ("s", json!({"examples": [7]}), "examples[0]"),
        ("s", example(json!("i"), Value::Null), "examples[0].code"),
        ("s", example(json!(1), json!("c")), "examples[0].instruction"),
        ("s", example(json!(" "), json!("c")), "examples[0].instruction"),
        (".s", one_example(), "name"),
        ("%2e%2e%2fs", one_example(), "name"),
    ];
    for (name, body, param) in cases {
        let (status, error) = put(&server, name, body).await;
        assert_eq!((status, &error["error"]["param"]), (StatusCode::BAD_REQUEST, &json!(param)), "{error}");
    }
    assert_eq!(get(&server, "/v1/icl").await.1["data"], json!([]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_cannot_be_written_stays_as_it_was_and_the_error_names_no_path() {
    let server = Server::quick().await;
    let (_, before) = put(&server, "sums", one_example()).await;
    // A file where the folder was: no user, not even root, can write below it.
    let folder = server.dir.path().join("icl");
    std::fs::rename(&folder, server.dir.path().join("away")).unwrap();
    std::fs::write(&folder, "").unwrap();
    let (status, error) = put(&server, "sums", json!({"examples": [{"instruction": "x", "code": "y"}]})).await;
    assert_eq!((status, &error["error"]["code"]), (StatusCode::INSUFFICIENT_STORAGE, &json!("not_writable")));
    assert!(!error.to_string().contains(&*server.dir.path().to_string_lossy()), "{error}");
    assert_eq!(get(&server, "/v1/icl/sums").await.1["version"], before["version"]);
    server.complete(json!({"prompt": "a", "max_tokens": 1})).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_is_changed_with_the_admin_key_alone() {
    let server = Server::quick().await;
    for method in [Method::PUT, Method::DELETE] {
        let request = server.request(method, "/v1/icl/sums").body(one_example().to_string());
        assert_eq!(request.send().await.unwrap().status(), StatusCode::UNAUTHORIZED);
    }
    assert_eq!(get(&server, "/v1/icl").await.1["data"], json!([]));
}
