//! The model's own chat template, rendered as Hugging Face renders it.

use std::fmt::Write;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Kwargs;
use minijinja::{Environment, Error, ErrorKind, context};
use regex::{Captures, Regex};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::PromptError;
use crate::hexadecimal::hexadecimal;
use crate::model::gguf::GgufFile;
use crate::tokenizer::Tokenizer;
use crate::tools::CallFormat;

const KEY: &str = "tokenizer.chat_template";

/// A compiled chat template; shared by all requests.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    bos_token: String,
    eos_token: String,
    call_format: Option<CallFormat>,
}

impl ChatTemplate {
    /// # Errors
    /// The file has no template, or one that cannot be used here: such a model cannot chat, and serves everything else.
    pub fn from_gguf(gguf: &GgufFile, tokenizer: &Tokenizer) -> Result<Self, PromptError> {
        if gguf.metadata(KEY).is_none() {
            return Err(PromptError::NoChatTemplate);
        }
        let source = gguf.str(KEY).map_err(|e| PromptError::ChatTemplate(e.to_string()))?;
        // A template may write the token even where raw prompts go without it.
        let token_text = |key: &str| match gguf.usize(key).ok().and_then(|id| u32::try_from(id).ok()) {
            Some(id) => tokenizer.token_text(id).into_owned(),
            None => String::new(),
        };
        Self::new(source, token_text("tokenizer.ggml.bos_token_id"), token_text("tokenizer.ggml.eos_token_id"))
    }

    /// # Errors
    /// As those of [`Self::from_gguf`], of a template.
    pub fn new(source: &str, bos_token: String, eos_token: String) -> Result<Self, PromptError> {
        let invalid = |error: Error| PromptError::ChatTemplate(error.to_string());
        let mut environment = Environment::new();
        environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(invalid)?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_template_owned(KEY, without_training_marks(source)).map_err(invalid)?;
        Ok(Self {
            environment,
            source: source.to_owned(),
            bos_token,
            eos_token,
            call_format: CallFormat::of_template(source),
        })
    }

    /// As the model's file has it.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// How the model words calls of tools; `None` for one that was not taught to.
    pub fn call_format(&self) -> Option<CallFormat> {
        self.call_format
    }

    /// The prompt text for OpenAI `messages`, to be encoded with special tokens parsed and nothing put before it: what the
    /// messages say is marked before as [`Literal`](super::literal::Literal). `tools` is OpenAI's list of tools.
    ///
    /// Contents of several text parts are joined, the role `developer` is `system`, and a tool call's arguments are
    /// given to the template as an object.
    pub fn render(
        &self,
        messages: &[Value],
        add_generation_prompt: bool,
        tools: Option<&[Value]>,
    ) -> Result<String, PromptError> {
        let mut messages = normalize(messages)?;
        if matches!(self.call_format, Some(CallFormat::Mistral | CallFormat::MistralNamed)) {
            messages.iter_mut().for_each(shorten_ids);
        }
        let context = context! {
            messages => messages.iter().map(template_value).collect::<Vec<_>>(),
            tools => tools.map(|tools| tools.iter().map(template_value).collect::<Vec<_>>()),
            add_generation_prompt,
            bos_token => &self.bos_token,
            eos_token => &self.eos_token,
        };
        let template = self.environment.get_template(KEY).map_err(refused)?;
        template.render(context).map_err(refused)
    }
}

/// Hugging Face's `{% generation %}` marks what is trained on, and renders as what is in it.
fn without_training_marks(source: &str) -> String {
    let mark = Regex::new(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}").expect("a literal that is tested");
    let replace = |found: &Captures<'_>| {
        let statement = if found.get(2).is_some() { "endif" } else { "if true" };
        format!("{{%{} {statement} {}%}}", &found[1], &found[3])
    };
    mark.replace_all(source, replace).into_owned()
}

