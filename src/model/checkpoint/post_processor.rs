//! What a `tokenizer.json` puts around every text.

use serde_json::Value;

use super::CheckpointError;
use super::tokenizer::{FILE, steps};

/// Texts of the special tokens before and behind a text.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Surroundings<'a> {
    pub before: Vec<&'a str>,
    pub behind: Vec<&'a str>,
}

impl<'a> Surroundings<'a> {
    /// # Errors
    /// When there is a step that is not known.
    pub fn of(post_processor: Option<&'a Value>) -> Result<Self, CheckpointError> {
        let mut around = Self::default();
        for step in steps(post_processor, "processors") {
            match (step.get("type").and_then(Value::as_str), step.get("single").and_then(Value::as_array)) {
                // Of offsets alone.
                (Some("ByteLevel"), _) => {}
                (Some("TemplateProcessing"), Some(pieces)) => around.extend(pieces),
                _ => return Err(CheckpointError::file(FILE, format!("post_processor: the step {step} is not served"))),
            }
        }
        Ok(around)
    }

    fn extend(&mut self, pieces: &'a [Value]) {
        let mut side = &mut self.before;
        for piece in pieces {
            match piece.pointer("/SpecialToken/id").and_then(Value::as_str) {
                Some(text) => side.push(text),
                None => side = &mut self.behind,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn tokens_stand_before_or_behind_the_text() {
        let special = |text: &str| json!({"SpecialToken": {"id": text, "type_id": 0}});
        let text = json!({"Sequence": {"id": "A", "type_id": 0}});
        let template = json!({"type": "TemplateProcessing", "single": [special("<s>"), text, special("</s>")]});
        let byte_level = json!({"type": "ByteLevel", "trim_offsets": false});
        let sequence = json!({"type": "Sequence", "processors": [byte_level, template]});
        let expected = Surroundings { before: vec!["<s>"], behind: vec!["</s>"] };
        assert_eq!(Surroundings::of(Some(&template)).unwrap(), expected);
        assert_eq!(Surroundings::of(Some(&sequence)).unwrap(), expected);
        assert_eq!(Surroundings::of(None).unwrap(), Surroundings::default());
        let unknown = json!({"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0]});
        assert!(Surroundings::of(Some(&unknown)).unwrap_err().to_string().contains("RobertaProcessing"));
    }
}
