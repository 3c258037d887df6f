//! The outputs in which every call has the arguments that its tool's schema allows, as a grammar in llguidance's variant
//! of Lark's notation.
//!
//! Text and calls are told apart as [`CallReader`](super::CallReader) does: what it would read as the beginning of a call
//! is no text here.

use std::fmt::Write;

use serde_json::{Map, Value, json};

use super::forced::DEFINITIONS;
use super::format::ARGUMENTS;
use super::{CallFormat, Tools};
use crate::grammar::with_bounded_space;

/// White space where a model puts some; with an end, as it may repeat itself.
const SPACE: &str = r"[ \t\n]{0,8}";
/// How JSON begins that may be a call without a marker before it.
const BARE_JSON: &str = r#"[ \t\n]*[;,]?[ \t\n]*(```json)?[ \t\n]*\{[ \t\n]*"(name|arguments|parameters)""#;
/// Likewise of calls in XML.
const BARE_XML: &str = r"[ \t\n]*<function=";

/// A marker of calls: a control token, or text.
enum Marker {
    Token(u32),
    Text(&'static str),
}

impl Marker {
    fn new(text: &'static str, special_id: impl Fn(&str) -> Option<u32>) -> Self {
        special_id(text).map_or(Self::Text(text), Self::Token)
    }

    /// As a part of a rule.
    fn part(&self) -> String {
        match self {
            Self::Token(id) => format!("<[{id}]>"),
            Self::Text(text) => literal(text),
        }
    }
}

impl Tools {
    /// Text with any number of calls, be they of tools that are strict or not.
    pub(super) fn grammar_of_calls(&self, format: CallFormat, special_id: impl Fn(&str) -> Option<u32>) -> String {
        let opening = Marker::new(format.opening(), &special_id);
        let bare = if format == CallFormat::Xml { BARE_XML } else { BARE_JSON };
        let mut grammar = String::new();
        let mut rule = |text: std::fmt::Arguments<'_>| _ = writeln!(grammar, "{text}");
        // What comes before a marker, and what comes when no call does.
        match &opening {
            Marker::Token(_) => {
                rule(format_args!("TEXT: /(?s:.+)/ & ~/{bare}(?s:.*)/"));
                rule(format_args!("open: TEXT? {}", opening.part()));
            }
            Marker::Text(text) => {
                let text = pattern(text);
                rule(format_args!("TEXT: /(?s:.+)/ & ~/{bare}(?s:.*)/ & ~/(?s:.*){text}(?s:.*)/"));
                rule(format_args!("OPEN: /(?s:.*){text}/ & ~/{bare}(?s:.*)/"));
                rule(format_args!("open[lazy]: OPEN"));
            }
        }
        let closings = format.closings().iter().filter_map(|text| special_id(text));
        let mut parts: Vec<_> = closings.map(|id| format!("TEXT? <[{id}]>")).collect();
        // Another marker has to come before one whose name is not in JSON.
        parts.extend((format != CallFormat::MistralNamed).then(|| "call".to_owned()));
        parts.push("open call".to_owned());
        rule(format_args!("start: ({})* TEXT?", parts.join(" | ")));
        rule(format_args!("TAIL: /{SPACE}\\}}/"));
        let calls: Vec<_> = (0..self.definitions.len()).map(|index| format!("call_{index}")).collect();
        rule(format_args!("call: {}", calls.join(" | ")));
        for (index, tool) in self.definitions.iter().enumerate() {
            grammar.push_str(&self.call(index, &tool["function"], format, &special_id));
        }
        grammar
    }

    /// One call in XML of a tool that `is_wanted`, and nothing else; `None` where none is.
    pub(super) fn grammar_of_xml_call(&self, is_wanted: impl Fn(&str) -> bool) -> Option<String> {
        let (mut rules, mut calls) = (String::new(), Vec::new());
        for (index, tool) in self.definitions.iter().enumerate() {
            let function = &tool["function"];
            if function["name"].as_str().is_some_and(&is_wanted) {
                calls.push(format!("call_{index}"));
                rules.push_str(&xml_call(index, function));
            }
        }
        (!calls.is_empty()).then(|| format!("start: {}\n{rules}", calls.join(" | ")))
    }

