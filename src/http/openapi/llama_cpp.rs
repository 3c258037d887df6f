//! llama.cpp's interface, and vLLM's form of `/tokenize`.

use serde_json::{Value, json};

use super::document::{Access, Document, EVENTS, JSON, Operation};
use super::fields::{adapter_entry, chat, completion, unserved_of_route};
use super::openai::{OF_GENERATION, chat_examples};
use super::schema::{Properties, array, boolean, count, item, properties, required_text, text};
use crate::http::llama_cpp::{LoraAdapter, Part, Props, Reply};
use crate::http::sampling::MAX_CHOICES;
use crate::http::tokenize::{Detokenized, RenderedPrompt, Tokens};
use crate::http::unsupported::Route;

const TAG: &str = "llama.cpp";

pub fn describe(document: &mut Document) {
    let mut fields = completion(document);
    fields.extend(own());
    fields.extend(unserved_of_route(Route::LlamaCpp));
    let examples = [
        json!({"prompt": "def add(a, b):", "n_predict": 16}),
        json!({"prompt": "def add(a, b):", "n_predict": 2, "use_beam_search": true}),
    ];
    let operation =
        Operation::post("/completion", TAG, "Completes a prompt").takes(fields.clone(), &["prompt"], &examples);
    let operation = replies(document, operation);
    document.add(operation);

    let extra = item(json!({"filename": text("Its name."), "text": text("What is in it.")}), &[]);
    fields.remove("suffix");
    fields.extend(properties(json!({
        "prompt": text("The line up to the cursor."),
        "input_prefix": text("What is before that line."),
        "input_suffix": text("What is behind the cursor."),
        "suffix": text("As `input_suffix`."),
        "input_extra": array(extra, "Text from other files."),
    })));
    let examples = [
        json!({"input_prefix": "def add(a, b):\n", "prompt": "    return ", "input_suffix": "\n", "n_predict": 16}),
        json!({"input_prefix": "def add(a, b):\n", "n_predict": 2, "use_beam_search": true}),
    ];
    let operation =
        Operation::post("/infill", TAG, "Fills the gap at a cursor").takes(fields, &[], &examples).refuses(&[501]);
    let operation = replies(document, operation);
    document.add(operation);

    let props = document.of::<Props>();
    document.add(Operation::get("/props", TAG, "The model and its limits").answers(200, "Both.", &[(JSON, props)]));
    describe_tokens(document);
    describe_adapters(document);
}

fn own() -> Properties {
    properties(json!({
        "n_cmpl": count(1, MAX_CHOICES, "Choices."),
        "stream": boolean("Sends the reply as events while it is written."),
        "return_tokens": boolean("Adds the ids of the output's tokens."),
        "response_fields": array(required_text(), "Paths (`timings/prompt_n`) of all that the reply is to have."),
    }))
}

/// With `response_fields`, a reply has only those.
fn replies(document: &mut Document, operation: Operation) -> Operation {
    let reply = document.part_of::<Reply<'_>>();
    let event = json!({"anyOf": [document.of::<Part>(), reply]});
    let whole = json!({"anyOf": [reply, {"type": "array", "items": reply}]});
    operation
        .answers(200, "One choice, or an array of several.", &[(JSON, whole), (EVENTS, event)])
        .refuses(&OF_GENERATION)
}

fn describe_tokens(document: &mut Document) {
    let tokens = document.of::<Tokens>();
    let mut fields = chat(document);
    fields.extend(properties(json!({
        "content": text("Text, in llama.cpp's form."),
        "prompt": text("A completion's prompt, in vLLM's form."),
        "parse_special": boolean("Whether special tokens in `content` are such; true by default."),
        "add_special": boolean("Puts the token that begins a text before `content`."),
        "add_special_tokens": boolean("As `add_special`, of `prompt`; false for `messages`."),
        "return_token_strs": boolean("Adds the text of each token."),
        "with_pieces": boolean("Tells each token with its text."),
    })));
    let [of_chat, with_beams] = chat_examples();
    let one_of = ["content", "prompt", "messages"].map(|name| json!({"required": [name]}));
    document.add(
        Operation::post("/tokenize", TAG, "The tokens of a text, a prompt or a chat")
            .takes_schema(
                json!({"type": "object", "properties": fields, "anyOf": one_of}),
                &[json!({"content": "a b"}), json!({"prompt": "a b"}), of_chat.clone(), with_beams.clone()],
                true,
            )
            .answers(200, "Ids, or ids with their text.", &[(JSON, tokens)])
            .refuses(&[404, 422, 502]),
    );
    let detokenized = document.of::<Detokenized>();
    let ids = json!({"type": "array", "items": {"type": "integer", "minimum": 0}});
    document.add(
        Operation::post("/detokenize", TAG, "The text of tokens")
            .takes(
                properties(json!({"tokens": ids, "model": text("A name that is checked.")})),
                &["tokens"],
                &[json!({"tokens": [1, 2]})],
            )
            .answers(200, "The text.", &[(JSON, detokenized)])
            .refuses(&[404]),
    );
    let (rendered, mut fields) = (document.of::<RenderedPrompt>(), chat(document));
    fields.remove("add_special_tokens");
    document.add(
        Operation::post("/apply-template", TAG, "The prompt that a chat becomes")
            .takes(fields, &["messages"], &[of_chat, with_beams])
            .answers(200, "The prompt.", &[(JSON, rendered)])
            .refuses(&[404, 422, 502]),
    );
}

fn describe_adapters(document: &mut Document) {
    let adapter = document.of::<LoraAdapter>();
    let list: Value = json!({"type": "array", "items": adapter});
    document.add(
        Operation::get("/lora-adapters", TAG, "The adapters by number, with their strengths in requests to the base")
            .answers(200, "In the order of their numbers.", &[(JSON, list)]),
    );
    let done = item(json!({"success": {"const": true}}), &["success"]);
    let entry = document.share("AdapterEntry", || adapter_entry(&["name", "id", "scale"]));
    document.add(
        Operation::post("/lora-adapters", TAG, "Sets the strengths in requests to the base that name no adapter")
            .access(Access::Admin)
            .takes_schema(
                json!({"type": "array", "items": entry, "maxItems": crate::http::selection::MAX_ADAPTERS}),
                &[json!([])],
                true,
            )
            .answers(200, "They hold for all requests from now on.", &[(JSON, done)])
            .refuses(&[404, 422]),
    );
}
