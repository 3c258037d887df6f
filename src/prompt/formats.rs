//! Prompt formats: how an instruction and the examples before it become what the model reads.
//!
//! `paper-v2` and `paper-rev` are byte for byte those of the two versions of the paper's code (arXiv 2308.10462).

use std::collections::BTreeMap;
use std::sync::Arc;

use minijinja::{Environment, context};
use serde_json::{Value, json};

use super::PromptError;
use super::instruction::{self, NAME};
use crate::config::PromptFormatConfig;
use crate::icl::Example;

const V2_SENTENCE: &str = "Generate Python code given a natural language instruction.";
/// After an example's instruction, in the paper's code by accident.
const V2_PADDING: &str = "                                ";

/// A prompt format, ready to render; clones are cheap.
#[derive(Debug, Clone)]
pub enum PromptFormat {
    /// Examples as earlier turns of user and assistant, for the model's own chat template.
    Chat,
    PaperV2,
    PaperRev,
    Template(Arc<Template>),
}

/// A template of the configuration, over `instruction` and `examples`.
#[derive(Debug)]
pub struct Template {
    name: String,
    environment: Environment<'static>,
}

/// Who reads the prompt: an adapter has learnt the task and is not told it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reader {
    Base,
    Adapter,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Rendered {
    /// The prompt as it is, to be encoded after the model's first token.
    Text(String),
    /// OpenAI messages for the chat template.
    Messages(Vec<Value>),
}

/// What an adapter of the paper was trained on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrainingText {
    pub prompt: String,
    /// What the loss is taken on, before the end token.
    pub response: String,
}

impl PromptFormat {
    /// # Errors
    /// When a template fails on these values; the others never do.
    pub fn render(&self, instruction: &str, examples: &[&Example], reader: Reader) -> Result<Rendered, PromptError> {
        let text = match self {
            Self::Chat => {
                let question = json!({"role": "user", "content": instruction});
                return Ok(Rendered::Messages(with_example_turns(&[question], examples)));
            }
            Self::PaperV2 => {
                let sentence = if reader == Reader::Base { V2_SENTENCE } else { "" };
                let shots = examples.iter().map(|Example { instruction, code }| {
                    format!("\n### Instruction:\n{instruction}{V2_PADDING}\n### Response:\n{code}\n")
                });
                format!("{sentence}{}\n{}", shots.collect::<String>(), v2_question(instruction))
            }
            Self::PaperRev => {
                let shots = examples.iter().map(|Example { instruction, code }| {
                    format!("{}{}\n\n", rev_question(instruction), rev_answer(code))
                });
                format!("{}{}", shots.collect::<String>(), rev_question(instruction))
            }
            Self::Template(template) => template.render(instruction, examples)?,
        };
        Ok(Rendered::Text(text))
    }

    /// What the paper trained on for this pair; `None` for formats that are not the paper's.
    pub fn training_text(&self, Example { instruction, code }: &Example) -> Option<TrainingText> {
        match self {
            Self::PaperV2 => Some(TrainingText { prompt: v2_question(instruction), response: code.clone() }),
            Self::PaperRev => Some(TrainingText { prompt: rev_question(instruction), response: rev_answer(code) }),
            Self::Chat | Self::Template(_) => None,
        }
    }
}

fn v2_question(instruction: &str) -> String {
    format!("### Instruction:\n{instruction}\n### Response:\n")
}

fn rev_question(instruction: &str) -> String {
    format!("### Instruction:\n{instruction}\n### Response:\n```python\n")
}

fn rev_answer(code: &str) -> String {
    format!("{code}\n```")
}

/// `messages` with the examples as turns before the conversation, but after what the system says at its start.
pub fn with_example_turns(messages: &[Value], examples: &[&Example]) -> Vec<Value> {
    let (system, conversation) = split_system(messages);
    let turns = examples.iter().flat_map(|Example { instruction, code }| {
        [json!({"role": "user", "content": instruction}), json!({"role": "assistant", "content": code})]
    });
    system.iter().cloned().chain(turns).chain(conversation.iter().cloned()).collect()
}

/// What the system says at the start of `messages`, and the conversation behind it.
pub fn split_system(messages: &[Value]) -> (&[Value], &[Value]) {
    let is_system = |message: &&Value| matches!(message["role"].as_str(), Some("system" | "developer"));
    messages.split_at(messages.iter().take_while(is_system).count())
}

impl Template {
    fn new(name: &str, source: &str) -> Result<Self, PromptError> {
        let invalid = |reason| PromptError::Format { name: name.to_owned(), reason };
        let environment = instruction::compile(source).map_err(|error| invalid(error.to_string()))?;
        instruction::check_variables(&environment, &["instruction", "examples"]).map_err(invalid)?;
        let template = Self { name: name.to_owned(), environment };
        // Shows most of what only rendering shows, such as an unknown filter or field.
        let example = Example { instruction: "instruction".to_owned(), code: "code".to_owned() };
        template.render("instruction", &[&example])?;
        Ok(template)
    }

