//! From what a client asks to the prompt a model was trained on: chat, an adapter's instruction, in-context examples,
//! fill-in-the-middle.

pub mod chat;
mod environment;
pub mod fim;
pub mod formats;
pub mod instruction;
pub mod literal;
mod messages;

#[derive(Debug, thiserror::Error)]
pub enum PromptError {
    /// The client's messages are malformed; `field` names the place, such as `messages[2].content`.
    #[error("{field}: {reason}")]
    Messages { field: String, reason: &'static str },
    /// The model's chat template cannot render these messages, or says why it will not.
    #[error("messages: the chat template of the model refuses them: {0}")]
    Refused(String),
    /// The model was not trained to chat, or its file does not say how.
    #[error("the model has no chat template")]
    NoChatTemplate,
    #[error("the model's tokenizer.chat_template cannot be used: {0}")]
    ChatTemplate(String),
    #[error("the prompt template of the adapter cannot be used: {0}")]
    Instruction(String),
    /// At the start, or when the values of a request break a template.
    #[error("prompt_formats.{name}.template: {reason}")]
    Format { name: String, reason: String },
    #[error("`prompt_format` is `{name}`, which is not known; there are: {known}")]
    UnknownFormat { name: String, known: String },
}
