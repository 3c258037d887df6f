//! What is sent while a stream has nothing to say.

use super::*;

/// Longer than a stream stays silent where the shortest keep-alive is asked for.
const STEP: Duration = Duration::from_millis(1500);

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_waits_says_that_it_is_alive_where_that_is_asked_for_and_lines_never_do() {
    let silent = Server::start(&["<|end|>"], STEP).await;
    let mut state = silent.state.clone();
    let mut config = Config::clone(&state.config);
    config.server.sse_keep_alive_seconds = 1;
    state.config = Arc::new(config);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let alive = super::super::Server::start(listener, &state.config.server).unwrap();
    let _served = tokio::spawn(alive.serve(state, std::future::pending()));
    // The others wait in the queue for the end of a step in which they have no part.
    let first = json!({"prompt": "a", "max_tokens": 2, "stream": true});
    let _first = silent.completions(first).send().await.unwrap();
    silent.until(|server| server.engine.state().running == 1).await;
    let text = async |url: &str, path: &str| {
        let body = json!({"model": BASE, "prompt": "a", "max_tokens": 1, "stream": true});
        let request = silent.client.post(format!("{url}{path}")).body(body.to_string());
        request.send().await.unwrap().text().await.unwrap()
    };
    let (events, silent_events) = (text(&url, "/v1/completions"), text(&silent.url, "/v1/completions"));
    let (events, silent_events, lines) = tokio::join!(events, silent_events, text(&url, "/api/generate"));
    let is_comment = |event: &&str| *event == ": keep-alive";
    let (comments, data): (Vec<&str>, Vec<&str>) = events.split_terminator("\n\n").partition(is_comment);
    assert!(!comments.is_empty() && events.starts_with(": "), "{events}");
    assert!(data.iter().all(|event| event.starts_with("data: ")), "{events}");
    assert_eq!(data.last(), Some(&"data: [DONE]"));
    assert!(lines.lines().all(|line| serde_json::from_str::<Value>(line).unwrap()["model"].is_string()), "{lines}");
    assert!(silent_events.split_terminator("\n\n").all(|event| event.starts_with("data: ")), "{silent_events}");
}
