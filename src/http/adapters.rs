//! `/v1/adapters`: what is known of the adapters, and changes to them for who has the admin key.

use std::path::{Component, PathBuf};

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::AppState;
use super::auth::{Admin, Caller};
use super::error::ApiError;
use super::fields::{Fields, PathName};
use crate::adapter::canonical::Method;
use crate::adapter::manifest::AdapterManifest;
use crate::adapter::registry::{AdapterRegistry, AdapterStatus, ChangeError, Phase, SelfTest, Source, Tier};

/// One adapter at this moment; what is not known before it has been read is `null`.
#[derive(Debug, JsonSchema, Serialize)]
pub struct AdapterView {
    object: &'static str,
    id: usize,
    name: String,
    /// What a request names as its model.
    model: String,
    phase: Phase,
    tier: Tier,
    generation: Option<String>,
    previous_generations: Vec<String>,
    method: Option<Method>,
    coverage: Option<CoverageView>,
    /// Bytes of its weights in memory.
    bytes: usize,
    /// Requests that hold it.
    in_flight: usize,
    self_test: Option<SelfTestView>,
    error: Option<String>,
    manifest: ManifestView,
}

#[derive(Debug, JsonSchema, Serialize)]
struct CoverageView {
    num_sites: usize,
    num_expected_sites: usize,
    max_rank: usize,
    num_virtual_tokens: usize,
    resident_bytes: usize,
}

#[derive(Debug, JsonSchema, Serialize)]
struct SelfTestView {
    max_logit_change: f32,
    mean_logit_change: f32,
    /// It changes nothing: trained for nothing, or not at all.
    is_inert: bool,
}

#[derive(Debug, JsonSchema, Serialize)]
struct ManifestView {
    task: Option<String>,
    description: Option<String>,
    base: Option<String>,
    licence: Option<String>,
    pin: bool,
    prompt: Option<String>,
    stop: Vec<String>,
    sampling: Value,
}

impl AdapterView {
    fn new(state: &AppState, status: AdapterStatus) -> Self {
        let bytes = match (status.tier, &status.coverage) {
            (Tier::Disk, _) | (_, None) => 0,
            (_, Some(coverage)) => coverage.resident_bytes,
        };
        Self {
            object: "adapter",
            id: status.id,
            model: state.generation.model_id(&status.name),
            name: status.name,
            phase: status.phase,
            tier: status.tier,
            generation: status.generation,
            previous_generations: status.previous_generations,
            method: status.method,
            coverage: status.coverage.map(|coverage| CoverageView {
                num_sites: coverage.num_sites,
                num_expected_sites: coverage.num_expected_sites,
                max_rank: coverage.max_rank,
                num_virtual_tokens: coverage.num_virtual_tokens,
                resident_bytes: coverage.resident_bytes,
            }),
            bytes,
            in_flight: status.in_flight,
            self_test: status.self_test.map(SelfTestView::from),
            error: status.error,
            manifest: ManifestView::from(status.manifest.as_ref()),
        }
    }
}

impl From<SelfTest> for SelfTestView {
    fn from(test: SelfTest) -> Self {
        Self {
            max_logit_change: test.max_logit_change,
            mean_logit_change: test.mean_logit_change,
            is_inert: test.is_inert(),
        }
    }
}

impl From<&AdapterManifest> for ManifestView {
    fn from(manifest: &AdapterManifest) -> Self {
        let manifest = manifest.clone();
        let sampling = manifest.sampling;
        Self {
            task: manifest.task,
            description: manifest.description,
            base: manifest.base,
            licence: manifest.licence,
            pin: manifest.pin,
            prompt: manifest.prompt,
            stop: manifest.stop,
            sampling: json!({
                "temperature": sampling.temperature, "top_p": sampling.top_p, "max_tokens": sampling.max_tokens
            }),
        }
    }
}

pub async fn list(State(state): State<AppState>, Extension(caller): Extension<Caller>) -> Json<Value> {
    let adapters = state.generation.visible_adapters(&caller.access).into_iter();
    let data: Vec<_> = adapters.map(|status| AdapterView::new(&state, status)).collect();
    Json(json!({"object": "list", "data": data}))
}

pub async fn get(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    PathName(name): PathName,
) -> Result<Response, ApiError> {
    let status = visible(&state, &caller, &name)?;
    Ok(view(&state, StatusCode::OK, status))
}

