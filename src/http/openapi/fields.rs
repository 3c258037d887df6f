//! The fields that every route shares on which text is generated, and those of completions and of chats.

use serde_json::{Value, json};

use super::document::Document;
use super::schema::{
    Properties, array, boolean, count, integer, item, not_null, number, object, one_of, properties, required_text, text,
};
use crate::engine::fairness::Priority;
use crate::http::constraint::{CONSTRAINT_NAMES, MAX_CHOICES as MAX_TEXTS};
use crate::http::sampling::{LENGTH_NAMES, MAX_CHOICES, MAX_INDENT, MAX_STOP_BYTES, MAX_STOPS, SEED_NAMES, STOP_NAMES};
use crate::http::selection::{ADAPTER_FIELDS, LISTS, MAX_ADAPTERS, MAX_SCALE};
use crate::http::unsupported::{Listed, Route, listed, listed_of_route};
use crate::http::{chat, completions, tools};
use crate::icl::MAX_K;

const TOKEN_ID: fn() -> Value = || json!({"type": "integer", "minimum": 0, "maximum": u32::MAX});

/// What a completion reads beside how its reply is delivered.
pub fn completion(document: &mut Document) -> Properties {
    let mut fields = generation(document, Route::Completions);
    fields.extend(properties(json!({
        "prompt": {
            "description": "Text, several texts, token ids, or several arrays of such; with `suffix`, what is before the gap.",
            "anyOf": [
                {"type": "string"},
                {"type": "array", "minItems": 1, "items": {"type": "string"}},
                {"type": "array", "minItems": 1, "items": TOKEN_ID()},
                {"type": "array", "minItems": 1, "items": {"type": "array", "items": TOKEN_ID()}},
            ],
        },
        "suffix": text("What is behind the gap that the output fills."),
        "prefix": text("How the output begins; it is part of the reply."),
        "echo": boolean("Puts the prompt before the output."),
        "logprobs": {
            "description": "Alternatives for each token.",
            "anyOf": [{"type": ["integer", "null"], "minimum": 0, "maximum": completions::MAX_LOGPROBS}, {"const": false}],
        },
        "top_logprobs": {"enum": [0, null], "description": "For chats: here the number is `logprobs`."},
    })));
    fields
}

/// What a chat reads beside how its reply is delivered.
pub fn chat(document: &mut Document) -> Properties {
    let mut fields = generation(document, Route::Chat);
    let message = document.share("ChatMessageRequest", message);
    let tool = document.share("Tool", tool);
    let mut tools = array(tool, "Functions that may be called.");
    tools["maxItems"] = tools::MAX_TOOLS.into();
    fields.extend(properties(json!({
        "messages": {"type": "array", "minItems": 1, "items": message},
        "logprobs": boolean("Log-probabilities of the output's tokens."),
        "top_logprobs": count(0, chat::MAX_TOP_LOGPROBS, "Alternatives for each token, where `logprobs` is true."),
        "tools": tools,
        "tool_choice": {
            "description": "Whether a function is called, or which.",
            "anyOf": [
                {"enum": ["auto", "none", "required", null]},
                item(json!({"function": item(json!({"name": required_text()}), &["name"])}), &["function"]),
            ],
        },
        "parallel_tool_calls": boolean("False ends a reply with its first call."),
        "continue_final_message": boolean("The answer goes on from the last message, of the assistant."),
        "add_generation_prompt": {"description": "True, unless `continue_final_message` is."},
    })));
    fields
}

/// For routes that take a prompt or a chat.
pub fn completion_or_chat(document: &mut Document) -> Properties {
    let mut fields = completion(document);
    for (name, of_chat) in chat(document) {
        let schema = match fields.remove(&name) {
            Some(of_completion) if of_completion != of_chat => json!({"anyOf": [of_completion, of_chat]}),
            _ => of_chat,
        };
        fields.insert(name, schema);
    }
    fields
}

