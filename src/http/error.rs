//! The one error a client sees: `{"error":{"message","type","param","code"}}` under the right status, which `dialect.rs`
//! words anew for the interfaces of others.

use axum::Json;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use schemars::JsonSchema;
use serde::Serialize;

use crate::adapter::registry::{AcquireError, ChangeError};
use crate::generation::GenerationError;
use crate::icl::{IclError, StoreError};

/// OpenAI's and Anthropic's clients send a request again by its status, unless this says otherwise.
const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");
/// What they would send again, and get the same: past a deadline, after as long a wait.
const LASTING: [StatusCode; 4] =
    [StatusCode::CONFLICT, StatusCode::NOT_IMPLEMENTED, StatusCode::GATEWAY_TIMEOUT, StatusCode::INSUFFICIENT_STORAGE];

#[derive(Debug, Clone, PartialEq)]
pub struct ApiError {
    status: StatusCode,
    body: Box<ErrorBody>,
    rejection: Option<Rejection>,
}

/// In the extensions of a response: the request was refused before any generation, and the `reason` of its metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rejection(pub &'static str);

/// The inside of the envelope; also what a stream that breaks sends, and in the extensions of a response.
#[derive(Debug, Clone, PartialEq, JsonSchema, Serialize)]
pub struct ErrorBody {
    message: String,
    #[serde(rename = "type")]
    kind: &'static str,
    /// The field of the request at fault.
    param: Option<String>,
    code: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    n_prompt_tokens: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    n_ctx: Option<usize>,
}

#[derive(Debug, Clone, JsonSchema, Serialize)]
pub struct ErrorEnvelope {
    pub error: Box<ErrorBody>,
}