    fn call(
        &self,
        index: usize,
        function: &Value,
        format: CallFormat,
        special_id: impl Fn(&str) -> Option<u32>,
    ) -> String {
        let name = function["name"].as_str().unwrap_or_default();
        let schema = if self.strict.contains(name) { parameters(function) } else { json!({"type": "object"}) };
        let schema = with_bounded_space(schema);
        match format {
            CallFormat::Xml if self.strict.contains(name) => xml_call(index, function),
            // Its parameters are known, and what they are is not asked for.
            CallFormat::Xml => {
                let name = pattern(name);
                format!(
                    "call_{index}[lazy]: CALL_{index}\nCALL_{index}: /{SPACE}<function={name}>(?s:.*)<\\/function>/\n"
                )
            }
            CallFormat::MistralNamed => {
                let arguments = Marker::new(ARGUMENTS, special_id).part();
                format!("call_{index}: {} {arguments} json_{index}\njson_{index}: %json {schema}\n", literal(name))
            }
            CallFormat::Hermes | CallFormat::Mistral | CallFormat::Granite | CallFormat::Llama => {
                let (name, key) = (pattern(name), format.arguments());
                let start = format!(r#"{SPACE}[\[;,]?{SPACE}(```json)?{SPACE}\{{{SPACE}"name""#);
                format!(
                    "call_{index}: HEAD_{index} json_{index} TAIL\n\
                     HEAD_{index}: /{start}{SPACE}:{SPACE}\"{name}\"{SPACE},{SPACE}\"{key}\"{SPACE}:{SPACE}/\n\
                     json_{index}: %json {schema}\n"
                )
            }
        }
    }
}

/// Rules of a call of Qwen3-Coder's, its parameters in the order of the schema.
fn xml_call(index: usize, function: &Value) -> String {
    let name = pattern(function["name"].as_str().unwrap_or_default());
    let schema = parameters(function);
    let required: Vec<&str> = schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let (mut parts, mut rules) = (String::new(), String::new());
    for (place, (key, value)) in schema["properties"].as_object().into_iter().flatten().enumerate() {
        let optional = if required.contains(&key.as_str()) { "" } else { "?" };
        _ = write!(parts, " value_{index}_{place}{optional}");
        let (rule, terminal) = (format!("value_{index}_{place}"), format!("VALUE_{index}_{place}"));
        let (begin, end) = (literal(&format!("<parameter={key}>\n")), literal("\n</parameter>\n"));
        let texts = match value.get("const").map(std::slice::from_ref).or(value["enum"].as_array().map(Vec::as_slice)) {
            Some(values) if values.iter().all(Value::is_string) => values,
            _ => &[],
        };
        _ = if !texts.is_empty() {
            let texts: Vec<_> = texts.iter().filter_map(Value::as_str).map(literal).collect();
            writeln!(rules, "{rule}: {begin} ({}) {end}", texts.join(" | "))
        } else if value["type"] == "string" {
            let any = format!("{terminal}: /(?s:.*)\\n<\\/parameter>\\n/");
            writeln!(rules, "{rule}: {begin} text_{index}_{place}\ntext_{index}_{place}[lazy]: {terminal}\n{any}")
        } else {
            writeln!(
                rules,
                "{rule}: {begin} json_{index}_{place} {end}\njson_{index}_{place}: %json {}",
                part(value, &schema)
            )
        };
    }
    format!("call_{index}: HEAD_{index}{parts} \"</function>\"\nHEAD_{index}: /{SPACE}<function={name}>\\n/\n{rules}")
}

/// `value` with what it may refer to, which is counted from the root of a schema.
fn part(value: &Value, schema: &Value) -> Value {
    let mut fields = value.as_object().cloned().unwrap_or_default();
    for place in DEFINITIONS {
        if let Some(definitions) = schema.get(place) {
            fields.insert(place.to_owned(), definitions.clone());
        }
    }
    with_bounded_space(Value::Object(fields))
}

/// The schema of a function's arguments, an object.
fn parameters(function: &Value) -> Value {
    let mut parameters = function["parameters"].as_object().cloned().unwrap_or_else(Map::new);
    parameters.entry("type").or_insert_with(|| "object".into());
    Value::Object(parameters)
}

/// `text` in quotes.
fn literal(text: &str) -> String {
    Value::from(text).to_string()
}

/// `text` within a regular expression.
fn pattern(text: &str) -> String {
    regex::escape(text).replace('/', "\\/")
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::sync::Arc;

    use super::*;
    use crate::grammar::{Constraint, GrammarCompiler};
    use crate::tokenizer::{Specials, Tokenizer};
    use crate::tools::{CallReader, ChatPart, ToolChoice};

    /// `f` is strict, `g` is not.
    fn tools() -> Tools {
        let properties = json!({"path": {"type": "string"}, "lines": {"type": "integer"}});
        let parameters =
            json!({"type": "object", "properties": properties, "required": ["path"], "additionalProperties": false});
        let tool = |name: &str| json!({"type": "function", "function": {"name": name, "parameters": parameters}});
        Tools {
            definitions: vec![tool("f"), tool("g")],
            strict: HashSet::from(["f".to_owned()]),
            parallel: true,
            choice: ToolChoice::Auto,
        }
    }

    /// Whether `output` is one of what the tools ask for, and how many calls are read from it.
    fn follow(tools: Tools, format: CallFormat, specials: &[&str], output: &str) -> (bool, usize) {
        let tokenizer = Arc::new(Tokenizer::tiny(&[&["<|end|>"], specials].concat()));
        let Ok(Some(Constraint::Lark(grammar))) = tools.constraint(format, |text| tokenizer.special_id(text)) else {
            panic!("a grammar");
        };
        let count = prometheus::IntCounter::new("compiled", "Compiled.").unwrap();
        let compiled = GrammarCompiler::new(tokenizer.clone(), count).compile(&Constraint::Lark(grammar.clone()));
        let mut matcher = compiled.unwrap_or_else(|error| panic!("{error}: {grammar}"));
        let (vocab_size, end) = (tokenizer.vocab_size(), tokenizer.special_id("<|end|>").unwrap());
        let mut may_follow = |token: u32| {
            let mut logits = vec![0.0; vocab_size];
            matcher.mask(&mut logits, &[end]).unwrap();
            let is_allowed = logits[token as usize] == 0.0;
            is_allowed && (token == end || matcher.consume(token).is_ok())
        };
        let tokens = tokenizer.encode(output, Specials::Parse).unwrap();
        let is_followed = tokens.into_iter().chain([end]).all(&mut may_follow);
        let mut reader = CallReader::new(format, Arc::new(tools));
        let parts = reader.push(output).into_iter().chain(reader.finish());
        (is_followed, parts.filter(|part| matches!(part, ChatPart::CallStarted { .. })).count())
    }

    #[test]
    fn text_is_free_and_the_arguments_of_strict_tools_are_what_their_schema_says() {
        let good = r#"{"name": "f", "arguments": {"path": "a", "lines": 3}}"#;
        let bad = r#"{"name": "f", "arguments": {"lines": 3}}"#;
        let loose = r#"{"name": "g", "arguments": {"lines": "x"}}"#;
        let named = |name: &str, arguments: &str| format!("[TOOL_CALLS]{name}[ARGS]{arguments}");
        let xml = |name: &str, parameters: &str| {
            format!("<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>")
        };
        let path = "<parameter=path>\n</x>\nb\n</parameter>\n";
        let lines = |value: &str| format!("<parameter=lines>\n{value}\n</parameter>\n");
        for (format, markers) in [
            (CallFormat::Hermes, ["<tool_call>", "</tool_call>"]),
            (CallFormat::Mistral, ["[TOOL_CALLS]", "]"]),
            (CallFormat::Granite, ["<|tool_call|>", "]"]),
            (CallFormat::Llama, ["<|python_tag|>", ";"]),
            (CallFormat::MistralNamed, ["[TOOL_CALLS]", "[ARGS]"]),
            (CallFormat::Xml, ["<tool_call>", "</tool_call>"]),
        ] {
            let worded = |call: &str| call.replace("arguments", format.arguments());
            let [open, close] = markers;
            let marked = |call: &str| format!("{open}\n{}\n{close}", worded(call));
            let mut cases = match format {
                CallFormat::MistralNamed => vec![
                    (named("f", r#"{"path": "a"}"#), true, 1),
                    (format!("Hm. {}{}", named("g", r#"{"x": []}"#), named("f", r#"{"path": "a"}"#)), true, 2),
                    (named("f", r#"{"lines": 3}"#), false, 1),
                    (named("h", "{}"), false, 0),
                ],
                CallFormat::Xml => vec![
                    (xml("f", path), true, 1),
                    (xml("f", &format!("{path}{}", lines("3"))), true, 1),
                    (xml("f", &format!("{path}{}", lines("x"))), false, 1),
                    (xml("f", &lines("3")), false, 1),
                    (xml("g", &lines("x")), true, 1),
                    (format!("Hm.\n{}\n{}", xml("g", path), xml("f", path)), true, 2),
                    (format!("<function=f>\n{path}</function>"), true, 1),
                    ("<function=f>\n</function>".to_owned(), false, 1),
                ],
                _ => vec![
                    (marked(good), true, 1),
                    (marked(bad), false, 1),
                    (marked(loose), true, 1),
                    (format!("Let me see.\n{}\n{}", marked(good), marked(loose)), true, 2),
                    (format!("Let me see.\n{}", marked(bad)), false, 1),
                    (worded(good), true, 1),
                    (worded(bad), false, 1),
                    (marked(&good.replace("\"f\"", "\"h\"")), false, 0),
                ],
            };
            for text in ["Hello. {1}", "", "{\"a\": 1}", "a < b [c] </tool_cal", "  \n[1]"] {
                cases.push((text.to_owned(), true, 0));
            }
            for (output, is_followed, num_calls) in cases {
                for specials in [&[][..], &markers] {
                    let found = follow(tools(), format, specials, &output);
                    assert_eq!(found, (is_followed, num_calls), "{format:?} {specials:?} {output}");
                }
            }
        }
    }

    #[test]
    fn a_forced_call_in_xml_is_one_call_and_nothing_else() {
        let mut forced = Tools { choice: ToolChoice::Named("f".to_owned()), ..tools() };
        let parameters = &mut forced.definitions[0]["function"]["parameters"];
        parameters["properties"]["mode"] = json!({"enum": ["r", "w"]});
        parameters["properties"]["all"] = json!({"$ref": "#/$defs/All"});
        parameters["$defs"] = json!({"All": {"type": "array", "items": {"type": "boolean"}}});
        let parameter = |name: &str, value: &str| format!("<parameter={name}>\n{value}\n</parameter>\n");
        let call = |name: &str, parameters: &str| format!("<function={name}>\n{parameters}</function>");
        let path = parameter("path", "a\n<b>");
        for (output, is_followed) in [
            (call("f", &path), true),
            (call("f", &[path.clone(), parameter("lines", "3"), parameter("mode", "w")].concat()), true),
            (call("f", &[path.clone(), parameter("all", "[true]")].concat()), true),
            (call("f", &[path.clone(), parameter("all", "[1]")].concat()), false),
            (call("f", &[path.clone(), parameter("mode", "x")].concat()), false),
            (call("f", &[path.clone(), parameter("other", "x")].concat()), false),
            (call("f", ""), false),
            (call("g", &path), false),
            (format!("Hm. {}", call("f", &path)), false),
            (call("f", &path).repeat(2), false),
        ] {
            let (found, num_calls) = follow(forced.clone(), CallFormat::Xml, &[], &output);
            assert_eq!(found, is_followed, "{output}");
            assert!(!found || num_calls == 1, "{output}");
        }
    }
}
