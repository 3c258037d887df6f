//! `server.max_request_seconds`: whatever a request waits for, it ends.

use super::*;
use crate::engine::request::FinishReason;
use crate::generation::{Access, GenerationError};
use crate::http::completions::CompletionShape;
use crate::http::fields::Fields;
use crate::http::reply::ReplyShape;

/// A step of so many milliseconds, and two seconds for each request.
async fn server(step_ms: u64) -> Server {
    let no_chat = Err(PromptError::NoChatTemplate);
    Server::start_within(&["<|end|>"], Duration::from_millis(step_ms), NO_EXPERIMENTS, no_chat, 2).await
}

/// Of which all steps together take longer.
fn long() -> Value {
    json!({"prompt": "0", "max_tokens": 60, "temperature": 0})
}

#[tokio::test(flavor = "multi_thread")]
async fn what_takes_too_long_ends_with_what_there_is() {
    let server = server(100).await;
    let reply = server.complete(long()).await;
    assert_eq!(reply["choices"][0]["finish_reason"], "length");
    let num_tokens = reply["usage"]["completion_tokens"].as_u64().unwrap();
    assert!((1..60).contains(&num_tokens) && text(&reply).len() as u64 == num_tokens, "{reply}");
    server.until_idle().await;

    let mut two = long();
    two["n"] = json!(2);
    let events = server.stream(two).await;
    let num_finished = events.iter().filter(|event| event.contains(r#""finish_reason":"length""#)).count();
    assert_eq!((num_finished, events.last().unwrap().as_str()), (2, "[DONE]"));
    server.until_idle().await;

    let infill = json!({"prompt": "0", "n_predict": 60, "temperature": 0});
    let reply = server.request(Method::POST, "/completion").body(infill.to_string()).send().await.unwrap();
    assert_eq!(reply.json::<Value>().await.unwrap()["stop_type"], "limit");
    server.until_idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_takes_too_long_and_has_nothing_is_an_error_of_its_own() {
    let server = server(2500).await;
    let response = server.completions(long()).send().await.unwrap();
    assert_eq!(response.status(), StatusCode::GATEWAY_TIMEOUT);
    assert!(response.headers().get("retry-after").is_none());
    assert_eq!(response.json::<Value>().await.unwrap()["error"]["code"], "deadline_exceeded");
    // A stream too: its header waits for its first event.
    let mut streamed = long();
    streamed["stream"] = json!(true);
    let response = server.completions(streamed).send().await.unwrap();
    assert_eq!(response.status(), StatusCode::GATEWAY_TIMEOUT);
    assert_eq!(response.json::<Value>().await.unwrap()["error"]["code"], "deadline_exceeded");
    let message = json!({"model": BASE, "max_tokens": 60, "prompt_format": "short",
        "messages": [{"role": "user", "content": "0"}]});
    let refusal = server.request(Method::POST, "/v1/messages").body(message.to_string()).send().await.unwrap();
    assert_eq!(refusal.status(), StatusCode::GATEWAY_TIMEOUT);
    assert_eq!(refusal.json::<Value>().await.unwrap()["error"]["type"], "timeout_error");
    server.until_idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_reads_ends_in_time_too() {
    let server = server(100).await;
    let start = async |body: Value| {
        let request = CompletionShape::parse(&Fields::parse(body.to_string().as_bytes()).unwrap()).unwrap();
        server.state.generation.start(request, &Access::All).await.unwrap()
    };
    let mut two = long();
    two["n"] = json!(2);
    for body in [long(), two] {
        let generated = start(body).await;
        // Its places are given back, and nothing is computed for it any more.
        server.until_idle().await;
        for sequence in generated.sequences {
            let completed = sequence.collect().await.unwrap();
            assert_eq!(completed.reason, FinishReason::Length);
            assert!((1..60).contains(&completed.usage.num_output_tokens), "{completed:?}");
        }
    }
    let mut beams = long();
    (beams["use_beam_search"], beams["n"]) = (json!(true), json!(2));
    let generated = start(beams).await;
    server.until_idle().await;
    for sequence in generated.sequences {
        let error = sequence.collect().await.unwrap_err();
        assert!(matches!(error, GenerationError::DeadlineExceeded { .. }), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_has_ended_in_time_is_as_ever() {
    let server = server(0).await;
    let reply = server.complete(json!({"prompt": "x", "temperature": 0})).await;
    assert_eq!((text(&reply), &reply["choices"][0]["finish_reason"]), ("yz", &json!("stop")));
}

#[tokio::test(flavor = "multi_thread")]
async fn beams_and_arms_end_in_time_too() {
    let server = server(100).await;
    let mut beams = long();
    (beams["use_beam_search"], beams["n"]) = (json!(true), json!(2));
    let response = server.completions(beams).send().await.unwrap();
    assert_eq!(response.status(), StatusCode::GATEWAY_TIMEOUT);
    server.until_idle().await;

    let mut arms = long();
    arms["arms"] = json!([{"name": "a", "model": BASE}, {"name": "b", "model": BASE}]);
    let response = server.request(Method::POST, "/v1/compare").body(arms.to_string()).send().await.unwrap();
    let reply: Value = response.json().await.unwrap();
    assert!(reply["arms"].as_array().unwrap().iter().all(|arm| arm["finish_reason"] == "length"), "{reply}");
    server.until_idle().await;
}
