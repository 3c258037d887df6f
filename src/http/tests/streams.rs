//! What a stream holds, and in which order.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_has_the_plain_text_then_the_reason_then_the_usage_then_done() {
    let server = Server::quick().await;
    let body = json!({"prompt": "<", "temperature": 0, "stream_options": {"include_usage": true}, "max_tokens": 40});
    let mut plain_body = body.clone();
    plain_body["stream_options"] = Value::Null;
    let plain = server.complete(plain_body).await;
    assert_eq!(text(&plain), "éabcdefghijklmnopqrstuvwxyz");
    assert_eq!(plain["choices"][0]["finish_reason"], "stop");

    let events = server.stream(body).await;
    let (done, events) = events.split_last().unwrap();
    assert_eq!(done, "[DONE]");
    let chunks: Vec<Value> = events.iter().map(|event| serde_json::from_str(event).unwrap()).collect();
    let [deltas @ .., finish, usage] = chunks.as_slice() else { panic!("{chunks:?}") };
    let streamed: String = deltas.iter().map(text).collect();
    assert_eq!(streamed, text(&plain));
    assert_eq!(deltas.len(), 27, "one event per character, none for half of one");
    assert!(deltas.iter().all(|chunk| chunk["choices"][0]["finish_reason"].is_null() && chunk["usage"].is_null()));
    assert_eq!(finish["choices"][0]["finish_reason"], "stop");
    assert_eq!((&usage["choices"], &usage["usage"]), (&json!([]), &plain["usage"]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_tells_the_usage_of_each_choice_so_far_where_that_is_asked_for() {
    let server = Server::quick().await;
    let options = json!({"include_usage": true, "continuous_usage_stats": true});
    let body = json!({"prompt": "ab", "n": 2, "max_tokens": 3, "temperature": 0, "stream_options": options});
    let mut events = server.stream(body).await;
    assert_eq!(events.pop().as_deref(), Some("[DONE]"));
    let chunks: Vec<Value> = events.iter().map(|event| serde_json::from_str(event).unwrap()).collect();
    let (last, chunks) = chunks.split_last().unwrap();
    let counts = |usage: &Value| {
        ["prompt_tokens", "completion_tokens", "total_tokens"].map(|name| usage[name].as_u64().unwrap())
    };
    assert_eq!((&last["choices"], counts(&last["usage"])), (&json!([]), [2, 6, 8]));
    for index in 0..2 {
        let of_choice = chunks.iter().filter(|chunk| chunk["choices"][0]["index"] == index);
        let told: Vec<_> = of_choice.map(|chunk| counts(&chunk["usage"])).collect();
        assert_eq!(told, [[2, 1, 3], [2, 2, 4], [2, 3, 5], [2, 3, 5]], "each token, and the reason");
    }
}
