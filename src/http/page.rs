//! The page at `/`: the files of `web/`, compiled in. What is no browser gets the line that clients of Ollama look for.

use std::sync::LazyLock;

use axum::Router;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use sha2::{Digest, Sha256};

use super::AppState;
use super::error::ApiError;
use super::fields::PathName;
use crate::hexadecimal::hexadecimal;

/// Nothing comes from another host, and nothing that is written into the page is run.
const CONTENT_SECURITY_POLICY: &str =
    "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'";

struct Asset {
    name: &'static str,
    bytes: &'static [u8],
}

macro_rules! assets {
    ($($name:literal),* $(,)?) => {
        &[$(Asset { name: $name, bytes: include_bytes!(concat!("../../web/", $name)) }),*]
    };
}

const OLLAMA_IS_HERE: &str = "Ollama is running";

const INDEX: &str = "index.html";

const ASSETS: &[Asset] = assets![
    "index.html",
    "base.css",
    "compare.css",
    "reports.css",
    "icon.svg",
    "adapters.js",
    "answers.js",
    "api.js",
    "arms.js",
    "catalogue.js",
    "diff.js",
    "dom.js",
    "experiments.js",
    "main.js",
    "plot.js",
    "prompt.js",
    "request.js",
    "run.js",
    "state.js",
    "theme.js",
    "watch.js",
];

impl Asset {
    fn content_type(&self) -> &'static str {
        match self.name.rsplit_once('.') {
            Some((_, "html")) => "text/html; charset=utf-8",
            Some((_, "css")) => "text/css; charset=utf-8",
            Some((_, "js")) => "text/javascript; charset=utf-8",
            Some((_, "svg")) => "image/svg+xml",
            _ => "application/octet-stream",
        }
    }
}

/// One for all files: the modules of the page belong together, and a new build replaces all of them at once.
static ETAG: LazyLock<String> = LazyLock::new(|| {
    let hash = ASSETS.iter().fold(Sha256::new(), |hash, asset| hash.chain_update(asset.bytes));
    format!("\"{}\"", &hexadecimal(hash)[..16])
});

pub fn routes() -> Router<AppState> {
    Router::new().route("/", get(index)).route("/assets/{name}", get(asset))
}

async fn index(headers: HeaderMap) -> Result<Response, ApiError> {
    let mut accepted = headers.get_all(header::ACCEPT).iter().filter_map(|types| types.to_str().ok());
    if !accepted.any(|types| types.contains("text/html")) {
        return Ok(([(header::VARY, "accept")], OLLAMA_IS_HERE).into_response());
    }
    let mut page = serve(INDEX, &headers)?;
    page.headers_mut().append(header::VARY, HeaderValue::from_static("accept"));
    Ok(page)
}

async fn asset(PathName(name): PathName, headers: HeaderMap) -> Result<Response, ApiError> {
    serve(&name, &headers)
}

fn serve(name: &str, headers: &HeaderMap) -> Result<Response, ApiError> {
    let asset = ASSETS.iter().find(|asset| asset.name == name);
    let asset = asset.ok_or_else(|| ApiError::unknown_route(&format!("/assets/{name}")))?;
    let common = [
        (header::ETAG, ETAG.as_str()),
        // Kept, but asked about each time: a new build shows at the next reload.
        (header::CACHE_CONTROL, "no-cache"),
        (header::CONTENT_SECURITY_POLICY, CONTENT_SECURITY_POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
    ];
    if is_known(headers) {
        return Ok((StatusCode::NOT_MODIFIED, common).into_response());
    }
    Ok((common, [(header::CONTENT_TYPE, asset.content_type())], asset.bytes).into_response())
}

/// Whether the browser has this build already. Proxies that compress make the tag a weak one.
fn is_known(headers: &HeaderMap) -> bool {
    let tags = headers.get(header::IF_NONE_MATCH).and_then(|tags| tags.to_str().ok()).unwrap_or_default();
    tags.split(',').map(|tag| tag.trim().trim_start_matches("W/")).any(|tag| tag == "*" || tag == ETAG.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header_of(response: &Response, name: header::HeaderName) -> String {
        response.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned()
    }

    fn asked_with(tag: &str) -> HeaderMap {
        HeaderMap::from_iter([(header::IF_NONE_MATCH, tag.parse().unwrap())])
    }

    #[test]
    fn every_file_of_the_folder_is_compiled_in() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/web");
        let mut files: Vec<_> =
            std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        let mut names: Vec<_> = ASSETS.iter().map(|asset| asset.name.to_owned()).collect();
        files.sort();
        names.sort();
        assert_eq!(names, files);
    }

    #[test]
    fn every_file_has_a_content_type_of_its_own_kind() {
        for asset in ASSETS {
            assert_ne!(asset.content_type(), "application/octet-stream", "{}", asset.name);
        }
    }

    #[test]
    fn a_browser_that_has_this_build_is_sent_no_bytes_again() {
        let first = serve(INDEX, &HeaderMap::new()).unwrap();
        assert_eq!(first.status(), StatusCode::OK);
        assert_eq!(header_of(&first, header::CONTENT_TYPE), "text/html; charset=utf-8");
        let tag = header_of(&first, header::ETAG);
        for known in [tag.clone(), format!("W/{tag}"), format!("\"other\", {tag}"), "*".to_owned()] {
            assert_eq!(serve(INDEX, &asked_with(&known)).unwrap().status(), StatusCode::NOT_MODIFIED, "{known}");
        }
        assert_eq!(serve(INDEX, &asked_with("\"other\"")).unwrap().status(), StatusCode::OK);
    }

    #[test]
    fn the_page_may_load_from_its_own_server_only() {
        let response = serve(INDEX, &HeaderMap::new()).unwrap();
        assert!(header_of(&response, header::CONTENT_SECURITY_POLICY).starts_with("default-src 'self';"));
    }

    #[test]
    fn a_file_that_is_not_there_is_an_unknown_route() {
        for name in ["nothing.js", "../Cargo.toml", ""] {
            assert_eq!(serve(name, &HeaderMap::new()).unwrap_err().into_response().status(), StatusCode::NOT_FOUND);
        }
    }
}