/// Registers an adapter, or replaces the one of this name.
pub async fn put(
    State(state): State<AppState>,
    _: Admin,
    PathName(name): PathName,
    headers: HeaderMap,
    fields: Fields,
) -> Result<Response, ApiError> {
    fields.refuse_others(&["source", "path", "if_generation"])?;
    let registry = state.generation.adapters();
    let (param, source) = match (fields.string("source")?, fields.string("path")?) {
        (Some(source), None) => ("source", hub_source("source", source)?),
        (None, Some(path)) => ("path", folder_source("path", path)?),
        (Some(_), Some(_)) => return Err(ApiError::invalid("path", "give `source` or `path`, not both")),
        (None, None) => {
            let message = "`source` (`hf:owner/repo`) or `path` (a folder under that of the adapters) is required";
            return Err(ApiError::invalid("source", message));
        }
    };
    let is_new = registry.status(&name).is_none();
    let expected = expected_generation(registry, &name, &headers, Some(&fields))?;
    let installed = registry.install(&name, source, expected.as_deref()).await;
    let status = installed.map_err(|error| of_source(error, param))?;
    Ok(view(&state, if is_new { StatusCode::CREATED } else { StatusCode::OK }, status))
}

/// One that is not there is as good as taken out.
pub async fn delete(
    State(state): State<AppState>,
    _: Admin,
    PathName(name): PathName,
    headers: HeaderMap,
) -> Result<StatusCode, ApiError> {
    let registry = state.generation.adapters();
    let expected = expected_generation(registry, &name, &headers, None)?;
    // The folder is asked: it may hold one that was not noticed yet.
    match registry.remove(&name, expected.as_deref()).await {
        Ok(()) | Err(ChangeError::Unknown(_) | ChangeError::InvalidName(_) | ChangeError::NoFolder) => {
            Ok(StatusCode::NO_CONTENT)
        }
        Err(error) => Err(error.into()),
    }
}

/// What a first request would do, before it comes; so whoever may ask for the adapter may do it.
pub async fn load(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    PathName(name): PathName,
) -> Result<Response, ApiError> {
    let name = visible(&state, &caller, &name)?.name;
    let status = state.generation.adapters().load(&name).await?;
    Ok(view(&state, StatusCode::OK, status))
}

/// Goes back to `generation`, or to the one before.
pub async fn roll_back(
    State(state): State<AppState>,
    _: Admin,
    PathName(name): PathName,
    headers: HeaderMap,
    fields: Option<Fields>,
) -> Result<Response, ApiError> {
    let fields = fields.unwrap_or_else(|| Map::new().into());
    fields.refuse_others(&["generation", "if_generation"])?;
    let registry = state.generation.adapters();
    let to = fields.string("generation")?;
    let expected = expected_generation(registry, &name, &headers, Some(&fields))?;
    let rolled_back = registry.roll_back(&name, to, expected.as_deref()).await;
    let status = rolled_back.map_err(|error| of_source(error, "generation"))?;
    Ok(view(&state, StatusCode::OK, status))
}

/// `param` is where the request says what is to be installed.
fn of_source(error: ChangeError, param: &str) -> ApiError {
    match error {
        ChangeError::Source(message) => ApiError::invalid(param, message),
        other => other.into(),
    }
}

/// A folder under that of the adapters; whether it is one is for the registry to say.
pub fn folder_source(param: &str, text: &str) -> Result<Source, ApiError> {
    let path = PathBuf::from(text);
    if text.is_empty() || path.components().any(|component| component == Component::ParentDir) {
        let message = format!("`{param}` must be a folder under that of the adapters, without `..`");
        return Err(ApiError::invalid(param, message));
    }
    Ok(Source::Folder(path))
}

/// `hf:owner/repo[@revision]`
pub fn hub_source(param: &str, text: &str) -> Result<Source, ApiError> {
    let invalid = || ApiError::invalid(param, format!("`{param}` must be `hf:owner/repo` or `hf:owner/repo@revision`"));
    let text = text.strip_prefix("hf:").ok_or_else(invalid)?;
    let (repo, revision) = match text.split_once('@') {
        Some((repo, revision)) => (repo, Some(revision)),
        None => (text, None),
    };
    let is_segment = |segment: &str| {
        segment.starts_with(|c: char| c.is_ascii_alphanumeric())
            && segment.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))
            && !segment.contains("..")
    };
    let is_repo = repo.split_once('/').is_some_and(|(owner, name)| is_segment(owner) && is_segment(name));
    if !is_repo || revision.is_some_and(|revision| !revision.split('/').all(is_segment)) {
        return Err(invalid());
    }
    Ok(Source::Hub { repo: repo.to_owned(), revision: revision.map(str::to_owned) })
}

fn visible(state: &AppState, caller: &Caller, name: &str) -> Result<AdapterStatus, ApiError> {
    let status = caller.access.allows(name).then(|| state.generation.adapters().status(name)).flatten();
    status.ok_or_else(|| ApiError::adapter_not_found(name))
}

