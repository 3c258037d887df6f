//! The HTTP interface: OpenAI's routes over [`Generation`], those of Ollama and Anthropic, the life of the adapters,
//! probes, and one shape for every error.

mod adapter_events;
mod adapters;
mod anthropic;
mod auth;
mod body;
mod chat;
mod compare;
mod completions;
mod constraint;
mod dialect;
mod encoding;
mod error;
mod experiments;
mod feedback;
mod fields;
mod fim;
mod fine_tuning;
mod gap;
mod held_body;
mod icl;
mod key_limits;
mod listener;
mod llama_cpp;
mod logprobs;
mod models;
mod ollama;
mod openapi;
mod page;
mod priority;
mod probes;
mod promotions;
mod reply;
mod request_log;
mod responses;
mod run;
mod samplers;
mod sampling;
mod selection;
mod sent_as;
mod spans;
mod sse;
mod surrogates;
mod tabby;
#[cfg(test)]
mod tests;
mod tokenize;
mod tools;
mod trials;
mod types;
mod unsupported;
mod vllm;

use std::any::Any;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::body::Body;
use axum::extract::{OriginalUri, Request, State};
use axum::http::{HeaderName, HeaderValue, Method, Uri};
use axum::middleware::{Next, from_fn, from_fn_with_state, map_request};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use tokio::net::TcpListener;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::{self, AllowHeaders, AllowMethods, CorsLayer};
use tower_http::decompression::RequestDecompressionLayer;
use tower_http::request_id::{MakeRequestUuid, PropagateRequestIdLayer, SetRequestIdLayer};

use crate::config::{Config, ServerConfig};
use crate::experiments::Experiments;
use crate::fine_tuning::FineTuning;
use crate::generation::{Generation, self_test};
use crate::metrics::Metrics;
use crate::promotion;
use auth::{Keys, authenticate};
use body::BodyBudget;
use dialect::word_errors;
use error::{ApiError, Rejection};
use listener::Routers;
use responses::KeptResponses;

pub use listener::TlsError;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const MAX_REQUEST_ID_LEN: usize = 128;
/// What is asked all the time, and answered on any connection.
const PROBES: [&str; 2] = ["/health", "/metrics"];

/// What every handler may use; clones are cheap.
#[derive(Debug, Clone)]
pub struct AppState {
    pub generation: Arc<Generation>,
    pub experiments: Arc<Experiments>,
    /// `None` where it is off.
    pub fine_tuning: Option<Arc<FineTuning>>,
    pub metrics: Arc<Metrics>,
    pub config: Arc<Config>,
    keys: Arc<Keys>,
    bodies: BodyBudget,
    responses: Arc<KeptResponses>,
    /// Unix seconds.
    started: u64,
}

impl AppState {
    pub fn new(
        generation: Arc<Generation>,
        experiments: Arc<Experiments>,
        fine_tuning: Option<Arc<FineTuning>>,
        metrics: Arc<Metrics>,
        config: Arc<Config>,
    ) -> Self {
        let started = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let keys = Arc::new(Keys::new(&config.server));
        let bodies = BodyBudget::new(config.server.max_body_bytes_in_flight);
        let responses = Arc::default();
        Self { generation, experiments, fine_tuning, metrics, config, keys, bodies, responses, started }
    }
}

/// A port that is answered on: with 503 while the model is loading, so that who waits for it knows what for.
#[derive(Debug)]
pub struct Server {
    /// Of its address.
    pub scheme: &'static str,
    routers: watch::Sender<Routers>,
    stop: oneshot::Sender<()>,
    served: JoinHandle<std::io::Result<()>>,
}

