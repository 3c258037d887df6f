//! Requests to an experiment's alias, and comparisons as votes see them.

use super::votes::reply;
use super::*;

/// `coder` is the base, or the base with examples; what else there is, is in `more_arms` and `bounds`.
async fn start(folder: &Path, more_arms: &str, bounds: &str) -> Server {
    let config = format!(
        "path = '{}'\nmax_mib = 1\nmax_queued = 64\nkeep_text = true\n[[run]]\nname = 'one'\nalias = 'coder'\n
         arms = [{{name = 'base', model = '{BASE}', weight = 1}},
                 {{name = 'examples', model = '{BASE}+icl:ops@1', weight = 1}}, {more_arms}]\n{bounds}",
        folder.join("experiments.db").display()
    );
    let server = Server::start_with(&["<|end|>"], Duration::ZERO, &config).await;
    let examples = json!({"examples": [{"instruction": "a", "code": "b"}, {"instruction": "c", "code": "d"}]});
    let put = server.request(Method::PUT, "/v1/icl/ops").bearer_auth("admin").body(examples.to_string());
    assert_eq!(put.send().await.unwrap().status(), StatusCode::OK);
    server
}

fn body(user: &str) -> Value {
    json!({"model": "coder", "prompt": "abc", "prompt_format": "short", "max_tokens": 3, "temperature": 0,
        "user": user})
}

