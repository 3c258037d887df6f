//! Traces as a collector gets them from the command.

mod adapter_server;
mod running;
mod tiny;

use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use axum::body::Bytes;
use axum::http::HeaderMap;
use axum::routing::post;
use axum::{Json, Router};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::{KeyValue, any_value};
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use running::Running;

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CALLER: &str = "00f067aa0ba902b7";
const LONG: Duration = Duration::from_secs(120);

/// Takes what `lorry` exports to `/v1/traces` of the URL that it gives.
async fn collector() -> (String, Receiver<Span>) {
    collector_of(&[("service.name", "lorry")], None).await
}

/// As [`collector`], of what has these attributes, with a header that the collector asks for.
async fn collector_of(
    expected: &'static [(&'static str, &'static str)],
    header: Option<(&'static str, &'static str)>,
) -> (String, Receiver<Span>) {
    let (sender, spans) = channel();
    let collect = async move |headers: HeaderMap, body: Bytes| {
        if let Some((name, value)) = header {
            assert_eq!(headers[name], value);
        }
        let request = ExportTraceServiceRequest::decode(body).unwrap();
        for resource in request.resource_spans {
            let attributes = resource.resource.unwrap().attributes;
            for (key, value) in expected {
                assert_eq!(text(&attributes, key).as_deref(), Some(*value));
            }
            let exported = resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
            exported.for_each(|span| sender.send(span).unwrap());
        }
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/v1/traces", listener.local_addr().unwrap());
    tokio::spawn(async { axum::serve(listener, Router::new().route("/v1/traces", post(collect))).await });
    (url, spans)
}

fn value<'a>(attributes: &'a [KeyValue], key: &str) -> Option<&'a any_value::Value> {
    let attribute = attributes.iter().find(|attribute| attribute.key == key)?;
    attribute.value.as_ref()?.value.as_ref()
}

fn text(attributes: &[KeyValue], key: &str) -> Option<String> {
    match value(attributes, key)? {
        any_value::Value::StringValue(text) => Some(text.clone()),
        other => panic!("{key}: {other:?}"),
    }
}

fn number(span: &Span, key: &str) -> i64 {
    match value(&span.attributes, key) {
        Some(any_value::Value::IntValue(number)) => *number,
        other => panic!("{key}: {other:?}"),
    }
}