/// `stream` and `stream_options`, as OpenAI has them.
pub fn delivery() -> Properties {
    properties(json!({
        "stream": boolean("Sends the reply as events while it is written."),
        "stream_options": object(
            json!({
                "include_usage": boolean("Sends the usage before the end."),
                "continuous_usage_stats": boolean("With `include_usage`: sends that of a choice so far with each of its chunks."),
            }),
            &[],
            "For streams alone.",
        ),
    }))
}

fn generation(document: &mut Document, route: Route) -> Properties {
    let mut fields: Properties = listed(route).map(unserved).collect();
    fields.extend(sampling());
    fields.extend(constraints());
    fields.extend(selection(document));
    fields.insert("user".to_owned(), text("Who the request is for: experiments give the same arm to the same user."));
    fields
}

/// What only `route` refuses.
pub fn unserved_of_route(route: Route) -> Properties {
    listed_of_route(route).map(unserved).collect()
}

/// Of a field that is refused unless it changes nothing.
fn unserved(Listed { name, advice, harmless }: Listed) -> (String, Value) {
    let mut schema = match name {
        // These have more harmless values than can be listed.
        "modalities" => json!({"anyOf": [
            {"enum": harmless},
            {"type": "array", "items": {"const": "text"}},
        ]}),
        "top_n_sigma" | "adaptive_target" => json!({"type": ["number", "null"], "maximum": 0}),
        // Harmless or not by what else the request says.
        "sampler_seq"
        | "sampler_order"
        | "sampler_priority"
        | "repeat_last_n"
        | "penalty_last_n"
        | "repetition_penalty_range"
        | "penalize_nl"
        | "penalize_newline" => json!({}),
        _ => json!({"enum": harmless}),
    };
    schema["description"] = format!("Not served where it would change the reply: {advice}.").into();
    (name.to_owned(), schema)
}

