//! Log-probabilities over a real socket.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn echo_scores_token_ids_without_generating() {
    let server = Server::quick().await;
    let ids: Vec<u32> = "abq".bytes().map(u32::from).collect();
    let body = json!({"prompt": ids, "echo": true, "max_tokens": 0, "logprobs": 1, "temperature": 0});
    let reply = server.complete(body.clone()).await;
    let logprobs = &reply["choices"][0]["logprobs"];
    assert_eq!((text(&reply), &reply["choices"][0]["finish_reason"]), ("abq", &json!("length")));
    assert_eq!(logprobs["tokens"], json!(["a", "b", "q"]));
    assert_eq!(logprobs["text_offset"], json!([0, 1, 2]));
    assert_eq!((&logprobs["token_logprobs"][0], &logprobs["top_logprobs"][0]), (&Value::Null, &Value::Null));
    // The model expected b, and c where q stands.
    let top = |index: usize| logprobs["top_logprobs"][index].as_object().unwrap();
    assert_eq!(top(1).keys().collect::<Vec<_>>(), ["b"]);
    assert_eq!(top(2).keys().collect::<Vec<_>>(), ["c", "q"]);
    assert_eq!(top(2)["q"], logprobs["token_logprobs"][2]);
    assert!(top(2)["q"].as_f64().unwrap() < top(2)["c"].as_f64().unwrap());

    let events = server.stream(body).await;
    assert_eq!(serde_json::from_str::<Value>(&events[0]).unwrap()["choices"][0]["logprobs"], *logprobs);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_token_keeps_its_log_probability_echoed_plain_and_streamed() {
    let server = Server::quick().await;
    // What lm-eval sends: it takes all but the last record, which is the one token it did not ask for.
    let body = json!({"prompt": "yz", "echo": true, "max_tokens": 1, "logprobs": 1, "temperature": 0});
    let reply = server.complete(body.clone()).await;
    let choice = &reply["choices"][0];
    assert_eq!((text(&reply), &choice["finish_reason"]), ("yz", &json!("stop")));
    assert_eq!(choice["logprobs"]["tokens"], json!(["y", "z", "<|end|>"]));
    assert_eq!(choice["logprobs"]["text_offset"], json!([0, 1, 2]));
    let logprobs = choice["logprobs"]["token_logprobs"].as_array().unwrap();
    assert!(logprobs[1..].iter().all(|logprob| logprob.as_f64().unwrap() > -0.1), "{logprobs:?}");
    assert_eq!(choice["logprobs"]["top_logprobs"][2]["<|end|>"], logprobs[2]);
    assert_eq!(reply["usage"]["completion_tokens"], 0, "it is no output");

    let streamed = server.stream(body).await;
    let chunks = streamed.iter().filter_map(|event| serde_json::from_str::<Value>(event).ok());
    let tokens = chunks.filter_map(|chunk| chunk["choices"][0]["logprobs"]["tokens"].as_array().cloned()).flatten();
    assert_eq!(tokens.collect::<Vec<_>>(), ["y", "z", "<|end|>"]);

    let unasked = server.complete(json!({"prompt": "z", "max_tokens": 4, "temperature": 0})).await;
    assert_eq!(unasked["choices"][0], json!({"index": 0, "text": "", "logprobs": null, "finish_reason": "stop"}));
}