impl ErrorBody {
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The `type` that Anthropic's clients know.
    pub fn anthropic_type(&self) -> &'static str {
        match self.code {
            Some("model_not_found" | "adapter_not_found" | "store_not_found" | "not_found") => "not_found_error",
            Some("body_too_large") => "request_too_large",
            Some("request_timeout" | "deadline_exceeded") => "timeout_error",
            Some("rate_limit_exceeded") => "rate_limit_error",
            _ if self.kind == "server_error" => "api_error",
            _ => self.kind,
        }
    }
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, code: Option<&'static str>, message: String) -> Self {
        let body = Box::new(ErrorBody { message, kind, param: None, code, n_prompt_tokens: None, n_ctx: None });
        let rejection = Some(Rejection(match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => "unauthorized",
            StatusCode::NOT_FOUND => "not_found",
            StatusCode::SERVICE_UNAVAILABLE => "overloaded",
            StatusCode::NOT_IMPLEMENTED => "invalid",
            StatusCode::TOO_MANY_REQUESTS => "rate_limited",
            StatusCode::GATEWAY_TIMEOUT => "deadline",
            StatusCode::INSUFFICIENT_STORAGE => "storage",
            status if status.is_server_error() => "internal",
            _ => "invalid",
        }));
        Self { status, body, rejection }
    }

    /// What people who look at the metrics have to do about it, where the status does not say that.
    fn because(self, reason: &'static str) -> Self {
        Self { rejection: Some(Rejection(reason)), ..self }
    }

    /// 400 that names the field at fault.
    pub fn invalid(param: &str, message: impl Into<String>) -> Self {
        Self::malformed(message).naming(param)
    }

    /// The field at fault.
    pub fn param(&self) -> Option<&str> {
        self.body.param.as_deref()
    }

    /// The error of one of several requests that were sent as one: `part` says of which, `param` where its field is.
    pub fn of_part(mut self, part: &str, param: &str) -> Self {
        self.body.message = format!("{part}: {}", self.body.message);
        self.naming(param)
    }

    /// The same of the field at fault under another name.
    pub fn renamed(mut self, param: &str) -> Self {
        if let Some(old) = &self.body.param {
            self.body.message = self.body.message.replace(&format!("`{old}`"), &format!("`{param}`"));
        }
        self.naming(param)
    }

    fn naming(mut self, param: &str) -> Self {
        self.body.param = Some(param.to_owned());
        self
    }

    /// 400 for a body that is no JSON object at all.
    pub fn malformed(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", None, message.into())
    }

    /// 401.
    pub fn unauthorized(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "authentication_error", Some("invalid_api_key"), message.into())
    }

    /// 403.
    pub fn forbidden(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "permission_error", Some(code), message.into())
    }

    /// 404, also for an adapter that the caller may not know of.
    pub fn adapter_not_found(name: &str) -> Self {
        Self::unknown_adapter(format!("there is no adapter {name:?}"))
    }

    fn unknown_adapter(message: String) -> Self {
        let error = Self::new(StatusCode::NOT_FOUND, "invalid_request_error", Some("adapter_not_found"), message);
        error.naming("name")
    }

    /// 412.
    pub fn conflict(message: impl Into<String>) -> Self {
        let status = StatusCode::PRECONDITION_FAILED;
        Self::new(status, "invalid_request_error", Some("generation_conflict"), message.into())
    }

    /// 422 for files that cannot be served.
    fn refused(message: String) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid_request_error", Some("adapter_refused"), message)
    }

    /// 404 for a path that is not served.
    pub fn unknown_route(path: &str) -> Self {
        let message = format!("`{path}` is not a path of this server");
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", Some("not_found"), message)
    }

    /// 405.
    pub fn method_not_allowed(method: &str, path: &str) -> Self {
        let message = format!("`{path}` does not accept {method}");
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", Some("method_not_allowed"), message)
    }

    /// 408.
    pub fn body_too_slow(timeout_seconds: u64) -> Self {
        let message = format!("the request body did not come within {timeout_seconds} seconds");
        Self::new(StatusCode::REQUEST_TIMEOUT, "invalid_request_error", Some("request_timeout"), message)
    }

    /// 415.
    pub fn unsupported_encoding(encoding: &str) -> Self {
        let message = format!("the content encoding {encoding:?} is not known: send `gzip`, or none");
        let (status, code) = (StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_content_encoding");
        Self::new(status, "invalid_request_error", Some(code), message)
    }

    /// 413.
    pub fn body_too_large(max_body_bytes: usize) -> Self {
        let message = format!("the request body is larger than {max_body_bytes} bytes");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", Some("body_too_large"), message)
    }

    /// 413 for what is small as it comes, but not when it is read.
    pub fn too_many_values(num_values: usize) -> Self {
        let message = format!(
            "the request body has {num_values} values in its arrays and objects, more than \
             server.max_body_bytes_in_flight has room for"
        );
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", Some("body_too_large"), message)
    }

    /// 429; `kind` is what there is too much of, `requests` or `tokens`.
    pub fn rate_limited(kind: &'static str, message: String) -> Self {
        Self::new(StatusCode::TOO_MANY_REQUESTS, kind, Some("rate_limit_exceeded"), message)
    }

    /// 500 without the cause, which is for the log.
    pub fn internal() -> Self {
        let message = "the server failed to handle this request".to_owned();
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", None, message)
    }

    /// 501 for what other servers have and this one does not.
    pub fn not_served(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_IMPLEMENTED, "invalid_request_error", Some("not_served"), message.into())
    }

    /// 501 for what the model cannot do, in llama.cpp's words.
    pub fn not_supported(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_IMPLEMENTED, "not_supported_error", None, message.into())
    }

    /// 503 that asks to come back; `reason` is that of the metric.
    pub fn unavailable(reason: &'static str, message: impl Into<String>) -> Self {
        let status = StatusCode::SERVICE_UNAVAILABLE;
        Self::new(status, "overloaded_error", Some("overloaded"), message.into()).because(reason)
    }

    /// 503 that says what is wrong with files: the experiments' database, or those of an adapter.
    pub fn storage_unavailable(message: impl Into<String>) -> Self {
        let (status, code) = (StatusCode::SERVICE_UNAVAILABLE, "storage_unavailable");
        Self::new(status, "server_error", Some(code), message.into()).because("storage")
    }

    /// 507 for files that cannot be changed.
    pub fn not_writable(message: String) -> Self {
        Self::new(StatusCode::INSUFFICIENT_STORAGE, "server_error", Some("not_writable"), message)
    }

    /// 404.
    pub fn unknown_experiment(message: impl Into<String>) -> Self {
        let code = "experiment_not_found";
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", Some(code), message.into())
    }

    /// 409.
    pub fn promotion_under_way(message: String) -> Self {
        let code = "promotion_under_way";
        Self::new(StatusCode::CONFLICT, "invalid_request_error", Some(code), message).naming("name")
    }

    /// 404 for an uploaded file.
    pub fn unknown_file(message: String) -> Self {
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", Some("file_not_found"), message).naming("id")
    }

    /// 404 for a fine-tuning job.
    pub fn unknown_job(message: String) -> Self {
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", Some("job_not_found"), message).naming("id")
    }

    /// 404 for a response that is not kept; `param` is where it is named.
    pub fn unknown_response(param: &str, message: String) -> Self {
        let code = "response_not_found";
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", Some(code), message).naming(param)
    }

    pub fn into_envelope(self) -> ErrorEnvelope {
        ErrorEnvelope { error: self.body }
    }
}

