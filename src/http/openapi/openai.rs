//! OpenAI's interface, with Mistral's for gaps.

use serde_json::{Value, json};

use super::document::{Document, EVENTS, JSON, Operation};
use super::fields::{chat, completion, delivery, unserved_of_route};
use super::schema::{Properties, array, boolean, count, item, object, one_of, properties, required_text, text};
use crate::http::dialect::Dialect;
use crate::http::models::{AnthropicModelCard, AnthropicModelList, ModelCard, ModelList};
use crate::http::tabby;
use crate::http::types::{ChatChoice, ChatChunkChoice, CompletionChoice, Reply};
use crate::http::unsupported::Route;

const TAG: &str = "OpenAI";
/// A model that is not there, an adapter that cannot be served, a key's limit, an endpoint for embeddings that fails, and the
/// server's limit of time.
pub const OF_GENERATION: [u16; 5] = [404, 422, 429, 502, 504];

pub fn describe(document: &mut Document) {
    describe_completions(document);
    describe_chat(document);
    describe_responses(document);
    let ids = (document.of::<ModelList>(), document.of::<AnthropicModelList>());
    document.add(models("/v1/models", "The base, the adapters, and what else may be asked for").answers(
        200,
        "In Anthropic's form where `anthropic-version` is sent.",
        &[(JSON, either(ids))],
    ));
    let card = (document.of::<ModelCard>(), document.of::<AnthropicModelCard>());
    document.add(
        models("/v1/models/{id}", "One of them, by any name that a request may give it")
            .answers(200, "In Anthropic's form where `anthropic-version` is sent.", &[(JSON, either(card))])
            .refuses(&[400, 404]),
    );
}

fn models(path: &'static str, summary: &str) -> Operation {
    let operation = Operation::get(path, TAG, summary).header("anthropic-version", "Asks for Anthropic's form.");
    operation.dialects(&[Dialect::OpenAi, Dialect::Anthropic])
}

fn either((first, second): (Value, Value)) -> Value {
    json!({"anyOf": [first, second]})
}