fn view(state: &AppState, status_code: StatusCode, status: AdapterStatus) -> Response {
    let etag = status.files_generation.as_ref().map(|generation| [(header::ETAG, format!("\"{generation}\""))]);
    (status_code, etag, Json(AdapterView::new(state, status))).into_response()
}

/// The generation that a change may replace, from `If-Match`, `If-None-Match: *` or `if_generation` (empty: none yet).
fn expected_generation(
    registry: &AdapterRegistry,
    name: &str,
    headers: &HeaderMap,
    fields: Option<&Fields>,
) -> Result<Option<String>, ApiError> {
    let in_header = |name: header::HeaderName| headers.get(name).map(|value| value.to_str().unwrap_or_default().trim());
    let must_match = in_header(header::IF_MATCH);
    let must_be_new = in_header(header::IF_NONE_MATCH);
    let in_body = fields.map(|fields| fields.string("if_generation")).transpose()?.flatten();
    match (must_match, must_be_new, in_body) {
        (None, None, None) => Ok(None),
        (Some("*"), None, None) => match registry.status(name) {
            Some(status) => Ok(status.files_generation),
            None => Err(ApiError::conflict("`If-Match: *` needs an adapter that is there, and there is none")),
        },
        (Some(tag), None, None) => match tag.strip_prefix('"').and_then(|tag| tag.strip_suffix('"')).unwrap_or(tag) {
            generation if generation.chars().all(|c| c.is_ascii_alphanumeric()) && !generation.is_empty() => {
                Ok(Some(generation.to_owned()))
            }
            _ => Err(ApiError::invalid("If-Match", "`If-Match` must be one generation in quotes, or `*`")),
        },
        (None, Some("*"), None) => Ok(Some(String::new())),
        (None, Some(_), None) => Err(ApiError::invalid("If-None-Match", "`If-None-Match` can only be `*`")),
        (None, None, Some(generation)) => Ok(Some(generation.to_owned())),
        _ => Err(ApiError::invalid("if_generation", "give one of `If-Match`, `If-None-Match` and `if_generation`")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_never_reached_through_its_parent() {
        assert_eq!(folder_source("path", "a/b"), Ok(Source::Folder("a/b".into())));
        assert_eq!(folder_source("path", "a..b"), Ok(Source::Folder("a..b".into())));
        for bad in ["", "..", "../a", "a/../b", "/a/.."] {
            assert!(folder_source("path", bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_hub_source_is_a_repository_with_or_without_a_revision() {
        let hub = |repo: &str, revision: Option<&str>| {
            Ok(Source::Hub { repo: repo.to_owned(), revision: revision.map(str::to_owned) })
        };
        assert_eq!(hub_source("source", "hf:a/b.c-d"), hub("a/b.c-d", None));
        assert_eq!(hub_source("source", "hf:a/b@refs/pr/1"), hub("a/b", Some("refs/pr/1")));
        for bad in
            ["a/b", "hf:", "hf:a", "hf:a/b/c", "hf:../b", "hf:a/b@", "hf:a/b@../c", "hf:a/ b", "hf:/b", "hf:a/b?x"]
        {
            assert!(hub_source("source", bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_expected_generation_is_read_from_one_place() {
        let registry = AdapterRegistry::default();
        let expected = |name: Option<(&'static str, &'static str)>, body: &str| {
            let headers = name.map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()));
            let fields = Fields::parse(body.as_bytes()).unwrap();
            expected_generation(&registry, "a", &headers.into_iter().collect(), Some(&fields))
        };
        assert_eq!(expected(None, "{}"), Ok(None));
        assert_eq!(expected(Some(("if-match", "\"ab12\"")), "{}"), Ok(Some("ab12".to_owned())));
        assert_eq!(expected(Some(("if-match", "ab12")), "{}"), Ok(Some("ab12".to_owned())));
        assert_eq!(expected(Some(("if-none-match", "*")), "{}"), Ok(Some(String::new())));
        assert_eq!(expected(None, r#"{"if_generation": ""}"#), Ok(Some(String::new())));
        for (name, value, body) in [
            ("if-match", "*", "{}"),
            ("if-match", "\"\"", "{}"),
            ("if-match", "\"a\", \"b\"", "{}"),
            ("if-none-match", "\"a\"", "{}"),
            ("if-match", "\"a\"", r#"{"if_generation": "a"}"#),
        ] {
            assert!(expected(Some((name, value)), body).is_err(), "{name}: {value} {body}");
        }
    }
}
