//! Requests that nobody waits for any longer.

mod adapter_server;
mod tiny;

use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use reqwest::Method;
use serde_json::json;
use tokio::time::timeout;

use adapter_server::Server;

/// Streams of the base and of two adapters that are left at any moment, some before they are begun; the queue is full at times.
#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_requests_that_are_opened_and_left_hold_nothing() {
    const MAX_QUEUED: usize = 8;
    let settings = format!("[engine]\nmax_queued = {MAX_QUEUED}\nmax_sequences = 4");
    let server = Arc::new(Server::start(&settings).await);
    let leave = |number: u64| {
        let server = Arc::clone(&server);
        async move {
            let model = [json!("tiny"), json!("a"), json!("b")][number as usize % 3].clone();
            let body = json!({"model": model, "prompt": format!("def f{number}(x):"), "n": 1 + number % 2, "stream": true,
                "max_tokens": 200, "ignore_eos": true});
            let request = server.request(Method::POST, "/v1/completions").body(body.to_string());
            let read = async {
                let mut response = request.send().await.unwrap();
                while let Ok(Some(_)) = response.chunk().await {}
            };
            let _ = timeout(Duration::from_micros(number * 7919 % 40_000), read).await;
        }
    };
    for first in (0..1000).step_by(50) {
        join_all((first..first + 50).map(leave)).await;
    }

    let held =
        ["vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc", "lorry_adapter_leases"];
    let is_zero = |metrics: &str, name: &str| {
        let mut values = metrics.lines().filter_map(|line| line.strip_prefix(name)).peekable();
        values.peek().is_some() && values.all(|value| value.ends_with(" 0"))
    };
    server.until("/metrics", |metrics| held.iter().all(|name| is_zero(metrics.as_str().unwrap(), name))).await;
    // As many permits as there were.
    let replies = join_all((0..MAX_QUEUED).map(|_| server.complete(json!({"model": "a"})))).await;
    assert!(replies.iter().all(|reply| reply["choices"] == replies[0]["choices"]));
}
