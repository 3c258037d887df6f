//! At which level the lines of requests are.

use std::sync::Mutex;

use axum::body::Body;
use hyper::service::Service;
use hyper_util::service::TowerToHyperService;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

use super::*;

/// Keeps the level of every event that is above debugging.
#[derive(Clone, Default)]
struct Levels(Arc<Mutex<Vec<Level>>>);

impl Subscriber for Levels {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() < Level::DEBUG
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        self.0.lock().unwrap().push(*event.metadata().level());
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

#[tokio::test]
async fn only_what_went_wrong_in_the_server_is_logged_as_an_error() {
    let routes = Router::new()
        .route("/done", get(async || "done"))
        .route("/wrong", get(async || ApiError::malformed("wrong")))
        .route("/not-served", get(async || ApiError::not_served("embeddings")))
        .route("/not-supported", get(async || ApiError::not_supported("infill")))
        .route("/full", get(async || ApiError::unavailable("overloaded", "full")))
        .route("/broken", get(async || ApiError::internal()))
        .route("/health", get(loading));
    let router = behind_shared_layers(routes, &Config::load(None, &Overrides::default()).unwrap().server, None);
    for (path, expected) in [
        ("/done", Some(Level::INFO)),
        ("/wrong", Some(Level::INFO)),
        ("/not-served", Some(Level::INFO)),
        ("/not-supported", Some(Level::INFO)),
        ("/full", Some(Level::WARN)),
        ("/broken", Some(Level::ERROR)),
        // Asked again and again while the model is loading.
        ("/health", None),
    ] {
        let levels = Levels::default();
        let _guard = tracing::subscriber::set_default(levels.clone());
        let request = Request::builder().uri(path).body(Body::empty()).unwrap();
        TowerToHyperService::new(router.clone()).call(request).await.unwrap();
        assert_eq!(*levels.0.lock().unwrap(), Vec::from_iter(expected), "{path}");
    }
}