impl Server {
    /// The arm of the report on the experiment, once `is_so` is true of it: what is recorded is written behind the reply.
    async fn arm(&self, index: usize, is_so: impl Fn(&Value) -> bool) -> Value {
        for _ in 0..500 {
            let (_, report) = self.get("/v1/experiments/one").await;
            if is_so(&report["arms"][index]) {
                return report["arms"][index].clone();
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("it never came true of {}", self.get("/v1/experiments/one").await.1);
    }
}

#[tokio::test]
async fn an_alias_is_answered_by_an_arm_that_a_user_stays_with_and_what_came_of_it_is_reported() {
    let folder = tempfile::tempdir().unwrap();
    let server = start(folder.path(), "", "").await;
    let mut requests = [0, 0];
    for user in 0..12 {
        let replies = [server.complete(body(&user.to_string())).await, server.complete(body(&user.to_string())).await];
        assert_eq!(replies[0]["icl"].is_null(), replies[1]["icl"].is_null(), "a user stays with an arm");
        assert_eq!(replies[0]["model"], BASE);
        let arm = usize::from(!replies[0]["icl"].is_null());
        requests[arm] += 2;
        let id = &replies[0]["id"];
        let (status, _) = server.send("/v1/feedback", json!({"id": id, "kind": "accepted", "user": "ann"})).await;
        assert_eq!(status, StatusCode::OK);
    }
    assert!(requests[0] > 0 && requests[1] > 0, "{requests:?}");
    for (index, expected) in requests.into_iter().enumerate() {
        let arm = server.arm(index, |arm| arm["requests"] == expected).await;
        assert_eq!(arm["accepted"], expected / 2);
        assert_eq!((&arm["errors"], &arm["completion_tokens"]), (&json!(0), &json!(3 * expected)));
        assert!(arm["ttft_ms"]["p50"].as_f64() > Some(0.0), "{arm}");
    }
    let (_, models) = server.get("/v1/models").await;
    assert!(models["data"].as_array().unwrap().iter().any(|model| model["id"] == "coder"), "{models}");
    assert_eq!(server.get("/v1/models/coder").await.1["id"], "coder");
}

#[tokio::test]
async fn an_arm_of_a_comparison_is_for_its_own_user_else_for_that_of_all() {
    let folder = tempfile::tempdir().unwrap();
    let server = start(folder.path(), "", "").await;
    let arm_of = |user: &str| server.experiments.assign("coder", user, |_| true).unwrap().arm;
    let of = |arm: &str| (0..).map(|user| user.to_string()).find(|user| arm_of(user) == arm).unwrap();
    let (base, examples) = (of("base"), of("examples"));
    for (shared, others) in [(&base, &examples), (&examples, &base)] {
        let mut body = body(shared);
        body["arms"] = json!([{"name": "shared"}, {"name": "own", "user": others}, {"name": "same", "user": shared}]);
        let (status, reply) = server.send("/v1/compare", body).await;
        assert_eq!(status, StatusCode::OK, "{reply}");
        let has_examples: Vec<bool> =
            reply["arms"].as_array().unwrap().iter().map(|arm| !arm["icl"].is_null()).collect();
        let is_examples = arm_of(shared) == "examples";
        assert_eq!(has_examples, [is_examples, !is_examples, is_examples], "{reply}");
    }
    // One that says it is for nobody is not for that of all.
    let mut nobodys = body(&base);
    nobodys["arms"] = (0..4).map(|arm| json!({"name": arm.to_string(), "user": null})).collect();
    let mut has_examples = false;
    for _ in 0..20 {
        let (_, reply) = server.send("/v1/compare", nobodys.clone()).await;
        has_examples |= reply["arms"].as_array().unwrap().iter().any(|arm| !arm["icl"].is_null());
    }
    assert!(has_examples, "eighty without a user are not all with the same arm");
}

#[tokio::test]
async fn users_without_a_name_are_not_one_user() {
    let folder = tempfile::tempdir().unwrap();
    let server = start(folder.path(), "", "").await;
    for nobody in [json!(""), Value::Null] {
        let mut arms = [0, 0];
        for _ in 0..40 {
            let mut body = body("");
            body["user"] = nobody.clone();
            arms[usize::from(!server.complete(body).await["icl"].is_null())] += 1;
        }
        // All of forty in one arm: once in 10^12.
        assert!(arms[0] > 0 && arms[1] > 0, "{nobody}: {arms:?}");
    }
}

#[tokio::test]
async fn an_alias_is_asked_for_and_recorded_in_every_interface() {
    let folder = tempfile::tempdir().unwrap();
    let server = start(folder.path(), "", "").await;
    let messages = json!([{"role": "user", "content": "abc"}]);
    let common = json!({"model": "coder", "prompt_format": "short", "messages": messages, "prompt": "abc"});
    for (path, more) in [
        ("/v1/messages", json!({"max_tokens": 3})),
        ("/api/chat", json!({"model": "coder:latest", "options": {"num_predict": 3}, "stream": false})),
        ("/api/generate", json!({"options": {"num_predict": 3}})),
    ] {
        let mut body = common.clone();
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let response = server.request(Method::POST, path).body(body.to_string()).send().await.unwrap();
        let (status, reply) = (response.status(), response.text().await.unwrap());
        assert!(status == StatusCode::OK && reply.contains(BASE), "{path}: {reply}");
    }
    for _ in 0..500 {
        let (_, report) = server.get("/v1/experiments/one").await;
        let requests = |arm: usize| report["arms"][arm]["requests"].as_u64().unwrap();
        if requests(0) + requests(1) == 3 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("not all were recorded: {}", server.get("/v1/experiments/one").await.1);
}

#[tokio::test]
async fn a_shadow_is_recorded_and_not_returned() {
    let folder = tempfile::tempdir().unwrap();
    let server = start(folder.path(), "{name = 'shadow', model = 'tiny-coder:1b+icl:ops@2', shadow = true}", "").await;
    let mut streamed = body("ann");
    streamed["stream"] = json!(true);
    let text = server.completions(streamed).send().await.unwrap().text().await.unwrap();
    assert!(text.ends_with("data: [DONE]\n\n") && !text.contains(r#""k":2"#), "{text}");
    let shadow = server.arm(2, |arm| arm["requests"] == 1).await;
    assert_eq!((&shadow["shadow"], &shadow["completion_tokens"]), (&json!(true), &json!(3)));
}

#[tokio::test]
async fn a_canary_that_cannot_be_served_is_rolled_back_and_others_take_its_users() {
    let folder = tempfile::tempdir().unwrap();
    let canary = "{name = 'broken', model = 'no-such-adapter', weight = 1e6, canary = true}";
    let server = start(folder.path(), canary, "bounds = {min_samples = 2, max_error_rate = 0.5}").await;
    for _ in 0..2 {
        let (status, error) = reply(server.completions(body("ann"))).await;
        assert_eq!((status, &error["error"]["code"]), (StatusCode::NOT_FOUND, &json!("model_not_found")), "{error}");
    }
    server.arm(2, |arm| arm["errors"] == 2).await;
    assert_eq!(server.complete(body("ann")).await["model"], BASE);
    let (_, report) = server.get("/v1/experiments/one").await;
    assert_eq!(report["canary"]["state"], "rolled_back");
}

#[tokio::test]
async fn what_the_client_does_wrong_is_not_held_against_the_arm() {
    let folder = tempfile::tempdir().unwrap();
    let server = start(folder.path(), "", "").await;
    for (field, value, status) in [
        ("adapter", json!("x"), StatusCode::BAD_REQUEST),
        ("icl", json!({"store": "ops", "k": 1}), StatusCode::BAD_REQUEST),
        ("prompt_format", json!("no-such-format"), StatusCode::BAD_REQUEST),
    ] {
        let mut body = body("ann");
        body[field] = value;
        let (got, error) = reply(server.completions(body)).await;
        assert_eq!((got, &error["error"]["param"]), (status, &json!(field)), "{error}");
    }
    server.complete(body("ann")).await;
    let (_, vote) = server.send("/v1/feedback", json!({"id": "x", "kind": "accepted"})).await;
    assert_eq!(vote["recorded"], true);
    let (_, report) = server.get("/v1/experiments/one").await;
    let requests: u64 = (0..2).map(|arm| report["arms"][arm]["requests"].as_u64().unwrap()).sum();
    assert_eq!(requests, 1, "{report}");
}

#[tokio::test]
async fn the_votes_on_a_comparison_are_wins_of_the_arms_that_took_part() {
    let folder = tempfile::tempdir().unwrap();
    let server = start(folder.path(), "", "").await;
    let compared = json!({"prompt": "abc", "prompt_format": "short", "max_tokens": 3, "arms": [
        {"name": "zero-shot"}, {"name": "one-shot", "icl": {"store": "ops", "k": 1}}]});
    for winner in ["one-shot", "one-shot", "zero-shot"] {
        let (status, reply) = server.send("/v1/compare", compared.clone()).await;
        assert_eq!(status, StatusCode::OK, "{reply}");
        let (status, _) =
            server.send("/v1/feedback", json!({"id": reply["id"], "kind": "winner", "arm": winner})).await;
        assert_eq!(status, StatusCode::OK);
        let unknown = json!({"id": reply["id"], "kind": "winner", "arm": "other"});
        let (status, error) = server.send("/v1/feedback", unknown).await;
        assert_eq!((status, &error["error"]["param"]), (StatusCode::BAD_REQUEST, &json!("arm")));
    }
    let examples = server.arm(1, |arm| arm["comparisons"] == 3).await;
    assert_eq!((&examples["wins"], &examples["requests"]), (&json!(2), &json!(0)));
    assert_eq!(server.arm(0, |arm| arm["comparisons"] == 3).await["wins"], 1);
}

#[tokio::test]
async fn what_the_arms_answer_is_counted_for_each_and_shown_with_their_adapters() {
    let folder = tempfile::tempdir().unwrap();
    let hidden = "{name = 'hidden', model = 'no-such-adapter', weight = 1e6}";
    let server = start(folder.path(), hidden, "").await;
    assert_eq!(reply(server.completions(body("ann"))).await.0, StatusCode::NOT_FOUND);
    let rendered = server.metrics.render(|_| true);
    for series in [
        "requests_total{arm=\"hidden\",experiment=\"one\",outcome=\"failed\"} 1\n",
        "requests_total{arm=\"base\",experiment=\"one\",outcome=\"completed\"} 0\n",
    ] {
        assert!(rendered.contains(&format!("\nlorry_experiment_{series}")), "{series}: {rendered}");
    }
    assert!(!server.metrics.render(|_| false).contains("arm=\"hidden\""));

    let server = start(folder.path(), "", "").await;
    for user in 0..12 {
        server.complete(body(&user.to_string())).await;
    }
    let rendered = server.metrics.render(|_| false);
    let sum = |name: &str| -> u64 {
        let lines = rendered.lines().filter(|line| line.starts_with(&format!("lorry_experiment_{name}")));
        lines.map(|line| line.rsplit_once(' ').unwrap().1.parse::<u64>().unwrap()).sum()
    };
    let both = |name: &str| ["base", "examples"].map(|arm| sum(&format!("{name}{{arm=\"{arm}\",")));
    assert_eq!(both("requests_total").iter().sum::<u64>(), 12);
    assert_eq!(both("time_to_first_token_seconds_count"), both("requests_total"));
    let tokens = ["base", "examples"].map(|arm| {
        ["prompt", "output"]
            .map(|kind| sum(&format!("tokens_total{{arm=\"{arm}\",experiment=\"one\",kind=\"{kind}\"}}")))
    });
    let requests = both("requests_total");
    assert_eq!([tokens[0][1], tokens[1][1]], requests.map(|requests| 3 * requests));
    assert_eq!(tokens[0][0], 3 * requests[0], "three letters each");
    assert!(tokens[1][0] > 3 * requests[1], "and the examples");
}
