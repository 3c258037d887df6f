//! One line of the log for each request, when its reply has ended in any way: who asked for what, what answered, and what
//! came of it. Its trace is made, and it is counted, at the same time.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use axum::Extension;
use axum::body::Body;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{Method, StatusCode};
use axum::middleware::Next;
use axum::response::Response;
use opentelemetry::Context;
use opentelemetry::trace::FutureExt;
use serde_json::{Value, json};
use tracing::{Instrument, Level, info_span};

use super::error::Rejection;
use super::held_body::HeldBody;
use super::spans::{self, EndedRequest};
use super::{AppState, PROBES, REQUEST_ID, tidy};
use crate::generation::{Prompt, RequestReport, ResolvedModel, SequenceReport};
use crate::metrics::Metrics;

/// What of a request is known only further in, in the extensions of each; clones are of the same request.
#[derive(Debug, Clone, Default)]
pub struct RequestLog(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    report: Arc<RequestReport>,
    facts: Mutex<Facts>,
}

#[derive(Debug, Default)]
struct Facts {
    key: Option<Arc<str>>,
    /// As it is declared: with the names of what stands in the path. `None` where there is none.
    route: Option<MatchedPath>,
    /// That of the reply's body, which clients and votes name.
    reply_id: Option<String>,
    /// Names and generations of what answers; several in a comparison.
    models: Vec<(String, Option<String>)>,
    /// Empty unless they are to be in the log.
    prompts: Vec<Value>,
}

impl RequestLog {
    fn facts(&self) -> MutexGuard<'_, Facts> {
        self.0.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn asked_by(&self, key: Option<Arc<str>>) {
        self.facts().key = key;
    }

    /// Keeps the prompts where the configuration asks for them.
    pub fn asked(&self, state: &AppState, prompts: &[Prompt]) {
        if state.config.log.prompts {
            self.facts().prompts.extend(prompts.iter().map(|prompt| json!(prompt)));
        }
    }

    pub fn replied_as(&self, id: &str) {
        self.facts().reply_id = Some(id.to_owned());
    }

    pub fn answered_by(&self, model: &ResolvedModel) {
        let generation = model.adapter.as_ref().map(|adapter| adapter.generation.clone());
        self.facts().models.push((model.id.clone(), generation));
    }

    /// Where the sequences of the request say what came of them.
    pub fn report(&self) -> &Arc<RequestReport> {
        &self.0.report
    }
}

/// Writes the line when the reply's body is over, or the client has left before. What is logged meanwhile has the id. Without
/// `metrics` nothing is counted: there are none while the model is loading.
pub async fn write_line(State(metrics): State<Option<Arc<Metrics>>>, mut request: Request, next: Next) -> Response {
    let id = request.headers().get(REQUEST_ID).and_then(|id| id.to_str().ok()).unwrap_or_default().to_owned();
    let span = info_span!("request", id);
    let mut line = Line {
        metrics,
        parent: spans::parent(request.headers()),
        id,
        method: request.method().clone(),
        path: tidy(request.uri().path()),
        begun: Instant::now(),
        status: None,
        refusal: None,
        log: RequestLog::default(),
    };
    request.extensions_mut().insert(line.log.clone());
    // What is asked of others on the way is asked in the caller's trace.
    let response = next.run(request).instrument(span).with_context(line.parent.clone()).await;
    line.status = Some(response.status());
    line.refusal = response.extensions().get().map(|Rejection(reason)| *reason);
    response.map(|body| Body::new(HeldBody::new(body, line)))
}

/// Behind the routes: before, none is known.
pub async fn note_route(
    Extension(log): Extension<RequestLog>,
    route: Option<MatchedPath>,
    request: Request,
    next: Next,
) -> Response {
    log.facts().route = route;
    next.run(request).await
}

/// Written when it is dropped.
struct Line {
    metrics: Option<Arc<Metrics>>,
    /// The caller's span.
    parent: Context,
    id: String,
    method: Method,
    path: String,
    begun: Instant,
    /// `None` where the client has left before there was a reply.
    status: Option<StatusCode>,
    refusal: Option<&'static str>,
    log: RequestLog,
}

