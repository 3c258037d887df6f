//! The model's own chat template, rendered as Hugging Face renders it.

use minijinja::value::Serde;
use minijinja::{Environment, Error, context};
use serde_json::{Value, json};
use tracing::info;

use super::messages::{CallForm, for_template, shorten_ids};
use super::{PromptError, environment};
use crate::model::gguf::GgufFile;
use crate::tokenizer::Tokenizer;
use crate::tools::CallFormat;

/// GGUF's key of the template, and what stands before the names of those that a model has besides it.
pub const KEY: &str = "tokenizer.chat_template";
pub const NAMED: &str = "tokenizer.chat_template.";
/// That of those names which transformers takes where tools are offered.
const WITH_TOOLS: &str = "tokenizer.chat_template.tool_use";
/// Ends the answer that is gone on with, where it is rendered: a noncharacter, which no template looks for.
const END_OF_BEGUN: char = '\u{fffe}';

/// What a prompt ends with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending<'a> {
    /// The end of the last message.
    LastMessage,
    /// What the assistant's answer stands behind.
    Prompt,
    /// An answer that was begun, for the model to go on with: all of it that a template gives.
    Begun(&'a str),
}

/// A compiled chat template; shared by all requests.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    bos_token: String,
    eos_token: String,
    call_format: Option<CallFormat>,
    call_form: CallForm,
    /// What takes its place where tools are offered.
    with_tools: Option<Box<Self>>,
}

impl ChatTemplate {
    /// # Errors
    /// The file has no template, or one that cannot be used here: such a model cannot chat, and serves everything else.
    pub fn from_gguf(gguf: &GgufFile, tokenizer: &Tokenizer) -> Result<Self, PromptError> {
        let mut named: Vec<&str> =
            gguf.metadata_pairs().map(|(key, _)| key).filter(|key| key.starts_with(NAMED)).collect();
        named.sort_unstable();
        let with_tools = gguf.metadata(KEY).and_then(|_| named.iter().position(|key| *key == WITH_TOOLS));
        let with_tools = with_tools.map(|at| named.remove(at));
        let key = match (gguf.metadata(KEY), &named[..]) {
            (Some(_), []) => KEY,
            (Some(_), _) => {
                info!("{KEY} is used, and of the file's other templates none: {}", named.join(", "));
                KEY
            }
            (None, []) => return Err(PromptError::NoChatTemplate),
            (None, [only]) => only,
            (None, _) => {
                let reason = format!("the file does not say which of several is meant: {}", named.join(", "));
                return Err(PromptError::ChatTemplate(reason));
            }
        };
        let source = |key: &str| gguf.str(key).map_err(|e| PromptError::ChatTemplate(e.to_string()));
        // A template may write the token even where raw prompts go without it.
        let token_text = |key: &str| match gguf.usize(key).ok().and_then(|id| u32::try_from(id).ok()) {
            Some(id) => tokenizer.token_text(id).into_owned(),
            None => String::new(),
        };
        let of = |key: &str| {
            Self::new(
                source(key)?,
                token_text("tokenizer.ggml.bos_token_id"),
                token_text("tokenizer.ggml.eos_token_id"),
            )
        };
        Ok(Self { with_tools: with_tools.map(of).transpose()?.map(Box::new), ..of(key)? })
    }

    /// # Errors
    /// As those of [`Self::from_gguf`], of a template.
    pub fn new(source: &str, bos_token: String, eos_token: String) -> Result<Self, PromptError> {
        let invalid = |error: Error| PromptError::ChatTemplate(error.to_string());
        let environment = environment::with_template(KEY, source).map_err(invalid)?;
        let (source, call_form) = (source.to_owned(), CallForm::default());
        let template =
            Self { environment, source, bos_token, eos_token, call_format: None, call_form, with_tools: None };
        let probe = CallForm::probe();
        let shown = CallForm::ALL.into_iter().find_map(|call_form| {
            let text = template.render_in(&probe, Ending::LastMessage, None, call_form).ok()?;
            CallForm::is_shown(&text).then_some((call_form, text))
        });
        let call_format = match &shown {
            // It offers none.
            _ if !template.source.contains("tools") => None,
            Some((call_form, text)) => {
                let prompt = template.render_in(&probe[..1], Ending::Prompt, None, *call_form).unwrap_or_default();
                CallFormat::of_call(text, CallForm::PROBED, &prompt)
            }
            None => CallFormat::of_instructions(&template.source),
        };
        Ok(Self { call_format, call_form: shown.map(|(call_form, _)| call_form).unwrap_or_default(), ..template })
    }

    /// As the model's file has it.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// How the model words calls of tools; `None` for one that was not taught to.
    pub fn call_format(&self) -> Option<CallFormat> {
        self.with_tools.as_ref().map_or(self.call_format, |template| template.call_format)
    }

    /// The prompt text for OpenAI `messages`, to be encoded with special tokens parsed and nothing put before it: what the
    /// messages say is marked before as [`Literal`](super::literal::Literal). `tools` is OpenAI's list of tools.
    ///
    /// # Errors
    /// The messages are malformed, or the template refuses them.
    pub fn render(
        &self,
        messages: &[Value],
        ending: Ending<'_>,
        tools: Option<&[Value]>,
    ) -> Result<String, PromptError> {
        let template = self.with_tools.as_deref().filter(|_| tools.is_some()).unwrap_or(self);
        template.render_in(messages, ending, tools, template.call_form)
    }

