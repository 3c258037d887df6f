//! The client's own names for the fields that its request was read as: an error names what the client sent.

use serde_json::{Map, Value};

use super::error::ApiError;
use super::fields::{Fields, two_values};

/// Another interface's request in OpenAI's fields.
#[derive(Debug)]
pub struct Translated {
    pub fields: Fields,
    pub sent_as: SentAs,
}

/// Paths such as `messages[2]`, each with what stands for it and for all below it in the request.
#[derive(Debug, Default)]
pub struct SentAs(Vec<(String, String)>);

impl SentAs {
    /// What was read as `read` came as `sent`.
    pub fn add(&mut self, read: impl Into<String>, sent: impl Into<String>) {
        self.0.push((read.into(), sent.into()));
    }

    /// Puts what the client sent as `sent` into the field `read` of `fields`.
    ///
    /// # Errors
    /// 400 where the client sent `read` itself, too, and asks for something else by it.
    pub fn set(
        &mut self,
        fields: &mut Map<String, Value>,
        read: &str,
        sent: &str,
        value: Value,
    ) -> Result<(), ApiError> {
        if fields.get(read).is_some_and(|given| !given.is_null() && *given != value) {
            return Err(two_values(read, sent));
        }
        fields.insert(read.to_owned(), value);
        self.add(read, sent);
        Ok(())
    }

    /// `error` in the client's words: the nearest name is told, and the paths in its message with it.
    pub fn word(&self, error: ApiError) -> ApiError {
        let Some(param) = error.param() else { return error };
        let known = self.0.iter().filter(|(read, _)| is_in(param, read));
        match known.max_by_key(|(read, _)| read.len()) {
            None => error,
            Some((read, sent)) => {
                let renamed = format!("{sent}{}", &param[read.len()..]);
                error.renamed(&renamed)
            }
        }
    }
}

/// Whether `path` is `room`, or below it.
fn is_in(path: &str, room: &str) -> bool {
    path.strip_prefix(room).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn worded(param: &str) -> (String, String) {
        let mut sent_as = SentAs::default();
        sent_as.add("messages", "input");
        sent_as.add("messages[1]", "input[0]");
        sent_as.add("messages[1].tool_calls[0].function", "input[0]");
        let error = sent_as.word(ApiError::invalid(param, format!("`{param}` must be a string")));
        let error = json!(error.into_envelope().error);
        (error["param"].as_str().unwrap().to_owned(), error["message"].as_str().unwrap().to_owned())
    }

    #[test]
    fn the_nearest_name_is_told_in_field_and_message() {
        for (read, sent) in [
            ("messages", "input"),
            ("messages[1].content[2].text", "input[0].content[2].text"),
            ("messages[1].tool_calls[0].function.name", "input[0].name"),
            ("messages[12].role", "input[12].role"),
            ("messages_of_others", "messages_of_others"),
            ("temperature", "temperature"),
        ] {
            assert_eq!(worded(read), (sent.to_owned(), format!("`{sent}` must be a string")));
        }
    }
}
