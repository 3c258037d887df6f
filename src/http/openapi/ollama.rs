//! Ollama's interface.

use serde_json::{Value, json};

use super::document::{Document, JSON, LINES, Operation};
use super::fields::{chat, completion_or_chat, unserved_of_route};
use super::openai::OF_GENERATION;
use super::schema::{Properties, array, boolean, item, object, one_of, properties, required_text, text};
use crate::http::dialect::Dialect;
use crate::http::ollama::{Models, OWN_FIELDS, Reply, Version};
use crate::http::unsupported::Route;

const TAG: &str = "Ollama";
/// The options that draw tokens in Ollama, too.
const OPTIONS: [&str; 10] = [
    "num_predict",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "seed",
    "stop",
    "repeat_penalty",
    "presence_penalty",
    "frequency_penalty",
];

pub fn describe(document: &mut Document) {
    let models = document.of::<Models>();
    let version = document.of::<Version>();
    document.add(get("/api/version", "The interface that is spoken").answers(200, "Its version.", &[(JSON, version)]));
    document.add(get("/api/tags", "What may be asked for").answers(200, "All models.", &[(JSON, models.clone())]));
    document.add(get("/api/ps", "What is in memory").answers(200, "The models in memory.", &[(JSON, models)]));
    describe_show(document);
    describe_generation(document);
    describe_unserved(document);
}

fn get(path: &'static str, summary: &str) -> Operation {
    Operation::get(path, TAG, summary).dialects(&[Dialect::Ollama])
}

fn post(path: &'static str, summary: &str) -> Operation {
    Operation::post(path, TAG, summary).dialects(&[Dialect::Ollama])
}

fn describe_show(document: &mut Document) {
    let name = || json!({"type": "string", "minLength": 1});
    let shown = item(
        json!({
            "modelfile": required_text(),
            "template": required_text(),
            "parameters": required_text(),
            "license": required_text(),
            "details": {"type": "object"},
            "model_info": {"type": "object"},
            "capabilities": {"type": "array", "items": required_text()},
            "modified_at": {"type": "string", "format": "date-time"},
        }),
        &["modelfile", "template", "details", "model_info", "capabilities", "modified_at"],
    );
    document.add(
        post("/api/show", "What a model is and can do")
            .takes_schema(
                json!({"type": "object", "properties": {"model": text("Its name."), "name": text("The same, as older clients send it.")},
                    "anyOf": [
                        {"required": ["model"], "properties": {"model": name()}},
                        {"required": ["name"], "properties": {"name": name()}},
                    ]}),
                &[json!({"model": "lorry"}), json!({"name": "lorry"})],
                true,
            )
            .answers(200, "The model.", &[(JSON, shown)])
            .refuses(&[404]),
    );
}

fn describe_generation(document: &mut Document) {
    let mut fields = of_ollama(document, completion_or_chat);
    fields.extend(properties(json!({
        "prompt": text("What the model answers or completes; nothing only brings the model into memory."),
        "suffix": text("What is behind the gap that the output fills."),
        "raw": boolean("Leaves the chat template out."),
        "system": text("Instructions, where the chat template has a place for them."),
    })));
    let reply = document.of::<Reply<'_>>();
    let replies = [(JSON, reply.clone()), (LINES, reply)];
    document.add(
        post("/api/generate", "Answers or completes a prompt")
            .takes(
                fields,
                &[],
                &[
                    json!({"prompt": "def add(a, b):", "raw": true, "stream": false, "options": {"num_predict": 16}}),
                    json!({"prompt": "def add(a, b):", "options": {"num_predict": 2}, "use_beam_search": true}),
                    json!({"keep_alive": "5m"}),
                ],
            )
            .answers(200, "One line for each part of the output; one object where `stream` is false.", &replies)
            .refuses(&OF_GENERATION),
    );
    let mut fields = of_ollama(document, chat);
    let message =
        object(json!({"role": required_text(), "images": {"enum": [[], null]}}), &["role"], "As in OpenAI's.");
    fields.insert("messages".to_owned(), array(super::schema::not_null(message), "The conversation so far."));
    let messages = json!([{"role": "user", "content": "Reverse a string in Python."}]);
    document.add(
        post("/api/chat", "Answers a chat")
            .takes(
                fields,
                &[],
                &[
                    json!({"messages": messages, "stream": false, "options": {"num_predict": 16}}),
                    json!({"messages": messages, "options": {"num_predict": 2}, "use_beam_search": true}),
                    json!({"keep_alive": "5m"}),
                ],
            )
            .answers(200, "One line for each part of the output; one object where `stream` is false.", &replies)
            .refuses(&OF_GENERATION),
    );
}

/// `fields` of OpenAI's that Ollama lacks are read too, beside its own.
fn of_ollama(document: &mut Document, fields: fn(&mut Document) -> Properties) -> Properties {
    let mut fields = fields(document);
    let options: Properties = OPTIONS.into_iter().map(|name| (name.to_owned(), fields[name].clone())).collect();
    fields.retain(|name, _| !OWN_FIELDS.contains(&name.as_str()));
    fields.extend(unserved_of_route(Route::Ollama));
    fields.extend(properties(json!({
        "model": text("What `/api/tags` lists; `:latest` may stand behind it."),
        "name": text("The same, as older clients send it."),
        "options": object(
            Value::Object(options),
            &[],
            "How tokens are drawn, by these or by any field that is read beside it. What lays out memory is the server's own.",
        ),
        "stream": boolean("Whether the reply comes in lines while it is written; true by default."),
        "keep_alive": {"type": ["string", "number", "null"], "description": "Where nothing is asked: 0 unloads, in name."},
        "format": {"description": "`json`, or a JSON schema.", "anyOf": [one_of(&["", "json"], ""), {"type": "object"}]},
    })));
    fields
}

fn describe_unserved(document: &mut Document) {
    for (method, path) in [
        ("post", "/api/pull"),
        ("post", "/api/push"),
        ("post", "/api/create"),
        ("post", "/api/copy"),
        ("delete", "/api/delete"),
        ("post", "/api/blobs/{digest}"),
        ("head", "/api/blobs/{digest}"),
        ("post", "/api/embed"),
        ("post", "/api/embeddings"),
    ] {
        let operation = Operation::new(method, path, TAG, "Not served: says what to do instead");
        document.add(operation.dialects(&[Dialect::Ollama]).refuses(&[501]));
    }
}