fn describe_completions(document: &mut Document) {
    let mut fields = completion(document);
    fields.extend(delivery());
    let mut with_segments = fields.clone();
    with_segments.extend(super::tabby::segments());
    let (reply, tabby) = (document.of::<Reply<'_, CompletionChoice>>(), document.of::<tabby::Completion>());
    let chunk = reply.clone();
    document.add(
        Operation::post("/v1/completions", TAG, "Completes a prompt, or fills the gap before `suffix`")
            .describing("Tabby's plugins send `segments` instead of `prompt`, and get a reply of their own form.")
            .takes_schema(
                json!({"type": "object", "properties": with_segments, "anyOf": [
                    {"required": ["prompt"]},
                    {"required": ["segments"]},
                ]}),
                &[
                    json!({"prompt": "def add(a, b):", "max_tokens": 16}),
                    json!({"prompt": "def add(a, b):", "max_tokens": 2, "n": 1, "use_beam_search": true}),
                    json!({"segments": {"prefix": "def add(a, b):\n    return "}}),
                ],
                true,
            )
            .answers(200, "The completion.", &[(JSON, either((reply, tabby))), (EVENTS, chunk)])
            .refuses(&OF_GENERATION)
            .refuses(&[501]),
    );
    fields.insert("prompt".to_owned(), required_text());
    let reply = document.of::<Reply<'_, ChatChoice>>();
    let chunk = document.of::<Reply<'_, ChatChunkChoice>>();
    document.add(
        Operation::post("/v1/fim/completions", "Mistral", "Fills the gap between `prompt` and `suffix`")
            .takes(
                fields,
                &["prompt"],
                &[
                    json!({"prompt": "def add(a, b):", "suffix": "", "max_tokens": 16}),
                    json!({"prompt": "def add(a, b):", "max_tokens": 2, "use_beam_search": true}),
                ],
            )
            .answers(200, "In the form of a chat's reply.", &[(JSON, reply), (EVENTS, chunk)])
            .refuses(&OF_GENERATION),
    );
}

fn describe_chat(document: &mut Document) {
    let mut fields = chat(document);
    fields.extend(delivery());
    let reply = document.of::<Reply<'_, ChatChoice>>();
    let chunk = document.of::<Reply<'_, ChatChunkChoice>>();
    document.add(
        Operation::post("/v1/chat/completions", TAG, "Answers a chat")
            .takes(fields, &["messages"], &chat_examples())
            .answers(200, "The answer.", &[(JSON, reply), (EVENTS, chunk)])
            .refuses(&OF_GENERATION),
    );
}

pub fn chat_examples() -> [Value; 2] {
    let messages = json!([{"role": "user", "content": "Reverse a string in Python."}]);
    [
        json!({"messages": messages, "max_tokens": 16}),
        json!({"messages": messages, "max_tokens": 2, "use_beam_search": true}),
    ]
}

fn describe_responses(document: &mut Document) {
    let mut fields = chat(document);
    fields.extend(unserved_of_route(Route::Responses));
    fields.extend(response_fields(document));
    let response = document.share("Response", response);
    let event =
        item(json!({"type": required_text(), "sequence_number": {"type": "integer"}}), &["type", "sequence_number"]);
    document.add(
        Operation::post("/v1/responses", TAG, "Answers, and keeps the answer to go on from")
            .takes(
                fields,
                &["input"],
                &[
                    json!({"input": "Reverse a string in Python.", "max_output_tokens": 16}),
                    json!({"input": "Reverse a string in Python.", "max_output_tokens": 2, "use_beam_search": true}),
                ],
            )
            .answers(200, "The response.", &[(JSON, response.clone()), (EVENTS, event)])
            .refuses(&OF_GENERATION),
    );
    let by_id = |method, summary| Operation::new(method, "/v1/responses/{id}", TAG, summary).refuses(&[400, 404]);
    document.add(by_id("get", "A response that is kept").answers(200, "The response.", &[(JSON, response)]));
    let deleted = json!({"id": required_text(), "object": {"const": "response"}, "deleted": {"const": true}});
    let deleted = item(deleted, &["id", "object", "deleted"]);
    document.add(by_id("delete", "Forgets a response").answers(200, "It is gone.", &[(JSON, deleted)]));
}

fn response_fields(document: &mut Document) -> Properties {
    let item_schema = document.share("ResponseInputItem", input_item);
    let format = json!({"anyOf": [
        {"type": "null"},
        item(json!({"type": {"enum": ["text", "json_object"]}}), &["type"]),
        item(json!({"type": {"const": "json_schema"}, "schema": {"type": ["object", "boolean", "string"]}}), &["type", "schema"]),
    ]});
    let function = item(
        json!({
            "type": {"const": "function"},
            "name": {"type": "string", "minLength": 1},
            "description": text("What it does."),
            "parameters": object(json!({}), &[], "A JSON schema."),
            "strict": boolean("Whether a call's arguments must be what the schema says; a forced call's always are."),
        }),
        &["type", "name"],
    );
    let custom = item(
        json!({"type": {"const": "custom"}, "name": {"type": "string", "minLength": 1}, "description": text("What it does."),
            "format": object(json!({"type": {"const": "text"}}), &[], "Of the input.")}),
        &["type", "name"],
    );
    let namespace = item(
        json!({"type": {"const": "namespace"}, "name": required_text(), "description": text("Of all its functions."),
            "tools": {"type": "array", "items": function}}),
        &["type", "name", "tools"],
    );
    let search = json!({"type": {"const": "web_search"}, "external_web_access": {"const": false}});
    let search = item(search, &["type", "external_web_access"]);
    properties(json!({
        "input": {"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": item_schema}]},
        "instructions": text("What holds for this response alone."),
        "max_output_tokens": count(1, u32::MAX, "Most tokens of the response."),
        "previous_response_id": text("The response that this one goes on from."),
        "store": boolean("Whether it is kept; true by default."),
        "stream": boolean("Sends the response as events while it is written."),
        "stream_options": object(json!({}), &[], "Has no effect."),
        "text": object(
            json!({"format": format, "verbosity": one_of(&["medium"], "No other is served.")}),
            &[],
            "What the text must be.",
        ),
        "reasoning": object(
            json!({
                "effort": one_of(&["none"], "No model here reasons before it answers."),
                "summary": one_of(&["auto", "concise", "detailed", "none"], "Of no reasoning, there is none."),
                "generate_summary": one_of(&["auto", "concise", "detailed", "none"], "The older name."),
            }),
            &[],
            "No model here reasons before it answers.",
        ),
        "include": {"anyOf": [
            {"const": "reasoning.encrypted_content"},
            array(json!({"const": "reasoning.encrypted_content"}), "There is none, so nothing is included."),
        ]},
        "tools": array(
            json!({"anyOf": [function, custom, namespace, search]}),
            "What may be called; a search that has no web finds nothing and is not offered.",
        ),
        "tool_choice": {"anyOf": [
            {"enum": ["auto", "none", "required", null]},
            item(
                json!({"type": {"enum": ["function", "custom"]}, "name": required_text(), "namespace": text("Of the function.")}),
                &["type", "name"],
            ),
        ]},
        "response_format": {
            "anyOf": [{"type": "null"}, item(json!({"type": {"const": "text"}}), &["type"])],
            "description": "Send it as `text.format`.",
        },
    }))
}

