//! The ways in which models word calls.

use serde_json::{Map, Value};

/// Between the name of a call and its arguments, and before its id.
pub(super) const ARGUMENTS: &str = "[ARGS]";
pub(super) const CALL_ID: &str = "[CALL_ID]";

/// How a model was taught to word a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CallFormat {
    /// `<tool_call>{"name": …, "arguments": …}</tool_call>`: Hermes, Qwen2.5, Qwen3.
    Hermes,
    /// `<tool_call><function=NAME><parameter=KEY>VALUE</parameter>…</function></tool_call>`: Qwen3-Coder.
    Xml,
    /// `[TOOL_CALLS][{"name": …, "arguments": …}, …]`: Mistral.
    Mistral,
    /// `[TOOL_CALLS]NAME[ARGS]{…}`, once for each call, some with `[CALL_ID]ID` behind the name: Mistral since 2025.
    MistralNamed,
    /// `<|tool_call|>[{"name": …, "arguments": …}, …]`: Granite 3.
    Granite,
    /// `{"name": …, "parameters": …}` and nothing else, with or without `<|python_tag|>` before it: Llama 3.
    Llama,
}

impl CallFormat {
    /// That in which a template has `rendered` a call of the function `name`, which takes an object; `None` for one that is not
    /// known here. `prompt` is what an answer stands behind.
    pub fn of_call(rendered: &str, name: &str, prompt: &str) -> Option<Self> {
        let at = rendered.find(name)?;
        let (before, behind) = (&rendered[..at], rendered[at + name.len()..].trim_start());
        if let Some(opening) = before.strip_suffix("<function=") {
            let is_xml = behind.strip_prefix('>').is_some_and(|value| value.trim_start().starts_with("<parameter="));
            return (is_xml && opening.trim_end().ends_with(Self::Xml.opening())).then_some(Self::Xml);
        }
        if before.trim_end().ends_with(Self::MistralNamed.opening()) {
            let is_named = [ARGUMENTS, CALL_ID].iter().any(|next| behind.starts_with(next));
            return is_named.then_some(Self::MistralNamed);
        }
        let object_at = |at: usize| {
            let mut values = serde_json::Deserializer::from_str(&rendered[at..]).into_iter::<Map<String, Value>>();
            Some((at, values.next()?.ok().filter(|object| object.get("name").is_some_and(|of| of == name))?))
        };
        let (at, object) = before.match_indices('{').find_map(|(at, _)| object_at(at))?;
        let before = before[..at].trim_end();
        let (opening, is_in_list) =
            before.strip_suffix('[').map_or((before, false), |opening| (opening.trim_end(), true));
        Self::IN_JSON.into_iter().find(|format| {
            let is_open = opening.ends_with(format.opening()) || *format == Self::Llama && opening == prompt.trim_end();
            is_open && is_in_list == format.is_list() && object.contains_key(format.arguments())
        })
    }

    /// Of the model with this chat template, which renders no call but may tell the model how to word one.
    pub fn of_instructions(source: &str) -> Option<Self> {
        let shows = |text: &str| source.contains(text);
        if shows("<function=") {
            (shows("<parameter=") && shows(Self::Xml.opening())).then_some(Self::Xml)
        } else if shows("<arg_key>") {
            // GLM's, who opens calls as Hermes does.
            None
        } else {
            [Self::Hermes, Self::Granite, Self::Mistral, Self::Llama].into_iter().find(|format| shows(format.opening()))
        }
    }

    /// Those that have a whole call in one object.
    const IN_JSON: [Self; 4] = [Self::Hermes, Self::Mistral, Self::Granite, Self::Llama];

