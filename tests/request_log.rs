//! The line that the log has for each request, as the command writes it.

mod adapter_server;
mod running;
mod tiny;

use reqwest::{Response, StatusCode};
use serde_json::{Value, json};

use running::{CONTEXT_LENGTH, PROMPT, Running};

fn id(response: &Response) -> String {
    response.headers()["x-request-id"].to_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn each_request_has_one_line_that_says_what_came_of_it_and_not_its_prompt() {
    let server = Running::start("[log]\nformat = 'json'", &[]);
    // Probes have none.
    let health = server.client.get(format!("{}/health", server.url)).send().await.unwrap();
    assert_eq!(health.status(), StatusCode::OK);

    let response = server.completion(json!({"n": 2})).header("x-request-id", "mine-1").send().await.unwrap();
    assert_eq!(id(&response), "mine-1");
    let reply: Value = response.json().await.unwrap();
    let line = server.request_line();
    let expected = json!({"level": "INFO", "id": "mine-1", "reply_id": reply["id"], "key": "team",
        "method": "POST", "route": "/v1/completions", "model": "tiny-a",
        "generation": reply["adapter"]["generation"], "status": 200, "finish_reason": "length",
        "prompt_tokens": reply["usage"]["prompt_tokens"], "completion_tokens": 8,
        "cached_tokens": reply["usage"]["prompt_tokens_details"]["cached_tokens"]});
    for (field, value) in expected.as_object().unwrap() {
        assert_eq!(line[field], *value, "{field}: {line}");
    }
    assert!(line["prompt_tokens"].as_u64() > Some(0), "{line}");
    let seconds = |field: &str| line[field].as_f64().unwrap();
    let (queue, ttft, total) = (seconds("queue_seconds"), seconds("ttft_seconds"), seconds("total_seconds"));
    assert!(0.0 <= queue && queue <= ttft && ttft <= total, "{line}");
    assert!(!line.to_string().contains(PROMPT) && line.get("cancelled_in").is_none(), "{line}");

    let mut response =
        server.completion(json!({"stream": true, "max_tokens": CONTEXT_LENGTH / 2})).send().await.unwrap();
    let own_id = id(&response);
    response.chunk().await.unwrap();
    drop(response);
    let line = server.request_line();
    assert_eq!((&line["id"], &line["status"]), (&json!(own_id), &json!(200)));
    assert_eq!((&line["finish_reason"], &line["cancelled_in"]), (&json!("cancelled"), &json!("decode")), "{line}");
    assert!((1..u64::from(CONTEXT_LENGTH) / 2).contains(&line["completion_tokens"].as_u64().unwrap()), "{line}");

    for (model, key, status, refusal) in
        [("nothing", "secret", 404, json!("not_found")), ("a", "wrong", 401, json!("unauthorized"))]
    {
        let request = server.completion(json!({"model": model})).header("x-request-id", "two words");
        let mut request = request.build().unwrap();
        request.headers_mut().insert("authorization", format!("Bearer {key}").parse().unwrap());
        let response = server.client.execute(request).await.unwrap();
        assert_eq!(response.status().as_u16(), status);
        let line = server.request_line();
        assert_eq!((&line["id"], &line["status"], &line["refusal"]), (&json!(id(&response)), &json!(status), &refusal));
        assert_ne!(line["id"], "two words");
        assert_eq!(line.get("key").is_some(), status == 404, "{line}");
        assert!(
            line.get("reply_id").is_none() && line.get("model").is_none() && line.get("prompt_tokens").is_none(),
            "{line}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_is_text_and_has_prompts_only_where_they_are_asked_for() {
    for (log, has_prompt) in [("", false), ("[log]\nprompts = true", true)] {
        let server = Running::start(log, &[]);
        let response = server.completion(json!({})).send().await.unwrap();
        let line = server.line_with("lorry::request");
        for part in [&format!("id=\"{}\"", id(&response)), "INFO", "key=\"team\"", "model=\"tiny-a\"", "status=200"] {
            assert!(line.contains(part), "{part}: {line}");
        }
        assert_eq!(line.contains(PROMPT), has_prompt, "{line}");
    }
}
