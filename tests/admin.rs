//! Adapters over a socket: composition and strength per request, lists and status, keys, and llama.cpp's default
//! strengths.

mod adapter_server;
mod tiny;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use adapter_server::{ADMIN, Server, ids, names, write_adapter};

#[tokio::test(flavor = "multi_thread")]
async fn strength_0_is_the_base_and_strength_1_the_adapter_bit_for_bit_in_every_field() {
    let server = Server::start("").await;
    let base = server.complete(json!({})).await;
    assert_eq!((&base["adapter"], &base["adapters"]), (&Value::Null, &json!([])));
    let a = server.complete(json!({"model": "a"})).await;
    assert_eq!((&a["adapter"]["name"], &a["adapter"]["scale"]), (&json!("a"), &json!(1.0)));
    assert_eq!(a["adapters"], json!([a["adapter"]]));
    assert_ne!(base["choices"], a["choices"]);

    let id = server.get("/v1/adapters/a").await["id"].clone();
    for body in [
        json!({"adapters": [{"name": "a", "scale": 0}]}),
        json!({"lora": [{"id": id, "scale": 0}, {"name": "b", "scale": 0.0}]}),
        json!({"model": "a", "adapters": [{"name": "a", "scale": 0}]}),
        json!({"adapters": []}),
        json!({"lora": []}),
    ] {
        let reply = server.complete(body.clone()).await;
        assert_eq!((&reply["choices"], &reply["model"]), (&base["choices"], &base["model"]), "{body}");
        assert_eq!((&reply["adapter"], &reply["adapters"]), (&Value::Null, &json!([])), "{body}");
    }
    for body in [
        json!({"adapters": [{"name": "a"}]}),
        json!({"adapters": [{"name": "tiny-a", "scale": 1.0}, {"name": "b", "scale": 0}]}),
        json!({"lora": [{"id": id, "scale": 1}]}),
        json!({"adapter": "a"}),
        json!({"model": "tiny-a", "adapter": "a"}),
    ] {
        let reply = server.complete(body.clone()).await;
        assert_eq!((&reply["choices"], &reply["model"]), (&a["choices"], &a["model"]), "{body}");
        assert_eq!(reply["adapters"], a["adapters"], "{body}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_exact_name_of_an_adapter_wins_over_the_base_in_it_wherever_a_name_is_read() {
    let server = Server::start("").await;
    // Beside `a`, which `tiny-a` would be without an adapter of that name.
    write_adapter(&server.root().join("tiny-a"), 5);
    server.until("/v1/models", |models| ids(models).contains(&"tiny-tiny-a")).await;
    let a = server.complete(json!({"adapter": "a"})).await;
    let exact = server.complete(json!({"model": "tiny-a"})).await;
    assert_eq!((&exact["adapter"]["name"], &exact["model"]), (&json!("tiny-a"), &json!("tiny-tiny-a")));
    assert_ne!(exact["choices"], a["choices"]);
    for body in [
        json!({"adapters": [{"name": "tiny-a"}]}),
        json!({"lora": [{"name": "tiny-a"}]}),
        json!({"adapter_id": "tiny-a"}),
        json!({"lora_path": "tiny-a"}),
        json!({"model": "tiny-tiny-a"}),
    ] {
        let reply = server.complete(body.clone()).await;
        assert_eq!((&reply["adapter"]["name"], &reply["choices"]), (&json!("tiny-a"), &exact["choices"]), "{body}");
    }
    for (id, name) in [("tiny-a", "tiny-a"), ("a", "a"), ("TINY-b", "b")] {
        assert_eq!(server.get(&format!("/v1/models/{id}")).await["adapter"]["name"], name, "{id}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adapter_that_is_hidden_has_no_name_to_win_with() {
    let server =
        Server::start("admin_key = 'admin'\n[[server.keys]]\nname = 'c'\nkey = 'client'\nadapters = ['a']").await;
    write_adapter(&server.root().join("tiny-a"), 5);
    let listed = async {
        while server.admin(Method::GET, "/v1/adapters/tiny-a", json!({})).await.0 != StatusCode::OK {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(60), listed).await.expect("it is found");
    let asked = server.completion(json!({"model": "tiny-a"}));
    assert_eq!(server.send(asked.bearer_auth("client")).await.1["adapter"]["name"], "a");
    let asked = server.completion(json!({"model": "tiny-a"}));
    assert_eq!(server.send(asked.bearer_auth("admin")).await.1["adapter"]["name"], "tiny-a");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_composition_names_every_member_with_its_strength_and_generation() {
    let server = Server::start("").await;
    let body = json!({"adapters": [{"name": "b", "scale": 0.5}, {"name": "a", "scale": -1}]});
    let both = server.complete(body.clone()).await;
    assert_eq!((&both["adapter"]["name"], &both["model"]), (&json!("b+a"), &json!("tiny-b+a")));
    let mut members = Vec::new();
    for (name, scale) in [("b", 0.5), ("a", -1.0)] {
        let generation = server.get(&format!("/v1/adapters/{name}")).await["generation"].clone();
        members.push(json!({"name": name, "scale": scale, "generation": generation}));
    }
    assert_eq!(both["adapters"], json!(members));
    assert_eq!(server.complete(body).await["choices"], both["choices"]);
    let half = server.complete(json!({"adapters": [{"name": "b", "scale": 0.5}]})).await;
    assert_eq!((&half["adapter"]["name"], &half["adapter"]["scale"]), (&json!("b"), &json!(0.5)));
    let whole = server.complete(json!({"model": "b"})).await;
    assert_eq!(half["adapter"]["generation"], whole["adapter"]["generation"]);
    assert!(half["choices"] != whole["choices"] && half["choices"] != both["choices"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_cannot_be_served_or_contradicts_the_model_is_refused_by_its_place() {
    let server = Server::start("").await;
    for (body, status, param, word) in [
        (json!({"adapters": [{"name": "a"}, {"name": "nobody"}]}), 404, "adapters[1].name", "nobody"),
        (json!({"adapters": [{"name": "nobody", "scale": 0}]}), 404, "adapters[0].name", "nobody"),
        (json!({"adapters": [{"name": "broken"}]}), 404, "adapters[0].name", "promt"),
        (json!({"lora": [{"id": 99}]}), 404, "lora[0].id", "99"),
        (json!({"adapter": "tiny"}), 404, "adapter", "tiny"),
        (json!({"model": "broken"}), 404, "model", "promt"),
        (json!({"model": "nobody", "adapter": "a"}), 404, "model", "nobody"),
        (json!({"adapters": [{"name": "a"}, {"name": "tiny-a"}]}), 400, "adapters[1].name", "second"),
        (json!({"model": "a", "adapters": [{"name": "b"}]}), 400, "adapters", "`a`"),
        (json!({"model": "a", "adapters": [{"name": "a"}, {"name": "b"}]}), 400, "adapters", "`a`"),
        (json!({"model": "a", "lora": []}), 400, "lora", "`a`"),
        (json!({"adapters": [{"name": "a", "scale": 5}]}), 400, "adapters[0].scale", "4"),
    ] {
        let (found, error) = server.refusal(body.clone()).await;
        assert_eq!((found.as_u16(), &error["param"]), (status, &json!(param)), "{body}: {error}");
        assert!(error["message"].as_str().unwrap().contains(word), "{body}: {error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_lists_show_what_is_served_and_the_status_says_what_is_known() {
    let server = Server::start("").await;
    assert_eq!(ids(&server.get("/v1/models").await), ["tiny", "tiny-a", "tiny-b"]);
    let list = server.get("/v1/adapters").await;
    assert_eq!(names(&list["data"]), ["a", "b", "broken"]);
    let broken = &list["data"][2];
    assert!(broken["phase"] == "failed" && broken["error"].as_str().unwrap().contains("promt"), "{broken}");

    let generation = server.complete(json!({"model": "a"})).await["adapter"]["generation"].clone();
    let measured = |adapter: &Value| !adapter["self_test"].is_null() && adapter["in_flight"] == 0;
    let a = server.until("/v1/adapters/a", measured).await;
    assert_eq!((&a["name"], &a["model"], &a["generation"]), (&json!("a"), &json!("tiny-a"), &generation));
    assert_eq!((&a["phase"], &a["tier"], &a["method"]), (&json!("ready"), &json!("host"), &json!("lora")));
    assert_eq!((&a["coverage"]["num_sites"], &a["coverage"]["max_rank"]), (&json!(2), &json!(4)));
    assert!(a["bytes"].as_u64().unwrap() > 0 && a["manifest"]["stop"] == json!([]));
    let test = &a["self_test"];
    let (max, mean) = (test["max_logit_change"].as_f64().unwrap(), test["mean_logit_change"].as_f64().unwrap());
    assert!(max > mean && mean > 0.0 && test["is_inert"] == false, "{test}");

    let (status, loaded) = server.send(server.request(Method::POST, "/v1/adapters/b/load")).await;
    assert_eq!((status, &loaded["phase"]), (StatusCode::OK, &json!("ready")));
    for (method, path, expected) in [
        (Method::GET, "/v1/adapters/nobody", 404),
        (Method::POST, "/v1/adapters/nobody/load", 404),
        (Method::POST, "/v1/adapters/broken/load", 422),
        (Method::GET, "/v1/adapters/..%2Fa", 404),
        (Method::GET, "/v1/adapters/%ff", 400),
        (Method::PATCH, "/v1/adapters/a", 405),
    ] {
        assert_eq!(server.send(server.request(method, path)).await.0.as_u16(), expected, "{path}");
    }
}

fn changes() -> Vec<(Method, &'static str, Value)> {
    vec![
        (Method::PUT, "/v1/adapters/c", json!({"path": "a"})),
        (Method::DELETE, "/v1/adapters/a", json!({})),
        (Method::POST, "/v1/adapters/a/rollback", json!({})),
        (Method::POST, "/v1/load_lora_adapter", json!({"lora_name": "c", "lora_path": "a"})),
        (Method::POST, "/v1/unload_lora_adapter", json!({"lora_name": "a"})),
        (Method::POST, "/lora-adapters", json!([{"id": 0, "scale": 1}])),
        (Method::DELETE, "/adapters/a", json!({})),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn without_an_admin_key_changes_are_off_and_with_one_nothing_else_opens_them() {
    let off = Server::start("").await;
    let on = Server::start(&format!("{ADMIN}[[server.keys]]\nname = 'c'\nkey = 'client'\nadapters = ['*']")).await;
    for (method, path, body) in changes() {
        let request =
            |server: &Server, key: &str| server.request(method.clone(), path).bearer_auth(key).body(body.to_string());
        let (status, error) = off.send(request(&off, "admin")).await;
        assert_eq!(status, StatusCode::FORBIDDEN, "{path}");
        assert!(error["error"]["message"].as_str().unwrap().contains("server.admin_key"), "{error}");
        assert_eq!(on.send(request(&on, "client")).await.0, StatusCode::FORBIDDEN, "{path}");
        let (status, error) = on.send(request(&on, "wrong")).await;
        assert_eq!((status, &error["error"]["code"]), (StatusCode::UNAUTHORIZED, &json!("invalid_api_key")), "{path}");
        assert_eq!(on.send(on.request(method.clone(), path)).await.0, StatusCode::UNAUTHORIZED, "{path}");
    }
    assert_eq!(ids(&off.get("/v1/models").await), ["tiny", "tiny-a", "tiny-b"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_sees_and_uses_only_its_adapters_and_always_the_base() {
    let keys = "[[server.keys]]\nname = 'one'\nkey = 'one'\nadapters = ['a']\n\
                [[server.keys]]\nname = 'none'\nkey = 'none'\nadapters = []";
    let server = Server::start(&format!("{ADMIN}{keys}")).await;
    for path in ["/v1/models", "/v1/adapters", "/lora-adapters", "/models", "/v1/adapters/a"] {
        let response = server.request(Method::GET, path).send().await.unwrap();
        assert_eq!(response.status(), StatusCode::UNAUTHORIZED, "{path}");
        assert_eq!(response.headers()["www-authenticate"], "Bearer");
    }
    assert_eq!(server.refusal(json!({})).await.0, StatusCode::UNAUTHORIZED);
    server.get("/health").await;
    assert_eq!(server.send(server.request(Method::GET, "/metrics")).await.0, StatusCode::OK);

    let get = async |key: &str, path: &str| server.send(server.request(Method::GET, path).bearer_auth(key)).await;
    assert_eq!(ids(&get("one", "/v1/models").await.1), ["tiny", "tiny-a"]);
    assert_eq!(ids(&get("none", "/v1/models").await.1), ["tiny"]);
    assert_eq!(names(&get("one", "/v1/adapters").await.1["data"]), ["a"]);
    assert_eq!(names(&get("one", "/lora-adapters").await.1), ["a"]);
    assert_eq!(names(&get("admin", "/lora-adapters").await.1), ["a", "b"]);

    let hidden = server.get_id_of("b").await;
    for (key, body, expected) in [
        ("one", json!({}), 200),
        ("one", json!({"model": "a"}), 200),
        ("none", json!({}), 200),
        ("admin", json!({"model": "b"}), 200),
        ("one", json!({"model": "b"}), 404),
        ("one", json!({"model": "broken"}), 404),
        ("one", json!({"adapters": [{"name": "a"}, {"name": "b", "scale": 0}]}), 404),
        ("one", json!({"lora": [{"id": hidden}]}), 404),
        ("none", json!({"adapter": "a"}), 404),
    ] {
        let (status, reply) = server.send(server.completion(body.clone()).bearer_auth(key)).await;
        assert_eq!(status.as_u16(), expected, "{key} {body}: {reply}");
        assert!(!reply.to_string().contains("promt"), "what is hidden has no cause: {reply}");
    }
    for path in ["/v1/adapters/b", "/v1/models/b", "/v1/models/tiny-b"] {
        assert_eq!(get("one", path).await.0, StatusCode::NOT_FOUND, "{path}");
    }
    let load = server.request(Method::POST, "/v1/adapters/b/load").bearer_auth("one");
    assert_eq!(server.send(load).await.0, StatusCode::NOT_FOUND);
}

#[tokio::test(flavor = "multi_thread")]
async fn default_strengths_apply_to_the_base_unless_the_request_speaks_of_adapters() {
    let keys = "[[server.keys]]\nname = 'none'\nkey = 'none'\nadapters = []";
    let server = Server::start(&format!("{ADMIN}{keys}")).await;
    let complete = async |body: Value| {
        let (status, reply) = server.send(server.completion(body).bearer_auth("admin")).await;
        assert_eq!(status, StatusCode::OK, "{reply}");
        reply
    };
    let (base, a) = (complete(json!({})).await, complete(json!({"model": "a"})).await);
    let id = server.get_id_of("a").await;
    let set = server.admin(Method::POST, "/lora-adapters", json!([{"id": id, "scale": 1}])).await;
    assert_eq!(set, (StatusCode::OK, json!({"success": true})));
    let (_, list) = server.admin(Method::GET, "/lora-adapters", json!({})).await;
    assert_eq!(list[0], json!({"id": id, "name": "a", "scale": 1.0, "path": ""}));
    assert_eq!(list[1]["scale"], 0.0);

    for body in [json!({}), json!({"model": "tiny"})] {
        let reply = complete(body).await;
        assert_eq!((&reply["choices"], &reply["adapters"]), (&a["choices"], &a["adapters"]));
    }
    for body in [json!({"lora": []}), json!({"adapters": [{"name": "a", "scale": 0}]})] {
        assert_eq!(complete(body).await["choices"], base["choices"]);
    }
    assert_eq!(complete(json!({"model": "b"})).await["adapter"]["name"], "b");
    let (_, stranger) = server.send(server.completion(json!({})).bearer_auth("none")).await;
    assert_eq!(stranger["choices"], base["choices"], "a key that may not know of it gets the base alone");

    for (body, param) in [
        (json!([{"id": 99, "scale": 1}]), json!("[0].id")),
        (json!([{"id": id, "scale": 9}]), json!("[0].scale")),
        (json!({"id": id}), json!(null)),
    ] {
        let (status, error) = server.admin(Method::POST, "/lora-adapters", body).await;
        assert!(status.is_client_error() && error["error"]["param"] == param, "{error}");
    }
    assert_eq!(complete(json!({})).await["adapter"]["name"], "a", "a refused change changes nothing");
    server.admin(Method::POST, "/lora-adapters", json!([])).await;
    assert_eq!(complete(json!({})).await["choices"], base["choices"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_that_says_nothing_sensible_is_refused_before_it_is_tried() {
    let server = Server::start(ADMIN).await;
    for (method, path, body, param) in [
        (Method::PUT, "/v1/adapters/c", json!({}), "source"),
        (Method::PUT, "/v1/adapters/c", json!({"source": "a"}), "source"),
        (Method::PUT, "/v1/adapters/c", json!({"source": "hf:a/b", "path": "a"}), "path"),
        (Method::PUT, "/v1/adapters/c", json!({"path": 1}), "path"),
        (Method::PUT, "/v1/adapters/c", json!({"path": "a", "if_generation": 1}), "if_generation"),
        (Method::PUT, "/v1/adapters/c", json!({"path": "a", "if_generations": ""}), "if_generations"),
        (Method::POST, "/v1/adapters/a/rollback", json!({"generation": 1}), "generation"),
        (Method::POST, "/v1/adapters/a/rollback", json!({"generation": "0123abcd"}), "generation"),
        (Method::POST, "/v1/adapters/a/rollback", json!({"generations": "0123abcd"}), "generations"),
        (Method::POST, "/v1/adapters/a/rollback", json!({"if_generation": 1}), "if_generation"),
        (Method::POST, "/v1/load_lora_adapter", json!({"lora_path": "a"}), "lora_name"),
        (Method::POST, "/v1/load_lora_adapter", json!({"lora_name": "c"}), "lora_path"),
        (Method::POST, "/v1/load_lora_adapter", json!({"lora_name": "c", "lora_path": "hf:c"}), "lora_path"),
        (Method::POST, "/v1/unload_lora_adapter", json!({}), "lora_name"),
    ] {
        let (status, error) = server.admin(method, path, body.clone()).await;
        assert_eq!((status.as_u16(), &error["error"]["param"]), (400, &json!(param)), "{path} {body}: {error}");
    }
    assert_eq!(server.admin(Method::DELETE, "/v1/adapters/nobody", json!({})).await.0, StatusCode::NO_CONTENT);
}
