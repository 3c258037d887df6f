//! Who is asking, and what that opens: `Authorization: Bearer KEY`, or Anthropic's `x-api-key` and Azure's `api-key`,
//! against the keys of the configuration.

use std::sync::Arc;

use axum::extract::{FromRequestParts, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};

use super::AppState;
use super::error::ApiError;
use super::key_limits::KeyLimits;
use super::request_log::RequestLog;
use crate::config::{Secret, ServerConfig};
use crate::engine::fairness::Account;
use crate::generation::Access;
use crate::hexadecimal::hexadecimal;
use crate::rate_limit::RateLimit;

const API_KEYS: [HeaderName; 2] = [HeaderName::from_static("x-api-key"), HeaderName::from_static("api-key")];

#[derive(Debug)]
pub struct Keys {
    admin: Secret,
    /// None of them: the API is open, except for changes.
    clients: Vec<Client>,
}

#[derive(Debug)]
struct Client {
    key: Secret,
    access: Access,
    account: Account,
    limits: KeyLimits,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Role {
    Anyone,
    Client,
    Admin,
}

/// In the extensions of every request behind [`authenticate`].
#[derive(Debug, Clone)]
pub struct Caller {
    role: Role,
    /// The adapters it may know of.
    pub access: Access,
    /// Tells callers apart: a digest of the key they send, needed or not.
    pub identity: Option<String>,
    /// What its requests are charged to.
    pub account: Account,
    /// `None` for whoever may use as much as there is.
    pub limits: Option<KeyLimits>,
    /// Of the request that is asked.
    pub log: RequestLog,
}

impl Caller {
    /// The name of its key, for people; `None` where no key was needed.
    fn key_name(&self) -> Option<Arc<str>> {
        match self.role {
            Role::Anyone => None,
            Role::Client => Some(self.account.key.clone()),
            Role::Admin => Some(Arc::from("admin")),
        }
    }

    /// What pays for the tokens of its requests.
    pub fn token_limit(&self) -> Option<&Arc<RateLimit>> {
        self.limits.as_ref()?.tokens.as_ref()
    }
}

impl Keys {
    pub fn new(config: &ServerConfig) -> Self {
        let clients = config.keys.iter().map(|key| Client {
            key: key.key.clone(),
            access: Access::Only(Arc::from(key.adapters.as_slice())),
            account: Account { key: Arc::from(key.name.as_str()), weight: key.weight, ..Account::default() },
            limits: KeyLimits::new(key),
        });
        Self { admin: config.admin_key.clone(), clients: clients.collect() }
    }

    fn caller(&self, given: Option<&str>) -> Result<Caller, ApiError> {
        let caller = |role| Caller {
            role,
            access: Access::All,
            identity: given.map(identity),
            account: Account::default(),
            limits: None,
            log: RequestLog::default(),
        };
        if given.is_some_and(|given| self.admin.matches(given)) {
            return Ok(caller(Role::Admin));
        }
        if self.clients.is_empty() {
            // Clients send a key whether one is needed or not.
            return Ok(caller(Role::Anyone));
        }
        let client = given.and_then(|given| self.clients.iter().find(|client| client.key.matches(given)));
        match client {
            Some(Client { access, account, limits, .. }) => {
                let (access, account, limits) = (access.clone(), account.clone(), Some(limits.clone()));
                Ok(Caller { access, account, limits, ..caller(Role::Client) })
            }
            None => Err(ApiError::unauthorized("this server needs a key: send `Authorization: Bearer KEY`")),
        }
    }

    /// Which adapters a scrape may name. Probes send no key, and are answered without one.
    pub fn scraper_access(&self, headers: &HeaderMap) -> Result<Access, ApiError> {
        match key(headers) {
            None if !self.clients.is_empty() => Ok(Access::Only(Arc::from([]))),
            given => self.caller(given).map(|caller| caller.access),
        }
    }

