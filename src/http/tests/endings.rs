//! How replies end when the engine does: each in the form that its clients know, with a status where none has been sent.

use futures::stream::pending;

use super::*;
use crate::service::{self, ServiceError};

/// Where each interface streams, what it is sent there, what a reply that was cut off ends with, and where a refusal has its
/// message.
fn interfaces(prompt: &str) -> Vec<(&'static str, Value, &'static str, &'static str)> {
    let messages = json!([{"role": "user", "content": prompt}]);
    let openai = r#"data: {"error":{"message":"generation failed: "#;
    vec![
        ("/v1/completions", json!({"prompt": prompt}), openai, "/error/message"),
        ("/v1/chat/completions", json!({"messages": messages}), openai, "/error/message"),
        ("/v1/fim/completions", json!({"prompt": prompt, "suffix": "z"}), openai, "/error/message"),
        ("/v1/responses", json!({"input": prompt}), "event: response.failed\n", "/error/message"),
        ("/v1/messages", json!({"messages": messages, "max_tokens": 50}), "event: error\n", "/error/message"),
        ("/v1/compare", json!({"prompt": prompt, "arms": [{"name": "a"}, {"name": "b"}]}), "data: ", "/error/message"),
        ("/completion", json!({"prompt": prompt}), openai, "/error/message"),
        ("/infill", json!({"input_prefix": prompt, "input_suffix": "z"}), openai, "/error/message"),
        ("/api/generate", json!({"model": BASE, "prompt": prompt}), r#"{"error":"generation failed: "#, "/error"),
        ("/api/chat", json!({"model": BASE, "messages": messages}), r#"{"error":"generation failed: "#, "/error"),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_engine_tells_streams_that_have_begun_refuses_those_that_have_not_and_ends_the_server() {
    let (begun, failing) = (interfaces("0"), interfaces(PANIC));
    for ((path, mut begun, last, _), (_, mut failing, _, message)) in begun.into_iter().zip(failing) {
        let server = Server::able_in(Duration::from_millis(10)).await;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let serving = super::super::Server::start(listener, &server.state.config.server).unwrap();
        let service = service::run(serving, server.state.clone(), server.engine.clone(), pending());
        let service = tokio::spawn(service);
        let post = |body: &mut Value| {
            body["stream"] = json!(true);
            server.client.post(format!("{url}{path}")).body(body.to_string()).send()
        };

        let begun = post(&mut begun).await.unwrap();
        assert_eq!(begun.status(), StatusCode::OK, "{path}: {}", begun.text().await.unwrap());
        let refused = post(&mut failing).await.unwrap();
        assert_eq!(refused.status(), StatusCode::INTERNAL_SERVER_ERROR, "{path}");
        let refusal: Value = refused.json().await.unwrap();
        assert!(refusal.pointer(message).unwrap().as_str().unwrap().contains("a bad token"), "{path}: {refusal}");
        let events = begun.text().await.unwrap();
        let event = events.trim_end().rsplit(if path.starts_with("/api") { "\n" } else { "\n\n" }).next().unwrap();
        assert!(event.starts_with(last) && event.contains("a bad token"), "{path}: {events}");

        let health = server.request(Method::GET, "/health").send().await.unwrap();
        assert_eq!(health.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(health.headers()["retry-after"], "1");
        let ended = service.await.unwrap();
        assert!(matches!(ended, Err(ServiceError::EngineFailed)), "{ended:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_finds_the_engine_gone_has_failed_and_was_not_cancelled() {
    let server = Server::quick().await;
    server.engine.stop();
    server.until(|server| !server.engine.is_alive()).await;
    let ended =
        |reason: &str| server.metrics.of_adapter("base").requests().ended_total.with_label_values(&[reason]).get();
    let arms = json!([{"name": "a"}, {"name": "b"}]);
    for (path, body) in
        [("/v1/completions", json!({"prompt": "a", "n": 2})), ("/v1/compare", json!({"prompt": "a", "arms": arms}))]
    {
        let refused = server.request(Method::POST, path).body(body.to_string()).send().await.unwrap();
        assert_eq!(refused.status(), StatusCode::SERVICE_UNAVAILABLE, "{path}");
    }
    assert_eq!((ended("error"), ended("cancelled")), (4, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_ends_with_a_failed_reply_has_failed_and_was_not_cancelled() {
    let arms = json!([{"name": "a"}, {"name": "b"}, {"name": "c"}]);
    let requests = [
        ("/v1/completions", json!({"prompt": PANIC, "n": 3})),
        ("/v1/completions", json!({"prompt": ["0", PANIC, "1"]})),
        ("/v1/completions", json!({"prompt": PANIC, "n": 3, "best_of": 3, "use_beam_search": true})),
        ("/v1/compare", json!({"prompt": PANIC, "arms": arms})),
        ("/v1/compare", json!({"prompt": PANIC, "arms": arms, "on_error": "skip"})),
    ];
    for ((path, mut body), is_streamed) in
        requests.iter().cloned().flat_map(|asked| [(asked.clone(), false), (asked, true)])
    {
        let server = Server::start(&["<|end|>"], Duration::from_millis(10)).await;
        body["stream"] = json!(is_streamed);
        let reply = server.request(Method::POST, path).body(body.to_string()).send().await.unwrap();
        reply.text().await.unwrap();
        let base = server.metrics.of_adapter("base");
        let ended = |reason: &str| base.requests().ended_total.with_label_values(&[reason]).get();
        server.until(|_| base.requests().running.get() + base.requests().waiting.get() == 0).await;
        assert_eq!((ended("error"), ended("cancelled")), (3, 0), "{path} {body}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn told_twice_to_stop_the_server_cuts_off_its_streams_with_an_error() {
    let server = Server::slow().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/v1/completions", listener.local_addr().unwrap());
    let serving = super::super::Server::start(listener, &server.state.config.server).unwrap();
    let (signal, signals) = tokio::sync::mpsc::unbounded_channel();
    let signals =
        Box::pin(futures::stream::unfold(signals, async |mut signals| Some((signals.recv().await?, signals))));
    let service = tokio::spawn(service::run(serving, server.state.clone(), server.engine.clone(), signals));
    let body = json!({"prompt": "0", "max_tokens": 60, "stream": true, "temperature": 0}).to_string();
    let begun = server.client.post(&url).body(body).send().await.unwrap();
    signal.send(()).unwrap();
    server.until(|server| !server.state.generation.is_accepting()).await;
    assert!(server.engine.is_alive() && !service.is_finished());
    signal.send(()).unwrap();
    let events = begun.text().await.unwrap();
    assert!(events.contains(r#""text":"0""#) && !events.contains("[DONE]"), "{events}");
    let last: Value = serde_json::from_str(events.trim_end().rsplit("data: ").next().unwrap()).unwrap();
    assert_eq!(last["error"]["code"], "overloaded", "{events}");
    service.await.unwrap().unwrap();
}
