//! Sends a request and notes when the parts of its reply come.

use std::error::Error;
use std::time::Duration;

use axum::body::Bytes;
use axum::http::{HeaderMap, Request, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;
use tokio::time::{Instant, timeout_at};

use super::LoadgenError;
use super::workload::Target;
use crate::terminal::TerminalError;
use crate::terminal::events::{Event, read_line};

/// A line of a stream, or the text of a refusal.
const MAX_TEXT_BYTES: usize = 1 << 20;

#[derive(Debug, Clone)]
pub struct Client {
    client: legacy::Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    headers: HeaderMap,
    timeout: Duration,
}

/// Times of a whole reply, counted from when the request was to arrive.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Reply {
    /// Of each event with text, in order.
    pub texts: Vec<Duration>,
    pub end: Duration,
    /// As the server says, or else one for each event with text.
    pub num_tokens: u64,
    pub prompt_tokens: u64,
}

/// Why there is no whole reply.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Failure {
    #[error("{message}")]
    Status { status: StatusCode, message: String },
    #[error("{0}")]
    Connection(String),
    #[error("{0}")]
    Stream(String),
    #[error("no whole reply within the time that --timeout-s gives")]
    Timeout,
}

impl Failure {
    /// What failures are counted by.
    pub fn kind(&self) -> String {
        match self {
            Self::Status { status, .. } => status.as_u16().to_string(),
            Self::Connection(_) => "connection".to_owned(),
            Self::Stream(_) => "stream".to_owned(),
            Self::Timeout => "timeout".to_owned(),
        }
    }
}

impl Client {
    /// `headers` go with every request; a reply has `timeout` to be whole. No proxy is asked.
    ///
    /// # Errors
    /// TLS cannot be set up.
    pub fn new(headers: HeaderMap, timeout: Duration) -> Result<Self, LoadgenError> {
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        let connector = HttpsConnectorBuilder::new()
            .with_provider_and_webpki_roots(tokio_rustls::rustls::crypto::ring::default_provider())
            .map_err(LoadgenError::Tls)?
            .https_or_http()
            .enable_http1()
            .wrap_connector(tcp);
        // Each request has its own, as those of different users have; none meets one that the server is about to close.
        let client = legacy::Client::builder(TokioExecutor::new()).pool_max_idle_per_host(0).build(connector);
        Ok(Self { client, headers, timeout })
    }

    /// `planned` is when the request was to arrive.
    ///
    /// # Errors
    /// Whatever keeps the reply from being whole.
    pub async fn ask(&self, target: Target, planned: Instant) -> Result<Reply, Failure> {
        let reply = self.read_reply(target, planned);
        timeout_at(planned + self.timeout, reply).await.unwrap_or(Err(Failure::Timeout))
    }

    async fn read_reply(&self, target: Target, planned: Instant) -> Result<Reply, Failure> {
        let mut request = Request::post(target.uri)
            .body(Full::new(target.body))
            .map_err(|error| Failure::Connection(chain(&error)))?;
        *request.headers_mut() = self.headers.clone();
        let response = self.client.request(request).await.map_err(|error| Failure::Connection(chain(&error)))?;
        let status = response.status();
        if status == StatusCode::OK {
            read_stream(response.into_body(), planned).await
        } else {
            let text = Limited::new(response.into_body(), MAX_TEXT_BYTES).collect().await;
            let text = text.map_or_else(|error| error.to_string().into(), |text| text.to_bytes());
            Err(Failure::Status { status, message: refusal(&text) })
        }
    }
}

async fn read_stream(mut body: Incoming, planned: Instant) -> Result<Reply, Failure> {
    let mut reply = Reply::default();
    let mut num_tokens = None;
    let mut rest = Vec::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| Failure::Stream(chain(&error)))?;
        let now = planned.elapsed();
        rest.extend_from_slice(frame.data_ref().map_or(&[][..], |bytes| bytes));
        let mut num_read = 0;
        while let Some(len) = rest[num_read..].iter().position(|&byte| byte == b'\n') {
            let line = String::from_utf8_lossy(&rest[num_read..num_read + len]);
            num_read += len + 1;
            match read_line(&line).map_err(stream_failure)? {
                Some(Event::Piece { text, usage }) => {
                    if !text.is_empty() {
                        reply.texts.push(now);
                    }
                    if let Some(usage) = usage {
                        num_tokens = usage.completion_tokens.or(num_tokens);
                        reply.prompt_tokens = usage.prompt_tokens.unwrap_or(reply.prompt_tokens);
                    }
                }
                Some(Event::Done) => {
                    reply.end = now;
                    reply.num_tokens = num_tokens.unwrap_or(reply.texts.len() as u64);
                    return Ok(reply);
                }
                None => {}
            }
        }
        rest.drain(..num_read);
        if rest.len() > MAX_TEXT_BYTES {
            return Err(Failure::Stream(format!("a line of the stream is longer than {MAX_TEXT_BYTES} bytes")));
        }
    }
    Err(Failure::Stream("the stream ended without `[DONE]`".to_owned()))
}

fn stream_failure(error: TerminalError) -> Failure {
    Failure::Stream(error.to_string())
}

/// The message of OpenAI's shape of errors, or the text.
fn refusal(text: &[u8]) -> String {
    let error: Value = serde_json::from_slice(text).unwrap_or_default();
    let message = error["error"]["message"].as_str();
    message.map_or_else(|| String::from_utf8_lossy(text).into_owned(), str::to_owned)
}

/// With its causes: hyper's errors say little by themselves.
fn chain(error: &dyn Error) -> String {
    let causes = std::iter::successors(Some(error), |&error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
