//! What a streamed reply says line by line, be it a completion or a chat.

use serde::Deserialize;

use super::TerminalError;

/// What follows the last event.
const DONE: &str = "[DONE]";

#[derive(Debug, PartialEq)]
pub enum Event {
    /// The text may be empty. With OpenAI's `stream_options.include_usage`, the last one says what the request took.
    Piece {
        text: String,
        usage: Option<Usage>,
    },
    Done,
}

/// In tokens, as far as the server says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct Usage {
    pub prompt_tokens: Option<u64>,
    pub completion_tokens: Option<u64>,
}

/// `None` where a line holds no event: it is empty, or a comment that keeps the connection alive.
///
/// # Errors
/// An event that tells of an error, or is not one of a reply.
pub fn read_line(line: &str) -> Result<Option<Event>, TerminalError> {
    let Some(data) = line.strip_prefix("data:") else { return Ok(None) };
    let data = data.trim();
    if data == DONE {
        return Ok(Some(Event::Done));
    }
    let chunk: Chunk = serde_json::from_str(data)?;
    if let Some(error) = chunk.error {
        return Err(TerminalError::Failed(error.message));
    }
    let texts = chunk.choices.into_iter().map(|choice| choice.text.or(choice.delta.content));
    Ok(Some(Event::Piece { text: texts.flatten().collect(), usage: chunk.usage }))
}

/// What is read of an event.
#[derive(Debug, Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Usage>,
    error: Option<ErrorReply>,
}

#[derive(Debug, Deserialize)]
struct Choice {
    text: Option<String>,
    #[serde(default)]
    delta: Delta,
}

#[derive(Debug, Default, Deserialize)]
struct Delta {
    content: Option<String>,
}

#[derive(Debug, Deserialize)]
struct ErrorReply {
    message: String,
}
