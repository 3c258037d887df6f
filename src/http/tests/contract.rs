//! What `/openapi.json` says of each operation, and whether a reply keeps to it.

use regex::Regex;
use reqwest::header::HeaderMap;
use serde_json::Map;

use super::*;

/// What the document says of one method of one path.
pub struct Operation {
    pub method: Method,
    pub path: String,
    /// Of the body, where that is an object.
    pub properties: Map<String, Value>,
    /// Whether the body may have no other fields.
    pub is_closed: bool,
    pub examples: Vec<Value>,
    /// By status.
    responses: Map<String, Value>,
}

/// What came back.
pub struct Sent {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub text: String,
}

/// All that `server` documents.
pub async fn documented(server: &Server) -> Vec<Operation> {
    let document = server.request(Method::GET, "/openapi.json").send().await.unwrap();
    let document: Value = document.json().await.unwrap();
    let mut operations = Vec::new();
    for (path, methods) in document["paths"].as_object().unwrap() {
        for (method, operation) in methods.as_object().unwrap() {
            let content = &operation["requestBody"]["content"]["application/json"];
            let examples = content["examples"].as_object().into_iter().flat_map(Map::values);
            operations.push(Operation {
                method: method.to_uppercase().parse().unwrap(),
                path: path.clone(),
                properties: properties(&content["schema"]),
                is_closed: content["schema"]["additionalProperties"] == false,
                examples: examples.map(|example| example["value"].clone()).collect(),
                responses: operation["responses"].as_object().unwrap().clone(),
            });
        }
    }
    operations
}

/// In what a reply is no error as this path's clients read it.
pub fn fault_of_error(path: &str, reply: &Sent) -> Option<String> {
    let error: Value = serde_json::from_str(&reply.text).unwrap_or_default();
    let is_text = |value: &Value| value.as_str().is_some_and(|text| !text.is_empty());
    let is_one = if path.starts_with("/api/") {
        is_text(&error["error"])
    } else if path.starts_with("/v1/messages") {
        error["type"] == "error" && is_text(&error["error"]["type"]) && is_text(&error["error"]["message"])
    } else {
        let error = &error["error"];
        let has_all = ["message", "type", "param", "code"].iter().all(|name| error.get(*name).is_some());
        has_all && is_text(&error["message"]) && is_text(&error["type"])
    };
    (!is_one).then(|| format!("{} {:.500} is no error of {path}", reply.status, reply.text))
}

/// Those of a schema and of its alternatives.
fn properties(schema: &Value) -> Map<String, Value> {
    let alternatives = schema["anyOf"].as_array().into_iter().flatten().flat_map(properties);
    let own = schema["properties"].as_object().into_iter().flatten().map(|(name, value)| (name.clone(), value.clone()));
    alternatives.chain(own).collect()
}

impl Operation {
    /// With `x` in the places of the path.
    pub fn request(&self, server: &Server) -> RequestBuilder {
        server.request(self.method.clone(), &concrete(&self.path)).bearer_auth("admin")
    }

    pub async fn send(&self, server: &Server, body: &Value) -> Sent {
        sent(self.request(server).body(body.to_string())).await
    }

    /// In what a reply is not what the document says; its body is held against its schema where real models are.
    pub fn fault(&self, reply: &Sent) -> Option<String> {
        let status = reply.status;
        let Some(documented) = self.responses.get(status.as_str()) else {
            return Some(format!("{status} is not documented: {:.500}", reply.text));
        };
        if self.method == Method::HEAD {
            return None;
        }
        if status.is_client_error() || status.is_server_error() {
            return fault_of_error(&self.path, reply);
        }
        let media_type = reply.headers.get("content-type").map_or("", |value| value.to_str().unwrap());
        let media_type = media_type.split(';').next().unwrap_or_default();
        let is_known = documented["content"].as_object().is_none_or(|content| content.contains_key(media_type));
        (!is_known).then(|| format!("{media_type:?} is not documented"))
    }

    pub fn has_status(&self, status: u16) -> bool {
        self.responses.contains_key(&status.to_string())
    }

    /// For messages.
    pub fn name(&self) -> String {
        format!("{} {}", self.method, self.path)
    }
}

pub async fn sent(request: RequestBuilder) -> Sent {
    let response = request.send().await.unwrap();
    let (status, headers) = (response.status(), response.headers().clone());
    Sent { status, headers, text: response.text().await.unwrap() }
}

/// A path whose parameters are given.
pub fn concrete(path: &str) -> String {
    with_parameters(path, "x")
}

pub fn with_parameters(path: &str, value: &str) -> String {
    Regex::new(r"\{[^}]*\}").unwrap().replace_all(path, value).into_owned()
}