impl Server {
    /// Must be called within a runtime, on which it then runs.
    ///
    /// # Errors
    /// TLS is asked for, and what it needs is not in the files that are named.
    pub fn start(listener: TcpListener, config: &ServerConfig) -> Result<Self, TlsError> {
        let tls = listener::tls(config)?;
        let scheme = if tls.is_some() { "https" } else { "http" };
        let (routers, current) = watch::channel(Routers {
            admitted: behind_shared_layers(Router::new().fallback(loading), config, None),
            beyond: behind_shared_layers(Router::new().fallback(full), config, None),
        });
        let (stop, stopped) = oneshot::channel();
        // Who drops the server has stopped it too.
        let stopped = async move { stopped.await.unwrap_or_default() };
        let served = tokio::spawn(listener::serve(listener, tls, current, config.clone(), stopped));
        Ok(Self { scheme, routers, stop, served })
    }

    /// Serves `state` from now on. The result, when it is polled, waits until `shutdown` resolves, then refuses new
    /// requests with 503 and ends when those under way have ended. How long that may take is for the caller to bound.
    pub fn serve(
        self,
        state: AppState,
        shutdown: impl Future<Output = ()>,
    ) -> impl Future<Output = std::io::Result<()>> {
        let Self { routers, stop, served, .. } = self;
        let (generation, experiments) = (state.generation.clone(), state.experiments.clone());
        let full = Router::new().fallback(full).layer(from_fn_with_state(state.clone(), count_rejection));
        let beyond = behind_shared_layers(full, &state.config.server, Some(&state.metrics));
        drop(routers.send_replace(Routers { admitted: router(state), beyond }));
        async move {
            let drained = async {
                shutdown.await;
                generation.drain().await;
                // An error means that nothing is served any more.
                let _ = stop.send(());
                served.await.unwrap_or_else(|panic| Err(std::io::Error::other(panic)))
            };
            tokio::select! {
                ended = drained => ended,
                () = self_test::run(&generation) => Ok(()),
                () = promotion::run(&generation, &experiments) => Ok(()),
            }
        }
    }
}

/// Every route behind the layers that all of them share.
pub fn router(state: AppState) -> Router {
    behind_shared_layers(routes(&state), &state.config.server, Some(&state.metrics))
}

/// Every route, with and without `/v1`.
fn routes(state: &AppState) -> Router {
    let generation = Router::new()
        .route("/completions", post(completions::completions))
        .route("/chat/completions", post(chat::chat_completions))
        .route("/responses", post(responses::create))
        .route("/fim/completions", post(fim::completions))
        .route("/compare", post(compare::compare))
        .route("/messages", post(anthropic::messages));
    let adapter = get(adapters::get).put(adapters::put).delete(adapters::delete);
    let api = Router::new()
        .route("/messages/count_tokens", post(anthropic::count_tokens))
        .route("/models", get(models::list))
        .route("/responses/{id}", get(responses::get).delete(responses::delete))
        .route("/models/{*id}", get(models::get))
        .route("/icl", get(icl::list))
        .route("/icl/{name}", get(icl::get).put(icl::put).delete(icl::delete))
        .route("/feedback", post(feedback::vote))
        .route("/feedback/{id}", get(feedback::votes))
        .route("/events", post(feedback::event))
        .route("/experiments", get(experiments::list))
        .route("/experiments/{name}", get(experiments::get))
        .route("/experiments/{name}/reset", post(experiments::reset))
        .route("/experiments/{name}/promotions", get(promotions::list).post(promotions::begin))
        .route("/adapters", get(adapters::list))
        .route("/adapters/events", get(adapter_events::listen))
        .route("/adapters/{name}", adapter)
        .route("/adapters/{name}/load", post(adapters::load))
        .route("/adapters/{name}/rollback", post(adapters::roll_back))
        .route("/load_lora_adapter", post(vllm::load_lora_adapter))
        .route("/unload_lora_adapter", post(vllm::unload_lora_adapter))
        .merge(fine_tuning::routes())
        .merge(llama_cpp::routes())
        .route_layer(from_fn_with_state(state.clone(), authenticate))
        .merge(generating(generation.merge(llama_cpp::generation()), state));
    Router::new()
        .nest("/v1", api.clone())
        .merge(api)
        .nest("/api", ollama::routes(state))
        .merge(tabby::routes(state))
        .merge(page::routes())
        .merge(openapi::routes())
        .route("/health", get(probes::health))
        .route("/metrics", get(probes::metrics))
        .fallback(unknown_route)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(RequestDecompressionLayer::new())
        .layer(from_fn(encoding::check))
        .layer(from_fn(request_log::note_route))
        .with_state(state.clone())
}

