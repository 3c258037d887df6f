//! Chat templates, against what transformers renders of the same conversations.

use std::collections::BTreeMap;
use std::{env, fs};

use lorry::prompt::chat::{ChatTemplate, Ending};
use lorry::tools::CallFormat;
use serde::Deserialize;
use serde_json::Value;

#[derive(Deserialize)]
struct Reference {
    bos_token: String,
    eos_token: String,
    conversations: BTreeMap<String, Conversation>,
    templates: BTreeMap<String, Template>,
}

/// As a client sends it.
#[derive(Deserialize)]
struct Conversation {
    messages: Vec<Value>,
    tools: Option<Vec<Value>>,
    add_generation_prompt: Option<bool>,
    #[serde(default)]
    continue_final_message: bool,
}

#[derive(Deserialize)]
struct Template {
    source: String,
    rendered: BTreeMap<String, Rendered>,
}

#[derive(Deserialize, Debug, Clone, PartialEq)]
#[serde(rename_all = "lowercase")]
enum Rendered {
    Text(String),
    /// What the template raises.
    Refusal(String),
}

fn render(template: &ChatTemplate, conversation: &Conversation) -> Rendered {
    let (messages, ending) = match conversation.messages.split_last() {
        Some((last, before)) if conversation.continue_final_message => {
            (before, Ending::Begun(last["content"].as_str().expect("an answer")))
        }
        _ if conversation.add_generation_prompt == Some(false) => (&conversation.messages[..], Ending::LastMessage),
        _ => (&conversation.messages[..], Ending::Prompt),
    };
    match template.render(messages, ending, conversation.tools.as_deref()) {
        Ok(text) => Rendered::Text(text),
        Err(error) => Rendered::Refusal(error.to_string()),
    }
}

/// `strftime(FORMAT)` is what transformers would have written today.
fn with_date(expected: &Rendered) -> Rendered {
    let Rendered::Text(expected) = expected else { return expected.clone() };
    let mut parts = expected.split("strftime(");
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (format, rest) = part.split_once(')').expect("reference.py closed it");
        text.push_str(&format!("{}{rest}", chrono::Local::now().format(format)));
    }
    Rendered::Text(text)
}

fn is_same(found: &Rendered, expected: &Rendered) -> bool {
    match (found, expected) {
        (Rendered::Refusal(found), Rendered::Refusal(expected)) => found.contains(expected),
        _ => found == expected,
    }
}

fn first_difference(found: &Rendered, expected: &Rendered) -> String {
    let (Rendered::Text(found), Rendered::Text(expected)) = (found, expected) else {
        return format!("{found:.200?}\n    expected {expected:?}");
    };
    let same = found.chars().zip(expected.chars()).take_while(|(a, b)| a == b).count();
    let around = |text: &str| text.chars().skip(same.saturating_sub(40)).take(120).collect::<String>();
    format!("{:?}\n    expected {:?}", around(found), around(expected))
}

#[test]
fn templates_render_as_transformers_renders_them() {
    let reference = match env::var_os("LORRY_TEMPLATES") {
        Some(path) => fs::read_to_string(path).expect("LORRY_TEMPLATES is a file that reference.py wrote"),
        None => include_str!("templates/reference.json").to_owned(),
    };
    let reference: Reference = serde_json::from_str(&reference).expect("reference.py wrote it");
    let mut different = Vec::new();
    for (name, Template { source, rendered }) in &reference.templates {
        let template = ChatTemplate::new(source, reference.bos_token.clone(), reference.eos_token.clone());
        let of_template: Vec<_> = rendered
            .iter()
            .filter_map(|(case, expected)| {
                let expected = with_date(expected);
                let found = match &template {
                    Ok(template) => render(template, &reference.conversations[case]),
                    Err(error) => Rendered::Refusal(error.to_string()),
                };
                let difference = || format!("  {case}: {}", first_difference(&found, &expected));
                (!is_same(&found, &expected)).then(difference)
            })
            .collect();
        if !of_template.is_empty() {
            different.push(format!("{name}:\n{}", of_template.join("\n")));
        }
    }
    let count = reference.templates.len();
    println!("{} of {count} templates render as transformers has them", count - different.len());
    assert!(different.is_empty(), "{}", different.join("\n"));
}

#[test]
fn calls_are_worded_as_the_template_renders_them_or_not_offered() {
    let reference: Reference =
        serde_json::from_str(include_str!("templates/reference.json")).expect("reference.py wrote it");
    let formats = reference.templates.iter().filter_map(|(name, Template { source, .. })| {
        let template = ChatTemplate::new(source, reference.bos_token.clone(), reference.eos_token.clone());
        Some((name.as_str(), template.expect("it compiles").call_format()?))
    });
    assert_eq!(
        formats.collect::<Vec<_>>(),
        [
            ("granite", CallFormat::Granite),
            ("hermes", CallFormat::Hermes),
            ("llama3", CallFormat::Llama),
            ("mistral-tekken", CallFormat::MistralNamed),
            ("mistral-v3", CallFormat::Mistral),
            ("smollm3", CallFormat::Hermes),
            ("xml-calls", CallFormat::Xml),
        ]
    );
}
