use std::collections::HashSet;

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::tools::ToolChoice;

fn tools(parallel: bool) -> Arc<Tools> {
    let tool = |name: &str| {
        let properties = json!({"path": {"type": "string"}, "lines": {"type": "integer"}});
        json!({"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}})
    };
    Arc::new(Tools {
        definitions: vec![tool("read"), tool("write_file")],
        strict: HashSet::new(),
        parallel,
        choice: ToolChoice::Auto,
    })
}

/// Text, and the calls as `name(arguments)`, from a reader that is given these pieces.
fn read<'a>(format: CallFormat, parallel: bool, pieces: impl IntoIterator<Item = &'a str>) -> (String, Vec<String>) {
    let mut reader = CallReader::new(format, tools(parallel));
    let mut parts: Vec<ChatPart> = pieces.into_iter().flat_map(|piece| reader.push(piece)).collect();
    parts.extend(reader.finish());
    let (mut text, mut calls) = (String::new(), Vec::<String>::new());
    for part in parts {
        match part {
            ChatPart::Text(part) => text.push_str(&part),
            ChatPart::CallStarted { index, name } => {
                assert_eq!(index, calls.len());
                calls.push(format!("{name} "));
            }
            ChatPart::Arguments { index, fragment } => calls[index].push_str(&fragment),
        }
    }
    assert_eq!(reader.has_calls(), !calls.is_empty());
    (text, calls)
}

const READ: &str = r#"read {"path": "a.py", "lines": 3}"#;

#[test]
fn every_wording_of_a_call_is_read() {
    let call = r#"{"name": "read", "arguments": {"path": "a.py", "lines": 3}}"#;
    let other = r#"{"name": "write_file", "arguments": {"path": "}\""}}"#;
    let write = r#"write_file {"path": "}\""}"#;
    let xml = "<tool_call>\n<function=read>\n<parameter=path>\n7\n</parameter>\n<parameter=lines>\n3\n</parameter>\n</function>\n</tool_call>";
    for (format, output, text, calls) in [
        (CallFormat::Hermes, format!("<tool_call>\n{call}\n</tool_call>"), "", vec![READ]),
        (CallFormat::Hermes, format!("Let me see.\n<tool_call>{call}</tool_call>"), "Let me see.", vec![READ]),
        (
            CallFormat::Hermes,
            format!("<tool_call>\n{call}\n</tool_call>\n<tool_call>\n{other}\n</tool_call>"),
            "",
            vec![READ, write],
        ),
        (CallFormat::Hermes, format!("<tool_call>\n{call}\n</tool_call> done"), "done", vec![READ]),
        (CallFormat::Hermes, call.to_owned(), "", vec![READ]),
        (CallFormat::Hermes, format!("```json\n{call}\n```"), "", vec![READ]),
        (CallFormat::Hermes, format!("<tool_call>\n{call}"), "", vec![READ]),
        (CallFormat::Mistral, format!("[TOOL_CALLS][{call}, {other}]"), "", vec![READ, write]),
        (CallFormat::Granite, format!("Hm.<|tool_call|>[{call},\n{other}]"), "Hm.", vec![READ, write]),
        (
            CallFormat::MistralNamed,
            r#"Hm.[TOOL_CALLS]read[ARGS]{"path": "a.py", "lines": 3}[TOOL_CALLS]write_file[CALL_ID]x1[ARGS] {"path": "}\""}"#
                .to_owned(),
            "Hm.",
            vec![READ, write],
        ),
        (CallFormat::MistralNamed, call.to_owned(), "", vec![READ]),
        (CallFormat::Llama, call.replace("arguments", "parameters"), "", vec![READ]),
        (CallFormat::Llama, format!("<|python_tag|>{call}; {other}"), "", vec![READ, write]),
        (CallFormat::Xml, xml.to_owned(), "", vec![r#"read {"path":"7","lines":3}"#]),
        (CallFormat::Xml, xml.replace("<tool_call>\n", ""), "", vec![r#"read {"path":"7","lines":3}"#]),
        (CallFormat::Xml, format!("I will.\n\n{xml}"), "I will.", vec![r#"read {"path":"7","lines":3}"#]),
    ] {
        let calls: Vec<_> = calls.into_iter().map(str::to_owned).collect();
        let found = read(format, true, [output.as_str()]);
        let same_json = |a: &str, b: &str| {
            let parse = |call: &str| {
                let (name, arguments) = call.split_once(' ').unwrap();
                (name.to_owned(), serde_json::from_str::<Value>(arguments).unwrap())
            };
            parse(a) == parse(b)
        };
        assert_eq!(found.0, text, "{output}");
        assert_eq!(found.1.len(), calls.len(), "{output}: {found:?}");
        assert!(found.1.iter().zip(&calls).all(|(a, b)| same_json(a, b)), "{output}: {found:?}");
    }
}

#[test]
fn arguments_are_what_the_model_wrote_and_come_while_it_writes() {
    let mut reader = CallReader::new(CallFormat::Hermes, tools(true));
    assert_eq!(reader.push("<tool_call>\n{\"name\": \"read\", "), []);
    let started = ChatPart::CallStarted { index: 0, name: "read".to_owned() };
    let fragment = |text: &str| ChatPart::Arguments { index: 0, fragment: text.to_owned() };
    assert_eq!(reader.push("\"arguments\": {\"pa"), [started, fragment("{\"pa")]);
    assert_eq!(reader.push("th\" : 1"), [fragment("th\" : 1")]);
    assert_eq!(reader.push(" }}\n</tool_call>"), [fragment(" }")]);
}

#[test]
fn arguments_before_the_name_and_in_a_string_are_read_whole() {
    let output = r#"<tool_call>{"arguments": {"path": "a"}, "name": "read"}</tool_call>"#;
    assert_eq!(read(CallFormat::Hermes, true, [output]), (String::new(), vec![r#"read {"path":"a"}"#.to_owned()]));
    let output = r#"{"name": "read", "arguments": "{\"path\": \"a\"}"}"#;
    assert_eq!(read(CallFormat::Llama, true, [output]), (String::new(), vec![r#"read {"path": "a"}"#.to_owned()]));
    let output = r#"{"name": "read"}"#;
    assert_eq!(read(CallFormat::Llama, true, [output]), (String::new(), vec!["read {}".to_owned()]));
}

#[test]
fn what_is_no_call_of_a_tool_is_text() {
    for output in [
        r#"<tool_call>{"name": "delete", "arguments": {}}</tool_call>"#,
        "<tool_call> is how calls begin",
        "<tool_call>",
        "{\"name\": \"nobody\"}",
        "{\"a\": 1}",
        "{",
        "{'a'}",
        "a < b",
        "```json\n{\"a\": 1}\n```",
        "```python\npass\n```",
        "``",
        "a <tool",
        "  leading\n",
        "\u{3000}{x}",
        "text {\"name\": \"read\", \"arguments\": {}}",
    ] {
        assert_eq!(read(CallFormat::Hermes, true, [output]), (output.to_owned(), vec![]), "{output}");
    }
    for (format, output) in [
        (CallFormat::Xml, "<tool_call>\n<function=delete>\n</function>\n</tool_call>"),
        (CallFormat::Xml, "<function=delete>\n</function>"),
        (CallFormat::Xml, "<func"),
        (CallFormat::MistralNamed, "[TOOL_CALLS]delete[ARGS]{}"),
        (CallFormat::MistralNamed, "[TOOL_CALLS]read[ARGS] no"),
        (CallFormat::MistralNamed, "[TOOL_CALLS] begins a call"),
    ] {
        assert_eq!(read(format, true, [output]), (output.to_owned(), vec![]));
    }
}

#[test]
fn one_call_is_all_where_they_are_not_to_be_parallel() {
    let call = r#"<tool_call>{"name": "read", "arguments": {}}</tool_call>"#;
    assert_eq!(read(CallFormat::Hermes, false, [format!("{call}\n{call}").as_str()]).1, ["read {}"]);
}

#[test]
fn white_space_behind_a_comma_goes_whenever_it_comes() {
    let call = r#"[TOOL_CALLS][{"name": "read", "arguments": {}}"#;
    for (behind, text, num_calls) in
        [(",\n", "", 1), (", \n x", "x", 1), (",\n {\"name\": \"read\", \"arguments\": {}}]", "", 2)]
    {
        let singly: Vec<String> = behind.chars().map(String::from).collect();
        let pieces = [call].into_iter().chain(singly.iter().map(String::as_str));
        let expected = (text.to_owned(), vec!["read {}".to_owned(); num_calls]);
        assert_eq!(read(CallFormat::Mistral, true, pieces), expected, "{behind:?}");
        assert_eq!(read(CallFormat::Mistral, true, [format!("{call}{behind}").as_str()]), expected, "{behind:?}");
    }
}

proptest! {
    /// However the output is cut, and whatever it is.
    #[test]
    fn the_cut_makes_no_difference(
        format in prop::sample::select(vec![CallFormat::Hermes, CallFormat::Xml, CallFormat::Mistral,
            CallFormat::MistralNamed, CallFormat::Llama]),
        pieces in prop::collection::vec(prop::sample::select(vec![
            "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "[", "]", "{", "}", ",", ";", "\n", " ", "x", "é",
            "\"name\": \"read\"", "\"arguments\": {", "\"parameters\": {}", "\"path\": \"}\"", "<function=read>",
            "[ARGS]", "[CALL_ID]", "read", "```json", "```", "<parameter=path>", "</parameter>", "</function>",
            "{\"name\": \"read\", \"arguments\": {\"path\": 1}}",
        ]), 0..12),
    ) {
        let output = pieces.concat();
        let whole = read(format, true, [output.as_str()]);
        let singly: Vec<String> = output.chars().map(String::from).collect();
        prop_assert_eq!(read(format, true, singly.iter().map(String::as_str)), whole);
        prop_assert_eq!(read(format, true, pieces), read(format, true, [output.as_str()]));
    }
}
