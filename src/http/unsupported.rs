//! The fields of other servers that would change a reply and are not served here: one list for every generation route.
//! Such a field is refused by name, unless its value changes nothing. What is on no list cannot change the text, and is
//! accepted: clients of many servers send it.
//!
//! Read from the interfaces of OpenAI, vLLM, SGLang, llama.cpp, TGI, LoRAX, Ollama, Mistral and text-generation-webui,
//! whose fields `http/tests/reviewed.rs` holds.

use serde_json::{Map, Value};

use super::error::ApiError;
use super::fields::Fields;

/// The generation route that reads the fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    Completions,
    Chat,
    /// These refuse what they alone have, and hand all else on to one of the two above.
    Responses,
    Messages,
    Ollama,
    LlamaCpp,
}

/// Fields with the same harmless values, and what to do instead of asking for more.
struct Unsupported {
    names: &'static [&'static str],
    is_harmless: fn(&Value, &Fields, Route) -> bool,
    advice: &'static str,
}

const LEAVE_OUT: &str = "leave it out";
const OWN_PROMPT: &str = "send a finished `prompt` to /v1/completions, or name a `prompt_format`";
const OWN_SAMPLING: &str = "use `temperature`, `top_k`, `top_p`, `min_p` and the penalties, in that order of effect";

