//! The ways in which models word calls.

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
    /// `{"name": …, "parameters": …}` and nothing else, with or without `<|python_tag|>` before it: Llama 3.
    Llama,
}

impl CallFormat {
    /// Of the model with this chat template; `None` where it shows no call that is known here.
    pub fn of_template(source: &str) -> Option<Self> {
        let shows = |text: &str| source.contains(text);
        if !shows("tools") {
            None
        } else if shows("<function=") {
            Some(Self::Xml)
        } else if shows("<tool_call>") {
            Some(Self::Hermes)
        } else if shows("[TOOL_CALLS]") && shows(ARGUMENTS) {
            Some(Self::MistralNamed)
        } else if shows("[TOOL_CALLS]") {
            Some(Self::Mistral)
        } else if shows("\"parameters\"") || shows("<|python_tag|>") {
            Some(Self::Llama)
        } else {
            None
        }
    }

    /// What begins a call, or a run of them.
    pub(super) fn opening(self) -> &'static str {
        match self {
            Self::Hermes | Self::Xml => "<tool_call>",
            Self::Mistral | Self::MistralNamed => "[TOOL_CALLS]",
            Self::Llama => "<|python_tag|>",
        }
    }

    /// What may stand between the end of a call and what follows.
    pub(super) fn closings(self) -> &'static [&'static str] {
        match self {
            Self::Hermes => &["</tool_call>", "```"],
            Self::Xml => &["</tool_call>"],
            Self::Mistral => &["]", "```"],
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
    fn a_template_shows_how_its_model_calls() {
        for (source, format) in [
            ("{% if tools %}<tool_call>\n{\"name\": <function-name>}</tool_call>", Some(CallFormat::Hermes)),
            ("{% if tools %}<tool_call>\n<function=example>", Some(CallFormat::Xml)),
            ("{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]", Some(CallFormat::Mistral)),
            ("{{ tools }}[TOOL_CALLS]{{ name }}[ARGS]{{ arguments }}", Some(CallFormat::MistralNamed)),
            ("{{ tools }}{\"name\": x, \"parameters\": y}", Some(CallFormat::Llama)),
            ("{{ messages }} <tool_call>", None),
            ("{{ tools }} somehow", None),
        ] {
            assert_eq!(CallFormat::of_template(source), format, "{source}");
        }
    }
}
