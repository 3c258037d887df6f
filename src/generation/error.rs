//! Why a generation was refused or could not end.

use thiserror::Error;

use crate::icl::IclError;

#[derive(Debug, Error)]
pub enum GenerationError {
    /// No base and no adapter of this name, as `param` of the request says it; `hint` says what to do.
    #[error("the model `{model}` does not exist: {hint}")]
    UnknownModel { param: String, model: String, hint: String },
    #[error("{message}")]
    InvalidParameter { param: &'static str, message: String },
    /// The adapters named in `param` of the request contradict each other or its model.
    #[error("{message}")]
    InvalidSelection { param: String, message: String },
    /// The in-context examples that a request asks for.
    #[error(transparent)]
    Icl(Box<IclError>),
    /// No memory became free for an adapter: worth trying again.
    #[error("{0}")]
    OutOfMemory(String),
    /// The files of an adapter cannot be read at the moment: worth trying again.
    #[error("{0}")]
    UnreadableAdapter(String),
    /// The prompt leaves no room for even one token.
    #[error(
        "the prompt has {num_prompt_tokens} tokens and the context ends at {context_length}: shorten `{param}`, or ask \
         for fewer tokens"
    )]
    ContextLengthExceeded { param: &'static str, num_prompt_tokens: usize, context_length: usize },
    /// No tokens of the vocabulary are so long that this could fit.
    #[error(
        "the prompt has {num_bytes} bytes, more than the {context_length} tokens of the context can hold: shorten \
         `{param}`"
    )]
    PromptTooLarge { param: &'static str, num_bytes: usize, context_length: usize },
    /// Every place in the queue is taken: worth trying again.
    #[error("the server is overloaded: every place in its queue is taken, try again shortly")]
    Overloaded,
    #[error("the server is shutting down")]
    ShuttingDown,
    /// Its time was over before any output.
    #[error(
        "there was no output within the {max_seconds} seconds that a request may take: send less, try again when the \
         server has less to do, or raise server.max_request_seconds"
    )]
    DeadlineExceeded { max_seconds: u64 },
    /// The engine ended while, or before, the request ran, and not because of it.
    #[error("the engine has stopped: send the request again when the server is back, or to another one")]
    EngineStopped,
    #[error("generation failed: {0}")]
    Failed(String),
}

impl GenerationError {
    /// There is nothing that `param` of the request calls `model`.
    pub fn unknown_model(param: &str, model: &str) -> Self {
        let hint = "GET /v1/models lists what is served".to_owned();
        Self::UnknownModel { param: param.to_owned(), model: model.to_owned(), hint }
    }
}
