//! `POST /v1/chat/completions`

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use axum::Extension;
use axum::extract::State;
use axum::response::Response;
use serde_json::Value;

use super::AppState;
use super::auth::Caller;
use super::error::ApiError;
use super::fields::{Fields, wrong_type};
use super::logprobs::chat_logprobs;
use super::priority::parse_priority;
use super::reply::{ReplyShape, answer, random_id};
use super::sampling::parse_options;
use super::selection::parse_selection;
use super::tools::{check_calls, check_results, parse_tools};
use super::types::{
    ChatChoice, ChatChunkChoice, ChatDelta, ChatLogprobs, ChatMessage, FunctionCall, ToolCall, reason_name,
};
use super::unsupported::{Route, refuse_unsupported};
use crate::engine::fairness::Priority;
use crate::engine::request::FinishReason;
use crate::generation::{Completed, Generation, GenerationOptions, GenerationRequest, Prompt, TextDelta, TokenRecord};
use crate::tokenizer::Tokenizer;
use crate::tools::{CallReader, ChatPart};

pub const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];
pub const MAX_TOP_LOGPROBS: u32 = 20;

pub async fn chat_completions(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    fields: Fields,
) -> Result<Response, ApiError> {
    answer::<ChatShape>(&state, &caller, &fields).await
}

fn options(fields: &Fields) -> Result<GenerationOptions, ApiError> {
    let logprobs = fields.boolean("logprobs")?.unwrap_or(false);
    let top_logprobs = fields.count("top_logprobs", 0..=MAX_TOP_LOGPROBS)?;
    if top_logprobs.is_some_and(|count| count > 0) && !logprobs {
        return Err(ApiError::invalid("top_logprobs", "`top_logprobs` needs `logprobs`: true"));
    }
    let tools = parse_tools(fields)?;
    if tools.is_some() && fields.boolean("use_beam_search")?.unwrap_or(false) {
        return Err(ApiError::invalid("tools", "`tools` do not go with `use_beam_search`: leave one of them out"));
    }
    let top_logprobs = logprobs.then(|| top_logprobs.unwrap_or(0));
    let account = parse_priority(fields, Priority::Chat)?;
    Ok(GenerationOptions { top_logprobs, tools, account, ..parse_options(fields)? })
}

fn messages(fields: &Fields) -> Result<Vec<Value>, ApiError> {
    match fields.array("messages")? {
        None => Err(ApiError::invalid("messages", "`messages` is required")),
        Some(messages) if messages.is_empty() => Err(ApiError::invalid("messages", "`messages` is an empty array")),
        Some(messages) => {
            messages.iter().enumerate().try_for_each(|(index, message)| check_message(index, message))?;
            check_results(messages)?;
            Ok(messages.clone())
        }
    }
}

fn check_message(index: usize, message: &Value) -> Result<(), ApiError> {
    let at = format!("messages[{index}]");
    if !message.is_object() {
        return Err(wrong_type(&at, "an object", message));
    }
    let role =
        message["role"].as_str().ok_or_else(|| wrong_type(&format!("{at}.role"), "a string", &message["role"]))?;
    if !ROLES.contains(&role) {
        let message = format!("`{at}.role` is `{role}`, not one of {}", ROLES.join(", "));
        return Err(ApiError::invalid(&format!("{at}.role"), message));
    }
    if role == "assistant" {
        // Of before there were tools: templates know nothing of it, and would leave the call out.
        if !message["function_call"].is_null() {
            let at = format!("{at}.function_call");
            return Err(ApiError::invalid(&at, format!("`{at}` is not served: send it as one of `tool_calls`")));
        }
        check_calls(&at, &message["tool_calls"])?;
    }
    match &message["content"] {
        Value::String(_) => Ok(()),
        // An assistant that only called tools said nothing.
        Value::Null if role == "assistant" => Ok(()),
        Value::Array(parts) => parts
            .iter()
            .enumerate()
            .try_for_each(|(part_index, part)| check_part(&format!("{at}.content[{part_index}]"), part)),
        other => Err(wrong_type(&format!("{at}.content"), "a string or an array of parts", other)),
    }
}

