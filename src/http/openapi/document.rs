//! The document while it is put together: operations, and the schemas of the replies they have.

use axum::http::StatusCode;
use schemars::generate::SchemaSettings;
use schemars::{JsonSchema, SchemaGenerator};
use serde_json::{Map, Value, json};

use super::schema::{Properties, item};
use crate::http::dialect::Dialect;
use crate::http::error::ErrorEnvelope;

pub const JSON: &str = "application/json";
pub const EVENTS: &str = "text/event-stream";
/// JSON on lines.
pub const LINES: &str = "application/x-ndjson";
pub const TEXT: &str = "text/plain";

const DESCRIPTION: &str = "One base model and its adapters, behind the interfaces of OpenAI, llama.cpp, Ollama, Anthropic, \
    Mistral and Tabby. What is below `/v1` is served without that prefix too, and what is llama.cpp's with it. Fields that \
    are not listed are ignored where a schema allows others, as none of them can change a reply; `null` is an absent field. \
    The schema of `text/event-stream` is that of one event, the schema of `application/x-ndjson` that of an array of all lines.";

/// What every request may be refused with: its content encoding is not known, the server fails, or takes nothing in.
const ANY: [u16; 3] = [415, 500, 503];
/// What comes with a body.
const OF_BODY: [u16; 3] = [400, 408, 413];

/// Who may ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    Anyone,
    /// Any key of the configuration, where it has some.
    Client,
    /// The admin key.
    Admin,
}

#[derive(Debug)]
pub struct Document {
    paths: Map<String, Value>,
    schemas: SchemaGenerator,
    /// Of requests.
    own_schemas: Map<String, Value>,
    refusals: Map<String, Value>,
}

/// One method of one path.
#[derive(Debug)]
pub struct Operation {
    method: &'static str,
    path: &'static str,
    access: Access,
    /// Those that its errors may be worded in.
    dialects: &'static [Dialect],
    refusals: Vec<u16>,
    fields: Map<String, Value>,
    parameters: Vec<Value>,
    replies: Map<String, Value>,
}

impl Operation {
    pub fn new(method: &'static str, path: &'static str, tag: &str, summary: &str) -> Self {
        let parameters = path.split('/').filter_map(|segment| segment.strip_prefix('{')?.strip_suffix('}'));
        let parameter =
            |name| json!({"name": name, "in": "path", "required": true, "schema": {"type": "string", "minLength": 1}});
        let mut fields = Map::new();
        fields.insert("tags".to_owned(), json!([tag]));
        fields.insert("summary".to_owned(), json!(summary));
        Self {
            method,
            path,
            access: Access::Client,
            dialects: &[Dialect::OpenAi],
            refusals: ANY.to_vec(),
            fields,
            parameters: parameters.map(parameter).collect(),
            replies: Map::new(),
        }
    }

    pub fn get(path: &'static str, tag: &str, summary: &str) -> Self {
        Self::new("get", path, tag, summary)
    }

    pub fn post(path: &'static str, tag: &str, summary: &str) -> Self {
        Self::new("post", path, tag, summary)
    }

    pub fn access(self, access: Access) -> Self {
        Self { access, ..self }
    }

    pub fn dialects(self, dialects: &'static [Dialect]) -> Self {
        Self { dialects, ..self }
    }

    pub fn refuses(mut self, statuses: &[u16]) -> Self {
        self.refusals.extend(statuses);
        self
    }

    /// A body of these fields, `required` among them. The first of `examples` is the shortest.
    pub fn takes(self, properties: Properties, required: &[&str], examples: &[Value]) -> Self {
        self.takes_schema(item(Value::Object(properties), required), examples, true)
    }

    pub fn takes_schema(mut self, schema: Value, examples: &[Value], is_required: bool) -> Self {
        let named = examples.iter().enumerate().map(|(index, value)| (index.to_string(), json!({"value": value})));
        let content = json!({"schema": schema, "examples": named.collect::<Map<_, _>>()});
        self.fields.insert("requestBody".to_owned(), json!({"required": is_required, "content": {JSON: content}}));
        self.refuses(&OF_BODY)
    }

