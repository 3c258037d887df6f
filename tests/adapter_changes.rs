//! Adapters that come, change and go while the server runs, through its own interface and vLLM's.

mod adapter_server;
mod tiny;

use std::fs;
use std::os::unix::fs::symlink;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use adapter_server::{ADMIN, Server, ids, names, write_adapter};

impl Server {
    /// Files to install, in a folder under the root that is no adapter itself.
    fn stage(&self, seed: u64) -> String {
        let path = format!("staging/{seed}");
        write_adapter(&self.root().join(&path), seed);
        path
    }

    async fn put(&self, name: &str, body: Value) -> (u16, Value) {
        let (status, reply) = self.admin(Method::PUT, &format!("/v1/adapters/{name}"), body).await;
        (status.as_u16(), reply)
    }

    async fn put_if(&self, name: &str, body: Value, header: (&str, &str)) -> u16 {
        let request = self.request(Method::PUT, &format!("/v1/adapters/{name}")).bearer_auth("admin");
        self.send(request.header(header.0, header.1).body(body.to_string())).await.0.as_u16()
    }

    async fn generation(&self, name: &str) -> Value {
        self.complete(json!({"model": name})).await["adapter"]["generation"].clone()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_installed_adapter_is_served_at_once_and_installing_it_again_changes_nothing() {
    let server = Server::start(ADMIN).await;
    let a = server.complete(json!({"model": "a"})).await;
    let (status, created) = server.put("c", json!({"path": "a"})).await;
    assert_eq!((status, &created["phase"]), (201, &json!("ready")), "{created}");
    assert_eq!(created["generation"], a["adapter"]["generation"], "the same content is the same generation");
    assert_eq!(ids(&server.get("/v1/models").await), ["tiny", "tiny-a", "tiny-b", "tiny-c"]);
    assert_eq!(server.complete(json!({"model": "c"})).await["choices"], a["choices"]);

    let (status, again) = server.put("c", json!({"path": "a"})).await;
    assert_eq!((status, &again["generation"]), (200, &created["generation"]));
    assert_eq!(again["previous_generations"], json!([]));
    let absolute = server.root().join("a").to_string_lossy().into_owned();
    assert_eq!(server.put("d", json!({"path": absolute})).await.0, 201);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_another_generation_than_expected_is_refused() {
    let server = Server::start(ADMIN).await;
    let first = server.generation("a").await;
    let (next, third) = (json!({"path": server.stage(7)}), json!({"path": server.stage(8)}));
    let conditional = |body: &Value, generation: &Value| {
        let mut body = body.clone();
        body["if_generation"] = generation.clone();
        body
    };
    let (status, conflict) = server.put("a", conditional(&next, &json!("0123abcd"))).await;
    assert_eq!((status, &conflict["error"]["code"]), (412, &json!("generation_conflict")), "{conflict}");
    assert_eq!(server.put("a", conditional(&next, &json!(""))).await.0, 412);
    assert_eq!(server.put_if("a", next.clone(), ("if-none-match", "*")).await, 412);
    assert_eq!(server.put_if("nobody", next.clone(), ("if-match", "*")).await, 412);
    assert_eq!(server.generation("a").await, first);

    let (status, second) = server.put("a", conditional(&next, &first)).await;
    assert_eq!(status, 200, "{second}");
    assert_ne!(second["generation"], first);
    assert_eq!(second["previous_generations"], json!([first]));
    assert_eq!(server.generation("a").await, second["generation"]);
    let stale = format!("\"{}\"", first.as_str().unwrap());
    assert_eq!(server.put_if("a", third.clone(), ("if-match", &stale)).await, 412);
    let current = format!("\"{}\"", second["generation"].as_str().unwrap());
    assert_eq!(server.put_if("a", third, ("if-match", &current)).await, 200);
    let delete = server.request(Method::DELETE, "/v1/adapters/a").bearer_auth("admin").header("if-match", stale);
    assert_eq!(server.send(delete).await.0, StatusCode::PRECONDITION_FAILED);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replaced_adapter_rolls_back_to_the_generation_before_or_the_one_named() {
    let server = Server::start(ADMIN).await;
    let first = server.complete(json!({"model": "a"})).await;
    let generation = |reply: &Value| reply["adapter"]["generation"].clone();
    server.put("a", json!({"path": server.stage(7)})).await;
    let second = server.complete(json!({"model": "a"})).await;
    assert!(first["choices"] != second["choices"] && generation(&first) != generation(&second));

    let (status, rolled) = server.admin(Method::POST, "/v1/adapters/a/rollback", Value::Null).await;
    assert_eq!(status, StatusCode::BAD_REQUEST, "null is no object: {rolled}");
    let bare = server.request(Method::POST, "/v1/adapters/a/rollback").bearer_auth("admin");
    let (status, rolled) = server.send(bare).await;
    assert_eq!((status, &rolled["generation"]), (StatusCode::OK, &generation(&first)), "{rolled}");
    assert_eq!(server.complete(json!({"model": "a"})).await["choices"], first["choices"]);

    let to = json!({"generation": generation(&second)});
    let (status, rolled) = server.admin(Method::POST, "/v1/adapters/a/rollback", to).await;
    assert_eq!((status, &rolled["generation"]), (StatusCode::OK, &generation(&second)), "{rolled}");
    assert_eq!(server.complete(json!({"model": "a"})).await["choices"], second["choices"]);
    let to = json!({"generation": "0123abcd"});
    assert!(server.admin(Method::POST, "/v1/adapters/a/rollback", to).await.0.is_client_error());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adapter_rolls_back_only_from_the_generation_that_is_expected() {
    let server = Server::start(ADMIN).await;
    let first = server.generation("a").await;
    server.put("a", json!({"path": server.stage(7)})).await;
    let second = server.generation("a").await;
    let roll_back = async |header: Option<(&str, String)>, body: Value| {
        let request = server.request(Method::POST, "/v1/adapters/a/rollback").bearer_auth("admin");
        let request = header.into_iter().fold(request, |request, (name, value)| request.header(name, value));
        server.send(request.body(body.to_string())).await.0.as_u16()
    };
    let quoted = |generation: &Value| format!("\"{}\"", generation.as_str().unwrap());
    for (header, body) in [
        (None, json!({"if_generation": first})),
        (None, json!({"if_generation": "", "generation": first})),
        (Some(("if-match", quoted(&first))), json!({})),
        (Some(("if-none-match", "*".to_owned())), json!({})),
    ] {
        assert_eq!(roll_back(header, body.clone()).await, 412, "{body}");
        assert_eq!(server.generation("a").await, second);
    }
    assert_eq!(roll_back(None, json!({"if_generation": second})).await, 200);
    assert_eq!(server.generation("a").await, first);
    assert_eq!(roll_back(Some(("if-match", quoted(&first))), json!({"generation": second})).await, 200);
    assert_eq!(server.generation("a").await, second);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_adapter_is_unknown_and_removing_it_again_is_no_error() {
    let server = Server::start(ADMIN).await;
    for _ in 0..2 {
        let (status, _) = server.admin(Method::DELETE, "/v1/adapters/a", json!({})).await;
        assert_eq!(status, StatusCode::NO_CONTENT);
        assert_eq!(server.refusal(json!({"model": "a"})).await.0, StatusCode::NOT_FOUND);
        assert_eq!(ids(&server.get("/v1/models").await), ["tiny", "tiny-b"]);
    }
    let (status, _) = server.admin(Method::DELETE, "/v1/adapters/broken", json!({})).await;
    assert_eq!(status, StatusCode::NO_CONTENT, "what is refused can be taken out");
    write_adapter(&server.root().join("new"), 5);
    let (status, _) = server.admin(Method::DELETE, "/v1/adapters/new", json!({})).await;
    assert_eq!(status, StatusCode::NO_CONTENT);
    assert!(!server.root().join("new").exists(), "noticed before or not");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_served_or_lies_elsewhere_is_not_installed() {
    let server = Server::start(ADMIN).await;
    let first = server.generation("a").await;
    let (status, error) = server.put("a", json!({"path": "broken"})).await;
    assert_eq!((status, &error["error"]["code"]), (422, &json!("adapter_refused")), "{error}");
    assert!(error["error"]["message"].as_str().unwrap().contains("promt"), "{error}");

    let outside = tempfile::tempdir().unwrap();
    write_adapter(outside.path(), 9);
    let escape = format!("../../{}", outside.path().file_name().unwrap().to_string_lossy());
    for path in [outside.path().to_string_lossy().into_owned(), escape, "a/../b".to_owned(), "nowhere".to_owned()] {
        let (status, error) = server.put("a", json!({"path": path})).await;
        assert_eq!((status, &error["error"]["param"]), (400, &json!("path")), "{path}: {error}");
    }
    for name in ["..%2Fx", ".hidden", "a%20b", "%2e%2e%2fx"] {
        assert_eq!(server.put(name, json!({"path": "a"})).await.0, 400, "{name}");
    }
    assert_eq!(server.generation("a").await, first);
    assert_eq!(ids(&server.get("/v1/models").await), ["tiny", "tiny-a", "tiny-b"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adapter_in_a_folder_of_a_folder_can_be_installed() {
    let server = Server::start(ADMIN).await;
    write_adapter(&server.root().join("output/checkpoint-500"), 7);
    let (status, _) = server.admin(Method::DELETE, "/v1/adapters/output", json!({})).await;
    assert_eq!(status, StatusCode::CONFLICT, "it is no adapter's folder");
    assert_eq!(server.put("c", json!({"path": "output/checkpoint-500"})).await.0, 201);
    assert_eq!(server.complete(json!({"model": "c"})).await["adapter"]["name"], "c");
    assert_eq!(ids(&server.get("/v1/models").await), ["tiny", "tiny-a", "tiny-b", "tiny-c"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn files_that_cannot_be_read_for_a_moment_are_no_refusal() {
    let server = Server::start(ADMIN).await;
    // What such a link is the system can tell nobody.
    fs::create_dir(server.root().join(".c")).unwrap();
    symlink("adapter_config.json", server.root().join(".c/adapter_config.json")).unwrap();
    fs::rename(server.root().join(".c"), server.root().join("c")).unwrap();
    server.until("/v1/adapters", |list| names(&list["data"]).contains(&"c")).await;
    for path in ["/v1/completions", "/v1/adapters/c/load"] {
        let request = server.request(Method::POST, path).body(json!({"model": "c", "prompt": "x"}).to_string());
        let (status, error) = server.send(request).await;
        assert_eq!((status, &error["error"]["code"]), (StatusCode::SERVICE_UNAVAILABLE, &json!("storage_unavailable")));
        assert!(error["error"]["message"].as_str().unwrap().contains("adapter_config.json"), "{error}");
    }
    write_adapter(&server.root().join(".new"), 7);
    for file in ["adapter_model.safetensors", "adapter_config.json"] {
        fs::rename(server.root().join(".new").join(file), server.root().join("c").join(file)).unwrap();
    }
    server.until("/v1/adapters/c", |c| c["phase"] == "ready" && c["error"].is_null()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_of_vllm_load_and_unload_in_their_own_words() {
    let server = Server::start(ADMIN).await;
    let load = async |body: Value| server.admin(Method::POST, "/v1/load_lora_adapter", body).await;
    let other = server.stage(7);
    let (status, text) = load(json!({"lora_name": "c", "lora_path": "a"})).await;
    assert_eq!((status, text), (StatusCode::OK, json!("Success: LoRA adapter 'c' added successfully.")));
    let absolute = server.root().join("c").to_string_lossy().into_owned();
    for path in ["a".to_owned(), absolute] {
        let again = load(json!({"lora_name": "c", "lora_path": path})).await;
        assert_eq!(again.0, StatusCode::OK, "the same content again: {}", again.1);
    }
    let (status, error) = load(json!({"lora_name": "c", "lora_path": other})).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert!(error["error"]["message"].as_str().unwrap().contains("already been loaded"), "{error}");
    let before = server.generation("c").await;
    assert_eq!(load(json!({"lora_name": "c", "lora_path": other, "load_inplace": true})).await.0, StatusCode::OK);
    assert_ne!(server.generation("c").await, before);
    for (name, path) in [("d", "nowhere"), ("d", "broken"), ("../d", "a")] {
        let (status, error) = load(json!({"lora_name": name, "lora_path": path})).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{name} {path}: {error}");
    }

    let unload = async |body: Value| server.admin(Method::POST, "/v1/unload_lora_adapter", body).await;
    let (status, text) = unload(json!({"lora_name": "c", "lora_int_id": 1})).await;
    assert_eq!((status, text), (StatusCode::OK, json!("Success: LoRA adapter 'c' removed successfully.")));
    assert_eq!(unload(json!({"lora_name": "c"})).await.0, StatusCode::NOT_FOUND);
    assert_eq!(server.refusal(json!({"model": "c"})).await.0, StatusCode::NOT_FOUND);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_reply_keeps_the_generation_it_began_with_and_the_next_has_the_new_one() {
    let server = Server::start(ADMIN).await;
    let first = server.generation("a").await;
    let body = json!({"model": "a", "prompt": "x", "max_tokens": 200, "ignore_eos": true, "stream": true});
    let request = server.request(Method::POST, "/v1/completions").body(body.to_string());
    let mut response = request.send().await.unwrap();
    let mut text = String::from_utf8_lossy(&response.chunk().await.unwrap().unwrap()).into_owned();
    let (status, second) = server.put("a", json!({"path": server.stage(7)})).await;
    assert_eq!(status, 200, "{second}");
    assert_eq!(server.generation("a").await, second["generation"]);
    while let Some(chunk) = response.chunk().await.unwrap() {
        text.push_str(&String::from_utf8_lossy(&chunk));
    }
    let events =
        text.split("\n\n").filter_map(|event| serde_json::from_str::<Value>(event.strip_prefix("data: ")?).ok());
    let generations: Vec<Value> = events.map(|event| event["adapter"]["generation"].clone()).collect();
    assert!(generations.len() > 100 && generations.iter().all(|generation| *generation == first));
    server.until("/v1/adapters/a", |adapter| adapter["in_flight"] == 0).await;
}