const UNSUPPORTED: [Unsupported; 30] = [
    Unsupported {
        names: &[
            "guided_whitespace_pattern",
            "structural_tag",
            "grammar_triggers",
            "grammar_lazy",
            "grammar_string",
            "json_object",
            "regex",
            "ebnf",
            "lark",
            "schema",
            "format",
        ],
        is_harmless: |value, _, _| is_empty(value) || *value == false,
        advice: "constrain the output with `response_format`, `structured_outputs` or `grammar`",
    },
    Unsupported {
        names: &["tools"],
        is_harmless: |value, _, route| is_empty(value) || route == Route::Chat,
        advice: "tools are offered on /v1/chat/completions alone: leave it out",
    },
    Unsupported {
        names: &["tool_choice"],
        is_harmless: |value, _, route| is_empty(value) || *value == "none" || *value == "auto" || route == Route::Chat,
        advice: "tools are offered on /v1/chat/completions alone: leave it out",
    },
    Unsupported { names: &["functions"], is_harmless: |value, _, _| is_empty(value), advice: "send them as `tools`" },
    Unsupported {
        names: &["function_call"],
        is_harmless: |value, _, _| is_empty(value) || *value == "none" || *value == "auto",
        advice: "send it as `tool_choice`",
    },
    Unsupported {
        names: &[
            "tool_prompt",
            "guideline",
            "guardrails",
            "web_search_options",
            "documents",
            "session_params",
            "context_management",
        ],
        is_harmless: |value, _, _| is_empty(value),
        advice: LEAVE_OUT,
    },
    Unsupported {
        names: &["modalities"],
        is_harmless: |value, _, _| {
            is_empty(value) || value.as_array().is_some_and(|all| all.iter().all(|m| m == "text"))
        },
        advice: "only text is written: leave it out",
    },
    Unsupported {
        names: &["audio", "images", "multi_modal_data"],
        is_harmless: |value, _, _| is_empty(value),
        advice: "only text is read and written: leave it out",
    },
    // How the prompt is made.
    Unsupported {
        names: &["add_generation_prompt"],
        is_harmless: |value, fields, _| {
            *value == true || fields.get("continue_final_message").is_some_and(|is_asked| *is_asked == true)
        },
        advice: OWN_PROMPT,
    },
    Unsupported {
        names: &["continue_final_message"],
        is_harmless: |value, _, route| *value == false || route == Route::Chat,
        advice: "it is for chats: a completion goes on from its `prompt`",
    },
    Unsupported {
        names: &[
            "chat_template",
            "chat_template_kwargs",
            "prompt_template",
            "template",
            "system",
            "safe_prompt",
            "apply_chat_template",
            "instruction_template",
            "instruction_template_str",
            "chat_template_str",
            "custom_system_message",
            "character",
            "preset",
            "continue_",
        ],
        is_harmless: |value, _, _| is_empty(value) || *value == false,
        advice: OWN_PROMPT,
    },
    Unsupported {
        names: &["add_special_tokens", "add_bos_token"],
        is_harmless: |value, _, route| *value == (route == Route::Completions),
        advice: "send token ids as `prompt` to decide on every token",
    },
    Unsupported {
        names: &["truncate_prompt_tokens", "truncate", "truncation_length", "shift"],
        is_harmless: |value, _, _| *value == 0 || *value == -1 || *value == false,
        advice: "a prompt is read whole: shorten it",
    },
    Unsupported {
        names: &["input_ids", "prompt_embeds"],
        is_harmless: |value, _, _| is_empty(value),
        advice: "send text, or token ids as the `prompt` of /v1/completions",
    },
    Unsupported {
        names: &["input_prefix", "input_suffix", "input_extra", "segments", "inputs"],
        is_harmless: |value, _, _| is_empty(value),
        advice: "send the text before the cursor as `prompt`, that after it as `suffix`",
    },
    Unsupported {
        names: &["prefix", "suffix", "echo"],
        is_harmless: |value, _, route| route == Route::Completions || is_empty(value) || *value == false,
        advice: "it is for /v1/completions",
    },
    Unsupported {
        names: &[
            "reasoning_effort",
            "reasoning",
            "think",
            "enable_thinking",
            "thinking",
            "thinking_budget",
            "thinking_token_budget",
            "reasoning_budget_tokens",
            "thinking_forced_open",
            "prompt_mode",
        ],
        is_harmless: |value, _, _| {
            is_empty(value) || *value == "none" || *value == false || is_number(value, -1.0) || is_number(value, 0.0)
        },
        advice: "no model here reasons before it answers: leave it out",
    },
    Unsupported {
        names: &["verbosity"],
        is_harmless: |value, _, _| *value == "medium",
        advice: "say it in the prompt",
    },
    // Fields in a place where nothing reads them.
    Unsupported {
        names: &["extra_body", "extra_args", "parameters", "options", "sampling_params", "nvext", "vllm_xargs"],
        is_harmless: |value, _, _| is_empty(value),
        advice: "put its fields beside `model`",
    },
    // How tokens are drawn.
    Unsupported {
        names: &["min_tokens", "min_new_tokens", "min_length", "max_time"],
        is_harmless: |value, _, _| *value == 0 || *value == -1,
        advice: "use `ignore_eos`, `max_tokens` and `stop`",
    },
    Unsupported {
        names: &["bad_words", "bad_words_ids", "banned_tokens", "banned_strings", "custom_token_bans"],
        is_harmless: |value, _, _| is_empty(value),
        advice: "use `logit_bias`",
    },
    Unsupported {
        names: &["stop_regex", "repetition_detection"],
        is_harmless: |value, _, _| is_empty(value),
        advice: "send texts as `stop`",
    },
    Unsupported {
        names: &[
            "allowed_token_ids",
            "logits_processors",
            "logits_processor",
            "custom_logit_processor",
            "logprob_token_ids",
            "prompt_logprobs",
        ],
        is_harmless: |value, _, _| *value == false || is_empty(value),
        advice: "use `logit_bias`, or `echo` with `logprobs`",
    },
    // With `dry_multiplier` 0 the other `dry_*` change nothing; likewise `xtc_threshold`, `mirostat_tau` and the like.
    Unsupported {
        names: &[
            "dry_multiplier",
            "xtc_probability",
            "mirostat",
            "mirostat_mode",
            "dynatemp_range",
            "dynamic_temperature",
            "top_a",
            "epsilon_cutoff",
            "eta_cutoff",
            "smoothing_factor",
            "penalty_alpha",
            "no_repeat_ngram_size",
            "encoder_no_repeat_ngram_size",
            "min_keep",
            "watermark",
            "watermarking",
            "nsigma",
            "skew",
            "token_healing",
            "temperature_last",
        ],
        is_harmless: |value, _, _| is_number(value, 0.0) || *value == false,
        advice: OWN_SAMPLING,
    },
    Unsupported {
        names: &[
            "typical_p",
            "typ_p",
            "typical",
            "tfs",
            "tfs_z",
            "num_beams",
            "num_return_sequences",
            "guidance_scale",
            "encoder_repetition_penalty",
        ],
        is_harmless: |value, _, _| is_number(value, 1.0),
        advice: OWN_SAMPLING,
    },
    Unsupported {
        names: &["top_n_sigma", "adaptive_target"],
        is_harmless: |value, _, _| value.as_f64().is_some_and(|value| value <= 0.0),
        advice: OWN_SAMPLING,
    },
    Unsupported {
        names: &["sampler_seq", "sampler_order", "sampler_priority"],
        is_harmless: |_, fields, _| fields.get("temperature").is_some_and(|temperature| is_number(temperature, 0.0)),
        advice: OWN_SAMPLING,
    },
    // The penalties are over the whole prompt and output.
    Unsupported {
        names: &["repeat_last_n", "penalty_last_n", "repetition_penalty_range"],
        is_harmless: |value, fields, _| is_number(value, -1.0) || !has_penalty(fields),
        advice: "penalties here are over the whole text: send -1, or leave it out",
    },
    Unsupported {
        names: &["penalize_nl", "penalize_newline"],
        is_harmless: |value, fields, _| *value == true || !has_penalty(fields),
        advice: "penalties here are over all tokens: leave it out",
    },
    // What the reply holds.
    Unsupported {
        names: &[
            "include_stop_str_in_output",
            "no_stop_trim",
            "return_full_text",
            "ban_eos_token",
            "return_tokens_as_token_ids",
            "return_token_ids",
            "return_hidden_states",
            "return_prompt_text",
            "return_prompt_token_ids",
            "return_meta_info",
            "return_routed_experts",
            "return_k_alternatives",
            "n_probs",
            "top_n_tokens",
            "decoder_input_details",
            "post_sampling_probs",
        ],
        is_harmless: |value, _, _| *value == false || is_number(value, 0.0),
        advice: "use `logprobs`, `echo`, `ignore_eos` and `stop`",
    },
];