/// The beginning of an answer that the model goes on from.
#[derive(Debug, Default, PartialEq)]
struct Begun {
    text: String,
    /// Whether the reply repeats it.
    is_repeated: bool,
}

/// Takes the answer that the client has begun out of `messages`, if it has: with vLLM's `continue_final_message`, or with
/// what Mistral and Moonshot have at the message itself.
fn take_begun(fields: &Fields, messages: &mut Vec<Value>) -> Result<Begun, ApiError> {
    let last = messages.len().saturating_sub(1);
    let mut asked = fields.boolean("continue_final_message")?.filter(|is_asked| *is_asked).map(|_| Begun::default());
    let mut param = "continue_final_message".to_owned();
    for (index, message) in messages.iter().enumerate() {
        for (name, is_repeated) in [("prefix", true), ("partial", false)] {
            if message[name] != true {
                continue;
            }
            param = format!("messages[{index}].{name}");
            if index != last {
                let text = format!("`{param}` is for the last message alone: leave it out");
                return Err(ApiError::invalid(&param, text));
            }
            asked = Some(Begun { is_repeated, ..Begun::default() });
        }
    }
    let Some(begun) = asked else { return Ok(Begun::default()) };
    match messages.pop_if(|message| message["role"] == "assistant" && message["tool_calls"].is_null()) {
        Some(message) => Ok(Begun { text: text_of(&message["content"]), ..begun }),
        None => {
            let text = format!("`{param}` needs a last message of the assistant, without `tool_calls`");
            Err(ApiError::invalid(&param, text))
        }
    }
}

/// The text of a checked message.
fn text_of(content: &Value) -> String {
    match content {
        Value::Array(parts) => parts.iter().filter_map(|part| part["text"].as_str()).collect(),
        content => content.as_str().unwrap_or_default().to_owned(),
    }
}

fn check_part(at: &str, part: &Value) -> Result<(), ApiError> {
    if part["type"] != "text" {
        return Err(ApiError::invalid(&format!("{at}.type"), format!("`{at}.type` must be \"text\"")));
    }
    match &part["text"] {
        Value::String(_) => Ok(()),
        other => Err(wrong_type(&format!("{at}.text"), "a string", other)),
    }
}

pub struct ChatShape {
    tokenizer: Arc<Tokenizer>,
    logprobs: bool,
    /// Where tools are offered, a reader that has read nothing.
    reader: Option<CallReader>,
    /// Choices whose first delta, the one with the role, was sent.
    begun: HashSet<usize>,
    /// What reads the calls of each choice.
    readers: HashMap<usize, CallReader>,
}

impl ChatShape {
    fn logprobs(&self, tokens: &[TokenRecord]) -> Option<ChatLogprobs> {
        self.logprobs.then(|| chat_logprobs(&self.tokenizer, tokens))
    }

    /// What `text` adds to a choice; all that was held back when it is the end.
    fn read(&mut self, index: usize, text: String, is_end: bool) -> ChatDelta {
        let Some(unused) = &self.reader else {
            return ChatDelta { content: (!text.is_empty()).then_some(text), ..ChatDelta::default() };
        };
        let reader = self.readers.entry(index).or_insert_with(|| unused.clone());
        let mut parts = reader.push(&text);
        if is_end {
            parts.extend(reader.finish());
        }
        let mut delta = ChatDelta::default();
        for part in parts {
            match part {
                ChatPart::Text(text) => delta.content.get_or_insert_default().push_str(&text),
                ChatPart::CallStarted { index, name } => delta.tool_calls.push(ToolCall {
                    index: Some(index),
                    id: Some(random_id("call")),
                    kind: Some("function"),
                    function: FunctionCall { name: Some(name), arguments: String::new() },
                }),
                ChatPart::Arguments { index, fragment } => match delta.tool_calls.last_mut() {
                    Some(call) if call.index == Some(index) => call.function.arguments.push_str(&fragment),
                    _ => delta.tool_calls.push(ToolCall {
                        index: Some(index),
                        id: None,
                        kind: None,
                        function: FunctionCall { name: None, arguments: fragment },
                    }),
                },
            }
        }
        delta
    }