    /// A body that is a form.
    pub fn takes_form(mut self, schema: Value) -> Self {
        let content = json!({"multipart/form-data": {"schema": schema}});
        self.fields.insert("requestBody".to_owned(), json!({"required": true, "content": content}));
        self.refuses(&OF_BODY)
    }

    pub fn query(mut self, name: &str, description: &str, schema: Value) -> Self {
        self.parameters.push(json!({"name": name, "in": "query", "description": description, "schema": schema}));
        self
    }

    pub fn header(mut self, name: &str, description: &str) -> Self {
        self.parameters
            .push(json!({"name": name, "in": "header", "description": description, "schema": {"type": "string"}}));
        self
    }

    /// A reply in one of these media types, by `(type, schema)`.
    pub fn answers(mut self, status: u16, description: &str, contents: &[(&str, Value)]) -> Self {
        let content = contents.iter().map(|(media_type, schema)| ((*media_type).to_owned(), json!({"schema": schema})));
        let content: Map<String, Value> = content.collect();
        let mut reply = json!({"description": description, "headers": {"x-request-id": header("x-request-id")}});
        if !content.is_empty() {
            reply["content"] = content.into();
        }
        self.replies.insert(status.to_string(), reply);
        self
    }

    pub fn answers_with_header(mut self, status: u16, name: &str) -> Self {
        if let Some(reply) = self.replies.get_mut(&status.to_string()) {
            reply["headers"][name] = header(name);
        }
        self
    }

    pub fn describing(mut self, description: &str) -> Self {
        self.fields.insert("description".to_owned(), json!(description));
        self
    }
}

fn header(name: &str) -> Value {
    json!({"$ref": format!("#/components/headers/{name}")})
}

impl Document {
    pub fn new() -> Self {
        let settings = SchemaSettings::draft2020_12().for_serialize().with(|settings| {
            settings.definitions_path = "/components/schemas".into();
            settings.meta_schema = None;
        });
        Self { paths: Map::new(), schemas: settings.into_generator(), own_schemas: Map::new(), refusals: Map::new() }
    }

    /// A reference to the schema of a type that is written.
    pub fn of<T: JsonSchema>(&mut self) -> Value {
        self.schemas.subschema_for::<T>().to_value()
    }

    /// The schema of a `T` of which only some fields may be there.
    pub fn part_of<T: JsonSchema>(&mut self) -> Value {
        let mut schema = T::json_schema(&mut self.schemas);
        schema.remove("required");
        schema.to_value()
    }

    /// A list as OpenAI has them, of `T`.
    pub fn list_of<T: JsonSchema>(&mut self) -> Value {
        let items = self.of::<T>();
        item(json!({"object": {"const": "list"}, "data": {"type": "array", "items": items}}), &["object", "data"])
    }

    /// A reference to a schema that several requests share.
    pub fn share(&mut self, name: &str, schema: impl FnOnce() -> Value) -> Value {
        self.own_schemas.entry(name).or_insert_with(schema);
        json!({"$ref": format!("#/components/schemas/{name}")})
    }

    pub fn add(&mut self, operation: Operation) {
        let Operation { method, path, access, dialects, mut refusals, mut fields, parameters, mut replies } = operation;
        match access {
            Access::Anyone => _ = fields.insert("security".to_owned(), json!([])),
            Access::Client => refusals.push(401),
            Access::Admin => refusals.extend([401, 403]),
        }
        self.describe_streams(dialects, &mut replies);
        for status in refusals {
            let name: String =
                dialects.iter().map(|dialect| format!("{dialect:?}")).chain([status.to_string()]).collect();
            if !self.refusals.contains_key(&name) {
                let refusal = self.refusal(dialects, status);
                self.refusals.insert(name.clone(), refusal);
            }
            replies.insert(status.to_string(), json!({"$ref": format!("#/components/responses/{name}")}));
        }
        if !parameters.is_empty() {
            fields.insert("parameters".to_owned(), parameters.into());
        }
        fields.insert("responses".to_owned(), replies.into());
        self.paths.entry(path).or_insert_with(|| json!({}))[method] = fields.into();
    }

