//! The spans of a request, made when it has ended: the request, below the caller's own span where a `traceparent` names that, and
//! below it queue, prefill and decode of each sequence. Attributes are those of OpenTelemetry's conventions where there is one.

use std::time::{Instant, SystemTime};

use axum::http::{HeaderMap, Method};
use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::{Span, SpanBuilder, SpanKind, Status, TraceContextExt, TraceId, Tracer};
use opentelemetry::{Context, KeyValue, StringValue, Value, global};
use opentelemetry_http::HeaderExtractor;
use opentelemetry_sdk::propagation::TraceContextPropagator;

use crate::generation::SequenceReport;

/// For those that are not known.
pub const OTHER_METHOD: &str = "_OTHER";
/// Those that a span is named by. Clients may send any other, and names of spans must be few.
const KNOWN_METHODS: [Method; 9] = [
    Method::GET,
    Method::HEAD,
    Method::POST,
    Method::PUT,
    Method::PATCH,
    Method::DELETE,
    Method::OPTIONS,
    Method::CONNECT,
    Method::TRACE,
];

/// `None` for any other.
pub fn known_method(method: &Method) -> Option<&str> {
    KNOWN_METHODS.contains(method).then(|| method.as_str())
}

/// What the caller says of its own span.
pub fn parent(headers: &HeaderMap) -> Context {
    TraceContextPropagator::new().extract_with_context(&Context::new(), &HeaderExtractor(headers))
}

/// A request that has ended now.
#[derive(Debug)]
pub struct EndedRequest<'a> {
    pub parent: &'a Context,
    pub method: &'a Method,
    pub path: &'a str,
    /// That the path is one of.
    pub route: Option<&'a str>,
    pub begun: Instant,
    /// `None` where the client has left before there was one.
    pub status: Option<u16>,
    pub has_failed: bool,
    pub model: Option<&'a str>,
    pub generation: Option<&'a str>,
    pub request_id: &'a str,
    pub sequences: &'a [SequenceReport],
}

impl EndedRequest<'_> {
    /// Hands the spans over to be sent, if traces are on and the caller's is sampled. The id of the trace, if there is one.
    pub fn record(self) -> Option<String> {
        let clock = Clock::now();
        let tracer = global::tracer("lorry");
        let known = known_method(self.method);
        let method = known.unwrap_or("HTTP");
        let name = self.route.map_or_else(|| method.to_owned(), |route| format!("{method} {route}"));
        let builder = SpanBuilder::from_name(name).with_kind(SpanKind::Server).with_start_time(clock.time(self.begun));
        let mut request = tracer.build_with_context(builder, self.parent);
        let trace_id = request.span_context().trace_id();
        let trace_id = (trace_id != TraceId::INVALID).then(|| trace_id.to_string());
        if !request.is_recording() {
            return trace_id;
        }
        request.set_attributes([
            KeyValue::new("http.request.method", known.unwrap_or(OTHER_METHOD).to_owned()),
            KeyValue::new("url.path", self.path.to_owned()),
            KeyValue::new("lorry.request_id", self.request_id.to_owned()),
        ]);
        if known.is_none() {
            request.set_attribute(KeyValue::new("http.request.method_original", self.method.to_string()));
        }
        request.set_attributes(self.route.map(|route| KeyValue::new("http.route", route.to_owned())));
        request.set_attributes(self.status.map(|status| KeyValue::new("http.response.status_code", i64::from(status))));
        request.set_attributes(self.model());
        if self.has_failed {
            request.set_status(Status::error(""));
        }
        let below = Context::new().with_remote_span_context(request.span_context().clone());
        for sequence in self.sequences {
            for (name, begun, ended, mut attributes) in phases(sequence) {
                attributes.extend(self.model());
                let builder = SpanBuilder::from_name(name)
                    .with_kind(SpanKind::Internal)
                    .with_start_time(clock.time(begun))
                    .with_attributes(attributes);
                tracer.build_with_context(builder, &below).end_with_timestamp(clock.time(ended));
            }
        }
        request.end_with_timestamp(clock.now);
        trace_id
    }

    fn model(&self) -> Vec<KeyValue> {
        let named = [("gen_ai.response.model", self.model), ("lorry.adapter.generation", self.generation)];
        named.into_iter().filter_map(|(name, value)| Some(KeyValue::new(name, value?.to_owned()))).collect()
    }
}

/// Each that was begun, with its beginning and its end.
fn phases(sequence: &SequenceReport) -> Vec<(&'static str, Instant, Instant, Vec<KeyValue>)> {
    let SequenceReport { submitted, started, first_token, ended, .. } = *sequence;
    let tokens = |name: &'static str, count: usize| KeyValue::new(name, i64::try_from(count).unwrap_or(i64::MAX));
    let mut phases = vec![("queue", submitted, started.unwrap_or(ended), Vec::new())];
    if let Some(started) = started {
        let attributes = vec![
            tokens("gen_ai.usage.input_tokens", sequence.num_prompt_tokens),
            tokens("lorry.cached_tokens", sequence.num_cached_tokens),
        ];
        phases.push(("prefill", started, first_token.unwrap_or(ended), attributes));
    }
    if let Some(first_token) = first_token {
        let reasons = Value::Array(vec![StringValue::from(sequence.finish_reason)].into());
        let attributes = vec![
            tokens("gen_ai.usage.output_tokens", sequence.num_output_tokens),
            KeyValue::new("gen_ai.response.finish_reasons", reasons),
        ];
        phases.push(("decode", first_token, ended, attributes));
    }
    phases
}

/// From the clock that times are taken by to the one that is told.
struct Clock {
    instant: Instant,
    now: SystemTime,
}

impl Clock {
    fn now() -> Self {
        Self { instant: Instant::now(), now: SystemTime::now() }
    }

    fn time(&self, moment: Instant) -> SystemTime {
        self.now - self.instant.saturating_duration_since(moment)
    }
}
