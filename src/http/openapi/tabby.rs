//! Tabby's interface. Its completions are OpenAI's with `segments`, its votes are with the others.

use serde_json::json;

use super::document::{Document, JSON, Operation};
use super::schema::{Properties, array, item, object, properties, required_text, text};
use crate::http::tabby::{Health, SNIPPETS};

const TAG: &str = "Tabby";

pub fn describe(document: &mut Document) {
    let health = document.of::<Health>();
    for method in ["get", "post"] {
        let operation = Operation::new(method, "/v1/health", TAG, "What is served, and on what");
        document.add(operation.answers(200, "The server takes requests.", &[(JSON, health.clone())]));
    }
    let setting = item(json!({"disable_client_side_telemetry": {"const": true}}), &["disable_client_side_telemetry"]);
    document.add(Operation::get("/v1beta/server_setting", TAG, "What plugins are to do").answers(
        200,
        "They send no telemetry.",
        &[(JSON, setting)],
    ));
    let names = json!({"type": ["array", "null"], "items": required_text()});
    let models =
        item(json!({"completion": names, "chat": names, "embedding": {"type": "null"}}), &["completion", "chat"]);
    document.add(Operation::get("/v1beta/models", TAG, "What may be asked for").answers(
        200,
        "By what it can do.",
        &[(JSON, models)],
    ));
}

/// What `/v1/completions` reads of Tabby's plugins.
pub fn segments() -> Properties {
    let snippet = item(json!({"filepath": text("Its file."), "body": text("What it says.")}), &[]);
    let mut segments = properties(json!({
        "prefix": required_text(),
        "suffix": text("What is behind the cursor."),
        "clipboard": text("What was copied last."),
    }));
    for name in SNIPPETS {
        segments.insert(name.to_owned(), array(snippet.clone(), "The most relevant first."));
    }
    properties(json!({
        "segments": {"description": "What surrounds the cursor; empty where `prompt` is used.", "anyOf": [
            {"type": "null"},
            {"type": "object", "maxProperties": 0},
            item(json!(segments), &["prefix"]),
        ]},
        "language": text("Of the file."),
        "mode": text("Only `standard` is served with `segments`."),
        "debug_options": object(json!({}), &[], "`raw_prompt` is not served with `segments`."),
    }))
}