fn refused(error: Error) -> PromptError {
    PromptError::Refused(error.detail().map_or_else(|| error.kind().to_string(), str::to_string))
}

fn malformed(field: String, reason: &'static str) -> PromptError {
    PromptError::Messages { field, reason }
}

/// Messages with a string `role` and a string `content` each, as templates expect them.
fn normalize(messages: &[Value]) -> Result<Vec<Value>, PromptError> {
    if messages.is_empty() {
        return Err(malformed("messages".into(), "must hold at least one message"));
    }
    messages.iter().enumerate().map(|(i, message)| normalize_message(i, message)).collect()
}

fn normalize_message(index: usize, message: &Value) -> Result<Value, PromptError> {
    let field = format!("messages[{index}]");
    let Value::Object(message) = message else {
        return Err(malformed(field, "must be an object with role and content"));
    };
    let mut message = message.clone();
    let role = match message.get("role").and_then(Value::as_str) {
        Some("developer") => "system",
        Some(role) => role,
        None => return Err(malformed(format!("{field}.role"), "must be a string")),
    };
    let role = Value::from(role);
    let content = Value::from(content_text(&field, message.get("content"))?);
    message.insert("role".into(), role);
    message.insert("content".into(), content);
    for call in message.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten() {
        parse_arguments(call);
    }
    Ok(Value::Object(message))
}

/// Absent content is empty, as in an assistant's message that only calls tools.
fn content_text(message: &str, content: Option<&Value>) -> Result<String, PromptError> {
    let field = || format!("{message}.content");
    match content {
        None | Some(Value::Null) => Ok(String::new()),
        Some(Value::String(text)) => Ok(text.clone()),
        Some(Value::Array(parts)) => {
            let texts = parts.iter().enumerate().map(|(i, part)| {
                let text = match part.get("type").and_then(Value::as_str) {
                    Some("text") => part.get("text").and_then(Value::as_str),
                    _ => None,
                };
                text.ok_or_else(|| {
                    malformed(format!("{}[{i}]", field()), "must be a part of type text with a string text")
                })
            });
            texts.collect()
        }
        Some(_) => Err(malformed(field(), "must be a string or a list of text parts")),
    }
}

/// OpenAI sends arguments as JSON in a string; templates write them with `tojson`, which would quote it again.
fn parse_arguments(call: &mut Value) {
    if let Some(arguments) = call.pointer_mut("/function/arguments")
        && let Some(object) = arguments.as_str().and_then(|json| serde_json::from_str::<Map<String, Value>>(json).ok())
    {
        *arguments = Value::Object(object);
    }
}

/// Mistral's templates refuse ids of calls that are not nine letters and digits, whoever made them.
fn shorten_ids(message: &mut Value) {
    const NUM_CHARS: usize = 9;
    let shorten = |id: &mut Value| {
        let Some(long) = id.as_str() else { return };
        if long.len() != NUM_CHARS || !long.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            *id = hexadecimal(Sha256::new_with_prefix(long))[..NUM_CHARS].into();
        }
    };
    message.get_mut("tool_call_id").into_iter().for_each(shorten);
    let calls = message.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten();
    calls.filter_map(|call| call.get_mut("id")).for_each(shorten);
}

fn template_value(value: &Value) -> minijinja::Value {
    match value {
        Value::Null => minijinja::Value::from(()),
        Value::Bool(b) => minijinja::Value::from(*b),
        Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(integer), _) => minijinja::Value::from(integer),
            (None, Some(integer)) => minijinja::Value::from(integer),
            (None, None) => minijinja::Value::from(number.as_f64()),
        },
        Value::String(text) => minijinja::Value::from(text.as_str()),
        Value::Array(items) => items.iter().map(template_value).collect(),
        Value::Object(map) => {
            minijinja::Value::from_pairs(map.iter().map(|(key, value)| (key.as_str(), template_value(value))))
        }
    }
}