impl From<GenerationError> for ApiError {
    fn from(error: GenerationError) -> Self {
        let message = error.to_string();
        match error {
            GenerationError::UnknownModel { param, .. } => {
                let api = Self::new(StatusCode::NOT_FOUND, "invalid_request_error", Some("model_not_found"), message);
                api.naming(&param)
            }
            GenerationError::InvalidParameter { param, .. } => Self::invalid(param, message),
            GenerationError::InvalidSelection { param, .. } => Self::invalid(&param, message),
            GenerationError::Icl(error) => (*error).into(),
            GenerationError::ContextLengthExceeded { param, num_prompt_tokens, context_length } => {
                let mut api = Self::invalid(param, message);
                api.body.code = Some("context_length_exceeded");
                api.body.n_prompt_tokens = Some(num_prompt_tokens);
                api.body.n_ctx = Some(context_length);
                api
            }
            GenerationError::PromptTooLarge { param, context_length, .. } => {
                let mut api = Self::invalid(param, message);
                api.body.code = Some("context_length_exceeded");
                api.body.n_ctx = Some(context_length);
                api
            }
            GenerationError::Overloaded => Self::unavailable("overloaded", message),
            GenerationError::ShuttingDown => Self::unavailable("stopping", message),
            GenerationError::OutOfMemory(_) => Self::unavailable("adapter_memory", message),
            GenerationError::UnreadableAdapter(_) => Self::storage_unavailable(message),
            // Not 503: a proxy that sends it elsewhere at once would have the client wait as long again.
            GenerationError::DeadlineExceeded { .. } => {
                Self::new(StatusCode::GATEWAY_TIMEOUT, "server_error", Some("deadline_exceeded"), message)
            }
            GenerationError::EngineStopped => Self::unavailable("internal", message),
            GenerationError::Failed(_) => {
                let api = Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", None, message);
                Self { rejection: None, ..api }
            }
        }
    }
}

impl From<ChangeError> for ApiError {
    fn from(error: ChangeError) -> Self {
        let message = error.to_string();
        match error {
            ChangeError::InvalidName(_) => Self::invalid("name", message),
            ChangeError::Unknown(_) => Self::unknown_adapter(message),
            ChangeError::Conflict { .. } => Self::conflict(message),
            ChangeError::Refused(_) => Self::refused(message),
            ChangeError::Source(_) => Self::invalid("source", message),
            ChangeError::NoFolder | ChangeError::NoAdapter(_) => {
                Self::new(StatusCode::CONFLICT, "invalid_request_error", Some("no_adapter_folder"), message)
            }
            ChangeError::Folder(_) => Self::not_writable(message),
        }
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        let message = error.to_string();
        let kind = "invalid_request_error";
        match error {
            StoreError::Unknown { .. } => Self::new(StatusCode::NOT_FOUND, kind, Some("store_not_found"), message),
            StoreError::InvalidName(_) => Self::invalid("name", message),
            StoreError::Example { index, field, .. } => Self::invalid(&format!("examples[{index}].{field}"), message),
            StoreError::NumExamples { .. } | StoreError::TooLarge { .. } => Self::invalid("examples", message),
            StoreError::TooManyStores { .. } => Self::malformed(message),
            StoreError::NoFolder => Self::new(StatusCode::CONFLICT, kind, Some("no_store_folder"), message),
            StoreError::NotWritable { .. } => Self::not_writable(message),
        }
    }
}

impl From<AcquireError> for ApiError {
    fn from(error: AcquireError) -> Self {
        let message = error.to_string();
        match error {
            AcquireError::Unknown(_) => Self::unknown_adapter(message),
            AcquireError::Refused { .. } => Self::refused(message),
            AcquireError::Composition(_) => Self::malformed(message),
            AcquireError::OutOfMemory(_) => Self::unavailable("adapter_memory", message),
            AcquireError::Unreadable { .. } => Self::storage_unavailable(message),
        }
    }
}