/// What means something on one interface alone: names, what changes nothing, and what to do instead.
type OfRoute = (Route, &'static str, fn(&Value) -> bool, &'static str);

const NO_REASONING: &str = "no model here reasons before it answers: send {\"type\": \"disabled\"}";

const NO_PREDICTION: &str = "/v1/chat/completions and /v1/completions serve it";

const OF_ROUTES: [OfRoute; 19] = [
    (Route::Responses, "background", |value| *value == false, "send `stream`: true, or wait"),
    (
        Route::Responses,
        "truncation",
        |value| *value == "disabled",
        "a conversation that is too long is refused: shorten it",
    ),
    (Route::Responses, "conversation", |_| false, "send `previous_response_id`"),
    (Route::Responses, "prompt", |_| false, "prompts are not kept here: send `instructions` and `input`"),
    (Route::Responses, "max_tool_calls", |_| false, "this server runs no tools of its own: leave it out"),
    (Route::Responses, "messages", |_| false, "send them as `input`"),
    (Route::Responses, "max_tokens", |_| false, "send it as `max_output_tokens`"),
    (
        Route::Responses,
        "top_logprobs",
        |value| *value == 0,
        "responses have no log-probabilities: use /v1/chat/completions",
    ),
    (Route::Responses, "response_format", |value| value["type"] == "text", "send it as `text.format`"),
    // Left to the model, the models here never reason.
    (Route::Messages, "thinking", |value| value["type"] == "disabled" || value["type"] == "adaptive", NO_REASONING),
    (Route::Messages, "mcp_servers", is_empty, "this server calls no tools of its own: leave it out"),
    (Route::Messages, "container", is_empty, "this server runs no code: leave it out"),
    (Route::Ollama, "context", is_empty, "send the conversation so far as `messages` to /api/chat"),
    (Route::LlamaCpp, "logprobs", |value| *value == false, "/v1/completions serves it"),
    (Route::LlamaCpp, "echo", |value| *value == false, "/v1/completions serves it"),
    // Their replies have no place for how much of it came true.
    (Route::Responses, "prediction", |_| false, NO_PREDICTION),
    (Route::Messages, "prediction", |_| false, NO_PREDICTION),
    (Route::Ollama, "prediction", |_| false, NO_PREDICTION),
    (Route::LlamaCpp, "prediction", |_| false, NO_PREDICTION),
];

/// What is harmless only at `true`, where there is no other value to compare with.
const TRUE_ALONE: [(&str, &str); 2] = [
    ("skip_special_tokens", "special tokens have no text here"),
    ("do_sample", "send `temperature` 0 for the likeliest"),
];

/// Where other servers take adapters from, and how they mix them.
const OF_ADAPTERS: [(&str, &str); 5] = [
    ("adapter_source", "adapters are those of GET /v1/adapters: send \"local\", or leave it out"),
    ("merged_adapters", "use `adapters` with a `scale` each"),
    ("adapter_parameters", "use `adapters` with a `scale` each"),
    ("lora_request", "use `adapter`"),
    ("lora_int_id", "use `adapter` with its name"),
];

