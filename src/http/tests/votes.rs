//! Votes and experiments over HTTP.

use super::*;
use crate::experiments::{Outcome, Record};

pub async fn reply(request: RequestBuilder) -> (StatusCode, Value) {
    let response = request.send().await.unwrap();
    let (status, text) = (response.status(), response.text().await.unwrap());
    (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
}

impl Server {
    pub async fn send(&self, path: &str, body: Value) -> (StatusCode, Value) {
        reply(self.request(Method::POST, path).body(body.to_string())).await
    }

    pub async fn get(&self, path: &str) -> (StatusCode, Value) {
        reply(self.request(Method::GET, path)).await
    }
}

async fn start(folder: &Path) -> Server {
    start_in(folder, Duration::ZERO).await
}

async fn start_in(folder: &Path, step: Duration) -> Server {
    let config = format!(
        "path = '{}'\nmax_mib = 1\nmax_queued = 8\nkeep_text = true\n[[run]]\nname = 'one'\nalias = 'coder'\n
         arms = [{{name = 'base', model = '{BASE}', weight = 1}}, {{name = 'tuned', model = 'x', weight = 1, canary = true}}]
         bounds = {{min_samples = 1, max_error_rate = 0.5}}",
        folder.join("experiments.db").display()
    );
    Server::start_with(&["<|end|>"], step, &config).await
}

#[tokio::test]
async fn a_vote_is_recorded_and_read_back_and_the_last_one_counts() {
    let folder = tempfile::tempdir().unwrap();
    let server = start(folder.path()).await;
    assert_eq!(server.get("/v1/feedback/cmp-1").await.1, json!({"id": "cmp-1", "votes": []}));
    for arm in ["base", "tuned"] {
        let sent =
            server.send("/v1/feedback", json!({"id": "cmp-1", "kind": "winner", "arm": arm, "user": "ann"})).await;
        assert_eq!(sent, (StatusCode::OK, json!({"id": "cmp-1", "recorded": true})));
    }
    server.send("/v1/feedback", json!({"id": "cmp-1", "kind": "edited", "text": "x = 1", "user": "bob"})).await;
    let (_, votes) = server.get("/v1/feedback/cmp-1").await;
    let votes = votes["votes"].as_array().unwrap();
    assert_eq!(votes.len(), 2, "{votes:?}");
    assert_eq!(
        (&votes[0]["kind"], &votes[0]["arm"], &votes[0]["user"]),
        (&json!("winner"), &json!("tuned"), &json!("ann"))
    );
    assert_eq!((&votes[1]["kind"], &votes[1]["text"]), (&json!("edited"), &json!("x = 1")));
    assert!(votes[1]["created"].as_i64() > Some(1_700_000_000));
}

#[tokio::test]
async fn tabby_events_are_views_acceptances_and_rejections() {
    let folder = tempfile::tempdir().unwrap();
    let server = start(folder.path()).await;
    for (kind, id) in [("view", "cmpl-1"), ("select", "cmpl-1"), ("view", "cmpl-2"), ("dismiss", "cmpl-2")] {
        let (status, body) =
            server.send("/v1/events", json!({"type": kind, "completion_id": id, "choice_index": 0})).await;
        assert_eq!((status, body), (StatusCode::OK, json!("")));
    }
    for (id, kind) in [("cmpl-1", "accepted"), ("cmpl-2", "rejected")] {
        let (_, votes) = server.get(&format!("/v1/feedback/{id}")).await;
        let mut kinds: Vec<&str> =
            votes["votes"].as_array().unwrap().iter().map(|vote| vote["kind"].as_str().unwrap()).collect();
        kinds.sort_unstable();
        assert_eq!(kinds, [kind, "view"]);
    }
    let (status, error) = server.send("/v1/events", json!({"type": "hover", "completion_id": "cmpl-1"})).await;
    assert_eq!((status, &error["error"]["param"]), (StatusCode::BAD_REQUEST, &json!("type")));
}

#[tokio::test]
async fn a_winner_that_took_no_part_is_refused_with_those_that_did() {
    let folder = tempfile::tempdir().unwrap();
    let server = start(folder.path()).await;
    for arm in ["base", "tuned"] {
        server.experiments.record(record("cmp-1", None, arm, Outcome::Completed));
    }
    let (status, error) = server.send("/v1/feedback", json!({"id": "cmp-1", "kind": "winner", "arm": "x"})).await;
    let error = &error["error"];
    assert_eq!((status, &error["param"]), (StatusCode::BAD_REQUEST, &json!("arm")));
    assert!(error["message"].as_str().unwrap().contains("base, tuned"), "{error}");
}

#[tokio::test]
async fn an_arm_that_is_still_writing_may_win() {
    let folder = tempfile::tempdir().unwrap();
    let server = start_in(folder.path(), Duration::from_millis(50)).await;
    let arms = json!([{"name": "short", "max_tokens": 1}, {"name": "long", "max_tokens": 60}]);
    let body = json!({"prompt": "0", "temperature": 0, "stream": true, "arms": arms});
    let request = server.request(Method::POST, "/v1/compare").body(body.to_string());
    let mut stream = request.send().await.unwrap();
    let mut events = String::new();
    let winner = async |id: &Value, arm: &str| {
        server.send("/v1/feedback", json!({"id": id, "kind": "winner", "arm": arm, "user": "ann"})).await
    };
    let mut read_until = async |text: &str| {
        while !events.contains(text) {
            events.push_str(std::str::from_utf8(&stream.chunk().await.unwrap().expect("there is more")).unwrap());
        }
        events.clone()
    };
    let begun = read_until("\n\n").await;
    let first: Value =
        serde_json::from_str(begun.split("\n\n").next().unwrap().strip_prefix("data: ").unwrap()).unwrap();
    let id = &first["id"];
    for last in ["\n\n", r#""event":"finish""#] {
        // While both write, and when one has ended.
        read_until(last).await;
        for arm in ["long", "short"] {
            assert_eq!(winner(id, arm).await.0, StatusCode::OK, "{arm} after {last:?}");
        }
        let (status, error) = winner(id, "x").await;
        let message = error["error"]["message"].as_str().unwrap();
        assert_eq!((status, &error["error"]["param"]), (StatusCode::BAD_REQUEST, &json!("arm")));
        assert!(message.contains("long") && message.contains("short"), "{message}");
    }
    assert!(server.engine.state().running > 0, "it is still writing");
    read_until("[DONE]").await;
    assert_eq!(winner(id, "long").await.0, StatusCode::OK);
    let (_, votes) = server.get(&format!("/v1/feedback/{}", id.as_str().unwrap())).await;
    let votes = votes["votes"].as_array().unwrap();
    assert_eq!((votes.len(), &votes[0]["arm"]), (1, &json!("long")));
}

#[tokio::test]
async fn an_experiment_is_reported_and_its_canary_reset() {
    let folder = tempfile::tempdir().unwrap();
    let server = start(folder.path()).await;
    server.experiments.record(record("cmpl-1", Some("one"), "tuned", Outcome::Failed));
    // Answered after what was queued before it.
    server.send("/v1/feedback", json!({"id": "cmpl-1", "kind": "rejected"})).await;
    let (status, report) = server.get("/v1/experiments/one").await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(server.get("/v1/experiments").await.1["data"], json!([report]));
    let tuned = &report["arms"][1];
    assert_eq!((&tuned["requests"], &tuned["errors"], &tuned["rejected"]), (&json!(1), &json!(1), &json!(1)));
    assert_eq!(tuned["acceptance"]["rate"], 0.0);
    assert_eq!(report["arms"][0]["acceptance"], json!({"rate": null, "low": 0.0, "high": 1.0}));
    assert_eq!(report["arms"][0]["ttft_ms"], json!({"p50": null, "p95": null}));
    assert_eq!(
        report["pairs"][0],
        json!({"a": "base", "b": "tuned", "a_wins": 0, "b_wins": 0, "ties": 0, "p_value": 1.0})
    );
    assert_eq!((&report["canary"]["state"], &report["canary"]["arm"]), (&json!("rolled_back"), &json!("tuned")));

    let (status, error) = server.send("/v1/experiments/one/reset", json!({})).await;
    assert_eq!((status, &error["error"]["code"]), (StatusCode::UNAUTHORIZED, &json!("invalid_api_key")));
    let reset = |path| server.request(Method::POST, path).bearer_auth("admin");
    let (status, report) = reply(reset("/v1/experiments/one/reset")).await;
    assert_eq!((status, &report["canary"]["state"]), (StatusCode::OK, &json!("watching")));
    for request in [server.request(Method::GET, "/v1/experiments/two"), reset("/v1/experiments/two/reset")] {
        let (status, error) = reply(request).await;
        assert_eq!((status, &error["error"]["code"]), (StatusCode::NOT_FOUND, &json!("experiment_not_found")));
    }
}

#[tokio::test]
async fn a_database_that_cannot_be_opened_costs_votes_and_nothing_else() {
    let server = Server::quick().await;
    for (path, body) in [
        ("/v1/feedback", json!({"id": "cmpl-1", "kind": "accepted"})),
        ("/v1/events", json!({"type": "view", "completion_id": "cmpl-1"})),
    ] {
        let (status, error) = server.send(path, body).await;
        assert_eq!((status, &error["error"]["code"]), (StatusCode::SERVICE_UNAVAILABLE, &json!("storage_unavailable")));
        assert!(!error.to_string().contains("/dev/null"), "{error}");
    }
    assert_eq!(server.metrics.experiment_writes_total.with_label_values(&["failed"]).get(), 2);
    assert_eq!(
        server.complete(json!({"prompt": "x", "max_tokens": 1, "temperature": 0})).await["choices"][0]["text"],
        "y"
    );
}

fn record(id: &str, experiment: Option<&str>, arm: &str, outcome: Outcome) -> Record {
    Record {
        id: id.to_owned(),
        started_ms: 0,
        experiment: experiment.map(str::to_owned),
        arm: arm.to_owned(),
        model: if arm == "base" { BASE.to_owned() } else { "x".to_owned() },
        generation: None,
        shadow: false,
        outcome,
        prompt_hash: None,
        ttft_ms: None,
        tpot_ms: None,
        prompt_tokens: 1,
        completion_tokens: 1,
        text: None,
        asked: None,
    }
}