    fn render(&self, instruction: &str, examples: &[&Example]) -> Result<String, PromptError> {
        let fields = |example: &&Example| {
            minijinja::Value::from_pairs([("instruction", &*example.instruction), ("code", &*example.code)])
        };
        let examples: minijinja::Value = examples.iter().map(fields).collect();
        let context = context! { instruction, examples };
        let rendered = self.environment.get_template(NAME).and_then(|template| template.render(context));
        rendered.map_err(|error| PromptError::Format { name: self.name.clone(), reason: error.to_string() })
    }
}

/// The built-in formats and those of the configuration, by name.
#[derive(Debug, Clone)]
pub struct PromptFormats(BTreeMap<String, PromptFormat>);

impl PromptFormats {
    /// # Errors
    /// When a template has the name of a built-in format, is not Jinja, does not use `instruction`, or uses more than
    /// `instruction` and `examples`.
    pub fn new(templates: &BTreeMap<String, PromptFormatConfig>) -> Result<Self, PromptError> {
        let built_in =
            [("chat", PromptFormat::Chat), ("paper-v2", PromptFormat::PaperV2), ("paper-rev", PromptFormat::PaperRev)];
        let mut formats: BTreeMap<String, PromptFormat> =
            built_in.into_iter().map(|(name, format)| (name.to_owned(), format)).collect();
        for (name, PromptFormatConfig { template }) in templates {
            if formats.contains_key(name) {
                let reason = "the name is that of a built-in format: take another".to_owned();
                return Err(PromptError::Format { name: name.clone(), reason });
            }
            formats.insert(name.clone(), PromptFormat::Template(Arc::new(Template::new(name, template)?)));
        }
        Ok(Self(formats))
    }

    /// # Errors
    /// When there is no such format; the error lists those there are.
    pub fn get(&self, name: &str) -> Result<PromptFormat, PromptError> {
        self.0.get(name).cloned().ok_or_else(|| PromptError::UnknownFormat {
            name: name.to_owned(),
            known: self.0.keys().map(String::as_str).collect::<Vec<_>>().join(", "),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example(instruction: &str, code: &str) -> Example {
        Example { instruction: instruction.to_owned(), code: code.to_owned() }
    }

    fn formats(name: &str, template: &str) -> Result<PromptFormats, String> {
        let template = PromptFormatConfig { template: template.to_owned() };
        PromptFormats::new(&BTreeMap::from([(name.to_owned(), template)])).map_err(|error| error.to_string())
    }

    #[test]
    fn an_adapter_is_not_told_the_task_again() {
        let render = |reader| PromptFormat::PaperV2.render("q", &[], reader).unwrap();
        let Rendered::Text(base) = render(Reader::Base) else { panic!("text") };
        assert_eq!(render(Reader::Adapter), Rendered::Text(base.strip_prefix(V2_SENTENCE).unwrap().to_owned()));
    }

    #[test]
    fn examples_are_turns_between_the_system_and_the_conversation() {
        let message = |role: &str, content: &str| json!({"role": role, "content": content});
        let messages = [message("system", "s"), message("user", "a"), message("system", "late")];
        let turns = with_example_turns(&messages, &[&example("i", "c")]);
        let expected = [&messages[0], &message("user", "i"), &message("assistant", "c"), &messages[1], &messages[2]];
        assert_eq!(turns.iter().collect::<Vec<_>>(), expected);
        let rendered = PromptFormat::Chat.render("q", &[&example("i", "c")], Reader::Base).unwrap();
        let expected = vec![message("user", "i"), message("assistant", "c"), message("user", "q")];
        assert_eq!(rendered, Rendered::Messages(expected));
    }

    #[test]
    fn a_template_gets_the_instruction_and_the_examples_as_they_are() {
        let source = "{% for e in examples %}# {{ e.instruction }}\n{{ e.code }}\n{% endfor %}# {{ instruction }}\n";
        let format = formats("Comment.v1", source).unwrap().get("Comment.v1").unwrap();
        let rendered = format.render("q", &[&example("<i>", "a && b"), &example("j", "c")], Reader::Base).unwrap();
        assert_eq!(rendered, Rendered::Text("# <i>\na && b\n# j\nc\n# q\n".to_owned()));
    }

    #[test]
    fn a_template_that_cannot_work_is_refused_at_the_start_by_name() {
        let cases = [
            ("mine", "no place", "{{ instruction }}"),
            ("mine", "{{ instruction }}{{ schema }}", "schema"),
            ("mine", "{{ instruction", "prompt_formats.mine.template"),
            ("mine", "{{ instruction }}{% for e in examples %}{{ e.cmd }}{% endfor %}", "undefined"),
            ("paper-v2", "{{ instruction }}", "prompt_formats.paper-v2"),
        ];
        for (name, template, reason) in cases {
            let error = formats(name, template).expect_err(template);
            assert!(error.contains(reason), "{error}");
        }
    }

    #[test]
    fn an_unknown_format_is_refused_with_those_there_are() {
        let error = formats("mine", "{{ instruction }}").unwrap().get("alpaca").unwrap_err().to_string();
        assert!(error.contains("`alpaca`") && error.contains("chat, mine, paper-rev, paper-v2"), "{error}");
    }
}
