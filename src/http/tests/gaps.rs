//! Fill-in-the-middle over a real socket.

use super::*;

const SENTINELS: [&str; 4] = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|end|>"];

async fn server() -> Server {
    Server::start(&SENTINELS, Duration::ZERO).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_suffix_is_rendered_with_the_sentinels_of_the_model() {
    let server = server().await;
    let filled = server.complete(json!({"prompt": "ab", "suffix": "<|fim_middle|>", "temperature": 0})).await;
    assert_eq!(text(&filled), "abcdefghijklmnop");
    assert_eq!(filled["usage"]["prompt_tokens"], 2 + 14 + 3, "a sentinel in the user's text is only text");
}

fn raw(prefix: &str, suffix: &str) -> String {
    format!("<|fim_prefix|>{prefix}<|fim_suffix|>{suffix}<|fim_middle|>")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gap_that_the_client_laid_out_is_filled_at_the_temperature_of_gaps() {
    let server = server().await;
    // Of 16 outputs of 20 tokens at temperature 1, some are not the most likely; at 0.2 none.
    let are_greedy = async |mut body: Value| {
        (body["n"], body["max_tokens"], body["ignore_eos"]) = (json!(4), json!(20), json!(true));
        let mut texts = Vec::new();
        for seed in [0, 4, 8, 12] {
            body["seed"] = json!(seed);
            let choices = server.complete(body.clone()).await["choices"].as_array().unwrap().clone();
            texts.extend(choices.into_iter().map(|choice| choice["text"].as_str().unwrap().to_owned()));
        }
        texts.iter().all(|text| text == "abcdefghijklmnopqrst")
    };
    let ids: Vec<u32> = [258, 97, 259, 98, 260].into();
    for prompt in [json!(raw("a", "b")), json!(ids)] {
        assert!(are_greedy(json!({"prompt": prompt})).await, "{prompt}");
        assert!(!are_greedy(json!({"prompt": prompt, "temperature": 1})).await, "as the client says");
    }
    assert!(!are_greedy(json!({"prompt": "!"})).await, "no gap, no low temperature");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_models_layout_is_put_into_this_models_own() {
    let server = server().await;
    let own = server.complete(json!({"prompt": raw("xy", "b"), "temperature": 0})).await;
    for prompt in [
        "<fim_prefix>xy<fim_suffix>b<fim_middle>",
        "<PRE> xy <SUF>b <MID>",
        "[SUFFIX]b[PREFIX]xy",
        "<｜fim▁begin｜>xy<｜fim▁hole｜>b<｜fim▁end｜>",
    ] {
        let reply = server.complete(json!({"prompt": prompt, "temperature": 0})).await;
        assert_eq!(reply["usage"]["prompt_tokens"], own["usage"]["prompt_tokens"], "{prompt}");
        assert_eq!(text(&reply), text(&own), "{prompt}");
    }
    let echoed = json!({"prompt": "<PRE> xy <SUF>b <MID>", "echo": true, "max_tokens": 0});
    assert_eq!(text(&server.complete(echoed).await), "<PRE> xy <SUF>b <MID>");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_base_without_gaps_refuses_a_layout_with_one_and_takes_an_empty_suffix_for_none() {
    let server = Server::quick().await;
    let refused = server.completions(json!({"prompt": "<fim_prefix>a<fim_suffix>b<fim_middle>"})).send().await.unwrap();
    assert_eq!(refused.status(), StatusCode::BAD_REQUEST);
    assert_eq!(refused.json::<Value>().await.unwrap()["error"]["param"], "prompt");
    let reply = server.complete(json!({"prompt": "a", "suffix": "", "max_tokens": 2, "temperature": 0})).await;
    assert_eq!((text(&reply), &reply["usage"]["prompt_tokens"]), ("bc", &json!(1)));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_too_long_around_a_gap_loses_what_is_farthest_from_it() {
    let server = server().await;
    let (prefix, suffix) = ("p".repeat(100), "s".repeat(100));
    // A quarter of the context is left for the output, as far as it is wanted.
    for (max_tokens, prompt_tokens) in [(100, 48), (4, 60)] {
        for body in [
            json!({"prompt": prefix, "suffix": suffix}),
            json!({"prompt": raw(&prefix, &suffix)}),
            json!({"prompt": format!("<fim_prefix>{prefix}<fim_suffix>{suffix}<fim_middle>")}),
        ] {
            let mut body = body;
            (body["max_tokens"], body["temperature"], body["ignore_eos"]) = (json!(max_tokens), json!(0), json!(true));
            let reply = server.complete(body).await;
            assert_eq!(reply["usage"]["prompt_tokens"], prompt_tokens, "{reply}");
            assert_eq!(reply["usage"]["completion_tokens"], max_tokens.min(16));
        }
    }
    // Neither what is no gap nor what is to be repeated.
    for body in [json!({"prompt": prefix}), json!({"prompt": raw(&prefix, &suffix), "echo": true})] {
        let error = server.completions(body).send().await.unwrap().json::<Value>().await.unwrap();
        assert_eq!(error["error"]["code"], "context_length_exceeded", "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_that_no_tokens_could_hold_is_refused_by_its_bytes() {
    let server = server().await;
    // The longest token has 14 bytes.
    let response = server.completions(json!({"prompt": "a".repeat(64 * 14 + 1)})).send().await.unwrap();
    assert_eq!(response.status(), StatusCode::BAD_REQUEST);
    let error = response.json::<Value>().await.unwrap()["error"].clone();
    assert_eq!((&error["param"], &error["code"]), (&json!("prompt"), &json!("context_length_exceeded")));
    assert!(error["message"].as_str().unwrap().contains("897 bytes"), "{error}");
    let around =
        server.complete(json!({"prompt": "p".repeat(4000), "suffix": "s".repeat(4000), "temperature": 0})).await;
    assert_eq!(around["usage"]["prompt_tokens"], 48);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prefix_begins_the_output_and_the_model_goes_on_from_it() {
    let server = server().await;
    let begun = |more: Value| {
        let mut body = json!({"prompt": "ab", "prefix": "xy", "max_tokens": 3, "temperature": 0});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    let reply = server.complete(begun(json!({}))).await;
    assert_eq!((text(&reply), &reply["usage"]["prompt_tokens"]), ("xyz", &json!(4)));
    let filled = server.complete(begun(json!({"suffix": "b", "prefix": "gh"}))).await;
    assert_eq!((text(&filled), &filled["usage"]["prompt_tokens"]), ("ghijk", &json!(3 + 3 + 2)));
    let laid_out = server.complete(begun(json!({"prompt": raw("ab", "b"), "prefix": "gh"}))).await;
    let num_tokens = |reply: &Value| reply["usage"]["total_tokens"].clone();
    assert_eq!((text(&laid_out), num_tokens(&laid_out)), (text(&filled), num_tokens(&filled)));
    assert_eq!(text(&server.complete(begun(json!({"echo": true}))).await), "abxyz");
    assert_eq!(text(&server.complete(begun(json!({"max_tokens": 0}))).await), "xy");
    // Nothing that the client wrote ends the output.
    assert_eq!(text(&server.complete(begun(json!({"prefix": "gh", "stop": "h"}))).await), "ghijk");
    let offsets = server.complete(begun(json!({"prefix": "gh", "logprobs": 0}))).await;
    assert_eq!(offsets["choices"][0]["logprobs"]["text_offset"], json!([2, 3, 4]));

    let events = server.stream(begun(json!({"prefix": "gh"}))).await;
    let first: Value = serde_json::from_str(&events[0]).unwrap();
    assert!(text(&first).starts_with("gh"), "{first}");

    let long = server.complete(begun(json!({"prompt": "p".repeat(100), "suffix": "s", "prefix": "gh"}))).await;
    assert_eq!(
        (text(&long), &long["usage"]["prompt_tokens"]),
        ("ghijk", &json!(CONTEXT_LENGTH - 3)),
        "what is cut is the prompt"
    );
    let refused = server.completions(begun(json!({"prompt": [97]}))).send().await.unwrap();
    assert_eq!(refused.status(), 400);
    assert_eq!(refused.json::<Value>().await.unwrap()["error"]["param"], "prefix");
    assert_eq!(text(&server.complete(begun(json!({"prompt": [97], "prefix": ""}))).await), "bcd");
}

#[tokio::test(flavor = "multi_thread")]
async fn mistrals_route_answers_in_the_form_of_chat_with_a_string_in_every_chunk() {
    let server = server().await;
    let ask = |body: Value| server.request(Method::POST, "/v1/fim/completions").body(body.to_string()).send();
    let mut body = json!({"model": BASE, "prompt": "uv", "suffix": "b", "temperature": 0, "random_seed": 1});
    let reply: Value = ask(body.clone()).await.unwrap().json().await.unwrap();
    let choice = &reply["choices"][0];
    assert_eq!((&reply["object"], &choice["finish_reason"]), (&json!("chat.completion"), &json!("stop")));
    assert_eq!(choice["message"]["content"], "abcdefghijklmnopqrstuvwxyz", "to the end of what is missing");

    (body["stream"], body["suffix"], body["max_tokens"]) = (json!(true), json!(null), json!(4));
    let events = ask(body).await.unwrap().text().await.unwrap();
    let data: Vec<_> = events.split("\n\n").filter_map(|event| event.strip_prefix("data: ")).collect();
    let (done, chunks) = data.split_last().unwrap();
    let chunks: Vec<Value> = chunks.iter().map(|chunk| serde_json::from_str(chunk).unwrap()).collect();
    let content = |chunk: &Value| chunk["choices"][0]["delta"]["content"].as_str().unwrap().to_owned();
    assert_eq!((*done, chunks.iter().map(content).collect::<String>().as_str()), ("[DONE]", "abcd"));
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "length");

    for (body, param) in [
        (json!({"prompt": "a", "min_tokens": 3}), "min_tokens"),
        (json!({"prompt": [1]}), "prompt"),
        (json!({}), "prompt"),
    ] {
        let refused = ask(body).await.unwrap();
        assert_eq!(refused.status(), 400);
        assert_eq!(refused.json::<Value>().await.unwrap()["error"]["param"], param);
    }
    let accepted = ask(json!({"prompt": "a", "min_tokens": 0, "max_tokens": 1})).await.unwrap();
    assert_eq!(accepted.status(), 200);
}
