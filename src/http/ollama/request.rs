//! Ollama's requests in OpenAI's fields, which are then read like any other's.

use serde_json::{Map, Value, json};

use crate::http::error::ApiError;
use crate::http::fields::{Fields, wrong_type};
use crate::http::sampling::default_to_no_limit;
use crate::http::sent_as::{SentAs, Translated};
use crate::http::unsupported::{Route, refuse_unsupported};
use crate::prompt::fim::foreign;

/// Read here; all others go on as they are.
pub const OWN_FIELDS: [&str; 12] = [
    "model",
    "name",
    "prompt",
    "suffix",
    "raw",
    "system",
    "messages",
    "options",
    "stream",
    "keep_alive",
    "context",
    "format",
];

/// What a request to `/api/generate` or `/api/chat` wants.
pub enum Asked {
    /// Nothing but to have the model in memory, or out of it; `unsaid` is what the other fields would ask of it.
    Residency {
        is_unload: bool,
        unsaid: Box<Asked>,
    },
    Completion(Translated),
    Chat(Translated),
}

/// `has_chat` is whether there is a template for what is not raw: without one, Ollama's is the prompt itself.
pub fn read_generate(fields: &Fields, model: &str, has_chat: bool) -> Result<Asked, ApiError> {
    let prompt = fields.string("prompt")?.unwrap_or_default();
    let suffix = fields.string("suffix")?.filter(|suffix| !suffix.is_empty());
    let system = fields.string("system")?.filter(|system| !system.is_empty());
    let is_raw = fields.boolean("raw")?.unwrap_or(false);
    let is_unload = read_keep_alive(fields)?;
    let is_residency = prompt.is_empty() && suffix.is_none();
    let (mut converted, mut sent_as) = converted(fields, model)?;
    // Text that a client has laid out around a gap says all there is to say.
    let is_laid_out = || foreign::read(prompt, |_| false).is_some();
    let asked = if is_raw || suffix.is_some() || !has_chat || is_laid_out() {
        if system.is_some() && !is_residency {
            let message =
                "`system` needs a chat template, which is for no `raw` prompt or `suffix`: write it into `prompt`";
            return Err(ApiError::invalid("system", message));
        }
        converted.insert("prompt".to_owned(), prompt.into());
        converted.extend(suffix.map(|suffix| ("suffix".to_owned(), suffix.into())));
        Asked::Completion(Translated { fields: converted.into(), sent_as })
    } else {
        let system = system.map(|system| json!({"role": "system", "content": system}));
        let messages = system.into_iter().chain([json!({"role": "user", "content": prompt})]).collect();
        converted.insert("messages".to_owned(), Value::Array(messages));
        sent_as.add("messages", "prompt");
        Asked::Chat(Translated { fields: converted.into(), sent_as })
    };
    Ok(if is_residency { Asked::Residency { is_unload, unsaid: Box::new(asked) } } else { asked })
}

pub fn read_chat(fields: &Fields, model: &str) -> Result<Asked, ApiError> {
    let messages = fields.array("messages")?.map_or(&[] as &[Value], Vec::as_slice);
    let is_unload = read_keep_alive(fields)?;
    let is_residency = messages.is_empty();
    let nothing = [json!({"role": "user", "content": ""})];
    let messages = if is_residency { &nothing } else { messages };
    let messages = messages.iter().enumerate().map(|(index, message)| read_message(index, message));
    let mut messages = messages.collect::<Result<Vec<_>, _>>()?;
    name_calls(&mut messages);
    let (mut converted, sent_as) = converted(fields, model)?;
    converted.insert("messages".to_owned(), Value::Array(messages));
    let asked = Asked::Chat(Translated { fields: converted.into(), sent_as });
    Ok(if is_residency { Asked::Residency { is_unload, unsaid: Box::new(asked) } } else { asked })
}

/// The name under `model`, or as older clients send it.
pub fn read_model(fields: &Fields) -> Result<Option<&str>, ApiError> {
    fields.one_of(&["model", "name"], |name| fields.string(name))
}

/// Whether the model is to be unloaded. What stays in memory is decided by the server; a client that unloads is told
/// what it waits for.
fn read_keep_alive(fields: &Fields) -> Result<bool, ApiError> {
    match fields.get("keep_alive") {
        None => Ok(false),
        Some(Value::Number(number)) => Ok(number.as_f64() == Some(0.0)),
        Some(Value::String(duration)) => {
            Ok(duration.starts_with('0') && !duration.contains(|c: char| ('1'..='9').contains(&c)))
        }
        Some(other) => Err(wrong_type("keep_alive", "a number of seconds or a duration such as \"5m\"", other)),
    }
}

