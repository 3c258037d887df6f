//! Beam search over HTTP; the model says the next letter of the alphabet, and nothing else is at all likely.

use super::*;

fn body() -> Value {
    json!({"prompt": "ab", "max_tokens": 3, "use_beam_search": true, "n": 4, "logprobs": 0})
}

#[tokio::test]
async fn the_choices_are_the_best_beams_in_falling_order_and_every_place_returns() {
    let server = Server::quick().await;
    let reply = server.complete(body()).await;
    let choices = reply["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 4);
    assert_eq!(choices[0]["text"], "cde");
    let scores: Vec<f64> = choices.iter().map(|choice| choice["score"].as_f64().unwrap()).collect();
    assert!(scores.is_sorted_by(|a, b| a >= b), "{scores:?}");
    let texts: std::collections::HashSet<_> = choices.iter().map(|choice| choice["text"].to_string()).collect();
    assert_eq!(texts.len(), 4);
    let sum: f64 = choices[0]["logprobs"]["token_logprobs"].as_array().unwrap().iter().filter_map(Value::as_f64).sum();
    assert!((sum / 3.0 - scores[0]).abs() < 1e-5, "{sum} {scores:?}");
    // Streamed, the same.
    let mut streamed = body();
    streamed["stream"] = json!(true);
    let text = server.completions(streamed).send().await.unwrap().text().await.unwrap();
    assert!(text.contains(&format!(r#""score":{}"#, choices[0]["score"])), "{text}");
    assert_eq!(server.engine.num_free_places(), MAX_QUEUED);
}

#[tokio::test]
async fn a_beam_ends_with_a_stop_string_and_keeps_its_score() {
    let server = Server::quick().await;
    let mut body = body();
    body["stop"] = json!("d");
    let reply = server.complete(body).await;
    let choices = reply["choices"].as_array().unwrap();
    assert_eq!((&choices[0]["text"], &choices[0]["finish_reason"]), (&json!("c"), &json!("stop")));
    // Of the two tokens `c` and `d`, not of three.
    let logprob = choices[0]["logprobs"]["token_logprobs"][0].as_f64().unwrap();
    let score = choices[0]["score"].as_f64().unwrap();
    assert!((score - logprob).abs() < 0.2 * logprob.abs(), "{logprob} {score}");
    assert!(choices.iter().all(|choice| choice["score"].is_f64()), "{choices:?}");
    let texts: std::collections::HashSet<_> = choices.iter().map(|choice| choice["text"].to_string()).collect();
    assert_eq!(texts.len(), 4);
}

#[tokio::test]
async fn a_search_ends_when_its_client_goes_away() {
    let server = Server::slow().await;
    let mut body = body();
    body["max_tokens"] = json!(50);
    let request = server.completions(body).timeout(Duration::from_millis(150)).send().await;
    assert!(request.is_err());
    for _ in 0..200 {
        if server.engine.num_free_places() == MAX_QUEUED {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{} places are free of {MAX_QUEUED}", server.engine.num_free_places());
}

#[tokio::test]
async fn what_does_not_go_with_beams_is_refused_by_name() {
    let server = Server::quick().await;
    for (field, value) in [
        ("temperature", json!(0.5)),
        ("top_k", json!(40)),
        ("top_p", json!(0.9)),
        ("min_p", json!(0.05)),
        ("logprobs", json!(2)),
        ("repetition_penalty", json!(1.1)),
        ("logit_bias", json!({"5": 1})),
        ("n", json!(17)),
        ("best_of", json!(3)),
        ("length_penalty", json!("long")),
        ("use_beam_search", json!(1)),
    ] {
        let mut body = body();
        body[field] = value;
        let response = server.completions(body).send().await.unwrap();
        let (status, error) = (response.status(), response.json::<Value>().await.unwrap());
        assert_eq!((status, &error["error"]["param"]), (StatusCode::BAD_REQUEST, &json!(field)), "{error}");
    }
    let mut body = body();
    (body["n"], body["best_of"], body["temperature"]) = (json!(1), json!(4), json!(0));
    (body["top_k"], body["top_p"], body["min_p"]) = (json!(-1), json!(1), json!(0));
    assert_eq!(server.complete(body).await["choices"][0]["text"], "cde");
}
