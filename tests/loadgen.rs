//! `lorry loadgen` against servers that are slow, stuck, full or broken, and against lorry.

mod adapter_server;
mod tiny;

use std::convert::Infallible;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use adapter_server::Server;
use axum::Router;
use axum::body::Body;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use clap::Parser;
use futures::stream;
use lorry::loadgen::{LoadgenArgs, measure};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::Barrier;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    args: LoadgenArgs,
}

/// What `lorry loadgen` prints, and what its log holds.
async fn attack(url: &str, options: &[&str]) -> (Vec<Value>, Vec<Value>) {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log.jsonl");
    let command = ["loadgen", "--url", url, "--log", log.to_str().unwrap()];
    let Cli { args } = Cli::try_parse_from(command.iter().chain(options)).unwrap();
    let mut out = Vec::new();
    measure(&args, &mut out).await.unwrap();
    let lines = |text: &str| text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    (lines(std::str::from_utf8(&out).unwrap()), lines(&fs::read_to_string(log).unwrap()))
}

/// A server of completions that answers with what `answer` gives.
async fn serve<F: Future<Output = Response> + Send + 'static>(
    answer: impl Fn(Value) -> F + Clone + Send + Sync + 'static,
) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let handler = move |body: String| answer(serde_json::from_str(&body).unwrap());
    let router = Router::new().route("/v1/completions", post(handler));
    tokio::spawn(async { axum::serve(listener, router).await.unwrap() });
    url
}

fn events(events: &[Value]) -> String {
    events.iter().map(|event| format!("data: {event}\n\n")).collect()
}

fn text(text: &str) -> Value {
    json!({"choices": [{"index": 0, "text": text}]})
}

fn whole() -> Response {
    (events(&[text("a"), text("b")]) + "data: [DONE]\n\n").into_response()
}

fn ms(line: &Value, key: &str) -> f64 {
    line[key].as_f64().unwrap_or_else(|| panic!("{key} is missing: {line}"))
}

/// A client that waited for replies would never send the last request, and none would be answered.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_answers_nobody_before_all_have_asked_is_sent_all() {
    let all = Arc::new(Barrier::new(10));
    let url = serve(move |_| {
        let all = Arc::clone(&all);
        async move {
            all.wait().await;
            whole()
        }
    })
    .await;
    let options = ["--rates", "50", "--arrivals", "constant", "--duration-s", "0.2"];
    let (reports, log) = attack(&url, &options).await;
    assert_eq!(reports[0]["num_succeeded"], 10, "{}", reports[0]);
    assert_eq!(reports[0]["max_in_flight"], 10);
    for line in log {
        // The last one comes 180 ms after the first, and nobody is answered before.
        let least = 180.0 - ms(&line, "at_s") * 1e3;
        assert!(ms(&line, "ttft_ms") >= least && ms(&line, "e2e_ms") >= ms(&line, "ttft_ms"), "{line}");
    }
}