    fn has_calls(&self, index: usize) -> bool {
        self.readers.get(&index).is_some_and(CallReader::has_calls)
    }

    fn reason(&self, index: usize, reason: FinishReason) -> &'static str {
        match reason {
            FinishReason::Stop if self.has_calls(index) => "tool_calls",
            reason => reason_name(reason),
        }
    }

    fn role(&mut self, index: usize) -> Option<&'static str> {
        self.begun.insert(index).then_some("assistant")
    }
}

impl ReplyShape for ChatShape {
    const ID_PREFIX: &'static str = "chatcmpl";
    const OBJECT: &'static str = "chat.completion";
    const CHUNK_OBJECT: &'static str = "chat.completion.chunk";
    type Choice = ChatChoice;
    type ChunkChoice = ChatChunkChoice;

    fn parse(fields: &Fields) -> Result<GenerationRequest, ApiError> {
        refuse_unsupported(fields, Route::Chat)?;
        let (selection, icl) = parse_selection(fields)?;
        let prompt_format = fields.string("prompt_format")?.map(str::to_owned);
        let mut messages = messages(fields)?;
        let begun = take_begun(fields, &mut messages)?;
        let options =
            GenerationOptions { output_prefix: begun.text, hides_prefix: !begun.is_repeated, ..options(fields)? };
        Ok(GenerationRequest { selection, icl, prompt_format, prompts: vec![Prompt::Chat(messages)], options })
    }

    fn new(generation: &Generation, options: &GenerationOptions) -> Self {
        Self {
            tokenizer: generation.tokenizer().clone(),
            logprobs: options.top_logprobs.is_some(),
            reader: generation.call_reader(options),
            begun: HashSet::new(),
            readers: HashMap::new(),
        }
    }

    fn choice(&mut self, index: usize, completed: Completed) -> ChatChoice {
        let ChatDelta { content, mut tool_calls, .. } = self.read(index, completed.text, true);
        tool_calls.iter_mut().for_each(|call| call.index = None);
        let content = if tool_calls.is_empty() { content.or(Some(String::new())) } else { content };
        let message = ChatMessage { role: "assistant", content, refusal: None, tool_calls };
        ChatChoice {
            index,
            message,
            logprobs: self.logprobs(&completed.tokens),
            finish_reason: Some(self.reason(index, completed.reason)),
            score: completed.score,
        }
    }

    fn delta(&mut self, index: usize, delta: TextDelta) -> Option<ChatChunkChoice> {
        let logprobs = self.logprobs(&delta.tokens);
        let delta = self.read(index, delta.text, false);
        if delta == ChatDelta::default() && logprobs.as_ref().is_none_or(|logprobs| logprobs.content.is_empty()) {
            return None;
        }
        let content = delta.content.or_else(|| delta.tool_calls.is_empty().then(String::new));
        let delta = ChatDelta { role: self.role(index), content, tool_calls: delta.tool_calls };
        Some(ChatChunkChoice { index, delta, logprobs, finish_reason: None, score: None })
    }

