//! Anthropic's interface; its list of models is OpenAI's with another header.

use serde_json::{Value, json};

use super::document::{Document, EVENTS, JSON, Operation};
use super::fields::{chat, unserved_of_route};
use super::openai::OF_GENERATION;
use super::schema::{
    Properties, array, boolean, count, item, not_null, number, object, properties, required_text, text,
};
use crate::http::anthropic::{Message, TokenCount};
use crate::http::dialect::Dialect;
use crate::http::unsupported::Route;

const TAG: &str = "Anthropic";

pub fn describe(document: &mut Document) {
    let mut fields = fields(document);
    let messages = json!([{"role": "user", "content": "Reverse a string in Python."}]);
    let count_operation = Operation::post("/v1/messages/count_tokens", TAG, "The tokens of a request")
        .dialects(&[Dialect::Anthropic])
        .takes(
            fields.clone(),
            &["messages"],
            &[json!({"messages": messages}), json!({"messages": messages, "use_beam_search": true})],
        );
    fields.insert("max_tokens".to_owned(), not_null(count(1, u32::MAX, "Most tokens of the answer.")));
    fields.insert("stream".to_owned(), boolean("Sends the answer as events while it is written."));
    let message = document.of::<Message>();
    let event = item(json!({"type": required_text()}), &["type"]);
    document.add(
        Operation::post("/v1/messages", TAG, "Answers a chat")
            .dialects(&[Dialect::Anthropic])
            .takes(
                fields,
                &["messages", "max_tokens"],
                &[
                    json!({"messages": messages, "max_tokens": 16}),
                    json!({"messages": messages, "max_tokens": 2, "use_beam_search": true}),
                ],
            )
            .answers(200, "The answer.", &[(JSON, message), (EVENTS, event)])
            .refuses(&OF_GENERATION),
    );
    let count = document.of::<TokenCount>();
    document.add(count_operation.answers(200, "Of the whole prompt.", &[(JSON, count)]).refuses(&[404, 422, 502]));
}

fn fields(document: &mut Document) -> Properties {
    let mut fields = chat(document);
    let message = document.share("AnthropicMessageRequest", message);
    let clearing = item(json!({"type": {"type": "string", "pattern": "^clear_thinking"}}), &["type"]);
    let edits = json!({"type": ["array", "null"], "items": clearing});
    let format = json!({"type": {"const": "json_schema"}, "schema": {"type": ["object", "boolean", "string"]}});
    let format = item(format, &["type", "schema"]);
    fields.extend(unserved_of_route(Route::Messages));
    fields.extend(properties(json!({
        "messages": {"type": "array", "minItems": 1, "items": message},
        "system": {"anyOf": [{"type": ["string", "null"]}, {"type": "array", "items": text_block()}]},
        "temperature": number(0.0, 1.0, "0 takes the likeliest token."),
        "metadata": object(json!({"user_id": text("Who the request is for.")}), &[], "Of the request."),
        "tools": array(tool(), "Functions that may be called."),
        "tool_choice": tool_choice(),
        "thinking": {
            "description": "No model here reasons before it answers.",
            "anyOf": [{"type": "null"}, item(json!({"type": {"enum": ["disabled", "adaptive"]}}), &["type"])],
        },
        "context_management": {"description": "Only thinking, which is not kept, may be cleared.",
            "anyOf": [{"type": "null"}, item(json!({"edits": edits}), &[])]},
        "output_config": object(json!({"format": format}), &[], "Its `format` is what the output must be."),
        "output_format": {"anyOf": [{"enum": [null, {}]}, format], "description": "The older name of `output_config.format`."},
    })));
    fields
}

fn text_block() -> Value {
    item(json!({"type": {"const": "text"}, "text": required_text()}), &["type", "text"])
}

fn message() -> Value {
    let texts = json!({"anyOf": [{"type": ["string", "null"]}, {"type": "array", "items": text_block()}]});
    let result = item(
        json!({"type": {"const": "tool_result"}, "tool_use_id": required_text(), "content": texts}),
        &["type", "tool_use_id"],
    );
    let call = item(
        json!({"type": {"const": "tool_use"}, "id": required_text(), "name": required_text(), "input": {"type": "object"}}),
        &["type", "id", "name", "input"],
    );
    let thinking = item(json!({"type": {"enum": ["thinking", "redacted_thinking"]}}), &["type"]);
    let of = |role: &str, blocks: &[Value]| {
        let blocks = json!({"type": "array", "items": {"anyOf": blocks}});
        item(json!({"role": {"const": role}, "content": {"anyOf": [{"type": "string"}, blocks]}}), &["role", "content"])
    };
    json!({"anyOf": [of("user", &[text_block(), result]), of("assistant", &[text_block(), call, thinking])]})
}

fn tool() -> Value {
    item(
        json!({
            "type": {"enum": ["custom", null]},
            "name": {"type": "string", "minLength": 1},
            "description": text("What it does."),
            "input_schema": {"type": "object"},
            "strict": boolean("Whether a call's input must be what the schema says; a forced call's always is."),
        }),
        &["name", "input_schema"],
    )
}

fn tool_choice() -> Value {
    json!({"description": "Whether a function is called, or which.", "anyOf": [
        {"type": "null"},
        item(json!({"type": {"enum": ["auto", "any", "none"]}, "disable_parallel_tool_use": boolean("Ends with the first call.")}), &["type"]),
        item(json!({"type": {"const": "tool"}, "name": required_text()}), &["type", "name"]),
    ]})
}