/// One thread serves and sends, and the first request holds it: those that are to arrive meanwhile are sent late.
#[tokio::test]
async fn latency_counts_from_the_planned_arrival_also_where_a_request_is_sent_late() {
    const STALL_MS: f64 = 400.0;
    let num_asked = Arc::new(AtomicUsize::new(0));
    let url = serve(move |_| {
        if num_asked.fetch_add(1, Ordering::Relaxed) == 0 {
            thread::sleep(Duration::from_secs_f64(STALL_MS / 1e3));
        }
        async { whole() }
    })
    .await;
    let options = ["--rates", "20", "--arrivals", "constant", "--duration-s", "0.3"];
    let (reports, log) = attack(&url, &options).await;
    assert_eq!(reports[0]["num_succeeded"], 6, "{}", reports[0]);
    for line in log {
        let least = STALL_MS - ms(&line, "at_s") * 1e3;
        assert!(ms(&line, "ttft_ms") >= least, "{line} should have waited for {least} ms");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_arrives_beyond_the_bound_is_dropped_counted_and_not_good() {
    let url = serve(|_| async {
        tokio::time::sleep(Duration::from_secs(3)).await;
        whole()
    })
    .await;
    let options = ["--rates", "100", "--arrivals", "constant", "--duration-s", "0.1", "--max-in-flight", "3"];
    let (reports, log) = attack(&url, &options).await;
    let report = &reports[0];
    assert_eq!(
        (&report["num_requests"], &report["num_succeeded"], &report["num_dropped"]),
        (&json!(10), &json!(3), &json!(7))
    );
    assert_eq!((&report["max_in_flight"], &report["good_share"]), (&json!(3), &json!(0.3)));
    assert_eq!(log.iter().filter(|line| line["error"] == "dropped").count(), 7);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_way_to_fail_is_counted_by_its_own_name() {
    let num_asked = Arc::new(AtomicUsize::new(0));
    let url = serve(move |_| {
        let number = num_asked.fetch_add(1, Ordering::Relaxed);
        async move {
            match number {
                0 => whole(),
                1 => {
                    (StatusCode::SERVICE_UNAVAILABLE, r#"{"error": {"message": "the queue is full"}}"#).into_response()
                }
                2 => (events(&[text("a"), json!({"error": {"message": "the engine has stopped"}})])).into_response(),
                3 => events(&[text("a")]).into_response(),
                4 => Body::from_stream(stream::pending::<Result<String, Infallible>>()).into_response(),
                _ => (StatusCode::SERVICE_UNAVAILABLE, "plain").into_response(),
            }
        }
    })
    .await;
    let options = ["--rates", "20", "--arrivals", "constant", "--duration-s", "0.3", "--timeout-s", "5"];
    let (reports, log) = attack(&url, &options).await;
    let errors = &reports[0]["errors"];
    assert_eq!(errors["503"], json!({"count": 2, "first": "the queue is full"}));
    assert_eq!(errors["stream"]["count"], 2);
    assert_eq!(errors["timeout"]["count"], 1);
    let broken = log.iter().filter(|line| line["error"] == "stream");
    let streams: String = broken.map(|line| line["message"].to_string()).collect();
    assert!(streams.contains("the engine has stopped") && streams.contains("[DONE]"), "{streams}");

    let (reports, _) =
        attack("http://127.0.0.1:1", &["--rates", "10", "--duration-s", "0.5", "--arrivals", "constant"]).await;
    assert_eq!(reports[0]["errors"]["connection"]["count"], 5, "{}", reports[0]);
}

fn file(dir: &TempDir, lines: &[Value]) -> String {
    let path: &Path = &dir.path().join("requests.jsonl");
    fs::write(path, lines.iter().map(|line| format!("{line}\n")).collect::<String>()).unwrap();
    path.to_string_lossy().into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trace_is_replayed_in_order_and_faster_and_a_mix_is_sent_in_turn() {
    let asked = Arc::new(Mutex::new(Vec::new()));
    let url = {
        let asked = Arc::clone(&asked);
        serve(move |body| {
            asked.lock().unwrap().push((body["model"].clone(), body["prompt"].clone()));
            async { whole() }
        })
        .await
    };
    let dir = tempfile::tempdir().unwrap();
    let line = |at: f64, prompt: &str| json!({"at": at, "prompt": prompt, "max_tokens": 1});
    let trace = file(&dir, &[line(2.0, "late"), line(0.0, "early"), line(100.0, "never"), line(1.0, "between")]);
    let options = ["--trace", &trace, "--speed", "10", "--duration-s", "1", "--models", "a,b"];
    let (reports, log) = attack(&url, &options).await;
    assert_eq!(reports.len(), 1);
    assert_eq!((&reports[0]["num_succeeded"], &reports[0]["speed"]), (&json!(3), &json!(10.0)));
    let mut times: Vec<_> = log.iter().map(|line| ms(line, "at_s")).collect();
    times.sort_by(f64::total_cmp);
    assert_eq!(times, [0.0, 0.1, 0.2]);
    let prompts = |asked: Vec<(Value, Value)>| asked.into_iter().map(|(_, prompt)| prompt).collect::<Vec<_>>();
    assert_eq!(prompts(std::mem::take(&mut asked.lock().unwrap())), ["early", "between", "late"]);

    // Two rates go through the file one behind the other.
    let mix: Vec<_> = ["0", "1", "2"].iter().map(|text| json!({"prompt": text, "max_tokens": 1})).collect();
    let mix = file(&dir, &mix);
    let options =
        ["--mix", &mix, "--rates", "20,10", "--arrivals", "constant", "--duration-s", "0.2", "--models", "a,b"];
    let (reports, _) = attack(&url, &options).await;
    let asked = std::mem::take(&mut *asked.lock().unwrap());
    let expected = ["0", "1", "2", "0", "1", "2"].map(Value::from);
    assert_eq!(prompts(asked.clone()), expected);
    assert!(asked.iter().all(|(model, prompt)| *model == if prompt == "1" { "b" } else { "a" }), "{asked:?}");
    assert_eq!((&reports[0]["num_repeated"], &reports[1]["num_repeated"]), (&json!(1), &json!(2)));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_knee_is_reported_after_several_rates() {
    let num_asked = Arc::new(AtomicUsize::new(0));
    let url = serve(move |_| {
        let number = num_asked.fetch_add(1, Ordering::Relaxed);
        async move { if number < 15 { whole() } else { StatusCode::SERVICE_UNAVAILABLE.into_response() } }
    })
    .await;
    let options = ["--rates", "25,50,100", "--arrivals", "constant", "--duration-s", "0.2"];
    let (reports, _) = attack(&url, &options).await;
    assert_eq!(reports.len(), 4);
    assert_eq!(reports[3], json!({"knee_request_s": 50.0, "is_reached": true, "sustained_share": 0.95}));
}

#[tokio::test(flavor = "multi_thread")]
async fn lorry_serves_made_up_requests_to_its_adapters() {
    let server = Server::start("").await;
    let options =
        ["--rates", "20", "--duration-s", "0.5", "--models", "a,b", "--prompt-tokens", "5", "--max-tokens", "4"];
    let (reports, log) = attack(&server.url, &options).await;
    let report = &reports[0];
    assert_eq!(report["num_succeeded"], report["num_requests"], "{report}");
    for line in log {
        assert_eq!(line["output_tokens"], 4, "{line}");
        assert!(ms(&line, "ttft_ms") <= ms(&line, "e2e_ms"), "{line}");
    }
    assert!(ms(report, "prompt_tok_s") > 0.0 && report["itl_ms"].is_object(), "{report}");
}