/// Everything but what the model is to read.
fn converted(fields: &Fields, model: &str) -> Result<(Map<String, Value>, SentAs), ApiError> {
    refuse_unsupported(fields, Route::Ollama)?;
    let mut converted = fields.without(&OWN_FIELDS);
    let mut sent_as = SentAs::default();
    read_options(fields, &mut converted, &mut sent_as)?;
    default_to_no_limit(&mut converted);
    converted.insert("model".to_owned(), model.into());
    if let Some(format) = response_format(fields)? {
        sent_as.set(&mut converted, "response_format", "format", format)?;
        sent_as.add("response_format.json_schema.schema", "format");
    }
    Ok((converted, sent_as))
}

/// An option is read as the field of its name. What lays out memory (`num_ctx`, `num_gpu`, …) is no field: here the server's
/// configuration does that, and a prompt that does not fit is refused, never cut. `keep_alive` is memory's, too.
fn read_options(fields: &Fields, converted: &mut Map<String, Value>, sent_as: &mut SentAs) -> Result<(), ApiError> {
    let Some(options) = fields.object("options")? else { return Ok(()) };
    for (name, value) in options.iter().filter(|(name, value)| !value.is_null() && *name != "keep_alive") {
        let place = format!("options.{name}");
        if OWN_FIELDS.contains(&name.as_str()) {
            let message = format!("`{place}` is no option: send `{name}` beside `options`");
            return Err(ApiError::invalid(&place, message));
        }
        sent_as.set(converted, name, &place, value.clone())?;
    }
    refuse_unsupported(&options.clone().into(), Route::Ollama).map_err(|error| sent_as.word(error))
}

/// `format`: `"json"` or a schema.
fn response_format(fields: &Fields) -> Result<Option<Value>, ApiError> {
    match fields.get("format") {
        None => Ok(None),
        Some(Value::String(name)) if name.is_empty() => Ok(None),
        Some(Value::String(name)) if name == "json" => Ok(Some(json!({"type": "json_object"}))),
        Some(schema @ Value::Object(_)) => {
            Ok(Some(json!({"type": "json_schema", "json_schema": {"name": "format", "schema": schema}})))
        }
        Some(other) => Err(wrong_type("format", "\"json\" or a JSON schema", other)),
    }
}

fn read_message(index: usize, message: &Value) -> Result<Value, ApiError> {
    let at = format!("messages[{index}]");
    let Value::Object(message) = message else { return Err(wrong_type(&at, "an object", message)) };
    let mut message = message.clone();
    if message.get("images").is_some_and(|images| !images.is_null() && *images != json!([])) {
        let at = format!("{at}.images");
        return Err(ApiError::invalid(&at, format!("`{at}` is not served: only text is read")));
    }
    // As Ollama reads it, whoever says it.
    if message.get("content").is_none_or(Value::is_null) {
        message.insert("content".to_owned(), "".into());
    }
    Ok(Value::Object(message))
}