    /// From the schemas of what streams hold to those of streams: of one event, or of all lines. What has begun can only
    /// fail within itself.
    fn describe_streams(&mut self, dialects: &[Dialect], replies: &mut Map<String, Value>) {
        let contents = replies.values_mut().filter_map(|reply| reply.get_mut("content")?.as_object_mut());
        for (media_type, media) in contents.flatten() {
            let schema = media["schema"].take();
            media["schema"] = match media_type.as_str() {
                EVENTS => event(json!({"anyOf": [schema, self.error(dialects)]})),
                LINES => json!({"type": "array", "items": {"anyOf": [schema, self.error(dialects)]}}),
                _ => schema,
            };
        }
    }

    fn error(&mut self, dialects: &[Dialect]) -> Value {
        match dialects {
            [dialect] => self.error_in(*dialect),
            several => json!({"anyOf": several.iter().map(|dialect| self.error_in(*dialect)).collect::<Vec<_>>()}),
        }
    }

    fn error_in(&mut self, dialect: Dialect) -> Value {
        match dialect {
            Dialect::OpenAi => self.of::<ErrorEnvelope>(),
            Dialect::Ollama => self.share("OllamaError", || item(json!({"error": {"type": "string"}}), &["error"])),
            Dialect::Anthropic => self.share("AnthropicError", anthropic_error),
        }
    }

    fn refusal(&mut self, dialects: &[Dialect], status: u16) -> Value {
        let schema = self.error(dialects);
        let reason = StatusCode::from_u16(status).ok().and_then(|status| status.canonical_reason());
        let mut headers = json!({"x-request-id": header("x-request-id")});
        let own = match status {
            401 => Some("www-authenticate"),
            415 => Some("accept-encoding"),
            429 | 503 => Some("retry-after"),
            409 | 501 | 504 | 507 => Some("x-should-retry"),
            _ => None,
        };
        if let Some(name) = own {
            headers[name] = header(name);
        }
        json!({"description": reason, "headers": headers, "content": {JSON: {"schema": schema}}})
    }

    pub fn finish(mut self) -> Value {
        let mut schemas = self.schemas.take_definitions(true);
        schemas.extend(self.own_schemas);
        let header = |is_required: bool, description: &str, schema: Value| json!({"required": is_required, "description": description, "schema": schema});
        let seconds = json!({"type": "integer", "minimum": 0});
        let words = json!({"type": "string", "minLength": 1});
        json!({
            "openapi": "3.1.0",
            "info": {"title": "lorry", "version": env!("CARGO_PKG_VERSION"), "description": DESCRIPTION},
            "security": [{}, {"bearer": []}, {"x-api-key": []}, {"api-key": []}],
            "paths": self.paths,
            "components": {
                "schemas": schemas,
                "responses": self.refusals,
                "headers": {
                    "x-request-id": header(true, "That of the request, or a new one.", words.clone()),
                    "retry-after": header(true, "Seconds to wait.", seconds),
                    "x-should-retry": header(true, "The same would get the same again.", json!({"type": "string", "const": "false"})),
                    "www-authenticate": header(true, "How a key is sent.", json!({"const": "Bearer"})),
                    "accept-encoding": header(true, "What bodies may be encoded in.", json!({"const": "gzip"})),
                    "etag": header(false, "The generation of its files, once it is known.", words),
                },
                "securitySchemes": {
                    "bearer": {"type": "http", "scheme": "bearer"},
                    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
                    "api-key": {"type": "apiKey", "in": "header", "name": "api-key"},
                },
            },
        })
    }
}

/// As OpenAPI 3.2 words an event whose data are JSON.
fn event(schema: Value) -> Value {
    let data = json!({"type": "string", "contentMediaType": JSON, "contentSchema": schema});
    item(json!({"event": {"type": "string"}, "data": {"anyOf": [{"const": "[DONE]"}, data]}}), &["data"])
}

fn anthropic_error() -> Value {
    let error = item(json!({"type": {"type": "string"}, "message": {"type": "string"}}), &["type", "message"]);
    let request_id = json!({"type": ["string", "null"]});
    item(
        json!({"type": {"const": "error"}, "error": error, "request_id": request_id}),
        &["type", "error", "request_id"],
    )
}