fn input_item() -> Value {
    let part = json!({"anyOf": [
        item(json!({"type": {"enum": ["input_text", "output_text", "text"]}, "text": required_text()}), &["type", "text"]),
        item(json!({"type": {"const": "refusal"}, "refusal": required_text()}), &["type", "refusal"]),
    ]});
    let content = json!({"anyOf": [{"type": "string"}, {"type": "array", "items": part}]});
    let role = json!({"enum": crate::http::chat::ROLES});
    json!({"anyOf": [
        item(json!({"type": {"enum": ["message", null]}, "role": role, "content": content}), &["role", "content"]),
        item(
            json!({"type": {"const": "function_call"}, "call_id": text("Its own."), "namespace": text("Of the function."),
                "name": required_text(), "arguments": required_text()}),
            &["type", "name", "arguments"],
        ),
        item(
            json!({"type": {"const": "custom_tool_call"}, "call_id": text("Its own."), "name": required_text(), "input": required_text()}),
            &["type", "name", "input"],
        ),
        item(
            json!({"type": {"enum": ["function_call_output", "custom_tool_call_output"]}, "call_id": required_text(), "output": content}),
            &["type", "call_id", "output"],
        ),
        item(json!({"type": {"const": "reasoning"}}), &["type"]),
    ]})
}

fn response() -> Value {
    item(
        json!({
            "id": required_text(),
            "object": {"const": "response"},
            "created_at": {"type": "integer", "description": "Unix seconds."},
            "status": {"enum": ["in_progress", "completed", "incomplete", "failed"]},
            "error": {"type": ["object", "null"]},
            "incomplete_details": {"type": ["object", "null"]},
            "model": required_text(),
            "output": {"type": "array", "items": {"anyOf": [
                item(
                    json!({"type": {"const": "message"}, "id": required_text(), "status": required_text(),
                        "role": {"const": "assistant"}, "content": {"type": "array", "items": {"type": "object"}}}),
                    &["type", "id", "status", "role", "content"],
                ),
                item(
                    json!({"type": {"const": "function_call"}, "id": required_text(), "status": required_text(),
                        "call_id": required_text(), "name": required_text(), "arguments": required_text()}),
                    &["type", "id", "status", "call_id", "name", "arguments"],
                ),
                item(
                    json!({"type": {"const": "custom_tool_call"}, "id": required_text(), "status": required_text(),
                        "call_id": required_text(), "name": required_text(), "input": required_text()}),
                    &["type", "id", "status", "call_id", "name", "input"],
                ),
            ]}},
            "usage": {"anyOf": [
                {"type": "null"},
                item(
                    json!({"input_tokens": {"type": "integer"}, "output_tokens": {"type": "integer"}, "total_tokens": {"type": "integer"}}),
                    &["input_tokens", "output_tokens", "total_tokens"],
                ),
            ]},
        }),
        &["id", "object", "created_at", "status", "error", "incomplete_details", "model", "output", "usage"],
    )
}