fn sampling() -> Properties {
    let mut fields = properties(json!({
        "n": count(1, MAX_CHOICES, "Choices for each prompt."),
        "best_of": count(1, MAX_CHOICES, "As `n`; with `use_beam_search` the number of beams."),
        "use_beam_search": boolean("Searches the likeliest outputs instead of drawing them."),
        "length_penalty": number(-10.0, 10.0, "Of beam search: above 0 prefers longer outputs."),
        "early_stopping": boolean("Of beam search: ends with as many finished beams as were asked for."),
        "temperature": number(0.0, 2.0, "0 takes the likeliest token."),
        "top_k": integer(-1, i32::MAX.into(), "Draws from so many tokens; 0 and -1 from all."),
        "priority": priority(),
        "top_p": number(0.0, 1.0, "Draws from the likeliest tokens that have this probability together."),
        "min_p": number(0.0, 1.0, "Draws from tokens at least so likely, against the likeliest."),
        "presence_penalty": number(-2.0, 2.0, "Taken off tokens that have occurred."),
        "frequency_penalty": number(-2.0, 2.0, "Taken off for each time that a token has occurred."),
        "logit_bias": {
            "type": ["object", "null"],
            "description": "Added to the logits of tokens, by id.",
            "propertyNames": {"pattern": "^[0-9]{1,10}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        },
        "stop_token_ids": array(TOKEN_ID(), "Tokens that end the output."),
        "ignore_eos": boolean("Goes on where the model would end."),
        "n_indent": integer(-1, MAX_INDENT, "Ends the output before a line that is indented less."),
        "t_max_predict_ms": integer(-1, u32::MAX.into(), "Most milliseconds from the first token on, as soon as a line has ended; 0 and less set no limit."),
        "prediction": prediction(),
        "samplers": array(required_text(), "llama.cpp's order of sampling, where it comes to the same as the one here."),
    }));
    fields["stop_token_ids"]["maxItems"] = MAX_STOPS.into();
    for name in ["repetition_penalty", "repeat_penalty"] {
        fields.insert(name.to_owned(), number(0.01, 10.0, "Above 1 takes from what has occurred."));
    }
    for name in LENGTH_NAMES {
        let least = if matches!(name, "n_predict" | "num_predict") { -2 } else { 0 };
        let description = "Most tokens of the output; less than 0 for as many as there is room for.";
        fields.insert(name.to_owned(), integer(least, u32::MAX.into(), description));
    }
    for name in SEED_NAMES {
        fields.insert(name.to_owned(), integer(i64::MIN, i64::MAX, "-1, like nothing, draws one."));
    }
    for name in STOP_NAMES {
        let stop = json!({"type": "string", "maxLength": MAX_STOP_BYTES});
        let stops = json!({"description": "Ends the output before any of these.", "anyOf": [
            stop, {"type": ["array", "null"], "items": stop, "maxItems": MAX_STOPS},
        ]});
        fields.insert(name.to_owned(), stops);
    }
    fields
}

fn priority() -> Value {
    json!({"description": "How urgent it is beside others of the same key; as a number, less is more urgent.", "anyOf": [
        {"enum": Priority::ALL.map(Priority::name)},
        {"type": ["integer", "null"], "minimum": i64::MIN, "maximum": i64::MAX},
    ]})
}

fn prediction() -> Value {
    let part = item(json!({"type": {"const": "text"}, "text": {"type": "string"}}), &["type", "text"]);
    let content = json!({"anyOf": [{"type": "string"}, {"type": "array", "items": part}]});
    let mut schema = item(json!({"type": {"const": "content"}, "content": content}), &["type", "content"]);
    schema["type"] = json!(["object", "null"]);
    schema["description"] = "What the output is expected to be: it comes sooner, and is the same.".into();
    schema
}

fn constraints() -> Properties {
    CONSTRAINT_NAMES.iter().map(|name| ((*name).to_owned(), constraint(name))).collect()
}

fn constraint(name: &str) -> Value {
    let schema =
        || json!({"type": ["object", "boolean", "string", "null"], "description": "A JSON schema, or its text."});
    let choice = |description| {
        let mut texts = array(json!({"type": "string", "minLength": 1}), description);
        texts["maxItems"] = MAX_TEXTS.into();
        texts
    };
    match name {
        "response_format" => json!({"description": "What the output must be, as OpenAI says it.", "anyOf": [
            {"type": "null"},
            {"type": "object", "maxProperties": 0},
            item(json!({"type": {"const": "text"}}), &["type"]),
            item(json!({"type": {"const": "json_object"}, "schema": schema()}), &["type"]),
            item(
                json!({"type": {"const": "json_schema"}, "json_schema": item(json!({"schema": schema()}), &["schema"])}),
                &["type", "json_schema"],
            ),
            item(json!({"type": {"const": "json_schema"}, "schema": schema()}), &["type", "schema"]),
        ]}),
        "structured_outputs" => json!({
            "type": ["object", "null"],
            "description": "One of vLLM's constraints.",
            "additionalProperties": {"enum": [null, false]},
            "properties": {
                "json": schema(),
                "regex": {"type": ["string", "null", "boolean"]},
                "choice": {"anyOf": [choice("One of these."), {"const": false}]},
                "grammar": {"type": ["string", "null", "boolean"]},
                "json_object": boolean("Any JSON."),
            },
        }),
        "guided_json" | "json_schema" => schema(),
        "guided_choice" => choice("One of these."),
        "guided_json_object" => boolean("Any JSON."),
        "guided_regex" => text("A regular expression for the whole output."),
        _ => text("A grammar, in GBNF or Lark."),
    }
}

fn selection(document: &mut Document) -> Properties {
    let mut fields = properties(json!({
        "model": text("The base, an adapter, an alias or an experiment; nothing is the base. `+icl:STORE@K` adds examples."),
        "prompt_format": text("How instruction and examples become a prompt, by a name of the configuration."),
        "icl": icl(),
    }));
    let entry = document.share("AdapterEntry", || adapter_entry(&["name", "id", "scale"]));
    for name in ADAPTER_FIELDS {
        let schema = if LISTS.contains(&name) {
            let mut list = array(entry.clone(), "Adapters that are added to the base; empty for the base alone.");
            list["maxItems"] = MAX_ADAPTERS.into();
            json!({"anyOf": [list, {"const": ""}]})
        } else {
            text("An adapter by its name.")
        };
        fields.insert(name.to_owned(), schema);
    }
    fields
}

fn icl() -> Value {
    let mut icl = object(
        json!({
            "store": required_text(),
            "k": count(0, u32::try_from(MAX_K).unwrap_or(u32::MAX), "How many examples."),
            "select": one_of(&["fixed", "random", "bm25", "hybrid"], "How examples are found."),
            "seed": {"type": ["integer", "null"], "minimum": 0, "maximum": u64::MAX, "description": "Of `random`."},
            "budget": integer(0, i64::MAX, "Most tokens of all examples."),
        }),
        &["store"],
        "In-context examples.",
    );
    icl["additionalProperties"] = json!(false);
    icl
}

/// An adapter of a list, by `name` or by `id`.
pub fn adapter_entry(names: &[&str]) -> Value {
    let all = properties(json!({
        "name": text("The adapter's name."),
        "id": integer(0, i64::MAX, "Its number in `/lora-adapters`."),
        "scale": number(-MAX_SCALE, MAX_SCALE, "Its strength."),
    }));
    let fields: Properties = all.into_iter().filter(|(name, _)| names.contains(&name.as_str())).collect();
    let by = |name: &str| json!({"required": [name], "properties": {name: not_null(fields[name].clone())}});
    json!({"type": "object", "properties": fields, "additionalProperties": false, "anyOf": [by("name"), by("id")]})
}

fn message() -> Value {
    let part = item(json!({"type": {"const": "text"}, "text": required_text()}), &["type", "text"]);
    let content = json!([{"type": "string"}, {"type": "array", "items": part}]);
    let others: Vec<&str> = chat::ROLES.into_iter().filter(|role| !["assistant", "tool"].contains(role)).collect();
    let function =
        item(json!({"name": required_text(), "arguments": {"type": ["string", "object"]}}), &["name", "arguments"]);
    let calls = array(item(json!({"function": function}), &["function"]), "Calls that the model made.");
    let id = required_text();
    // An answer that the client begins is the last message, and the assistant's.
    let is_begun = json!({"not": {"const": true}});
    json!({"anyOf": [
        item(
            json!({"role": {"enum": others}, "content": {"anyOf": content}, "prefix": is_begun, "partial": is_begun}),
            &["role", "content"],
        ),
        item(
            json!({"role": {"const": "tool"}, "content": {"anyOf": content}, "tool_call_id": id, "prefix": is_begun,
                "partial": is_begun}),
            &["role", "content", "tool_call_id"],
        ),
        item(
            json!({
                "role": {"const": "assistant"},
                "content": {"anyOf": [{"type": "null"}, content[0], content[1]]},
                "tool_calls": calls,
                "function_call": {"type": "null", "description": "Not served: send it as one of `tool_calls`."},
                "prefix": {"description": "True in the last message: the answer goes on from it, and repeats it."},
                "partial": {"description": "As `prefix`, without being repeated."},
            }),
            &["role"],
        ),
    ]})
}

fn tool() -> Value {
    let pattern = format!("^[A-Za-z0-9_.:/-]{{1,{}}}$", tools::MAX_NAME_CHARS);
    let function = item(
        json!({
            "name": {"type": "string", "pattern": pattern},
            "description": text("What it does."),
            "parameters": object(json!({}), &[], "A JSON schema."),
            "strict": boolean("Whether a call's arguments must be what the schema says; a forced call's always are."),
        }),
        &["name"],
    );
    item(json!({"type": {"const": "function"}, "function": function}), &["type", "function"])
}