/// Here calls may have no ids: a result is of the first call of its tool that has none yet, and what is no such call's
/// result stays without.
fn name_calls(messages: &mut [Value]) {
    let mut waiting: Vec<(String, Value)> = Vec::new();
    let mut num_calls = 0;
    for message in messages {
        for call in message["tool_calls"].as_array_mut().into_iter().flatten().filter(|call| call.is_object()) {
            if call["id"].is_null() {
                num_calls += 1;
                call["id"] = format!("call{num_calls:05}").into();
            }
            waiting.push((call["function"]["name"].as_str().unwrap_or_default().to_owned(), call["id"].clone()));
        }
        if message["role"] == "tool" && message["tool_call_id"].is_null() {
            let tool = ["tool_name", "name"].into_iter().find_map(|name| message[name].as_str());
            let place = waiting.iter().position(|(name, _)| tool.is_none_or(|tool| tool == name));
            if let Some(place) = place {
                message["tool_call_id"] = waiting.remove(place).1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generation::{GenerationRequest, Prompt};
    use crate::http::chat::ChatShape;
    use crate::http::completions::CompletionShape;
    use crate::http::reply::ReplyShape;

    fn fields(value: Value) -> Fields {
        Fields::parse(value.to_string().as_bytes()).unwrap()
    }

    fn generate(value: Value) -> Result<(bool, Value), ApiError> {
        Ok(match read_generate(&fields(value), "m", true)? {
            Asked::Residency { is_unload, .. } => (is_unload, Value::Null),
            Asked::Completion(read) => (false, read.fields.without(&[]).into()),
            Asked::Chat(read) => (true, read.fields.without(&[]).into()),
        })
    }

    /// What is asked for in the end.
    fn parsed(value: Value) -> Result<GenerationRequest, ApiError> {
        match read_generate(&fields(value), "m", true)? {
            Asked::Residency { .. } => panic!("no text is asked for"),
            Asked::Completion(read) => CompletionShape::parse(&read.fields).map_err(|error| read.sent_as.word(error)),
            Asked::Chat(read) => ChatShape::parse(&read.fields).map_err(|error| read.sent_as.word(error)),
        }
    }

    #[test]
    fn a_prompt_is_a_chat_unless_it_is_raw_or_laid_out() {
        let (is_chat, chat) = generate(json!({"prompt": "a", "system": "s"})).unwrap();
        let messages = json!([{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]);
        assert!(is_chat && chat["messages"] == messages && chat["n_predict"] == -1, "{chat}");
        for body in [
            json!({"prompt": "a", "raw": true}),
            json!({"prompt": "a", "suffix": "b"}),
            json!({"prompt": "<PRE> a <SUF>b <MID>"}),
            json!({"prompt": "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>"}),
        ] {
            let (is_chat, completion) = generate(body.clone()).unwrap();
            assert!(!is_chat && completion["prompt"] == body["prompt"], "{completion}");
            assert_eq!(completion.get("suffix"), body.get("suffix"));
        }
    }

    #[test]
    fn options_are_put_beside_the_model_and_those_of_memory_are_the_servers() {
        let options =
            json!({"num_predict": 3, "stop": ["x"], "repeat_penalty": null, "num_ctx": 8192, "keep_alive": "5m"});
        let (_, read) = generate(json!({"prompt": "a", "raw": true, "options": options, "adapter": "b"})).unwrap();
        let expected =
            json!({"model": "m", "prompt": "a", "num_predict": 3, "stop": ["x"], "num_ctx": 8192, "adapter": "b"});
        assert_eq!(read, expected);
        for length in ["num_predict", "max_tokens"] {
            let (_, read) = generate(json!({"prompt": "a", "raw": true, length: 5})).unwrap();
            assert_eq!(read, json!({"model": "m", "prompt": "a", length: 5}));
        }
    }

    #[test]
    fn what_is_read_beside_the_options_is_read_in_them() {
        for raw in [false, true] {
            let options = json!({"ignore_eos": true, "max_tokens": 5, "logit_bias": {"7": 1}, "stop_token_ids": [9],
                "repetition_penalty": 1.5, "adapter": "b", "num_thread": 2});
            let GenerationRequest { options, selection, .. } =
                parsed(json!({"prompt": "a", "raw": raw, "options": options})).unwrap();
            assert!(options.ignore_eos && options.max_tokens == Some(5));
            assert_eq!((options.logit_bias, options.stop_token_ids), (vec![(7, 1.0)], vec![9]));
            assert_eq!(options.repetition_penalty, Some(1.5));
            assert!(selection.adapters.is_some_and(|field| field.name == "adapter"));
        }
    }

    #[test]
    fn results_are_of_the_calls_that_wait_for_them() {
        let call = |name: &str| json!({"function": {"name": name, "arguments": {}}});
        let result = |name: &str| json!({"role": "tool", "tool_name": name, "content": "x"});
        let calls = json!({"role": "assistant", "tool_calls": [call("f"), call("g"), call("f")]});
        let chat = json!({"messages": [calls, result("g"), result("f"), result("f"), result("f")]});
        let Asked::Chat(read) = read_chat(&fields(chat), "m").ok().unwrap() else { panic!("a chat") };
        let messages = read.fields.get("messages").unwrap();
        let calls: Vec<_> = (0..3).map(|index| &messages[0]["tool_calls"][index]["id"]).collect();
        let results: Vec<_> = (1..5).map(|index| &messages[index]["tool_call_id"]).collect();
        assert_eq!(results, [calls[1], calls[0], calls[2], &Value::Null]);
    }

    #[test]
    fn a_message_without_content_is_empty_whoever_says_it() {
        let call = json!({"function": {"name": "f", "arguments": {}}});
        let said_nothing = [
            json!({"role": "system"}),
            json!({"role": "user"}),
            json!({"role": "assistant", "tool_calls": [call]}),
            json!({"role": "tool", "tool_name": "f"}),
            json!({"role": "assistant"}),
        ];
        for content in [None, Some(Value::Null), Some(json!(""))] {
            let mut messages = said_nothing.to_vec();
            for message in &mut messages {
                message.as_object_mut().unwrap().extend(content.clone().map(|content| ("content".to_owned(), content)));
            }
            let Asked::Chat(read) = read_chat(&fields(json!({"messages": messages})), "m").ok().unwrap() else {
                panic!("a chat")
            };
            let read = ChatShape::parse(&read.fields).unwrap();
            let [Prompt::Chat(messages)] = &read.prompts[..] else { panic!("one chat") };
            assert!(messages.iter().all(|message| message["content"] == ""), "{messages:?}");
        }
        let number = json!({"messages": [{"role": "user", "content": 1}]});
        let Asked::Chat(read) = read_chat(&fields(number), "m").ok().unwrap() else { panic!("a chat") };
        assert_eq!(ChatShape::parse(&read.fields).unwrap_err().param(), Some("messages[0].content"));
    }

    #[test]
    fn errors_are_told_in_the_clients_own_fields() {
        let body = json!({"prompt": "a", "options": {"temperature": 9}, "format": {"type": "object"}});
        let Asked::Chat(read) = read_generate(&fields(body), "m", true).ok().unwrap() else { panic!("a chat") };
        for (read_as, sent) in [
            ("temperature", "options.temperature"),
            ("response_format.json_schema.schema", "format"),
            ("messages", "prompt"),
            ("top_p", "top_p"),
        ] {
            assert_eq!(read.sent_as.word(ApiError::invalid(read_as, "no")).param(), Some(sent));
        }
    }

    #[test]
    fn a_field_in_two_places_says_the_same_in_both() {
        let object = json!({"type": "json_object"});
        for (body, name) in [
            (json!({"prompt": "a", "format": {}, "response_format": object}), "response_format"),
            (json!({"prompt": "a", "options": {"temperature": 0}, "temperature": 1}), "temperature"),
            (json!({"prompt": "a", "options": {"stop": ["x"]}, "stop": "x"}), "stop"),
            (json!({"prompt": "a", "model": "b", "name": "c"}), "name"),
        ] {
            let fields = fields(body.clone());
            let read = read_model(&fields).and_then(|_| read_generate(&fields, "m", true));
            assert_eq!(read.err().unwrap().param(), Some(name), "{body}");
        }
        let same = json!({"prompt": "a", "format": "json", "response_format": object,
            "options": {"temperature": 0}, "temperature": 0});
        assert_eq!(generate(same).unwrap().1["response_format"], object);
    }

    #[test]
    fn an_empty_prompt_is_about_memory() {
        assert_eq!(generate(json!({})).unwrap(), (false, Value::Null));
        assert_eq!(generate(json!({"prompt": "", "keep_alive": "5m"})).unwrap(), (false, Value::Null));
        for zero in [json!(0), json!("0"), json!("0s")] {
            assert_eq!(generate(json!({"keep_alive": zero})).unwrap(), (true, Value::Null));
        }
    }

    #[test]
    fn what_would_be_ignored_is_refused_by_name() {
        for (body, name) in [
            (json!({"prompt": "a", "context": [1]}), "context"),
            (json!({"prompt": "a", "raw": true, "system": "s"}), "system"),
            (json!({"prompt": "a", "options": {"mirostat": 2}}), "options.mirostat"),
            (json!({"prompt": "a", "options": {"repeat_last_n": 64, "repeat_penalty": 1.1}}), "options.repeat_last_n"),
            (json!({"prompt": "a", "raw": true, "options": {"ignore_eos": 1}}), "options.ignore_eos"),
            (json!({"prompt": "a", "options": {"prediction": {"type": "content"}}}), "options.prediction"),
            (json!({"prompt": "a", "options": {"model": "b"}}), "options.model"),
            (json!({"prompt": "a", "options": {"context": [1]}}), "options.context"),
            (json!({"prompt": 1}), "prompt"),
            (json!({"prompt": "a", "keep_alive": {}}), "keep_alive"),
        ] {
            assert_eq!(parsed(body).unwrap_err().param(), Some(name));
        }
        let chat = json!({"messages": [{"role": "user", "content": "a", "images": ["x"]}]});
        assert_eq!(read_chat(&fields(chat), "m").err().unwrap().param(), Some("messages[0].images"));
    }
}
