//! The server that is asked, what it is asked for, and its streamed replies.

use std::io::{self, BufRead, BufReader, Read, Take};

use clap::Args;
use serde::Serialize;
use serde_json::{Number, Value};

use super::events::{Event, read_line};

/// Most bytes of a reply that are read.
const MAX_REPLY_BYTES: u64 = 64 << 20;

/// As it comes.
pub type Reply = Take<Box<dyn Read + Send + Sync>>;

#[derive(Debug, Clone, Args)]
pub struct ServerArgs {
    /// Address of a running server.
    #[arg(long, default_value = "http://127.0.0.1:8080")]
    pub url: String,
    /// Key, where the server needs one.
    #[arg(long, env = "LORRY_API_KEY", hide_env_values = true)]
    pub api_key: Option<String>,
}

/// Fields of a request, as the API has them; what is absent is the server's default.
#[derive(Debug, Clone, Args, Serialize)]
pub struct RequestArgs {
    /// The base, an adapter or an alias; the base when absent.
    #[arg(long, value_name = "NAME")]
    #[serde(skip_serializing_if = "Option::is_none")]
    model: Option<String>,
    /// Most output tokens.
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    max_tokens: Option<u32>,
    /// How freely tokens are drawn: 0 takes the likeliest.
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    temperature: Option<Number>,
    /// Draw from the likeliest tokens that together have this probability.
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    top_p: Option<Number>,
    /// The same draws the same.
    #[arg(long, allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    seed: Option<i64>,
    /// Text that ends the output; may be repeated.
    #[arg(long)]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    stop: Vec<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum TerminalError {
    #[error("the server at {url} cannot be reached (`lorry serve` starts one): {source}")]
    Unreachable { url: String, source: Box<ureq::Transport> },
    #[error("the server refuses the request with status {status}: {message}")]
    Refused { status: u16, message: String },
    #[error("the server could not finish the reply: {0}")]
    Failed(String),
    #[error("the reply has broken off: {0}")]
    BrokenOff(io::Error),
    #[error("the server's reply is not what was asked for: {0}")]
    Reply(#[from] serde_json::Error),
    #[error("the prompt cannot be read: {0}")]
    Input(io::Error),
    #[error("the output cannot be written: {0}")]
    Output(io::Error),
}

impl ServerArgs {
    /// # Errors
    /// No server, or one that refuses the request.
    pub fn post(&self, path: &str, body: &impl Serialize) -> Result<Reply, TerminalError> {
        let mut post = ureq::post(&format!("{}{path}", self.url.trim_end_matches('/')));
        if let Some(key) = &self.api_key {
            post = post.set("Authorization", &format!("Bearer {key}"));
        }
        let response = post.send_json(body).map_err(|error| match error {
            ureq::Error::Status(status, response) => {
                let body = response.into_string().unwrap_or_default();
                let envelope = serde_json::from_str(&body).unwrap_or(Value::Null);
                let message = envelope["error"]["message"].as_str().map_or(body, str::to_owned);
                TerminalError::Refused { status, message }
            }
            ureq::Error::Transport(source) => {
                TerminalError::Unreachable { url: self.url.clone(), source: Box::new(source) }
            }
        })?;
        Ok(response.into_reader().take(MAX_REPLY_BYTES))
    }

    /// The text of a reply that `body` asks to be streamed, as it comes. Dropping the result cancels the generation.
    ///
    /// # Errors
    /// As of [`ServerArgs::post`].
    pub fn stream(&self, path: &str, body: &impl Serialize) -> Result<Pieces<Reply>, TerminalError> {
        Ok(Pieces::new(self.post(path, body)?))
    }
}

/// The pieces of one text; after an error there are none.
#[derive(Debug)]
pub struct Pieces<R> {
    events: BufReader<R>,
    has_ended: bool,
}

impl<R: Read> Pieces<R> {
    fn new(events: R) -> Self {
        Self { events: BufReader::new(events), has_ended: false }
    }

    /// `None` after the last.
    fn read(&mut self) -> Result<Option<String>, TerminalError> {
        loop {
            let mut line = String::new();
            if self.events.read_line(&mut line).map_err(TerminalError::BrokenOff)? == 0 {
                return Err(TerminalError::BrokenOff(io::ErrorKind::UnexpectedEof.into()));
            }
            match read_line(&line)? {
                Some(Event::Piece { text, .. }) if !text.is_empty() => return Ok(Some(text)),
                Some(Event::Done) => return Ok(None),
                Some(Event::Piece { .. }) | None => {}
            }
        }
    }
}

impl<R: Read> Iterator for Pieces<R> {
    type Item = Result<String, TerminalError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.has_ended {
            return None;
        }
        let piece = self.read().transpose();
        self.has_ended = !matches!(piece, Some(Ok(_)));
        piece
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pieces and, where there is one, the error behind them.
    fn pieces(events: &str) -> (Vec<String>, Option<String>) {
        let (pieces, errors): (Vec<_>, Vec<_>) = Pieces::new(events.as_bytes()).partition(Result::is_ok);
        let pieces = pieces.into_iter().map(Result::unwrap).collect();
        assert!(errors.len() < 2, "{errors:?}");
        (pieces, errors.into_iter().next().map(|error| error.unwrap_err().to_string()))
    }

    #[test]
    fn the_texts_of_completions_and_chats_are_read_and_what_has_none_is_passed_over() {
        let events = [
            r#"data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}"#,
            ": keep-alive",
            r#"data: {"choices":[{"index":0,"delta":{"content":"a\n"}}]}"#,
            r#"data: {"choices":[{"index":0,"text":"data: b"}]}"#,
            r#"data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}"#,
            r#"data: {"choices":[],"usage":{}}"#,
            "data: [DONE]",
            "data: never read",
        ];
        for end in ["\n\n", "\r\n\r\n"] {
            assert_eq!(pieces(&(events.join(end) + end)), (vec!["a\n".to_owned(), "data: b".to_owned()], None));
        }
    }

    #[test]
    fn a_reply_that_ends_before_its_end_is_told_from_a_whole_one() {
        let begun = "data: {\"choices\":[{\"text\":\"a\"}]}\n\n";
        for (end, cause) in [
            ("", "broken off"),
            ("data: {\"choices\":[{\"te", "not what was asked for"),
            ("data: {\"error\":{\"message\":\"the engine has stopped\"}}\n\n", "the engine has stopped"),
        ] {
            let (pieces, error) = pieces(&format!("{begun}{end}"));
            assert_eq!(pieces, ["a"]);
            assert!(error.as_ref().is_some_and(|error| error.contains(cause)), "{end}: {error:?}");
        }
    }
}