/// Paths must be tidied before they are routed, and layers run after routing: so all is behind one fallback.
fn behind_shared_layers(routes: Router, config: &ServerConfig, metrics: Option<&Arc<Metrics>>) -> Router {
    let mut router = Router::new()
        .fallback_service(routes)
        .layer(CatchPanicLayer::custom(panicked))
        .layer(from_fn(word_errors))
        .layer(map_request(tidy_path));
    if config.cors {
        router = router.layer(any_origin());
    }
    router
        .layer(from_fn_with_state(metrics.cloned(), request_log::write_line))
        .layer(PropagateRequestIdLayer::new(REQUEST_ID))
        .layer(SetRequestIdLayer::new(REQUEST_ID, MakeRequestUuid))
        .layer(map_request(drop_strange_id))
}

/// A request keeps the id that it comes with, unless that is none to be written into logs.
async fn drop_strange_id(mut request: Request) -> Request {
    let is_sane = |id: &HeaderValue| {
        (1..=MAX_REQUEST_ID_LEN).contains(&id.len()) && id.as_bytes().iter().all(u8::is_ascii_graphic)
    };
    if request.headers().get(REQUEST_ID).is_some_and(|id| !is_sane(id)) {
        request.headers_mut().remove(REQUEST_ID);
    }
    request
}

/// `routes` that generate, for whom they know and as much as that key may; what is refused is counted.
fn generating(routes: Router<AppState>, state: &AppState) -> Router<AppState> {
    routes
        .route_layer(from_fn(key_limits::limit))
        .route_layer(from_fn_with_state(state.clone(), authenticate))
        .route_layer(from_fn_with_state(state.clone(), count_rejection))
}

/// Mirrors the headers that are asked for: `*` does not stand for `authorization`.
fn any_origin() -> CorsLayer {
    CorsLayer::new()
        .allow_origin(cors::Any)
        .allow_methods(AllowMethods::mirror_request())
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers(cors::Any)
}

/// Base URLs are often configured with a slash too many.
async fn tidy_path(mut request: Request) -> Request {
    let uri = request.uri();
    let path = tidy(uri.path());
    if path != uri.path() {
        let path_and_query = match uri.query() {
            Some(query) => format!("{path}?{query}"),
            None => path,
        };
        // A part of a valid URI is one.
        if let Ok(uri) = path_and_query.parse::<Uri>() {
            *request.uri_mut() = uri;
        }
    }
    request
}

fn tidy(path: &str) -> String {
    let segments: Vec<&str> = path.split('/').filter(|segment| !segment.is_empty()).collect();
    format!("/{}", segments.join("/"))
}

async fn count_rejection(State(state): State<AppState>, request: Request, next: Next) -> Response {
    let response = next.run(request).await;
    if let Some(Rejection(reason)) = response.extensions().get() {
        state.metrics.rejected_total.with_label_values(&[*reason]).inc();
    }
    response
}

/// In the words that clients of llama.cpp look for.
async fn loading() -> ApiError {
    ApiError::unavailable("loading", "Loading model")
}

async fn full() -> ApiError {
    ApiError::unavailable("connections", "every connection of the server is taken")
}

async fn unknown_route(OriginalUri(uri): OriginalUri) -> ApiError {
    ApiError::unknown_route(uri.path())
}

async fn method_not_allowed(method: Method, OriginalUri(uri): OriginalUri) -> ApiError {
    ApiError::method_not_allowed(method.as_str(), uri.path())
}

fn panicked(cause: Box<dyn Any + Send>) -> Response<Body> {
    let cause = cause.downcast_ref::<&str>().copied().or_else(|| cause.downcast_ref::<String>().map(String::as_str));
    tracing::error!(cause = cause.unwrap_or("no message"), "a handler panicked");
    ApiError::internal().into_response()
}
