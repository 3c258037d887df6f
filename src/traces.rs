//! Traces for a collector of OpenTelemetry's, in OTLP over HTTP. Nothing is collected unless a collector is configured; which spans
//! there are, `http/spans.rs` says.

use std::collections::HashMap;
use std::time::Duration;

use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::{Key, KeyValue, Value, global};
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{ExporterBuildError, Protocol, SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::resource::{ResourceDetector, SdkProvidedResourceDetector};
use opentelemetry_sdk::trace::SdkTracerProvider;

use crate::config::TracesConfig;

/// For one batch of spans, and at the end of the process for the last.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Sends what is left when it is dropped.
#[derive(Debug)]
pub struct Traces(SdkTracerProvider);

/// Spans are sent from now on, by a thread of their own; those that the collector is too slow for are dropped. `None` where no
/// collector is configured.
///
/// # Errors
/// `traces.url` is none.
pub fn start(config: &TracesConfig) -> Result<Option<Traces>, ExporterBuildError> {
    if config.url.is_empty() {
        return Ok(None);
    }
    let exporter = SpanExporter::builder()
        .with_http()
        .with_protocol(Protocol::HttpBinary)
        .with_http_client(Client(ureq::AgentBuilder::new().timeout(TIMEOUT).build()))
        .with_endpoint(&config.url)
        .build()?;
    let resource = Resource::builder()
        .with_service_name(service_name())
        .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
        .build();
    let provider = SdkTracerProvider::builder().with_resource(resource).with_batch_exporter(exporter).build();
    global::set_tracer_provider(provider.clone());
    Ok(Some(Traces(provider)))
}

/// As the environment says, in `OTEL_SERVICE_NAME` or in `OTEL_RESOURCE_ATTRIBUTES`.
fn service_name() -> Value {
    let detected = SdkProvidedResourceDetector.detect().get(&Key::from_static_str("service.name"));
    // What it is called there if nothing says so.
    let said = detected.filter(|name| !name.as_str().starts_with("unknown_service"));
    said.unwrap_or_else(|| "lorry".into())
}

/// What a request to another server says of the trace that it is asked for in: nothing, if the caller has said nothing.
pub fn headers() -> HashMap<String, String> {
    let mut headers = HashMap::new();
    TraceContextPropagator::new().inject(&mut headers);
    headers
}

impl Drop for Traces {
    fn drop(&mut self) {
        if let Err(error) = self.0.shutdown_with_timeout(TIMEOUT) {
            tracing::warn!("the last traces were not sent: {error}");
        }
    }
}

/// Blocks the thread that sends, which is there for nothing else.
#[derive(Debug)]
struct Client(ureq::Agent);

#[async_trait::async_trait]
impl HttpClient for Client {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let (head, body) = request.into_parts();
        let mut request = self.0.request(head.method.as_str(), &head.uri.to_string());
        for (name, value) in &head.headers {
            request = request.set(name.as_str(), value.to_str()?);
        }
        let status = match request.send_bytes(&body) {
            Ok(reply) => reply.status(),
            Err(ureq::Error::Status(status, _)) => status,
            Err(error) => {
                tracing::warn!("traces cannot be sent to traces.url: {error}");
                return Err(error.into());
            }
        };
        if !(200..300).contains(&status) {
            tracing::warn!("traces.url answers {status}: these traces are lost");
        }
        Ok(Response::builder().status(status).body(Bytes::new())?)
    }
}