/// Hugging Face's `tojson` is Python's `json.dumps`: unlike the built-in filter it escapes nothing for HTML.
fn to_json(value: &minijinja::Value, indent: Option<minijinja::Value>, options: Kwargs) -> Result<String, Error> {
    let html_safe = minijinja::filters::tojson(value, indent, options)?.to_string();
    let mut json = String::with_capacity(html_safe.len());
    let mut rest = html_safe.as_str();
    while let Some(backslash) = rest.find('\\') {
        json.push_str(&rest[..backslash]);
        rest = &rest[backslash..];
        let escapes = [("\\u003c", "<"), ("\\u003e", ">"), ("\\u0026", "&"), ("\\u0027", "'")];
        let (escape, plain) = match escapes.into_iter().find(|(escape, _)| rest.starts_with(escape)) {
            Some(found) => found,
            // Another escape: two characters of ASCII, kept together so that `\\u003c` stays what it is.
            None => rest.split_at_checked(2).map_or((rest, rest), |(escape, _)| (escape, escape)),
        };
        json.push_str(plain);
        rest = &rest[escape.len()..];
    }
    json.push_str(rest);
    Ok(json)
}

fn raise_exception(message: String) -> Result<String, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

/// Local time by a `strftime` format.
fn strftime_now(format: &str) -> Result<String, Error> {
    let mut text = String::new();
    write!(text, "{}", chrono::Local::now().format(format))
        .map_err(|_| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: bad format {format:?}")))?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const CHATML: &str = "{%- for message in messages %}\n    {{- '<|im_start|>' + message.role + '\\n' + message.content + eos_token }}\n{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n";

    fn template(source: &str) -> ChatTemplate {
        ChatTemplate::new(source, "<s>".into(), "<|im_end|>".into()).expect("the template compiles")
    }

    fn render(source: &str, messages: Value) -> Result<String, PromptError> {
        template(source).render(messages.as_array().expect("a list"), true, None)
    }

    #[test]
    fn messages_are_rendered_in_order_with_the_generation_prompt() {
        let messages = json!([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]);
        let expected = "<|im_start|>system\nBe brief.<|im_end|><|im_start|>user\nHi<|im_end|><|im_start|>assistant\n";
        assert_eq!(render(CHATML, messages).unwrap(), expected);
    }

    #[test]
    fn text_parts_are_joined_and_developer_is_system() {
        let messages =
            json!([{"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]);
        let source = "{{ messages[0].role }}: {{ messages[0].content }}";
        assert_eq!(render(source, messages).unwrap(), "system: ab");
    }

    #[test]
    fn malformed_messages_are_refused_by_field() {
        let image = json!([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]);
        let cases = [
            (json!([]), "messages:"),
            (json!(["hi"]), "messages[0]:"),
            (json!([{"content": "hi"}]), "messages[0].role:"),
            (json!([{"role": "user", "content": 7}]), "messages[0].content:"),
            (image, "messages[0].content[0]:"),
        ];
        for (messages, field) in cases {
            let error = render(CHATML, messages).expect_err(field).to_string();
            assert!(error.starts_with(field), "{error}");
        }
    }

    #[test]
    fn a_template_that_raises_names_messages_and_its_reason() {
        let messages = json!([{"role": "user", "content": "hi"}]);
        let error = render("{{ raise_exception('Roles must alternate') }}", messages).expect_err("raised").to_string();
        assert!(error.starts_with("messages:") && error.contains("Roles must alternate"), "{error}");
    }

    #[test]
    fn tojson_escapes_as_python_does() {
        let messages = json!([{"role": "user", "content": "<a href='x'>&\n\"\\u003c é"}]);
        let json = render("{{ messages[0].content | tojson }}", messages).unwrap();
        assert_eq!(json, r#""<a href='x'>&\n\"\\u003c é""#);
    }

    #[test]
    fn what_is_told_of_tools_keeps_the_order_it_was_told_in() {
        let tool =
            json!({"type": "function", "function": {"name": "f", "description": "d", "parameters": {"z": 1, "a": 2}}});
        let tools = [tool.clone()];
        let messages = [json!({"role": "user", "content": "hi"})];
        let text = template("{{ tools[0] | tojson }}").render(&messages, true, Some(&tools)).unwrap();
        let expected =
            r#"{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"z": 1, "a": 2}}}"#;
        assert_eq!(text, expected);
    }

    #[test]
    fn arguments_of_tool_calls_reach_the_template_as_an_object() {
        let call = json!({"type": "function", "function": {"name": "add", "arguments": "{\"a\": 1, \"b\": [2, 3]}"}});
        let messages = json!([{"role": "assistant", "content": null, "tool_calls": [call]}]);
        let source = "{{ messages[0].content }}{{ messages[0].tool_calls[0].function.arguments | tojson }}";
        assert_eq!(render(source, messages).unwrap(), r#"{"a": 1, "b": [2, 3]}"#);
    }

    #[test]
    fn ids_of_calls_are_as_long_as_mistrals_templates_want_them() {
        let call = |id: &str| json!({"id": id, "type": "function", "function": {"name": "f", "arguments": "{}"}});
        let messages = json!([{"role": "assistant", "tool_calls": [call("call-0123456789"), call("abcdefgh9")]},
            {"role": "tool", "tool_call_id": "call-0123456789", "content": "x"}]);
        let source = "{{ tools }}[TOOL_CALLS]{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.id }} {% endfor %}{{ m.tool_call_id }}{% endfor %}";
        let text = render(source, messages).unwrap();
        let ids: Vec<_> = text.split("[TOOL_CALLS]").nth(1).unwrap().split(' ').collect();
        assert_eq!((ids.len(), ids[0].len(), ids[1]), (3, 9, "abcdefgh9"));
        assert_eq!(ids[2], ids[0]);
    }

    #[test]
    fn blocks_are_trimmed_and_python_methods_work() {
        let messages = json!([{"role": "user", "content": "  a b  "}]);
        let source = "{% if true %}\n  {% for m in messages %}\n{{ m['content'].strip().split(' ')[1] }}\n  {% endfor %}\n{% endif %}";
        assert_eq!(render(source, messages).unwrap(), "b\n");
    }

    #[test]
    fn what_hugging_faces_environment_has_is_there() {
        let messages = json!([{"role": "user", "content": "a"}, {"role": "user", "content": "b"},
            {"role": "user", "content": "c"}, {"role": "user", "content": "d"}]);
        let source = "{% for m in messages %}{% if m.content == 'b' %}{% continue %}{% elif m.content == 'd' %}{% break %}{% endif %}{{ m.content }}{% endfor %}";
        assert_eq!(render(source, messages.clone()).unwrap(), "ac");
        let marked =
            "{% for m in messages %}\n{%- generation -%}\n {{ m.content }}\n{%- endgeneration %}\n{% endfor %}";
        assert_eq!(render(marked, messages).unwrap(), "abcd");
    }

    #[test]
    fn a_template_that_does_not_compile_says_why() {
        let error = ChatTemplate::new("{% teleport %}", String::new(), String::new()).expect_err("no such statement");
        assert!(error.to_string().contains("teleport"), "{error}");
    }

    #[test]
    fn absent_tools_are_none_and_the_bos_token_is_there() {
        let messages = json!([{"role": "user", "content": "hi"}]);
        assert_eq!(
            render("{{ bos_token }}{{ tools is none }}{{ documents is defined }}", messages).unwrap(),
            "<s>TrueFalse"
        );
    }

    #[test]
    fn a_bad_time_format_is_an_error() {
        let messages = json!([{"role": "user", "content": "hi"}]);
        assert_eq!(render("{{ strftime_now('%Y') | length }}", messages.clone()).unwrap(), "4");
        assert!(render("{{ strftime_now('%Q!') }}", messages).is_err());
    }
}
