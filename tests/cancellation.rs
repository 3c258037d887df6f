//! Requests that nobody waits for any longer.

mod adapter_server;
mod tiny;

use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use adapter_server::{Server, write_adapter_of_rank};

/// Two of them fill the memory for adapters.
const LARGE: [&str; 4] = ["large-0", "large-1", "large-2", "large-3"];
const LARGE_RANK: usize = 200;

/// Path and body of a request that takes longer than anybody here waits for it.
fn long_request(number: u64) -> (&'static str, Value) {
    let prompt = format!("def f{number}(x):");
    let large = LARGE[number as usize / 8 % LARGE.len()];
    let mut body = json!({"prompt": prompt, "max_tokens": 200, "ignore_eos": true});
    let (path, own) = match number % 8 {
        0 => ("/v1/completions", json!({"model": "tiny", "stream": true})),
        1 => ("/v1/completions", json!({"model": "a", "stream": true, "n": 2})),
        2 => ("/v1/completions", json!({"model": "b"})),
        // In the way of all others that are in memory.
        3 | 4 => ("/v1/completions", json!({"model": large, "stream": true})),
        5 => ("/v1/completions", json!({"model": "a", "use_beam_search": true, "n": 2, "ignore_eos": null})),
        6 => ("/v1/compare", json!({"arms": [{"name": "base", "model": "tiny"}, {"name": large, "model": large}]})),
        // To be compiled, and computed in several steps.
        _ => {
            let (prompt, regex) = (prompt.repeat(10), format!("([a-z]{{{}}} ){{9,}}", 1 + number / 8));
            ("/v1/completions", json!({"model": "b", "prompt": prompt, "guided_regex": regex, "stream": true}))
        }
    };
    body.as_object_mut().unwrap().extend(own.as_object().unwrap().clone());
    (path, body)
}

/// Requests of all kinds, for the base and for more adapters than there is memory for, are left at any moment: some before they
/// are read, or while they wait for an adapter, a grammar, their turn. The queue is full at times.
#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_requests_that_are_opened_and_left_hold_nothing() {
    const MAX_QUEUED: usize = 24;
    let settings = format!(
        "[engine]\nmax_queued = {MAX_QUEUED}\nmax_sequences = 4\nmax_batch_rows = 32\n\
         [adapters]\nhost_budget_mib = 1\nmax_wait_seconds = 1"
    );
    let server = Arc::new(Server::start(&settings).await);
    for (seed, name) in LARGE.iter().enumerate() {
        write_adapter_of_rank(&server.root().join(name), seed as u64 + 10, LARGE_RANK);
    }
    server.until("/v1/models", |models| LARGE.iter().all(|name| models.to_string().contains(name))).await;
    let all_kinds = join_all((0..8).map(|number| {
        let (path, mut body) = long_request(number);
        body["max_tokens"] = json!(1);
        server.send(server.request(Method::POST, path).body(body.to_string()))
    }));
    let refused: Vec<_> = all_kinds.await.into_iter().filter(|(status, _)| !status.is_success()).collect();
    assert!(refused.is_empty(), "they are served where somebody waits: {refused:?}");

    let leave = |number: u64| {
        let server = Arc::clone(&server);
        async move {
            let (path, body) = long_request(number);
            let time = Duration::from_micros(number * 7919 % 60_000);
            if number % 10 == 9 {
                let mut connection = TcpStream::connect(server.address()).await.unwrap();
                let head = format!("POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9999\r\n\r\n{body}");
                connection.write_all(head.as_bytes()).await.unwrap();
                return sleep(time).await;
            }
            let request = server.request(Method::POST, path).body(body.to_string());
            let read = async {
                let mut response = request.send().await.unwrap();
                while let Ok(Some(_)) = response.chunk().await {}
            };
            let _ = timeout(time, read).await;
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
    let metrics =
        server.until("/metrics", |metrics| held.iter().all(|name| is_zero(metrics.as_str().unwrap(), name))).await;
    let metrics = metrics.as_str().unwrap();
    for phase in ["queue", "prefill", "decode"] {
        assert!(!is_zero(metrics, &format!("lorry_cancelled_total{{phase=\"{phase}\"}}")), "some are left in {phase}");
    }
    // As many permits as there were.
    let replies = join_all((0..MAX_QUEUED).map(|_| server.complete(json!({"model": "a"})))).await;
    assert!(replies.iter().all(|reply| reply["choices"] == replies[0]["choices"]));
    for name in LARGE {
        server.complete(json!({"model": name})).await;
    }
}