    fn check_admin(&self, role: &Role) -> Result<(), ApiError> {
        match role {
            _ if self.admin.is_empty() => Err(ApiError::forbidden(
                "changes_off",
                "changes are off on this server: set server.admin_key to allow them",
            )),
            Role::Admin => Ok(()),
            Role::Client => {
                Err(ApiError::forbidden("admin_key_required", "changes need the admin key, not a client's"))
            }
            Role::Anyone => {
                Err(ApiError::unauthorized("changes need the admin key: send it as `Authorization: Bearer KEY`"))
            }
        }
    }
}

/// Lets a request through with its [`Caller`], or answers 401.
pub async fn authenticate(State(state): State<AppState>, mut request: Request, next: Next) -> Response {
    match state.keys.caller(key(request.headers())) {
        Ok(mut caller) => {
            if let Some(log) = request.extensions().get::<RequestLog>() {
                caller.log = log.clone();
                caller.log.asked_by(caller.key_name());
            }
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        Err(error) => error.into_response(),
    }
}

/// An argument of every handler that changes something: without the admin key the handler is not called.
#[derive(Debug)]
pub struct Admin;

impl FromRequestParts<AppState> for Admin {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &AppState) -> Result<Self, ApiError> {
        let caller = state.keys.caller(key(&parts.headers))?;
        state.keys.check_admin(&caller.role).map(|()| Self)
    }
}

fn identity(key: &str) -> String {
    hexadecimal(Sha256::new_with_prefix(key))
}

fn key(headers: &HeaderMap) -> Option<&str> {
    bearer(headers).or_else(|| API_KEYS.iter().find_map(|name| headers.get(name)?.to_str().ok()))
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, key) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
}

#[cfg(test)]
mod tests {
    use axum::http::StatusCode;

    use super::*;
    use crate::config::{Config, Overrides};

    fn keys(admin: &str, clients: &str) -> Keys {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lorry.toml");
        std::fs::write(&path, format!("[server]\nadmin_key = '{admin}'\n{clients}")).unwrap();
        Keys::new(&Config::load(Some(&path), &Overrides::default()).unwrap().server)
    }

    const CLIENT: &str = "[[server.keys]]\nname = 'c'\nkey = 'client'\nadapters = ['a*']";

    fn may_change(keys: &Keys, given: Option<&str>) -> Result<(), StatusCode> {
        let allowed = keys.caller(given).and_then(|caller| keys.check_admin(&caller.role));
        allowed.map_err(|error| error.into_response().status())
    }

    #[test]
    fn without_keys_anyone_may_ask_and_nobody_may_change() {
        let keys = keys("", "");
        for given in [None, Some(""), Some("none")] {
            assert_eq!(keys.caller(given).unwrap().access, Access::All);
            assert_eq!(may_change(&keys, given), Err(StatusCode::FORBIDDEN));
        }
    }

    #[test]
    fn with_an_admin_key_anyone_may_ask_and_it_alone_may_change() {
        let keys = keys("admin", "");
        assert!(keys.caller(None).is_ok() && keys.caller(Some("wrong")).is_ok());
        assert_eq!(may_change(&keys, None), Err(StatusCode::UNAUTHORIZED));
        assert_eq!(may_change(&keys, Some("wrong")), Err(StatusCode::UNAUTHORIZED));
        assert_eq!(may_change(&keys, Some("admin")), Ok(()));
    }

    #[test]
    fn with_client_keys_each_opens_its_own_adapters_and_nothing_else_gets_in() {
        let keys = keys("admin", CLIENT);
        for given in [None, Some(""), Some("wrong")] {
            assert_eq!(keys.caller(given).unwrap_err().into_response().status(), StatusCode::UNAUTHORIZED);
        }
        let client = keys.caller(Some("client")).unwrap().access;
        assert!(client.allows("ab") && !client.allows("b"));
        assert_eq!(may_change(&keys, Some("client")), Err(StatusCode::FORBIDDEN));
        assert_eq!(may_change(&keys, Some("admin")), Ok(()));
    }

    #[test]
    fn a_key_may_come_as_anthropics_clients_send_it() {
        let headers = |values: &[(&'static str, &str)]| {
            HeaderMap::from_iter(
                values.iter().map(|(name, value)| (HeaderName::from_static(name), value.parse().unwrap())),
            )
        };
        assert_eq!(key(&headers(&[("x-api-key", "k")])), Some("k"));
        assert_eq!(key(&headers(&[("api-key", "k")])), Some("k"));
        assert_eq!(key(&headers(&[("x-api-key", "k"), ("authorization", "Bearer b")])), Some("b"));
        assert_eq!(key(&headers(&[])), None);
    }

    #[test]
    fn the_scheme_is_read_in_any_case_and_other_schemes_are_no_key() {
        let bearer_of = |value: &str| {
            let headers = HeaderMap::from_iter([(header::AUTHORIZATION, value.parse().unwrap())]);
            bearer(&headers).map(str::to_owned)
        };
        assert_eq!(bearer_of("Bearer k").as_deref(), Some("k"));
        assert_eq!(bearer_of("bearer  k ").as_deref(), Some("k"));
        assert_eq!((bearer_of("Basic k"), bearer_of("k")), (None, None));
    }
}