fn hexadecimal(id: &[u8]) -> String {
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_is_a_span_below_its_callers_with_its_phases_below_it() {
    let (url, spans) = collector().await;
    let server = Running::start(
        &format!("[log]\nformat = 'json'\n[traces]\nurl = '{url}'"),
        &[("OTEL_BSP_SCHEDULE_DELAY", "50")],
    );
    let request = server.completion(json!({})).header("traceparent", format!("00-{TRACE}-{CALLER}-01"));
    let reply: Value = request.send().await.unwrap().json().await.unwrap();
    let spans = [(); 4].map(|()| spans.recv_timeout(LONG).expect("four spans come"));
    let named = |name: &str| spans.iter().find(|span| span.name == name).unwrap_or_else(|| panic!("{name}: {spans:?}"));
    let [request, queue, prefill, decode] = ["POST /v1/completions", "queue", "prefill", "decode"].map(named);
    assert_eq!(hexadecimal(&request.parent_span_id), CALLER);
    for span in &spans {
        assert_eq!(hexadecimal(&span.trace_id), TRACE);
        assert_eq!(text(&span.attributes, "gen_ai.response.model").as_deref(), Some("tiny-a"));
        let generation = text(&span.attributes, "lorry.adapter.generation");
        assert_eq!(generation.as_deref(), reply["adapter"]["generation"].as_str());
    }
    for phase in [queue, prefill, decode] {
        assert_eq!(phase.parent_span_id, request.span_id);
    }
    // Each phase ends where the next begins, within the request.
    let times = [
        request.start_time_unix_nano,
        queue.start_time_unix_nano,
        prefill.start_time_unix_nano,
        decode.start_time_unix_nano,
        decode.end_time_unix_nano,
        request.end_time_unix_nano,
    ];
    assert!(times.is_sorted(), "{times:?}");
    assert_eq!((queue.end_time_unix_nano, prefill.end_time_unix_nano), (times[2], times[3]));
    assert_eq!(number(request, "http.response.status_code"), 200);
    let usage = &reply["usage"];
    assert_eq!(json!(number(prefill, "gen_ai.usage.input_tokens")), usage["prompt_tokens"]);
    assert_eq!(json!(number(prefill, "lorry.cached_tokens")), usage["prompt_tokens_details"]["cached_tokens"]);
    assert_eq!(json!(number(decode, "gen_ai.usage.output_tokens")), usage["completion_tokens"]);
    assert_eq!(server.request_line()["trace_id"], TRACE);
}

#[tokio::test(flavor = "multi_thread")]
async fn spans_have_the_names_of_routes_whatever_is_in_their_paths() {
    let (url, spans) = collector().await;
    let server = Running::start(&format!("[traces]\nurl = '{url}'"), &[("OTEL_BSP_SCHEDULE_DELAY", "50")]);
    for (method, path, name) in [
        ("GET", "/v1/adapters/a", "GET /v1/adapters/{name}"),
        ("GET", "/adapters/b/", "GET /adapters/{name}"),
        ("POST", "/v1/adapters/a/load", "POST /v1/adapters/{name}/load"),
        ("GET", "/v1/models/tiny/a", "GET /v1/models/{*id}"),
        ("GET", "/assets/none.js", "GET /assets/{name}"),
        ("HEAD", "/api/blobs/sha256:0", "HEAD /api/blobs/{digest}"),
        // What no route is for, and what a route is not for.
        ("GET", "/wp-login/1", "GET"),
        ("PATCH", "/v1/adapters/a", "PATCH /v1/adapters/{name}"),
        ("BREW", "/v1/adapters/a", "HTTP /v1/adapters/{name}"),
        ("BREW", "/coffee", "HTTP"),
    ] {
        let request = server.client.request(method.parse().unwrap(), format!("{}{path}", server.url));
        request.send().await.unwrap();
        let span = spans.recv_timeout(LONG).unwrap();
        let attribute = |name: &str| text(&span.attributes, name);
        assert_eq!(span.name, name, "{method} {path}");
        assert_eq!(attribute("http.route").as_deref(), name.split_once(' ').map(|(_, route)| route));
        assert_eq!(attribute("url.path").as_deref(), Some(path.trim_end_matches('/')));
        let known = if method == "BREW" { "_OTHER" } else { method };
        assert_eq!(attribute("http.request.method").as_deref(), Some(known));
        assert_eq!(attribute("http.request.method_original").as_deref(), (method == "BREW").then_some(method));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_is_not_sampled_and_a_server_without_a_collector_send_nothing() {
    let (url, spans) = collector().await;
    let server = Running::start(&format!("[traces]\nurl = '{url}'"), &[("OTEL_BSP_SCHEDULE_DELAY", "50")]);
    let unsampled = server.completion(json!({})).header("traceparent", format!("00-{TRACE}-{CALLER}-00"));
    unsampled.send().await.unwrap();
    // What is no context begins a trace of its own, whose spans are the first that come.
    server.completion(json!({})).header("traceparent", "nonsense").send().await.unwrap();
    let first = spans.recv_timeout(LONG).unwrap();
    assert_ne!(hexadecimal(&first.trace_id), TRACE);
    drop(server);
    let off = Running::start("[log]\nformat = 'json'", &[]);
    let request = off.completion(json!({})).header("traceparent", format!("00-{TRACE}-{CALLER}-01"));
    request.send().await.unwrap();
    assert_eq!(off.request_line()["trace_id"], TRACE, "the log has it all the same");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_opentelemetry_calls_a_service_in_the_environment_it_is_called() {
    let attributes = "service.name=south,deployment.environment=test";
    for (environment, expected) in [
        (("OTEL_SERVICE_NAME", "north"), &[("service.name", "north")][..]),
        (("OTEL_RESOURCE_ATTRIBUTES", attributes), &[("service.name", "south"), ("deployment.environment", "test")]),
    ] {
        let (url, spans) = collector_of(expected, Some(("x-tenant", "one"))).await;
        let environment =
            [environment, ("OTEL_BSP_SCHEDULE_DELAY", "50"), ("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=one")];
        let server = Running::start(&format!("[traces]\nurl = '{url}'"), &environment);
        assert!(server.completion(json!({})).send().await.unwrap().status().is_success());
        spans.recv_timeout(LONG).unwrap_or_else(|_| panic!("nothing comes that is called {expected:?}"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_embedding_endpoint_is_asked_in_the_trace_of_the_request() {
    let (sender, traceparents) = channel();
    let embed = async move |headers: HeaderMap, Json(request): Json<Value>| {
        let header = |name: &str| headers.get(name).map(|value| value.to_str().unwrap().to_owned());
        sender.send((header("traceparent"), header("tracestate"))).unwrap();
        let texts = request["input"].as_array().unwrap().iter().enumerate();
        Json(json!({"data": texts.map(|(index, _)| json!({"index": index, "embedding": [1.0]})).collect::<Vec<_>>()}))
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/v1/embeddings", listener.local_addr().unwrap());
    tokio::spawn(async { axum::serve(listener, Router::new().route("/v1/embeddings", post(embed))).await });
    let stores = tempfile::tempdir().unwrap();
    std::fs::write(stores.path().join("s.jsonl"), "{\"instruction\": \"a\", \"code\": \"b\"}\n").unwrap();
    // Whether traces are sent from here or not.
    let server = Running::start(&format!("[icl]\ndir = {:?}\nembedding_url = '{url}'", stores.path()), &[]);
    let ask = async |traceparent: Option<&str>| {
        let request =
            server.completion(json!({"prompt_format": "paper-rev", "icl": {"store": "s", "k": 1, "select": "hybrid"}}));
        let request = match traceparent {
            Some(traceparent) => request.header("traceparent", traceparent).header("tracestate", "a=b"),
            None => request,
        };
        let reply = request.send().await.unwrap();
        assert!(reply.status().is_success(), "{}", reply.text().await.unwrap());
    };
    let traceparent = format!("00-{TRACE}-{CALLER}-01");
    ask(Some(&traceparent)).await;
    // That of the store's examples, and that of the request.
    for _ in 0..2 {
        let told = traceparents.recv_timeout(LONG).unwrap();
        assert_eq!(told, (Some(traceparent.clone()), Some("a=b".to_owned())));
    }
    ask(None).await;
    assert_eq!(traceparents.recv_timeout(LONG).unwrap().0, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_is_not_there_costs_a_warning_and_no_request() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/v1/traces", listener.local_addr().unwrap());
    drop(listener);
    let server = Running::start(&format!("[traces]\nurl = '{url}'"), &[("OTEL_BSP_SCHEDULE_DELAY", "50")]);
    for _ in 0..2 {
        assert!(server.completion(json!({})).send().await.unwrap().status().is_success());
        server.line_with("traces.url");
    }
}