impl Line {
    /// Only what went wrong here is an error: a client that asks for what is not served is no news, and one that is told to
    /// come back later is a warning. Probes come all the time.
    fn level(&self, sequences: &[SequenceReport]) -> Level {
        let has_failed = sequences.iter().any(|sequence| sequence.finish_reason == "error");
        match self.status {
            _ if PROBES.contains(&self.path.as_str()) => Level::DEBUG,
            Some(StatusCode::SERVICE_UNAVAILABLE) => Level::WARN,
            Some(StatusCode::NOT_IMPLEMENTED) => Level::INFO,
            Some(status) if status.is_server_error() || has_failed => Level::ERROR,
            _ => Level::INFO,
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let sequences = self.log.report().sequences();
        let facts = self.log.facts();
        let all = |text: fn(&(String, Option<String>)) -> Option<&str>| {
            let texts: Vec<&str> = facts.models.iter().filter_map(text).collect();
            (!texts.is_empty()).then(|| texts.join(","))
        };
        let seconds = |moment: Instant| moment.duration_since(self.begun).as_secs_f64();
        let tokens = |count: fn(&SequenceReport) -> usize| {
            (!sequences.is_empty()).then(|| sequences.iter().map(count).sum::<usize>())
        };
        let is_cancelled = |sequence: &&SequenceReport| sequence.finish_reason == "cancelled";
        let level = self.level(&sequences);
        let (model, generation) = (all(|(model, _)| Some(model)), all(|(_, generation)| generation.as_deref()));
        let ended = EndedRequest {
            parent: &self.parent,
            method: &self.method,
            path: &self.path,
            route: facts.route.as_ref().map(MatchedPath::as_str),
            begun: self.begun,
            status: self.status.map(|status| status.as_u16()),
            has_failed: level == Level::ERROR,
            model: model.as_deref(),
            generation: generation.as_deref(),
            request_id: &self.id,
            sequences: &sequences,
        };
        if let (Some(metrics), Some(status)) = (&self.metrics, ended.status)
            && level != Level::DEBUG
        {
            let method = spans::known_method(&self.method).unwrap_or(spans::OTHER_METHOD);
            metrics.http_request_ended(ended.route, method, status, self.begun.elapsed().as_secs_f64());
        }
        let trace_id = if level == Level::DEBUG { None } else { ended.record() };
        // An absent field is not written.
        macro_rules! write_at {
            ($level:expr) => {
                tracing::event!(
                    target: "lorry::request",
                    $level,
                    id = self.id,
                    reply_id = facts.reply_id.as_deref(),
                    key = facts.key.as_deref(),
                    method = self.method.as_str(),
                    route = self.path,
                    model,
                    generation,
                    status = self.status.map(|status| status.as_u16()),
                    refusal = self.refusal,
                    finish_reason = distinct(sequences.iter().map(|sequence| sequence.finish_reason)),
                    prompt_tokens = tokens(|sequence| sequence.num_prompt_tokens),
                    cached_tokens = tokens(|sequence| sequence.num_cached_tokens),
                    completion_tokens = tokens(|sequence| sequence.num_output_tokens),
                    queue_seconds = sequences.iter().filter_map(queue_seconds).reduce(f64::max),
                    ttft_seconds = sequences.iter().filter_map(|sequence| sequence.first_token).min().map(seconds),
                    trace_id,
                    total_seconds = self.begun.elapsed().as_secs_f64(),
                    cancelled_in = distinct(sequences.iter().filter(is_cancelled).map(|sequence| sequence.phase)),
                    prompt = (!facts.prompts.is_empty()).then(|| json!(facts.prompts).to_string()),
                    "request"
                )
            };
        }
        match level {
            Level::ERROR => write_at!(Level::ERROR),
            Level::WARN => write_at!(Level::WARN),
            Level::INFO => write_at!(Level::INFO),
            _ => write_at!(Level::DEBUG),
        }
    }
}

/// From when the engine was asked to when it began.
fn queue_seconds(sequence: &SequenceReport) -> Option<f64> {
    Some(sequence.started?.duration_since(sequence.submitted).as_secs_f64())
}

/// Each once, in the order in which they came first.
fn distinct<'a>(words: impl Iterator<Item = &'a str>) -> Option<String> {
    let mut distinct: Vec<&str> = Vec::new();
    for word in words {
        if !distinct.contains(&word) {
            distinct.push(word);
        }
    }
    (!distinct.is_empty()).then(|| distinct.join(","))
}