    fn render_in(
        &self,
        messages: &[Value],
        ending: Ending<'_>,
        tools: Option<&[Value]>,
        call_form: CallForm,
    ) -> Result<String, PromptError> {
        let mut messages = for_template(messages, call_form)?;
        if let Ending::Begun(answer) = ending {
            messages.push(json!({"role": "assistant", "content": format!("{answer}{END_OF_BEGUN} ")}));
        }
        if matches!(self.call_format, Some(CallFormat::Mistral | CallFormat::MistralNamed)) {
            messages.iter_mut().for_each(shorten_ids);
        }
        let context = context! {
            messages => Serde(&messages),
            tools => Serde(tools),
            add_generation_prompt => ending == Ending::Prompt,
            bos_token => &self.bos_token,
            eos_token => &self.eos_token,
        };
        let template = self.environment.get_template(KEY).map_err(refused)?;
        let rendered = template.render(context).map_err(refused)?;
        match ending {
            Ending::Begun(answer) => up_to_begun(rendered, answer),
            Ending::LastMessage | Ending::Prompt => Ok(rendered),
        }
    }
}

/// What of a rendered prompt the model goes on from. A template that trims answers trims this one too, or the model would see
/// the space where its training had none.
fn up_to_begun(mut rendered: String, answer: &str) -> Result<String, PromptError> {
    let end = rendered.rfind(END_OF_BEGUN).filter(|end| rendered[..*end].contains(answer.trim()));
    let end = end.ok_or_else(|| {
        PromptError::Refused("it does not give the last answer as it is, so that nothing can go on from it".to_owned())
    })?;
    let is_trimmed = !rendered[end + END_OF_BEGUN.len_utf8()..].starts_with(' ');
    rendered.truncate(end);
    if is_trimmed {
        rendered.truncate(rendered.trim_end().len());
    }
    Ok(rendered)
}

fn refused(error: Error) -> PromptError {
    PromptError::Refused(error.detail().map_or_else(|| error.kind().to_string(), str::to_string))
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
        template(source).render(messages.as_array().expect("a list"), Ending::Prompt, None)
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
    fn an_answer_that_was_begun_is_worded_by_the_template() {
        let question = [json!({"role": "user", "content": "q"})];
        let render = |source: &str, answer| template(source).render(&question, Ending::Begun(answer), None);
        let source = "{% for m in messages %}{{ m.role }}: {{ m.content CONTENT }}<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}";
        let (kept, trimmed) = (source.replace(" CONTENT", ""), source.replace("CONTENT", "| trim"));
        assert_eq!(render(&kept, " fn f() { ").unwrap(), "user: q<|im_end|>assistant:  fn f() { ");
        assert_eq!(render(&trimmed, " fn f() { ").unwrap(), "user: q<|im_end|>assistant: fn f() {");
        assert_eq!(render(&trimmed, "a").unwrap(), "user: q<|im_end|>assistant: a");
        for source in [source.replace("CONTENT", "| upper"), source.replace("CONTENT", "| length")] {
            assert!(render(&source, "fn").unwrap_err().to_string().contains("nothing can go on"));
        }
    }

    #[test]
    fn a_call_is_given_in_the_form_in_which_the_template_shows_it() {
        let call = json!({"id": "c", "type": "function", "function": {"name": "f", "arguments": "{\"a\":1}"}});
        let called = json!([{"role": "assistant", "content": null, "tool_calls": [call]}]);
        for (form, expected) in [
            ("{{ m.content }}{{ c.name }}{{ c.arguments | tojson }}", "f{\"a\": 1}"),
            ("{{ c.name + c.arguments }}", "f{\"a\":1}"),
            ("{% if m.content is none %}{{ c.name }}{{ c.arguments | tojson }}{% endif %}", "f{\"a\": 1}"),
            ("{% if m.content is none %}{{ c.name + c.arguments }}{% endif %}", "f{\"a\":1}"),
            ("{{ m.content }} is no call", " is no call"),
        ] {
            let source = format!(
                "{{% for m in messages %}}{{% set c = m.tool_calls[0].function if m.tool_calls else {{}} %}}{{% if c %}}{form}{{% endif %}}{{% endfor %}}"
            );
            assert_eq!(render(&source, called.clone()).unwrap(), expected, "{form}");
        }
    }

    #[test]
    fn fields_that_are_null_are_not_there_and_thoughts_have_the_names_of_templates() {
        let messages = json!([{"role": "assistant", "content": "a", "tool_calls": null, "name": null, "reasoning": "r"},
            {"role": "assistant", "content": "b", "tool_calls": []}]);
        let source = "{% for m in messages %}{{ 'tool_calls' in m }} {{ m.name is defined }} {{ m.thinking }}{{ m.reasoning_content }} {% endfor %}";
        assert_eq!(render(source, messages).unwrap(), "False False rr False False  ");
    }

    #[test]
    fn what_is_told_of_tools_keeps_the_order_it_was_told_in() {
        let tool =
            json!({"type": "function", "function": {"name": "f", "description": "d", "parameters": {"z": 1, "a": 2}}});
        let tools = [tool.clone()];
        let messages = [json!({"role": "user", "content": "hi"})];
        let text = template("{{ tools[0] | tojson }}").render(&messages, Ending::Prompt, Some(&tools)).unwrap();
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
