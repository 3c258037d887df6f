//! Tokens of texts and texts of tokens, and what a client asks before.

use super::*;

async fn ask(server: &Server, path: &str, body: Value) -> (u16, Value) {
    let response = server.request(Method::POST, path).body(body.to_string()).send().await.unwrap();
    (response.status().as_u16(), response.json().await.unwrap())
}

#[tokio::test]
async fn a_text_has_the_tokens_of_a_prompt_and_they_give_it_back() {
    let server = Server::quick().await;
    for (body, tokens) in [
        (json!({"content": "the a"}), json!([257, 32, 97])),
        (json!({"content": "a<|end|>"}), json!([97, 258])),
        (json!({"content": "<|end|>", "parse_special": false, "add_special": false}), json!(b"<|end|>")),
        (json!({"model": BASE, "prompt": "the a"}), json!([257, 32, 97])),
        (json!({"prompt": "a<|end|>", "add_special_tokens": false}), json!([97, 258])),
        (json!({"content": ""}), json!([])),
    ] {
        let (status, reply) = ask(&server, "/tokenize", body.clone()).await;
        assert_eq!((status, &reply["tokens"]), (200, &tokens), "{body}");
        assert_eq!(reply["count"], tokens.as_array().unwrap().len());
        assert_eq!(reply["max_model_len"], CONTEXT_LENGTH);
        let (_, text) = ask(&server, "/v1/detokenize", json!({"tokens": tokens})).await;
        let expected = body.get("content").or(body.get("prompt")).unwrap();
        assert_eq!((&text["content"], &text["prompt"]), (expected, expected));
    }
    let (_, reply) = ask(&server, "/tokenize", json!({"content": "thé", "with_pieces": true})).await;
    let pieces = json!([{"id": 256, "piece": "th"}, {"id": 195, "piece": [195]}, {"id": 169, "piece": [169]}]);
    assert_eq!(reply["tokens"], pieces);
    let (_, reply) = ask(&server, "/tokenize", json!({"prompt": "the", "return_token_strs": true})).await;
    assert_eq!(reply["token_strs"], json!(["the"]));
}

#[tokio::test]
async fn what_is_no_text_and_no_token_is_refused_by_its_field() {
    let server = Server::quick().await;
    for (path, body, status, param) in [
        ("/tokenize", json!({}), 400, "content"),
        ("/tokenize", json!({"content": "a", "prompt": "b"}), 400, "content"),
        ("/tokenize", json!({"content": ["a", 1]}), 400, "content"),
        ("/tokenize", json!({"content": "a", "parse_special": 1}), 400, "parse_special"),
        ("/tokenize", json!({"content": "a", "model": "none"}), 404, "model"),
        ("/tokenize", json!({"messages": [], "add_special_tokens": true}), 400, "add_special_tokens"),
        ("/tokenize", json!({"messages": []}), 400, "messages"),
        ("/detokenize", json!({}), 400, "tokens"),
        ("/detokenize", json!({"tokens": [97, 4000]}), 400, "tokens[1]"),
        ("/detokenize", json!({"tokens": [-1]}), 400, "tokens[0]"),
        ("/detokenize", json!({"tokens": [97], "model": "none"}), 404, "model"),
        ("/apply-template", json!({}), 400, "messages"),
    ] {
        let (refused, reply) = ask(&server, path, body.clone()).await;
        assert_eq!((refused, &reply["error"]["param"]), (status, &json!(param)), "{path} {body} {reply}");
    }
}

#[tokio::test]
async fn the_properties_are_those_of_the_models_list() {
    let server = Server::quick().await;
    let get = async |path| server.request(Method::GET, path).send().await.unwrap().json::<Value>().await.unwrap();
    let (props, models) = (get("/props").await, get("/v1/models").await);
    let meta = &models["data"][0]["meta"];
    assert_eq!(props["default_generation_settings"]["n_ctx"], CONTEXT_LENGTH);
    assert_eq!((&meta["n_ctx"], &meta["n_ctx_train"]), (&json!(CONTEXT_LENGTH), &json!(CONTEXT_LENGTH)));
    assert_eq!((&meta["n_vocab"], &meta["n_embd"]), (&json!(259), &json!(2)));
    assert_eq!((&props["model_alias"], &props["eos_token"]), (&json!(BASE), &json!("<|end|>")));
    assert_eq!(props["chat_template_caps"]["supports_tools"], false);
}