impl From<IclError> for ApiError {
    fn from(error: IclError) -> Self {
        let message = error.to_string();
        let Some(field) = error.field() else {
            return Self::new(StatusCode::BAD_GATEWAY, "server_error", Some("embedding_failed"), message);
        };
        let mut api = Self::invalid(field, message);
        match error {
            IclError::UnknownStore { .. } => {
                api.status = StatusCode::NOT_FOUND;
                api.body.code = Some("store_not_found");
                return api.because("not_found");
            }
            IclError::PromptTooLong { num_prompt_tokens, max_prompt_tokens, .. } => {
                api.body.code = Some("context_length_exceeded");
                api.body.n_prompt_tokens = Some(num_prompt_tokens);
                api.body.n_ctx = Some(max_prompt_tokens);
            }
            _ => {}
        }
        api
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let (status, rejection) = (self.status, self.rejection);
        let envelope = self.into_envelope();
        let mut response = (status, Json(&envelope)).into_response();
        response.extensions_mut().insert(*envelope.error);
        if let Some(rejection) = rejection {
            response.extensions_mut().insert(rejection);
        }
        if status == StatusCode::SERVICE_UNAVAILABLE {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        if LASTING.contains(&status) {
            response.headers_mut().insert(SHOULD_RETRY, HeaderValue::from_static("false"));
        }
        // What is left of the body would be taken for the next request.
        if status == StatusCode::REQUEST_TIMEOUT {
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        if status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::icl::EmbeddingError;

    fn envelope(error: ApiError) -> serde_json::Value {
        serde_json::to_value(error.into_envelope()).unwrap()
    }

    #[test]
    fn the_envelope_has_all_four_keys_even_when_null() {
        let expected =
            json!({"error": {"message": "no", "type": "invalid_request_error", "param": null, "code": null}});
        assert_eq!(envelope(ApiError::malformed("no")), expected);
    }

    #[test]
    fn an_over_long_prompt_says_by_how_much() {
        let error =
            GenerationError::ContextLengthExceeded { param: "messages", num_prompt_tokens: 9, context_length: 8 };
        let error = envelope(error.into())["error"].clone();
        assert_eq!(error["code"], "context_length_exceeded");
        assert_eq!(error["param"], "messages");
        assert_eq!((&error["n_prompt_tokens"], &error["n_ctx"]), (&json!(9), &json!(8)));
    }

    #[test]
    fn an_unknown_store_is_not_found_and_too_many_examples_say_by_how_much() {
        let unknown = IclError::UnknownStore { store: "s".to_owned(), known: "there are none".to_owned() };
        let unknown = ApiError::from(unknown);
        assert_eq!(unknown.status, StatusCode::NOT_FOUND);
        assert_eq!(envelope(unknown)["error"]["param"], "icl.store");
        let too_long = IclError::PromptTooLong {
            store: "s".to_owned(),
            k: 3,
            num_prompt_tokens: 9,
            max_prompt_tokens: 8,
            num_fitting: 2,
        };
        let error = envelope(too_long.into())["error"].clone();
        assert_eq!(
            (&error["param"], &error["n_prompt_tokens"], &error["n_ctx"]),
            (&json!("icl.k"), &json!(9), &json!(8))
        );
    }

    #[test]
    fn an_embedding_endpoint_that_fails_is_not_the_requests_fault() {
        let error = ApiError::from(IclError::from(EmbeddingError("it answered with status 500".to_owned())));
        assert_eq!(error.status, StatusCode::BAD_GATEWAY);
    }

    #[test]
    fn each_refusal_is_counted_by_what_is_to_be_done_about_it() {
        let text = String::new;
        for (reason, error) in [
            ("unauthorized", ApiError::unauthorized("no")),
            ("unauthorized", ApiError::forbidden("changes_off", "no")),
            ("overloaded", GenerationError::Overloaded.into()),
            ("stopping", GenerationError::ShuttingDown.into()),
            ("adapter_memory", GenerationError::OutOfMemory(text()).into()),
            ("adapter_memory", AcquireError::OutOfMemory(text()).into()),
            ("storage", GenerationError::UnreadableAdapter(text()).into()),
            ("storage", ApiError::not_writable(text())),
            ("internal", GenerationError::EngineStopped.into()),
            ("deadline", GenerationError::DeadlineExceeded { max_seconds: 1 }.into()),
            ("not_found", GenerationError::unknown_model("model", "x").into()),
            ("invalid", ApiError::body_too_large(1)),
        ] {
            assert_eq!(error.rejection, Some(Rejection(reason)), "{error:?}");
        }
    }

    #[test]
    fn an_overloaded_server_says_when_to_come_back() {
        let response = ApiError::from(GenerationError::Overloaded).into_response();
        assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(response.headers()[header::RETRY_AFTER], "1");
    }

    #[test]
    fn what_the_same_request_would_get_again_is_not_to_be_sent_again() {
        for error in [
            ApiError::not_served("no"),
            ApiError::not_supported("no"),
            ApiError::not_writable("no".to_owned()),
            ApiError::promotion_under_way("no".to_owned()),
            StoreError::NoFolder.into(),
            GenerationError::DeadlineExceeded { max_seconds: 1 }.into(),
        ] {
            let response = error.into_response();
            assert_eq!(response.headers()[SHOULD_RETRY], "false", "{}", response.status());
        }
        for error in [ApiError::unavailable("overloaded", "no"), ApiError::internal(), ApiError::body_too_slow(1)] {
            assert!(!error.into_response().headers().contains_key(SHOULD_RETRY));
        }
    }
}
