//! The same trace sent to a running server: what the simulation is held to.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::join_all;
use reqwest::{Client, StatusCode};
use serde_json::{Value, json};

use crate::fleet::Run;
use crate::replica::{Outcome, Refusal, prompt};
use crate::trace::Arrival;

/// Tokens that every base has as text.
const TOKEN_IDS: std::ops::Range<u32> = 1000..20_000;

/// Serves a trace by the server at `url`.
///
/// # Errors
/// When the server cannot be asked, or answers with what is neither a reply nor a refusal for want of room.
pub async fn run(arrivals: &[Arrival], url: &str) -> Result<Run, String> {
    let client = Client::builder().no_proxy().build().map_err(|error| error.to_string())?;
    let url: Arc<str> = format!("{}/v1/completions", url.trim_end_matches('/')).into();
    let begin = Instant::now();
    let sent = arrivals.iter().enumerate().map(|(request, arrival)| {
        let (client, url, arrival) = (client.clone(), url.clone(), arrival.clone());
        tokio::spawn(async move {
            tokio::time::sleep_until((begin + Duration::from_secs_f64(arrival.at)).into()).await;
            send(&client, &url, request, &arrival, begin).await
        })
    });
    let outcomes: Result<Vec<_>, String> =
        join_all(sent).await.into_iter().map(|sent| sent.map_err(|error| error.to_string())?).collect();
    Ok(Run {
        outcomes: outcomes?,
        totals: None,
        num_replicas: 1,
        seconds: begin.elapsed().as_secs_f64(),
        is_clean: true,
    })
}

async fn send(
    client: &Client,
    url: &str,
    request: usize,
    arrival: &Arrival,
    begin: Instant,
) -> Result<Outcome, String> {
    let width = TOKEN_IDS.end - TOKEN_IDS.start;
    let of_adapter = arrival.adapter.as_ref().map(|name| crate::hash_of(name));
    let tokens: Vec<u32> =
        prompt(request, of_adapter, arrival).into_iter().map(|token| TOKEN_IDS.start + token % width).collect();
    let mut body = json!({"prompt": tokens, "max_tokens": arrival.max_tokens, "temperature": 0, "ignore_eos": true,
        "stream": true, "stream_options": {"include_usage": true}, "priority": arrival.account.priority.name()});
    if let Some(adapter) = &arrival.adapter {
        body["model"] = json!(&**adapter);
    }
    let failed = |error: reqwest::Error| format!("request {request}: {error}");
    let mut response = client.post(url).body(body.to_string()).send().await.map_err(failed)?;
    match response.status() {
        StatusCode::OK => {}
        StatusCode::SERVICE_UNAVAILABLE => {
            return Ok(Outcome { refused: Some(Refusal::Overloaded), ..Outcome::default() });
        }
        status => {
            let reason = response.text().await.unwrap_or_default();
            return Err(format!("request {request} was answered with {status}: {reason}"));
        }
    }
    let mut outcome = Outcome::default();
    let mut text = String::new();
    while let Some(chunk) = response.chunk().await.map_err(failed)? {
        let now = begin.elapsed().as_secs_f64();
        text.push_str(&String::from_utf8_lossy(&chunk));
        while let Some((event, rest)) = text.split_once("\n\n") {
            let event: Value = serde_json::from_str(event.trim_start_matches("data: ")).unwrap_or_default();
            text = rest.to_owned();
            if let Some(usage) = event.get("usage").filter(|usage| usage.is_object()) {
                outcome.num_tokens = usage["completion_tokens"].as_u64().unwrap_or(0) as usize;
                outcome.num_cached_tokens =
                    usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap_or(0) as usize;
            } else if event["choices"][0]["text"].is_string() {
                outcome.see_token(now);
            }
        }
    }
    if outcome.num_tokens == 0 { Err(format!("request {request} ended without a token")) } else { Ok(outcome) }
}