    /// What begins a call, or a run of them.
    pub(super) fn opening(self) -> &'static str {
        match self {
            Self::Hermes | Self::Xml => "<tool_call>",
            Self::Mistral | Self::MistralNamed => "[TOOL_CALLS]",
            Self::Granite => "<|tool_call|>",
            Self::Llama => "<|python_tag|>",
        }
    }

    /// Whether the calls behind one opening stand in a list.
    pub(super) fn is_list(self) -> bool {
        matches!(self, Self::Mistral | Self::Granite)
    }

    /// What may stand between the end of a call and what follows.
    pub(super) fn closings(self) -> &'static [&'static str] {
        match self {
            Self::Hermes => &["</tool_call>", "```"],
            Self::Xml => &["</tool_call>"],
            Self::Mistral | Self::Granite => &["]", "```"],
            Self::MistralNamed => &["```"],
            Self::Llama => &[";", "```"],
        }
    }

    /// What a call in JSON has its arguments under.
    pub(super) fn arguments(self) -> &'static str {
        if self == Self::Llama { "parameters" } else { "arguments" }
    }

    /// What a reader of calls must see, also where it is a control token.
    pub fn markers(self) -> impl Iterator<Item = &'static str> {
        let inner: &[&str] = if self == Self::MistralNamed { &[CALL_ID, ARGUMENTS] } else { &[] };
        std::iter::once(self.opening()).chain(self.closings().iter().copied()).chain(inner.iter().copied())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rendered_call_shows_how_a_model_calls() {
        let object = r#"{"name": "look", "arguments": {"a": "b"}}"#;
        let turned = r#"{"arguments": {"a": "b"}, "name": "look"}"#;
        let other = r#"{"name": "look", "parameters": {"a": "b"}}"#;
        for (call, format) in [
            (format!("<tool_call>\n{object}\n</tool_call>"), Some(CallFormat::Hermes)),
            (format!("<tool_call>{turned}</tool_call>"), Some(CallFormat::Hermes)),
            (format!("Hm.\n<tool_call>{object}</tool_call>"), Some(CallFormat::Hermes)),
            (
                "<tool_call>\n<function=look>\n<parameter=a>\nb\n</parameter>\n</function>".to_owned(),
                Some(CallFormat::Xml),
            ),
            (format!("[TOOL_CALLS] [{object}, {object}]"), Some(CallFormat::Mistral)),
            (r#"[TOOL_CALLS]look[ARGS]{"a": "b"}"#.to_owned(), Some(CallFormat::MistralNamed)),
            (r#"[TOOL_CALLS]look[CALL_ID]1[ARGS]{"a": "b"}"#.to_owned(), Some(CallFormat::MistralNamed)),
            (format!("<|tool_call|>[{turned}]"), Some(CallFormat::Granite)),
            (other.to_owned(), Some(CallFormat::Llama)),
            (format!("<|python_tag|>{other}"), Some(CallFormat::Llama)),
            // GLM, Functionary, Seed, Command R, GigaChat, DeepSeek and Phi, and what stands in or behind what no format has it.
            ("<tool_call>look\n<arg_key>a</arg_key>\n<arg_value>b</arg_value>\n</tool_call>".to_owned(), None),
            (r#"<function=look>{"a": "b"}</function>"#.to_owned(), None),
            ("<seed:tool_call>\n<function=look>\n<parameter=a>b</parameter>\n</function>".to_owned(), None),
            (r#"Action: [{"tool_name": "look", "parameters": {"a": "b"}}]"#.to_owned(), None),
            (format!("Action: [{other}]"), None),
            (format!("function call<|role_sep|>{other}"), None),
            ("<｜tool▁call▁begin｜>function<｜tool▁sep｜>look\n```json\n{\"a\": \"b\"}\n```".to_owned(), None),
            (format!("<|tool_call|>{object}<|/tool_call|>"), None),
            (format!("[TOOL_CALLS]{object}"), None),
            (object.to_owned(), None),
        ] {
            let prompt = "<user>g<assistant>";
            assert_eq!(CallFormat::of_call(&format!("{prompt}\n{call}<end>"), "look", prompt), format, "{call}");
        }
    }

    #[test]
    fn a_template_that_renders_no_call_may_tell_how_its_model_calls() {
        for (source, format) in [
            ("<tool_call>\n{\"name\": <function-name>}</tool_call>", Some(CallFormat::Hermes)),
            ("<tool_call>\n<function=example>\n<parameter=key>", Some(CallFormat::Xml)),
            ("<function=example>{\"key\": 1}</function>", None),
            ("<tool_call>NAME\n<arg_key>", None),
            ("respond with <|tool_call|> and a list", Some(CallFormat::Granite)),
            ("[TOOL_CALLS]", Some(CallFormat::Mistral)),
            ("behind <|python_tag|>", Some(CallFormat::Llama)),
            ("{\"name\": x, \"parameters\": y}", None),
            ("somehow", None),
        ] {
            assert_eq!(CallFormat::of_instructions(source), format, "{source}");
        }
    }
}