    fn finish(&mut self, index: usize, reason: FinishReason, score: Option<f32>) -> ChatChunkChoice {
        let delta = self.read(index, String::new(), true);
        let delta = ChatDelta { role: self.role(index), ..delta };
        let finish_reason = Some(self.reason(index, reason));
        ChatChunkChoice { index, delta, logprobs: None, finish_reason, score }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(json: &str) -> Fields {
        Fields::parse(json.as_bytes()).unwrap()
    }

    fn refusal<T: std::fmt::Debug>(result: Result<T, ApiError>) -> String {
        serde_json::to_string(&result.unwrap_err().into_envelope()).unwrap()
    }

    #[test]
    fn text_parts_every_role_and_a_silent_assistant_are_accepted() {
        let body = r#"{"messages": [{"role": "developer", "content": "a"},
            {"role": "assistant", "content": null, "function_call": null},
            {"role": "user", "content": [{"type": "text", "text": "b"}]}]}"#;
        assert_eq!(messages(&fields(body)).unwrap().len(), 3);
    }

    #[test]
    fn a_bad_message_is_named_by_its_place() {
        for (body, place) in [
            (r#"{}"#, "messages"),
            (r#"{"messages": []}"#, "messages"),
            (r#"{"messages": "hi"}"#, "messages"),
            (r#"{"messages": [1]}"#, "messages[0]"),
            (r#"{"messages": [{"content": "a"}]}"#, "messages[0].role"),
            (r#"{"messages": [{"role": "robot", "content": "a"}]}"#, "messages[0].role"),
            (r#"{"messages": [{"role": "function", "name": "f", "content": "a"}]}"#, "messages[0].role"),
            (
                r#"{"messages": [{"role": "assistant", "content": null, "function_call": {"name": "f", "arguments": "{}"}}]}"#,
                "messages[0].function_call",
            ),
            (r#"{"messages": [{"role": "user"}]}"#, "messages[0].content"),
            (r#"{"messages": [{"role": "tool", "content": "a"}]}"#, "messages[0].tool_call_id"),
            (r#"{"messages": [{"role": "tool", "content": "a", "tool_call_id": "1"}]}"#, "messages[0].tool_call_id"),
            (r#"{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}"#, "messages[0].content[0].type"),
            (r#"{"messages": [{"role": "user", "content": [{"type": "text"}]}]}"#, "messages[0].content[0].text"),
        ] {
            let error = refusal(messages(&fields(body)));
            assert!(error.contains(&format!(r#""param":"{place}""#)), "{body}: {error}");
        }
    }

    #[test]
    fn a_result_follows_its_call() {
        let call = r#"{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}"#;
        let body = format!(
            r#"{{"messages": [{{"role": "user", "content": "a"}}, {{"role": "assistant", "content": null, "tool_calls": [{call}]}},
            {{"role": "tool", "tool_call_id": "1", "content": "b"}}]}}"#
        );
        assert_eq!(messages(&fields(&body)).unwrap().len(), 3);
        let error = messages(&fields(&body.replace(r#""tool_call_id": "1""#, r#""tool_call_id": "2""#))).unwrap_err();
        assert_eq!(error.param(), Some("messages[2].tool_call_id"));
    }

    #[test]
    fn an_answer_that_the_client_began_is_gone_on_with() {
        let user = r#"{"role": "user", "content": "q"}"#;
        let take = |rest: &str, last: &str| {
            let fields = fields(&format!(r#"{{"messages": [{user}, {last}]{rest}}}"#));
            let mut messages = messages(&fields).unwrap();
            take_begun(&fields, &mut messages).map(|begun| (messages.len(), begun.text, begun.is_repeated))
        };
        let answer =
            r#"{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}"#;
        let of_vllm = r#", "continue_final_message": true, "add_generation_prompt": false"#;
        assert_eq!(take(of_vllm, answer), Ok((1, "ab".to_owned(), false)));
        assert_eq!(take("", r#"{"role": "assistant", "content": "a", "prefix": true}"#), Ok((1, "a".to_owned(), true)));
        assert_eq!(
            take("", r#"{"role": "assistant", "content": "a", "partial": true}"#),
            Ok((1, "a".to_owned(), false))
        );
        assert_eq!(take("", answer), Ok((2, String::new(), false)), "an answer that is not marked is a turn");
        assert_eq!(take(of_vllm, user).unwrap_err().param(), Some("continue_final_message"));
        let marked = r#"{"role": "user", "content": "a", "prefix": true}"#;
        assert_eq!(take("", marked).unwrap_err().param(), Some("messages[1].prefix"));
    }

    #[test]
    fn alternatives_need_logprobs() {
        let options_of = |json| options(&fields(json));
        assert_eq!(options_of(r#"{"logprobs": true}"#).unwrap().top_logprobs, Some(0));
        assert_eq!(options_of(r#"{"logprobs": true, "top_logprobs": 3}"#).unwrap().top_logprobs, Some(3));
        assert!(refusal(options_of(r#"{"top_logprobs": 3}"#)).contains("top_logprobs"));
        assert_eq!(options_of(r#"{"logprobs": false, "top_logprobs": 0}"#).unwrap().top_logprobs, None);
    }
}