/// A field of the lists.
pub struct Listed {
    pub name: &'static str,
    pub advice: &'static str,
    /// Of what clients send where they mean nothing by it, the values that are taken.
    pub harmless: Vec<Value>,
}

/// What clients send where they mean nothing by it.
fn neutral_values() -> [Value; 14] {
    let (list, object) = (Value::Array(Vec::new()), Value::Object(Map::new()));
    let numbers = [0, 1, -1].map(Value::from);
    let [zero, one, minus_one] = numbers;
    let names = ["", "none", "auto", "medium", "local", "disabled"].map(Value::from);
    let [empty, none, auto, medium, local, disabled] = names;
    [
        Value::Null,
        false.into(),
        true.into(),
        zero,
        one,
        minus_one,
        empty,
        list,
        object,
        none,
        auto,
        medium,
        local,
        disabled,
    ]
}

/// Every field of the lists, as `route` reads it beside no others.
pub fn listed(route: Route) -> impl Iterator<Item = Listed> {
    let of_lists = TRUE_ALONE.iter().chain(&OF_ADAPTERS).copied();
    let unsupported = UNSUPPORTED.iter().flat_map(|all| all.names.iter().map(|name| (*name, all.advice)));
    unsupported.chain(of_lists).map(move |(name, given_advice)| {
        let nothing_else = Fields::from(Map::new());
        let is_harmless = |value: &Value| value.is_null() || advice(name, value, &nothing_else, route).is_none();
        Listed { name, advice: given_advice, harmless: neutral_values().into_iter().filter(is_harmless).collect() }
    })
}

/// As [`listed`], of what `route` has alone.
pub fn listed_of_route(route: Route) -> impl Iterator<Item = Listed> {
    let of_route = OF_ROUTES.iter().filter(move |(of, ..)| *of == route);
    of_route.map(|(_, name, is_harmless, advice)| {
        let is_harmless = |value: &Value| value.is_null() || is_harmless(value);
        Listed { name, advice, harmless: neutral_values().into_iter().filter(is_harmless).collect() }
    })
}

/// Refuses what would change the text and is not served.
///
/// # Errors
/// 400 that names the field and says what to do.
pub fn refuse_unsupported(fields: &Fields, route: Route) -> Result<(), ApiError> {
    let given = fields.iter().filter(|(_, value)| !value.is_null());
    for (name, value) in given {
        let of_route = OF_ROUTES.iter().find(|(of, listed, ..)| *of == route && *listed == name);
        let advice = match (of_route, route) {
            (Some((_, _, is_harmless, advice)), _) => (!is_harmless(value)).then_some(*advice),
            (None, Route::Completions | Route::Chat) => advice(name, value, fields, route),
            (None, _) => None,
        };
        if let Some(advice) = advice {
            let message = format!("`{name}` is not served as asked here, and would change the reply: {advice}");
            return Err(ApiError::invalid(name, message));
        }
    }
    Ok(())
}

/// What to do about a field that must not be ignored.
fn advice(name: &str, value: &Value, fields: &Fields, route: Route) -> Option<&'static str> {
    let listed = UNSUPPORTED.iter().find(|unsupported| unsupported.names.contains(&name));
    if let Some(Unsupported { is_harmless, advice, .. }) = listed {
        return (!is_harmless(value, fields, route)).then_some(advice);
    }
    let of = |list: &[(&str, &'static str)]| list.iter().find(|(listed, _)| *listed == name).map(|(_, advice)| *advice);
    of(&TRUE_ALONE)
        .filter(|_| *value != true)
        .or_else(|| of(&OF_ADAPTERS).filter(|_| !is_empty(value) && *value != "local"))
}

/// `""`, `[]` and `{}`.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        _ => false,
    }
}

fn is_number(value: &Value, number: f64) -> bool {
    value.as_f64() == Some(number)
}

fn has_penalty(fields: &Fields) -> bool {
    let neutral =
        [("repetition_penalty", 1.0), ("repeat_penalty", 1.0), ("presence_penalty", 0.0), ("frequency_penalty", 0.0)];
    neutral.into_iter().any(|(name, neutral)| fields.get(name).is_some_and(|value| !is_number(value, neutral)))
}

#[cfg(test)]
#[path = "unsupported/tests.rs"]
mod tests;
